"""Demonstrations and rollouts for pairs on the toy environment: quotas, seeds, continuation."""

import dataclasses

import jax
import numpy as np
import pytest

from stare_jax.data.batches import imitation_batches
from stare_jax.data.demos import DemosConfig, collect_demos, demo_quotas, expert_act, is_collected
from stare_jax.data.norm_stats import read_norm_stats
from stare_jax.data.pairs import SAME_START_KINDS, PairsConfig, load_pairs, read_pairs
from stare_jax.data.reader import Dataset
from stare_jax.data.rollouts import collect_pairs, expert_actor
from stare_jax.data.schema import DatasetError
from stare_jax.envs import toy
from stare_jax.envs.experts import Expert, execution_noise
from stare_jax.envs.seeds import DEMO_SEEDS, EVALUATION_SEEDS, PAIR_SEEDS, PPO_SEEDS, REGION_SIZE, first_seed
from stare_jax.logging import Interrupted
from stare_jax.types import Signals

# Two translations and nothing else: no idle filter, and noise in both.
CONFIG = DemosConfig(num_demos=10, noise_scales=((0.0, 0.4), (0.5, 0.6)), idle_translation=-1.0, chunk_episodes=4)
MASK = (True, True)


def _expert(speed=1.0):
    """The toy's expert; its memory counts the steps of the episode."""

    def act(signals, num_steps):
        batch = jax.tree.map(lambda leaf: leaf[None], signals)
        return toy.expert_action(batch, speed=speed)[0], num_steps + 1

    return Expert(lambda: 0, act, (1.0, 1.0))


def _collect(directory, config=CONFIG, **arguments):
    return _collect_from(_expert(), config, directory, **arguments)


def _collect_from(expert, config, directory, *, num_envs=3, **arguments):
    arguments = {"noise_fn": execution_noise, "action_mask": MASK} | arguments
    return collect_demos(toy.ToyPush(num_envs), expert, config, directory, **arguments)


def _is_collected(directory, config, *, expert=None, **arguments):
    arguments = {"env_id": toy.ENV_ID, "horizon": toy.HORIZON} | arguments
    return is_collected(directory, expert or _expert(), config, **arguments)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return _collect(tmp_path_factory.mktemp("demos"))


def test_quotas_are_the_shares_by_largest_remainder():
    shares = ((0.0, 100), (0.15, 594), (0.3, 66))
    assert demo_quotas(DemosConfig(num_demos=760, noise_scales=shares)) == {0.0: 100, 0.15: 594, 0.3: 66}
    # 10 * (100, 594, 66) / 760 = 1.32, 7.82, 0.87: one each for the two largest remainders.
    assert demo_quotas(DemosConfig(num_demos=10, noise_scales=shares)) == {0.0: 1, 0.15: 8, 0.3: 1}
    assert demo_quotas(DemosConfig(num_demos=1, noise_scales=shares)) == {0.0: 0, 0.15: 1, 0.3: 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_demos": 0}, "num_demos: got 0, expected at least 1"),
        ({"noise_scales": ()}, r"noise_scales: got scales \[\]"),
        ({"noise_scales": ((-0.1, 1.0),)}, r"noise_scales: got scales \[-0.1\]"),
        ({"noise_scales": ((0.1, 1.0), (0.1, 1.0))}, "each once"),
        ({"noise_scales": ((0.1, 0.0),)}, "expected positive shares"),
        ({"seed": -1}, "seed: got -1, expected 0 <= seed < 100"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        DemosConfig(**changes)


def test_seeds_of_phases_and_runs_are_disjoint():
    starts = [
        first_seed(region, run)
        for region in (EVALUATION_SEEDS, DEMO_SEEDS, PAIR_SEEDS, PPO_SEEDS)
        for run in range(100)
    ]
    assert starts == sorted(starts) and min(np.diff(starts)) == 1_000_000
    assert starts[-1] + 1_000_000 == PPO_SEEDS + REGION_SIZE < 2**31


def test_every_environment_has_a_memory_of_its_own():
    seen = []

    def act(signals, memory):
        seen.append(list(memory))
        return np.zeros(2, np.float32), [*memory, float(signals.support_z)]

    act_all = expert_act(Expert(list, act, (1.0, 1.0)))
    signals = Signals(*(np.arange(2.0) for _ in Signals._fields))
    for is_first in ([True, True], [False, False], [False, True]):
        decision, observation = act_all("as it is", signals, ["push"] * 2, np.array(is_first))
    assert seen == [[], [], [0.0], [1.0], [0.0, 0.0], []]
    assert decision.action.shape == (2, 2) and decision.logp.shape == (2,) and observation == "as it is"


def test_only_successes_are_kept_in_their_quotas(demos):
    assert [episode.noise_scale for episode in demos.episodes] == [0.0] * 4 + [0.5] * 6
    assert all(episode.success and episode.source == "expert" for episode in demos.episodes)
    seeds = [episode.seed for episode in demos.episodes]
    num_attempts = demos.manifest.progress["num_attempts"]
    assert len(set(seeds)) == 10 and min(seeds) == DEMO_SEEDS and max(seeds) < DEMO_SEEDS + num_attempts
    assert demos.manifest.settings["seed"] == 0 and demos.manifest.filters == {}
    assert demos.episodes[0].instruction == toy.INSTRUCTION


def test_labels_are_what_the_expert_would_do(demos):
    for i in (0, 9):
        trajectory, meta = demos.episode(i)
        states = jax.tree.map(lambda leaf, n=meta["length"]: leaf[:n], trajectory.signals)
        np.testing.assert_array_equal(trajectory.action, toy.expert_action(states))
    # With noise, though, the gripper did not go where the label says.
    moved = np.diff(trajectory.signals.tcp_pos[:, :2], axis=0)
    assert np.abs(moved - toy.MAX_STEP * trajectory.action).max() > 0.1 * toy.MAX_STEP


def test_statistics_are_written(demos):
    stats = read_norm_stats(demos.directory, action_dim=2, state_dim=6)
    actions = np.concatenate([demos.episode(i)[0].action for i in range(10)])
    np.testing.assert_allclose(stats.action_q99, np.quantile(actions, 0.99, axis=0), rtol=1e-5)
    assert stats.action_mask.all()


def test_an_interrupted_collection_ends_up_the_same(demos, tmp_path, assert_same):
    for num_ticks in (15, 8):
        ticks = iter(range(num_ticks))
        with pytest.raises(Interrupted, match="of 10 are safe"):
            _collect(tmp_path, should_stop=lambda ticks=ticks: next(ticks, None) is None)
        assert not (tmp_path / "norm_stats.json").exists()
    assert 0 < Dataset(tmp_path).num_episodes < 10
    dataset = _collect(tmp_path)
    assert dataset.manifest.episodes == demos.manifest.episodes
    assert dataset.manifest.progress == demos.manifest.progress
    for i in range(10):
        assert_same(dataset.episode(i), demos.episode(i))
    assert (tmp_path / "norm_stats.json").read_text() == (demos.directory / "norm_stats.json").read_text()


def test_the_number_of_environments_makes_no_difference(demos, tmp_path):
    dataset = _collect(tmp_path, num_envs=5)
    assert dataset.manifest.episodes == demos.manifest.episodes
    for i in range(10):  # but for the rounding of the toy, whose environments are computed together
        for got, expected in zip(
            jax.tree.leaves(dataset.episode(i)[0]), jax.tree.leaves(demos.episode(i)[0]), strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_complete_data_set_stays_and_a_larger_one_grows(tmp_path):
    small = DemosConfig(num_demos=3, idle_translation=-1.0)
    first = _collect(tmp_path, small)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    _collect(tmp_path, small)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    grown = _collect(tmp_path, DemosConfig(num_demos=5, idle_translation=-1.0))
    assert grown.manifest.episodes[:3] == first.manifest.episodes and grown.num_episodes == 5
    assert len({episode.seed for episode in grown.episodes}) == 5
    assert '"num_trajectories": 5' in (tmp_path / "norm_stats.json").read_text()
    with pytest.raises(DatasetError, match="cannot be continued: its settings.seed is 0, not 1; choose another folder"):
        _collect(tmp_path, DemosConfig(num_demos=9, seed=1, idle_translation=-1.0))


def test_what_is_collected_is_known_without_a_simulator(demos, tmp_path):
    assert _is_collected(demos.directory, CONFIG)
    assert _is_collected(demos.directory, dataclasses.replace(CONFIG, num_demos=9))
    for changes in ({"num_demos": 11}, {"noise_scales": ((0.0, 1.0),)}):
        assert not _is_collected(demos.directory, dataclasses.replace(CONFIG, **changes))
    assert not _is_collected(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"seed": 1}, {}, "settings.seed is 0, not 1"),
        ({"reproducible": True}, {}, "settings.reproducible is False, not True"),
        ({"idle_translation": 0.01}, {}, "filters.idle is None, not {'translation': 0.01, 'rotation': 0.0}"),
        ({}, {"env_id": "PushCube-v1"}, "env_id is 'ToyPush-v0', not 'PushCube-v1'"),
        ({}, {"horizon": 60}, "settings.horizon is 30, not 60"),
        ({}, {"control_mode": "pd"}, "control_mode is '', not 'pd'"),
        (
            {},
            {"settings": {"jitter": "none", "image_shape": (4, 4)}},
            r"settings.jitter is None, not 'none', its settings.image_shape is None, not \[4, 4\]; choose",
        ),
    ],
)
def test_data_of_another_kind_are_named_without_a_simulator(demos, changes, arguments, message):
    with pytest.raises(DatasetError, match=f"cannot be continued: its {message}"):
        _is_collected(demos.directory, dataclasses.replace(CONFIG, **changes), **arguments)


def test_what_is_idle_is_measured_by_the_largest_command(tmp_path):
    action_scale = (0.05, 0.05, 0.05, 0.35, 0.35, 0.35, 1.0)
    still = Expert(lambda: None, lambda signals, memory: (np.zeros(2, np.float32), memory), action_scale)
    with pytest.raises(DatasetError, match="succeeded in only 0"):
        _collect_from(still, DemosConfig(num_demos=1, max_attempts=1), tmp_path, settings={"jitter": "none"})
    manifest = Dataset(tmp_path).manifest
    assert manifest.filters == {"idle": {"translation": 0.0005, "rotation": 0.021}}
    assert manifest.settings["jitter"] == "none" and manifest.settings["horizon"] == toy.HORIZON


def test_an_expert_that_fails_is_given_up_on(tmp_path):
    config = DemosConfig(num_demos=2, idle_translation=-1.0, max_attempts=3)
    with pytest.raises(DatasetError, match="succeeded in only 0 of 6 episodes of ToyPush-v0, and 2 were asked for"):
        _collect_from(_expert(speed=0.0), config, tmp_path)


def test_demonstrations_feed_batches(demos):
    def tokenize(instructions, state):
        return np.zeros((len(state), 3), np.int32), np.ones((len(state), 3), bool)

    batches = imitation_batches(demos, tokenize, batch_size=16, seed=0)
    batch = next(batches)
    batches.close()
    assert batch.action.shape == (16, 2) and batch.observation.tokens.shape == (16, 3)


PAIRS = PairsConfig(num_pairs=4, rollouts_per_seed=3, max_rollouts=36, chunk_seeds=2)


def _sometimes(share):
    """The expert at full speed in a share of the episodes, else too slowly to get anywhere near the goal."""
    rng = np.random.default_rng(0)
    speed, act_as_expert = np.ones((3, 1), np.float32), expert_act(_expert())

    def act(observation, signals, instructions, is_first):
        speed[is_first] = np.where(rng.random((3, 1)) < share, 1.0, 0.2)[is_first]
        decision, observation = act_as_expert(observation, signals, instructions, is_first)
        return decision._replace(action=decision.action * speed), observation

    return act


def _collect_pairs(directory, config=PAIRS, share=0.5, source="sft", **arguments):
    act = _sometimes(share)
    return collect_pairs(
        toy.ToyPush(3), lambda rollouts: act, toy.task_spec(), config, directory, source=source, **arguments
    )


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
    config = PairsConfig(num_pairs=4, rollouts_per_seed=2, max_rollouts=5, chunk_seeds=2)
    with pytest.raises(DatasetError, match="5 rollouts give no preference pair: 5 succeeded"):
        _collect_pairs(tmp_path, config, share=1.0)
    assert not (tmp_path / "pairs.json").exists()


def _collect_expert_pairs(directory, **arguments):
    actor = expert_actor(_expert(), PAIRS, execution_noise, noise_scale=4.0)
    return collect_pairs(toy.ToyPush(3), actor, toy.task_spec(), PAIRS, directory, source="expert", **arguments)


def test_pairs_of_a_disturbed_expert(tmp_path):
    dataset, pairs = _collect_expert_pairs(tmp_path)
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


def test_interrupted_rollouts_of_a_disturbed_expert_end_up_the_same(tmp_path, assert_same):
    expected, pairs = _collect_expert_pairs(tmp_path / "whole")
    ticks = iter(range(40))
    with pytest.raises(Interrupted):
        _collect_expert_pairs(tmp_path / "stopped", should_stop=lambda: next(ticks, None) is None)
    dataset, same_pairs = _collect_expert_pairs(tmp_path / "stopped")
    assert same_pairs == pairs and dataset.num_episodes == expected.num_episodes
    for i in range(dataset.num_episodes):
        assert_same(dataset.episode(i), expected.episode(i))


def test_an_expert_without_noise_makes_no_pairs():
    with pytest.raises(ValueError, match="noise_scale: got 0, expected more than 0"):
        expert_actor(_expert(), PAIRS, execution_noise, noise_scale=0)
