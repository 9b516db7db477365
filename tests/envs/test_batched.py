"""A batch of environments: on ManiSkill's CPU, where it is a batch of one, and over a stand-in for its GPU."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from standin_gpu import OPENED, StandIn, WidowXStandIn, widowx_rests

from stare_jax.envs import SimulatorError, make_vec_env
from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill import batched
from stare_jax.envs.maniskill.batched import BatchedSimulator
from stare_jax.envs.maniskill.building import MissingAssetsError, make_scene
from stare_jax.envs.maniskill.rests import start_of
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.envs.tasks import make_expert
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
]

SEEDS = [10, 11, 12, 13, 14, 15, 16]
MODES = {"push": "", "push to targets": "pd_ee_target_delta_pose", "widowx": ""}
"""stand-in -> control mode"""
PHOTOGRAPH = (1, 2, 3)  # its colour


@pytest.fixture(params=["cpu", "cuda"])
def make_batch(request, tmp_path):
    """Returns a function (num_envs, which of `MODES`) -> the batch over a stand-in on a device."""
    if request.param == "cuda" and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        pytest.skip("needs a CUDA device that PyTorch and JAX see")
    Image.new("RGB", (6, 4), PHOTOGRAPH).save(tmp_path / "photograph.png")

    def make(num_envs, name="push"):
        config = EnvConfig(
            "PutCarrotOnPlateInScene-v1" if name == "widowx" else "PushCube-v1",
            "cuda",
            num_workers=1,
            envs_per_worker=num_envs,
            image_size=4,
            image_width=6,
            use_state="low_dim",
            control_mode=MODES[name],
        )
        if name != "widowx":
            return BatchedSimulator(StandIn(num_envs, request.param, bool(MODES[name])), config)
        num_starts = config.scene.num_starts
        rests = widowx_rests([start_of(seed, num_starts) for seed in SEEDS], num_starts)
        return BatchedSimulator(WidowXStandIn(num_envs, request.param, tmp_path / "photograph.png"), config, rests)

    return make


@jax.jit
def push(signals):
    """Moves along x and keeps level with the cube; the gripper closes."""
    sideways = (signals.obj_pos - signals.tcp_pos)[:, 1:2] / 0.04
    forwards, closed = jnp.full_like(sideways, 0.9), jnp.full_like(sideways, -1.0)
    return jnp.concatenate([forwards, jnp.clip(sideways, -1, 1), *4 * [0 * sideways], closed], axis=-1)


def act(observation, signals, instructions, is_first):
    """Decides on the device, and makes sure that all has been left there."""
    assert all(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((observation.images, observation.state, signals))
    )
    action = push(signals)
    nothing = jnp.zeros(len(action))
    return Decision(action, {"bins": action.astype(jnp.int32)}, nothing, nothing), observation


def test_what_was_returned_outlives_the_simulators_buffers(make_batch):
    batch = make_batch(3)
    states, copies = [], []

    def keep(state):
        states.append(state)
        copies.append(jax.tree.map(np.array, state))

    keep(batch.reset(SEEDS[:3]))
    for t in range(14):
        keep(batch.step(push(states[-1].signals), {1: 20 + t} if t in (3, 11) else None))
    for state, copy in zip(states, copies, strict=True):
        jax.tree.map(np.testing.assert_array_equal, state, copy)
    assert np.any([copy.signals.success[[0, 2]] for copy in copies], axis=0).all()  # and something has happened
    for copy in copies:
        where = np.broadcast_to(255 * (copy.signals.obj_pos[:, None, None] + 0.5), (3, 4, 6, 3))
        assert np.abs(copy.observation.images["base_camera"] - where).max() <= 1
        assert copy.alive.all()


def test_an_environment_is_reset_in_a_call_of_its_own(make_batch):
    batch = make_batch(2)
    states = [batch.reset(SEEDS[:2])]
    while not states[-1].signals.success[0]:
        states.append(batch.step(push(states[-1].signals)))
    final, before = states[-1].signals, states[-2].signals
    assert final.is_contact[0] and final.is_grasped[0] and final.obj_pos[0, 0] > before.obj_pos[0, 0]
    first = batch.step(push(final), {0: SEEDS[1]})
    signals, began = first.signals, states[0].signals
    assert not (signals.is_contact[0] or signals.is_grasped[0] or signals.success[0])
    # The seed says how an episode begins; its neighbour has gone on.
    for name in ("tcp_pos", "obj_pos", "goal_pos", "goal_quat", "support_z"):
        np.testing.assert_allclose(getattr(signals, name)[0], getattr(began, name)[1], atol=1e-6, err_msg=name)
    assert first.observation.state[0, 9] == OPENED
    assert signals.tcp_pos[1, 0] > final.tcp_pos[1, 0]


def test_a_touch_that_is_over_before_the_last_sub_step_is_noticed(make_batch):
    batch = make_batch(2)
    state, moved, noticed = batch.reset(SEEDS[:2]), [], []
    for _ in range(20):
        last, state = state, batch.step(0.5 * push(state.signals))  # The first of two sub-steps goes all the way.
        moved.append(np.linalg.norm(state.signals.obj_pos - last.signals.obj_pos, axis=-1) > 1e-5)
        noticed.append(np.asarray(state.signals.is_contact))
        assert not batch._env.scene.px._impulse.norm(dim=-1).gt(1e-5).any()
    assert np.any(moved, axis=0).all() and not np.all(moved, axis=0).any()
    np.testing.assert_array_equal(noticed, moved)


@pytest.mark.parametrize("name", MODES)
def test_episodes_in_a_batch_are_those_of_environments_alone(make_batch, name):
    """Neither the place in the batch, nor resets of others, nor what was there before makes a difference."""
    collected = [
        collect_episodes(make_batch(num_envs, name), act, SEEDS, stop_at_success=True)
        for num_envs in (1, 3, *([len(SEEDS)] if name == "push" else []))
    ]
    alone = collected[0].trajectory
    lengths = alone.valid[:, 1:].sum(axis=1)
    assert len(set(lengths)) > 1 and (alone.signals.success & alone.valid).any(axis=1).all()
    for column in (0, 10):  # where tool and cube begin
        assert len(np.unique(alone.observation.state[:, 0, column])) == len(SEEDS)
    for other in collected[1:]:
        for leaf, expected in zip(*map(jax.tree.leaves, (other.trajectory, alone)), strict=True):
            assert isinstance(leaf, np.ndarray)
            np.testing.assert_allclose(leaf.astype(float), expected.astype(float), atol=1e-6)


def test_widowx_environments_begin_where_their_seeds_say_in_front_of_their_photographs(make_batch):
    batch = make_batch(3, "widowx")
    state = batch.reset(SEEDS[:3])
    first, image = state.signals, np.asarray(state.observation.images["3rd_view_camera"])
    assert (image[:, :, 3:] == PHOTOGRAPH).all()
    where = np.broadcast_to(255 * (np.asarray(first.obj_pos)[:, None, None] + 0.5), (3, 4, 3, 3))
    assert np.abs(image[:, :, :3] - where).max() <= 1
    again = batch.step(np.zeros((3, 7), np.float32), {2: SEEDS[0], 0: SEEDS[1]}).signals
    for name in ("tcp_pos", "obj_pos", "goal_pos", "support_z"):
        np.testing.assert_array_equal(getattr(again, name)[jnp.array([2, 0])], getattr(first, name)[:2], err_msg=name)


def test_bad_calls_are_refused(make_batch):
    batch = make_batch(2)
    with pytest.raises(ValueError, match="seeds: got 1, expected one for each of 2"):
        batch.reset([1])
    batch.reset([1, 2])
    action = np.zeros((2, 7), np.float32)
    with pytest.raises(ValueError, match=r"action: got shape \(2, 6\), expected \(2, 7\)"):
        batch.step(action[:, :6])
    with pytest.raises(ValueError, match=r"reset_seeds: got \[2\], expected indices below 2"):
        batch.step(action, {2: 0})
    action[1] = np.nan
    batch.step(action, {1: 0})  # Rows of environments that are reset are ignored.
    with pytest.raises(ValueError, match="action: got .*nan.* expected finite numbers"):
        batch.step(action)


# ---- ManiSkill itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["PushCube-v1", "StackCube-v1", "LiftPegUpright-v1"])
def test_a_batch_of_one_on_the_cpu_is_the_simulator(env_id):
    config = EnvConfig(env_id, num_workers=1, envs_per_worker=1, image_size=None, use_state="low_dim")
    simulator, batch = Simulator(config), BatchedSimulator(make_scene(config)[0], config)
    expert, still = make_expert(env_id), np.zeros((1, 7), np.float32)

    def compare(frame, step):
        np.testing.assert_allclose(step.observation.state[0], frame.state, atol=1e-6)
        for name, value in frame.signals._asdict().items():
            np.testing.assert_allclose(getattr(step.signals, name)[0], value, atol=1e-6, err_msg=name)

    frame, step = simulator.reset(5), batch.reset([5])
    for seed in (6, 7):
        memory = expert.init()
        compare(frame, step)
        for _ in range(25):
            action, memory = expert.act(frame.signals, memory)
            frame, step = simulator.step(action), batch.step(jnp.asarray(action[None]))
            compare(frame, step)
        # The batch steps as a whole, and then is reset.
        simulator.step(still[0])
        frame, step = simulator.reset(seed), batch.step(still, {0: seed})
    simulator.close()
    batch.close()


def test_images_are_the_simulators(rendering_simulator):
    config = EnvConfig(num_workers=1, envs_per_worker=1, image_size=64)
    with contextlib.closing(BatchedSimulator(make_scene(config)[0], config)) as batch:
        image = batch.reset([7]).observation.images["base_camera"]
        action = np.full((1, 7), 0.5, np.float32)
        unseen = batch.step(action, is_drawn=np.zeros(1, bool)).observation.images["base_camera"]
        seen = batch.step(action, is_drawn=np.ones(1, bool)).observation.images["base_camera"]
    assert unseen is image and (seen != image).any()  # What nobody looks at is not drawn.
    assert image.shape == (1, 64, 64, 3) and image.dtype == np.uint8
    # There the floor is drawn as two triangles.
    assert np.abs(np.asarray(image[0], int) - rendering_simulator.reset(7).image).mean() < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tpu"}, "backend: got 'tpu', expected one of"),
        ({"num_workers": 2}, "num_workers: got 2, expected 1 with backend 'cuda', where envs_per_worker is the whole"),
        ({"num_groups": 2}, "backend: got 'cuda' with num_groups 2, expected 'cpu': a GPU has one batch"),
        ({"has_spares": True}, "backend: got 'cuda' with has_spares, expected 'cpu': a GPU has one batch"),
        ({"perturbation": "vision/light"}, "backend: got 'cuda' with perturbation 'vision/light', expected 'cpu'"),
    ],
)
def test_what_a_batch_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(**({"backend": "cuda", "num_workers": 1} | settings))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a CUDA device")
def test_no_cuda_device_is_an_error_that_says_so():
    with pytest.raises(SimulatorError, match="PushCube-v1: backend: got 'cuda', and JAX computes on 'cpu'"):
        make_vec_env(EnvConfig(backend="cuda", num_workers=1))


@pytest.mark.parametrize(
    ("error", "raised"),
    [(MissingAssetsError("no files"), SimulatorError), (RuntimeError("CUDA out of memory"), RuntimeError)],
)
def test_only_what_the_user_can_put_right_loses_its_traceback(error, raised, monkeypatch):
    def fail(config):
        raise error

    monkeypatch.setattr(batched, "missing_for_cuda", lambda config: None)
    monkeypatch.setattr(batched, "make_scene", fail)
    with pytest.raises(raised, match=str(error)) as caught:
        make_vec_env(EnvConfig(backend="cuda", num_workers=1))
    assert type(caught.value) is raised


@pytest.mark.parametrize(
    ("settings", "missing", "backend", "said"),
    [
        ({}, None, ("cuda", 1, 12), "'auto' is 'cuda', one batch of 12 environments"),
        ({}, "got 'cuda', and PyTorch sees none", ("cpu", 3, 4), "'auto' is 'cpu': got 'cuda', and PyTorch sees none"),
        ({"control_mode": "pd_ee_target_delta_pose"}, None, ("cuda", 1, 12), "'auto' is 'cuda', one batch of 12"),
        ({"env_id": "PutSpoonOnTableClothInScene-v1"}, None, ("cuda", 1, 12), "'auto' is 'cuda', one batch of 12"),
        ({"has_spares": True}, None, ("cpu", 3, 4), "'auto' is 'cpu': .*has_spares"),
        ({"backend": "cpu"}, None, ("cpu", 3, 4), ""),
    ],
)
def test_auto_is_the_gpu_where_it_can_be(settings, missing, backend, said, monkeypatch):
    monkeypatch.setattr(batched, "missing_for_cuda", lambda config: missing)
    lines = []
    config = EnvConfig(**({"backend": "auto", "num_workers": 3, "envs_per_worker": 4} | settings))
    config = batched.resolve_backend(config, lines.append)
    assert (config.backend, config.num_workers, config.envs_per_worker) == backend
    assert re.search(said, "".join(lines)) and bool(lines) == bool(said)
