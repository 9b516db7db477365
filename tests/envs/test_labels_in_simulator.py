"""Stage labels of real rollouts, checked against what the simulator itself says at every state."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from witness import watch

from stare_jax.envs.experts.base import execution_noise
from stare_jax.envs.maniskill.scenes import SCENES
from stare_jax.envs.seeds import DEMO_SEEDS
from stare_jax.envs.tasks import make_expert
from stare_jax.stages import TASKS, get_task, potentials, separate, stage_costs

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning"),
]

PUSH_TASKS = ("PushCube-v1", "PullCube-v1")
PICK_PLACE_TASKS = tuple(env_id for env_id in TASKS if get_task(env_id).family == "pick-place")
OFFICIAL, OTHER = 0, DEMO_SEEDS + 99_000_000
MAX_STATES = 80
MAX_COST = 0.5
"""bound of the cost of a stage whose cost is a distance: all that happens, happens within decimetres"""
AFTERWARDS = 12
"""actions after success, in which an expert that still holds the object lets go of it and retreats"""


def is_reached(seen):
    return seen.is_touched or seen.reach_distance < 0.05


# Terminal events in the simulator's own words, with the thresholds of the design.
EVENTS = {
    "pick-place": (
        is_reached,
        lambda seen: seen.is_grasping and seen.height > 0.02,
        lambda seen: seen.goal_distance < 0.05,
        lambda seen: seen.success,
    ),
    "push-pull": (
        is_reached,
        lambda seen: seen.is_touched,
        lambda seen: seen.goal_distance < 0.13,
        lambda seen: seen.success,
    ),
    "lift-upright": (
        is_reached,
        lambda seen: seen.is_grasping,
        lambda seen: seen.height > 0.05,
        lambda seen: seen.success,
    ),
}


# ---- Policies: env_id -> act(signals, step) -> action, or None at the end --------------------------------------------


def expert_policy(env_id, num_steps, change=lambda signals, action: action):
    """The expert for a number of steps, with its actions changed."""
    expert, memory = make_expert(env_id), None

    def act(signals, step):
        nonlocal memory
        if step == num_steps:
            return None
        action, memory = expert.act(signals, memory if step else expert.init())
        return change(signals, action)

    return act


def succeeding(env_id):
    """The expert, and what it does after success."""
    num_afterwards = 0

    def stop(signals, action):
        nonlocal num_afterwards
        num_afterwards += bool(signals.success or num_afterwards)
        return action if num_afterwards <= AFTERWARDS else None

    return expert_policy(env_id, MAX_STATES - 1, stop)


def stumbling(env_id):
    """The expert with large execution noise."""
    perturb = execution_noise([0], [0.4], make_expert(env_id).action_scale)
    is_first = iter([np.ones(1, bool)])

    def stumble(signals, action):
        return perturb(action[None], next(is_first, np.zeros(1, bool)))[0]

    return expert_policy(env_id, 25, stumble)


def dropping(env_id):
    """The expert, which stops and opens its gripper for good once it holds the object 2 cm up, where the grasp ends.

    A tool that opened further on its way would throw the object to the goal.
    """
    is_dropped = False

    def open_up(signals, action):
        nonlocal is_dropped
        is_dropped |= bool(signals.is_grasped) and signals.obj_pos[2] - signals.support_z > 0.02
        return np.array([0, 0, 0, 0, 0, 0, 1], np.float32) if is_dropped else action

    return expert_policy(env_id, 25, open_up)


def giving_up(env_id):
    """The expert, which leaves the object for good once it has touched it."""
    has_touched = False

    def leave(signals, action):
        nonlocal has_touched
        has_touched |= bool(signals.is_contact)
        upwards = 0.5 * SCENES[env_id].action_scale[2]
        return np.array([0, 0, upwards, 0, 0, 0, -1], np.float32) if has_touched else action

    return expert_policy(env_id, 25, leave)


def ramming(env_id):
    """The expert, which strikes at full speed once it is in line with the cube."""
    side = -1 if env_id == "PushCube-v1" else 1

    def strike(signals, action):
        behind, aside, above = signals.tcp_pos - signals.obj_pos
        is_in_line = 0.05 < side * behind < 0.11 and abs(aside) < 0.015 and abs(above) < 0.02
        return np.array([-side, 0, 0, 0, 0, 0, -1], np.float32) if is_in_line else action

    return expert_policy(env_id, 20, strike)


def wandering(env_id):
    """Random actions."""
    rng, scale = np.random.default_rng(0), SCENES[env_id].action_scale
    return lambda signals, step: None if step == 20 else (scale * rng.uniform(-1, 1, 7)).astype(np.float32)


def waiting(env_id):
    return lambda signals, step: None if step == 10 else np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


# ---- Labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout(simulators, request):
    """Returns a function (env_id, policy, seed) -> (signals, testimonies), which runs each episode once."""

    @functools.cache
    def run(env_id, policy, seed=OFFICIAL):
        if SCENES[env_id].num_starts:
            request.getfixturevalue("widowx_assets")
        return watch(simulators(env_id), seed, policy(env_id))

    return run


@functools.partial(jax.jit, static_argnums=0)
def _annotate(task, signals, valid):
    separation = separate(task, signals, valid)
    return separation, stage_costs(task, signals, separation, valid), potentials(task, signals, separation)


def annotate(env_id, signals):
    """Returns (labels [T], completed [K]), after a look at costs and potentials."""
    task = dataclasses.replace(get_task(env_id), env_id="", instruction="")  # compiled once a family
    padded = signals + [signals[-1]] * (MAX_STATES - len(signals))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
    result = _annotate(task, stacked, np.arange(MAX_STATES) < len(signals))
    separation, costs, potential_t = jax.device_get(result)
    bounds = [np.pi / 2 if name == "upright" else MAX_COST for name in task.stage_names]
    assert np.isfinite(costs).all() and (costs >= 0).all() and (costs <= bounds).all(), costs
    assert (potential_t >= 0).all() and (potential_t <= 1).all()
    return separation.stage_t[: len(signals)], separation.completed


def until_success(signals, testimonies):
    end = 1 + [seen.success for seen in testimonies].index(True)
    return signals[:end], testimonies[:end]


def checked_labels(env_id, signals, testimonies):
    """Returns the labels, after checking that each stage ends in the first state in which its event holds."""
    labels, completed = annotate(env_id, signals)
    events, last = EVENTS[get_task(env_id).family], 0
    for step, (label, seen) in enumerate(zip(labels, testimonies, strict=True)):
        assert label >= last, (step, labels)
        for stage in range(last, label):
            assert events[stage](seen) or seen.success, (step, stage, labels, seen)
        assert (label == 3 and seen.success) or not events[label](seen), (step, labels, seen)
        last = label
    np.testing.assert_array_equal(completed, [*(np.arange(3) < last), testimonies[-1].success])
    return labels


@pytest.mark.parametrize("seed", [OFFICIAL, OTHER])
@pytest.mark.parametrize("env_id", TASKS)
def test_experts_act_in_every_stage_and_stages_end_where_their_events_are(env_id, seed, rollout):
    signals, testimonies = rollout(env_id, succeeding, seed)
    labels = checked_labels(env_id, *until_success(signals, testimonies))
    assert set(labels[:-1]) == {0, 1, 2, 3}  # of the states in which an action was taken
    # The simulator is asked for success only near the goal: it has none to give elsewhere.
    assert [bool(each.success) for each in signals] == [seen.success for seen in testimonies]


CONSTANT_POTENTIALS = {"push-pull": {"contact", "goal"}, "lift-upright": {"grasp"}, "pick-place": set()}
"""Stages whose potential is the same in all states in which it is used, by the paper's own formulas."""


@pytest.mark.parametrize("env_id", TASKS)
def test_each_stage_s_potential_grades_the_states_of_the_expert(env_id, rollout):
    """Every potential takes several values on the expert's way through its stage, but for the known exceptions."""
    task = get_task(env_id)
    task = dataclasses.replace(task, params=dataclasses.replace(task.params, progressive=False))
    signals, _ = until_success(*rollout(env_id, succeeding))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *signals)
    separation = separate(task, stacked)
    potential_t, stage_t = np.asarray(potentials(task, stacked, separation)), np.asarray(separation.stage_t)
    constant = {name for k, name in enumerate(task.stage_names) if len(np.unique(potential_t[stage_t == k])) == 1}
    assert constant == CONSTANT_POTENTIALS[task.family]


@pytest.mark.parametrize("policy", [succeeding, stumbling, giving_up])
@pytest.mark.parametrize("env_id", TASKS)
def test_contact_is_in_the_steps_in_which_the_robot_touches_the_object(env_id, policy, rollout):
    num_touched, num_noticed, every = 0, 0, SCENES[env_id].contact_every
    for seed in (OFFICIAL, OTHER) if policy is succeeding or every > 1 else (OFFICIAL, OTHER, OTHER + 1):
        signals, testimonies = rollout(env_id, policy, seed)
        touched = np.array([seen.is_touched for seen in testimonies])
        noticed = np.array([bool(each.is_contact) for each in signals])
        assert not (noticed & ~touched).any()
        assert noticed[[seen.num_touching >= every or seen.end_force > 1e-2 for seen in testimonies]].all()
        num_touched, num_noticed = num_touched + touched.sum(), num_noticed + noticed.sum()
    assert num_touched >= 3
    assert num_noticed >= 0.9 * num_touched  # shorter touches, too, where not all sub-steps are looked at


@pytest.mark.parametrize("env_id", PUSH_TASKS)
def test_a_cube_that_is_knocked_away_has_been_touched(env_id, rollout):
    """At full speed: at the end of the step it is out of the tool's reach, and nothing presses on it."""
    signals, testimonies = rollout(env_id, ramming)
    touched = [step for step, seen in enumerate(testimonies) if seen.is_touched]
    assert any(testimonies[step].end_force == 0.0 for step in touched)
    assert all(signals[step].is_contact for step in touched)
    assert checked_labels(env_id, signals, testimonies)[touched[0]] >= 2


def test_an_object_that_rolls_by_itself_is_not_touched(rollout):
    signals, testimonies = rollout("PutCarrotOnPlateInScene-v1", waiting, OTHER)
    assert max(seen.moved for seen in testimonies) > 2e-3
    assert not any(seen.is_touched for seen in testimonies)
    assert not any(each.is_contact for each in signals)


# ---- Goals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", PICK_PLACE_TASKS)
def test_the_goal_is_where_a_placed_object_rests(env_id, rollout):
    signals, testimonies = rollout(env_id, succeeding)
    last = testimonies[-1]
    assert last.success and not last.is_grasping
    # An eggplant sinks 2 cm into the basket, and rolls there.
    assert np.linalg.norm(last.obj_pos - signals[-1].goal_pos) < (0.035 if "Eggplant" in env_id else 0.02)


@pytest.mark.parametrize("env_id", PUSH_TASKS)
def test_the_goal_of_a_cube_is_the_centre_of_the_region(env_id, rollout):
    signals, testimonies = rollout(env_id, succeeding)
    for each, seen in zip(signals, testimonies, strict=True):
        np.testing.assert_allclose(each.goal_pos, [*seen.base_pos[:2], testimonies[0].obj_pos[2]], atol=1e-6)
    assert testimonies[-1].goal_distance < 0.1


def test_the_goal_of_the_peg_is_upright_on_the_table(rollout):
    signals, testimonies = until_success(*rollout("LiftPegUpright-v1", succeeding))
    goal, last = signals[-1], testimonies[-1]
    assert abs(last.obj_pos[2] - goal.goal_pos[2]) < 0.005
    assert last.tilt < 0.08
    w, x, y, z = goal.goal_quat
    np.testing.assert_allclose(2 * (x * z - w * y), 1, atol=1e-6)  # vertical part of the x axis


# ---- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", TASKS)
def test_random_actions(env_id, rollout):
    signals, testimonies = rollout(env_id, wandering)
    checked_labels(env_id, signals, testimonies)
    assert not any(seen.success for seen in testimonies)


@pytest.mark.parametrize("env_id", TASKS)
def test_a_disturbed_expert(env_id, rollout):
    signals, testimonies = rollout(env_id, stumbling)
    if any(seen.success for seen in testimonies):
        signals, testimonies = until_success(signals, testimonies)
    assert checked_labels(env_id, signals, testimonies)[-1] >= 1


@pytest.mark.parametrize("env_id", (*PICK_PLACE_TASKS, "LiftPegUpright-v1"))
def test_a_dropped_object_leaves_the_episode_in_the_third_stage(env_id, rollout):
    signals, testimonies = rollout(env_id, dropping)
    assert checked_labels(env_id, signals, testimonies)[-1] == 2
    assert testimonies[-1].height < 0.01 and not testimonies[-1].is_grasping


@pytest.mark.parametrize("env_id", PUSH_TASKS)
def test_a_push_that_is_given_up_leaves_the_episode_in_the_third_stage(env_id, rollout):
    assert checked_labels(env_id, *rollout(env_id, giving_up))[-1] == 2
