"""Demonstrations from the real simulator, without images, which needs no graphics driver."""

import contextlib

import numpy as np
import pytest

from stare_jax.data.demos import DemosConfig, collect_demos
from stare_jax.data.norm_stats import read_norm_stats
from stare_jax.data.summary import summarize_stages
from stare_jax.envs import EnvConfig, make_expert, make_vec_env
from stare_jax.stages import get_task


def _collect_in(env_id, config, layouts, directory):
    """Collects with several layouts of (processes, environments of a process)."""
    for num_workers, envs_per_worker in layouts:
        env = EnvConfig(
            env_id, image_size=0, use_state="low_dim", num_workers=num_workers, envs_per_worker=envs_per_worker
        )
        with contextlib.closing(make_vec_env(env)) as simulator:
            place = directory / f"{num_workers}x{envs_per_worker}"
            yield collect_demos(lambda: simulator, simulator.config.info, make_expert(env_id), config, place)


def _assert_same_data(first, second, assert_same):
    assert first.manifest.episodes == second.manifest.episodes
    for i in range(first.num_episodes):
        assert_same(first.episode(i), second.episode(i))


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """Demonstrations of StackCube twice: from three simulators in one process, and from two in two."""
    config = DemosConfig(num_demos=4, noise_scales=((0.0, 1.0), (0.15, 1.0)), reproducible=True)
    return list(_collect_in("StackCube-v1", config, ((1, 3), (2, 1)), tmp_path_factory.mktemp("stacked")))


def test_demonstrations_of_the_expert(stacked):
    dataset, env = stacked[0], EnvConfig("StackCube-v1", use_state="low_dim")
    assert [episode.noise_scale for episode in dataset.episodes] == [0.0, 0.0, 0.15, 0.15]
    for i in range(4):
        trajectory, meta = dataset.episode(i, env.horizon)
        assert meta["instruction"] == get_task(env.env_id).instruction
        # Success ends an episode: it is in the last state, and in no other.
        np.testing.assert_array_equal(np.flatnonzero(trajectory.signals.success), [meta["length"]])
        np.testing.assert_array_equal(trajectory.observation.state[:, :3], trajectory.signals.tcp_pos)
        # The expert's own commands: the gripper opens or closes, whatever was executed.
        assert set(trajectory.action[: meta["length"], -1]) == {-1, 1}
    assert [stage.completed for stage in summarize_stages(dataset, get_task(env.env_id))] == [1.0] * 4
    stats = read_norm_stats(dataset.directory, action_dim=7, state_dim=env.state_dim)
    assert (stats.action_q01[:6] <= stats.action_q99[:6]).all() and not stats.action_mask[6]


def test_they_are_the_same_to_the_bit_however_many_simulators_collect_them(stacked, assert_same):
    assert stacked[0].num_episodes == 4
    _assert_same_data(*stacked, assert_same)


def test_so_are_those_of_a_task_whose_objects_settle_in_a_reset(widowx_assets, tmp_path, assert_same):
    config = DemosConfig(num_demos=2, noise_scales=((0.1, 1.0),), reproducible=True)
    # In one environment the second episode follows the first, in two it is the first of its simulator.
    first, second = _collect_in("PutCarrotOnPlateInScene-v1", config, ((1, 1), (1, 2)), tmp_path)
    assert first.num_episodes == 2
    _assert_same_data(first, second, assert_same)
