"""Cost of OpenVLA: floating point operations and bytes, counted from its sizes.

Only matrix products are counted, two operations for a multiplication and an addition. Attention is counted in full,
although half of it is masked where it is causal. `tests/weights/test_openvla_cost.py` compares the counts with XLA's.
"""

from typing import NamedTuple

from stare_jax.plan.chips import Cost

NUM_BINS = 256


class Products(NamedTuple):
    """The products of one pass over one image and its text, in operations."""

    linear: float
    """with frozen weights."""
    attention: float
    adapters: float
    """with LoRA's A and B."""


def vision_products(config, rank: int = 0) -> Products:
    """Counts both towers, without the last blocks, and the projector, for one image.

    A block of width w and MLP m on n tokens takes `2 n (4 w² + 2 w m)`, its attention `4 n² w`; adapters of rank r
    take `2 n r (in + out)` for each product of a matrix `in x out`.
    """
    patches, linear, attention, adapters = _num_patches(config), 0.0, 0.0, 0.0
    for tower in (config.dino, config.siglip):
        tokens, width, blocks = patches + tower.num_prefix, tower.width, tower.depth - 1
        shapes = [(width, 3 * width), (width, width), (width, tower.mlp_dim), (tower.mlp_dim, width)]
        linear += blocks * _products(shapes, tokens)
        adapters += blocks * _adapters(shapes, tokens, rank)
        attention += blocks * 4 * tokens**2 * width
        embedding = [(3 * tower.patch_size**2, width)]
        linear += _products(embedding, patches)
        adapters += _adapters(embedding, patches, rank)
    width, hidden = config.llm.width, config.projector_dim
    shapes = [(config.dino.width + config.siglip.width, hidden), (hidden, width), (width, width)]
    return Products(linear + _products(shapes, patches), attention, adapters + _adapters(shapes, patches, rank))


def decoder_products(config, tokens: int, keys: int, rank: int = 0) -> Products:
    """Counts the decoder's layers for `tokens` tokens of one sequence that see `keys` keys each."""
    llm = config.llm
    shapes = _layer_shapes(llm)
    return Products(
        llm.depth * _products(shapes, tokens),
        llm.depth * 4 * tokens * keys * llm.width,
        llm.depth * _adapters(shapes, tokens, rank),
    )


def generation_phases(config, batch: int, prompt_length: int, itemsize: int = 2, rank: int = 0) -> list[Cost]:
    """Returns the cost of the prompt, then of every further action token.

    Bytes are what must move at least: the weights once a phase, and the keys and values, which the prompt writes and
    every token reads.

    Args:
        config: `OpenVLAConfig`.
        batch: images at once.
        prompt_length: tokens of text, BOS among them.
        itemsize: bytes of a weight, of a key and of a value.
        rank: of the adapters, whose bytes do not count; 0 without.
    """
    length, head = _num_patches(config) + prompt_length, 2 * config.llm.width * NUM_BINS
    cache = 2 * config.llm.depth * config.llm.num_kv_heads * config.llm.head_dim * itemsize
    decoder = itemsize * (config.llm.depth * _size(_layer_shapes(config.llm)) + config.llm.width * NUM_BINS)
    vision, prompt = vision_products(config, rank), decoder_products(config, length, length, rank)
    flops = sum(vision) + sum(prompt) + head
    phases = [Cost(batch * flops, decoder + itemsize * vision_weights(config) + batch * length * cache)]
    for i in range(1, config.action_dim):
        flops = sum(decoder_products(config, 1, length + i, rank)) + head
        phases.append(Cost(batch * flops, decoder + batch * (length + i) * cache))
    return phases


def update_flops(config, batch: int, prompt_length: int, rank: int) -> float:
    """Counts one PPO update of adapters on `batch` decisions, without what rematerialisation computes twice.

    Frozen weights cost a product in the forward pass and one in the backward pass, for the gradient of their input;
    adapters and attention cost two in the backward pass.
    """
    length = _num_patches(config) + prompt_length + config.action_dim - 1
    parts = vision_products(config, rank), decoder_products(config, length, length, rank)
    linear, attention, adapters = (sum(values) for values in zip(*parts, strict=True))
    head = [(config.llm.width, NUM_BINS)]
    linear += _products(head, config.action_dim)
    adapters += config.action_dim * 2 * rank * (config.llm.width + NUM_BINS)
    dims = (config.llm.width, *config.value_dims, 1)
    value = _products(list(zip(dims, dims[1:], strict=False)), 1)
    return batch * (2 * linear + 3 * (attention + adapters + value))


def vision_weights(config) -> float:
    """Counts the weights that one image passes through before the decoder, biases and norms left out."""
    width, hidden = config.llm.width, config.projector_dim
    total = (config.dino.width + config.siglip.width) * hidden + hidden * width + width * width
    for tower in (config.dino, config.siglip):
        block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_dim
        total += (tower.depth - 1) * block + 3 * tower.patch_size**2 * tower.width
    return total


def _num_patches(config) -> int:
    return (config.image_size // config.dino.patch_size) ** 2


def _layer_shapes(llm) -> list[tuple[int, int]]:
    width, kv_width, mlp = llm.width, llm.num_kv_heads * llm.head_dim, llm.mlp_dim
    return [(width, width), (width, kv_width), (width, kv_width), (width, width), *[(width, mlp)] * 2, (mlp, width)]


def _size(shapes: list[tuple[int, int]]) -> float:
    return sum(a * b for a, b in shapes)


def _products(shapes: list[tuple[int, int]], tokens: int) -> float:
    return 2 * tokens * _size(shapes)


def _adapters(shapes: list[tuple[int, int]], tokens: int, rank: int) -> float:
    return 2 * tokens * rank * sum(a + b for a, b in shapes)
