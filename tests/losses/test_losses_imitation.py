"""Token cross entropy against optax, soft labels against the normal distribution, flow matching by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stare_jax.losses import flow_matching_loss, soft_cross_entropy, soft_labels, token_cross_entropy


def test_cross_entropies_against_optax():
    rng = np.random.default_rng(0)
    logits = jnp.array(rng.normal(size=(2, 7, 16)), jnp.bfloat16)
    tokens = rng.integers(0, 16, (2, 7)).astype(np.int32)
    labels = np.float32(rng.dirichlet(np.ones(16), (2, 7)))
    hard = token_cross_entropy(logits, tokens)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)
    assert hard.dtype == jnp.float32
    np.testing.assert_allclose(hard, expected, rtol=1e-6)
    soft = soft_cross_entropy(logits, labels)
    np.testing.assert_allclose(soft, optax.softmax_cross_entropy(logits.astype(jnp.float32), labels), rtol=1e-6)
    one_hot = soft_labels(np.float32(tokens), num_bins=16, width=0.0)
    np.testing.assert_allclose(soft_cross_entropy(logits, one_hot), hard, rtol=1e-6)


def test_a_masked_logit_with_label_zero_costs_nothing():
    logits, labels = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.5, 0.5, 0.0])
    value, gradient = jax.value_and_grad(soft_cross_entropy)(logits, labels)
    assert value == pytest.approx(math.log(2))
    np.testing.assert_allclose(gradient, [0, 0, 0], atol=1e-6)


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / 2**0.5))


def test_soft_labels_by_hand():
    # Target 2.25 with a standard deviation of 1.5 bins: bin 2 is the mass between 1.5 and 2.5, that is between -.5 and
    # 1/6 standard deviations; bin 0 has everything below .5, bin 4 everything above 3.5.
    labels = soft_labels(np.float32(2.25), num_bins=5, width=1.5)
    inner = [normal_cdf((edge - 2.25) / 1.5) for edge in (0.5, 1.5, 2.5, 3.5)]
    np.testing.assert_allclose(labels, np.diff([0, *inner, 1]), atol=1e-6)


@pytest.mark.parametrize("width", [0.0, 0.3, 2.0, 10.0])
def test_soft_labels_are_distributions_also_at_the_edges(width):
    targets = np.float32([[-3.0, 0.0, 0.4], [31.0, 15.5, 40.0]])
    labels = np.asarray(soft_labels(targets, num_bins=32, width=width))
    assert labels.shape == (2, 3, 32) and labels.dtype == np.float32 and (labels >= 0).all()
    np.testing.assert_allclose(labels.sum(axis=-1), 1, atol=1e-6)
    # A target beyond the range is most likely the outermost bin, as its action is clipped into the range.
    assert labels[0, 0].argmax() == 0 and labels[1, 2].argmax() == 31
    assert labels[0, 1].argmax() == 0 and labels[1, 0].argmax() == 31
    # Symmetric targets have mirrored labels.
    np.testing.assert_allclose(labels[0, 1], labels[1, 0][::-1], atol=1e-6)


def test_soft_labels_far_from_the_edges_have_the_moments_of_the_normal():
    # The variance of a normal in bins of width 1 is larger by 1/12.
    labels = np.asarray(soft_labels(np.float32(100.3), num_bins=256, width=5.0), np.float64)
    bins = np.arange(256)
    mean = labels @ bins
    assert mean == pytest.approx(100.3, abs=1e-3)
    assert labels @ (bins - mean) ** 2 == pytest.approx(25 + 1 / 12, abs=1e-2)


def test_soft_labels_of_width_zero_take_the_nearest_bin():
    labels = soft_labels(np.float32([0.49, 0.51, 2.0, 9.0]), num_bins=4, width=0)
    np.testing.assert_array_equal(labels.argmax(axis=-1), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="width is -1"):
        soft_labels(np.float32(0), num_bins=4, width=-1)


def test_flow_matching_loss_by_hand():
    # Differences (1, 2) and (0, 3): (1 + 4) / 2 and 9 / 2.
    velocity, target = np.float32([[1, 2], [5, 1]]), np.float32([[0, 0], [5, 4]])
    np.testing.assert_allclose(flow_matching_loss(velocity, target), [2.5, 4.5])
    np.testing.assert_allclose(flow_matching_loss(velocity, target, np.float32([2, 0.5])), [5, 2.25])
    padded = np.float32([[1, 2], [np.inf, 1]])
    mask = np.array([True, False])
    np.testing.assert_allclose(flow_matching_loss(padded, target, mask), [2.5, 0])
    gradient = jax.grad(lambda v: flow_matching_loss(v, target, mask).sum())(jnp.array(padded))
    np.testing.assert_allclose(gradient, [[1, 2], [0, 0]])  # 2 (v - u) / D
