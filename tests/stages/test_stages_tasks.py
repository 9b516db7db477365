"""The eight tasks, and what a TaskSpec refuses."""

import dataclasses
import math

import pytest
from stage_signals import with_params

from stare_jax.stages import TASKS, StageParams, get_task

FAMILIES = {
    "StackCube-v1": "pick-place",
    "PushCube-v1": "push-pull",
    "PullCube-v1": "push-pull",
    "LiftPegUpright-v1": "lift-upright",
    "PutSpoonOnTableClothInScene-v1": "pick-place",
    "PutCarrotOnPlateInScene-v1": "pick-place",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": "pick-place",
    "PutEggplantInBasketScene-v1": "pick-place",
}
STAGES = {
    "pick-place": ("reach", "grasp", "transport", "place"),
    "push-pull": ("reach", "contact", "push", "goal"),
    "lift-upright": ("reach", "grasp", "lift", "upright"),
}


def test_tasks_are_the_eight():
    assert set(TASKS) == set(FAMILIES) and len(TASKS) == 8


@pytest.mark.parametrize("env_id", TASKS)
def test_task_contract(env_id):
    spec = get_task(env_id)
    assert spec.env_id == env_id and spec.family == FAMILIES[env_id]
    expected = STAGES[spec.family]
    if env_id == "PullCube-v1":
        expected = ("reach", "contact", "pull", "goal")
    assert spec.stage_names == expected and spec.num_stages == 4
    assert spec.instruction == spec.instruction.lower().strip() != ""
    assert hash(spec) == hash(dataclasses.replace(spec))  # A spec can be a static argument of jit.


@pytest.mark.parametrize(
    "env_id, expected",
    [  # The table of defaults, one row of numbers per family.
        ("StackCube-v1", {"delta_reach": 0.05, "delta_lift": 0.02, "delta_goal": 0.05}),
        ("StackCube-v1", {"d_reach": 0.1, "d_trans": 0.1, "d_place": 0.05, "tau": 3.0}),
        ("StackCube-v1", {"beta1": 0.5, "beta2": 0.5, "beta3": 0.2, "beta4": 0.2, "stable_steps": 5}),
        ("StackCube-v1", {"alpha_align": 1.0, "alpha_slip": 0.1, "lambda_stab": 1.0, "slip_tol": 0.005}),
        ("PullCube-v1", {"delta_reach": 0.05, "delta_goal": 0.13, "d_reach": 0.1, "d_push": 0.1}),
        ("PullCube-v1", {"beta1": 1.0, "beta2": 0.0, "beta3": 0.0, "beta4": 0.0, "tau": 3.0}),
        ("PullCube-v1", {"alpha_contact": 0.05, "alpha_perp": 1.0, "lambda_perp": 1.0, "beta_x": 1.0, "beta_v": 1.0}),
        ("LiftPegUpright-v1", {"delta_reach": 0.05, "h_min": 0.05, "d_reach": 0.1, "h_lift": 0.095}),
        ("LiftPegUpright-v1", {"beta1": 1.0, "up_axis": 0, "path": "nearest", "progressive": True, "enabled": None}),
    ],
)
def test_default_parameters(env_id, expected):
    params = dataclasses.asdict(get_task(env_id).params)
    assert {name: params[name] for name in expected} == expected


def test_unknown_task_lists_the_eight():
    with pytest.raises(ValueError, match="PushCube-v2") as error:
        get_task("PushCube-v2")
    assert all(env_id in str(error.value) for env_id in TASKS)


SIGMOID_1 = 1 / (1 + math.exp(-1))


@pytest.mark.parametrize(
    "env_id, changes, message",
    [
        ("StackCube-v1", {"beta1": 0.6}, r"grasp.*beta1 \(0.6\) \+ params.beta2 \(0.5\) = 1.1,"),
        ("StackCube-v1", {"beta3": 0.27}, r"transport.*= 1.00106"),  # sigma(1) = 0.731059
        ("StackCube-v1", {"beta4": 0.3}, r"place.*= 1.03106"),
        ("PushCube-v1", {"beta1": 1.01}, r"contact.*= 1.01"),
        ("LiftPegUpright-v1", {"beta1": 1.25}, r"grasp.*= 1.25"),
        ("PushCube-v1", {"enabled": (True, False)}, "enabled has length 2, expected 4"),
    ],
)
def test_refuses_parameters_that_do_not_fit_each_other(env_id, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        with_params(get_task(env_id), **changes)
    assert env_id in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta2": -0.1}, "beta2: got -0.1, expected >= 0"),
        ({"alpha_slip": -1.0}, "alpha_slip: got -1"),
        ({"lambda_perp": -1e-9}, "lambda_perp: "),
        ({"beta3": math.nan}, "beta3: got nan, expected a finite number >= 0"),
        ({"tau": 0.0}, "tau: got 0.0, expected > 0"),
        ({"d_push": -0.1}, "d_push: "),
        ({"h_lift": 0.0}, "h_lift: "),
        ({"d_place": math.inf}, "d_place: got inf, expected a finite number > 0"),
        ({"stable_steps": 0}, "stable_steps: got 0, expected >= 1"),
        ({"stable_steps": 1.5}, "stable_steps: got 1.5"),
        ({"path": "spline"}, r"path: got 'spline', expected one of \('nearest', 'time'\)"),
        ({"up_axis": 3}, "up_axis: got 3"),
    ],
)
@pytest.mark.parametrize("env_id", ["StackCube-v1", "PushCube-v1", "LiftPegUpright-v1"])
def test_refuses_bad_parameters_whether_the_family_uses_them_or_not(env_id, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        with_params(get_task(env_id), **changes)


@pytest.mark.parametrize(
    "env_id, changes",
    [
        ("StackCube-v1", {"beta3": 1 - SIGMOID_1, "beta4": 1 - SIGMOID_1}),  # Exactly 1.
        ("StackCube-v1", {"beta1": 0.5 + 5e-7}),  # Within the slack of 1e-6.
        ("PushCube-v1", {"beta2": 5.0, "beta3": 1.0, "d_trans": 9.0, "stable_steps": 1}),  # Other families' fields.
        ("LiftPegUpright-v1", {"beta4": 1.0, "tau": 0.1, "d_push": 9.0}),
        ("PushCube-v1", {"enabled": (False,) * 4, "delta_goal": 0.02, "d_push": 0.3}),
    ],
)
def test_accepts_good_parameters(env_id, changes):
    assert dataclasses.replace(get_task(env_id).params, **changes) == with_params(get_task(env_id), **changes).params


def test_lengths_are_checked():
    spec = get_task("PushCube-v1")
    with pytest.raises(ValueError, match="cost_fns has length 3, expected 4, one for each of reach, contact"):
        dataclasses.replace(spec, cost_fns=spec.cost_fns[:3])
    with pytest.raises(ValueError, match="distance_fns has length 5, expected 4"):
        dataclasses.replace(spec, distance_fns=(*spec.distance_fns, spec.distance_fns[0]))
    with pytest.raises(ValueError, match="stage_names is empty"):
        dataclasses.replace(spec, stage_names=())


def test_enabled_may_be_a_list():
    assert StageParams(enabled=[True, False]).enabled == (True, False)
