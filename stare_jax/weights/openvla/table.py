"""Table from our leaves to the tensors of an OpenVLA checkpoint, and the tensors that are never run."""

from collections.abc import Mapping

from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights.safetensors_folder import Spec
from stare_jax.weights.tensor_table import Entry, leaf_shapes, table_specs

_LINEAR = {"weight": ("kernel", "linear"), "bias": ("bias", "vector")}
_HEADS_IN = {"weight": ("kernel", "heads"), "bias": ("bias", "vector")}
_NORM = {"weight": ("scale", "same"), "bias": ("bias", "same")}
_VIT_BLOCK = {
    "norm1": ("norm1", _NORM),
    "attn.qkv": ("qkv", _LINEAR),
    "attn.proj": ("proj", _HEADS_IN),
    "norm2": ("norm2", _NORM),
    "mlp.fc1": ("fc1", _LINEAR),
    "mlp.fc2": ("fc2", _LINEAR),
}
_LLAMA_LAYER = {
    "input_layernorm.weight": ("input_norm/scale", "same"),
    "self_attn.q_proj.weight": ("q_proj/kernel", "linear"),
    "self_attn.k_proj.weight": ("k_proj/kernel", "linear"),
    "self_attn.v_proj.weight": ("v_proj/kernel", "linear"),
    "self_attn.o_proj.weight": ("o_proj/kernel", "heads"),
    "post_attention_layernorm.weight": ("post_norm/scale", "same"),
    "mlp.gate_proj.weight": ("gate_proj/kernel", "linear"),
    "mlp.up_proj.weight": ("up_proj/kernel", "linear"),
    "mlp.down_proj.weight": ("down_proj/kernel", "linear"),
}
_LLAMA = {
    "model.embed_tokens.weight": ("embed_tokens", "same"),
    "model.norm.weight": ("norm/scale", "same"),
    "lm_head.weight": ("lm_head/kernel", "linear"),
}
_TOWERS = {"dino": "vision_backbone.featurizer.", "siglip": "vision_backbone.fused_featurizer."}


def tensor_table(config: OpenVLAConfig) -> dict[str, Entry]:
    """Returns the checkpoint's tensors for every leaf of our tree but adapters and value head, by the leaf's path."""
    table = {}
    for tower, prefix in _TOWERS.items():
        table |= _tower_table(tower, prefix, getattr(config, tower))
    for layer in ("fc1", "fc2", "fc3"):
        for suffix, (leaf, kind) in _LINEAR.items():
            table[f"projector/{layer}/{leaf}"] = Entry((f"projector.{layer}.{suffix}",), kind)
    for name, (leaf, kind) in _LLAMA.items():
        table[f"llm/{leaf}"] = Entry((f"language_model.{name}",), kind)
    for name, (leaf, kind) in _LLAMA_LAYER.items():
        names = tuple(f"language_model.model.layers.{i}.{name}" for i in range(config.llm.depth))
        table[f"llm/layers/{leaf}"] = Entry(names, kind, 1)
    return table


def _tower_table(tower: str, prefix: str, config: ViTConfig) -> dict[str, Entry]:
    """Returns the part of the table for one vision tower."""
    single = {
        "pos_embed": ("pos_embed", "same"),
        "patch_embed.proj.weight": ("patch_embed/kernel", "conv"),
        "patch_embed.proj.bias": ("patch_embed/bias", "same"),
    }
    if config.num_prefix:
        single["cls_token"] = ("cls_token", "same")
    if config.num_prefix > 1:
        single["reg_token"] = ("reg_token", "same")
    blocks = {
        f"{name}.{suffix}": (f"{ours}/{leaf}", kind)
        for name, (ours, leaves) in _VIT_BLOCK.items()
        for suffix, (leaf, kind) in leaves.items()
    }
    if config.layer_scale is not None:
        blocks |= {f"{name}.scale_factor": (name, "same") for name in ("ls1", "ls2")}
    table = {f"{tower}/{leaf}": Entry((prefix + name,), kind) for name, (leaf, kind) in single.items()}
    for name, (leaf, kind) in blocks.items():
        names = tuple(f"{prefix}blocks.{i}.{name}" for i in range(config.depth - 1))
        table[f"{tower}/blocks/{leaf}"] = Entry(names, kind, 1)
    return table


def adapter_table(table: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the places of adapters of a table's kernels in PEFT's files, less the beginning of their names."""
    adapters = {}
    for path, (names, kind, num_stacked) in table.items():
        module, _, leaf = path.rpartition("/")
        if leaf == "kernel":
            modules = [name.removesuffix(".weight") for name in names]
            kind_b = "pointwise" if kind == "conv" else "linear"
            for ours, theirs, which in (("lora_a", "lora_A", kind), ("lora_b", "lora_B", kind_b)):
                files = tuple(f"{name}.{theirs}.weight" for name in modules)
                adapters[f"{module}/{ours}"] = Entry(files, which, num_stacked)
    return adapters


def unused_specs(config: OpenVLAConfig, dtype: str) -> dict[str, Spec]:
    """Returns the checkpoint's tensors that are never run: last blocks, final norms, SigLIP's attention pool."""
    used, unused = table_specs(tensor_table(config), leaf_shapes(config), dtype), {}
    for tower, prefix in _TOWERS.items():
        sizes = getattr(config, tower)
        first, last = f"{prefix}blocks.0.", f"{prefix}blocks.{sizes.depth - 1}."
        unused |= {last + name.removeprefix(first): spec for name, spec in used.items() if name.startswith(first)}
        unused |= {f"{prefix}norm.{suffix}": Spec(dtype, (sizes.width,)) for suffix in ("weight", "bias")}
    width, hidden, pool = config.siglip.width, config.siglip.mlp_dim, f"{_TOWERS['siglip']}attn_pool."
    unused[f"{pool}latent"] = Spec(dtype, (1, 1, width))
    linear = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for name, shape in linear.items():
        unused |= {f"{pool}{name}.weight": Spec(dtype, shape), f"{pool}{name}.bias": Spec(dtype, shape[:1])}
    return unused | {f"{pool}norm.{suffix}": Spec(dtype, (width,)) for suffix in ("weight", "bias")}
