"""The stages of an episode as its actions see them, for preferences."""

from typing import NamedTuple

from stare_jax.stages.costs import stage_costs
from stare_jax.stages.separate import separate, stage_mask
from stare_jax.stages.spec import TaskSpec
from stare_jax.types import Array, Signals


class ActionStages(NamedTuple):
    """The stages of one episode as its actions see them."""

    mask: Array
    """bool `[K, N]`: the action was taken in a state of the stage, and exists."""
    cost: Array
    """float32 `[K]`."""
    completed: Array
    """bool `[K]`."""


def action_stages(signals: Signals, valid: Array, *, spec: TaskSpec) -> ActionStages:
    """Returns masks over actions and stage costs over states (3) of one episode.

    Args:
        signals: leaves `[N + 1, ...]`.
        valid: bool `[N + 1]`.
        spec: the task.
    """
    separation = separate(spec, signals, valid)
    return ActionStages(
        mask=stage_mask(separation, spec.num_stages, valid)[:, :-1] & valid[1:],
        cost=stage_costs(spec, signals, separation, valid),
        completed=separation.completed,
    )
