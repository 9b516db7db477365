"""Groups of environments that take turns: one decides while the simulators of another work."""

import jax
import numpy as np
import pytest
from test_collect import SCRIPTS, SEEDS, Script, ScriptedEnv, scripted_act
from test_collect_chunks import chunk_act

from stare_jax.envs import toy
from stare_jax.envs.groups import GroupedEnvs
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.policy import Decision
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes


class LoggingEnv(ScriptedEnv):
    """Writes down when it is sent for and received."""

    spare_of_env = None

    def __init__(self, num_envs, scripts, name="", log=None):
        super().__init__(num_envs, scripts)
        self.task_index, self.name, self.log = np.zeros(num_envs, int), name, [] if log is None else log

    def reset(self, seeds, *, reproducible=False):
        self._sent = None
        return super().reset(seeds, reproducible=reproducible)

    def send(self, *arguments, **options):
        assert self._sent is None, "it was sent for twice"
        super().send(*arguments, **options)
        self.log.append(f"send {self.name}")

    def receive(self):
        self.log.append(f"receive {self.name}")
        state = super().receive()
        self._sent = None
        return state


def grouped(sizes, scripts, log=None):
    return GroupedEnvs([LoggingEnv(size, scripts, name, log) for size, name in zip(sizes, "ab", strict=False)])


def assert_same(rollout, expected):
    for leaf, other in zip(jax.tree.leaves(rollout), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("sizes", [(1,), (2, 2), (1, 3), (9, 9)])
@pytest.mark.parametrize("chunk", [1, 3])
def test_actors_of_single_rows_give_the_same_episodes_in_any_groups(sizes, chunk):
    scripts = SCRIPTS | {14: Script(dies_at=2)}
    options = {"stop_at_success": True, "reproducible": True}
    acts = [chunk_act(chunk, []) if chunk > 1 else scripted_act for _ in range(2)]
    expected = collect_episodes(ScriptedEnv(3, scripts), acts[0], SEEDS, **options)
    rollout = collect_episodes(grouped(sizes, scripts), acts[1], SEEDS, in_turns=True, **options)
    assert_same(rollout, expected)
    assert rollout.num_dropped == 1 and rollout.is_complete


def test_one_group_decides_and_records_while_the_other_steps():
    log = []

    def act(*arguments):
        log.append("act")
        return scripted_act(*arguments)

    def note(e, episode):
        log.append(f"over {e}")

    collect_episodes(grouped((1, 1), {}, log), act, SEEDS[:2], stop_at_success=False, in_turns=True, on_episode=note)
    tick = ["receive a", "act", "send a", "receive b", "act", "send b"]
    ends = ["receive a", "act", "over 0", "receive b", "act", "over 1"]
    assert log == ["act", "send a", "act", "send b", *(3 * tick), *ends]
    # As a whole the environments are one batch; an episode is over for those who are told while others still step.
    log.clear()
    collect_episodes(
        grouped((1, 1), {10: Script(success_at=1)}, log), act, SEEDS[:2], stop_at_success=True, on_episode=note
    )
    sent, received = ["send a", "send b"], ["receive a", "receive b"]
    tick = [*received, "act", *sent]
    assert log == ["act", *sent, *received, "act", *sent, "over 0", *tick, *tick, *received, "act", "over 1"]


def test_one_group_plays_all_its_actions_while_the_decision_of_the_other_is_on_its_way():
    log = []
    act = chunk_act(2, [])

    def noted_act(*arguments):
        log.append("act")
        decision, seen = act(*arguments)
        return decision._replace(action=jax.numpy.asarray(decision.action)), seen

    collect_episodes(grouped((1, 1), {}, log), noted_act, SEEDS[:2], stop_at_success=False, in_turns=True)
    chunks = [["send x", "receive x", "send x", "receive x", "act"]] * 2  # of an episode; the last looks at its end
    assert log == ["act", "act", *[entry.replace("x", name) for chunk in chunks for name in "ab" for entry in chunk]]


def test_sampled_actions_follow_from_the_key_and_the_groups():
    policy = make_mlp(MLPConfig(hidden_dims=(16,), value_dims=(16,)), toy.norm_stats())
    params = policy.init(jax.random.key(0))

    def collect(sizes, temperature):
        act = policy_act(policy, params, jax.random.key(1), temperature=temperature)
        env = GroupedEnvs([toy.ToyPush(size) for size in sizes])
        return collect_episodes(env, act, range(9), stop_at_success=False, in_turns=True).trajectory

    two = collect((2, 2), 1.0)
    assert_same(collect((2, 2), 1.0), two)
    # Random numbers are drawn for a batch, and at every call: other groups, other actions in the same first states.
    four = collect((4,), 1.0)
    np.testing.assert_array_equal(four.observation.state[:, 0], two.observation.state[:, 0])
    assert (four.action[2:4] != two.action[2:4]).any()
    # Without them a row does as it does in any batch, up to rounding.
    np.testing.assert_allclose(collect((4,), 0.0).action, collect((2, 2), 0.0).action, atol=1e-5)


@pytest.mark.parametrize("max_steps", [1, 2, 5, 10, 11, 99])
@pytest.mark.parametrize("chunk", [1, 2])
def test_groups_share_one_budget_of_steps(max_steps, chunk):
    env = grouped((2, 1), SCRIPTS)
    act = chunk_act(chunk, [])
    rollout = collect_episodes(env, act, SEEDS, stop_at_success=True, max_steps=max_steps, in_turns=True)
    lengths = np.maximum(rollout.trajectory.valid.sum(axis=1) - 1, 0)
    assert rollout.is_complete and rollout.num_steps == lengths.sum()
    # An episode may end within a chunk, whose other actions are not executed.
    assert min(max_steps, 22) - (chunk - 1) * (1 + env.num_envs) <= rollout.num_steps <= max_steps
    cut = lengths[lengths > 0]
    for row, length in zip(rollout.trajectory.decisions.value[lengths > 0], cut, strict=True):
        assert length % chunk or row[length // chunk] == 10 + length


@pytest.mark.parametrize("last_poll", range(1, 8))
def test_a_collection_in_turns_can_be_stopped_and_begun_again(last_poll):
    env, polls = grouped((2, 1), SCRIPTS), []
    options = {"stop_at_success": True, "in_turns": True}
    expected = collect_episodes(grouped((2, 1), SCRIPTS), scripted_act, SEEDS, **options)
    rollout = collect_episodes(
        env, scripted_act, SEEDS, should_stop=lambda: polls.append(0) or len(polls) == last_poll, **options
    )
    is_whole = rollout.trajectory.valid.any(axis=1)
    assert not rollout.is_complete and not is_whole.all() and len(polls) == last_poll
    assert_same(
        jax.tree.map(lambda x: x[is_whole], rollout.trajectory),
        jax.tree.map(lambda x: x[is_whole], expected.trajectory),
    )
    assert_same(collect_episodes(env, scripted_act, SEEDS, **options), expected)


class EnvWithSpares(LoggingEnv):
    """Has a spare for every two environments, and counts the resets whose episode a spare has begun."""

    def __init__(self, num_envs, scripts, taken=None):
        super().__init__(num_envs, scripts)
        self.spare_of_env, self.begun = np.arange(num_envs) // 2, {}
        self.taken = [] if taken is None else taken  # seeds of all groups' resets
        self.num_ready = self.num_resets = 0

    @property
    def groups(self):
        return [self]

    def send(self, action, reset_seeds=None, *, next_seeds=None, **options):
        super().send(action, reset_seeds, **options)
        ready = [seed for i, seed in reset_seeds.items() if self.begun.get(self.spare_of_env[i]) == seed]
        self.num_ready, self.num_resets = self.num_ready + len(ready), self.num_resets + len(reset_seeds)
        self.taken += reset_seeds.values()
        for spare, seed in self.begun.items():  # It is kept until it is used; in the end another spare's will do.
            assert next_seeds.get(spare) == seed or seed in self.taken
        assert len(set(next_seeds.values())) == len(next_seeds)
        self.begun = next_seeds


@pytest.mark.parametrize(("num_envs", "chunk"), [(1, 1), (4, 1), (4, 3), (9, 1)])
def test_a_spare_simulator_has_begun_the_episode_that_its_environment_takes(num_envs, chunk):
    options = {"stop_at_success": True}
    acts = [chunk_act(chunk, []) if chunk > 1 else scripted_act for _ in range(2)]
    expected = collect_episodes(ScriptedEnv(3, SCRIPTS), acts[0], SEEDS, **options)
    env = EnvWithSpares(num_envs, SCRIPTS)
    assert_same(collect_episodes(env, acts[1], SEEDS, in_turns=True, **options), expected)
    assert env.num_resets == max(0, len(SEEDS) - num_envs)
    # Two environments of one spare may end in the same step.
    assert env.num_ready == env.num_resets if num_envs == 1 else env.num_ready >= env.num_resets / 2
    # Steps that are cut leave no rows of episodes that were begun in advance and never played.
    rollout = collect_episodes(env, acts[1], SEEDS, in_turns=True, max_steps=3, **options)
    assert rollout.num_steps == (3 if chunk == 1 else 1)  # the first of a chunk's succeeds, and 2 are no chunk
    assert len(rollout.instructions) == (2 if num_envs == 1 else min(num_envs, len(SEEDS)))


def test_no_environment_waits_for_its_first_episode_because_a_spare_of_another_group_has_it():
    groups = [EnvWithSpares(2, {}), EnvWithSpares(2, {})]
    rollout = collect_episodes(GroupedEnvs(groups), scripted_act, SEEDS[:4], stop_at_success=False, in_turns=True)
    assert rollout.trajectory.valid.all() and len(rollout.instructions) == 4
    assert [group.num_resets for group in groups] == [0, 0]


def test_an_environment_without_an_episode_takes_one_that_a_spare_of_another_group_has():
    scripts, taken = {10: Script(success_at=1), 12: Script(success_at=1)}, []
    groups = [EnvWithSpares(1, scripts, taken), EnvWithSpares(1, scripts, taken)]
    rollout = collect_episodes(GroupedEnvs(groups), scripted_act, range(10, 14), stop_at_success=True, in_turns=True)
    assert (rollout.trajectory.valid.sum(axis=1) - 1).tolist() == [1, 4, 1, 4]
    # The first group plays 10 and 12, one action each; 13 is the spare's of the second, which plays 11 for long.
    assert taken == [12, 13] and [group.num_resets for group in groups] == [2, 0]


def test_a_group_takes_episodes_of_its_own_tasks():
    tasks = [0, 1] * 4
    seeds = [100 + k for k in range(8)]
    env = grouped((1, 2), {seed: Script(success_at=1) for seed in seeds[::2]})
    for group, task in zip(env.groups, (0, 1), strict=True):
        group.task_index[:] = task
    env.task_index = np.array([0, 1, 1])

    def act(observation, signals, instructions, is_first):
        assert len({int(seed) % 2 for seed in observation.state[:, 0]}) == 1
        return Decision(np.zeros((len(is_first), 2), np.float32)), observation

    rollout = collect_episodes(env, act, seeds, tasks=tasks, stop_at_success=True, in_turns=True)
    assert (rollout.trajectory.valid.sum(axis=1) - 1).tolist() == [1, 4] * 4


def test_environments_in_groups_are_one_batch():
    env, whole = GroupedEnvs([toy.ToyPush(2), toy.ToyPush(3)]), toy.ToyPush(5)
    assert (env.num_envs, env.horizon, env.action_dim) == (5, toy.HORIZON, toy.ACTION_DIM)
    assert tuple(env.instructions) == tuple(whole.instructions) and env.task_index.tolist() == [0] * 5
    assert [group.num_envs for group in env.groups] == [2, 3] and tuple(whole.groups) == (whole,)
    assert_same(env.reset(range(5)), whole.reset(range(5)))
    action = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    options = {"is_idle": np.zeros(5, bool)}
    assert_same(env.step(action, {1: 7, 4: 8}, **options), whole.step(action, {1: 7, 4: 8}, **options))
    for wrong, message in (
        (lambda: env.reset([1]), "seeds: got 1"),
        (lambda: env.step(action, {5: 0}), "below 5"),
        (lambda: env.step(np.zeros((6, 2), np.float32)), r"action: got shape \(6, 2\), expected \(5, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    env.close()


def test_no_group_steps_where_an_action_of_another_cannot_be_executed():
    log = []
    env = grouped((1, 2), {}, log)
    env.reset(range(3))
    action, options = np.zeros((3, 2)), {"is_drawn": np.ones(3, bool), "is_idle": np.zeros(3, bool)}
    action[2] = 1e300  # not finite as the float32 that simulators take
    for wrong in (action, action[:2], action[0], action[:, :1]):
        with pytest.raises(ValueError, match="action: got"):
            env.send(wrong, {}, **options)
    assert log == []
    # Rows that nobody executes may hold anything.
    env.step(action, {2: 5}, **options)
    env.step(action, {}, **options | {"is_idle": np.array([False, False, True])})
    assert log == ["send a", "send b", "receive a", "receive b"] * 2
