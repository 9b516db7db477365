"""The configuration of a pi0.5 model, as far as the shapes of its weights tell it.

openpi's tree keeps heads apart, so that nothing is missing. The PyTorch port's matrices do not tell how many heads
there are: both experts are taken to have one head of keys and values, as all published ones do, and the tower as many
heads as the base. Cameras, prompt, window and all else that no weight has the shape of are the base's.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.weights.safetensors_folder import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

_IMG, _LAYERS = "PaliGemma/img/", "PaliGemma/llm/layers/"
_BLOCK = f"{_IMG}Transformer/encoderblock/"
_TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
_EXPERTS = {
    "": "paligemma_with_expert.paligemma.model.language_model.layers.",
    "_1": "paligemma_with_expert.gemma_expert.model.layers.",
}


def read_sizes(what: object, shapes: Shapes, base: Pi05Config) -> Pi05Config:
    """Returns the base with the sizes of a tree; what is not there, or not of the right rank, is left as it is.

    Args:
        what: begins the message of an error, such as the file.
        shapes: of openpi's leaves, by path.
        base: gives the rest.

    Raises:
        WeightsError: no model has such sizes.
    """

    def size(path: str, axis: int, rank: int, default: int) -> int:
        shape = shapes.get(path, ())
        return shape[axis] if len(shape) == rank else default

    patch = size(f"{_IMG}embedding/kernel", 0, 4, base.siglip.patch_size)
    num_patches = size(f"{_IMG}pos_embedding", 1, 3, (base.image_size // patch) ** 2)
    query = f"{_BLOCK}MultiHeadDotProductAttention_0/query/kernel"
    tower = {
        "width": size(f"{_IMG}embedding/kernel", 3, 4, base.siglip.width),
        "depth": size(query, 0, 4, base.siglip.depth),
        "num_heads": size(query, 2, 4, base.siglip.num_heads),
        "mlp_dim": size(f"{_BLOCK}MlpBlock_0/Dense_0/kernel", 2, 3, base.siglip.mlp_dim),
        "patch_size": patch,
    }
    experts: dict[str, dict[str, int]] = {}
    for suffix, default in (("", base.paligemma), ("_1", base.expert)):
        if experts:  # depth and heads are the same for both, and PaliGemma may come alone
            shared = {name: experts[""][name] for name in ("depth", "num_heads", "num_kv_heads", "head_dim")}
            default = dataclasses.replace(default, **shared)
        query = f"{_LAYERS}attn/q_einsum{suffix}/w"
        experts[suffix] = {
            "width": size(query, 2, 4, default.width),
            "depth": size(query, 0, 4, default.depth),
            "mlp_dim": size(f"{_LAYERS}mlp{suffix}/gating_einsum", 3, 4, default.mlp_dim),
            "num_heads": size(query, 1, 4, default.num_heads),
            "num_kv_heads": size(f"{_LAYERS}attn/kv_einsum{suffix}/w", 2, 5, default.num_kv_heads),
            "head_dim": size(query, 3, 4, default.head_dim),
        }
    try:
        return dataclasses.replace(
            base,
            siglip=dataclasses.replace(base.siglip, **tower),
            paligemma=dataclasses.replace(base.paligemma, **experts[""]),
            expert=dataclasses.replace(base.expert, **experts["_1"]),
            vocab_size=size("PaliGemma/llm/embedder/input_embedding", 0, 2, base.vocab_size),
            model_action_dim=size("action_in_proj/kernel", 0, 2, base.model_action_dim),
            image_size=math.isqrt(num_patches) * patch,
        )
    except ValueError as error:
        raise WeightsError(f"{what}: {error}") from error


def port_shapes(shapes: Shapes, base: Pi05Config, embedding: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that those leaves have in our tree from which `read_sizes` reads sizes.

    Args:
        shapes: of the port's tensors.
        base: says how many heads the tower has.
        embedding: name of the token embedding.
    """

    def shape(name: str, rank: int = 2) -> tuple[int, ...]:
        return shapes[name] if len(shapes.get(name, ())) == rank else ()

    ours: dict[str, tuple[int, ...]] = {}
    depth, heads = _depth(shapes, f"{_TOWER}encoder.layers."), base.siglip.num_heads
    if patch := shape(f"{_TOWER}embeddings.patch_embedding.weight", 4):
        width, channels, height, _ = patch
        ours[f"{_IMG}embedding/kernel"] = (height, height, channels, width)
        ours[f"{_BLOCK}MultiHeadDotProductAttention_0/query/kernel"] = (depth, width, heads, width // heads)
    if positions := shape(f"{_TOWER}embeddings.position_embedding.weight"):
        ours[f"{_IMG}pos_embedding"] = (1, *positions)
    if hidden := shape(f"{_TOWER}encoder.layers.0.mlp.fc1.weight"):
        ours[f"{_BLOCK}MlpBlock_0/Dense_0/kernel"] = (depth, hidden[1], hidden[0])
    for suffix, prefix in _EXPERTS.items():
        depth, attention = _depth(shapes, prefix), f"{prefix}0.self_attn."
        query, key = shape(f"{attention}q_proj.weight"), shape(f"{attention}k_proj.weight")
        if query and key and key[0]:
            head_dim = key[0]
            ours[f"{_LAYERS}attn/q_einsum{suffix}/w"] = (depth, query[0] // head_dim, query[1], head_dim)
            ours[f"{_LAYERS}attn/kv_einsum{suffix}/w"] = (depth, 2, 1, query[1], head_dim)
        if gate := shape(f"{prefix}0.mlp.gate_proj.weight"):
            ours[f"{_LAYERS}mlp{suffix}/gating_einsum"] = (depth, 2, gate[1], gate[0])
    if table := shape(embedding):
        ours["PaliGemma/llm/embedder/input_embedding"] = table
    if outer := shape("action_in_proj.weight"):
        ours["action_in_proj/kernel"] = (outer[1], outer[0])
    return ours


def _depth(names: Iterable[str], prefix: str) -> int:
    layers = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in layers if match), default=-1)


def read_lora(what: object, shapes: Shapes) -> LoRAConfig | None:
    """Returns rank and targets of the adapters in openpi's tree, whose alpha is their rank; None where there are none.

    Raises:
        WeightsError: ranks differ, which one configuration does not express.
    """
    ranks = {path: shape[-1] for path, shape in shapes.items() if path.endswith("lora_a") and shape}
    if not ranks:
        return None
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{path} of rank {rank}" for path, rank in sorted(ranks.items()))
        raise WeightsError(f"{what}: got adapters of several ranks, expected one: {listed}")
    modules = sorted({path.removesuffix("lora_a").rstrip("_/") for path in ranks})
    rank = next(iter(ranks.values()))
    return LoRAConfig(rank=rank, alpha=float(rank), targets=tuple(f"^{module}$" for module in modules))
