import functools

import jax
import numpy as np
import pytest

from stare_jax.report.timeline import trace_episode
from stare_jax.stages import potentials, separate


def row(tree, e):
    return type(tree)(*(field[e] for field in tree))


def test_timeline_is_what_training_would_see(spec, evaluated):
    evaluation, rollout = evaluated
    e = int(evaluation.episodes.success_once.argmax())
    signals, valid = row(rollout.trajectory.signals, e), rollout.trajectory.valid[e]
    timeline = trace_episode(spec, signals, valid, gamma=0.9)
    separation = jax.jit(functools.partial(separate, spec))(signals)
    potential_t = jax.jit(functools.partial(potentials, spec))(signals, separation)
    np.testing.assert_array_equal(timeline.stage_t, separation.stage_t)
    np.testing.assert_allclose(timeline.potential_t, potential_t, rtol=1e-6)
    # The action that leads to the first success ends the episode: its next potential counts as 0.
    last = int(evaluation.episodes.success_at[e]) - 1
    assert timeline.reward_t[last] == 1 and timeline.reward_t[:last].sum() == 0
    np.testing.assert_allclose(timeline.shaped_reward_t[last], 1 - timeline.potential_t[last], rtol=1e-6)
    expected = 0.9 * timeline.potential_t[1 : last + 1] - timeline.potential_t[:last]
    np.testing.assert_allclose(timeline.shaped_reward_t[:last], expected, atol=1e-6)
    assert np.isnan(timeline.shaped_reward_t[last + 1 :]).all() and np.isnan(timeline.reward_t[last + 1 :]).all()


def test_timeline_ends_with_the_episode(spec, evaluated):
    _, rollout = evaluated
    signals = row(rollout.trajectory.signals, 0)
    whole = trace_episode(spec, signals, rollout.trajectory.valid[0])
    part = trace_episode(spec, signals, np.arange(len(signals.success)) < 6)
    for got, expected in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got, expected[: len(got)])
    assert (len(part.stage_t), len(part.reward_t)) == (6, 5)


def test_timeline_of_a_lost_episode(spec, evaluated):
    _, rollout = evaluated
    with pytest.raises(ValueError, match="valid: got no valid state"):
        trace_episode(spec, row(rollout.trajectory.signals, 0), np.zeros_like(rollout.trajectory.valid[0]))
