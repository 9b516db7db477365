"""Reads an OpenVLA checkpoint folder in Hugging Face's format into our configuration, parameters and statistics.

One table says where every tensor goes; names and shapes are compared before anything is read.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from stare_jax.convert.preprocessor import read_preprocessor
from stare_jax.models.heads import ValueHead
from stare_jax.models.llama import LlamaConfig
from stare_jax.models.normalize import action_range, identity_stats
from stare_jax.models.openvla import OpenVLAConfig, make_openvla, openvla_7b
from stare_jax.models.vit import ViTConfig
from stare_jax.types import Array, NormStats, PyTree

TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")


class LoadedOpenVLA(NamedTuple):
    """What a checkpoint folder holds."""

    config: OpenVLAConfig
    params: PyTree
    """our parameter tree, NumPy leaves; the value head is freshly initialised."""
    unused: dict[str, Array]
    """tensors that OpenVLA never runs (last blocks, final norms, attention pool), as they are in the files."""
    norm_stats: NormStats


class Entry(NamedTuple):
    """Where one leaf of our tree comes from."""

    names: tuple[str, ...]
    """its tensors in the checkpoint: one, or one per layer to be stacked."""
    kind: str
    """"same"; "vector", of another rank; "linear", transposed, with one input axis; "heads", with two; "conv"."""
    is_stacked: bool


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
    """Returns the checkpoint's tensors for every leaf of our tree but the value head, by the leaf's path."""
    table = {}
    for tower, prefix in _TOWERS.items():
        table |= _tower_table(tower, prefix, getattr(config, tower))
    for layer in ("fc1", "fc2", "fc3"):
        for suffix, (leaf, kind) in _LINEAR.items():
            table[f"projector/{layer}/{leaf}"] = Entry((f"projector.{layer}.{suffix}",), kind, False)
    for name, (leaf, kind) in _LLAMA.items():
        table[f"llm/{leaf}"] = Entry((f"language_model.{name}",), kind, False)
    for name, (leaf, kind) in _LLAMA_LAYER.items():
        names = tuple(f"language_model.model.layers.{i}.{name}" for i in range(config.llm.depth))
        table[f"llm/layers/{leaf}"] = Entry(names, kind, True)
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
    table = {f"{tower}/{leaf}": Entry((prefix + name,), kind, False) for name, (leaf, kind) in single.items()}
    for name, (leaf, kind) in blocks.items():
        names = tuple(f"{prefix}blocks.{i}.{name}" for i in range(config.depth - 1))
        table[f"{tower}/blocks/{leaf}"] = Entry(names, kind, True)
    return table


def _is_unused(name: str, config: OpenVLAConfig) -> bool:
    """Returns whether a tensor belongs to what the forward pass leaves out."""
    for tower, prefix in _TOWERS.items():
        last = getattr(config, tower).depth - 1
        if name.startswith((f"{prefix}blocks.{last}.", f"{prefix}norm.", f"{prefix}attn_pool.")):
            return True
    return False


def _checkpoint_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the shape that a leaf of ours, without its axis of layers, has in the checkpoint."""
    if kind == "same":
        return shape
    if kind == "vector":
        return (math.prod(shape),)
    if kind == "conv":
        height, width, channels, features = shape
        return (features, channels, height, width)
    num_in = {"linear": 1, "heads": 2}[kind]
    return (math.prod(shape[num_in:]), math.prod(shape[:num_in]))


def _to_ours(tensor: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Rearranges one tensor of the checkpoint; the numbers stay as they are."""
    if kind == "conv":
        return tensor.transpose(2, 3, 1, 0)
    return (tensor if kind in ("same", "vector") else tensor.T).reshape(shape)


def load_openvla(
    folder: str | Path, key: jax.Array, *, config: OpenVLAConfig | None = None, unnorm_key: str | None = None
) -> LoadedOpenVLA:
    """Loads a checkpoint folder: config.json, *.safetensors, and dataset_statistics.json where there is one.

    Args:
        folder: the checkpoint.
        key: for the value head, which checkpoints do not have; consumed.
        config: what to build instead of what config.json says.
        unnorm_key: data set whose action statistics to use; may be left out where there is only one.

    Raises:
        ValueError: tensors are missing, unknown or of another shape (all are listed), or the data set is unknown.
    """
    config = config or read_config(folder)
    norm_stats = read_norm_stats(folder, unnorm_key=unnorm_key, state_dim=config.state_dim)
    return LoadedOpenVLA(config, *load_params_and_rest(folder, key, config=config), norm_stats)


def load_params_and_rest(
    folder: str | Path, key: jax.Array, *, config: OpenVLAConfig
) -> tuple[PyTree, dict[str, Array]]:
    """Loads the tensors of a checkpoint folder, whatever its statistics: our parameters, and those we never run.

    Args:
        folder: the checkpoint.
        key: for the value head; consumed.
        config: what to build.

    Raises:
        ValueError: tensors are missing, unknown or of another shape; all are listed.
    """
    folder = Path(folder)
    shapes, table = _leaf_shapes(config), tensor_table(config)
    where = _find_tensors(folder)
    _check(folder, config, table, shapes, where)
    dtype = jnp.dtype(config.execution.param_dtype)
    params: PyTree = {}
    for path, entry in table.items():
        shape = shapes[path][1:] if entry.is_stacked else shapes[path]
        layers = [_to_ours(_read(where, name), shape, entry.kind).astype(dtype) for name in entry.names]
        _insert(params, path, np.stack(layers) if entry.is_stacked else layers[0])
    head = ValueHead(config.value_dims).init(key, jnp.zeros((1, config.llm.width)))["params"]
    params["value_head"] = jax.tree.map(np.asarray, head)
    unused = {name: _read(where, name) for name in where if _is_unused(name, config)}
    return params, unused


def read_config(folder: str | Path) -> OpenVLAConfig:
    """Builds our configuration from a checkpoint's config.json; what it leaves out is as in OpenVLA-7B.

    Raises:
        ValueError: its vision towers are not the two of OpenVLA-7B, or its images are not resized as theirs.
    """
    description = json.loads((Path(folder) / "config.json").read_text())
    base = openvla_7b(tokenizer=str(folder))
    if tuple(description["timm_model_ids"]) != TIMM_IDS:
        raise ValueError(f"{folder}: timm_model_ids: got {description['timm_model_ids']}, expected {TIMM_IDS}")
    text = description["text_config"]
    num_heads = text.get("num_attention_heads", base.llm.num_heads)
    llm = LlamaConfig(
        vocab_size=text["vocab_size"],
        width=text.get("hidden_size", base.llm.width),
        depth=text.get("num_hidden_layers", base.llm.depth),
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads", num_heads),
        mlp_dim=text.get("intermediate_size", base.llm.mlp_dim),
        rope_theta=text.get("rope_theta", base.llm.rope_theta),
        norm_eps=text.get("rms_norm_eps", base.llm.norm_eps),
    )
    dtype = description.get("torch_dtype") or "float32"
    config = dataclasses.replace(
        base,
        llm=llm,
        action_vocab_end=llm.vocab_size - description["pad_to_multiple_of"],
        image_size=description["image_sizes"][0],
        execution=dataclasses.replace(base.execution, dtype=dtype, param_dtype=dtype),
    )
    return read_preprocessor(folder, config)


def read_norm_stats(folder: str | Path, *, unnorm_key: str | None = None, state_dim: int = 0) -> NormStats:
    """Reads the action quantiles of one data set, and the state's where `state_dim` asks for them.

    dataset_statistics.json, which fine-tuned checkpoints carry, goes over the statistics in config.json.

    Raises:
        ValueError: the data set is not there, or is not named although there are several.
    """
    folder = Path(folder)
    stats = json.loads((folder / "config.json").read_text()).get("norm_stats", {})
    if (folder / "dataset_statistics.json").exists():
        stats |= json.loads((folder / "dataset_statistics.json").read_text())
    if unnorm_key is None and len(stats) == 1:
        (unnorm_key,) = stats
    if unnorm_key not in stats:
        raise ValueError(f"unnorm_key: got {unnorm_key!r}, expected one of {sorted(stats)} for {folder}")
    action = stats[unnorm_key]["action"]
    state = stats[unnorm_key]["proprio"] if state_dim else {"q01": [], "q99": []}
    mask = np.asarray(action.get("mask", [True] * len(action["q01"])), bool)
    low, high = action_range(action, mask)
    return NormStats(
        action_q01=low,
        action_q99=high,
        action_mask=mask,
        state_q01=np.asarray(state["q01"], np.float32),
        state_q99=np.asarray(state["q99"], np.float32),
    )


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Returns the file of every tensor in the folder."""
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            where |= dict.fromkeys(file.keys(), path)
    return where


def _read(where: Mapping[str, Path], name: str) -> np.ndarray:
    with safe_open(where[name], framework="np") as file:
        return file.get_tensor(name)


def _leaf_shapes(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every leaf of our tree, by path, without allocating it."""
    policy = make_openvla(config, identity_stats(config.action_dim, config.state_dim))
    leaves = jax.tree.leaves_with_path(jax.eval_shape(policy.init, jax.random.key(0)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _check(folder: Path, config: OpenVLAConfig, table: Mapping[str, Entry], shapes: Mapping, where: Mapping) -> None:
    """Compares names and shapes of all tensors with what the table expects."""
    expected = {}
    for path, entry in table.items():
        shape = shapes[path][1:] if entry.is_stacked else shapes[path]
        expected |= dict.fromkeys(entry.names, _checkpoint_shape(shape, entry.kind))
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in where]
    problems += [f"unknown {n}" for n in sorted(where) if n not in expected and not _is_unused(n, config)]
    for path in sorted(set(where.values())):
        with safe_open(path, framework="np") as file:
            for name in sorted(expected.keys() & file.keys()):
                got = tuple(file.get_slice(name).get_shape())
                if got != expected[name]:
                    problems.append(f"{name}: got shape {got}, expected {expected[name]}")
    if problems:
        raise ValueError(f"{folder}: {len(problems)} tensor(s) do not fit:\n  " + "\n  ".join(problems))


def _insert(tree: PyTree, path: str, leaf: np.ndarray) -> None:
    """Puts a leaf into a nested dict at a path of names with slashes between."""
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
