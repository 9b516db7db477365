"""Decisions from distributions over bins: by the most likely one, by the mean, and by sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_policy import INSTRUCTIONS, jit, make_case, nano_config

from stare_jax.models import MLPConfig, make_policy, openvla_7b
from stare_jax.models.bins import choose_bins, decode_bins, encode_bins, mean_of_bins
from stare_jax.models.normalize import identity_stats, unnormalize_action
from stare_jax.types import Observation

KEY = jax.random.key(0)


def certain(bins, num_bins):
    """Logits of distributions that are all but certain of one bin each."""
    return 100.0 * jax.nn.one_hot(np.asarray(bins), num_bins)


@pytest.mark.parametrize("num_bins", [6, 256])
def test_the_mean_of_a_certain_distribution_is_its_arg_max(num_bins):
    bins = np.arange(num_bins)
    for greedy in ("mode", "mean"):
        chosen, unit_action = choose_bins(KEY, certain(bins, num_bins), 0.0, greedy=greedy)
        np.testing.assert_allclose(unit_action, decode_bins(bins, num_bins=num_bins), atol=1e-6)
        # The last two ids share a centre, which the one before the last holds.
        expected = bins if greedy == "mode" else np.minimum(bins, num_bins - 2)
        np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize(("low", "high"), [(0, 254), (37, 217), (126, 128)])
def test_the_mean_of_two_equal_peaks_is_the_middle(low, high):
    logits = certain(low, 256) + certain(high, 256)
    bins, unit_action = choose_bins(KEY, logits, 0.0, greedy="mean")
    assert bins == 127 and abs(unit_action) < 1e-6  # the bin that holds 0
    bins, unit_action = choose_bins(KEY, logits, 0.0, greedy="mode")
    assert bins == low and unit_action == decode_bins(low)


def test_a_mean_by_hand():
    # Edges -1, -.5, 0, .5, 1; centres -.75, -.25, .25, .75 and again .75.
    logits = np.log(np.float32([1, 2, 1, 3, 1]) / 8)
    # (-.75 - 2 * .25 + .25 + 3 * .75 + .75) / 8 = 2 / 8
    np.testing.assert_allclose(mean_of_bins(logits), 0.25, atol=1e-6)
    np.testing.assert_allclose(mean_of_bins(logits + 7.0), 0.25, atol=1e-6)


def test_samples_do_not_depend_on_the_greedy_choice():
    logits = np.random.default_rng(0).normal(0, 2, (5, 3, 256)).astype(np.float32)
    choose = jax.jit(choose_bins, static_argnames="greedy")
    for temperature in (1.0, 0.4):
        mode, mean = (choose(KEY, logits, temperature, greedy=greedy) for greedy in ("mode", "mean"))
        jax.tree.map(np.testing.assert_array_equal, mode, mean)
        np.testing.assert_array_equal(mode[1], decode_bins(mode[0]))


def test_means_are_float32_whatever_the_logits_are():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, 256)), jnp.bfloat16)
    mean = mean_of_bins(logits)
    probs = np.exp(np.asarray(logits, np.float64))
    exact = (probs / probs.sum(axis=-1, keepdims=True)) @ np.asarray(decode_bins(np.arange(256)), np.float64)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, exact, atol=1e-6)


@pytest.fixture(scope="module")
def averaging():
    return make_case(nano_config(greedy="mean"), INSTRUCTIONS)


def test_openvla_executes_the_mean_and_feeds_the_bin_that_holds_it(nano, averaging):
    decision = averaging.sample(averaging.params, averaging.observation, KEY, temperature=0.0)
    bins = decision.trace["bins"]
    # The trace says what was executed, to half a bin of the range of each dimension.
    low, high = np.float32([-0.5, -0.3, -1]), np.float32([0.2, 0.55, 1])
    unit = 2 * (decision.action - low) / (high - low) - 1
    assert np.abs(unit - decode_bins(bins)).max() <= 1 / 255 + 1e-5
    np.testing.assert_array_equal(bins, encode_bins(unit))
    assert np.abs(unit - decode_bins(bins)).max() > 1e-4
    most_likely = nano.sample(nano.params, nano.observation, KEY, temperature=0.0)
    assert (most_likely.trace["bins"] != bins).any()


def test_openvla_scores_and_samples_as_before(nano, averaging):
    greedy = averaging.sample(averaging.params, averaging.observation, KEY, temperature=0.0)
    first, second = (case.log_prob(case.params, case.observation, greedy.trace) for case in (nano, averaging))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_allclose(greedy.logp, first.logp, rtol=0, atol=1e-5)
    first, second = (case.sample(case.params, case.observation, KEY, temperature=0.6) for case in (nano, averaging))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_mlp_executes_the_mean_of_its_bins():
    config, stats = MLPConfig(state_dim=2, action_dim=2, num_bins=6, hidden_dims=(8,)), identity_stats(2, 2)
    stats = stats._replace(action_q01=np.float32([0, -1]), action_q99=np.float32([4, 1]))
    policies = [make_policy(dataclasses.replace(config, greedy=greedy), stats) for greedy in ("mode", "mean")]
    params = dict(jit(policies[0].init)(KEY))
    bias = np.log(np.float32([[1, 0, 0, 0, 2, 0], [1, 2, 1, 0, 0, 0]]) + 1e-9).ravel()
    params["logits"] = {"kernel": np.zeros_like(params["logits"]["kernel"]), "bias": bias}
    no_prompt = np.zeros((1, 0))
    observation = Observation({}, np.zeros((1, 2), np.float32), no_prompt.astype(np.int32), no_prompt.astype(bool))
    mode, mean = (policy.sample(params, observation, KEY, temperature=0.0) for policy in policies)
    # Centres -.8, -.4, 0, .4, .8: means (-.8 + 2 * .8) / 3 and (-.8 - 2 * .4 + 0) / 4.
    np.testing.assert_allclose(mean.action, unnormalize_action(np.float32([[0.8 / 3, -0.4]]), stats), atol=1e-6)
    np.testing.assert_array_equal(mean.trace["bins"], [[3, 1]])
    np.testing.assert_allclose(mode.action, unnormalize_action(np.float32([[0.8, -0.4]]), stats), atol=1e-6)
    first, second = (policy.log_prob(params, observation, mean.trace) for policy in policies)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_published_openvla_takes_the_most_likely_token():
    assert openvla_7b().greedy == "mode"


@pytest.mark.parametrize("config", [MLPConfig(), nano_config()], ids=["mlp", "openvla"])
def test_the_configuration_names_the_choices(config):
    with pytest.raises(ValueError, match="greedy: got 'median', expected one of"):
        dataclasses.replace(config, greedy="median")
