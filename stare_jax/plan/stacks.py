"""Stacks of layers of a model: the numbers of one row that layers keep for the backward pass, or sum over devices."""

from collections.abc import Sequence
from typing import NamedTuple

from stare_jax.models import MLPConfig, ModelConfig, OpenVLAConfig, Pi05Config
from stare_jax.plan.pi05_cost import num_patches, prefix_length


class Stack(NamedTuple):
    depth: int
    """layers that are run."""
    tokens: int
    """tokens of one row."""
    width: int
    products: int
    """numbers that the products of a layer return for one token."""
    scores: int
    """numbers of a layer's attention for one token: heads times keys."""

    def kept(self, remat: str) -> int:
        """Counts the numbers of one row that lie in memory from the forward to the backward pass.

        Without rematerialisation these are roughly the results of products, twice as many of what lies between them,
        and attention.
        """
        of_token = {"full": self.width, "dots": self.width + self.products}.get(remat, self._all)
        return self.depth * self.tokens * of_token

    @property
    def of_layer(self) -> int:
        """Numbers of one row in one layer, all of which are there while its gradient is computed."""
        return self.tokens * self._all

    @property
    def summed(self) -> int:
        """Numbers of one row that devices which share matrices sum up in one pass: results of two products a layer."""
        return 2 * self.depth * self.tokens * self.width

    @property
    def _all(self) -> int:
        return self.width + 3 * self.products + self.scores


def stacks_of(model: ModelConfig, *, is_prefix_trained: bool = True) -> list[Stack]:
    """Returns the stacks that a row of an update goes through forwards and backwards.

    Args:
        model: its policy.
        is_prefix_trained: whether any of what pi0.5's images and text go through is trained.
    """
    if isinstance(model, MLPConfig):
        return []
    return _openvla(model) if isinstance(model, OpenVLAConfig) else _pi05(model, is_prefix_trained)


def kept_bytes(stacks: Sequence[Stack], remat: str, itemsize: float) -> float:
    """Returns about how many bytes one row takes in an update."""
    if not stacks:
        return 1.0  # the same whatever it is
    return itemsize * (sum(stack.kept(remat) for stack in stacks) + max(stack.of_layer for stack in stacks))


def _openvla(model: OpenVLAConfig) -> list[Stack]:
    llm, found, seen = model.llm, [], model.state_tokens
    for tower in (model.dino, model.siglip):
        if tower is not None:
            stride = tower.patch_size * 2 ** len(model.stem)
            seen = (model.image_size // stride) ** 2
            found.append(_tower(tower, tower.depth - 1, seen + tower.num_prefix))
    tokens = seen + model.prompt_length + model.action_dim - 1
    products = 3 * llm.width + 2 * llm.num_kv_heads * (llm.width // llm.num_heads) + 2 * llm.mlp_dim
    return [*found, Stack(llm.depth, tokens, llm.width, products, llm.num_heads * tokens)]


def _pi05(model: Pi05Config, is_prefix_trained: bool) -> list[Stack]:
    tower, images = model.siglip, len(model.cameras)
    prefix = model.state_tokens + model.prompt_length if tower is None else prefix_length(model)
    steps = model.num_denoising_steps if model.noise == "learned" else 1
    expert = _gemma(model.expert, steps * model.window, prefix + model.window)
    if not is_prefix_trained:
        return [expert]
    towers = [] if tower is None else [_tower(tower, tower.depth, num_patches(model))]
    towers = [one._replace(tokens=images * one.tokens) for one in towers]
    return [*towers, _gemma(model.paligemma, prefix, prefix), expert]


def _tower(tower, depth: int, tokens: int) -> Stack:
    return Stack(depth, tokens, tower.width, 5 * tower.width + tower.mlp_dim, tower.num_heads * tokens)


def _gemma(expert, tokens: int, keys: int) -> Stack:
    heads, kv = expert.num_heads * expert.head_dim, expert.num_kv_heads * expert.head_dim
    products = heads + 2 * kv + 2 * expert.width + 2 * expert.mlp_dim
    return Stack(expert.depth, tokens, expert.width, products, expert.num_heads * keys)
