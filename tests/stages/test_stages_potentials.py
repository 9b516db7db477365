"""Stage potentials by hand, their bounds, the progressive form and the stage toggles."""

import jax
import numpy as np
import pytest
from stage_signals import FAMILY_TASKS, make_signals, random_signals, separation_of, with_params

from stare_jax.stages import get_task, potentials, separate


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


HALF_TURN = [0, 0, 0, 1]


@pytest.mark.parametrize(
    "env_id, stage, fields, expected",
    [
        # sigma(1 - d / d_reach): at the object, at d_reach, at 3 d_reach.
        ("StackCube-v1", 0, {"tcp_pos": [[0, 0, 0], [0.06, 0, 0.08], [0.3, 0, 0]]}, sigmoid(np.array([1, 0, -2]))),
        ("PushCube-v1", 0, {"tcp_pos": [[0, 0, 0], [0.06, 0, 0.08], [0.3, 0, 0]]}, sigmoid(np.array([1, 0, -2]))),
        # .5 grasped + .5 tanh(n / 3) for n = 0, 1, 2 steps in the hand.
        (
            "StackCube-v1",
            1,
            {"is_grasped": [False, True, True]},
            [0, 0.5 + 0.5 * np.tanh(1 / 3), 0.5 + 0.5 * np.tanh(2 / 3)],
        ),
        # sigma(1 - d / .1) + .2 grasped, d = 0, .1, .1
        (
            "StackCube-v1",
            2,
            {"obj_pos": [[0, 0, 0], [0, 0, 0.1], [0.1, 0, 0]], "is_grasped": [True, False, True]},
            [sigmoid(1) + 0.2, 0.5, 0.7],
        ),
        # sigma(1 - d / .05) + .2 g; g = (1 + cos) / 2 = 1 for equal orientations, .5 at a right angle, 0 at a half
        # turn.
        (
            "StackCube-v1",
            3,
            {
                "obj_pos": [[0, 0, 0.05], [0, 0, 0], [0, 0, 0]],
                "obj_quat": [[1, 0, 0, 0], [0.5**0.5, 0, 0, 0.5**0.5], HALF_TURN],
            },
            [0.7, sigmoid(1) + 0.1, sigmoid(1)],
        ),
        ("PushCube-v1", 1, {"is_contact": [False, True, False]}, [0, 1, 0]),
        # sigma(1 - d / .1)
        ("PullCube-v1", 2, {"obj_pos": [[0, 0, 0], [0.1, 0, 0], [0, 0, 0.2]]}, sigmoid(np.array([1, 0, -1]))),
        # Horizontally closer than delta_goal = .13, at any height.
        ("PushCube-v1", 3, {"obj_pos": [[0, 0.129, 1], [0, 0.131, 0], [0, 0, 0]]}, [1, 0, 1]),
        ("LiftPegUpright-v1", 1, {"is_grasped": [False, True, True]}, [0, 1, 1]),
        # sigma(h / .095) for h = 0, .095, .19, the support at .5.
        (
            "LiftPegUpright-v1",
            2,
            {"obj_pos": [[0, 0, 0.5], [0, 0, 0.595], [0, 0, 0.69]], "support_z": 0.5},
            sigmoid(np.array([0, 1, 2])),
        ),
        # |cos| of the x axis and the vertical: lying, turned about y by 30 degrees, standing on its head.
        (
            "LiftPegUpright-v1",
            3,
            {"obj_quat": [[1, 0, 0, 0], [np.cos(np.pi / 12), 0, np.sin(np.pi / 12), 0], [0.5**0.5, 0, 0.5**0.5, 0]]},
            [0, 0.5, 1],
        ),
    ],
)
def test_potentials_by_hand(env_id, stage, fields, expected):
    spec, signals, separation = get_task(env_id), make_signals(3, **fields), separation_of([stage] * 3)
    result = potentials(with_params(spec, progressive=False), signals, separation)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    progressive = potentials(spec, signals, separation)
    np.testing.assert_allclose(progressive, (stage + np.asarray(expected)) / 4, atol=1e-6)


def test_weights_come_from_the_parameters():
    signals = make_signals(1, is_grasped=True, is_contact=True, obj_pos=[0.1, 0, 0], obj_quat=HALF_TURN)
    changes = {"beta1": 0.1, "beta2": 0.3, "beta3": 0.05, "beta4": 0.15, "tau": 2.0, "d_trans": 0.2, "d_place": 0.1}
    spec = with_params(get_task("StackCube-v1"), **changes, progressive=False)
    expected = [sigmoid(1), 0.1 + 0.3 * np.tanh(0.5), sigmoid(0.5) + 0.05, sigmoid(0) + 0.15 * 0]
    for stage, value in enumerate(expected):
        assert potentials(spec, signals, separation_of([stage]))[0] == pytest.approx(value, abs=1e-6)


def test_a_stage_that_is_off_holds_the_value_before():
    # sigma(1 - d / .1) in reach and push with d = .1 t, and 1 in contact.
    distance = np.arange(7)[:, None] * [0.1, 0, 0]
    signals = make_signals(7, tcp_pos=distance, obj_pos=distance, goal_pos=[0, 0, 0], is_contact=True)
    separation, spec = separation_of([0, 0, 1, 1, 2, 2, 3]), with_params(get_task("PushCube-v1"), progressive=False)
    on = sigmoid(1 - np.arange(7.0))
    held = {
        (True, False, True, True): [on[0], on[1], on[1], on[1], on[4], on[5], 0],
        # 0 until the first stage that is on.
        (False, True, False, True): [0, 0, 1, 1, 1, 1, 0],
        (True, True, True, False): [on[0], on[1], 1, 1, on[4], on[5], on[5]],
        (False, False, False, False): [0] * 7,
        (True, True, True, True): [on[0], on[1], 1, 1, on[4], on[5], 0],
    }
    for enabled, expected in held.items():
        result = potentials(with_params(spec, enabled=enabled), signals, separation)
        np.testing.assert_allclose(result, expected, atol=1e-6, err_msg=str(enabled))
    # The progressive value is what is held: (0 + on[1]) / 4.
    both = potentials(with_params(spec, enabled=(True, False, True, True), progressive=True), signals, separation)
    np.testing.assert_allclose(both[2:4], on[1] / 4, atol=1e-6)


@pytest.mark.parametrize("env_id", FAMILY_TASKS)
@pytest.mark.parametrize("progressive", [False, True])
def test_potentials_are_in_the_unit_interval(env_id, progressive):
    spec = with_params(get_task(env_id), progressive=progressive)
    annotate = jax.jit(lambda signals: potentials(spec, signals, separate(spec, signals)))
    for seed in range(5):
        signals = random_signals(seed, 40)
        # Held for ever, at the goal, perfectly aligned: the largest values there are.
        best = signals._replace(is_grasped=np.ones(40, bool), goal_pos=signals.obj_pos, goal_quat=signals.obj_quat)
        for case in (signals, best):
            result = np.asarray(annotate(case))
            assert (result >= 0).all() and (result <= 1).all()


@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_completing_a_stage_never_lowers_the_progressive_potential(env_id):
    # The same states, once as stage k and once as stage k + 1: the change is (1 - Phi_k + Phi_{k+1}) / K >= 0.
    spec, signals = with_params(get_task(env_id), progressive=False), random_signals(0, 12)
    paper = [np.asarray(potentials(spec, signals, separation_of([k] * 12))) for k in range(4)]
    progressive = with_params(spec, progressive=True)
    values = [np.asarray(potentials(progressive, signals, separation_of([k] * 12))) for k in range(4)]
    for k in range(3):
        np.testing.assert_allclose(values[k + 1] - values[k], (1 - paper[k] + paper[k + 1]) / 4, atol=1e-6)
        assert (values[k + 1] >= values[k]).all()
