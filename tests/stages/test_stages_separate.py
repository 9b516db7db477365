"""Stage labels: hand-made episodes, thresholds, the definition evaluated literally, online = offline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_signals import FAMILY_TASKS, FAR, make_signals, pad, random_signals, signals_with_events, with_params

from stare_jax.stages import get_task, init_stage, potentials, separate, stage_mask, step_stage

# Each row is one state: which of the four terminal events hold in it, success the last.
EPISODES = {
    "one stage after the other": (
        ["0000", "1000", "0000", "0100", "0010", "0000", "0001", "0000"],
        [0, 1, 1, 2, 3, 3, 3, 3],
        [1, 1, 1, 1],
        [0, 1, 3, 4],
    ),
    "an event before its stage has begun is not remembered": (
        ["0000", "0110", "0000", "1000", "0000", "0100"],
        # Stage 0 ends at 3 and stage 1 at 5; what happened at 1 has no effect.
        [0, 0, 0, 1, 1, 2],
        [1, 1, 0, 0],
        [0, 3, 5, 6],
    ),
    "several stages in one step": (
        ["0000", "0000", "1110", "0000"],
        [0, 0, 3, 3],
        [1, 1, 1, 0],
        [0, 4, 4, 2],
    ),
    "success completes all that are left": (
        ["0000", "1000", "0000", "0001", "0000"],
        [0, 1, 1, 3, 3],
        [1, 1, 1, 1],
        [0, 1, 5, 3],
    ),
    "labels never decrease": (
        ["1000", "0100", "0000", "0010", "0000", "0000"],
        [1, 2, 2, 3, 3, 3],
        [1, 1, 1, 0],
        [6, 0, 1, 3],
    ),
    "nothing happens": (["0000"] * 3, [0, 0, 0], [0, 0, 0, 0], [0, 3, 3, 3]),
}


@pytest.mark.parametrize("name", EPISODES)
def test_labels_by_hand(name):
    rows, stage_t, completed, entered_at = EPISODES[name]
    events = np.array([[flag == "1" for flag in row] for row in rows])
    for env_id in ("StackCube-v1", "LiftPegUpright-v1"):
        spec = get_task(env_id)
        separation = separate(spec, signals_with_events(spec.family, events))
        np.testing.assert_array_equal(separation.stage_t, stage_t)
        np.testing.assert_array_equal(separation.completed, np.array(completed, bool))
        np.testing.assert_array_equal(separation.entered_at, entered_at)
        assert separation.stage_t.dtype == separation.entered_at.dtype == jnp.int32


def test_padding_completes_nothing_and_keeps_the_label():
    spec = get_task("StackCube-v1")
    signals = signals_with_events(spec.family, np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]))
    separation = separate(spec, signals, np.array([True, True, False, False]))
    np.testing.assert_array_equal(separation.stage_t, [0, 1, 1, 1])
    np.testing.assert_array_equal(separation.completed, [True, False, False, False])
    np.testing.assert_array_equal(separation.entered_at, [0, 1, 4, 4])
    mask = stage_mask(separation, 4, np.array([True, True, False, False]))
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    lost = separate(spec, signals, np.zeros(4, bool))  # An episode lost to a dead simulator.
    np.testing.assert_array_equal(lost.entered_at, [4, 4, 4, 4])
    assert not lost.completed.any() and not lost.stage_t.any()


@pytest.mark.parametrize(
    "env_id, index, inside, outside",
    [
        # reach: closer than delta_reach = .05, in any direction, or touching from afar.
        ("PushCube-v1", 0, {"grasp_pos": [0.03, 0, 0.0399]}, {"grasp_pos": [0.03, 0, 0.0401]}),
        ("StackCube-v1", 0, {"grasp_pos": [FAR, 0, 0], "is_contact": True}, {"grasp_pos": [FAR, 0, 0]}),
        # contact: touching; being close is not enough.
        ("PushCube-v1", 1, {"is_contact": True}, {"is_contact": False}),
        # push: closer than delta_goal = .13 to the goal, whatever the height.
        ("PullCube-v1", 2, {"goal_pos": [0.05, 0.1199, 1]}, {"goal_pos": [0.05, 0.1201, 0]}),
        # grasp in pick-place: held and higher than delta_lift = .02 above the support, here at .87.
        (
            "StackCube-v1",
            1,
            {"is_grasped": True, "obj_pos": [0, 0, 0.8901], "support_z": 0.87},
            {"is_grasped": True, "obj_pos": [0, 0, 0.8899], "support_z": 0.87},
        ),
        ("StackCube-v1", 1, {"is_grasped": True, "obj_pos": [0, 0, 1]}, {"is_grasped": False, "obj_pos": [0, 0, 1]}),
        # transport: horizontally closer than delta_goal = .05.
        ("StackCube-v1", 2, {"goal_pos": [0.03, 0.0399, 1]}, {"goal_pos": [0.03, 0.0401, 0]}),
        # grasp of the peg: held, at any height.
        ("LiftPegUpright-v1", 1, {"is_grasped": True}, {"is_contact": True}),
        # lift: higher than h_min = .05, held or not.
        ("LiftPegUpright-v1", 2, {"obj_pos": [0, 0, 0.0501]}, {"obj_pos": [0, 0, 0.0499], "is_grasped": True}),
        ("LiftPegUpright-v1", 3, {"success": True}, {"obj_pos": [0, 0, 1]}),
    ],
)
def test_terminal_events(env_id, index, inside, outside):
    spec = get_task(env_id)
    for fields, expected in ((inside, True), (outside, False)):
        event = spec.event_fns[index](spec.params, jax.tree.map(jnp.asarray, make_signals(1, **fields)))
        assert bool(event[0]) is expected


def literal_labels(events, success, valid):
    """c_k = min{t >= c_{k-1} : e_k(t)}, by search; success at t ends every stage at t at the latest."""
    num_states, num_stages = events.shape
    events = events | success[:, None]
    times, previous = [], 0
    for k in range(num_stages):
        hits = [t for t in range(num_states) if valid[t] and t >= previous and events[t, k]]
        previous = hits[0] if hits else np.inf
        times.append(previous)
    last_valid = np.maximum(np.cumsum(valid) - 1, 0)
    labels = [min(num_stages - 1, sum(c <= t for c in times)) for t in last_valid]
    return np.array(labels), np.isfinite(times)


@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_labels_follow_the_definition_online_and_offline(env_id):
    # Wide thresholds, so that random states pass through all the stages at different times.
    spec = with_params(get_task(env_id), delta_reach=0.1, delta_lift=0.04, h_min=0.06, delta_goal=0.06)
    num_states, num_valid = 24, (24, 17, 24, 1, 9, 24, 24, 24)
    offline = jax.jit(lambda signals, valid: separate(spec, signals, valid))
    step = jax.jit(lambda carry, signals_t, valid_t: step_stage(spec, carry, signals_t, valid_t=valid_t))
    seen = set()
    for seed, length in enumerate(num_valid):
        signals, valid = random_signals(seed, num_states), np.arange(num_states) < length
        if seed % 2:
            signals = signals._replace(success=np.zeros(num_states, bool))
        separation = offline(signals, valid)
        events = np.stack([event_fn(spec.params, signals) for event_fn in spec.event_fns], axis=1)
        labels, completed = literal_labels(events, signals.success, valid)
        np.testing.assert_array_equal(separation.stage_t, labels)
        np.testing.assert_array_equal(separation.completed, completed)

        carry, online = init_stage(spec, jax.tree.map(lambda leaf: leaf[0], signals)), []
        for t in range(num_states):
            carry, stage_t = step(carry, jax.tree.map(lambda leaf, t=t: leaf[t], signals), valid[t])
            online.append(int(stage_t))
        np.testing.assert_array_equal(separation.stage_t, online)

        assert (np.diff(labels) >= 0).all()
        mask = np.asarray(stage_mask(separation, 4, valid))
        np.testing.assert_array_equal(mask.sum(axis=0), valid)  # Every existing state has exactly one stage.
        entered = [np.flatnonzero(row)[0] if row.any() else num_states for row in mask]
        np.testing.assert_array_equal(separation.entered_at, entered)
        seen |= set(labels.tolist())
    assert seen == {0, 1, 2, 3}  # Otherwise the test would show little.


def test_shapes_and_types_are_checked():
    spec, signals = get_task("PushCube-v1"), random_signals(0, 5)
    with pytest.raises(AssertionError, match="signals.tcp_quat"):
        separate(spec, signals._replace(tcp_quat=signals.tcp_pos))
    with pytest.raises(AssertionError, match="signals.is_contact"):
        separate(spec, signals._replace(is_contact=signals.support_z))
    with pytest.raises(AssertionError, match="valid"):
        separate(spec, signals, np.ones(4, bool))
    with pytest.raises(AssertionError, match="signals.tcp_pos"):
        init_stage(spec, signals)  # Meant for one state.
    assert separate(spec, jax.tree.map(np.asarray, pad(signals, 1, 0.0))).stage_t.shape == (6,)


@pytest.mark.parametrize("env_id, contact_label", [("StackCube-v1", 1), ("PushCube-v1", 2), ("LiftPegUpright-v1", 1)])
def test_without_a_reach_distance_contact_alone_ends_reach(env_id, contact_label):
    # 6, 4 and 1 cm away, then 1 cm away and touched: reach ends at 5 cm, or with the touch, which ends contact as well.
    fields = {"tcp_pos": [[0.06, 0, 0], [0.04, 0, 0], [0.01, 0, 0], [0.01, 0, 0]], "goal_pos": [FAR, 0, 0]}
    signals = make_signals(4, **fields, is_contact=[False, False, False, True])
    spec = get_task(env_id)
    np.testing.assert_array_equal(separate(spec, signals).stage_t, [0, 1, 1, contact_label])
    variant = with_params(spec, delta_reach=0.0)
    separation = separate(variant, signals)
    np.testing.assert_array_equal(separation.stage_t, [0, 0, 0, contact_label])
    # The potential of reach grades all of the way to the object: sigma(1 - d / .1) / 4.
    expected = 1 / (1 + np.exp(-(1 - np.array([0.6, 0.4, 0.1])))) / 4
    np.testing.assert_allclose(potentials(variant, signals, separation)[:3], expected, atol=1e-6)
