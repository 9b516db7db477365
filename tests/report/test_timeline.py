import functools

import jax
import numpy as np
import pytest

from stare_jax.report.timeline import trace_episode
from stare_jax.runs.evaluation import training_rewards
from stare_jax.stages import potentials, separate
from stare_jax.train.ppo import PPOConfig

PAPER = PPOConfig(gamma=0.9, time_limit="terminate", terminal_potential="zero")


def film_of(evaluated, is_success):
    evaluation, films = evaluated
    return next(film for film in films if evaluation.episodes.success_once[film.episode] == is_success)


def test_timeline_is_what_training_would_see(spec, evaluated):
    film = film_of(evaluated, True)
    signals, valid = film.signals, film.valid
    timeline = trace_episode(spec, signals, valid, training_rewards(spec, PAPER))
    separation = jax.jit(functools.partial(separate, spec))(signals)
    potential_t = jax.jit(functools.partial(potentials, spec))(signals, separation)
    np.testing.assert_array_equal(timeline.stage_t, separation.stage_t)
    np.testing.assert_allclose(timeline.potential_t, potential_t, rtol=1e-6)
    # The action that leads to the first success ends the episode: its next potential counts as 0.
    last = int(evaluated[0].episodes.success_at[film.episode]) - 1
    assert timeline.reward_t[last] == 1 and timeline.reward_t[:last].sum() == 0
    np.testing.assert_allclose(timeline.shaped_reward_t[last], 1 - timeline.potential_t[last], rtol=1e-6)
    expected = 0.9 * timeline.potential_t[1 : last + 1] - timeline.potential_t[:last]
    np.testing.assert_allclose(timeline.shaped_reward_t[:last], expected, atol=1e-6)
    assert np.isnan(timeline.shaped_reward_t[last + 1 :]).all() and np.isnan(timeline.reward_t[last + 1 :]).all()


@pytest.mark.parametrize(
    ("time_limit", "terminal_potential", "share"),
    [("terminate", "zero", 0.0), ("bootstrap", "keep", 0.9), ("terminate", "keep", 0.9)],
)
def test_timeline_ends_at_the_horizon_as_training_does(spec, evaluated, time_limit, terminal_potential, share):
    """The last step of a failure pays -Phi where nothing follows, and gamma Phi' - Phi where something does."""
    film = film_of(evaluated, False)
    config = PPOConfig(gamma=0.9, time_limit=time_limit, terminal_potential=terminal_potential)
    timeline = trace_episode(spec, film.signals, film.valid, training_rewards(spec, config))
    before, after = timeline.potential_t[-2:]
    assert after > 0.01
    np.testing.assert_allclose(timeline.shaped_reward_t[-1], share * after - before, atol=1e-6)


def test_timeline_discounts_by_decisions_where_training_does(spec, evaluated):
    film = film_of(evaluated, False)
    config = PPOConfig(gamma=0.5, time_limit="bootstrap", terminal_potential="keep", chunk_discount="decision")
    timeline = trace_episode(spec, film.signals, film.valid, training_rewards(spec, config, chunk=3))
    gamma_t = np.where(np.arange(30) % 3 == 2, 0.5, 1.0)
    expected = gamma_t * timeline.potential_t[1:] - timeline.potential_t[:-1]
    np.testing.assert_allclose(timeline.shaped_reward_t, expected, atol=1e-6)


def test_timeline_without_shaping_shows_the_reward(spec, evaluated):
    film = film_of(evaluated, True)
    rewards_fn = training_rewards(spec, PPOConfig(shaping=False))
    timeline = trace_episode(spec, film.signals, film.valid, rewards_fn)
    np.testing.assert_array_equal(timeline.shaped_reward_t, timeline.reward_t)


def test_timeline_goes_on_after_success_where_training_does(spec, evaluated):
    film = film_of(evaluated, True)
    config = PPOConfig(gamma=0.9, stop_at_success=False)
    timeline = trace_episode(spec, film.signals, film.valid, training_rewards(spec, config))
    assert timeline.reward_t.sum() == 1 and np.isfinite(timeline.shaped_reward_t).all()
    expected = timeline.reward_t + 0.9 * timeline.potential_t[1:] - timeline.potential_t[:-1]
    np.testing.assert_allclose(timeline.shaped_reward_t, expected, atol=1e-6)


def test_timeline_ends_with_the_episode(spec, evaluated):
    film = film_of(evaluated, False)
    rewards_fn = training_rewards(spec, PAPER)
    whole = trace_episode(spec, film.signals, film.valid, rewards_fn)
    part = trace_episode(spec, film.signals, np.arange(len(film.valid)) < 6, rewards_fn)
    for got, expected in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got, expected[: len(got)])
    assert (len(part.stage_t), len(part.reward_t)) == (6, 5)


def test_timeline_of_a_lost_episode(spec, evaluated):
    film = evaluated[1][0]
    with pytest.raises(ValueError, match="valid: got no valid state"):
        trace_episode(spec, film.signals, np.zeros_like(film.valid), training_rewards(spec, PAPER))
