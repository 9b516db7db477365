"""From the episodes of an iteration to minibatches of decisions."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.losses import explained_variance, whiten
from stare_jax.rollout.collect import Rollout
from stare_jax.stages import TaskSpec
from stare_jax.train.annotate import Annotation, annotate_episode
from stare_jax.train.steps import DecisionBatch
from stare_jax.types import Decisions, Observation


class PPOBatch(NamedTuple):
    """Episodes and what is to be learned from them."""

    observation: Observation
    """NumPy leaves `[E, D, ...]`, views of the states in which decisions were made."""
    decisions: Decisions
    """NumPy leaves `[E, D, ...]`."""
    annotation: Annotation
    """NumPy leaves `[E, ...]`."""
    advantage: np.ndarray
    """float32 `[E, D]`, whitened over the decisions that exist."""
    explained_variance: np.ndarray
    """float32 scalar, of the returns by the values when the actions were taken."""


def make_prepare(spec: TaskSpec, config, *, chunk: int = 1) -> Callable[[Rollout], PPOBatch]:
    """Returns a function that annotates all episodes of a rollout, of decisions on `chunk` actions, in one compiled
    call; config is a `PPOConfig`."""

    @jax.jit
    def annotate(signals, valid, value):
        annotation = jax.vmap(
            functools.partial(
                annotate_episode,
                spec=spec,
                shaping=config.shaping,
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
                time_limit=config.time_limit,
                terminal_potential=config.terminal_potential,
                chunk=chunk,
                chunk_discount=config.chunk_discount,
            )
        )(signals, valid, value)
        advantage = whiten(annotation.advantage_d, annotation.valid_d)
        return annotation, advantage, explained_variance(value[:, :-1], annotation.return_d, annotation.valid_d)

    def prepare(rollout):
        trajectory, decisions = rollout.trajectory, rollout.trajectory.decisions
        num_episodes = len(trajectory.valid)
        # However many episodes make up the steps of a batch, the shapes are those of the most there can be.
        num_rows = config.num_steps or num_episodes
        inputs = (trajectory.signals, trajectory.valid, decisions.value)
        results = jax.device_get(annotate(*jax.tree.map(lambda x: _pad(x, num_rows), inputs)))
        num_decisions = decisions.valid.shape[1]
        observation = jax.tree.map(lambda x: x[:, ::chunk][:, :num_decisions], trajectory.observation)
        return PPOBatch(observation, decisions, *jax.tree.map(lambda x: x[:num_episodes] if x.ndim else x, results))

    return prepare


def _pad(x: np.ndarray, num_rows: int) -> np.ndarray:
    return np.pad(x, [(0, num_rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def minibatches(batch: PPOBatch, *, size: int, rng: np.random.Generator) -> Iterator[DecisionBatch]:
    """Yields the decisions of a batch once, shuffled, in as few minibatches as can be, of equal numbers of decisions to
    within one and filled up to `size` with rows that are not valid.

    A last minibatch of what is left over would move the policy as far as the others, on a few decisions, and measure
    the KL divergence by them.
    """
    episode, d = np.nonzero(batch.decisions.valid)
    order = rng.permutation(len(episode))
    for chosen in np.array_split(order, math.ceil(len(order) / size)):
        rows = np.concatenate([chosen, np.zeros(size - len(chosen), chosen.dtype)])
        at = (episode[rows], d[rows])
        yield DecisionBatch(
            observation=jax.tree.map(lambda x, at=at: x[at], batch.observation),
            trace=jax.tree.map(lambda x, at=at: x[at], batch.decisions.trace),
            old_logp=batch.decisions.logp[at],
            old_value=batch.decisions.value[at],
            advantage=batch.advantage[at],
            return_=batch.annotation.return_d[at],
            valid=np.arange(size) < len(chosen),
        )
