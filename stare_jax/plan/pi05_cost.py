"""Cost of pi0.5: floating point operations and bytes, counted from its sizes.

Only matrix products are counted, two operations for a multiplication and an addition.
`tests/weights/test_pi05_benchmark.py` compares the counts with XLA's.
"""

from stare_jax.plan.chips import Cost


def gemma_shapes(expert) -> list[tuple[int, int]]:
    """Returns (in, out) of all products of one layer of a `GemmaConfig`: queries, keys and values, output, MLP."""
    width, heads, mlp = expert.width, expert.num_heads * expert.head_dim, expert.mlp_dim
    keys = expert.num_kv_heads * expert.head_dim
    return [(width, heads), (width, 2 * keys), (heads, width), *[(width, mlp)] * 2, (mlp, width)]


def gemma_weights(expert) -> float:
    return expert.depth * _size(gemma_shapes(expert))


def attention_flops(expert, tokens: int, keys: int) -> float:
    """Counts the two products of `tokens` queries with `keys` keys and values, in all layers."""
    return expert.depth * 4 * tokens * keys * expert.num_heads * expert.head_dim


def tower_weights(config) -> float:
    """Counts the vision tower's and its projection's, biases and norms left out."""
    tower = config.siglip
    block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_dim
    return tower.depth * block + (3 * tower.patch_size**2 + config.paligemma.width) * tower.width


def condition_weights(config) -> float:
    """Counts those of what follows from the flow time alone: its MLP; scale, shift and gate of every norm."""
    width = config.expert.width
    return 2 * width**2 + (2 * config.expert.depth + 1) * 3 * width**2


def num_patches(config) -> int:
    """Returns the image tokens of one camera."""
    return (config.image_size // config.siglip.patch_size) ** 2


def prefix_length(config) -> int:
    return len(config.cameras) * num_patches(config) + config.prompt_length


def prefix_products(config) -> tuple[float, float]:
    """Counts one row's images and text: products with weights, and attention."""
    length, patches, tower = prefix_length(config), num_patches(config), config.siglip
    linear = 2 * len(config.cameras) * patches * tower_weights(config) + 2 * length * gemma_weights(config.paligemma)
    attention = len(config.cameras) * tower.depth * 4 * patches**2 * tower.width
    return linear, attention + attention_flops(config.paligemma, length, length)


def suffix_products(config) -> tuple[float, float]:
    """Counts one row's noisy chunk, conditions left out: products with weights, and attention."""
    window, projections = config.window, 2 * config.model_action_dim * config.expert.width
    linear = 2 * window * (gemma_weights(config.expert) + projections)
    return linear, attention_flops(config.expert, window, prefix_length(config) + window)


def sampling_phases(config, batch: int, num_steps: int, itemsize: int) -> list[Cost]:
    """Returns the cost of the prefix, of all conditions together, and of every denoising step.

    Bytes are what must move at least: the weights once a phase, and the keys and values, which the prefix writes and
    every step reads. The times are the same for all rows and known beforehand, so that conditions cost their weights
    once.

    Args:
        config: `Pi05Config`, which sees images.
        batch: rows at once.
        num_steps: Euler steps from noise to actions.
        itemsize: bytes of a weight, of a key and of a value.
    """
    expert = config.paligemma
    cache = batch * prefix_length(config) * 2 * expert.depth * expert.num_kv_heads * expert.head_dim * itemsize
    weights = tower_weights(config) + gemma_weights(config.paligemma)
    prefix = Cost(batch * sum(prefix_products(config)), itemsize * weights + cache)
    conditions = Cost(2 * num_steps * condition_weights(config), itemsize * condition_weights(config))
    step = Cost(batch * sum(suffix_products(config)), itemsize * gemma_weights(config.expert) + cache)
    return [prefix, conditions, *[step] * num_steps]


def imitation_flops(config, batch: int, *, is_prefix_trained: bool) -> float:
    """Counts one imitation step, without what rematerialisation computes twice.

    What is trained costs two products in the backward pass for one in the forward pass; a frozen prefix none.
    """
    prefix, suffix = sum(prefix_products(config)), sum(suffix_products(config)) + 2 * condition_weights(config)
    return batch * ((3 if is_prefix_trained else 1) * prefix + 3 * suffix)


def _size(shapes: list[tuple[int, int]]) -> float:
    return sum(a * b for a, b in shapes)
