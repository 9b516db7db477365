"""Where every leaf of pi0.5 is in the tensors of openpi's PyTorch port, as one table; openpi's own tree is ours.

lerobot's names are those with `model.` in front. The token embedding is tied to an output layer, under whose name the
port's files have it; and there is an output layer of the expert, which is never run.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.nn.heads import NoiseHead, ValueHead
from stare_jax.models.pi05.network import Pi05, Pi05Config
from stare_jax.types import PyTree
from stare_jax.weights.openvla.table import value_head_table
from stare_jax.weights.tensor_table import Entry, insert, leaf_at, place

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
"""of each expert, whose number, but for the first, is part of our names."""
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


def head_table(config: Pi05Config) -> dict[str, Entry]:
    """Returns where the leaves of value head and noise head are in their side file."""
    table = value_head_table(config)
    if config.noise == "learned":
        for module in (*(f"layer_{i}" for i in range(len(NoiseHead.hidden_dims))), "out"):
            for name, (leaf, kind) in _LINEAR.items():
                table[f"noise_head/{module}/{leaf}"] = Entry((f"noise_head.{module}.{name}",), kind)
    return table


def leaf_shapes(config: Pi05Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every leaf of our tree, by path, without allocating it."""
    # Without what no shape depends on, as a trace takes a second.
    state_dim = config.state_dim if config.state_tokens or config.critic == "state" else 0
    text = {"tokenizer": "", "prompt_template": "{instruction}", "prompt_length": 2}
    actions = {"window": 1, "chunk": 1, "action_dim": 1}
    return dict(_leaf_shapes(dataclasses.replace(config, state_dim=state_dim, **text, **actions)))


@functools.lru_cache(maxsize=8)
def _leaf_shapes(config: Pi05Config) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree.leaves_with_path(jax.eval_shape(functools.partial(_init, config), jax.random.key(0)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _init(config: Pi05Config, key: jax.Array) -> PyTree:
    state, size = jnp.zeros((1, config.state_dim)), config.image_size
    scene = state if config.state_tokens else (jnp.zeros((1, size, size, 3)),) * len(config.cameras)
    tokens = jnp.zeros((1, config.prompt_length), jnp.int32)
    noisy = jnp.zeros((1, config.window, config.model_action_dim))
    variables = Pi05(config).init(key, scene, tokens, tokens == 0, state, noisy, method="init_pass")
    return variables["params"]


def fresh_params(
    config: Pi05Config, key: jax.Array, wanted: Mapping[str, jax.ShapeDtypeStruct], paths: Collection[str]
) -> PyTree:
    """Returns initial values of some leaves, without allocating the rest of the model.

    Args:
        config: of the model.
        key: consumed.
        wanted: shape, dtype and, where the leaf is not to be a NumPy array, sharding of each.
        paths: which.
    """
    if not paths:
        return {}

    def init(key):  # what is not returned is not computed
        params = _init_heads(config, key, wanted) if all(map(_is_head, paths)) else _init(config, key)
        return {path: leaf_at(params, path).astype(wanted[path].dtype) for path in paths}

    tree: PyTree = {}
    for path, leaf in jax.device_get(jax.jit(init)(key)).items():
        insert(tree, path, place(wanted[path], np.asarray(leaf).__getitem__))
    return tree


def _is_head(path: str) -> bool:
    return path.startswith(("value_head/", "noise_head/"))


def _init_heads(config: Pi05Config, key: jax.Array, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> PyTree:
    """Returns the heads alone, as that takes seconds less than to trace the whole network."""
    heads = {"value_head": ValueHead(config.value_dims), "noise_head": NoiseHead(config.model_action_dim)}
    params = {}
    for (name, head), part in zip(heads.items(), jax.random.split(key), strict=True):
        if (first := wanted.get(f"{name}/layer_0/kernel")) is not None:
            params[name] = head.init(part, jnp.zeros((1, first.shape[0])))["params"]
    return params
