"""PPO: the clipped surrogate by hand and against rlax, the value loss, diagnostics, padding."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stare_jax.losses import clipped_surrogate, explained_variance, ppo_loss, value_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Its own dependencies are deprecated; only tests use it.
    import rlax


@pytest.mark.parametrize(
    "ratio, advantage, options, expected",
    [
        # min(p A, clip(p, .8, 1.2) A)
        (1.1, 2.0, {}, 2.2),
        (1.5, 2.0, {}, 2.4),
        (0.5, 2.0, {}, 1.0),
        (0.5, -2.0, {}, -1.6),
        (1.5, -2.0, {}, -3.0),
        # The upper side may be wider.
        (1.25, 2.0, {"clip_eps_high": 0.28}, 2.5),
        (1.5, 2.0, {"clip_eps_high": 0.28}, 2.56),
        (0.5, -2.0, {"clip_eps_high": 0.28}, -1.6),
        # Dual clip: never below 3 A where A < 0, and nothing else changes.
        (5.0, -2.0, {"dual_clip": 3.0}, -6.0),
        (2.0, -2.0, {"dual_clip": 3.0}, -4.0),
        (5.0, 2.0, {"dual_clip": 3.0}, 2.4),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, options, expected):
    result = clipped_surrogate(jnp.float32(ratio), jnp.float32(advantage), clip_eps=0.2, **options)
    assert result == pytest.approx(expected, rel=1e-6)


def test_dual_clip_is_above_one():
    with pytest.raises(ValueError, match="dual_clip is 1.0"):
        clipped_surrogate(jnp.float32(1), jnp.float32(1), clip_eps=0.2, dual_clip=1.0)


def random_batch(seed=0, num=64):
    """logp, old_logp, advantage, value, old_value, return_, entropy."""
    rng = np.random.default_rng(seed)
    logp, advantage, value, return_, entropy = (jnp.array(row, jnp.float32) for row in rng.normal(size=(5, num)))
    old_logp, old_value = logp + jnp.float32(rng.normal(0, 0.3, num)), value + jnp.float32(rng.normal(0, 0.3, num))
    return [logp, old_logp, advantage, value, old_value, return_, entropy]


def test_policy_loss_and_gradient_against_rlax():
    logp, old_logp, advantage, *critic = random_batch()

    def ours(logp):
        return ppo_loss(logp, old_logp, advantage, *critic, clip_eps=0.2, value_coef=0.0)[0]

    def oracle(logp):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(logp - old_logp), advantage, 0.2)

    assert ours(logp) == pytest.approx(float(oracle(logp)), rel=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(logp), jax.jit(jax.grad(oracle))(logp), atol=1e-7)


def test_value_loss_by_hand():
    # R = 3, V = 1, V was 0: 2^2 / 2; V clipped to .5 is farther away, 2.5^2 / 2 = 3.125.
    value, old_value, return_ = jnp.float32(1), jnp.float32(0), jnp.float32(3)
    assert value_loss(value, old_value, return_) == 2
    assert value_loss(value, old_value, return_, clip_eps=0.5) == 3.125
    # Where the clipped value is the nearer one, R = .4, the unclipped loss is the larger: .6^2 / 2.
    assert value_loss(value, old_value, jnp.float32(0.4), clip_eps=0.5) == pytest.approx(0.18)
    # Huber with delta .5: .5 (2 - .25); clipped .5 (2.5 - .25).
    assert value_loss(value, old_value, return_, huber_delta=0.5) == 0.875
    assert value_loss(value, old_value, return_, clip_eps=0.5, huber_delta=0.5) == 1.125


def test_value_loss_against_optax():
    _, _, _, value, old_value, return_, _ = random_batch()
    np.testing.assert_allclose(value_loss(value, old_value, return_), optax.l2_loss(value, return_), rtol=1e-6)
    huber = value_loss(value, old_value, return_, huber_delta=0.7)
    np.testing.assert_allclose(huber, optax.huber_loss(value, return_, delta=0.7), rtol=1e-6)


def test_total_and_metrics_by_hand():
    # Ratios e^0 = 1, e^.5 = 1.6487 and (not valid) e^9. Advantages 1 and 2 give surrogates 1 and 1.2 * 2.
    logp, old_logp = jnp.array([-1.0, -0.5, 9.0]), jnp.array([-1.0, -1.0, 0.0])
    value, return_ = jnp.array([1.0, 0.0, 7.0]), jnp.array([2.0, 4.0, -7.0])
    valid, zeros = jnp.array([True, True, False]), jnp.zeros(3)
    loss, metrics = ppo_loss(
        logp,
        old_logp,
        jnp.array([1.0, 2.0, 5.0]),
        value,
        zeros,
        return_,
        jnp.array([0.5, 0.7, 9.0]),
        valid,
        clip_eps=0.2,
        value_coef=0.5,
        entropy_coef=0.1,
    )
    ratio = np.exp(0.5)
    expected = {
        "ppo/policy_loss": -(1 + 2.4) / 2,
        "ppo/value_loss": (0.5 * 1 + 0.5 * 16) / 2,
        "ppo/entropy": 0.6,
        "ppo/loss": -1.7 + 0.5 * 4.25 - 0.1 * 0.6,
        "ppo/approx_kl": (ratio - 1 - 0.5) / 2,  # k3: (p - 1) - log p
        "ppo/log_ratio_square": 0.25 / 2,
        "ppo/clip_frac": 0.5,
        "ppo/ratio_mean": (1 + ratio) / 2,
        "ppo/ratio_min": 1.0,
        "ppo/ratio_max": ratio,
        "ppo/explained_variance": 1 - 2.25 / 1.0,  # R - V = 1, 4: variance 2.25; R = 2, 4: variance 1.
    }
    assert {name: float(metric) for name, metric in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(expected["ppo/loss"], rel=1e-5)
    assert all(metric.shape == () and metric.dtype == jnp.float32 for metric in metrics.values())


@pytest.mark.parametrize(
    ("options", "log_ratios", "surrogate"),
    [
        # Two decisions of two terms, with log-ratios .5, -.5 and .3, .1; advantages 1 and 2, clips at .8 and 1.2.
        ({"ratio": "decision"}, [[0.0], [0.4]], [1.0, 2 * 1.2]),
        ({"ratio": "token"}, [[0.5, -0.5], [0.3, 0.1]], [(1.2 + np.exp(-0.5)) / 2, 2 * (1.2 + np.exp(0.1)) / 2]),
        ({"ratio": "mean"}, [[0.0], [0.2]], [1.0, 2 * 1.2]),
        ({"ratio": "mean", "num_fixed_terms": 2}, [[0.0], [0.1]], [1.0, 2 * np.exp(0.1)]),
    ],
)
def test_a_ratio_is_of_a_decision_of_a_token_or_tempered(options, log_ratios, surrogate):
    logp, advantage = jnp.array([[0.5, -0.5], [0.3, 0.1], [9.0, 9.0]]), jnp.array([1.0, 2.0, 5.0])
    rest = (jnp.zeros_like(logp), advantage, *jnp.zeros((4, 3)), jnp.array([True, True, False]))

    def loss_fn(logp):
        return ppo_loss(logp, *rest, clip_eps=0.2, **options)

    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(logp)
    assert float(loss) == pytest.approx(-np.mean(surrogate), rel=1e-5)
    ratios = np.exp(log_ratios)
    expected = {
        "ppo/approx_kl": (np.exp(0.4) - 1 - 0.4) / 2,  # of whole decisions, the first of which is as likely as before
        "ppo/log_ratio_square": np.mean(np.square(log_ratios)),
        "ppo/ratio_mean": ratios.mean(),
        "ppo/ratio_min": ratios.min(),
        "ppo/ratio_max": ratios.max(),
        "ppo/clip_frac": np.mean((ratios < 0.8) | (ratios > 1.2)),
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    # A term has a gradient where its own ratio is not clipped.
    is_clipped = np.broadcast_to(ratios > 1.2 + 1e-6, (2, 2))
    np.testing.assert_array_equal(gradient[:2] == 0, is_clipped)
    assert not gradient[2].any()


def test_the_sum_of_terms_is_the_decisions_and_other_ratios_are_refused():
    logp, old_logp, *rest = random_batch()
    terms, old_terms = (jnp.stack([0.25 * x, 0.75 * x], axis=1) for x in (logp, old_logp))
    whole, of_terms = (ppo_loss(*pair, *rest, **OPTIONS) for pair in ((logp, old_logp), (terms, old_terms)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of_terms, whole)
    with pytest.raises(ValueError, match=r"ratio is 'sum', expected one of \('decision', 'token', 'mean'\)"):
        ppo_loss(logp, old_logp, *rest, clip_eps=0.2, ratio="sum")
    with pytest.raises(AssertionError):
        ppo_loss(terms, logp, *rest, clip_eps=0.2)


def test_equal_policies():
    # p = 1: the loss is minus the mean advantage, its gradient that of the policy gradient, and nothing is clipped.
    logp, _, advantage, value, _, _, entropy = random_batch()

    def loss_fn(logp):
        return ppo_loss(logp, random_batch()[0], advantage, value, value, value, entropy, clip_eps=0.2)

    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(logp)
    assert loss == pytest.approx(-float(advantage.mean()), abs=1e-6)
    np.testing.assert_allclose(gradient, -advantage / len(advantage), atol=1e-7)
    assert metrics["ppo/approx_kl"] == 0 and metrics["ppo/clip_frac"] == 0


OPTIONS = {
    "clip_eps": 0.2,
    "clip_eps_high": 0.28,
    "dual_clip": 3.0,
    "value_clip_eps": 0.2,
    "huber_delta": 1.0,
    "entropy_coef": 0.01,
}


def test_gradient_flows_through_logp_value_and_entropy_alone():
    gradient = jax.jit(jax.grad(functools.partial(ppo_loss, **OPTIONS), argnums=range(7), has_aux=True))
    gradients = gradient(*random_batch())[0]
    assert [bool(gradient.any()) for gradient in gradients] == [True, False, False, True, False, False, True]


gradient = jax.jit(jax.value_and_grad(functools.partial(ppo_loss, **OPTIONS), argnums=(0, 3, 6), has_aux=True))


@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan, np.inf])
def test_padding_changes_nothing(garbage):
    batch = random_batch(num=20)
    (loss, metrics), expected = gradient(*batch, jnp.ones(20, bool))
    padded = [jnp.append(array, jnp.full(4, garbage)).reshape(6, 4) for array in batch]  # Any shape will do.
    valid = (jnp.arange(24) < 20).reshape(6, 4)
    (padded_loss, padded_metrics), gradients = gradient(*padded, valid)
    assert padded_loss == pytest.approx(float(loss), rel=1e-6)
    for name, value in metrics.items():
        assert padded_metrics[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    for result, unpadded in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(result.ravel()[:20], unpadded, atol=1e-7)
        assert not result.ravel()[20:].any()


def test_no_valid_decision_at_all():
    loss, metrics = ppo_loss(*random_batch(num=4), jnp.zeros(4, bool), clip_eps=0.2)
    assert loss == 0 and all(np.isfinite(value) for value in metrics.values())


def test_jit_and_vmap():
    batches = [random_batch(seed, 16) for seed in range(3)]
    function = functools.partial(ppo_loss, **OPTIONS)
    stacked = jax.jit(jax.vmap(function))(*(jnp.stack(column) for column in zip(*batches, strict=True)))
    for i, batch in enumerate(batches):
        loss, metrics = function(*batch)
        assert stacked[0][i] == pytest.approx(float(loss), rel=1e-5)
        assert {name: float(value[i]) for name, value in stacked[1].items()} == pytest.approx(
            {name: float(value) for name, value in metrics.items()}, rel=1e-4, abs=1e-6
        )


def test_explained_variance():
    return_ = jnp.array([1.0, 2.0, 3.0, 99.0])
    valid = jnp.array([True, True, True, False])
    assert explained_variance(return_, return_, valid) == 1  # A perfect critic.
    assert explained_variance(jnp.full(4, 7.0), return_, valid) == pytest.approx(0, abs=1e-6)  # A constant one.
    constant = jnp.full(7, 0.3)  # Whose mean is not .3 in float32.
    assert explained_variance(jnp.arange(7.0), constant) == 0
