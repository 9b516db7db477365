"""Rollouts and their pairs on the toy environment: of a policy and of a disturbed expert, continued, crashed."""

import contextlib
import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from toy_collection import MortalToy, SimulatorNeeded, info_of, no_simulator, toy_expert

from stare_jax.data.demos import expert_act
from stare_jax.data.pairs import SAME_START_KINDS, PairsConfig, load_pairs, read_pairs
from stare_jax.data.rollouts import Actor, collect_pairs, expert_actor, policy_actor
from stare_jax.data.schema import DamagedShardError, DatasetError
from stare_jax.envs import toy
from stare_jax.envs.experts.base import execution_noise
from stare_jax.envs.seeds import PAIR_SEEDS
from stare_jax.logging import Interrupted
from stare_jax.models.mlp import MLPConfig, make_mlp

PAIRS = PairsConfig(num_pairs=4, rollouts_per_seed=3, max_rollouts=36, write_every=2)


def _collect(directory, actor, config=PAIRS, *, env=None, **arguments):
    env = env or toy.ToyPush(3)
    return collect_pairs(lambda: env, info_of(env), actor, toy.task_spec(), config, directory, **arguments)


def _collected(directory, actor, config=PAIRS):
    """The data set that is there already; None where a simulator is needed."""
    with contextlib.suppress(SimulatorNeeded):
        return collect_pairs(no_simulator, info_of(toy.ToyPush(3)), actor, toy.task_spec(), config, directory)


def _sometimes(share):
    """The expert at full speed in a share of the episodes, else too slowly to get anywhere near the goal."""
    rng = np.random.default_rng(0)
    speed, act_as_expert = np.ones((3, 1), np.float32), expert_act(toy_expert())

    def act(observation, signals, instructions, is_first):
        speed[is_first] = np.where(rng.random((3, 1)) < share, 1.0, 0.2)[is_first]
        decision, observation = act_as_expert(observation, signals, instructions, is_first)
        return decision._replace(action=decision.action * speed), observation

    return act


def _collect_pairs(directory, config=PAIRS, share=0.5, source="sft", **arguments):
    act = _sometimes(share)
    actor = Actor(lambda rollouts: act, lambda rollout: 0.0, source, {}, depends_on_batch=True)
    return _collect(directory, actor, config, **arguments)


def test_pairs_of_a_policy(tmp_path):
    dataset, pairs = _collect_pairs(tmp_path)
    assert len(pairs) == 4 and read_pairs(tmp_path) == pairs
    assert {pair.kind for pair in pairs} <= set(SAME_START_KINDS)
    num_rollouts = dataset.num_episodes
    assert num_rollouts % 6 == 0 and num_rollouts == dataset.manifest.progress["num_attempts"]
    assert [episode.seed for episode in dataset.episodes[:6]] == [PAIR_SEEDS] * 3 + [PAIR_SEEDS + 1] * 3
    batch = load_pairs(dataset, pairs, horizon=toy.HORIZON)
    # The same seed is the same initial state, and the chosen one is the better.
    np.testing.assert_array_equal(batch.chosen.observation.state[:, 0], batch.rejected.observation.state[:, 0])
    assert (batch.chosen.signals.success.any(axis=1) >= batch.rejected.signals.success.any(axis=1)).all()

    again, same_pairs = _collect_pairs(tmp_path)
    assert again.num_episodes == num_rollouts and same_pairs == pairs
    with pytest.raises(DatasetError, match="cannot be continued: its settings"):
        _collect_pairs(tmp_path, source="tpo")


def test_interrupted_rollouts_go_on(tmp_path):
    ticks = iter(range(75))
    with pytest.raises(Interrupted, match="6 rollouts are safe"):
        _collect_pairs(tmp_path, should_stop=lambda: next(ticks, None) is None)
    dataset, pairs = _collect_pairs(tmp_path)
    assert len(pairs) == 4
    seeds = [episode.seed for episode in dataset.episodes]
    assert seeds == [PAIR_SEEDS + i // 3 for i in range(len(seeds))]


def test_rollouts_that_are_all_alike_make_no_pair(tmp_path):
    config = PairsConfig(num_pairs=4, rollouts_per_seed=2, max_rollouts=5, write_every=2)
    with pytest.raises(DatasetError, match="5 rollouts give no preference pair: 5 succeeded"):
        _collect_pairs(tmp_path, config, share=1.0)
    assert not (tmp_path / "pairs.json").exists()


def _expert_actor():
    return expert_actor(toy_expert(), PAIRS, noise_scale=4.0)


def test_pairs_of_a_disturbed_expert(tmp_path):
    dataset, pairs = _collect(tmp_path, _expert_actor())
    assert len(pairs) == 4 and all(pair.kind == "success, same start" for pair in pairs)
    episodes = [dataset.episode(i) for i in range(dataset.num_episodes)]
    # The first of the three rollouts from a state is the expert's own.
    for trajectory, row in episodes[::3]:
        states = jax.tree.map(lambda leaf, n=row["length"]: leaf[:n], trajectory.signals)
        np.testing.assert_array_equal(trajectory.action, toy.expert_action(states))
        assert row["success"]
    # What is stored of the others is what was executed.
    for trajectory, _ in episodes:
        position = trajectory.signals.tcp_pos[:, :2]
        moved, wanted = np.diff(position, axis=0), toy.MAX_STEP * trajectory.action
        is_inside = np.abs(position[1:]) < toy.WORKSPACE - 1e-6
        np.testing.assert_allclose(moved[is_inside], wanted[is_inside], atol=1e-6)
    assert np.abs(episodes[2][0].action).mean() > np.abs(episodes[0][0].action).mean()


def test_the_noise_of_a_rollout_is_known_from_the_data_set(tmp_path):
    dataset, _ = _collect(tmp_path, _expert_actor())
    assert [episode.noise_scale for episode in dataset.episodes[:6]] == [0.0, 2.0, 4.0] * 2
    assert dataset.manifest.settings["noise_scale"] == 4.0 and dataset.manifest.settings["source"] == "expert"
    for i in (1, 5):
        trajectory, row = dataset.episode(i)
        perturb = execution_noise([PAIR_SEEDS + row["attempt"]], [row["noise_scale"]], (1.0, 1.0))
        for t in range(row["length"]):
            state = jax.tree.map(lambda leaf, t=t: leaf[t : t + 1], trajectory.signals)
            executed = perturb(toy.expert_action(state), np.array([t == 0]))
            np.testing.assert_array_equal(trajectory.action[t], executed[0])


def test_rollouts_may_play_on_after_success(tmp_path):
    on = dataclasses.replace(PAIRS, max_rollouts=6, num_pairs=9, stop_at_success=False)
    dataset, _ = _collect(tmp_path, _expert_actor(), on)
    assert dataset.manifest.settings["stop_at_success"] is False
    assert {episode.length for episode in dataset.episodes} == {toy.HORIZON}
    with pytest.raises(DatasetError, match="its settings.stop_at_success is False, not None"):
        _collect(tmp_path, _expert_actor(), dataclasses.replace(on, stop_at_success=True))


def test_an_expert_without_noise_makes_no_pairs():
    with pytest.raises(ValueError, match="noise_scale: got 0, expected more than 0"):
        expert_actor(toy_expert(), PAIRS, noise_scale=0)


# ---- The same rollouts, whatever happens -----------------------------------------------------------------------------


@functools.cache  # so that it is compiled once
def _restore():
    policy = make_mlp(MLPConfig(), toy.norm_stats())
    return policy, jax.jit(policy.init)(jax.random.key(0))


def _policy_actor(config):
    return policy_actor(_restore, config, source="sft/1/abc")


# Longer than the one chunk that would do for four pairs.
MORE = dataclasses.replace(PAIRS, num_pairs=99, max_rollouts=18, reproducible=True)
ACTORS = pytest.mark.parametrize("make_actor", [_expert_actor, lambda: _policy_actor(MORE)], ids=["expert", "policy"])


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """(kind of actor) -> what it collects when nothing happens."""
    made = {}

    def make(request):
        name, make_actor = request.node.callspec.id, request.node.callspec.params["make_actor"]
        if name not in made:
            made[name] = _collect(tmp_path_factory.mktemp(name), make_actor(), MORE)
        return made[name]

    return make


def _assert_same_data(got, expected, assert_same):
    (dataset, pairs), (expected_dataset, expected_pairs) = got, expected
    assert pairs == expected_pairs and dataset.manifest.episodes == expected_dataset.manifest.episodes
    for i in range(expected_dataset.num_episodes):
        assert_same(dataset.episode(i), expected_dataset.episode(i))


@ACTORS
def test_interrupted_rollouts_end_up_the_same(request, make_actor, rollouts, tmp_path, assert_same):
    ticks = iter(range(90))
    with pytest.raises(Interrupted, match="(6|12) rollouts are safe"):
        _collect(tmp_path, make_actor(), MORE, should_stop=lambda: next(ticks, None) is None)
    _assert_same_data(_collect(tmp_path, make_actor(), MORE), rollouts(request), assert_same)


@ACTORS
def test_a_simulator_that_dies_changes_no_rollouts(request, make_actor, rollouts, tmp_path, assert_same):
    env = MortalToy(3, dies_in={5, 70})
    _assert_same_data(_collect(tmp_path, make_actor(), MORE, env=env), rollouts(request), assert_same)
    assert not env.dies_in


def test_what_a_policy_samples_depends_on_the_environments(request, tmp_path):
    _collect(tmp_path, _policy_actor(MORE), MORE)
    with pytest.raises(DatasetError, match="its settings.num_envs is 3, not 4"):
        _collect(tmp_path, _policy_actor(MORE), MORE, env=toy.ToyPush(4))
    with pytest.raises(DatasetError, match="its settings.write_every is 2, not 3"):
        _collected(tmp_path, _policy_actor(MORE), dataclasses.replace(MORE, write_every=3))
    with pytest.raises(DatasetError, match="its settings.temperature is 1.0, not 2.0"):
        _collected(tmp_path, _policy_actor(dataclasses.replace(MORE, temperature=2.0)), MORE)


def test_rollouts_that_are_not_reproducible_go_on_in_any_number_of_environments(tmp_path):
    for num_envs, max_rollouts in ((3, 6), (4, 12)):
        config = dataclasses.replace(MORE, reproducible=False, max_rollouts=max_rollouts)
        dataset, _ = _collect(tmp_path, _policy_actor(config), config, env=toy.ToyPush(num_envs))
    assert dataset.num_episodes == 12


def test_what_is_there_needs_neither_simulator_nor_policy(tmp_path):
    def load():
        raise AssertionError("the policy is not needed")

    dataset, pairs = _collect(tmp_path, _policy_actor(MORE), MORE)
    unloaded = policy_actor(load, MORE, source="sft/1/abc")
    found, found_pairs = _collected(tmp_path, unloaded, MORE)
    assert found.num_episodes == dataset.num_episodes == 18 and found_pairs == pairs
    assert len(_collected(tmp_path, unloaded, dataclasses.replace(MORE, num_pairs=1))[1]) == 1
    assert _collected(tmp_path, unloaded, dataclasses.replace(MORE, max_rollouts=19)) is None
    assert _collected(tmp_path / "nothing", unloaded, MORE) is None
    with pytest.raises(DatasetError, match="its settings.source is 'sft/1/abc', not 'sft/2/abc'"):
        _collected(tmp_path, policy_actor(load, MORE, source="sft/2/abc"), MORE)


def test_damage_is_found_before_anything_is_simulated(tmp_path):
    _collect(tmp_path / "whole", _expert_actor())
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (tmp_path / "damaged" / "episodes-00000.array_record").unlink()
    larger = dataclasses.replace(PAIRS, num_pairs=99)
    asleep = MortalToy(3, is_asleep=True)
    for collect in (_collected, lambda *arguments: _collect(*arguments, env=asleep)):
        with pytest.raises(DamagedShardError, match=r"episodes-00000\.array_record is missing"):
            collect(tmp_path / "damaged", _expert_actor(), larger)


def test_rollouts_are_shown_as_they_end(tmp_path, monkeypatch):
    shown = []

    class Bar:
        def update(self, n, **postfix):
            shown.append((n, *postfix.values()))

    def progress(total, *arguments, initial):
        shown.append((total, initial))
        return contextlib.nullcontext(Bar())

    monkeypatch.setattr("stare_jax.data.rollouts.progress", progress)
    _, pairs = _collect(tmp_path, _expert_actor(), dataclasses.replace(PAIRS, max_rollouts=6, num_pairs=9))
    assert shown == [(6, 0), (0, "0/9"), *[(1,)] * 6, (0, f"{len(pairs)}/9")]
