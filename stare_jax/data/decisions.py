"""Decisions of stored trajectories, as a policy scores them."""

import jax
import numpy as np

from stare_jax.data.schema import DatasetError
from stare_jax.data.windows import window_indices
from stare_jax.models.policy import Policy
from stare_jax.types import Observation, PyTree, Trajectory


def decisions_of(policy: Policy, trajectory: Trajectory) -> tuple[Observation, PyTree, np.ndarray]:
    """Returns the decisions of trajectories, as they are to be scored.

    Args:
        policy: policy that is to score the decisions.
        trajectory: NumPy leaves `[P, ...]`.

    Returns:
        Observations `[P, D, ...]`; `ScoredTrajectory.decision`; bool `[P, D]`, decisions that exist.

    Raises:
        DatasetError: log-probabilities are asked of decisions that this policy did not make.
    """
    valid = np.asarray(trajectory.valid)[:, 1:]
    starts = np.arange(0, valid.shape[1], policy.chunk)
    observation = jax.tree.map(lambda x: x[:, starts], trajectory.observation)
    if policy.preference_score is not None:
        index, _ = window_indices(starts, valid.sum(axis=1)[:, None], policy.window)
        return observation, trajectory.action[np.arange(len(valid))[:, None, None], index], valid[:, starts]
    decisions, params = trajectory.decisions, jax.eval_shape(policy.init, jax.random.key(0))
    made = jax.eval_shape(policy.sample, params, policy.observation_shape(1), jax.random.key(0)).trace
    expected = jax.tree.map(lambda x: x.shape[1:], made)
    found = None if decisions is None else jax.tree.map(lambda x: x.shape[2:], decisions.trace)
    if found != expected or decisions.valid.shape[1] != len(starts):
        remedy = "collect them anew with this policy" + ("; model.preference 'flow' does without" * bool(policy.window))
        raise DatasetError(f"pairs: got decisions {found}, expected {expected} of the policy that is trained; {remedy}")
    return observation, decisions.trace, np.asarray(decisions.valid)
