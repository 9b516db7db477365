"""Episodes of random numbers."""

import jax
import numpy as np

from stare_jax.types import Decisions, Observation, Signals, Trajectory


def make_trajectory(
    seed=0,
    *,
    length=3,
    horizon=5,
    size=8,
    state_dim=4,
    action_dim=7,
    num_tokens=0,
    success=True,
    contact_at=None,
    chunk=1,
):
    """An episode of random numbers, padded with zeros as the collector pads; the object is far from the gripper."""
    rng = np.random.default_rng(seed)
    num_states, num_decisions = horizon + 1, -(-horizon // chunk)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    steps = np.arange(num_states)
    position = normal(num_states, 3)
    trajectory = Trajectory(
        observation=Observation(
            images={"base_camera": rng.integers(0, 256, (num_states, size, size, 3), dtype=np.uint8)},
            state=normal(num_states, state_dim),
            tokens=rng.integers(0, 99, (num_states, num_tokens), dtype=np.int32),
            token_mask=np.ones((num_states, num_tokens), bool),
        ),
        signals=Signals(
            tcp_pos=position + 10,
            tcp_quat=normal(num_states, 4),
            obj_pos=position,
            obj_quat=normal(num_states, 4),
            grasp_pos=position,
            goal_pos=position + 5,
            goal_quat=normal(num_states, 4),
            is_grasped=np.zeros(num_states, bool),
            is_contact=np.zeros(num_states, bool) if contact_at is None else steps == contact_at,
            success=(steps == length) & success,
            support_z=np.full(num_states, 0.5, np.float32),
        ),
        valid=np.ones(num_states, bool),
        action=normal(horizon, action_dim),
        decisions=Decisions(
            trace={"bins": rng.integers(0, 256, (num_decisions, action_dim), dtype=np.int32)},
            logp=normal(num_decisions, 2),
            value=normal(num_decisions + 1),
            valid=np.ones(num_decisions, bool),
        ),
    )
    decisions = trajectory.decisions
    num_made = -(-length // chunk)

    def cut(tree, num_real):
        return jax.tree.map(
            lambda x: np.where((np.arange(len(x)) < num_real).reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros_like(x)),
            tree,
        )

    states = (trajectory.observation, trajectory.signals, trajectory.valid)
    return Trajectory(
        *cut(states, length + 1),
        cut(trajectory.action, length),
        cut(decisions, num_made)._replace(value=cut(decisions.value, num_made + 1)),
    )
