"""The toys of all families: experts, stages and environments alike, and the mechanics of the two with a gripper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.envs.toys import TOYS, ToyEnv, lift, place
from stare_jax.envs.toys.gripper import CLOSING_SPEED, HOLDING_OPENING, Gripper
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes
from stare_jax.stages import separate

SMALL_STEP = 0.008
OPEN, CLOSE = 1.0, -1.0


def collect(toy, choose, *, num_episodes=256, stop_at_success=True, max_step=None):
    def act(observation, signals, instructions, is_first):
        return Decision(choose(signals)), observation

    env = ToyEnv(toy._replace(max_step=max_step or toy.max_step), 64)
    return collect_episodes(env, act, np.arange(num_episodes), stop_at_success=stop_at_success).trajectory


def success_rate(trajectory):
    return (trajectory.signals.success & trajectory.valid).any(axis=1).mean()


def labels(toy, trajectory):
    return jax.jit(jax.vmap(lambda s, v: separate(toy.spec, s, v)))(trajectory.signals, trajectory.valid)


# ---- What all toys have in common -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("max_step", [None, SMALL_STEP])
def test_the_expert_succeeds_and_passes_through_the_stages_in_order(name, max_step):
    toy = TOYS[name]
    size = {"max_step": max_step or toy.max_step}
    trajectory = collect(toy, lambda signals: toy.expert(signals, **size), num_episodes=512, max_step=max_step)
    assert success_rate(trajectory) >= 0.95
    separation = labels(toy, trajectory)
    steps = np.diff(np.where(trajectory.valid, separation.stage_t, toy.spec.num_stages - 1), axis=1)
    assert (steps >= 0).all()
    entered = np.asarray(separation.entered_at) < trajectory.valid.shape[1]
    # Steps of the push are so long that a stage may begin and end in one.
    assert entered.mean(axis=0).min() > (0.2 if name == "push" else 0.99)


@pytest.mark.parametrize("name", TOYS)
def test_the_expert_recovers_from_disturbances(name):
    toy, rng = TOYS[name], np.random.default_rng(0)

    def disturbed(signals):
        action = toy.expert(signals, max_step=toy.max_step)
        return np.clip(action + rng.normal(0, 0.3, action.shape), -1, 1).astype(np.float32)

    assert success_rate(collect(toy, disturbed)) >= 0.9


@pytest.mark.parametrize("name", TOYS)
def test_chance_rarely_succeeds(name):
    toy, rng = TOYS[name], np.random.default_rng(0)

    def chance(signals):
        return rng.uniform(-1, 1, (64, toy.action_dim)).astype(np.float32)

    assert success_rate(collect(toy, chance, num_episodes=512)) < 0.05


@pytest.mark.parametrize("name", ["place", "lift"])
def test_the_expert_stays_successful(name):
    toy = TOYS[name]
    trajectory = collect(toy, lambda s: toy.expert(s, max_step=toy.max_step), stop_at_success=False)
    assert trajectory.signals.success[:, -1].mean() >= 0.95


@pytest.mark.parametrize("name", TOYS)
def test_compiled_and_eager_steps_agree_and_numpy_and_jax_experts(name):
    toy = TOYS[name]
    state = toy.reset(jnp.uint32(3))
    compiled = jax.jit(lambda state, action: toy.step(state, action, max_step=toy.max_step))
    for _ in range(toy.horizon):
        observed, signals = toy.observe(state)
        assert observed.shape == (toy.state_dim,) and observed.dtype == jnp.float32
        batch = jax.tree.map(lambda x: x[None], signals)
        action = toy.expert(batch, max_step=toy.max_step)
        on_host = toy.expert(jax.device_get(batch), max_step=toy.max_step)
        assert isinstance(on_host, np.ndarray) and on_host.dtype == np.float32
        np.testing.assert_allclose(action, on_host, atol=1e-5)
        eager = toy.step(state, action[0], max_step=toy.max_step)
        state = compiled(state, action[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, eager)
    assert toy.observe(state)[1].success or name == "push"


@pytest.mark.parametrize("name", TOYS)
def test_episodes_depend_on_their_seed_alone(name):
    toy = TOYS[name]
    env, other = ToyEnv(toy, 3), ToyEnv(toy, 2)
    first = env.reset([5, 6, 7]).observation.state
    np.testing.assert_allclose(other.reset([7, 5]).observation.state, first[[2, 0]], rtol=1e-5, atol=1e-7)
    after = env.step(np.ones((3, toy.action_dim), np.float32), {1: 9}).observation.state
    np.testing.assert_allclose(after[1], other.reset([9, 9]).observation.state[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after[[0, 2], 0], first[[0, 2], 0] + toy.max_step, rtol=1e-4)
    # Every observed number is within the range that normalisation maps to [-1, 1].
    assert (first >= toy.norm_stats.state_q01).all() and (first <= toy.norm_stats.state_q99).all()


# ---- The gripper and the block --------------------------------------------------------------------------------------
def gripper(position, opening=1.0, is_holding=False):
    return Gripper(jnp.array(position, jnp.float32), jnp.float32(opening), jnp.array(is_holding))


def placing(position, block, goal_x=0.1, **fingers):
    return place.PlaceState(gripper(position, **fingers), jnp.array(block, jnp.float32), jnp.float32(goal_x))


def step(toy, state, *action):
    return toy.TOY.step(state, jnp.array(action, jnp.float32), max_step=toy.MAX_STEP)


FLOOR = place.BLOCK_RADIUS
ON_STAND = place.BLOCK_RADIUS + place.STAND_HEIGHT


def test_fingers_hold_a_block_that_they_close_on_and_carry_it():
    state = placing((0.0, FLOOR), (0.005, FLOOR))
    state = step(place, state, 0, 0, CLOSE)
    assert not state.gripper.is_holding and np.isclose(state.gripper.opening, 1 - CLOSING_SPEED)
    state = step(place, state, 0, 0, CLOSE)
    assert state.gripper.is_holding and state.gripper.opening < HOLDING_OPENING
    state = step(place, state, -0.5, 1, CLOSE)
    np.testing.assert_allclose(state.block, [0.005 - 0.5 * place.MAX_STEP, FLOOR + place.MAX_STEP], rtol=1e-5)
    np.testing.assert_allclose(state.gripper.position, [-0.5 * place.MAX_STEP, FLOOR + place.MAX_STEP], rtol=1e-5)
    observed, signals = place.observe_state(state)
    assert signals.is_grasped and not signals.success
    np.testing.assert_allclose(observed[:4], [*state.gripper.position, state.gripper.opening, 1.0])


def test_fingers_that_close_beside_the_block_hold_nothing_and_do_not_enter_it_closed():
    beside = 2 * place.BLOCK_RADIUS
    state = placing((beside, FLOOR), (0.0, FLOOR))
    for _ in range(3):
        state = step(place, state, 0, 0, CLOSE)
    assert not state.gripper.is_holding
    for _ in range(4):
        state = step(place, state, -1, 0, CLOSE)
    assert np.linalg.norm(state.gripper.position - state.block) >= place.BLOCK_RADIUS
    np.testing.assert_allclose(state.block, [0.0, FLOOR])
    for action in ((0, 0, OPEN), (0, 0, OPEN), (-1, 0, OPEN), (0, 0, CLOSE), (0, 0, CLOSE)):
        state = step(place, state, *action)
    assert state.gripper.is_holding


def test_a_held_block_passes_neither_floor_nor_stand():
    state = placing((0.06, FLOOR), (0.06, FLOOR), opening=0.0, is_holding=True)
    below = step(place, state, 0, -1, CLOSE)
    np.testing.assert_allclose(below.block, [0.06, FLOOR])
    np.testing.assert_allclose(below.gripper.position, [0.06, FLOOR])
    # The stand begins at 0.07: from the floor the block does not get there, from above it does.
    np.testing.assert_allclose(step(place, state, 1, 0, CLOSE).block, [0.06, FLOOR])
    above = placing((0.06, ON_STAND), (0.06, ON_STAND), opening=0.0, is_holding=True)
    over = step(place, above, 1, -0.1, CLOSE)
    np.testing.assert_allclose(over.block, [0.06, ON_STAND - 0.1 * place.MAX_STEP], rtol=1e-5)
    over = step(place, above, 1, 0, CLOSE)
    np.testing.assert_allclose(over.block, [0.06 + place.MAX_STEP, ON_STAND], rtol=1e-5)
    np.testing.assert_allclose(step(place, over, 0, -1, CLOSE).block, over.block)


@pytest.mark.parametrize(
    ("x", "height", "succeeds"), [(0.09, ON_STAND, True), (0.075, ON_STAND, False), (0.0, FLOOR, False)]
)
def test_a_block_that_is_let_go_drops_onto_what_is_below(x, height, succeeds):
    state = placing((x, 0.08), (x, 0.08), opening=0.4, is_holding=True)
    assert not place.observe_state(state)[1].success
    state = step(place, state, 0, 0, OPEN)
    np.testing.assert_allclose(state.block, [x, height], rtol=1e-6)
    assert not state.gripper.is_holding
    assert bool(place.observe_state(state)[1].success) == succeeds


# ---- The peg --------------------------------------------------------------------------------------------------------
def lifting(position, peg, angle=0.0, **fingers):
    return lift.LiftState(
        gripper(position, **fingers), jnp.array(peg, jnp.float32), jnp.float32(angle), jnp.float32(0.0)
    )


LOW = lift.PEG_RADIUS
STANDING = lift.PEG_RADIUS + lift.PEG_HALF_LENGTH


@pytest.mark.parametrize(("x", "holds"), [(0.0, True), (lift.PEG_HALF_LENGTH, True), (0.07, False)])
def test_fingers_hold_the_peg_anywhere_along_its_length(x, holds):
    state = lifting((x, LOW), (0.0, LOW))
    for _ in range(2):
        state = step(lift, state, 0, 0, 0, CLOSE)
    assert bool(state.gripper.is_holding) == holds


def test_a_held_peg_turns_about_the_gripper_and_keeps_its_distance():
    end = lift.PEG_HALF_LENGTH
    state = lifting((-end, 0.1), (0.0, 0.1), opening=0.0, is_holding=True)
    state = step(lift, state, 0, 0, 1, CLOSE)
    np.testing.assert_allclose(state.angle, lift.MAX_TURN, rtol=1e-6)
    np.testing.assert_allclose(state.gripper.position, [-end, 0.1], rtol=1e-6)
    expected = [end * np.cos(lift.MAX_TURN) - end, 0.1 + end * np.sin(lift.MAX_TURN)]
    np.testing.assert_allclose(state.peg, expected, rtol=1e-5)
    axis = [np.cos(lift.MAX_TURN), 0.0, np.sin(lift.MAX_TURN)]
    signals = lift.observe_state(state)[1]
    w, _, y, _ = signals.obj_quat
    np.testing.assert_allclose([1 - 2 * y * y, 0.0, -2 * w * y], axis, atol=1e-6)
    np.testing.assert_allclose(signals.grasp_pos, [-end, 0.0, 0.1], atol=1e-6)


def test_the_floor_raises_a_peg_that_turns_on_it():
    state = lifting((0.0, LOW), (0.0, LOW), opening=0.0, is_holding=True)
    for _ in range(6):
        state = step(lift, state, 0, -1, 1, CLOSE)
        lowest = state.peg[1] - lift.PEG_HALF_LENGTH * np.abs(np.sin(state.angle))
        assert lowest >= LOW - 1e-6
        np.testing.assert_allclose(state.gripper.position, state.peg, atol=1e-6)
    assert lift.observe_state(state)[1].success  # 1.5 rad, its lower end on the floor


@pytest.mark.parametrize(("angle", "stands"), [(np.pi / 2 - 0.05, True), (-np.pi / 2, True), (np.pi / 2 - 0.2, False)])
def test_a_peg_that_is_let_go_stands_or_falls_flat(angle, stands):
    state = lifting((0.0, 0.1), (0.0, 0.1), angle, opening=0.4, is_holding=True)
    assert not lift.observe_state(state)[1].success  # upright, but in the air
    state = step(lift, state, 0, 0, 0, OPEN)
    np.testing.assert_allclose(state.peg, [0.0, STANDING if stands else LOW], atol=1e-4)
    assert bool(lift.observe_state(state)[1].success) == stands
