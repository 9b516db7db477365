"""Demonstrations from the real simulator, without images, which needs no graphics driver."""

import contextlib

import numpy as np

from stare_jax.data.demos import DemosConfig, collect_demos
from stare_jax.data.norm_stats import read_norm_stats
from stare_jax.data.summary import summarize_stages
from stare_jax.envs import EnvConfig, execution_noise, make_expert, make_vec_env
from stare_jax.stages import get_task


def test_demonstrations_of_push_cube(tmp_path):
    env = EnvConfig(env_id="PushCube-v1", num_workers=1, envs_per_worker=2, image_size=0, use_state="tcp")
    config = DemosConfig(num_demos=2, noise_scales=((0.0, 1.0), (0.15, 1.0)))
    with contextlib.closing(make_vec_env(env)) as simulator:
        dataset = collect_demos(simulator, make_expert(env.env_id), config, tmp_path, noise_fn=execution_noise)
    assert [episode.noise_scale for episode in dataset.episodes] == [0.0, 0.15]
    for i in range(2):
        trajectory, meta = dataset.episode(i, env.horizon)
        assert meta["instruction"] == get_task(env.env_id).instruction
        # Success ends an episode: it is in the last state, and in no other.
        np.testing.assert_array_equal(np.flatnonzero(trajectory.signals.success), [meta["length"]])
        np.testing.assert_array_equal(trajectory.observation.state, trajectory.signals.tcp_pos)
        # The expert's own commands: the gripper stays closed, whatever was executed.
        assert (trajectory.action[: meta["length"], -1] == -1).all()
    assert [stage.completed for stage in summarize_stages(dataset, get_task(env.env_id))] == [1.0] * 4
    stats = read_norm_stats(tmp_path, action_dim=7, state_dim=3)
    assert (stats.action_q01[:6] <= stats.action_q99[:6]).all() and not stats.action_mask[6]


def _collect_in(env_id, config, layouts, directory):
    """Collects with several layouts of (processes, environments of a process)."""
    for num_workers, envs_per_worker in layouts:
        env = EnvConfig(
            env_id, image_size=0, use_state="low_dim", num_workers=num_workers, envs_per_worker=envs_per_worker
        )
        with contextlib.closing(make_vec_env(env)) as simulator:
            place = directory / f"{num_workers}x{envs_per_worker}"
            yield collect_demos(simulator, make_expert(env_id), config, place, noise_fn=execution_noise)


def _assert_same_data(first, second, assert_same):
    assert first.manifest.episodes == second.manifest.episodes
    for i in range(first.num_episodes):
        assert_same(first.episode(i), second.episode(i))


def test_the_same_demonstrations_to_the_bit_however_many_simulators_collect_them(tmp_path, assert_same):
    config = DemosConfig(num_demos=4, noise_scales=((0.0, 1.0), (0.15, 1.0)), reproducible=True)
    first, second = _collect_in("StackCube-v1", config, ((1, 3), (2, 1)), tmp_path)
    assert first.num_episodes == 4
    _assert_same_data(first, second, assert_same)


def test_so_are_those_of_a_task_whose_objects_settle_in_a_reset(widowx_assets, tmp_path, assert_same):
    config = DemosConfig(num_demos=2, noise_scales=((0.1, 1.0),), reproducible=True)
    # In one environment the second episode follows the first, in two it is the first of its simulator.
    first, second = _collect_in("PutCarrotOnPlateInScene-v1", config, ((1, 1), (1, 2)), tmp_path)
    assert first.num_episodes == 2
    _assert_same_data(first, second, assert_same)
