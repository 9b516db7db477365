"""Demonstrations on the toy environment: quotas, seeds, continuation, simulators that die, damaged shards."""

import contextlib
import dataclasses
import shutil

import jax
import numpy as np
import pytest
from toy_collection import MortalToy, SimulatorNeeded, info_of, no_simulator, toy_expert

from stare_jax.config import ConfigError
from stare_jax.data.batches import imitation_batches
from stare_jax.data.demos import DemosConfig, collect_demos, demo_quotas, expert_act, experts_act
from stare_jax.data.filters import imitation_frames
from stare_jax.data.norm_stats import read_norm_stats
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import DamagedShardError, DatasetError
from stare_jax.envs import toy
from stare_jax.envs.experts.base import Expert
from stare_jax.envs.seeds import (
    DEMO_SEEDS,
    EVALUATION_SEEDS,
    PAIR_SEEDS,
    PPO_SEEDS,
    REGION_SIZE,
    SLOT_SIZE,
    first_seed,
    take_seeds,
)
from stare_jax.logging import Interrupted
from stare_jax.rollout.rounds import MAX_TRIES
from stare_jax.types import Signals

# Two translations and nothing else: no idle filter, and noise in both.
CONFIG = DemosConfig(num_demos=10, noise_scales=((0.0, 0.4), (0.5, 0.6)), idle_translation=-1.0, write_every=4)
MASK = (True, True)
EXPERT = toy_expert()


def _collect(directory, config=CONFIG, *, expert=EXPERT, env=None, **arguments):
    info = info_of(toy.ToyPush(3), settings=arguments.pop("settings", {}))
    arguments = {"action_mask": MASK} | arguments
    return collect_demos(lambda: env or toy.ToyPush(3), info, expert, config, directory, **arguments)


def _collected(directory, config=CONFIG, *, skip_broken=False, **changes):
    """The data set that is there already; None where a simulator is needed."""
    info = info_of(toy.ToyPush(3), **changes)
    with contextlib.suppress(SimulatorNeeded):
        return collect_demos(no_simulator, info, EXPERT, config, directory, action_mask=MASK, skip_broken=skip_broken)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return _collect(tmp_path_factory.mktemp("demos"))


def test_hesitations_are_executed_stored_and_named(demos, tmp_path):
    hesitant = _collect(tmp_path, dataclasses.replace(CONFIG, num_demos=4, noise_scales=((0.0, 1.0),), hesitation=0.5))
    pauses = np.concatenate([~hesitant.episode(i)[0].action.any(axis=1) for i in range(4)])
    assert 0.2 < pauses.mean() < 0.8
    assert hesitant.manifest.settings["hesitation"] == 0.5 and "hesitation" not in demos.manifest.settings
    with pytest.raises(ValueError, match="hesitation: got 0.5 with idle_translation = 0.01, expected"):
        dataclasses.replace(CONFIG, hesitation=0.5, idle_translation=0.01)


def _assert_same_data(got, expected, assert_same):
    assert got.manifest.episodes == expected.manifest.episodes
    for i in range(expected.num_episodes):
        assert_same(got.episode(i), expected.episode(i))
    statistics = [dataset.directory / "norm_stats.json" for dataset in (got, expected)]
    assert statistics[0].read_text() == statistics[1].read_text()


def _damage(directory, number=0):
    """Cuts a shard short; returns what puts it right again."""
    shard = directory / f"frames-{number:05d}.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    return lambda: shard.write_bytes(content)


def test_quotas_are_the_shares_by_largest_remainder():
    shares = ((0.0, 100), (0.15, 594), (0.3, 66))
    assert demo_quotas(DemosConfig(num_demos=760, noise_scales=shares)) == {0.0: 100, 0.15: 594, 0.3: 66}
    # 10 * (100, 594, 66) / 760 = 1.32, 7.82, 0.87: one each for the two largest remainders.
    assert demo_quotas(DemosConfig(num_demos=10, noise_scales=shares)) == {0.0: 1, 0.15: 8, 0.3: 1}
    assert demo_quotas(DemosConfig(num_demos=1, noise_scales=shares)) == {0.0: 0, 0.15: 1, 0.3: 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linger": -1}, "linger: got -1, expected >= 0"),
        ({"num_demos": 0}, "num_demos: got 0, expected >= 1"),
        ({"noise_scales": ()}, r"noise_scales: got \(\), expected at least 1 items"),
        ({"noise_scales": ((-0.1, 1.0),)}, r"noise_scales\[0\]\[0\]: got -0.1, expected >= 0"),
        ({"noise_scales": ((0.1, 1.0), (0.1, 1.0))}, "each once"),
        ({"noise_scales": ((0.1, 0.0),)}, r"noise_scales\[0\]\[1\]: got 0.0, expected > 0"),
        ({"seed": -1}, "seed: got -1, expected in \\[0, 99\\]"),
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
    assert decision.action.shape == (2, 2) and decision.logp is None and observation == "as it is"


def test_every_environment_is_acted_in_by_the_expert_of_its_task():
    """The expert of task k counts its steps, and acts with k and their number."""
    experts = [Expert(int, lambda signals, n, k=k: (np.array([k, n], np.float32), n + 1), (1.0, 1.0)) for k in range(2)]
    act_all = experts_act([experts[task] for task in (1, 0, 1)].__getitem__)
    signals = Signals(*(np.zeros(3) for _ in Signals._fields))
    for is_first in (np.ones(3, bool), np.array([False, True, False])):
        decision, _ = act_all(None, signals, [""] * 3, is_first)
    assert decision.action.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_only_successes_are_kept_in_their_quotas(demos):
    assert [episode.noise_scale for episode in demos.episodes] == [0.0] * 4 + [0.5] * 6
    assert all(episode.success and episode.source == "expert" for episode in demos.episodes)
    seeds = [episode.seed for episode in demos.episodes]
    assert [episode.attempt for episode in demos.episodes] == [seed - DEMO_SEEDS for seed in seeds]
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
    assert dataset.manifest.progress == demos.manifest.progress
    _assert_same_data(dataset, demos, assert_same)


def test_the_number_of_environments_makes_no_difference(demos, tmp_path):
    dataset = _collect(tmp_path, env=toy.ToyPush(5))
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
    assert _collected(demos.directory).num_episodes == 10
    for changes in ({"num_demos": 9}, {"noise_scales": ((0.0, 40), (0.5, 60))}):
        assert _collected(demos.directory, dataclasses.replace(CONFIG, **changes)) is not None
    assert _collected(demos.directory, dataclasses.replace(CONFIG, num_demos=11)) is None
    assert _collected(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"seed": 1}, {}, "settings.seed is 0, not 1"),
        (
            {"noise_scales": ((0.0, 1.0),)},
            {},
            r"settings.noise_scales is \[\[0.0, 0.4\], \[0.5, 0.6\]\], not \[\[0.0, 1.0\]\]",
        ),
        ({"reproducible": True}, {}, "settings.reproducible is False, not True"),
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
        _collected(demos.directory, dataclasses.replace(CONFIG, **changes), **arguments)


def test_what_is_idle_is_measured_by_the_largest_command(tmp_path):
    action_scale = (0.05, 0.05, 0.05, 0.35, 0.35, 0.35, 1.0)
    still = Expert(lambda: None, lambda signals, memory: (np.zeros(2, np.float32), memory), action_scale)
    with pytest.raises(DatasetError, match="succeeded in only 0"):
        _collect(tmp_path, DemosConfig(num_demos=1, max_attempts=1), expert=still, settings={"jitter": "none"})
    manifest = Dataset(tmp_path).manifest
    assert manifest.filters == {"idle": {"translation": 0.0005, "rotation": 0.021}}
    assert manifest.settings["jitter"] == "none" and manifest.settings["horizon"] == toy.HORIZON
    kept = DemosConfig(num_demos=1, idle_translation=-1.0)
    with pytest.raises(DatasetError, match="its filters.idle is {'translation': 0.0005, 'rotation': 0.021}, not None"):
        _collect(tmp_path, kept, expert=still, settings={"jitter": "none"})


def test_an_expert_that_fails_is_given_up_on(tmp_path):
    config = DemosConfig(num_demos=2, idle_translation=-1.0, max_attempts=3)
    with pytest.raises(DatasetError, match="succeeded in only 0 of 6 episodes of ToyPush-v0, and 2 were asked for"):
        _collect(tmp_path, config, expert=toy_expert(speed=0.0))


def test_demonstrations_feed_batches(demos):
    def tokenize(instructions, state):
        return np.zeros((len(state), 3), np.int32), np.ones((len(state), 3), bool)

    batches = imitation_batches(demos, tokenize, batch_size=16, seed=0)
    batch = next(batches)
    batches.close()
    assert batch.action.shape == (16, 2) and batch.observation.tokens.shape == (16, 3)


def test_demonstrations_linger_after_success(tmp_path):
    config = dataclasses.replace(CONFIG, num_demos=3, noise_scales=((0.0, 1.0),))
    short, long = _collect(tmp_path / "0", config), _collect(tmp_path / "2", dataclasses.replace(config, linger=2))
    assert "linger" not in short.manifest.settings and long.manifest.settings["linger"] == 2
    for i in range(3):
        (before, row), (after, longer) = short.episode(i), long.episode(i)
        assert longer["length"] == min(row["length"] + 2, toy.HORIZON) and row["success"] and longer["success"]
        np.testing.assert_array_equal(after.action[: row["length"]], before.action)
    # The further steps are imitated, and a data set without them is not continued with them.
    num_more = sum(e.length for e in long.episodes) - sum(e.length for e in short.episodes)
    assert len(imitation_frames(long)) == len(imitation_frames(short)) + num_more
    with pytest.raises(DatasetError, match="its settings.linger is None, not 2"):
        _collect(tmp_path / "0", dataclasses.replace(config, linger=2))


def test_a_run_that_has_no_seeds_left_is_told():
    assert list(take_seeds(PPO_SEEDS, 3, 5, 2)) == [first_seed(PPO_SEEDS, 3) + 5, first_seed(PPO_SEEDS, 3) + 6]
    assert take_seeds(PPO_SEEDS, 3, SLOT_SIZE - 2, 2)[-1] + 1 == first_seed(PPO_SEEDS, 4)
    with pytest.raises(ConfigError, match="seed: got episodes 999,999 to 1,000,001 of run seed 3, expected at most"):
        take_seeds(PPO_SEEDS, 3, SLOT_SIZE - 1, 2)


# ---- Simulators that die ---------------------------------------------------------------------------------------------


def test_a_simulator_that_dies_changes_no_data_set(demos, tmp_path, assert_same, caplog):
    env = MortalToy(3, dies_in={5, 9, 20})
    _assert_same_data(_collect(tmp_path, env=env), demos, assert_same)
    assert not env.dies_in and "of 4 episodes were lost with a simulator; running" in caplog.text
    assert Dataset(tmp_path).manifest.progress["num_dropped"] == 0


def test_an_episode_that_always_kills_its_simulator_is_given_up(demos, tmp_path, caplog):
    killer = demos.episodes[1].seed
    dataset = _collect(tmp_path, env=MortalToy(3, killers={killer}))
    assert caplog.text.count("1 of 4 episodes were lost") == MAX_TRIES and "giving up after 3 tries" in caplog.text
    assert dataset.num_episodes == 10 and dataset.manifest.progress["num_dropped"] == 1
    assert killer not in {episode.seed for episode in dataset.episodes}
    assert [episode.attempt for episode in dataset.episodes] == [e.seed - DEMO_SEEDS for e in dataset.episodes]


# ---- Damaged shards --------------------------------------------------------------------------------------------------


def test_damage_is_found_before_anything_is_simulated(demos, tmp_path):
    shutil.copytree(demos.directory, tmp_path, dirs_exist_ok=True)
    _damage(tmp_path)
    larger = dataclasses.replace(CONFIG, num_demos=12)
    for collect in (_collected, lambda *arguments: _collect(*arguments, env=MortalToy(3, is_asleep=True))):
        for config in (CONFIG, larger):
            with pytest.raises(DamagedShardError, match=r"frames-00000.* is damaged: .*skip_broken=True reads"):
                collect(tmp_path, config)


def test_statistics_are_of_what_can_be_read(demos, tmp_path, caplog):
    shutil.copytree(demos.directory, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "norm_stats.json").read_text()
    mend = _damage(tmp_path)
    dataset = _collected(tmp_path, skip_broken=True)
    assert dataset.num_skipped > 0 and dataset.num_episodes == 10 - dataset.num_skipped
    assert f"leaving out its {dataset.num_skipped} episodes" in caplog.text
    assert f'"num_trajectories": {dataset.num_episodes}' in (tmp_path / "norm_stats.json").read_text()
    mend()
    # What was written of a part is not taken for what is true of the whole.
    assert _collected(tmp_path).num_skipped == 0
    assert (tmp_path / "norm_stats.json").read_text() == whole


def test_a_damaged_data_set_grows_if_asked_to(demos, tmp_path):
    shutil.copytree(demos.directory, tmp_path, dirs_exist_ok=True)
    _damage(tmp_path)
    dataset = _collect(tmp_path, dataclasses.replace(CONFIG, num_demos=12), skip_broken=True)
    assert dataset.num_episodes == 12 - dataset.num_skipped
    assert f'"num_trajectories": {dataset.num_episodes}' in (tmp_path / "norm_stats.json").read_text()


def test_nothing_left_to_read_is_an_error(tmp_path):
    config = DemosConfig(num_demos=2, idle_translation=-1.0)
    _collect(tmp_path, config)
    _damage(tmp_path)
    with pytest.raises(DatasetError, match="no frame to imitate in 0 episodes"):
        _collected(tmp_path, config, skip_broken=True)
