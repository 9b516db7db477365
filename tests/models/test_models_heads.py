"""Action bins against OpenVLA's own table and NumPy's digitize; sampling and scoring against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.models.bins import (
    bin_coordinate,
    decode_bins,
    encode_bins,
    sample_bins,
    score_bins,
)
from stare_jax.models.nn.heads import ValueHead


@pytest.mark.parametrize(
    ("value", "token", "decoded"),
    [
        (-1.0, 31999, -0.99608),
        (0.0, 31872, 0.0),
        (0.5, 31808, 0.50196),
        (0.999, 31745, 0.99608),
        (1.0, 31744, 0.99608),
        (-7.0, 31999, -0.99608),
        (7.0, 31744, 0.99608),
    ],
)
def test_bins_are_those_of_openvla(value, token, decoded):
    bins = encode_bins(np.float32(value))
    assert 32000 - 1 - int(bins) == token
    np.testing.assert_allclose(decode_bins(bins), decoded, atol=1e-5)


def test_encoding_equals_digitize_on_and_around_every_edge():
    edges = np.linspace(-1, 1, 256)
    exact = edges.astype(np.float32)
    values = np.concatenate([exact, np.nextafter(exact, np.float32(2)), np.nextafter(exact, np.float32(-2))])
    values = np.concatenate([values, np.random.default_rng(0).uniform(-1.1, 1.1, 5000).astype(np.float32)])
    expected = np.digitize(np.clip(values, -1, 1), edges) - 1
    np.testing.assert_array_equal(encode_bins(values), expected)
    np.testing.assert_array_equal(jax.jit(encode_bins)(values), expected)


def test_256_ids_decode_to_255_centres_that_encode_back():
    centers = np.asarray(decode_bins(np.arange(256)))
    assert len(np.unique(centers)) == 255
    assert centers[254] == centers[255]
    np.testing.assert_array_equal(encode_bins(centers[:255]), np.arange(255))
    np.testing.assert_allclose(np.diff(centers[:255]), 2 / 255, atol=1e-6)


def test_bin_coordinate_is_the_bin_at_its_centre():
    np.testing.assert_allclose(bin_coordinate(decode_bins(np.arange(255))), np.arange(255), atol=1e-4)
    np.testing.assert_allclose(bin_coordinate(np.float32([-2, 2])), [-0.5, 254.5])


def test_other_numbers_of_bins():
    # 3 edges -1, 0, 1: two centres, and a third id for 1.0 alone.
    np.testing.assert_array_equal(encode_bins(np.float32([-1, -0.1, 0, 0.9, 1]), num_bins=3), [0, 0, 1, 1, 2])
    np.testing.assert_allclose(decode_bins(np.arange(3), num_bins=3), [-0.5, 0.5, 0.5])


def test_temperature_zero_is_greedy_and_one_follows_the_softmax():
    logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    draws = sample_bins(jax.random.key(0), jnp.broadcast_to(logits, (20_000, 3)), 1.0)
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 20_000, [0.1, 0.6, 0.3], atol=0.015)
    # At temperature 1/2 probabilities are squared: 0.01, 0.36, 0.09 over 0.46.
    draws = sample_bins(jax.random.key(1), jnp.broadcast_to(logits, (20_000, 3)), 0.5)
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 20_000, np.array([1, 36, 9]) / 46, atol=0.015)
    assert (sample_bins(jax.random.key(2), jnp.broadcast_to(logits, (50, 3)), 0.0) == 1).all()


def test_scores_are_log_probabilities_and_mean_entropies():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]]))
    logp, entropy = score_bins(logits, jnp.array([[1, 0]]), 1.0)
    np.testing.assert_allclose(logp, [np.log([0.25, 0.8])], rtol=1e-6)
    # Entropies: 1.5 ln 2 = 1.03972 and -(0.8 ln 0.8 + 0.2 ln 0.1) = 0.63903.
    np.testing.assert_allclose(entropy, [(1.0397208 + 0.6390319) / 2], rtol=1e-5)
    halved, _ = score_bins(logits, jnp.array([[1, 0]]), 0.5)
    # Squared: 1/16 of 6/16, and 64/66.
    np.testing.assert_allclose(halved, [np.log([1 / 6, 64 / 66])], rtol=1e-5)
    greedy, _ = score_bins(logits, jnp.array([[1, 0]]), 0.0)
    np.testing.assert_allclose(greedy, logp)
    decided, of_decided = score_bins(logits, jnp.array([[1, 0]]), 1.0, np.array([True, False]))
    np.testing.assert_allclose(decided, logp[:, :1])
    np.testing.assert_allclose(of_decided, [1.0397208], rtol=1e-5)


def test_scores_are_float32_whatever_the_logits_are():
    logits = jax.random.normal(jax.random.key(0), (2, 7, 256), jnp.bfloat16)
    bins = jnp.zeros((2, 7), jnp.int32)
    assert {x.dtype for x in score_bins(logits, bins, 1.0)} == {jnp.dtype("float32")}
    exact = score_bins(logits.astype(jnp.float32), bins, 1.0)
    jax.tree.map(np.testing.assert_allclose, score_bins(logits, bins, 1.0), exact)


def test_value_head_is_rl4vlas_and_float32():
    head = ValueHead()
    params = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 4096)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_163_456
    small = ValueHead((4,))
    params = small.init(jax.random.key(0), jnp.zeros((1, 8)))
    value = small.apply(params, jnp.ones((3, 8), jnp.bfloat16))
    assert (value.shape, value.dtype) == ((3,), jnp.float32)
