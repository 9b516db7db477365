"""OpenVLA's checkpoints in Hugging Face's form: config.json, model*.safetensors, tokenizer, statistics."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stare_jax.config import read_json, to_dict
from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.models.openvla.presets import openvla_7b
from stare_jax.weights.files import Spec, Tensors, WeightsError, list_model, update_json
from stare_jax.weights.format import Format
from stare_jax.weights.side_files import CONFIG
from stare_jax.weights.statistics import read_openvla_stats, to_openvla_table, write_openvla_tables
from stare_jax.weights.tensor_table import CONV, HEADS_IN, KERNEL, LINEAR, NORM, SCALE, Entry, make_entries, table_specs

TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
OVERRIDES = "tiny_timm_overrides"
"""field of config.json, found in small checkpoints for tests: sizes of the towers that their timm ids do not say"""
_REQUIRED = ("timm_model_ids", "text_config", "image_sizes", "pad_to_multiple_of")
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
"""our fields -> transformers'"""
_BICUBIC = ("bicubic", 3)
"""names under which timm and PIL know it"""
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
        WeightsError: a field is missing, or vision towers or the resizing of images are not those of OpenVLA-7B.
    """
    file = Path(folder) / CONFIG
    description = read_json(file)
    if missing := [name for name in _REQUIRED if name not in description]:
        raise WeightsError(f"{file}: got no {', '.join(missing)}, expected the configuration of an OpenVLA checkpoint")
    if tuple(description["timm_model_ids"]) != TIMM_IDS:
        raise WeightsError(f"{file}: timm_model_ids: got {description['timm_model_ids']}, expected {TIMM_IDS}")
    try:
        config = _build(openvla_7b(tokenizer=str(folder)), description)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: {error}") from error
    return read_preprocessor(folder, config)


def _build(base: OpenVLAConfig, description: Mapping[str, Any]) -> OpenVLAConfig:
    overrides, text = description.get(OVERRIDES, {}), description["text_config"]
    towers = zip(TIMM_IDS, (base.dino, base.siglip), strict=True)
    dino, siglip = (_override(tower, overrides.get(name, {})) for name, tower in towers)
    fields = {ours: text[theirs] for ours, theirs in _LLAMA_FIELDS.items() if theirs in text}
    num_kv_heads = text.get("num_key_value_heads", fields.get("num_heads", base.llm.num_heads))
    llm = dataclasses.replace(base.llm, num_kv_heads=num_kv_heads, **fields)
    dtype = description.get("torch_dtype") or "float32"
    return dataclasses.replace(
        base,
        dino=dino,
        siglip=siglip,
        projector_dim=4 * (dino.width + siglip.width),
        llm=llm,
        action_vocab_end=llm.vocab_size - description["pad_to_multiple_of"],
        image_size=description["image_sizes"][0],
        execution=dataclasses.replace(base.execution, dtype=dtype, param_dtype=dtype),
    )


def _override(tower: ViTConfig, sizes: Mapping[str, Any]) -> ViTConfig:
    width = sizes.get("embed_dim", tower.width)
    # A ratio gives a whole number, which rounding must not lessen.
    mlp_dim = int(width * sizes.get("mlp_ratio", tower.mlp_dim / tower.width) + 1e-6)
    depth, num_heads = sizes.get("depth", tower.depth), sizes.get("num_heads", tower.num_heads)
    return dataclasses.replace(tower, width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)


def read_preprocessor(folder: str | Path, config: OpenVLAConfig) -> OpenVLAConfig:
    """Takes means and standard deviations from preprocessor_config.json, where there is one.

    The published files carry them twice, and those that Hugging Face's processor uses, in `tvf_normalize_params`, are
    rounded to bfloat16.

    Raises:
        WeightsError: images are to be resized in another way than bicubically to a square of `config.image_size`.
    """
    for file in (Path(folder) / CONFIG, Path(folder) / "preprocessor_config.json"):
        description = read_json(file, optional=True)
        _check_resizing(file, description, config.image_size)
    if not description:
        return config
    fields = description.get("tvf_normalize_params")
    if fields is None:
        fields = [{"mean": m, "std": s} for m, s in zip(description["means"], description["stds"], strict=True)]
    if len(fields) != 2:
        raise WeightsError(f"{file}: tvf_normalize_params: got {len(fields)}, expected 2, of DINO's tower and SigLIP's")
    dino, siglip = (
        dataclasses.replace(tower, mean=tuple(stats["mean"]), std=tuple(stats["std"]))
        for tower, stats in zip((config.dino, config.siglip), fields, strict=True)
    )
    return dataclasses.replace(config, dino=dino, siglip=siglip)


def _check_resizing(file: Path, description: dict[str, Any], size: int) -> None:
    """Raises WeightsError where images would go through anything but a bicubic squash, as far as the file says."""
    square = [size, size]
    wanted = [
        ("image_resize_strategy", description.get("image_resize_strategy"), ("resize-naive",)),
        ("tvf_do_letterbox", description.get("tvf_do_letterbox"), (False,)),
    ]
    wanted += [("interpolations", name, _BICUBIC) for name in description.get("interpolations", ())]
    wanted += [("input_sizes", shape, ([3, *square],)) for shape in description.get("input_sizes", ())]
    for resize in description.get("tvf_resize_params", ()):
        wanted += [("tvf_resize_params.size", resize.get("size"), (square,))]
        wanted += [("tvf_resize_params.interpolation", resize.get("interpolation"), _BICUBIC)]
    for name, got, allowed in wanted:
        if got is not None and got not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise WeightsError(f"{file}: {name}: got {got!r}, expected {expected}")


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
    if dtype is not None:
        update_json(folder / CONFIG, {"torch_dtype": dtype})


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
