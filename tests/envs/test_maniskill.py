import contextlib

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from plain_maniskill import Touches, assert_signals_are_those_of_torch, physics_of

from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill.building import import_mani_skill, materials_without_device
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.envs.state import low_dim_state
from stare_jax.envs.tasks import make_expert
from stare_jax.stages.geometry import body_axis

FRANKA_TASKS = ("PushCube-v1", "PullCube-v1", "StackCube-v1", "LiftPegUpright-v1")

# ManiSkill calls np.isnan on a torch tensor, and Logger.warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
]


def plain_env(env_id, **kwargs):
    """The environment as everybody makes it, wrappers and all."""
    import_mani_skill()
    kwargs = {"obs_mode": "state", "render_backend": "none", "control_mode": "pd_ee_delta_pose"} | kwargs
    materials = materials_without_device if kwargs["render_backend"] == "none" else contextlib.nullcontext
    with materials():
        return gymnasium.make(env_id, num_envs=1, robot_uids="panda", sim_backend="physx_cpu", **kwargs)


def plain_reset(env, seed):
    with materials_without_device():
        return env.reset(seed=seed, options={"reconfigure": True})


@pytest.mark.parametrize("env_id", FRANKA_TASKS)
def test_states_and_signals_are_bitwise_those_of_plain_maniskill(env_id, simulators):
    simulator, plain = simulators(env_id), plain_env(env_id)
    rng = np.random.default_rng(0)
    expert = make_expert(env_id)
    memory = expert.init()
    signals = simulator.reset(5, reproducible=True).signals
    plain_reset(plain, 5)
    touches, seen = Touches(plain), set()
    for step in range(45):
        action, memory = expert.act(signals, memory)
        if step >= 30:  # Beyond every limit: clipped rotations, and commands that the inverse kinematics cannot follow.
            action = rng.uniform(-1.5, 1.5, 7).astype(np.float32)
        action.flags.writeable = False  # As arrays from JAX are.
        signals = simulator.step(action).signals
        info = plain.step(action)[-1]
        np.testing.assert_array_equal(physics_of(simulator.env), physics_of(plain), err_msg=f"step {step}")
        assert_signals_are_those_of_torch(signals, touches, plain, info)
        seen |= {name for name in ("is_grasped", "is_contact", "success") if getattr(signals, name)}
    assert {"is_contact", "success"} <= seen
    assert "is_grasped" in seen or env_id in ("PushCube-v1", "PullCube-v1")
    plain.close()


def test_other_control_modes_go_through_maniskill_itself():
    simulator = Simulator(EnvConfig(image_size=0, control_mode="pd_joint_delta_pos"))
    plain = plain_env("PushCube-v1", control_mode="pd_joint_delta_pos")
    simulator.reset(1, reproducible=True)
    plain_reset(plain, 1)
    for action in np.random.default_rng(0).uniform(-1, 1, (10, 8)).astype(np.float32):
        simulator.step(action)
        plain.step(action)
    np.testing.assert_array_equal(physics_of(simulator.env), physics_of(plain))
    simulator.close()
    plain.close()


def rollout(simulator, seed, actions):
    frames = [simulator.reset(seed, reproducible=True)] + [simulator.step(action) for action in actions]
    return np.stack([np.concatenate([np.ravel(value) for value in frame.signals]) for frame in frames])


def test_reproducible_resets_give_equal_episodes_whatever_came_before(simulators):
    simulator = simulators("PushCube-v1")
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 20, 7)).astype(np.float32)
    first = rollout(simulator, 3, actions[0])
    rollout(simulator, 4, actions[1])
    simulator.reset(5)
    np.testing.assert_array_equal(rollout(simulator, 3, actions[0]), first)


def test_first_state_of_push_cube(simulators):
    state, signals = simulators("PushCube-v1").reset(0)[1:]
    np.testing.assert_array_equal(state, signals.tcp_pos)
    np.testing.assert_allclose(signals.goal_pos, signals.obj_pos + [0.2, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(signals.goal_quat, signals.obj_quat)
    np.testing.assert_array_equal(signals.grasp_pos, signals.obj_pos)
    assert signals.support_z == np.float32(0.02)
    assert not (signals.is_contact or signals.is_grasped or signals.success)
    for value in signals:
        assert np.asarray(value).dtype in (np.float32, np.bool_)


def test_goals_of_the_other_tasks(simulators):
    stack = simulators("StackCube-v1")
    signals = stack.reset(0).signals
    support = stack.env.cubeB.pose.p[0].numpy()
    np.testing.assert_allclose(signals.goal_pos, support + [0, 0, 0.04], atol=1e-6)

    lift = simulators("LiftPegUpright-v1")
    signals = lift.reset(0).signals
    np.testing.assert_allclose(signals.goal_pos, [*signals.obj_pos[:2], 0.12], atol=1e-6)
    w, x, y, z = signals.goal_quat
    np.testing.assert_allclose([2 * (x * z - w * y), np.linalg.norm(signals.goal_quat)], [1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("env_id", "PushCube-v9", "env_id: got 'PushCube-v9', expected one of"),
        ("num_workers", 0, "num_workers: got 0, expected >= 1"),
        (
            "num_groups",
            3,
            "num_groups: got 3, expected a divisor of num_workers = 2, with one process or",
        ),
        ("envs_per_worker", 0, "envs_per_worker: got 0, expected >= 1"),
        ("horizon", 0, "horizon: got 0"),
        ("image_size", -1, "image_size: got -1"),
        ("use_state", "all", "use_state: got 'all'"),
        ("control_mode", "pd_magic", "control_mode: got 'pd_magic'"),
        ("worker_timeout_s", 0.0, "worker_timeout_s: got 0.0"),
        ("max_restarts", -1, "max_restarts: got -1"),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(**{field: value})


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_bad_actions_are_refused(action, simulators):
    with pytest.raises(ValueError, match="action: got .* expected 7 finite numbers"):
        simulators("PushCube-v1").step(action)


def test_low_dim_state_tells_where_everything_is(simulators):
    config = EnvConfig("StackCube-v1", image_size=None, use_state="low_dim")
    simulator = Simulator(config)
    opened, closed = (np.array([0.5, -0.5, 0, 0, 0, 0, gripper], np.float32) for gripper in (1, -1))
    simulator.reset(3)
    for action in (opened, closed):
        for _ in range(4):
            state, signals = simulator.step(action)[1:]
        assert state.shape == (config.state_dim,) and state.dtype == np.float32
        tcp, obj = state[:3], state[10:13]
        np.testing.assert_array_equal(tcp, signals.tcp_pos)
        np.testing.assert_allclose(tcp + state[22:25], obj, atol=1e-6)
        np.testing.assert_allclose(obj + state[25:28], state[19:22], atol=1e-6)
        for columns, quat in ((state[3:9], signals.tcp_quat), (state[13:19], signals.obj_quat)):
            expected = [body_axis(jnp.asarray(quat), axis) for axis in (0, 1)]
            np.testing.assert_allclose(columns.reshape(2, 3), expected, atol=1e-5)
        assert (state[9] > 0.07) == (action is opened) and 0 <= state[9] <= 0.081
        assert state[28] == signals.is_grasped
    simulator.close()


def test_the_low_dim_state_does_not_jump_where_a_quaternion_changes_its_sign(simulators):
    signals = simulators("PushCube-v1").reset(0).signals
    halves = [np.array([w, 0.0, 1.0, 0.0], np.float32) for w in (1e-4, -1e-4)]
    first, second = (low_dim_state(signals._replace(tcp_quat=q, obj_quat=q), 0.04) for q in (*halves,))
    np.testing.assert_allclose(first, second, atol=1e-3)
    np.testing.assert_array_equal(
        first, low_dim_state(signals._replace(tcp_quat=-halves[0], obj_quat=-halves[0]), 0.04)
    )


# ---- Images ----------------------------------------------------------------------------------------------------------


def test_images_of_the_stock_robot_are_those_of_plain_maniskill(rendering_simulator):
    rendering_simulator.reset(0)  # Keeps SAPIEN's renderer alive for all the tests.
    simulator = Simulator(EnvConfig(image_size=64, lite_robot=False))
    cameras = {"width": 64, "height": 64, "shader_pack": "minimal"}
    plain = plain_env("PushCube-v1", obs_mode="rgb", render_backend="cpu", sensor_configs=cameras)
    image = simulator.reset(7, reproducible=True).image
    observation, _ = plain.reset(seed=7, options={"reconfigure": True})
    for _ in range(2):
        np.testing.assert_array_equal(image, observation["sensor_data"]["base_camera"]["rgb"][0].numpy())
        action = np.full(7, 0.5, np.float32)
        image, observation = simulator.step(action).image, plain.step(action)[0]
    simulator.close()
    plain.close()


def test_lite_visuals_change_few_pixels_and_no_physics(rendering_simulator, simulators):
    stock = Simulator(EnvConfig(image_size=64, lite_robot=False))
    lite_image, stock_image = (each.reset(7).image.astype(int) for each in (rendering_simulator, stock))
    stock.close()
    difference = np.abs(lite_image - stock_image)
    assert 0 < difference.mean() < 3
    assert (difference.max(axis=-1) > 30).mean() < 0.02

    actions = np.random.default_rng(2).uniform(-1, 1, (15, 7)).astype(np.float32)
    np.testing.assert_array_equal(
        rollout(rendering_simulator, 9, actions), rollout(simulators("PushCube-v1"), 9, actions)
    )


def test_cube_and_goal_can_be_seen(rendering_simulator):
    image = rendering_simulator.reset(3).image
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    is_cube = (blue > red + 30) & (blue > green + 30)
    is_ring = (red > 150) & (green < 110) & (abs(green - blue) < 40)
    assert 3 <= is_cube.sum() <= 60
    assert is_ring.sum() >= 20
    # The goal is further from the robot, which the camera sees from the front: lower in the image.
    assert np.argwhere(is_ring)[:, 0].mean() > np.argwhere(is_cube)[:, 0].mean()
