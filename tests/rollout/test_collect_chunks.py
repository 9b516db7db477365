"""Decisions on several actions at a time: executed in order, all in step, recorded where they were taken."""

import jax
import numpy as np
import pytest
from test_collect import Script, ScriptedEnv

from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes


def chunk_act(chunk, asked):
    """Decides on actions [seed + t / 10, number in the chunk] and writes down who was asked, and when."""

    def act(observation, signals, instructions, is_first):
        seed, t = observation.state.T
        asked.append(t.tolist())
        action = np.stack([np.stack([seed + (t + i) / 10, np.full(len(t), i)], axis=1) for i in range(chunk)], axis=1)
        tokens = np.stack([seed, t], axis=1).astype(np.float32)
        prompt = {"tokens": np.ones((len(t), 3), np.int32), "token_mask": np.ones((len(t), 3), bool)}
        decision = Decision(action.astype(np.float32), {"tokens": tokens}, 1 + t, 10 + t)
        return decision, observation._replace(**prompt)

    return act


def collect(chunk, num_envs, scripts, **options):
    env, asked = ScriptedEnv(num_envs, scripts), []
    seeds = sorted(scripts)
    rollout = collect_episodes(env, chunk_act(chunk, asked), seeds, stop_at_success=True, **options)
    return env, asked, rollout


def test_a_chunk_is_executed_action_by_action_and_recorded_where_it_was_decided():
    env, asked, rollout = collect(3, 1, {5: Script()})
    trajectory = rollout.trajectory
    # Four actions, the horizon: a whole chunk, and the first action of another.
    np.testing.assert_allclose(trajectory.action[0], [[5.0, 0], [5.1, 1], [5.2, 2], [5.3, 0]])
    assert [row[:2] for row in env.executed] == [(5, 0), (5, 1), (5, 2), (5, 3)]
    assert asked == [[0.0], [3.0], [4.0]]  # the last time for the value alone
    decisions = trajectory.decisions
    np.testing.assert_array_equal(decisions.trace["tokens"][0], [[5, 0], [5, 3]])
    np.testing.assert_array_equal(decisions.logp[0], [1, 4])
    np.testing.assert_array_equal(decisions.value[0], [10, 13, 14])
    np.testing.assert_array_equal(decisions.valid[0], [True, True])
    np.testing.assert_array_equal(trajectory.observation.state[0, :, 1], np.arange(5))
    np.testing.assert_array_equal(trajectory.observation.token_mask[0].any(axis=1), [True, False, False, True, False])


def test_an_episode_that_ends_within_a_chunk_waits_for_the_others_decision():
    scripts = {1: Script(success_at=1), 2: Script(), 3: Script(success_at=2), 4: Script()}
    env, asked, rollout = collect(2, 2, scripts)
    assert rollout.is_complete and rollout.trajectory.valid.sum(axis=1).tolist() == [2, 5, 3, 5]
    # Every row is at a multiple of the chunk when it is asked, or has nothing to do.
    assert all(t % 2 == 0 for row in asked for t in row if t <= env.horizon)
    for row, seed in enumerate(sorted(scripts)):
        length = int(rollout.trajectory.valid[row, 1:].sum())
        t = np.arange(length)
        np.testing.assert_allclose(rollout.trajectory.action[row, :length, 0], seed + t / 10, rtol=1e-6)
        np.testing.assert_array_equal(rollout.trajectory.action[row, :length, 1], t % 2)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_as_many_environments_as_one_likes_give_the_same_episodes(chunk):
    scripts = {seed: Script(success_at=seed % 5 or None) for seed in range(1, 8)}
    one, many = (collect(chunk, num_envs, scripts)[-1].trajectory for num_envs in (1, 3))
    for name in ("valid", "action"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name), err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, one.decisions, many.decisions)


@pytest.mark.parametrize(("max_steps", "lengths"), [(8, [4, 4]), (7, [4, 2]), (2, [2]), (4, [2, 2])])
def test_a_budget_of_steps_is_spent_in_whole_chunks(max_steps, lengths):
    env, _, rollout = collect(2, 2, {seed: Script() for seed in range(1, 9)}, max_steps=max_steps)
    valid = rollout.trajectory.valid
    assert valid[:, 1:].sum(axis=1)[valid[:, 0]].tolist() == lengths
    assert rollout.num_steps == sum(lengths) <= max_steps
    # The state after the last action has its value, for bootstrapping.
    for row, length in zip(rollout.trajectory.decisions.value[valid[:, 0]], lengths, strict=True):
        assert row[length // 2] == 10 + length


@pytest.mark.parametrize(("keep_images", "num_drawn"), [("decisions", 2 + 2 + 2), (False, 2 + 2 + 2), (True, 2 * 5)])
def test_images_are_drawn_where_somebody_looks(keep_images, num_drawn):
    """Decisions on 3 actions in episodes of 4: in the states 0 and 3, and in the last one for its value."""
    shown, act = [], chunk_act(3, [])

    def watching_act(observation, signals, instructions, is_first):
        shown.append(np.stack([observation.state[:, 1], observation.images["camera"][:, 0, 0, 0]], axis=1))
        return act(observation, signals, instructions, is_first)

    env = ScriptedEnv(2, {})
    arguments = {"stop_at_success": True, "keep_images": keep_images}
    rollout = collect_episodes(env, watching_act, [5, 6], **arguments)
    np.testing.assert_array_equal(shown, [[[t, t]] * 2 for t in (0, 3, 4)])
    assert env.num_drawn == num_drawn
    kept = rollout.trajectory.observation.images
    expected = {True: [0, 1, 2, 3, 4], "decisions": [0, 0, 0, 3, 0]}
    if keep_images is False:
        assert kept == {}
    else:
        np.testing.assert_array_equal(kept["camera"][:, :, 0, 0, 0], [expected[keep_images]] * 2)


def test_an_episode_that_began_later_is_valued_by_the_image_of_its_last_state():
    """One ends at its horizon within a chunk of the other, which began with a decision less."""
    env, shown = ScriptedEnv(2, {1: Script(success_at=1)}), []
    act = chunk_act(3, [])

    def watching_act(observation, signals, instructions, is_first):
        t, image = observation.state[:, 1], observation.images["camera"][:, 0, 0, 0]
        shown.append((t.tolist(), image.tolist()))
        return act(observation, signals, instructions, is_first)

    collect_episodes(env, watching_act, [1, 2, 3], stop_at_success=True, keep_images="decisions")
    # Both decide; again, the first in another episode; the second is at its horizon. The rest is the first's.
    assert shown[:3] == [([0, 0], [0, 0]), ([0, 3], [0, 3]), ([1, 4], [255, 4])]
