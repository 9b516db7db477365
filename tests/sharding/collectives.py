"""What a program may exchange: weights of one layer at a time and sums of their gradients; of a token, activations."""

import collections
import math
import re
from collections.abc import Mapping, Sequence

from stare_jax.models.bins import NUM_BINS
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.plan.exchanges import Collective

OF_WEIGHTS = ("all-gather", "all-reduce", "reduce-scatter")
"""exchanges that weights and their gradients take; the others move activations from one layout to another."""
IN_LAYERS = re.compile(r"\b(layers|blocks|encoderblock)/")
"""part of paths inside a loop over layers; paths of what XLA combines are joined, as `(layers/a:layers/b)`."""
PAIRS = re.compile(r"(gating|kv)_einsum")
"""part of the paths of pi0.5's pairs of weights: of gates and the numbers beside them, of keys and values"""


def not_zero3(
    found: Sequence[Collective], leaves: Sequence[tuple[str, tuple[int, ...], bool]], num_passes: Mapping[str, int]
) -> list[str]:
    """Returns what a program exchanges that fully sharded data parallelism, on a mesh of `fsdp` alone, does not.

    Inside a loop over layers that is the weights of one layer, gathered once in every pass, and sums of their
    gradients; no activations. Outside of it, the same of all other weights, of the output layer as many columns as are
    used, and what the lookup of embeddings takes.

    Args:
        found: see `read_collectives`.
        leaves: path, shape, and whether it is split, of every parameter.
        num_passes: how often the loop over the layers of a stack is in the program, see the function of this name.
    """
    in_layers, elsewhere, missing = set(), {1}, collections.Counter()
    for path, shape, is_split in leaves:
        if IN_LAYERS.search(path):
            # Of two weights in one array each is gathered for a product of its own.
            number = 2 if PAIRS.search(path) else 1
            size = math.prod(shape[1:]) // number
            in_layers.add(size)
            missing[_stack(path), size] += number * num_passes[_stack(path)] * is_split
        else:
            elsewhere |= {math.prod(shape), shape[0] * NUM_BINS} if "lm_head" in path else {math.prod(shape)}
    # A tower's class token and registers are put together before anything is done with them.
    for tower in ("dino", "siglip"):
        elsewhere.add(
            sum(math.prod(shape) for path, shape, _ in leaves if re.search(rf"{tower}/(cls|reg)_token", path))
        )
    problems = moved_out(found)
    for one in found:
        if IN_LAYERS.search(one.source):
            if one.kind not in OF_WEIGHTS or not in_layers.issuperset(one.sizes):
                problems.append(f"not weights of a layer: {one}")
            if one.kind == "all-gather":
                missing.subtract((_stack(one.source), size) for size in one.sizes)
        elif one.kind not in OF_WEIGHTS or not ("llm.embed/" in one.source or elsewhere.issuperset(one.sizes)):
            problems.append(f"not weights: {one}")
    counts = [f"{stack}: {n} gathers too few of {size} elements" for (stack, size), n in missing.items() if n]
    return problems + counts


def moved_out(found: Sequence[Collective]) -> list[str]:
    """Returns the collectives of layers that the compiler has moved out of a loop: those of all layers at once."""
    of_layers = [one for one in found if IN_LAYERS.search(one.source)]
    return [f"moved out of its loop: {one}" for one in of_layers if one.num_loops != one.num_written]


def is_of_token(one: Collective) -> bool:
    """Returns whether an exchange is in the loop over decoded tokens, the outermost one of sampling.

    The output layer's columns, weights that are gathered for all tokens at once, are not.
    """
    return re.match(r"jit\([^)]*\)/while/body/", one.source) is not None and "lm_head/" not in one.source


def numbers_of_token(found: Sequence[Collective]) -> int:
    """Returns how many numbers are exchanged for one decoded token."""
    of_tokens = [one for one in found if is_of_token(one)]
    return sum(sum(one.sizes) * math.prod(one.trips[1:]) for one in of_tokens)


def most_of_token(llm: LlamaConfig, rows: int, rank: int) -> int:
    """Returns how many numbers a token takes at most where weights stay, for `rows` rows and adapters of a rank.

    Of each layer: what queries, keys, values, gates and the numbers beside these sum up to, with the narrow numbers of
    their adapters and two norms; what the two products behind them read. Around the layers, the token's embedding, the
    last norm and a layout for the logits.
    """
    attended, hidden = llm.num_heads * llm.head_dim, llm.mlp_dim
    summed = attended + 2 * llm.num_kv_heads * llm.head_dim + 2 * hidden + 5 * rank + 2
    return rows * (llm.depth * (summed + attended + hidden) + 3 * llm.width + 2)


STACKS = ("dino", "siglip", "img", "llm", "expert")
"""names of stacks of layers in the paths of both models; `expert` is the second one in pi0.5's language model."""


def num_passes(phase: str, trained: str, *, scores_first: bool = False, has_reference: bool = False) -> dict[str, int]:
    """Returns how often a program reads the layers of each of `STACKS`: once, and once more where it learns.

    Args:
        phase: "sft", "tpo", "ppo" or "sample".
        trained: "full", "lora" or, of pi0.5 alone, "expert", or "kept": the same with contexts, in place of images and
            text. Adapters of pi0.5 leave its vision tower as it is.
        scores_first: whether all decisions are scored before some are differentiated.
        has_reference: whether a reference scores them, too; it shares what images and text become where all of
            that is frozen.
    """
    twice = () if not has_reference else ("expert",) if trained in ("expert", "kept") else STACKS
    passes = {stack: 1 + scores_first + (stack in twice) for stack in STACKS}
    if phase == "sample":
        return passes
    if trained == "kept":
        return dict.fromkeys(STACKS, 0) | {"expert": passes["expert"] + 1}
    still = {"full": (), "lora": ("img",), "expert": ("img", "llm")}[trained]
    return {stack: number + (stack not in still) for stack, number in passes.items()}


def _stack(path: str) -> str:
    """Returns of which of `STACKS` a parameter or an operation is."""
    stack = re.findall(r"(dino|siglip|llm|img)(?:\.\w+)?/", path)[-1]
    return "expert" if stack == "llm" and re.search(r"_1/", path) else stack
