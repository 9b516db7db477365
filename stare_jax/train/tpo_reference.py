"""The part of a preference pair that no training changes: reference log-probabilities, stage masks and costs."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.config import ConfigError
from stare_jax.data.pairs import decisions_of
from stare_jax.data.scores import Keep
from stare_jax.logging import Interrupted, announce_compiling, progress
from stare_jax.models.nn.lora import keep_adapters
from stare_jax.models.policy import Policy
from stare_jax.rollout.acting import acting_sharding, place_rows
from stare_jax.sharding import pod
from stare_jax.stages import ActionStages, TaskSpecs, action_stages, annotated_stages, by_task
from stare_jax.types import Array, Observation, PreferencePair, PyTree, Trajectory


class ScoredTrajectory(NamedTuple):
    """One side of B preference pairs, with all that does not depend on the parameters that are trained.

    N actions come from D = ceil(N / C) decisions. The loss sums M scores: M is D where a decision has one, its
    log-probability, and N for a policy with a `preference_score`, which scores each action.
    """

    observation: Observation
    """leaves `[B, D, ...]` of the states in which decisions were made."""
    decision: PyTree
    """the traces of the decisions, leaves `[B, D, ...]`, or float32 `[B, D, H, A]`, the actions from each on, for a
    policy with a `preference_score`."""
    seed: Array
    """uint32 `[B, D, G]` of its G estimates, the same for both sides of a pair; G is 1 where there is one."""
    ref_logp: Array
    """float32 `[B, M, G]`."""
    valid: Array
    """bool `[B, M]`: decisions or actions that exist."""
    stage_mask: Array
    """bool `[B, K, M]`."""
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
    spec: TaskSpecs,
    *,
    batch_size: int,
    num_draws: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    keep: Keep = lambda side, inputs, compute: compute(),
) -> PairBatch:
    """Computes the scores of the reference policy, stage masks and stage costs.

    Args:
        policy: the reference policy.
        params: parameters of the reference policy, on this process's devices; processes share the decisions.
        pairs: NumPy leaves `[P, ...]`.
        spec: the task's stages; of several tasks all, of which `pairs.task` are indices.
        batch_size: decisions scored at a time, cut over the devices of `params`.
        num_draws: G, estimates of each score where the policy makes estimates.
        should_stop: polled before each batch of decisions.
        keep: asked for the scores of each side, which it has or computes (`data.scores.keep_scores`).

    Returns:
        NumPy leaves `[P, ...]`.

    Raises:
        Interrupted: `should_stop` asked for it; scores are made again when the phase goes on.
    """
    task = np.zeros(len(pairs.chosen.valid), np.int32) if pairs.task is None else pairs.task
    score_aloud = _make_score(policy)

    def score(side: str, trajectory: Trajectory) -> ScoredTrajectory:
        observation, decision, is_decided = decisions_of(policy, trajectory)
        shape = (*is_decided.shape, 1 if policy.preference_score is None else num_draws)
        seed = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)

        def compute() -> np.ndarray:
            scores = np.zeros((*shape, 1 if policy.preference_score is None else policy.chunk), np.float32)
            pair, d = map(pod.share, np.nonzero(is_decided))
            is_stopped = False
            with progress(len(pair), f"tpo: reference, {side}", "decision") as bar:
                for start in range(0, len(pair), batch_size):
                    if is_stopped := should_stop():
                        break
                    rows = np.arange(start, start + batch_size) % len(pair)
                    at = (pair[rows], d[rows])
                    inputs = jax.tree.map(lambda x, at=at: x[at], (observation, decision, seed))
                    placed = place_rows(inputs, acting_sharding(params))
                    scores[at] = np.asarray(score_aloud(params, *placed))[:batch_size]
                    bar.update(min(batch_size, len(pair) - start))
            if pod.agree(is_stopped):
                raise Interrupted("tpo: stopped while the reference scored pairs; nothing has been trained yet")
            for *at, found in pod.gather((pair, d, scores[pair, d])):
                scores[tuple(at)] = found
            return scores

        scores = keep(side, (observation, decision, is_decided, seed), compute)
        mask, cost, completed = _stages_of(spec, task, trajectory)
        valid = np.asarray(trajectory.valid)[:, 1:]
        if policy.preference_score is None:
            valid, mask = is_decided, mask[..., :: policy.chunk]
        ref_logp = np.ascontiguousarray(np.moveaxis(flatten_scores(scores.swapaxes(1, 2), valid.shape[1]), 1, 2))
        return ScoredTrajectory(observation, decision, seed, ref_logp, valid, mask, cost, completed)

    return PairBatch(score("chosen", pairs.chosen), score("rejected", pairs.rejected))


def _make_score(policy: Policy) -> Callable:
    """Compiles (parameters, observation, decision, seed) -> the scores of the reference policy, `[B, G, C or 1]`."""

    @jax.jit
    def score_decisions(params, observation, decision, seed):
        if policy.preference_score is None:
            return policy.log_prob(params, observation, decision).logp.sum(axis=1)[:, None, None]
        return policy.preference_score(params, observation, decision, seed)

    return announce_compiling("tpo: compiling the scores of the reference policy", score_decisions)


@functools.lru_cache(maxsize=16)
def _jitted_stages(spec: TaskSpecs) -> Callable:
    return jax.jit(jax.vmap(by_task(spec, lambda one, *episode: action_stages(*episode, spec=one))))


_jitted_labels = jax.jit(jax.vmap(annotated_stages))


def _stages_of(spec: TaskSpecs, task: Array, trajectory: Trajectory) -> ActionStages:
    """Returns the stages of trajectories `[P, ...]`, NumPy leaves: annotated ones, or those of the signals."""
    if trajectory.stages is None:
        return jax.device_get(_jitted_stages(spec)(task, trajectory.signals, trajectory.valid))
    return jax.device_get(_jitted_labels(trajectory.stages, trajectory.valid))


def flatten_scores(score: Array, num_scores: int) -> Array:
    """Returns scores of decisions `[..., D, C or 1]`, C where each action has its own, in order, `[..., M]`.

    The last decision may have executed fewer actions than C.
    """
    return score.reshape(*score.shape[:-2], -1)[..., :num_scores]
