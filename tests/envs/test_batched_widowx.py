"""WidowX tasks in a batch of one on ManiSkill's CPU, beside the simulator in daily use; where episodes begin."""

import jax
import numpy as np
import pytest

from stare_jax.envs.base import SimulatorError
from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill import rests
from stare_jax.envs.maniskill.batched import BatchedSimulator
from stare_jax.envs.maniskill.building import make_scene
from stare_jax.envs.maniskill.rests import Rests, all_starts, load_rests, nested, settle, start_of
from stare_jax.envs.seeds import DEMO_SEEDS, PPO_SEEDS
from stare_jax.envs.tasks import make_expert

CUBES = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning"),
]


def test_a_batch_of_one_is_the_simulator(simulators, widowx_assets, monkeypatch):
    """Two scenes go the same way, from a state that one has come to by itself, and to which the other was set."""
    simulator, expert, seed = simulators(CUBES), make_expert(CUBES), DEMO_SEEDS + 2
    config = EnvConfig(CUBES, num_workers=1, envs_per_worker=1, image_size=None, use_state="low_dim")
    monkeypatch.setattr(simulator, "config", config)
    starts = Rests([seed], nested(settle(simulator, [seed])), config.scene.num_starts)
    batch = BatchedSimulator(make_scene(config)[0], config, starts)

    def compare(step, frame, atol):
        np.testing.assert_allclose(step.observation.state[0], frame.state, atol=atol)
        for name, value in frame.signals._asdict().items():
            np.testing.assert_allclose(getattr(step.signals, name)[0], value, atol=atol, err_msg=name)

    memory, frame, step = expert.init(), simulator.reset(seed, reproducible=True), batch.reset([seed])
    compare(step, frame, 1e-6)
    while not frame.signals.success:
        action, memory = expert.act(frame.signals, memory)
        frame, step = simulator.step(action), batch.step(action[None])
        compare(step, frame, 1e-3)

    # The inverse kinematics of a GPU take one step where the CPU's take many; the expert gets there all the same.
    batch._env.agent.controller.controllers["arm"].kinematics._setup_gpu()
    step, memory, num_actions = batch.step(action[None], {0: seed}), expert.init(), 0
    assert not step.signals.success[0]
    while not step.signals.success[0]:
        action, memory = expert.act(jax.tree.map(lambda leaf: np.asarray(leaf)[0], step.signals), memory)
        step, num_actions = batch.step(action[None]), num_actions + 1
        assert num_actions <= config.horizon
    batch.close()


def test_episodes_of_the_evaluation_begin_at_official_starts_and_the_others_at_their_own():
    assert [start_of(seed, 24) for seed in (0, 23, 24, 50)] == [0, 23, 0, 2]
    seeds = {start_of(PPO_SEEDS + 7_000_000 + k, 64) for k in range(2 * rests.NUM_TRAINING_STARTS)}
    assert sorted(seeds) == all_starts(64)[64:] and all(seed >= DEMO_SEEDS for seed in seeds)


@pytest.mark.parametrize("in_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_starts_are_computed_once_and_then_read(simulators, widowx_assets, monkeypatch, tmp_path, in_processes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, seeds, said = EnvConfig(CUBES, "cuda", num_workers=1), [4, DEMO_SEEDS], []
    expected = settle(simulators(CUBES), seeds)
    if not in_processes:
        monkeypatch.setattr(rests, "_settle_in_processes", lambda config, *_: settle(simulators(config.env_id), seeds))
    load_rests(config, seeds, said.append)
    assert len(said) == (2 if in_processes else 0)
    monkeypatch.setattr(rests, "_settle_in_processes", None)
    read = load_rests(config, seeds, said.append).of([28, PPO_SEEDS, DEMO_SEEDS])
    assert {f"{kind}/{name}" for kind in read for name in read[kind]} == set(expected)
    for key, states in expected.items():
        kind, name = key.split("/")
        np.testing.assert_array_equal(read[kind][name], states[[0, 1, 1]], err_msg=key)


def test_a_process_that_fails_is_an_error_of_the_simulator(monkeypatch, tmp_path):
    monkeypatch.setattr(rests, "_PROCESS", "raise SystemExit(3)")
    with pytest.raises(SimulatorError, match="StackGreen.*settling of its objects failed, exit status 3"):
        rests._settle_in_processes(EnvConfig(CUBES), [4], tmp_path, str)
    assert not list(tmp_path.glob("*.npz"))
