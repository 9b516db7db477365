import dataclasses

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from plain_maniskill import Touches, assert_signals_are_those_of_torch, physics_of

from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill import building
from stare_jax.envs.maniskill.building import import_mani_skill, materials_without_device, require_assets
from stare_jax.envs.maniskill.scenes import SCENES
from stare_jax.envs.maniskill.shrinking import shrink
from stare_jax.envs.maniskill.simulator import Simulator, executed_action
from stare_jax.envs.maniskill.widowx import bridge_scene, scaled_intrinsics
from stare_jax.envs.seeds import DEMO_SEEDS
from stare_jax.envs.tasks import make_expert
from stare_jax.models.preprocess import resize_with_pad
from stare_jax.stages import get_task

WIDOWX_TASKS = tuple(env_id for env_id, scene in SCENES.items() if scene.num_starts)
CUBES, EGGPLANT = "StackGreenCubeOnYellowCubeBakedTexInScene-v1", "PutEggplantInBasketScene-v1"

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning"),
]
needs_assets = pytest.mark.usefixtures("widowx_assets")


def plain_env(env_id):
    """ManiSkill's own environment, without images."""
    import_mani_skill()
    with materials_without_device(), bridge_scene():
        return gymnasium.make(env_id, num_envs=1, obs_mode="none", sim_backend="physx_cpu", render_backend="none")


def plain_reset(env, episode):
    with materials_without_device(), bridge_scene():
        env.reset(seed=0, options={"reconfigure": True, "episode_id": torch.tensor([episode])})


@needs_assets
@pytest.mark.parametrize("env_id", WIDOWX_TASKS)
def test_official_episodes_are_bitwise_those_of_plain_maniskill(env_id, simulators):
    simulator, plain, episode = simulators(env_id), plain_env(env_id), 5
    assert SCENES[env_id].num_starts == simulator._starts.num_official
    assert get_task(env_id).instruction == plain.unwrapped.get_language_instruction()[0]
    expert = make_expert(env_id)
    memory, signals = expert.init(), simulator.reset(episode, reproducible=True).signals
    plain_reset(plain, episode)
    touches, seen = Touches(plain), set()
    for step in range(30):
        np.testing.assert_array_equal(physics_of(simulator.env), physics_of(plain), err_msg=f"step {step}")
        action, memory = expert.act(signals, memory)
        signals = simulator.step(action).signals
        info = plain.step(action)[-1]
        assert_signals_are_those_of_torch(signals, touches, plain, info)
        seen |= {name for name in ("is_grasped", "is_contact", "success") if getattr(signals, name)}
    assert seen == {"is_grasped", "is_contact", "success"}
    plain.close()


def start_of(simulator, seed):
    signals = simulator.reset(seed).signals
    return np.concatenate([signals.obj_pos[:2], signals.goal_pos[:2], signals.obj_quat])


@needs_assets
def test_evaluation_goes_through_the_official_starts_and_nothing_else_meets_them(simulators):
    simulator = simulators(CUBES)
    official = np.stack([start_of(simulator, seed) for seed in range(26)])
    assert len(np.unique(official[:24].round(3), axis=0)) == 24
    np.testing.assert_allclose(official[24:], official[:2], atol=1e-4)

    moved = np.stack([start_of(simulator, DEMO_SEEDS + seed) for seed in range(12)])
    np.testing.assert_allclose(start_of(simulator, DEMO_SEEDS), moved[0], atol=1e-4)
    gap = np.abs(moved[:, None, :4] - official[None, :24, :4]).max(axis=-1)
    assert (gap.min(axis=1) < 0.0151).all()  # within the jitter of an official start
    assert (gap.min(axis=1) > 1e-4).all()  # and at none of them
    yaw = 2 * np.arctan2(moved[:, 7], moved[:, 4])
    assert np.abs(np.sin(yaw)).max() <= np.sin(np.deg2rad(15.1)) and np.abs(np.sin(yaw)).min() > 1e-4


@needs_assets
def test_without_jitter_all_episodes_start_at_official_places():
    simulator = Simulator(EnvConfig(CUBES, image_size=0, jitter="none"))
    official = [start_of(simulator, seed) for seed in range(24)]
    start = start_of(simulator, DEMO_SEEDS + 3)
    assert min(np.abs(start - each).max() for each in official) < 1e-4
    simulator.close()


@needs_assets
def test_the_basket_stays_where_the_photograph_shows_it(simulators):
    simulator = simulators(EGGPLANT)
    goals = np.stack([simulator.reset(seed).signals.goal_pos[:2] for seed in (0, DEMO_SEEDS, DEMO_SEEDS + 1)])
    assert np.ptp(goals, axis=0).max() < 1e-3


def test_missing_assets_name_the_command_that_downloads_them(monkeypatch, tmp_path):
    from mani_skill.utils.assets.data import DATA_SOURCES

    monkeypatch.setattr(DATA_SOURCES["bridge_v2_real2sim"], "output_dir", tmp_path)
    with pytest.raises(FileNotFoundError, match="mani_skill.utils.download_asset bridge_v2_real2sim$"):
        Simulator(EnvConfig(CUBES, image_size=0))
    require_assets(())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("jitter", "2m", "jitter: got '2m', expected one of .*15mm-15deg"),
        ("image_width", 0, "image_width: got 0, expected >= 1 or None"),
        ("control_mode", "pd_ee_delta_pose", "control_mode: got 'pd_ee_delta_pose', expected one of .*align2"),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(CUBES, **{field: value})


def test_config_knows_the_task():
    config = EnvConfig(CUBES, image_size=480, image_width=640)
    assert (config.horizon, config.action_dim, config.image_shape) == (60, 7, (480, 640))
    assert EnvConfig(CUBES, horizon=20).horizon == 20
    assert EnvConfig(image_size=None, image_width=640).image_shape == (0, 0)


# ---- Images ----------------------------------------------------------------------------------------------------------


@needs_assets
def test_images_are_those_of_plain_maniskill_whatever_was_built_before(rendering_simulator, simulators):
    """ManiSkill keeps what to show in a list of the class: a second environment shows the first one's objects."""
    from stare_jax.envs.maniskill.batched_widowx import BatchedBackdrop

    rendering_simulator.reset(0)  # Keeps SAPIEN's renderer alive for all the tests.
    first = Simulator(EnvConfig(EGGPLANT, image_size=64))
    simulator = Simulator(EnvConfig(CUBES, image_size=120, image_width=160))
    camera = building.camera_settings(simulator.config)
    plain = gymnasium.make(
        CUBES,
        num_envs=1,
        obs_mode="rgb+segmentation",
        sim_backend="physx_cpu",
        render_backend="cpu",
        sensor_configs=camera,
    )
    image = simulator.reset(3, reproducible=True).image
    shape, sensor = simulator.config.image_shape, simulator.env.scene.sensors["3rd_view_camera"]
    pictures = sensor.get_obs(rgb=True, depth=False, position=False, segmentation=True)
    in_batch = BatchedBackdrop(simulator.env, "3rd_view_camera", shape).behind(**pictures)
    np.testing.assert_array_equal(in_batch[0].numpy(), image)
    observation, _ = plain.reset(seed=0, options={"reconfigure": True, "episode_id": torch.tensor([3])})
    sensors = observation["sensor_data"]["3rd_view_camera"]
    is_shown = np.isin(sensors["segmentation"][0, ..., 0].numpy(), plain.unwrapped._segmentation_ids_to_keep.numpy())
    assert 0.02 < is_shown.mean() < 0.5
    theirs = sensors["rgb"][0].numpy()
    np.testing.assert_array_equal(image[is_shown], theirs[is_shown])
    # The photograph is made smaller by averages here and by interpolation there.
    assert np.abs(image[~is_shown].astype(int) - theirs[~is_shown]).mean() < 8
    for each in (first, simulator, plain):
        each.close()


def test_another_size_shows_the_same_view():
    intrinsics = np.array([[600.0, 0, 320], [0, 600, 240], [0, 0, 1]])
    ray = np.array([0.2, -0.1, 1.0])
    native, small = (scaled_intrinsics(intrinsics, (480, 640), size) @ ray for size in ((480, 640), (64, 64)))
    np.testing.assert_allclose(native, intrinsics @ ray)
    np.testing.assert_allclose(small[:2] / 64, native[:2] / (640, 480))


@needs_assets
def test_a_small_image_is_the_large_one_made_smaller(rendering_simulator):
    from PIL import Image

    large, small = (
        Simulator(EnvConfig(CUBES, image_size=size, image_width=width)) for size, width in ((480, 640), (60, 80))
    )
    whole = large.reset(7).image
    shrunk = np.asarray(Image.fromarray(whole).resize((80, 60), Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - small.reset(7).image).mean() < 4
    # Images may also be drawn like that and made smaller, here squeezed to a square.
    squeezed = Simulator(EnvConfig(CUBES, image_size=60, render_size=480))
    np.testing.assert_array_equal(squeezed.reset(7).image, shrink(whole, (60, 60), "lanczos3"))
    for simulator in (large, small, squeezed):
        simulator.close()


@needs_assets
def test_pi05_sees_in_168_x_224_pixels_what_it_sees_in_the_cameras_own(rendering_simulator):
    """Black bars of 28 rows above and below the view; in square images it is squeezed, and there are none."""
    seen = {}
    for shape in ((480, 640), (168, 224), (224, 224)):
        simulator = Simulator(EnvConfig(CUBES, image_size=shape[0], image_width=shape[1]))
        image = simulator.reset(7).image
        assert image.shape == (*shape, 3)
        seen[shape] = np.asarray(resize_with_pad(image[None], 224))[0]
        simulator.close()
    bars = {shape: np.flatnonzero(pixels.max(axis=(1, 2)) == 0).tolist() for shape, pixels in seen.items()}
    assert bars[480, 640] == bars[168, 224] == [*range(28), *range(196, 224)] and bars[224, 224] == []
    assert np.abs(seen[480, 640] - seen[168, 224]).mean() < 3
    assert np.abs(seen[480, 640] - seen[224, 224]).mean() > 20


# ---- The gripper -----------------------------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize(
    ("threshold", "command", "opening"),
    [
        # Both fingers are 15 mm out where closed, 37 mm where open, as the controller's limits say.
        (0.5, 0.0, 0.030),  # Bridge V2 says 0 for closed,
        (0.5, 0.996, 0.074),  # and 1 for open, which is decoded as 0.996;
        (0.5, -0.996, 0.030),  # the experts here say -1 for closed.
        (None, 0.0, 0.052),  # Without a threshold 0 is half open,
        (None, -1.0, 0.030),
    ],
)
def test_the_gripper_opens_beyond_the_threshold_and_closes_else(simulators, monkeypatch, threshold, command, opening):
    simulator = simulators(CUBES)
    monkeypatch.setattr(simulator, "config", dataclasses.replace(simulator.config, gripper_threshold=threshold))
    simulator.reset(0)
    for _ in range(6):
        simulator.step(np.array([0, 0, 0, 0, 0, 0, command], np.float32))
    fingers = simulator.env.agent.robot.get_qpos()[0, -2:].numpy()
    np.testing.assert_allclose(fingers, opening / 2, atol=2e-4)


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_threshold_changes_nothing_but_the_gripper(xp):
    action = xp.array([[0.01, -0.02, 0.5, 0.2], [0.03, 0.04, 0.05, 0.51], [1.0, 1.0, 1.0, -1.0]], xp.float32)
    executed = executed_action(action, 0.5)
    assert isinstance(executed, type(action)) and executed.dtype == np.float32
    np.testing.assert_array_equal(executed[:, :3], action[:, :3])
    assert executed[:, 3].tolist() == [-1.0, 1.0, -1.0]
    np.testing.assert_array_equal(executed_action(executed, 0.5), executed)
    assert executed_action(action, None) is action
