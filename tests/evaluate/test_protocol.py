import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from evaluated_toy import pusher

from stare_jax.envs import toy
from stare_jax.evaluate.episodes import measure
from stare_jax.evaluate.parts import split_into_parts
from stare_jax.evaluate.protocol import Conditions, EvalConfig, episode_seeds, evaluate, evaluate_act
from stare_jax.logging import Clock, Interrupted
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.types import Signals


@pytest.fixture(scope="module")
def policy():
    return make_mlp(MLPConfig(), toy.norm_stats())


@pytest.fixture(scope="module")
def params(policy):
    return jax.jit(policy.init)(jax.random.key(0))


def make_signals(distance, contact, success):
    """Signals `[E, T]` of the push family: an object at `distance` from its goal, the gripper beside it."""
    distance = np.asarray(distance, np.float32)
    shape = distance.shape
    goal = np.zeros((*shape, 3), np.float32)
    obj = goal + np.stack([distance, 0 * distance, 0 * distance], axis=-1)
    upright = np.broadcast_to(np.array([1, 0, 0, 0], np.float32), (*shape, 4))
    return Signals(
        tcp_pos=obj + np.array([0.0, 1.0, 0.0], np.float32),
        tcp_quat=upright,
        obj_pos=obj,
        obj_quat=upright,
        grasp_pos=obj,
        goal_pos=goal,
        goal_quat=upright,
        is_grasped=np.zeros(shape, bool),
        is_contact=np.asarray(contact, bool),
        success=np.asarray(success, bool),
        support_z=np.zeros(shape, np.float32),
    )


def test_measure_reads_hand_made_episodes(spec):
    # delta_goal of the toy task is 0.035. Contact completes reach and contact at once, so stage 1 is skipped.
    signals = make_signals(
        distance=[[0.2, 0.2, 0.1, 0.03, 0.02], [0.3, 0.3, 0.3, 0.3, 0.3], [0.4, 0.3, 0.2, 0.0, 0.0]],
        contact=[[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]],
        success=[[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
    )
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    episodes = measure(spec, signals, valid, [5, 6, 9])
    np.testing.assert_array_equal(episodes.seed, [5, 6, 9])
    np.testing.assert_array_equal(episodes.success_once, [True, False, False])
    np.testing.assert_array_equal(episodes.success_end, [False, False, False])
    np.testing.assert_array_equal(episodes.success_at, [3, 5, 5])
    np.testing.assert_array_equal(episodes.contacted, [True, False, True])
    np.testing.assert_array_equal(episodes.grasped, [False, False, False])
    np.testing.assert_array_equal(episodes.stage_reached, [3, 0, 2])
    np.testing.assert_array_equal(episodes.completed, [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(episodes.entered_at, [[0, 5, 1, 3], [0, 5, 5, 5], [0, 5, 1, 5]])
    np.testing.assert_array_equal(episodes.stage_len, [[1, 0, 2, 2], [5, 0, 0, 0], [1, 0, 2, 0]])
    np.testing.assert_array_equal(episodes.start, [0, 1, 2])


def test_measure_recognises_repeated_starts(spec):
    signals = make_signals(
        distance=[[0.2], [0.3], [0.20005], [0.3]], contact=np.zeros((4, 1)), success=np.zeros((4, 1))
    )
    episodes = measure(spec, signals, np.ones((4, 1), bool), range(4))
    np.testing.assert_array_equal(episodes.start, [0, 1, 0, 1])


def test_a_start_has_the_same_name_in_every_evaluation(spec):
    here = make_signals(distance=[[0.2], [0.3], [0.4]], contact=np.zeros((3, 1)), success=np.zeros((3, 1)))
    there = make_signals(distance=[[0.4], [0.2 + 2e-9]], contact=np.zeros((2, 1)), success=np.zeros((2, 1)))
    names = measure(spec, here, np.array([[True], [False], [True]]), range(3)).start_hash.tolist()
    others = measure(spec, there, np.ones((2, 1), bool), [7, 8]).start_hash.tolist()
    # A nanometre makes no difference, 10 cm do, and a lost episode has no name.
    assert names == [others[1], "", others[0]] and len(set(names)) == 3


def test_evaluate_runs_to_the_horizon_and_is_reproducible(spec, policy, params):
    config = EvalConfig(num_episodes=7, first_seed=40, num_videos=0)
    clock, conditions = Clock(), Conditions("ppo/3/ab", "cpu", "none")
    evaluation, films = evaluate(
        policy, params, toy.ToyPush(4), spec, config, clock=clock, conditions=conditions, key=jax.random.key(1)
    )
    again, _ = evaluate(policy, params, toy.ToyPush(4), spec, config, key=jax.random.key(9))
    assert evaluation.episodes.valid.all() and evaluation.info.num_steps == 7 * toy.HORIZON
    assert all(film.valid.all() and film.frames is None for film in films)
    np.testing.assert_array_equal(evaluation.episodes.seed, np.arange(40, 47))
    # Greedy, so that the key makes no difference.
    jax.tree.map(np.testing.assert_array_equal, evaluation.episodes, again.episodes)
    assert set(clock.seconds()) == {"env", "policy", "other"}
    assert evaluation.info[:4] == ("ToyPush-v0", spec.stage_names, toy.HORIZON, 0.0)
    assert evaluation.info[-6:] == ("cpu", "none", "ppo/3/ab", (), "", None)


def test_success_at_the_end_differs_from_success_at_any_step(spec, expert_act):
    """The expert at full speed pushes the block into the goal and, as nobody stops it, out again."""
    config = EvalConfig(num_episodes=20, num_videos=0)
    evaluation, _ = evaluate_act(lambda part: expert_act(1.0), toy.ToyPush(4), spec, config)
    assert evaluation.episodes.success_once.mean() > 0.8
    assert evaluation.episodes.success_end.sum() < evaluation.episodes.success_once.sum()


class Pictures(toy.ToyPush):
    """The toy with pictures that tell seed and step: the first pixel is the seed, the second the number of steps."""

    side = 16

    def reset(self, seeds, *, reproducible=False):
        self.seeds, self.t = np.array(seeds), np.zeros(len(seeds), int)
        return self._with_pictures(super().reset(seeds, reproducible=reproducible))

    def send(self, action, reset_seeds=None, **options):
        self.t += 1
        for i, seed in (reset_seeds or {}).items():
            self.seeds[i], self.t[i] = seed, 0
        super().send(action, reset_seeds, **options)

    def receive(self):
        return self._with_pictures(super().receive())

    def _with_pictures(self, state):
        frames = np.zeros((self.num_envs, self.side, self.side, 3), np.uint8)
        frames[:, 0, 0] = (self.seeds % 256)[:, None]
        frames[:, 0, 1] = self.t[:, None]
        return state._replace(observation=state.observation._replace(images={"wrist": 0 * frames, "base": frames}))


def check_films(films, seeds):
    for film in films:
        assert film.frames.shape == (toy.HORIZON + 1, 16, 16, 3)
        assert set(film.frames[:, 0, 0, 0].tolist()) == {seeds[film.episode] % 256}
        np.testing.assert_array_equal(film.frames[:, 0, 1, 0], np.arange(toy.HORIZON + 1))


@pytest.mark.parametrize("num_videos", [0, 1, 3])
def test_films_are_of_the_first_successes_and_failures(spec, num_videos):
    config = EvalConfig(num_episodes=30, num_videos=num_videos)
    evaluation, films = evaluate_act(lambda part: pusher(0.2), Pictures(4), spec, config)
    num_kept, success = max(1, num_videos), evaluation.episodes.success_once
    first = [np.flatnonzero(outcome)[:num_kept].tolist() for outcome in (success, ~success)]
    assert [film.episode for film in films] == sorted(sum(first, []))
    if num_videos:
        check_films(films, range(30))
    else:
        assert all(film.frames is None for film in films)


def test_memory_of_frames_does_not_grow_with_the_number_of_episodes(spec):
    """There is room for the pictures of 4 episodes under way and 4 films, and not for those of 48 episodes."""

    class Large(Pictures):
        side = 64

    episode = (toy.HORIZON + 1) * 64 * 64 * 3
    config = EvalConfig(num_episodes=48, num_videos=2)
    evaluate_act(lambda part: pusher(0.2), Large(4), spec, dataclasses.replace(config, num_episodes=8))  # compiles
    tracemalloc.start()
    _, films = evaluate_act(lambda part: pusher(0.2), Large(4), spec, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(films) == 4 and sum(film.frames.nbytes for film in films) == 4 * episode
    # The simulator has two cameras, whose pictures are recorded until an episode is over.
    assert peak < (2 * 4 + 4 + 2) * episode < 48 * episode / 3


def test_evaluate_can_be_interrupted(spec, expert_act):
    calls = iter(range(100))
    with pytest.raises(Interrupted, match="0 of 6 episodes"):
        evaluate_act(
            lambda part: expert_act(1.0),
            toy.ToyPush(4),
            spec,
            EvalConfig(num_episodes=6),
            should_stop=lambda: next(calls) > 5,
        )


def test_parts_are_whole_batches_of_about_a_tenth():
    assert split_into_parts(300, 8)[:2] == [range(32), range(32, 64)] and len(split_into_parts(300, 8)) == 10
    assert split_into_parts(300, 64) == [range(64), range(64, 128), range(128, 192), range(192, 256), range(256, 300)]
    assert split_into_parts(7, 4) == [range(4), range(4, 7)]
    assert split_into_parts(3, 4) == [range(3)]


class Stopped:
    """Counts the ticks of an evaluation and asks it to stop at one of them."""

    def __init__(self, at):
        self.num_calls, self.at = 0, at

    def __call__(self):
        self.num_calls += 1
        return self.num_calls == self.at


def test_an_evaluation_goes_on_where_it_was_stopped(spec, policy, params, tmp_path):
    """Sampled actions, so that every random number counts; stopped in the last episodes, and at the start."""
    config = EvalConfig(num_episodes=23, temperature=1.0, num_videos=2)
    conditions, key = Conditions("ppo/3/ab", "cpu", "none"), jax.random.key(3)

    def run(name, should_stop=None, env=None):
        return evaluate(
            policy,
            params,
            env or Pictures(2),
            spec,
            config,
            key=key,
            conditions=conditions,
            folder=tmp_path / name,
            should_stop=should_stop,
        )

    never = Stopped(at=0)
    whole, films = run("whole", never)
    for stops in ([never.num_calls - 1], [3, never.num_calls // 2, 40]):
        name = f"stopped {len(stops)}"
        for at in stops:
            with pytest.raises(Interrupted, match="are kept on disk"):
                run(name, Stopped(at))
        last = Stopped(at=0)
        evaluation, filmed = run(name, last)
        jax.tree.map(np.testing.assert_array_equal, evaluation.episodes, whole.episodes)
        assert evaluation.info._replace(wall_s=0.0) == whole.info._replace(wall_s=0.0)
        jax.tree.map(np.testing.assert_array_equal, filmed, films)
        check_films(filmed, range(23))
        # Stopped in the last of twelve parts, only that part is run again.
        assert last.num_calls < (never.num_calls / 6 if len(stops) == 1 else never.num_calls)


def test_results_of_other_weights_are_not_gone_on_with(spec, tmp_path):
    config, folder = EvalConfig(num_episodes=6, num_videos=1), tmp_path / "ppo.partial"

    def run(speed, checkpoint, should_stop=None, num_envs=2):
        conditions = Conditions(checkpoint, "cpu", "none")
        env = Pictures(num_envs)
        return evaluate_act(
            lambda part: pusher(speed), env, spec, config, conditions=conditions, folder=folder, should_stop=should_stop
        )

    with pytest.raises(Interrupted):
        run(0.0, "ppo/1/aa", Stopped(at=70))
    assert len(list(folder.glob("film_*.npz"))) == 1
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluation, films = run(0.9, "ppo/2/bb")
    # They are not deleted, and can be gone on with when they are moved back.
    aside = tmp_path / "set_aside" / "1" / "ppo.partial"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == files
    assert evaluation.episodes.success_once.all()
    (film,) = films
    assert (film.signals.success & film.valid).any()
    with pytest.raises(ValueError, match="conditions.checkpoint: got ''"):
        run(0.9, "")


class OneDies(Pictures):
    """The simulator of the second environment dies in some of its steps."""

    dies_in = (3,)
    num_calls = 0

    def receive(self):
        state = super().receive()
        self.num_calls += 1
        return state._replace(alive=np.array([True, self.num_calls not in self.dies_in, True, True]))


@pytest.mark.parametrize("depends_on_batch", [False, True])
def test_evaluate_runs_episodes_again_that_were_lost_with_a_simulator(spec, depends_on_batch):
    config = EvalConfig(num_episodes=7, num_videos=4)
    results = [
        evaluate_act(lambda part: pusher(0.2), env, spec, config, depends_on_batch=depends_on_batch)
        for env in (OneDies(4), Pictures(4))
    ]
    (evaluation, films), (expected, expected_films) = results
    assert evaluation.episodes.valid.all()
    jax.tree.map(np.testing.assert_array_equal, evaluation.episodes, expected.episodes)
    jax.tree.map(np.testing.assert_array_equal, films, expected_films)
    num_more = 3 + (3 * toy.HORIZON if depends_on_batch else 0)  # 3 of the lost episode; the others of its part
    assert evaluation.info.num_steps == expected.info.num_steps + num_more


def test_evaluate_gives_up_an_episode_that_kills_its_simulator(spec):
    class Always(OneDies):
        def receive(self):
            state = Pictures.receive(self)
            return state._replace(alive=(self.seeds != 1) | (self.t < 3))

    config = EvalConfig(num_episodes=7, num_videos=7)
    evaluation, films = evaluate_act(lambda part: pusher(0.2), Always(4), spec, config)
    np.testing.assert_array_equal(evaluation.episodes.valid, [True, False, True, True, True, True, True])
    assert evaluation.episodes.start_hash[1] == "" and [film.episode for film in films] == [0, 2, 3, 4, 5, 6]
    check_films(films, range(7))


def test_config_says_what_is_wrong():
    assert episode_seeds(EvalConfig(num_episodes=3, first_seed=7)) == [7, 8, 9]
    assert episode_seeds(EvalConfig(seeds=(4, 2))) == [4, 2]
    for arguments, message in [
        ({"num_episodes": -1}, "num_episodes: got -1"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"num_videos": -1}, "num_videos: got -1"),
        ({"seeds": (3, 3)}, "seeds: got repeated"),
        ({"first_seed": 100_000_000}, "seeds: got 100000000"),
    ]:
        with pytest.raises(ValueError, match=message):
            EvalConfig(**arguments)
