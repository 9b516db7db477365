"""Signals for the tests of `stare_jax.stages`: by hand, from wanted events, or random."""

import dataclasses

import numpy as np

from stare_jax.stages import Separation, TaskSpec
from stare_jax.types import Signals

FAMILY_TASKS = ("StackCube-v1", "PushCube-v1", "LiftPegUpright-v1")
"""One task of each family."""

FAR = 1.0
"""Metres: out of reach of every threshold."""


def with_params(spec: TaskSpec, **changes) -> TaskSpec:
    return dataclasses.replace(spec, params=dataclasses.replace(spec.params, **changes))


def make_signals(num_states: int, **fields) -> Signals:
    """Everything at the origin, identity orientations, nothing touched; `fields` are broadcast to `[T, ...]`."""
    identity = [1.0, 0.0, 0.0, 0.0]
    default = Signals(
        tcp_pos=np.zeros(3),
        tcp_quat=identity,
        obj_pos=np.zeros(3),
        obj_quat=identity,
        grasp_pos=np.zeros(3),
        goal_pos=np.zeros(3),
        goal_quat=identity,
        is_grasped=False,
        is_contact=False,
        success=False,
        support_z=0.0,
    )._asdict()
    leaves = {}
    for name, value in default.items():
        base = np.asarray(value)
        dtype = bool if base.dtype == bool else np.float32
        leaves[name] = np.broadcast_to(np.asarray(fields.pop(name, base)), (num_states, *base.shape)).astype(dtype)
    assert not fields, f"no such signals: {sorted(fields)}"
    return Signals(**leaves)


def signals_with_events(family: str, events: np.ndarray) -> Signals:
    """Signals whose K = 4 terminal events, success the last of them, are `events`, bool `[T, 4]`."""
    first, second, third, success = np.asarray(events, bool).T
    obj_pos = np.zeros((len(first), 3))
    fields = {"grasp_pos": [FAR, FAR, FAR], "success": success}
    if family == "pick-place":  # contact | held and lifted | over the goal | success
        obj_pos[:, 2] = np.where(second, 0.03, 0.0)
        fields |= {"is_contact": first, "is_grasped": second, "goal_pos": FAR * ~third[:, None] + obj_pos}
    elif family == "push-pull":  # close | contact (which ends reach too) | at the goal | success
        fields |= {"is_contact": second, "goal_pos": FAR * ~third[:, None] + obj_pos}
        fields["grasp_pos"] = FAR * ~first[:, None] * np.ones(3)
    else:  # close | held | high | success
        obj_pos[:, 2] = np.where(third, 0.06, 0.0)
        fields |= {"is_grasped": second, "grasp_pos": FAR * ~first[:, None] * np.ones(3)}
    return make_signals(len(first), obj_pos=obj_pos, **fields)


def random_signals(seed: int, num_states: int) -> Signals:
    """Random states in which every event of every family happens now and then."""
    rng = np.random.default_rng(seed)
    quat = rng.normal(size=(3, num_states, 4))
    quat /= np.linalg.norm(quat, axis=-1, keepdims=True)
    position = rng.uniform(-0.1, 0.1, (4, num_states, 3))
    flag = rng.random((3, num_states)) < np.array([[0.5], [0.2], [0.05]])
    return make_signals(
        num_states,
        tcp_pos=position[0],
        tcp_quat=quat[0],
        obj_pos=position[1],
        obj_quat=quat[1],
        grasp_pos=position[2],
        goal_pos=position[3],
        goal_quat=quat[2],
        is_grasped=flag[0],
        is_contact=flag[1],
        success=flag[2],
    )


def separation_of(stage_t, num_stages: int = 4) -> Separation:
    """The separation with the given labels, 0-based and non-decreasing."""
    stage_t = np.asarray(stage_t, np.int32)
    entered = [np.flatnonzero(stage_t == k) for k in range(num_stages)]
    return Separation(
        stage_t=stage_t,
        completed=np.arange(num_stages) < stage_t[-1],
        entered_at=np.array([steps[0] if len(steps) else len(stage_t) for steps in entered], np.int32),
    )


def pad(signals: Signals, num: int, garbage: float) -> Signals:
    """Appends `num` states that do not exist: floats are `garbage`, flags True."""

    def extend(leaf):
        value = True if leaf.dtype == bool else garbage
        return np.concatenate([leaf, np.full((num, *leaf.shape[1:]), value, leaf.dtype)])

    return Signals(*(extend(np.asarray(leaf)) for leaf in signals))
