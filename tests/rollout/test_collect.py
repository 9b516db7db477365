"""Promises of the collector, against a simulator whose every state says which episode and step it belongs to."""

import tracemalloc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.envs.base import EnvStep, SimulatorError
from stare_jax.logging import Clock
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.normalize import identity_stats
from stare_jax.models.policy import Decision
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes, get_episode
from stare_jax.types import Observation, Signals


class Script(NamedTuple):
    """Events in the episode of a seed."""

    success_at: int | None = None
    dies_at: int | None = None


class ScriptedEnv:
    """Observes [seed, t]; succeeds and dies by the script; writes every step into the same arrays.

    An image has the colour t, or 255 if nobody was to look at it.
    """

    env_id, horizon, action_dim = "Scripted-v0", 4, 2

    def __init__(self, num_envs, scripts):
        self.num_envs, self._scripts = num_envs, scripts
        self._seed, self._t = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self._state = np.zeros((num_envs, 2), np.float32)
        self._image = np.zeros((num_envs, 2, 2, 3), np.uint8)
        self._is_dead = np.zeros(num_envs, bool)
        self.resets, self.executed, self.reproducible, self.num_drawn = [], [], set(), 0

    @property
    def instructions(self):
        return [f"do {seed}" for seed in self._seed]

    def reset(self, seeds, *, reproducible=False):
        assert len(seeds) == self.num_envs
        self._is_drawn = np.ones(self.num_envs, bool)
        return self._advance(None, dict(enumerate(seeds)), reproducible)

    def send(self, action, reset_seeds=None, *, reproducible=False, is_idle=None, is_drawn=None, next_seeds=None):
        assert is_drawn.shape == (self.num_envs,)
        self._is_drawn = is_drawn | np.isin(np.arange(self.num_envs), list(reset_seeds or ()))
        assert action.dtype == np.float32 and action.shape == (self.num_envs, 2)
        self._sent = action, reset_seeds or {}, reproducible, is_idle

    def receive(self):
        return self._advance(*self._sent)

    def _advance(self, action, reset_seeds, reproducible, is_idle=None):
        self.reproducible.add(reproducible)
        for i in range(self.num_envs):
            if i in reset_seeds:
                self._seed[i], self._t[i], self._is_dead[i] = reset_seeds[i], 0, False
                self.resets.append(reset_seeds[i])
                continue
            assert not self._is_dead[i], "an environment that died was not reset"
            if is_idle is not None and is_idle[i]:
                continue
            self.executed.append((int(self._seed[i]), int(self._t[i]), *action[i].tolist()))
            self._t[i] += 1
        script = [self._scripts.get(int(seed), Script()) for seed in self._seed]
        success = np.array(
            [s.success_at is not None and t >= s.success_at for s, t in zip(script, self._t, strict=True)]
        )
        self._is_dead = np.array([s.dies_at == t for s, t in zip(script, self._t, strict=True)])
        self._state[:] = np.stack([self._seed, self._t], axis=1)
        self._image[:] = np.where(self._is_drawn, self._t, 255)[:, None, None, None]
        self.num_drawn += self._is_drawn.sum()
        self._state[self._is_dead] = np.nan
        zeros = [np.zeros((self.num_envs, *shape), np.float32) for shape in [(3,), (4,)] * 2 + [(3,), (3,), (4,)]]
        no = np.zeros(self.num_envs, bool)
        signals = Signals(*zeros, is_grasped=no, is_contact=no, success=success, support_z=np.zeros(self.num_envs))
        no_tokens = np.zeros((self.num_envs, 0), np.int32)
        observation = Observation({"camera": self._image}, self._state, no_tokens, no_tokens.astype(bool))
        return EnvStep(observation, signals, ~self._is_dead)

    def close(self):
        pass


def scripted_act(observation, signals, instructions, is_first):
    """Acts [seed, t] / 8 and values a state at seed + t / 100; also checks what it is told."""
    seed, t = observation.state.T
    known = seed > 0
    assert np.isfinite(observation.state).all(), "actors are shown what dead environments have left behind"
    assert [instructions[i] for i in np.flatnonzero(known)] == [f"do {int(s)}" for s in seed[known]]
    assert not np.any(is_first[known] & (t[known] > 0))
    tokens = observation.state.astype(np.int32)
    decision = Decision(observation.state / 8, {"tokens": tokens}, -t, (seed + t / 100).astype(np.float32))
    return decision, observation._replace(tokens=tokens, token_mask=np.ones_like(tokens, bool))


class ScriptedEnvOnDevice(ScriptedEnv):
    """Its states are JAX arrays, and its actions have to be."""

    def send(self, action, reset_seeds=None, **options):
        assert isinstance(action, jax.Array)
        super().send(np.asarray(action), reset_seeds, **options)

    def _advance(self, action, reset_seeds, reproducible, is_idle=None):
        state = super()._advance(action, reset_seeds, reproducible, is_idle)
        images, signals = jax.tree.map(jnp.array, (state.observation.images, state.signals))
        self.last_image = images["camera"]
        return EnvStep(
            state.observation._replace(images=images, state=jnp.array(state.observation.state)), signals, state.alive
        )


SEEDS = [10, 11, 12, 13, 14, 15, 16]
SCRIPTS = {10: Script(success_at=1), 12: Script(success_at=3), 13: Script(success_at=4), 15: Script(success_at=2)}


@pytest.mark.parametrize("num_envs", [1, 3, 9])
def test_every_seed_is_one_whole_episode_in_its_own_row(num_envs):
    env = ScriptedEnv(num_envs, SCRIPTS)
    rollout = collect_episodes(env, scripted_act, SEEDS, stop_at_success=True, reproducible=True)
    trajectory = rollout.trajectory
    # Success after 1, 3, 4 and 2 actions; the others end at the horizon of 4, and no further episode is begun.
    lengths = np.array([1, 4, 3, 4, 4, 2, 4])
    np.testing.assert_array_equal(trajectory.valid, np.arange(5) <= lengths[:, None])
    assert rollout.num_steps == lengths.sum() and rollout.num_dropped == 0 and rollout.is_complete
    assert rollout.instructions == tuple(f"do {seed}" for seed in SEEDS)
    for e, seed in enumerate(SEEDS):
        n = lengths[e]
        expected = np.stack([np.full(n + 1, seed), np.arange(n + 1)], axis=1)
        np.testing.assert_array_equal(trajectory.observation.state[e, : n + 1], expected)
        np.testing.assert_array_equal(trajectory.observation.tokens[e, : n + 1], expected)
        np.testing.assert_array_equal(trajectory.observation.images["camera"][e, : n + 1, 0, 0, 0], np.arange(n + 1))
        np.testing.assert_array_equal(trajectory.action[e, :n], expected[:n] / 8)
        np.testing.assert_array_equal(trajectory.decisions.logp[e, :n], -np.arange(n))
        # The value of the state that the last action led to is there, for bootstrapping.
        np.testing.assert_allclose(trajectory.decisions.value[e, : n + 1], seed + np.arange(n + 1) / 100, rtol=1e-6)
        assert trajectory.signals.success[e, n] == (seed in SCRIPTS)
        for leaf in (
            trajectory.observation.state[e, n + 1 :],
            trajectory.action[e, n:],
            trajectory.decisions.logp[e, n:],
        ):
            assert not leaf.any()
    assert sorted(set(env.resets)) == SEEDS and len(env.resets) == max(num_envs, len(SEEDS))
    assert env.reproducible == {True}


def test_a_collection_begins_with_a_reproducible_reset_of_every_environment_and_every_spare():
    calls = []

    class Noting(ScriptedEnv):
        def _advance(self, action, reset_seeds, reproducible, is_idle=None):
            calls.append((sorted(reset_seeds.values()), reproducible))
            return super()._advance(action, reset_seeds, reproducible, is_idle)

    for _ in range(2):
        collect_episodes(Noting(3, SCRIPTS), scripted_act, SEEDS, stop_at_success=True)
    begin, *later = calls[: len(calls) // 2]
    assert begin == ([10, 11, 12], True)
    assert later[0] == ([], True)  # where spare simulators begin
    assert {reproducible for _, reproducible in later[1:]} == {False} and any(seeds for seeds, _ in later[1:])
    assert calls[len(calls) // 2 :] == [begin, *later]


@pytest.mark.parametrize("where", ["state", "signal", "action"])
def test_what_is_not_finite_ends_a_collection_and_is_named(where):
    class Diverging(ScriptedEnv):
        def _advance(self, *arguments):
            state = super()._advance(*arguments)
            row = (self._seed == 300_000_011) & (self._t == 2)
            if where == "state":
                state.observation.state[row] = np.nan
            elif where == "signal":
                state.signals.obj_pos[row] = np.inf
            return state

    def act(observation, signals, instructions, is_first):
        action = np.zeros((3, 2), np.float32)
        action[observation.state[:, 1] == 2] = np.nan if where == "action" else 0
        return Decision(action), observation

    name = {"state": "observation.state", "signal": "signals.obj_pos", "action": "action"}[where]
    message = rf"ppo: {name} of seed 3000000\d\d after 2 actions \(environment \d, host \S+\): got .*(nan|inf)"
    with pytest.raises(FloatingPointError, match=message):
        collect_episodes(Diverging(3, {}), act, range(300_000_010, 300_000_013), stop_at_success=True)


@pytest.mark.parametrize("num_envs", [1, 3, 9])
@pytest.mark.parametrize("options", [{}, {"max_steps": 11}], ids=["whole episodes", "steps"])
def test_environments_without_an_episode_are_not_stepped(num_envs, options):
    env = ScriptedEnv(num_envs, SCRIPTS)
    rollout = collect_episodes(env, scripted_act, SEEDS, stop_at_success=True, **options)
    assert len(env.executed) == rollout.num_steps  # the others have done nothing


def test_what_is_on_a_device_stays_there_between_simulator_and_policy():
    host, device = ScriptedEnv(3, SCRIPTS), ScriptedEnvOnDevice(3, SCRIPTS)

    def act_on_device(observation, signals, instructions, is_first):
        assert observation.images["camera"] is device.last_image
        decision, seen = scripted_act(jax.device_get(observation), signals, instructions, is_first)
        return jax.tree.map(jnp.array, decision), observation._replace(tokens=seen.tokens, token_mask=seen.token_mask)

    expected = collect_episodes(host, scripted_act, SEEDS, stop_at_success=True)
    rollout = collect_episodes(device, act_on_device, SEEDS, stop_at_success=True)
    for leaf, other in zip(*map(jax.tree.leaves, (rollout.trajectory, expected.trajectory)), strict=True):
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, other)
    assert device.executed == host.executed and device.resets == host.resets


def test_success_does_not_end_an_episode_that_is_to_run_to_the_horizon():
    rollout = collect_episodes(ScriptedEnv(2, SCRIPTS), scripted_act, SEEDS, stop_at_success=False)
    assert rollout.trajectory.valid.all()
    np.testing.assert_array_equal(rollout.trajectory.signals.success[0], [False, True, True, True, True])


def test_a_state_that_succeeds_before_any_action_is_still_acted_in():
    rollout = collect_episodes(ScriptedEnv(1, {5: Script(success_at=0)}), scripted_act, [5], stop_at_success=True)
    np.testing.assert_array_equal(rollout.trajectory.valid[0], [True, True, False, False, False])


class RestartingEnv(ScriptedEnv):
    """A simulator that died starts again over three calls, in which resetting it has no effect."""

    def __init__(self, num_envs, scripts):
        super().__init__(num_envs, scripts)
        self._calls_left = np.zeros(num_envs, int)

    def _advance(self, action, reset_seeds, reproducible, is_idle=None):
        is_starting = self._calls_left > 0
        self._calls_left = np.maximum(self._calls_left - 1, 0)
        state = super()._advance(action, reset_seeds, reproducible, is_idle)
        self._calls_left[self._is_dead & ~is_starting] = 3
        self._is_dead |= is_starting
        self._state[self._is_dead] = np.nan
        return state._replace(alive=~self._is_dead)


def test_a_simulator_that_starts_again_is_handed_no_episode_to_lose():
    env = RestartingEnv(2, SCRIPTS | {11: Script(dies_at=1)})
    rollout = collect_episodes(env, scripted_act, SEEDS, stop_at_success=True)
    assert rollout.num_dropped == 1 and rollout.is_complete
    lengths = np.array([1, -1, 3, 4, 4, 2, 4])  # of the lost episode not even the first state is left
    np.testing.assert_array_equal(rollout.trajectory.valid, np.arange(5) <= lengths[:, None])


class LosingEnv(ScriptedEnv):
    """All of its simulators die in the third call and never come back."""

    def __init__(self, num_envs, scripts):
        super().__init__(num_envs, scripts)
        self.num_calls = 0

    def _advance(self, action, reset_seeds, reproducible, is_idle=None):
        state = super()._advance(action, reset_seeds, reproducible, is_idle)
        self.num_calls += 1
        self._is_dead[:] = self.num_calls > 2
        return state._replace(alive=~self._is_dead)


def test_simulators_that_never_come_back_are_not_waited_for_without_end():
    env = LosingEnv(2, SCRIPTS)
    message = "Scripted-v0: none of 2 environments came back alive in 101 calls in a row; 5 of 7 episodes wait to begin"
    with pytest.raises(SimulatorError, match=message):
        collect_episodes(env, scripted_act, SEEDS, stop_at_success=False)
    assert env.num_calls == 2 + 101


def test_simulators_that_are_lost_while_no_episode_waits_end_the_collection():
    rollout = collect_episodes(LosingEnv(2, {}), scripted_act, SEEDS[:2], stop_at_success=False)
    assert rollout.num_dropped == 2 and rollout.is_complete


@pytest.mark.parametrize("dies_at", [0, 1, 4])
def test_the_episode_of_a_dead_simulator_is_dropped_and_counted(dies_at):
    scripts = SCRIPTS | {11: Script(dies_at=dies_at), 16: Script(dies_at=2)}
    over = {}
    rollout = collect_episodes(
        ScriptedEnv(2, scripts),
        scripted_act,
        SEEDS,
        stop_at_success=True,
        on_episode=lambda e, row: over.setdefault(e, row.valid.sum()),
    )
    assert rollout.num_dropped == 2 and rollout.is_complete
    assert rollout.num_steps == 1 + dies_at + 3 + 4 + 4 + 2 + 2
    np.testing.assert_array_equal(rollout.trajectory.valid.sum(axis=1), [2, 0, 4, 5, 5, 3, 0])
    assert over == {0: 2, 1: 0, 2: 4, 3: 5, 4: 5, 5: 3, 6: 0}
    for leaf in jax.tree.leaves(rollout.trajectory):
        assert np.isfinite(leaf).all() and not leaf[1].any() and not leaf[6].any()


def test_a_perturbed_action_is_executed_and_the_clean_one_recorded():
    env = ScriptedEnv(2, SCRIPTS)
    seen_first = []

    def perturb(action, is_first):
        seen_first.append(is_first.copy())
        return action + 1.0

    rollout = collect_episodes(env, scripted_act, SEEDS[:3], stop_at_success=True, perturb=perturb)
    np.testing.assert_array_equal(rollout.trajectory.action[2, :3], [[12 / 8, 0], [12 / 8, 1 / 8], [12 / 8, 2 / 8]])
    assert (12, 1, 12 / 8 + 1, 1 / 8 + 1) in env.executed
    np.testing.assert_array_equal(seen_first[0], [True, True])
    np.testing.assert_array_equal(seen_first[1], [False, False])


def test_a_collection_that_is_stopped_keeps_finished_episodes_alone():
    ticks = []
    rollout = collect_episodes(
        ScriptedEnv(2, SCRIPTS),
        scripted_act,
        SEEDS,
        stop_at_success=True,
        should_stop=lambda: len(ticks) > 3 or ticks.append(0),
    )
    # Ticks 0 .. 3: seed 10 succeeds at once, 11 runs to the horizon and is over at tick 4, 12 is still under way.
    assert not rollout.is_complete
    np.testing.assert_array_equal(rollout.trajectory.valid.any(axis=1), [1, 1, 0, 0, 0, 0, 0])
    assert not rollout.trajectory.observation.state[2].any()


@pytest.mark.parametrize(
    ("num_envs", "max_steps", "lengths", "num_cut"),
    [
        # One after the other: 1 + 4 + 3 actions, then 2 of the 4 that seed 13 needs.
        (1, 10, [1, 4, 3, 2], 1),
        # An episode that is over with the last action is not cut, and no other is begun.
        (1, 8, [1, 4, 3], 0),
        # The turn of the third environment does not come; seed 10 succeeds with its one action.
        (3, 2, [1, 1, 0], 1),
        # Ticks of 3, then 2 beside the reset of seed 10's, then 3; of the last tick one action is left.
        (3, 9, [1, 3, 3, 2], 2),
        # Seeds can run out before the steps do.
        (3, 99, [1, 4, 3, 4, 4, 2, 4], 0),
    ],
)
def test_a_batch_of_a_fixed_number_of_steps_cuts_what_is_under_way(num_envs, max_steps, lengths, num_cut):
    env, over = ScriptedEnv(num_envs, SCRIPTS), {}
    rollout = collect_episodes(
        env,
        scripted_act,
        SEEDS,
        stop_at_success=True,
        max_steps=max_steps,
        on_episode=lambda e, row: over.setdefault(e, row.valid[1:].sum()),
    )
    trajectory, lengths = rollout.trajectory, np.array(lengths)
    assert rollout.num_steps == lengths.sum() == min(max_steps, 22)
    assert rollout.is_complete and rollout.num_dropped == 0
    np.testing.assert_array_equal(trajectory.valid, (np.arange(5) <= lengths[:, None]) & (lengths[:, None] > 0))
    assert over == dict(enumerate(lengths)) and len(rollout.instructions) == len(lengths)
    is_over = trajectory.valid[:, -1] | (trajectory.signals.success & trajectory.valid).any(axis=1)
    assert (trajectory.valid.any(axis=1) & ~is_over).sum() == num_cut
    for e, (seed, n) in enumerate(zip(SEEDS, lengths, strict=False)):
        if n:  # the state that the last action led to, and its value
            np.testing.assert_array_equal(trajectory.observation.state[e, n], [seed, n])
            np.testing.assert_allclose(trajectory.decisions.value[e, n], seed + n / 100, rtol=1e-6)
        for leaf in (trajectory.observation.state[e, n + (n > 0) :], trajectory.action[e, n:]):
            assert not leaf.any()
    assert max(env.resets) == SEEDS[len(lengths) - 1]


@pytest.mark.parametrize("last_poll", range(1, 8))
def test_a_batch_of_steps_can_be_stopped_at_any_tick(last_poll):
    polls = []
    rollout = collect_episodes(
        ScriptedEnv(3, SCRIPTS),
        scripted_act,
        SEEDS,
        stop_at_success=True,
        max_steps=40,
        should_stop=lambda: polls.append(0) or len(polls) == last_poll,
    )
    assert not rollout.is_complete and len(rollout.instructions) == len(rollout.trajectory.valid) <= len(SEEDS)
    lengths = rollout.trajectory.valid[:, 1:].sum(axis=1)
    succeeded = (rollout.trajectory.signals.success & rollout.trajectory.valid).any(axis=1)
    # What was under way is not there.
    np.testing.assert_array_equal(lengths > 0, succeeded | (lengths == ScriptedEnv.horizon))


def test_a_dead_simulator_in_a_batch_of_steps_is_dropped_and_its_steps_count():
    env = ScriptedEnv(2, {11: Script(dies_at=2)})
    rollout = collect_episodes(env, scripted_act, SEEDS, stop_at_success=True, max_steps=7)
    # Ticks of 2, 2 and, as seed 11 has died and 12 is reset, 1; then of 2.
    np.testing.assert_array_equal(rollout.trajectory.valid[:, 1:].sum(axis=1), [4, 0, 1])
    assert (rollout.num_steps, rollout.num_dropped) == (7, 1)
    with pytest.raises(ValueError, match="max_steps: got 0, expected >= 1 or None"):
        collect_episodes(env, scripted_act, SEEDS, stop_at_success=True, max_steps=0)


def test_time_is_charged_to_simulator_and_policy_and_images_can_be_left_out():
    clock = Clock()
    rollout = collect_episodes(
        ScriptedEnv(2, SCRIPTS), scripted_act, SEEDS, stop_at_success=True, clock=clock, keep_images=False
    )
    assert {"env", "policy"} <= set(clock.seconds()) and rollout.trajectory.observation.images == {}


def test_images_are_kept_of_the_episodes_that_a_function_chooses():
    asked, shown = {}, {}

    def keep(e, episode):
        images = episode.observation.images["camera"]
        asked[e] = images[:, 0, 0, 0].tolist()
        return bool((episode.signals.success & episode.valid).any())

    def note(e, episode):
        shown[e] = list(episode.observation.images)

    scripts = SCRIPTS | {11: Script(dies_at=2)}
    arguments = {"stop_at_success": True, "on_episode": note}
    chosen = collect_episodes(ScriptedEnv(2, scripts), scripted_act, SEEDS, keep_images=keep, **arguments)
    every = collect_episodes(ScriptedEnv(2, scripts), scripted_act, SEEDS, **arguments)
    # One that was lost is not asked about.
    assert sorted(asked) == [0, 2, 3, 4, 5, 6] and asked[0] == [0, 1, 0, 0, 0] and asked[4] == [0, 1, 2, 3, 4]
    assert sorted(chosen.images) == [0, 2, 3, 5] and shown[1] == ["camera"]
    assert chosen.trajectory.observation.images == {} and every.images is None
    for e in range(len(SEEDS)):
        images = get_episode(chosen, e).observation.images
        expected = get_episode(every, e)
        assert set(images) == ({"camera"} if e in chosen.images else set())
        for name in images:
            np.testing.assert_array_equal(images[name], expected.observation.images[name])
        for leaf, other in zip(
            jax.tree.leaves(get_episode(chosen, e)._replace(observation=())),
            jax.tree.leaves(expected._replace(observation=())),
            strict=True,
        ):
            np.testing.assert_array_equal(leaf, other)


class LargeImages(ScriptedEnv):
    """Images of a mebibyte each."""

    def __init__(self, num_envs, scripts):
        super().__init__(num_envs, scripts)
        self._image = np.zeros((num_envs, 512, 683, 3), np.uint8)


def test_memory_is_that_of_the_images_under_way_and_of_those_kept():
    seeds, num_kept, num_envs = range(60), 3, 2
    kept = []

    def keep(e, episode):
        if len(kept) < num_kept:
            kept.append(e)
        return e in kept

    tracemalloc.start()
    arguments = {"stop_at_success": False, "keep_images": keep}
    rollout = collect_episodes(LargeImages(num_envs, {}), scripted_act, seeds, **arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rollout.images) == num_kept
    # Five states of a mebibyte an episode, a batch that is copied here and there; all 60 would be 300.
    assert peak < ((num_kept + num_envs) * 5 + 8 * num_envs) * 2**20


def test_an_episode_lingers_after_its_success():
    scripts = {10: Script(success_at=1), 11: Script(success_at=3), 12: Script()}
    rollout = collect_episodes(ScriptedEnv(2, scripts), scripted_act, [10, 11, 12], stop_at_success=True, linger=2)
    # Two actions more after the success at 1; after that at 3 the horizon leaves one.
    np.testing.assert_array_equal(rollout.trajectory.valid.sum(axis=1), [4, 5, 5])
    assert rollout.trajectory.signals.success[0, 1:4].all() and rollout.trajectory.decisions.valid[0].sum() == 3
    for arguments in ({"stop_at_success": True, "linger": -1}, {"stop_at_success": False, "linger": 1}):
        with pytest.raises(ValueError, match=r"linger: got (-1|1), expected >= 0, and 0 without stop_at_success"):
            collect_episodes(ScriptedEnv(2, scripts), scripted_act, [10], **arguments)


class Flickers(ScriptedEnv):
    """Succeeds in its second state and in no other."""

    def _advance(self, action, reset_seeds, reproducible, is_idle=None):
        state = super()._advance(action, reset_seeds, reproducible, is_idle)
        return state._replace(signals=state.signals._replace(success=self._t == 1))


def test_lingering_begins_with_the_first_success_and_ends_whatever_comes_after():
    rollout = collect_episodes(Flickers(1, {}), scripted_act, [10, 11], stop_at_success=True, linger=2)
    np.testing.assert_array_equal(rollout.trajectory.valid.sum(axis=1), [4, 4])


def test_actors_that_are_no_policy_leave_no_decisions():
    def act(observation, signals, instructions, is_first):
        return Decision(observation.state), observation

    rollout = collect_episodes(ScriptedEnv(2, SCRIPTS), act, SEEDS, stop_at_success=True)
    assert rollout.trajectory.decisions is None and rollout.trajectory.valid.any(axis=1).all()


def test_no_seeds_is_an_error():
    with pytest.raises(ValueError, match="seeds: got none"):
        collect_episodes(ScriptedEnv(2, {}), scripted_act, [], stop_at_success=True)


def test_a_policy_acts_reproducibly_and_is_traced_once_for_all_parameters():
    policy = make_mlp(MLPConfig(state_dim=2, action_dim=2), identity_stats(2, 2))
    traces = []

    def counting_sample(params, observation, key, *, temperature):
        traces.append(temperature)
        return policy.sample(params, observation, key, temperature=temperature)

    counting = policy._replace(sample=counting_sample)
    env = ScriptedEnv(3, {})

    def collect(params, key, temperature=1.0):
        act = policy_act(counting, params, jax.random.key(key), temperature=temperature)
        return collect_episodes(env, act, SEEDS, stop_at_success=True).trajectory

    params = policy.init(jax.random.key(0))
    first, again, other = collect(params, 1), collect(params, 1), collect(params, 2)
    bins, of_other = first.decisions.trace["bins"], other.decisions.trace["bins"]
    np.testing.assert_array_equal(bins, again.decisions.trace["bins"])
    assert (bins != of_other).any()
    # Ticks differ, so equal states are acted in differently.
    assert len(np.unique(bins[:, :, 0])) > 3
    greedy = collect(policy.init(jax.random.key(1)), 1, temperature=0.0)
    np.testing.assert_array_equal(greedy.action, collect(policy.init(jax.random.key(1)), 2, temperature=0.0).action)
    assert len(traces) == 1

    # What is stored scores as it did when it was sampled.
    flat = jax.tree.map(lambda x: x[:, :-1].reshape(7 * 4, *x.shape[2:]), first.observation)
    score = policy.log_prob(params, flat, {"bins": bins.reshape(7 * 4, 2)})
    np.testing.assert_allclose(score.logp, first.decisions.logp.reshape(-1, 2), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ several tasks


class TwoTasksEnv(ScriptedEnv):
    """Of five environments two are of the first task and three of the second."""

    task_index = np.array([0, 1, 1, 0, 1])


@pytest.mark.parametrize("max_steps", [None, 17])
def test_an_environment_takes_episodes_of_its_own_task(max_steps):
    """Episodes of the first task succeed at once, so its environments need more of them, and each waits for nobody."""
    tasks = [0, 1] * 8
    seeds = list(range(100, 116))
    env = TwoTasksEnv(5, {seed: Script(success_at=1) for seed in seeds[::2]})
    seen = []

    def act(observation, signals, instructions, is_first):
        seen.append(observation.state[:, 0].astype(int).copy())
        return Decision(np.zeros((5, 2), np.float32)), observation

    rollout = collect_episodes(env, act, seeds, tasks=tasks, stop_at_success=True, max_steps=max_steps)
    for of_envs in seen:
        assert [(seed - 100) % 2 for seed in of_envs] == [0, 1, 1, 0, 1]
    assert rollout.task.tolist() == tasks[: len(rollout.task)]
    lengths = rollout.trajectory.valid.sum(axis=1) - 1
    begun = lengths >= 0
    assert rollout.trajectory.observation.state[begun, 0, 0].tolist() == np.array(seeds)[: len(begun)][begun].tolist()
    assert rollout.num_steps == lengths[begun].sum() == (max_steps or 8 * 1 + 8 * 4)
    if max_steps is None:
        assert lengths.tolist() == [1, 4] * 8
    else:  # one task is ahead of the other: its rows lie between those of episodes that have not begun
        assert not begun.all() and (lengths[begun & (rollout.task == 0)] == 1).all()
        assert [e for e, instruction in enumerate(rollout.instructions) if not instruction] == [7, 9]


def test_episodes_of_a_task_without_an_environment_are_refused():
    with pytest.raises(ValueError, match=r"tasks: got \[2\], expected tasks of environments: \[0, 1, 1, 0, 1\]"):
        collect_episodes(TwoTasksEnv(5, {}), scripted_act, [1, 2], tasks=[0, 2], stop_at_success=False)
