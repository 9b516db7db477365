"""Table from the leaves of pi0.5 to the tensors of openpi's PyTorch port; openpi's own tree is ours.

lerobot's names are those with `model.` in front. The token embedding is tied to an output layer, and has its name in
the port's files. The expert has an output layer that is never run.
"""

from stare_jax.models.pi05.network import Pi05Config
from stare_jax.weights.tensor_table import Entry

_PALIGEMMA, _EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
_TOWER = f"{_PALIGEMMA}model.vision_tower.vision_model."
EMBEDDINGS = (f"{_PALIGEMMA}lm_head.weight", f"{_PALIGEMMA}model.language_model.embed_tokens.weight")
"""names of the token embedding, tied: what PyTorch saves has the first alone."""
UNUSED = f"{_EXPERT}lm_head.weight"
"""an output layer of the expert, random and never run; the port's strict loading wants it nevertheless."""

_LINEAR = {"weight": ("kernel", "linear"), "bias": ("bias", "vector")}
_HEADS = {"weight": ("kernel", "heads"), "bias": ("bias", "same")}
_NORM = {"weight": ("scale", "same"), "bias": ("bias", "same")}
_BLOCK = {
    "layer_norm1": ("LayerNorm_0", _NORM),
    "layer_norm2": ("LayerNorm_1", _NORM),
    "self_attn.q_proj": ("MultiHeadDotProductAttention_0/query", _LINEAR),
    "self_attn.k_proj": ("MultiHeadDotProductAttention_0/key", _LINEAR),
    "self_attn.v_proj": ("MultiHeadDotProductAttention_0/value", _LINEAR),
    "self_attn.out_proj": ("MultiHeadDotProductAttention_0/out", _HEADS),
    "mlp.fc1": ("MlpBlock_0/Dense_0", _LINEAR),
    "mlp.fc2": ("MlpBlock_0/Dense_1", _LINEAR),
}
_TOWER_LEAVES = {
    "embeddings.patch_embedding.weight": ("embedding/kernel", "conv"),
    "embeddings.patch_embedding.bias": ("embedding/bias", "same"),
    "embeddings.position_embedding.weight": ("pos_embedding", "leading"),
    "post_layernorm.weight": ("Transformer/encoder_norm/scale", "same"),
    "post_layernorm.bias": ("Transformer/encoder_norm/bias", "same"),
}
_LAYER = {
    "attn/q_einsum{}/w": (("self_attn.q_proj",), "per_head"),
    "attn/kv_einsum{}/w": (("self_attn.k_proj", "self_attn.v_proj"), "per_head"),
    "attn/attn_vec_einsum{}/w": (("self_attn.o_proj",), "heads"),
    "mlp{}/gating_einsum": (("mlp.gate_proj", "mlp.up_proj"), "linear"),
    "mlp{}/linear": (("mlp.down_proj",), "linear"),
}
"""leaves of each expert; the number of the second one is part of our names"""
_NORMS = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
_OUTER = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")
OUR_OWN = ("value_head/", "noise_head/", "stem/", "state_embed/")
"""parts that openpi's models do not have."""


def tensor_table(config: Pi05Config) -> dict[str, Entry]:
    """Returns the port's tensors for every leaf that openpi's tree has, adapters apart, by the leaf's path."""
    table = _tower_table(config.siglip.depth)
    table["PaliGemma/llm/embedder/input_embedding"] = Entry(EMBEDDINGS[:1], "same")
    prefixes = (f"{_PALIGEMMA}model.language_model.", f"{_EXPERT}model.")
    for prefix, suffix in zip(prefixes, ("", "_1"), strict=True):
        layers = [f"{prefix}layers.{i}." for i in range(config.paligemma.depth)]
        for leaf, (names, kind) in _LAYER.items():
            tensors = tuple(f"{layer}{name}.weight" for layer in layers for name in names)
            table[f"PaliGemma/llm/layers/{leaf.format(suffix)}"] = Entry(tensors, kind, 1 if len(names) == 1 else 2)
        for ours, theirs in _NORMS.items():
            for name, (leaf, kind) in _norm(suffix).items():
                tensors = tuple(f"{layer}{theirs}.{name}" for layer in layers)
                table[f"PaliGemma/llm/layers/{ours}{suffix}/{leaf}"] = Entry(tensors, kind, 1)
        for name, (leaf, kind) in _norm(suffix).items():
            table[f"PaliGemma/llm/final_norm{suffix}/{leaf}"] = Entry((f"{prefix}norm.{name}",), kind)
    for module in _OUTER:
        table |= {f"{module}/{leaf}": Entry((f"{module}.{name}",), kind) for name, (leaf, kind) in _LINEAR.items()}
    return table


def _norm(suffix: str) -> dict[str, tuple[str, str]]:
    """Returns tensors and leaves of a norm: the second expert's follows from the flow time."""
    if not suffix:
        return {"weight": ("scale", "same")}
    return {f"dense.{name}": (f"Dense_0/{leaf}", kind) for name, (leaf, kind) in _LINEAR.items()}


def _tower_table(depth: int) -> dict[str, Entry]:
    table = {f"PaliGemma/img/{leaf}": Entry((_TOWER + name,), kind) for name, (leaf, kind) in _TOWER_LEAVES.items()}
    for module, (ours, leaves) in _BLOCK.items():
        for name, (leaf, kind) in leaves.items():
            tensors = tuple(f"{_TOWER}encoder.layers.{i}.{module}.{name}" for i in range(depth))
            table[f"PaliGemma/img/Transformer/encoderblock/{ours}/{leaf}"] = Entry(tensors, kind, 1)
    for name, (leaf, kind) in _LINEAR.items():
        table[f"PaliGemma/img/head/{leaf}"] = Entry((f"{_PALIGEMMA}model.multi_modal_projector.linear.{name}",), kind)
    return table
