"""Checkpoints of pi0.5 to convert, of any size, written name by name as openpi, its PyTorch port and lerobot have them.

The names, shapes and rearrangements are put down once more here, so that the code's own table is compared with
something.
"""

import dataclasses
import json
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from stare_jax.config import to_dict
from stare_jax.models import pi05_base
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.siglip import SigLIPConfig


class Sizes(NamedTuple):
    tower: tuple[int, int, int, int]
    """width, depth, MLP, heads."""
    widths: tuple[int, int]
    mlps: tuple[int, int]
    depth: int
    heads: int
    head_dim: int
    vocab: int
    patches: int
    actions: int


FULL = Sizes((1152, 27, 4304, 16), (2048, 1024), (16384, 4096), 18, 8, 256, 257152, 256, 32)
SMALL = Sizes((32, 2, 24, 16), (24, 16), (40, 20), 3, 2, 4, 96, 4, 9)
NUM_LEAVES, NUM_TENSORS = 51, 811
"""numbers of leaves and of the port's tensors in the published model, its expert's unused output layer apart."""


def model_config(sizes=SMALL, **changes):
    """The configuration of a model of these sizes, which weights do not tell."""
    width, depth, mlp, heads = sizes.tower
    experts = [
        GemmaConfig(width, sizes.depth, mlp_dim, sizes.heads, 1, sizes.head_dim)
        for width, mlp_dim in zip(sizes.widths, sizes.mlps, strict=True)
    ]
    config = pi05_base(
        siglip=SigLIPConfig(width=width, depth=depth, num_heads=heads, mlp_dim=mlp),
        paligemma=experts[0],
        expert=experts[1],
        vocab_size=sizes.vocab,
        model_action_dim=sizes.actions,
        image_size=14 * math.isqrt(sizes.patches),
        prompt_template="{instruction}",
        state_dim=0,
        tokenizer="words",
    )
    return dataclasses.replace(config, **changes)


def write_config(file, config=None):
    """Writes a configuration beside weights, or wherever it is to be."""
    file.write_text(json.dumps(to_dict(config or model_config())))
    return file


def tree_shapes(sizes):
    """openpi's leaves."""
    width, depth, mlp, heads = sizes.tower
    block, attention = "PaliGemma/img/Transformer/encoderblock/", "MultiHeadDotProductAttention_0/"
    shapes = {f"{block}LayerNorm_{i}/{name}": (depth, width) for i in (0, 1) for name in ("scale", "bias")}
    for name in ("query", "key", "value"):
        shapes[f"{block}{attention}{name}/kernel"] = (depth, width, heads, width // heads)
        shapes[f"{block}{attention}{name}/bias"] = (depth, heads, width // heads)
    shapes[f"{block}{attention}out/kernel"] = (depth, heads, width // heads, width)
    shapes[f"{block}{attention}out/bias"] = (depth, width)
    for i, (inputs, outputs) in enumerate(((width, mlp), (mlp, width))):
        shapes[f"{block}MlpBlock_0/Dense_{i}/kernel"] = (depth, inputs, outputs)
        shapes[f"{block}MlpBlock_0/Dense_{i}/bias"] = (depth, outputs)
    img = {f"Transformer/encoder_norm/{name}": (width,) for name in ("scale", "bias")}
    img |= {"embedding/kernel": (14, 14, 3, width), "embedding/bias": (width,)}
    img |= {"pos_embedding": (1, sizes.patches, width)}
    img |= {"head/kernel": (width, sizes.widths[0]), "head/bias": (sizes.widths[0],)}
    shapes |= {f"PaliGemma/img/{name}": shape for name, shape in img.items()}
    llm = {"embedder/input_embedding": (sizes.vocab, sizes.widths[0])}
    depth, heads, dim = sizes.depth, sizes.heads, sizes.head_dim
    for suffix, width, mlp in zip(("", "_1"), sizes.widths, sizes.mlps, strict=True):
        llm[f"layers/attn/q_einsum{suffix}/w"] = (depth, heads, width, dim)
        llm[f"layers/attn/kv_einsum{suffix}/w"] = (depth, 2, 1, width, dim)
        llm[f"layers/attn/attn_vec_einsum{suffix}/w"] = (depth, heads, dim, width)
        llm[f"layers/mlp{suffix}/gating_einsum"] = (depth, 2, width, mlp)
        llm[f"layers/mlp{suffix}/linear"] = (depth, mlp, width)
    first, second = sizes.widths
    llm |= {f"layers/{name}/scale": (depth, first) for name in ("pre_attention_norm", "pre_ffw_norm")}
    llm["final_norm/scale"] = (first,)
    for name, stack in (("layers/pre_attention_norm_1", (depth,)), ("layers/pre_ffw_norm_1", (depth,))):
        llm |= {f"{name}/Dense_0/kernel": (*stack, second, 3 * second), f"{name}/Dense_0/bias": (*stack, 3 * second)}
    llm |= {"final_norm_1/Dense_0/kernel": (second, 3 * second), "final_norm_1/Dense_0/bias": (3 * second,)}
    shapes |= {f"PaliGemma/llm/{name}": shape for name, shape in llm.items()}
    outer = {"action_in_proj": (sizes.actions, second), "action_out_proj": (second, sizes.actions)}
    outer |= {"time_mlp_in": (second, second), "time_mlp_out": (second, second)}
    for name, shape in outer.items():
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    return shapes


def to_port(tree):
    """Tensors that openpi's own converter makes of its leaves, tensor by tensor."""
    tower, tensors = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.", {}
    img = {name.removeprefix("PaliGemma/img/"): leaf for name, leaf in tree.items() if "/img/" in name}
    tensors[f"{tower}embeddings.patch_embedding.weight"] = img["embedding/kernel"].transpose(3, 2, 0, 1)
    tensors[f"{tower}embeddings.patch_embedding.bias"] = img["embedding/bias"]
    tensors[f"{tower}embeddings.position_embedding.weight"] = img["pos_embedding"][0]
    tensors[f"{tower}post_layernorm.weight"] = img["Transformer/encoder_norm/scale"]
    tensors[f"{tower}post_layernorm.bias"] = img["Transformer/encoder_norm/bias"]
    block = {n.removeprefix("Transformer/encoderblock/"): x for n, x in img.items() if "encoderblock" in n}
    attention = {n.partition("/")[2]: x for n, x in block.items() if n.startswith("MultiHead")}
    for i in range(len(block["LayerNorm_0/scale"])):
        layer, width = f"{tower}encoder.layers.{i}.", block["LayerNorm_0/scale"].shape[1]
        for j in (0, 1):
            tensors[f"{layer}layer_norm{j + 1}.weight"] = block[f"LayerNorm_{j}/scale"][i]
            tensors[f"{layer}layer_norm{j + 1}.bias"] = block[f"LayerNorm_{j}/bias"][i]
            tensors[f"{layer}mlp.fc{j + 1}.weight"] = block[f"MlpBlock_0/Dense_{j}/kernel"][i].T
            tensors[f"{layer}mlp.fc{j + 1}.bias"] = block[f"MlpBlock_0/Dense_{j}/bias"][i]
        for name, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = attention[f"{ours}/kernel"][i].reshape(width, width).T
            tensors[f"{layer}self_attn.{name}_proj.bias"] = attention[f"{ours}/bias"][i].reshape(width)
        tensors[f"{layer}self_attn.out_proj.weight"] = attention["out/kernel"][i].reshape(width, width).T
        tensors[f"{layer}self_attn.out_proj.bias"] = attention["out/bias"][i]
    projector = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
    tensors |= {f"{projector}weight": img["head/kernel"].T, f"{projector}bias": img["head/bias"]}
    llm = {name.removeprefix("PaliGemma/llm/"): leaf for name, leaf in tree.items() if "/llm/" in name}
    tensors["paligemma_with_expert.paligemma.lm_head.weight"] = llm["embedder/input_embedding"]
    tensors |= expert(llm, "", "paligemma_with_expert.paligemma.model.language_model.")
    tensors |= expert(llm, "_1", "paligemma_with_expert.gemma_expert.model.")
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
        tensors |= {f"{name}.weight": tree[f"{name}/kernel"].T, f"{name}.bias": tree[f"{name}/bias"]}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def expert(llm, suffix, prefix):
    """The language model's tensors of one expert."""
    tensors = {}
    for i, q in enumerate(llm[f"layers/attn/q_einsum{suffix}/w"]):
        layer, (_, width, _) = f"{prefix}layers.{i}.", q.shape
        tensors[f"{layer}self_attn.q_proj.weight"] = q.transpose(0, 2, 1).reshape(-1, width)
        for name, kernel in zip("kv", llm[f"layers/attn/kv_einsum{suffix}/w"][i], strict=True):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = kernel[0].T
        out = llm[f"layers/attn/attn_vec_einsum{suffix}/w"][i]
        tensors[f"{layer}self_attn.o_proj.weight"] = out.reshape(-1, width).T
        for name, kernel in zip(("gate", "up"), llm[f"layers/mlp{suffix}/gating_einsum"][i], strict=True):
            tensors[f"{layer}mlp.{name}_proj.weight"] = kernel.T
        tensors[f"{layer}mlp.down_proj.weight"] = llm[f"layers/mlp{suffix}/linear"][i].T
        for name, ours in (("input", "pre_attention_norm"), ("post_attention", "pre_ffw_norm")):
            tensors |= norm(f"{layer}{name}_layernorm.", llm, f"layers/{ours}{suffix}", i)
    return tensors | norm(f"{prefix}norm.", llm, f"final_norm{suffix}", ...)


def norm(name, llm, ours, layer):
    if f"{ours}/scale" in llm:
        return {f"{name}weight": llm[f"{ours}/scale"][layer]}
    dense = {"weight": llm[f"{ours}/Dense_0/kernel"][layer].T, "bias": llm[f"{ours}/Dense_0/bias"][layer]}
    return {f"{name}dense.{suffix}": value for suffix, value in dense.items()}


UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"


def write_openpi(folder, tree, *, wrap=False, managed=False):
    """Writes a folder as openpi does: on its own as when it exports, or as a step of a training run's manager.

    Beside it is the configuration of the small model.
    """
    nested = unflatten_dict(
        {tuple(f"{name}/value".split("/") if wrap else name.split("/")): x for name, x in tree.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp

        if not managed:
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(folder.absolute() / "params", {"params": nested})
            write_config(folder / "config.json")
            return folder
        save = {name: ocp.args.PyTreeSave({"params": nested}) for name in ("params", "train_state")}
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in save}
        steps = folder.with_name(f"{folder.name}_steps")
        with ocp.CheckpointManager(steps.absolute(), item_handlers=handlers) as manager:
            manager.save(7, args=ocp.args.Composite(**save))
            manager.wait_until_finished()
        (steps / "7").rename(folder)
    write_config(folder / "config.json")
    return folder


def read_openpi(folder):
    """Reads a folder as openpi does, by the path of its tree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder.absolute() / "params")
            item = {"params": getattr(metadata, "item_metadata", metadata)["params"]}
            restore = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray), item)
            options = ocp.args.PyTreeRestore(item=item, restore_args=restore)
            tree = checkpointer.restore(folder.absolute() / "params", options)["params"]
    return {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}


def write_stats(folder, asset_id="droid", dim=9, state_dim=5, **changes):
    """Writes norm_stats.json; `changes` replace fields of the actions."""
    numbers = np.arange(dim, dtype=np.float64) / 7
    actions = {"mean": numbers, "std": numbers + 1, "q01": -numbers - 1, "q99": numbers + 2}
    stats = {"actions": {name: value.tolist() for name, value in actions.items()} | changes}
    stats["state"] = {name: value[:state_dim].tolist() for name, value in actions.items()}
    file = folder / "assets" / asset_id / "norm_stats.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"norm_stats": stats}))
    return file


def write_port(folder, tensors, prefix="", name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    write_config(folder / "config.json")
    return folder


def bits(tensors):
    """Every tensor as (dtype, shape, bytes)."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    return {name: (x.dtype.name, x.shape, x.tobytes()) for name, x in arrays.items()}


def unused(tensors, dtype="float32"):
    """The expert's output layer, as it is written: nothing but zeros."""
    vocab = len(tensors["paligemma_with_expert.paligemma.lm_head.weight"])
    return {UNUSED: np.zeros((vocab, len(tensors["action_in_proj.bias"])), jnp.dtype(dtype))}
