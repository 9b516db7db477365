"""The part of a preference pair that no training changes: reference log-probabilities, stage masks and costs."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stare_jax.config import ConfigError
from stare_jax.data.windows import window_indices
from stare_jax.logging import Interrupted
from stare_jax.models.nn.lora import keep_adapters
from stare_jax.models.policy import Policy
from stare_jax.sharding.mesh import num_parts, place
from stare_jax.stages.costs import stage_costs
from stare_jax.stages.separate import separate, stage_mask
from stare_jax.stages.spec import TaskSpec
from stare_jax.types import Array, Observation, PreferencePair, PyTree, Signals, Trajectory


class ScoredTrajectory(NamedTuple):
    """One side of B preference pairs, with all that does not depend on the parameters that are trained.

    N actions come from D = ceil(N / C) decisions.
    """

    observation: Observation
    """leaves `[B, D, ...]` of the states in which decisions were taken."""
    decision: Array
    """`action_tokens` `[B, D, ...]`, or float32 `[B, D, H, A]` for a policy with a `preference_score`."""
    seed: Array
    """uint32 `[B, D, M]` of the M estimates of each score, the same for both sides of a pair."""
    ref_logp: Array
    """float32 `[B, N, M]` of each action, or of the decision that begins with it."""
    valid: Array
    """bool `[B, N]`: actions that exist, or that a decision begins with."""
    stage_mask: Array
    """bool `[B, K, N]`."""
    stage_cost: Array
    """float32 `[B, K]`."""
    completed: Array
    """bool `[B, K]`."""


class PairBatch(NamedTuple):
    """Preference pairs."""

    chosen: ScoredTrajectory
    rejected: ScoredTrajectory


def check_reference(reference: str, params: PyTree) -> None:
    """Raises ConfigError where `TPOConfig.reference` is "base" and there are no adapters to switch off."""
    if reference == "base" and not jax.tree.leaves(keep_adapters(params)):
        raise ConfigError("tpo.reference: got 'base', expected 'start' for a policy without adapters (model.lora)")


def score_pairs(
    policy: Policy,
    params: PyTree,
    pairs: PreferencePair,
    spec: TaskSpec,
    *,
    batch_size: int,
    num_draws: int = 1,
    mesh: Mesh | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PairBatch:
    """Computes the scores of the reference policy, stage masks and stage costs.

    Args:
        policy: the reference policy.
        params: parameters of the reference policy.
        pairs: NumPy leaves `[P, ...]`.
        spec: the task's stages.
        batch_size: decisions scored at a time, rounded up to a multiple of the mesh's parts.
        num_draws: M, estimates of each score where the policy makes estimates.
        mesh: devices of `params`, over which decisions are cut; None leaves that to jit.
        should_stop: polled before each batch of decisions.

    Returns:
        NumPy leaves `[P, ...]`.

    Raises:
        Interrupted: `should_stop` asked for it; scores are made again when the phase goes on.
    """
    batch_size += -batch_size % (1 if mesh is None else num_parts(mesh))

    @jax.jit
    def score_decisions(params, observation, decision, seed):
        if policy.preference_score is None:
            return policy.log_prob(params, observation, decision).logp[:, None, None]
        return policy.preference_score(params, observation, decision, seed)

    def score(trajectory: Trajectory) -> ScoredTrajectory:
        observation, decision, valid = decisions_of(policy, trajectory)
        num_pairs, num_decisions = decision.shape[:2]
        shape = (num_pairs, num_decisions, 1 if policy.preference_score is None else num_draws)
        seed = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
        num_scores = 1 if policy.preference_score is None else policy.chunk
        scores = np.zeros((*shape, num_scores), np.float32)
        pair, d = np.nonzero(valid[:, :: policy.chunk])
        for start in range(0, len(pair), batch_size):
            if should_stop():
                raise Interrupted("tpo: stopped while the reference scored pairs; nothing has been trained yet")
            rows = np.arange(start, start + batch_size) % len(pair)
            at = (pair[rows], d[rows])
            inputs = jax.tree.map(lambda x, at=at: x[at], (observation, decision, seed))
            scores[at] = score_decisions(params, *(inputs if mesh is None else place(inputs, mesh)))
        over_time = over_actions(scores.swapaxes(1, 2), valid.shape[1], policy.chunk)
        ref_logp = np.ascontiguousarray(np.moveaxis(over_time, 1, 2))
        stages = jax.device_get(_jitted_stages(spec)(trajectory.signals, trajectory.valid))
        return ScoredTrajectory(observation, decision, seed, ref_logp, valid, *stages)

    return PairBatch(score(pairs.chosen), score(pairs.rejected))


@functools.lru_cache(maxsize=16)
def _jitted_stages(spec: TaskSpec) -> Callable:
    return jax.jit(jax.vmap(functools.partial(action_stages, spec=spec)))


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


def over_actions(score: Array, num_actions: int, chunk: int) -> Array:
    """Lays scores of decisions `[..., D, C or 1]` out over the N actions, `[..., N]`.

    C scores are those of the actions that were executed; a single one stands where the decision begins.
    """
    score = jnp.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, chunk - score.shape[-1])])
    return score.reshape(*score.shape[:-2], -1)[..., :num_actions]


def decisions_of(policy: Policy, trajectory: Trajectory) -> tuple[Observation, np.ndarray, np.ndarray]:
    """Returns the decisions of trajectories, taken at t = 0, C, 2C .., and the actions that count.

    Args:
        policy: policy that is to score the decisions.
        trajectory: NumPy leaves `[P, ...]`.

    Returns:
        Observations `[P, D, ...]`; `ScoredTrajectory.decision`; `ScoredTrajectory.valid`.

    Raises:
        ValueError: a flow is to be scored by chains, and somebody else acted.
    """
    valid = np.asarray(trajectory.valid)[:, 1:]
    starts = np.arange(0, valid.shape[1], policy.chunk)
    observation = jax.tree.map(lambda x: x[:, starts], trajectory.observation)
    if policy.preference_score is None:
        if policy.window is not None and trajectory.action_tokens.ndim != 5:
            raise ValueError(
                f"action_tokens: got shape {trajectory.action_tokens.shape}, expected chains that the policy drew; "
                "model.preference 'flow' does without"
            )
        return observation, trajectory.action_tokens[:, starts], valid & (np.arange(valid.shape[1]) % policy.chunk == 0)
    index, _ = window_indices(starts, valid.sum(axis=1)[:, None], policy.window)
    return observation, trajectory.action[np.arange(len(valid))[:, None, None], index], valid
