"""The experiments on the toys: they run, go on where they stopped, and their arms are what they are said to be."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import preference
import pytest
import shaping
import toy_learning
import toy_tasks
from cells import Settings, choose_draws, read_results, read_rows, run_cells, run_task, tuning_cells
from shaping_report import steps_to_target, write_report
from toy_expert import expert_of_toy
from toy_learning import (
    Arm,
    arm_targets,
    draw_seeds,
    make_batch,
    make_policy,
    make_training,
    observation_of,
    play,
    play_policy,
)
from toy_preference import EPISODES_PER_START, make_pairs

from stare_jax.envs.toys import TOYS, ToyEnv
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes
from stare_jax.rollout.jump_start import LedEnvs

SMALL = Settings(num_blocks=1, draws_per_block=2, num_tuning_seeds=1, num_fresh_seeds=2)
PREFERENCES = ["tpo", "sta_tpo_offset_valid"]
PLAIN, ZERO = "ppo_terminate", "progressive_zero_terminate"


def refuse(cell):
    raise AssertionError(f"{cell} has been measured before")


# ---- Episodes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOYS)
def test_episodes_on_the_device_are_those_of_the_collector(name):
    toy, seeds = TOYS[name], np.arange(8)

    def choose(state, signals, key):
        action = toy.expert(signals, speed=0.8, max_step=toy.max_step)
        return action, action

    def act(observation, signals, instructions, is_first):
        return Decision(toy.expert(signals, speed=0.8, max_step=toy.max_step)), observation

    run = jax.jit(lambda seeds: play(toy, choose, seeds, jax.random.key(0), max_step=toy.max_step))
    episodes = jax.device_get(run(seeds.astype(np.uint32)))
    expected = collect_episodes(ToyEnv(toy, 8), act, seeds, stop_at_success=True).trajectory
    np.testing.assert_array_equal(episodes.valid, expected.valid)
    exists = expected.valid
    np.testing.assert_allclose(episodes.state[exists], expected.observation.state[exists], atol=1e-5)
    np.testing.assert_allclose(episodes.record[exists[:, 1:]], expected.action[exists[:, 1:]], atol=1e-4)
    assert episodes.signals.success[exists].sum() == 8


def test_the_expert_begins_the_same_episodes_on_the_device_as_for_the_collector():
    toy, seeds, until = TOYS["place"], np.arange(8), np.array([0, 1, 2, 3] * 2, np.int32)

    def choose(state, signals, key):
        return jnp.zeros((len(state), toy.action_dim)), ()

    def act(observation, signals, instructions, is_first):
        return Decision(np.zeros((len(is_first), toy.action_dim), np.float32)), observation

    there = play(toy, choose, seeds.astype(np.uint32), jax.random.key(0), max_step=toy.max_step, until=until)
    led = LedEnvs(ToyEnv(toy, 8), (toy.spec,), [expert_of_toy(toy)], lambda seed: int(until[seed]))
    here = collect_episodes(led, act, seeds, stop_at_success=True).trajectory
    np.testing.assert_array_equal(there.valid, here.valid)
    for one, other in zip(there.signals, here.signals, strict=True):
        np.testing.assert_allclose(one[here.valid], other[here.valid], atol=1e-5)


def test_no_two_draws_of_an_iteration_share_a_key(monkeypatch):
    keys = []

    class Enough(Exception):
        """The first iteration has drawn all that is looked at."""

    def note(key, *others):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return jnp.zeros(4, jnp.uint32)

    def last(policy, params, toy, seeds, key, **options):
        note(key)
        raise Enough

    monkeypatch.setattr(toy_learning, "draw_until", note)
    monkeypatch.setattr(toy_learning, "draw_seeds", note)
    monkeypatch.setattr(toy_learning, "play_policy", last)
    for name in ("jit", "vmap"):
        monkeypatch.setattr(jax, name, lambda fn, **options: fn)
    train = make_training(TOYS["place"], [Arm(jump_start=0.5)], num_iterations=1, num_episodes=4)
    with jax.disable_jit(), pytest.raises(Enough):
        train({}, jax.random.key(3), 0, None, 1.0)
    assert len(set(keys)) == len(keys) == 3


@pytest.fixture(scope="module")
def played():
    """A policy, its parameters and episodes of the place toy, half of them an expert's so that some succeed."""
    toy = TOYS["place"]
    policy = make_policy(toy)
    params = policy.init(jax.random.key(0))

    def choose(state, signals, key):
        decision = policy.sample(params, observation_of(state), key)
        is_expert = jnp.arange(len(state)) % 2 == 0
        expert = toy.expert(signals, max_step=toy.max_step)
        return jnp.where(is_expert[:, None], expert, decision.action), decision

    seeds = draw_seeds(jax.random.key(1), 16)
    return policy, params, jax.jit(lambda: play(toy, choose, seeds, jax.random.key(2), max_step=toy.max_step))()


# ---- Arms -----------------------------------------------------------------------------------------------------------
def targets_of(arm, played, *, gamma=0.95, gae_lambda=0.8):
    policy, params, episodes = played
    targets_fn = arm_targets(arm, TOYS["place"].spec)
    make = jax.jit(lambda: make_batch(policy, params, episodes, lambda *x: targets_fn(*x, gamma, gae_lambda)))
    return make()


@pytest.mark.parametrize("time_limit", ["terminate", "bootstrap"])
def test_ppo_with_the_potential_in_its_critic_is_shaping_that_ends_at_zero(played, time_limit):
    zero, _ = targets_of(Arm(terminal_potential="zero", time_limit=time_limit), played)
    shifted, _ = targets_of(Arm(shaping=False, has_potential_in_critic=True, time_limit=time_limit), played)
    np.testing.assert_allclose(zero.advantage, shifted.advantage, atol=1e-5)
    np.testing.assert_allclose(zero.return_, shifted.return_, atol=1e-5)
    plain, _ = targets_of(Arm(shaping=False, time_limit=time_limit), played)
    assert np.abs(plain.advantage - zero.advantage).max() > 0.01


def test_a_larger_reward_is_paid_one_plus_gamma(played):
    _, _, episodes = played

    def returns(arm):
        targets_fn = arm_targets(arm, TOYS["place"].spec)

        def one(signals, valid):
            return targets_fn(signals, valid, jnp.zeros(valid.shape), 0.95, 1.0).return_d

        return jax.jit(jax.vmap(one))(episodes.signals, episodes.valid)

    # Without values and with lambda 1 a return is the discounted reward.
    plain = returns(Arm(shaping=False))
    assert plain.max() == 1.0
    np.testing.assert_allclose(returns(Arm(shaping=False, is_reward_larger=True)), 1.95 * plain, rtol=1e-5)


def test_arms_that_must_coincide_train_alike_and_others_do_not():
    toy = TOYS["push"]
    arms = [Arm(shaping=False), Arm(terminal_potential="zero"), Arm(shaping=False, has_potential_in_critic=True)]
    train = make_training(toy, arms, num_iterations=2, num_episodes=8)
    params = jax.vmap(make_policy(toy).init)(jax.random.split(jax.random.key(0), 2))
    draw = shaping.draw_settings(2, per_block=1)[0]
    hyper = draw._replace(**{k: np.full(2, v, np.float32) for k, v in draw._asdict().items() if k != "num_epochs"})
    keys = jax.random.split(jax.random.key(1), 2)
    plain, zero, shifted = (train(params, keys, np.int32(i), hyper, toy.max_step) for i in range(3))
    jax.tree.map(np.testing.assert_array_equal, zero, shifted)
    assert (zero.steps[:, 0] == plain.steps[:, 0]).all()  # the first iteration is of the same policy
    assert plain.success.shape == (2, 2) and plain.completed.shape == (2, 2, 4)


# ---- Runs -----------------------------------------------------------------------------------------------------------
SIZE = shaping.Size(iterations=2, episodes=8)._asdict()
NAMES = [PLAIN, ZERO]


@pytest.fixture(scope="module", autouse=True)
def small_programs():
    """Programs know two arms alone, and take two rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_tasks, "ROWS", 2)
        patch.setattr(shaping, "ARMS", {name: shaping.ARMS[name] for name in (*NAMES, "rl4vla")})
        patch.setattr(preference, "ARMS", {name: preference.ARMS[name] for name in PREFERENCES})
        patch.setitem(toy_tasks.IMITATION_STEPS, ("push", 15), (5, 10, 20))
        yield


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """The folder of a small run of two arms on one task."""
    out = tmp_path_factory.mktemp("shaping")
    measure = functools.partial(shaping.measure, per_block=2)
    run_task("push-15mm-0", NAMES, measure, out / "rows.jsonl", SMALL, size=SIZE)
    return out


def test_a_study_tunes_all_arms_with_the_same_draws_and_then_takes_fresh_seeds(shaped):
    rows = read_rows(shaped / "rows.jsonl")
    tuning, fresh = rows[:2], rows[2:]
    assert [row["cell"]["arm"] for row in tuning] == NAMES
    assert all(row["cell"]["draws"] == [0, 1] and row["cell"]["seeds"] == [0] for row in tuning)
    assert {tuple(row["cell"]["seeds"]) for row in fresh} == {(1000, 1001)}
    assert np.shape(tuning[0]["success"]) == (2, 2) and np.shape(fresh[0]["steps"]) == (2, 2)
    scores = np.mean(tuning[0]["success"], axis=1)
    best, median = choose_draws({PLAIN: scores})
    assert best[PLAIN] == int(scores.argmax()) and median[PLAIN] == best[PLAIN]  # the upper of two
    # Fresh seeds begin with equal parameters and episodes whatever the arm.
    results = read_results(rows, "push-15mm-0", NAMES, SMALL, SIZE)
    first = [np.array(results[name].best["success"])[:, 0] for name in NAMES]
    np.testing.assert_array_equal(*first)


def test_a_study_goes_on_where_it_stopped(shaped, tmp_path):
    path = tmp_path / "rows.jsonl"
    text = (shaped / "rows.jsonl").read_text()
    path.write_text(text)
    run_task("push-15mm-0", NAMES, refuse, path, SMALL, size=SIZE)
    assert path.read_text() == text
    # The last row was cut short: it is measured again, to the same numbers, and no other is.
    path.write_text(text[:-20])
    measure = functools.partial(shaping.measure, per_block=2)
    run_task("push-15mm-0", NAMES, measure, path, SMALL, size=SIZE)
    *old, last = read_rows(path)
    *expected, again = (json.loads(line) for line in text.splitlines())
    assert old == expected
    assert last["cell"] == again["cell"] and last["success"] == again["success"] and last["steps"] == again["steps"]


def test_what_is_left_can_be_printed_and_a_deadline_keeps_the_rest(tmp_path, capsys):
    cells = tuning_cells("push-15mm-0", NAMES, SMALL, SIZE)
    path = tmp_path / "rows.jsonl"
    assert not run_cells(cells, refuse, path, only_print=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == cells
    assert not run_cells(cells, refuse, path, deadline=0.0)
    assert run_cells(cells[:1], lambda cell: {"success": [0.5]}, path)
    assert not run_cells(cells, refuse, path, only_print=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == cells[1:]


def test_the_report_has_a_table_a_picture_and_all_runs(shaped, tmp_path):
    arms = {toy_tasks.TASKS["push-15mm-0"]: NAMES}
    write_report(read_rows(shaped / "rows.jsonl"), tmp_path, arms, SMALL, SIZE)
    table = (tmp_path / "table.md").read_text()
    assert "## push-15mm-0" in table and all(f"| {name} |" in table for name in NAMES) and "∞" in table
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 2  # arms, choices, seeds
    assert (tmp_path / "curves.png").exists() and (tmp_path / "curves_dark.png").exists()


def test_steps_to_the_target_are_those_of_three_iterations_in_a_row():
    row = {
        "success": [[0.95, 0.8, 0.9, 0.9, 0.9], [0.95, 0.95, 0.8, 0.95, 0.95], [0.9, 0.9, 0.8, 0.9, 0.9]],
        "steps": [[10, 20, 30, 40, 50]] * 3,
    }
    np.testing.assert_array_equal(steps_to_target(row), [50, 30, np.inf])


def test_draws_are_the_same_however_many_there_are():
    few, many = shaping.draw_settings(4, per_block=4), shaping.draw_settings(32, per_block=4)
    assert many[:4] == few and len({draw.num_epochs for draw in few}) == 1
    assert {draw.num_epochs for draw in many} == {1, 2, 4, 8}
    assert len({draw.learning_rate for draw in many}) == 32


@pytest.mark.parametrize("task", toy_tasks.TASKS.values(), ids=lambda task: task.name)
def test_every_task_has_a_start_and_its_arms(task):
    assert (task.num_imitation_steps > 0) == (task.start > 0)
    assert ("rl4vla" in shaping.arms_of(task)) == (task.toy != "push")


# ---- Preference -----------------------------------------------------------------------------------------------------
def test_pairs_are_the_best_and_the_worst_of_a_start(played):
    policy, params, _ = played
    toy = TOYS["push"]
    policy = make_policy(toy)
    params = policy.init(jax.random.key(0))
    seeds = jnp.repeat(draw_seeds(jax.random.key(1), 32), EPISODES_PER_START)
    episodes = jax.jit(lambda: play_policy(policy, params, toy, seeds, jax.random.key(2), max_step=toy.max_step))()
    chosen, rejected = make_pairs(episodes, toy.spec)
    is_pair = np.asarray(chosen.valid.any(axis=1))
    assert 0 < is_pair.sum() < 32
    np.testing.assert_array_equal(is_pair, rejected.valid.any(axis=1))
    num_completed = [np.asarray(side.stages.completed.sum(axis=1)) for side in (chosen, rejected)]
    assert (num_completed[0][is_pair] > num_completed[1][is_pair]).all()
    assert (num_completed[0][~is_pair] == num_completed[1][~is_pair]).all()
    # Both sides of a pair begin alike, and the reference's scores are those of the policy that played.
    np.testing.assert_array_equal(chosen.state[:, 0], rejected.state[:, 0])
    assert (chosen.ref_logp[is_pair][:, 0] < 0).all()


def test_the_preference_study_runs_and_goes_on(tmp_path):
    names, size = PREFERENCES, preference.Size(starts=8, batch=4, evaluated=16)._asdict()
    measure = functools.partial(preference.measure, per_block=2)
    path = tmp_path / "rows.jsonl"
    run_task("push-15mm-10", names, measure, path, SMALL, size=size)
    run_task("push-15mm-10", names, refuse, path, SMALL, size=size)
    results = read_results(read_rows(path), "push-15mm-10", names, SMALL, size)
    assert list(results) == names
    np.testing.assert_array_equal(*(results[name].best["before"] for name in names))
    table = preference.task_table(results)
    assert [len(line) for line in table] == [len(preference.HEADER)] * 2
