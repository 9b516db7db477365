"""Properties of every task: gradients are finite, jit, vmap and padding change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_signals import FAMILY_TASKS, make_signals, pad, random_signals, separation_of, with_params

from stare_jax.stages import TASKS, get_task, potentials, separate, stage_costs
from stare_jax.types import Signals


def annotate(spec, signals, valid):
    separation = separate(spec, signals, valid)
    return separation, stage_costs(spec, signals, separation, valid), potentials(spec, signals, separation)


@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_jit_vmap_and_padding_change_nothing(env_id):
    function = functools.partial(annotate, get_task(env_id))
    compiled, num_states = jax.jit(function), 12
    batch = [random_signals(seed, num_states) for seed in range(3)]
    valid = np.arange(num_states) < np.array([[12], [7], [1]])
    single = [compiled(signals, row) for signals, row in zip(batch, valid, strict=True)]

    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, function(batch[1], valid[1]), single[1])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batch)
    vmapped = jax.jit(jax.vmap(function))(stacked, valid)
    for i, one in enumerate(single):
        jax.tree.map(lambda leaf, expected, i=i: close(leaf[i], expected), vmapped, one)

    # Cut to its 7 existing states, and the same with 5 states of rubbish behind them.
    cut = jax.jit(lambda signals: function(signals, None))(jax.tree.map(lambda leaf: leaf[:7], batch[1]))
    for garbage in (0.0, 1e30, np.nan):
        rubbish = pad(jax.tree.map(lambda leaf: leaf[:7], batch[1]), 5, garbage)
        separation, costs, phi = compiled(rubbish, valid[1])
        np.testing.assert_array_equal(separation.stage_t[:7], cut[0].stage_t)
        np.testing.assert_array_equal(separation.completed, cut[0].completed)
        expected = np.where(np.asarray(cut[0].entered_at) == 7, num_states, cut[0].entered_at)
        np.testing.assert_array_equal(separation.entered_at, expected)
        close(costs, cut[1])
        close(phi[:7], cut[2])


@pytest.mark.parametrize("env_id", TASKS)
def test_shapes_and_types(env_id):
    spec, num_states = get_task(env_id), 5
    # What a simulator gives may be float64; unjitted functions see it as it is.
    doubles = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(float), random_signals(0, 5))
    separation, costs, phi = jax.eval_shape(functools.partial(annotate, spec), doubles, np.ones(num_states, bool))
    assert [(leaf.shape, leaf.dtype) for leaf in (*separation, costs, phi)] == [
        ((num_states,), jnp.int32),
        ((spec.num_stages,), bool),
        ((spec.num_stages,), jnp.int32),
        ((spec.num_stages,), jnp.float32),
        ((num_states,), jnp.float32),
    ]


LYING, STANDING, HALF_TURN = [1, 0, 0, 0], [0.5**0.5, 0, 0.5**0.5, 0], [0, 0, 0, 1]
NUM_STATES = 8
DEGENERATE = {
    "everything coincides and nothing moves": {},
    "opposite orientations": {"obj_quat": HALF_TURN},
    "upright": {"obj_quat": STANDING, "goal_quat": STANDING},
    "held without moving": {
        "is_grasped": True,
        "is_contact": True,
        "obj_pos": [0.1, 0, 0.02],
        "grasp_pos": [0.1, 0, 0.02],
    },
    "straight above the goal": {"obj_pos": [0, 0, 0.1], "tcp_pos": [0, 0, 0.1]},
    "exactly at h_min": {"obj_pos": [0, 0, 0.05]},
    "on the corner of the path": {"obj_pos": [[0, 0, 0.1]] + [[0.2, 0, 0.1]] * 7, "goal_pos": [0.2, 0, 0]},
    "closer than floats can tell": {
        "obj_pos": np.geomspace(1e-38, 1e-6, NUM_STATES)[:, None] * np.ones(3),
        "tcp_pos": [1e-30, 0, 0],
    },
    "ordinary": random_signals(0, NUM_STATES)._asdict(),
    "quaternions of zeros": {"obj_quat": [0, 0, 0, 0], "tcp_quat": [0, 0, 0, 0]},
}


@functools.cache
def gradient_fn(env_id, changes):
    spec = with_params(get_task(env_id), **dict(changes))

    def total(floats, flags, separation, valid):
        signals = Signals(**floats, **flags)
        costs = stage_costs(spec, signals, separation, valid)
        return costs.sum() + jnp.where(valid, potentials(spec, signals, separation), 0.0).sum()

    return jax.jit(jax.grad(total))


@pytest.mark.parametrize("changes", [(), (("path", "time"), ("progressive", False), ("up_axis", 2))])
@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_gradients_are_finite(env_id, changes):
    gradient = gradient_fn(env_id, changes)
    everywhere, skipping = [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 2, 2, 2, 2]
    for name, fields in DEGENERATE.items():
        signals = make_signals(NUM_STATES, **fields)
        cases = [(signals, np.ones(NUM_STATES, bool))]
        # Behind four existing states, what does not exist may be anything that is a number.
        cases.append((pad(jax.tree.map(lambda leaf: leaf[:4], signals), 4, 1e15), np.arange(NUM_STATES) < 4))
        for labels in (everywhere, skipping):
            for case, valid in cases:
                floats = {k: v for k, v in case._asdict().items() if v.dtype != bool}
                flags = {k: v for k, v in case._asdict().items() if v.dtype == bool}
                result = gradient(floats, flags, separation_of(labels), valid)
                for field, value in result.items():
                    assert np.isfinite(value).all(), f"{name}: gradient of {field} is {value}"


def test_gradients_point_the_right_way():
    # Reach: moving the end-effector away from the object costs 1/3 m per metre in a stage of three steps.
    signals = make_signals(3, tcp_pos=[0.2, 0, 0])
    floats = {k: v for k, v in signals._asdict().items() if v.dtype != bool}
    flags = {k: v for k, v in signals._asdict().items() if v.dtype == bool}
    spec = get_task("PushCube-v1")

    def reach(floats):
        return stage_costs(spec, Signals(**floats, **flags), separation_of([0, 0, 0]))[0]

    gradient = jax.jit(jax.grad(reach))(floats)
    np.testing.assert_allclose(gradient["tcp_pos"], np.tile([1 / 3, 0, 0], (3, 1)), atol=1e-6)
    np.testing.assert_allclose(gradient["grasp_pos"], np.tile([-1 / 3, 0, 0], (3, 1)), atol=1e-6)
