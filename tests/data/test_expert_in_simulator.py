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


def test_the_same_demonstrations_to_the_bit_however_many_simulators_collect_them(tmp_path, assert_same):
    config = DemosConfig(num_demos=4, noise_scales=((0.0, 1.0), (0.15, 1.0)), reproducible=True)
    collected = []
    for num_workers, envs_per_worker in ((1, 3), (2, 1)):
        layout = {"num_workers": num_workers, "envs_per_worker": envs_per_worker}
        env = EnvConfig("StackCube-v1", image_size=0, use_state="low_dim", **layout)
        directory = tmp_path / str(num_workers)
        with contextlib.closing(make_vec_env(env)) as simulator:
            expert = make_expert(env.env_id)
            collected.append(collect_demos(simulator, expert, config, directory, noise_fn=execution_noise))
    first, second = collected
    assert first.manifest.episodes == second.manifest.episodes and first.num_episodes == 4
    for i in range(4):
        assert_same(first.episode(i), second.episode(i))
