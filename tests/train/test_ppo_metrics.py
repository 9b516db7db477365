"""Metrics of an iteration on labels and rewards written down by hand."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_expert import expert_of_toy
from toy_task import expert_episodes, fresh

from stare_jax.envs import toy
from stare_jax.envs.toys import TOYS
from stare_jax.rollout.collect import Rollout
from stare_jax.rollout.jump_start import JumpStartConfig
from stare_jax.rollout.validation import ValidationConfig
from stare_jax.stages import get_task
from stare_jax.targets import Targets
from stare_jax.train.ppo import PPOConfig, make_prepare, train_ppo
from stare_jax.train.ppo_metrics import rollout_metrics, update_metrics, warn_of_rounding
from stare_jax.types import Decisions, Trajectory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ppo.md"
LENGTHS = np.array([2, 4, 3, 0])
"""actions of a success, a failure, an episode cut short and a lost one; the horizon is 4."""


@pytest.fixture
def targets():
    valid_t = np.arange(4) < LENGTHS[:, None]
    reward_t = np.float32([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    bonus_t = np.float32([[0.25, -0.5, 0, 0], [0.5, 1, 0.125, -2], [7, 7, 7, 0], [0, 0, 0, 0]])
    stage_t = np.array([[0, 1, 3, 3, 3], [0, 0, 1, 2, 2], [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]])
    completed = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    number_t = np.where(valid_t, np.arange(4), 99).astype(np.float32)
    return Targets(
        reward_t=reward_t,
        shaped_reward_t=reward_t + bonus_t,
        advantage_d=number_t,
        return_d=2 * number_t,
        valid_t=valid_t,
        valid_d=valid_t,
        stage_t=stage_t,
        completed=completed,
        success_t=reward_t > 0,
        is_over=np.array([True, True, False, False]),
    )


@pytest.fixture
def rollout(targets):
    value = np.pad(targets.advantage_d, [(0, 0), (0, 1)], constant_values=99) / 2
    valid = (np.arange(5) <= LENGTHS[:, None]) & (LENGTHS[:, None] > 0)
    trajectory = Trajectory(None, None, valid, None, Decisions(None, None, value, targets.valid_d))
    return Rollout(trajectory, ("",) * 4, np.array([0, 1, 0, 1]), num_steps=12, num_dropped=1, is_complete=True)


def test_success_is_told_of_each_task(rollout, targets, spec):
    """The success is of the first task, the failure of the second; the cut and the lost episode count for neither."""
    pull, third = dataclasses.replace(spec, env_id="Pull-v0"), dataclasses.replace(spec, env_id="Third-v0")
    metrics = rollout_metrics(rollout, targets, (spec, pull, third), shaping=True)
    assert (metrics["env/success_ToyPush-v0"], metrics["env/success_Pull-v0"]) == (1.0, 0.0)
    assert metrics["env/success"] == 0.5
    assert np.isnan(metrics["env/success_Third-v0"])
    alone = rollout_metrics(rollout, targets, spec, shaping=True)
    assert alone.keys() == {name for name in metrics if "-v0" not in name}
    other_names = rollout_metrics(rollout, targets, (spec, get_task("StackCube-v1")), shaping=False)
    assert other_names["env/completed_stage 4"] == alone["env/completed_goal"]


def test_only_episodes_that_are_over_say_how_often_the_policy_succeeds(rollout, targets, spec):
    metrics = rollout_metrics(rollout, targets, spec, shaping=False)
    expected = {
        "env/success": 0.5,
        "env/num_successes": 1,
        "env/num_episodes": 2,
        "env/num_cut": 1,
        "env/num_dropped": 1,
        "env/episode_length": 3,
        "env/return_raw": 0.5,
        "env/return_shaped": (1 - 0.25 - 0.375) / 2,
        "env/completed_reach": 1,
        "env/completed_push": 0.5,
        # Actions number 0 1, 0 1 2 3 and 0 1 2: nine, of sum 10 and of sum of squares 20.
        "ppo/advantage_std": np.sqrt(20 / 9 - (10 / 9) ** 2),
        "ppo/return_mean": 20 / 9,
        "ppo/value_mean": 5 / 9,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert not any(name.startswith("shaping/") for name in metrics)


def test_episodes_that_an_expert_began_are_told_apart(rollout, targets, spec):
    """The policy took over in the success, which is its own, and made no decision in the failure, nor in what was cut
    before."""
    valid_d = targets.valid_d.copy()
    valid_d[0, 0], valid_d[1:3] = False, False
    for handover, expected in (([1, 1, 2, 0], (0, 1, 1.0)), ([1, 0, 2, 0], (1, 1, 1.0)), ([0, 1, 2, 0], (1, 1, None))):
        led = rollout._replace(handover=np.array(handover))
        metrics = rollout_metrics(led, targets._replace(valid_d=valid_d), spec, shaping=False)
        from_contact = metrics.get(f"env/success_from_{spec.stage_names[1]}")
        assert (metrics["env/num_episodes"], metrics["env/num_cut"], from_contact) == expected


def test_shaping_is_told_by_where_it_is_paid(rollout, targets, spec):
    metrics = rollout_metrics(rollout, targets, spec, shaping=True)
    reach, contact, push, goal = spec.stage_names
    assert {name: value for name, value in metrics.items() if name.startswith("shaping/")} == {
        f"shaping/within_{reach}": 0.5 / 2,
        f"shaping/within_{contact}": 0,
        f"shaping/within_{push}": -2 / 2,
        f"shaping/within_{goal}": 0,
        f"shaping/into_{contact}": (0.25 + 1) / 2,
        f"shaping/into_{push}": 0.125,
        f"shaping/into_{goal}": -0.5,
        "shaping/at_success": -0.5,
    }


def test_successes_are_counted_whatever_the_reward_is(rollout, targets, spec):
    """A dense reward is paid at every step, and none is positive; a success in an episode cut short is not over."""
    dense = targets._replace(
        reward_t=np.where(targets.valid_t, np.float32(-0.1), 0), success_t=targets.success_t.copy()
    )
    dense.success_t[2, 1] = True
    metrics = rollout_metrics(rollout, dense, spec, shaping=False)
    assert (metrics["env/success"], metrics["env/num_successes"], metrics["env/num_episodes"]) == (0.5, 1, 2)
    assert metrics["env/return_raw"] == pytest.approx(-0.1 * (2 + 4) / 2)


def test_without_an_episode_that_is_over_there_is_no_rate(rollout, targets, spec):
    cut = Targets(*(x[2:] for x in targets))
    decisions = jax.tree.map(lambda x: x[2:], rollout.trajectory.decisions)
    rollout = rollout._replace(trajectory=rollout.trajectory._replace(decisions=decisions), task=rollout.task[2:])
    metrics = rollout_metrics(rollout, cut, spec, shaping=True)
    assert (metrics["env/num_episodes"], metrics["env/num_cut"]) == (0, 1)
    assert np.isnan(metrics["env/success"]) and metrics["shaping/at_success"] == 0


def test_a_batch_of_steps_is_padded_to_what_it_can_hold_and_learns_the_same(spec):
    trajectory = expert_episodes(6)
    zeros = np.zeros((6, toy.HORIZON), np.float32)
    made = Decisions({"bins": zeros}, zeros, np.zeros(trajectory.valid.shape, np.float32), trajectory.valid[:, 1:])
    trajectory = trajectory._replace(decisions=made)
    num_steps = int(trajectory.valid[:, 1:].sum())
    rollout = Rollout(trajectory, ("",) * 6, np.zeros(6, int), num_steps, num_dropped=0, is_complete=1)
    whole = make_prepare(spec, PPOConfig())(rollout)
    padded = make_prepare(spec, PPOConfig(num_steps=40))(rollout)
    assert whole.advantage.shape == (6, toy.HORIZON) and whole.targets.reward_t.any(axis=1).all()
    for a, b in zip(padded.targets, whole.targets, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(padded.advantage, whole.advantage, atol=1e-5)
    np.testing.assert_allclose(padded.explained_variance, whole.explained_variance, atol=1e-5)


def test_ratios_that_are_not_one_before_the_first_update_are_warned_about_once(capsys):
    is_warned, said = False, []
    for spread in (0.04, 0.06, 0.3):
        is_warned = warn_of_rounding({"ppo/first_log_ratio_rms": spread}, is_warned=is_warned)
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] == ""
    assert said[1].startswith("ppo: warning: ") and "0.06" in said[1] and "ppo.rescore = True" in said[1]


def test_the_minibatch_that_stops_an_iteration_is_in_the_means_but_moves_nothing():
    updates = [
        {
            "ppo/approx_kl": kl,
            "ppo/stopped": float(kl > 0.05),
            "ppo/ratio_min": 1 - kl,
            "ppo/ratio_max": 1 + kl,
            "ppo/log_ratio_square": kl**2,
        }
        for kl in (0.01, 0.02, 0.03, 0.04, 0.1)
    ]
    metrics = update_metrics([jax.tree.map(np.float32, update) for update in updates], num_decisions=90, size=40)
    # Of the 3 minibatches of an epoch, the last one of 10 actions, 4 moved parameters.
    expected = {"ppo/approx_kl": 0.04, "ppo/stopped": 0.2, "ppo/kl_last": 0.1, "ppo/epochs": 4 / 3}
    expected |= {"ppo/ratio_min": 0.9, "ppo/ratio_max": 1.1}  # of all of them
    expected |= {"ppo/first_log_ratio_rms": 0.01}  # of the first one alone
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_the_page_on_ppo_explains_every_metric_and_no_other(policy, params, make_run, spec):
    run = make_run()
    validation = ValidationConfig(every=1, num_episodes=20)
    config = PPOConfig(
        num_iterations=1,
        num_episodes=20,
        minibatch_size=256,
        validation=validation,
        jump_start=JumpStartConfig(fraction=0.5),
    )
    train_ppo(policy, fresh(params), toy.ToyPush(16), spec, config, run, [expert_of_toy(TOYS["push"])])
    stage = re.compile(f"_({'|'.join(spec.stage_names)})$")
    logged = {stage.sub("_<stage>", name) for name in run.writer.lines[0] if "/" in name}
    explained = set(re.findall(r"`((?:ppo|env|validation|shaping|time|perf|grad)/[\w<>]+)`", PAGE.read_text()))
    assert explained == logged


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_the_decisions_of_an_episode_have_its_advantage_over_its_group(spec, advantage):
    """Two groups of three episodes, one of which was lost, and values that nothing depends on."""
    trajectory = expert_episodes(6)
    valid, value = trajectory.valid.copy(), np.full(trajectory.valid.shape, 7, np.float32)
    valid[4] = False
    made = Decisions({"bins": value[:, 1:]}, value[:, 1:, None], value, valid[:, 1:])
    trajectory = trajectory._replace(decisions=made, valid=valid)
    rollout = Rollout(trajectory, ("",) * 6, np.zeros(6, int), 0, num_dropped=1, is_complete=True)
    config = PPOConfig(advantage=advantage, group_size=3, num_episodes=6, gae_lambda=0.5)
    batch = make_prepare(spec, config)(rollout)
    gamma_t = config.gamma ** np.arange(toy.HORIZON)
    returns = (gamma_t * batch.targets.shaped_reward_t).sum(axis=1)
    first, second = returns[:3], returns[[3, 5]]
    if advantage == "grpo":
        expected = np.concatenate([(x - x.mean()) / x.std() for x in (first, second)])
    else:
        expected = np.concatenate([1.5 * (first - first.mean()), [second[0] - second[1], second[1] - second[0]]])
    expected = np.insert(expected, 4, 0.0)
    assert np.ptp(first) > 0.01 and abs(second[0] - second[1]) > 0.01
    np.testing.assert_allclose(batch.advantage, np.where(valid[:, 1:], expected[:, None], 0), rtol=1e-2, atol=1e-5)
    assert np.isfinite(batch.explained_variance)


@pytest.mark.parametrize("whiten_over", ["all", "task"])
def test_targets_are_those_of_each_episodes_own_task(spec, whiten_over):
    """The second task pays ten times less for being near; whitened apart, both have mean 0 and deviation 1."""
    trajectory = expert_episodes(6)
    zeros = np.zeros((6, toy.HORIZON), np.float32)
    made = Decisions({"bins": zeros}, zeros, np.zeros(trajectory.valid.shape, np.float32), trajectory.valid[:, 1:])
    task = np.array([0, 1, 1, 0, 1, 0], np.int32)
    rollout = Rollout(trajectory._replace(decisions=made), ("",) * 6, task, 0, num_dropped=0, is_complete=True)
    other = dataclasses.replace(spec, params=dataclasses.replace(spec.params, d_reach=0.5, d_push=0.5))
    config = PPOConfig(whiten_over=whiten_over)
    batch = make_prepare((spec, other), config)(rollout)
    alone = [make_prepare(one, config)(rollout).targets for one in (spec, other)]
    assert np.abs(alone[0].shaped_reward_t - alone[1].shaped_reward_t).max() > 0.01
    for e, k in enumerate(task):
        jax.tree.map(lambda a, b, e=e: np.testing.assert_allclose(a[e], b[e], atol=1e-5), batch.targets, alone[k])
    masks = [batch.targets.valid_d & (task == k)[:, None] for k in (0, 1)]
    spreads = [float(batch.advantage[mask].std()) for mask in masks]
    means = [float(batch.advantage[mask].mean()) for mask in masks]
    if whiten_over == "task":
        assert spreads == pytest.approx([1, 1], abs=1e-3) and means == pytest.approx([0, 0], abs=1e-5)
    else:
        assert abs(spreads[0] - spreads[1]) > 0.01
        assert float(batch.advantage[batch.targets.valid_d].std()) == pytest.approx(1, abs=1e-3)
