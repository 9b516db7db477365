"""Stage costs by hand. Lengths in metres; the stage under test is the one that the labels name."""

import numpy as np
import pytest
from stage_signals import make_signals, pad, separation_of, with_params

from stare_jax.stages import get_task, stage_costs

NUM_STATES = 6
"""All cases are padded to this length, which must change nothing and saves compilations."""


def cost(env_id, stage, labels, fields, **params):
    spec, num_padding = with_params(get_task(env_id), **params), NUM_STATES - len(labels)
    signals = pad(make_signals(len(labels), **fields), num_padding, garbage=7.0)
    separation = separation_of(labels + labels[-1:] * num_padding)
    costs = stage_costs(spec, signals, separation, np.arange(NUM_STATES) < len(labels))
    assert costs.shape == (4,) and costs.dtype == np.float32 and (np.asarray(costs) >= 0).all()
    for k in set(range(4)) - set(labels):
        assert costs[k] == 0  # A stage without steps.
    return float(costs[spec.stage_names.index(stage)])


@pytest.mark.parametrize("env_id", ["StackCube-v1", "PushCube-v1", "LiftPegUpright-v1"])
def test_reach(env_id):
    # Distances .5 (3-4-5), .1 and 0 in the stage, 9 after it: mean .6 / 3. The object's centre is elsewhere.
    fields = {"tcp_pos": [[0.3, 0, 0.4], [0.1, 0, 0], [0, 0, 0], [9, 0, 0]], "obj_pos": [5, 5, 5]}
    assert cost(env_id, "reach", [0, 0, 0, 1], fields) == pytest.approx(0.2)


@pytest.mark.parametrize("env_id", ["StackCube-v1", "LiftPegUpright-v1"])
def test_grasp(env_id):
    # Distances .04, .02, .03 in the stage. Slip at t = 2 (6 mm in the hand while held) and at t = 3 (lost); t = 1 is
    # the closing. Cost = mean distance + .1 * 2/3 = .03 + .0666667.
    fields = {
        "tcp_pos": [[0.1, 0, 0], [0.04, 0, 0], [0.02, 0, 0], [0.03, 0, 0]],
        "obj_pos": [[0.1, 0, 0], [0.04, 0, 0], [0.02, 0, 0.006], [0.03, 0, 0.006]],
        "is_grasped": [False, True, True, False],
    }
    assert cost(env_id, "grasp", [0, 1, 1, 1], fields) == pytest.approx(0.03 + 0.1 * 2 / 3)
    # alpha_1 = 2, alpha_2 = .3, and a tolerance of 1 cm, so that only losing the object counts.
    changes = {"alpha_align": 2.0, "alpha_slip": 0.3, "slip_tol": 0.01}
    assert cost(env_id, "grasp", [0, 1, 1, 1], fields, **changes) == pytest.approx(0.06 + 0.1)


# Enters the stage 10 cm above a goal that is 30 cm away: the path goes (0,0,.1) -> (.3,0,.1) -> (.3,0,0).
CARRY = {"obj_pos": [[0, 0, 0], [0, 0, 0.1], [0.15, 0.04, 0.1], [0.32, 0, 0.05]], "goal_pos": [0.3, 0, 0]}


def test_transport_nearest():
    # On the path; 4 cm beside its first half; 2 cm beyond its second: mean .06 / 3.
    assert cost("StackCube-v1", "transport", [1, 2, 2, 2], CARRY) == pytest.approx(0.02)
    # A goal above the start: the straight line from (0,0,0) to (.3,0,.4); (.15+.04, 0, .2-.03) is 5 cm off it.
    rising = {"obj_pos": [[0, 0, 0], [0.19, 0, 0.17]], "goal_pos": [0.3, 0, 0.4]}
    assert cost("StackCube-v1", "transport", [2, 2], rising) == pytest.approx(0.025)
    # The whole path is one point, the goal itself.
    assert cost("StackCube-v1", "transport", [2, 2], {"goal_pos": [0, 0, 0]}) == 0


def test_transport_by_time():
    # T_k = 3: 0, 1/3 and 2/3 of the path's .4 are (0,0,.1), (.13333,0,.1), (.26667,0,.1); the object is off by 0,
    # |(.016667, .04, 0)| = .0433333 and |(.053333, 0, -.05)| = .0731057.
    expected = (0 + 0.0433333 + 0.0731057) / 3
    assert cost("StackCube-v1", "transport", [1, 2, 2, 2], CARRY, path="time") == pytest.approx(expected, rel=1e-5)


def test_place():
    # Moves by .01, .02, .03 in the three steps of the stage (the first is counted from the stage before).
    fields = {"obj_pos": np.array([0, 0, 0.01, 0.03, 0.06])[:, None] * [0, 0, 1]}
    assert cost("StackCube-v1", "place", [2, 2, 3, 3, 3], fields) == pytest.approx(0.02)
    # Only the last M = 2: mean of .02 and .03, times lambda_stab = 2.
    changes = {"stable_steps": 2, "lambda_stab": 2.0}
    assert cost("StackCube-v1", "place", [2, 2, 3, 3, 3], fields, **changes) == pytest.approx(0.05)
    # The whole episode in one stage: x_obj(-1) is x_obj(0), so 0, 0, .01, .02, .03 over M = 5.
    assert cost("StackCube-v1", "place", [3] * 5, fields) == pytest.approx(0.012)


def test_contact():
    # At entry (t = 1) the goal lies along +x, and higher; v = +x stays though the object has moved by t = 2. The
    # end-effector is 3 cm and 1 cm beside the line through the object along v; heights do not count.
    fields = {
        "tcp_pos": [[0, 9, 0], [-0.05, 0.03, 0.2], [0.4, 0.11, 0.1]],
        "obj_pos": [[0, 5, 0], [0, 0, 0], [0, 0.1, 0]],
        "goal_pos": [0.2, 0, 0.7],
        "is_contact": [False, False, True],
    }
    # (.05 + .03 + 0 + .01) / 2
    assert cost("PushCube-v1", "contact", [0, 1, 1], fields) == pytest.approx(0.045)
    # alpha_c = .2, alpha_perp = .5: (.2 + .015 + .005) / 2
    changes = {"alpha_contact": 0.2, "alpha_perp": 0.5}
    assert cost("PushCube-v1", "contact", [0, 1, 1], fields, **changes) == pytest.approx(0.11)
    # The object is at its goal: no direction, so all of the horizontal distance, |(.03, .04)|, counts.
    there = {"tcp_pos": [0.03, 0.04, 0.5], "is_contact": True}
    assert cost("PushCube-v1", "contact", [1, 1], there) == pytest.approx(0.05)


@pytest.mark.parametrize("env_id, stage", [("PushCube-v1", "push"), ("PullCube-v1", "pull")])
def test_push_and_pull(env_id, stage):
    # v = +x at entry (t = 1). dx = (.01, .002, 0) and (.04, .003, .004): sideways .002 and .005, mean .0035.
    # The last distance to the goal is |(-.15, .003, .004)| = .1500833.
    fields = {"obj_pos": [[0, 0, 0], [0.01, 0.002, 0], [0.05, 0.005, 0.004], [1, 1, 1]], "goal_pos": [0.2, 0.002, 0]}
    assert cost(env_id, stage, [1, 2, 2, 3], fields) == pytest.approx(0.1500833 + 0.0035, rel=1e-5)
    assert cost(env_id, stage, [1, 2, 2, 3], fields, lambda_perp=10.0) == pytest.approx(0.1500833 + 0.035, rel=1e-5)


def test_goal():
    # Distances to the goal .05 and .03, motion .01 and .02: mean .04 + mean .015.
    fields = {"obj_pos": [[0, 0, 0], [0.01, 0, 0], [0.03, 0, 0]], "goal_pos": [0.06, 0, 0]}
    assert cost("PushCube-v1", "goal", [2, 3, 3], fields) == pytest.approx(0.055)
    assert cost("PushCube-v1", "goal", [2, 3, 3], fields, beta_x=0.5, beta_v=2.0) == pytest.approx(0.05)


def test_lift():
    # Heights above the support .02, .04, .06, of which h_min = .05 asks .03, .01 and nothing more.
    fields = {"obj_pos": np.array([0.92, 0.94, 0.96])[:, None] * [0, 0, 1], "support_z": 0.9}
    assert cost("LiftPegUpright-v1", "lift", [2, 2, 2], fields) == pytest.approx(0.04 / 3, rel=1e-4)


def test_upright():
    # Lying along x, turned about y by 30 and 90 degrees: 90, 60 and 0 degrees from the vertical.
    angles = np.radians([0, 30, 90]) / 2
    fields = {"obj_quat": np.stack([np.cos(angles), 0 * angles, np.sin(angles), 0 * angles], axis=1)}
    assert cost("LiftPegUpright-v1", "upright", [3, 3, 3], fields) == pytest.approx(np.radians(50), rel=1e-5)
    # The y axis is the one turned about: it stays horizontal.
    assert cost("LiftPegUpright-v1", "upright", [3, 3, 3], fields, up_axis=1) == pytest.approx(np.pi / 2, rel=1e-5)


def test_no_state_at_all_costs_nothing():
    spec = get_task("StackCube-v1")
    signals = make_signals(6, tcp_pos=[1, 2, 3])
    np.testing.assert_array_equal(stage_costs(spec, signals, separation_of([0] * 6), np.zeros(6, bool)), np.zeros(4))
