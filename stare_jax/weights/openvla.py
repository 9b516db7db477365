"""OpenVLA's checkpoints in Hugging Face's form: config.json, model*.safetensors, tokenizer, statistics."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from stare_jax.config import to_dict, user_input
from stare_jax.documents import openvla as documents
from stare_jax.documents import read_json
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.models.openvla.presets import openvla_7b
from stare_jax.weights.files import Spec, Tensors, list_model, update_json
from stare_jax.weights.format import Format
from stare_jax.weights.side_files import CONFIG
from stare_jax.weights.statistics import read_openvla_stats, to_openvla_table, write_openvla_tables
from stare_jax.weights.tensor_table import CONV, HEADS_IN, KERNEL, LINEAR, NORM, SCALE, Entry, make_entries, table_specs

TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
_TOWER = {
    "pos_embed": ("pos_embed", "same"),
    "patch_embed": ("patch_embed.proj", CONV),
    "blocks/qkv": ("blocks.{}.attn.qkv", LINEAR),
    "blocks/proj": ("blocks.{}.attn.proj", HEADS_IN),
}
_TOWER |= {f"blocks/{name}": (f"blocks.{{}}.mlp.{name}", LINEAR) for name in ("fc1", "fc2")}
_TOWER |= {f"blocks/{name}": (f"blocks.{{}}.{name}", NORM) for name in ("norm1", "norm2")}
_TOWERS = {"dino": "vision_backbone.featurizer.", "siglip": "vision_backbone.fused_featurizer."}
_LLM = {
    "embed_tokens": ("model.embed_tokens.weight", "same"),
    "norm": ("model.norm", SCALE),
    "lm_head": ("lm_head", KERNEL),
    "layers/input_norm": ("model.layers.{}.input_layernorm", SCALE),
    "layers/post_norm": ("model.layers.{}.post_attention_layernorm", SCALE),
    "layers/o_proj/kernel": ("model.layers.{}.self_attn.o_proj.weight", "heads"),
}
_LLM |= {f"layers/{name}_proj": (f"model.layers.{{}}.self_attn.{name}_proj", KERNEL) for name in "qkv"}
_LLM |= {f"layers/{name}_proj": (f"model.layers.{{}}.mlp.{name}_proj", KERNEL) for name in ("gate", "up", "down")}


def read_config(folder: str | Path) -> OpenVLAConfig:
    """Builds our configuration from a checkpoint's config.json; what it leaves out is as in OpenVLA-7B.

    Raises:
        DocumentError: a field is missing or damaged, or the original would compute something else.
        ConfigError: the sizes do not go together.
    """
    with user_input(str(Path(folder) / CONFIG)):
        config = _build(openvla_7b(tokenizer=str(folder)), documents.read_description(Path(folder)))
    return read_preprocessor(folder, config)


def _build(base: OpenVLAConfig, description: documents.Description) -> OpenVLAConfig:
    overrides, text = description.tiny_timm_overrides, description.text_config
    towers = zip(TIMM_IDS, (base.dino, base.siglip), strict=True)
    dino, siglip = (_override(tower, overrides.get(name, documents.Tower())) for name, tower in towers)
    llm = LlamaConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        depth=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
        mlp_dim=text.intermediate_size,
        rope_theta=description.rope_theta or base.llm.rope_theta,
        norm_eps=text.rms_norm_eps,
    )
    dtype = description.float_type or "float32"
    return dataclasses.replace(
        base,
        dino=dino,
        siglip=siglip,
        projector_dim=4 * (dino.width + siglip.width),
        llm=llm,
        action_vocab_end=llm.vocab_size - description.pad_to_multiple_of,
        image_size=description.image_sizes[0],
        execution=dataclasses.replace(base.execution, dtype=dtype, param_dtype=dtype),
    )


def _override(tower: ViTConfig, sizes: documents.Tower) -> ViTConfig:
    width, ratio = sizes.embed_dim or tower.width, sizes.mlp_ratio or tower.mlp_dim / tower.width
    # A ratio gives a whole number, which rounding must not lessen.
    mlp_dim = int(width * ratio + 1e-6)
    depth, num_heads = sizes.depth or tower.depth, sizes.num_heads or tower.num_heads
    return dataclasses.replace(tower, width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)


def read_preprocessor(folder: str | Path, config: OpenVLAConfig) -> OpenVLAConfig:
    """Takes statistics of colours from preprocessor_config.json, where there is one, see `documents.read_colours`."""
    colours = documents.read_colours(Path(folder), config.image_size)
    if colours is None:
        return config
    dino, siglip = (
        dataclasses.replace(tower, mean=stats.mean, std=stats.std)
        for tower, stats in zip((config.dino, config.siglip), colours, strict=True)
    )
    return dataclasses.replace(config, dino=dino, siglip=siglip)


def tensor_table(config: OpenVLAConfig) -> dict[str, Entry]:
    """Returns the checkpoint's tensors for every leaf of our tree but adapters and value head, by the leaf's path."""
    table = {}
    for tower, prefix in _TOWERS.items():
        sizes, rows = getattr(config, tower), dict(_TOWER)
        rows |= {token: (token, "same") for token in ("cls_token", "reg_token")[: sizes.num_prefix]}
        if sizes.layer_scale is not None:
            rows |= {f"blocks/{name}": (f"blocks.{{}}.{name}.scale_factor", "same") for name in ("ls1", "ls2")}
        table |= make_entries(rows, sizes.depth - 1, ours=f"{tower}/", theirs=prefix)
    rows = {name: (name, LINEAR) for name in ("fc1", "fc2", "fc3")}
    table |= make_entries(rows, ours="projector/", theirs="projector.")
    return table | make_entries(_LLM, config.llm.depth, ours="llm/", theirs="language_model.")


def adapter_table(table: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the places of adapters of a table's kernels in PEFT's files, less the beginning of their names."""
    adapters = {}
    for path, (names, kind, num_stacked) in table.items():
        module, _, leaf = path.rpartition("/")
        if leaf == "kernel":
            kind_b = "pointwise" if kind == "conv" else "linear"
            for ours, theirs, which in (("lora_a", "lora_A", kind), ("lora_b", "lora_B", kind_b)):
                files = tuple(f"{name.removesuffix('.weight')}.{theirs}.weight" for name in names)
                adapters[f"{module}/{ours}"] = Entry(files, which, num_stacked)
    return adapters


def unused_specs(config: OpenVLAConfig, dtype: str) -> dict[str, Spec]:
    """Returns the checkpoint's tensors that are never run: last blocks, final norms, SigLIP's attention pool."""
    used, unused = table_specs(tensor_table(config), config, dtype), {}
    for tower, prefix in _TOWERS.items():
        sizes = getattr(config, tower)
        first, last = f"{prefix}blocks.0.", f"{prefix}blocks.{sizes.depth - 1}."
        unused |= {last + name.removeprefix(first): spec for name, spec in used.items() if name.startswith(first)}
        unused |= {f"{prefix}norm.{suffix}": Spec(dtype, (sizes.width,)) for suffix in ("weight", "bias")}
    width, hidden, pool = config.siglip.width, config.siglip.mlp_dim, f"{_TOWERS['siglip']}attn_pool."
    unused[f"{pool}latent"] = Spec(dtype, (1, 1, width))
    weights = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width), "norm": (width,)}
    weights |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for name, shape in weights.items():
        unused |= {f"{pool}{name}.weight": Spec(dtype, shape), f"{pool}{name}.bias": Spec(dtype, shape[:1])}
    return unused


def _find(source: Path) -> Tensors | None:
    description = read_json(source / CONFIG, optional=True)
    is_openvla = description.get("model_type") == "openvla" or "timm_model_ids" in description
    return list_model(source) if is_openvla else None


def _finish(folder: Path, config: OpenVLAConfig, dtype: str | None) -> None:
    """Names the type of the tensors under every name that config.json has for it, of the language model, too."""
    if dtype is None:
        return
    fields = read_json(folder / CONFIG, optional=True)
    text = fields.get("text_config", {})
    text |= {name: dtype for name in documents.DTYPE_NAMES if name in text}
    there = [name for name in documents.DTYPE_NAMES if name in fields] or documents.DTYPE_NAMES[:1]
    update_json(folder / CONFIG, {"text_config": text} | dict.fromkeys(there, dtype))


def _known(folder: Path) -> dict:
    fields = to_dict(read_config(folder))
    return {name: fields[name] for name in ("dino", "siglip", "projector_dim", "llm", "action_vocab_end", "image_size")}


OPENVLA = Format(
    name="openvla",
    model=OpenVLAConfig,
    kept="huggingface",
    find=_find,
    clean=lambda source, tensors: (tensors, ()),
    read_config=read_config,
    table=lambda config, names: tensor_table(config),
    statistics=read_openvla_stats,
    add_statistics=lambda folder, name, stats: write_openvla_tables(folder, {name: to_openvla_table(stats)}),
    unused=unused_specs,
    finish=_finish,
    max_bytes=5 * 10**9,
    keeps_unused=True,
    one_dtype=True,
    known=_known,
)
