"""TPO and STA-TPO: by hand, which stages count, the three margins, and that one is a special case of the other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.losses import sta_tpo_loss, tpo_loss


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_tpo_by_hand():
    # Pair 0: Delta+ = .5, 1.5 and Delta- = -1 (its second action does not exist): q = 1 and -1, z = .1 * 2.
    # Pair 1: q = 0 and 3, z = -.3.
    chosen, rejected = np.float32([[1.5, 2.5], [1, 1]]), np.float32([[0, 9], [4, 4]])
    reference = np.float32([[1, 1], [1, 1]])
    everything, first = np.ones((2, 2), bool), np.array([[True, False], [True, True]])
    loss, metrics = tpo_loss(chosen, reference, rejected, reference, everything, first, beta=0.1)
    assert loss == pytest.approx(-(log_sigmoid(0.2) + log_sigmoid(-0.3)) / 2, rel=1e-6)
    expected = {"loss": loss, "accuracy": 0.5, "margin": -0.05, "chosen_logratio": 0.5, "rejected_logratio": 1.0}
    assert {name.removeprefix("tpo/"): pytest.approx(float(value)) for name, value in metrics.items()} == expected


class Pairs:
    """Random pairs: B = 3, K = 4, T = 6 and 8 actions."""

    def __init__(self, seed=0, num_pairs=3, num_stages=4, num_steps=(6, 8)):
        rng = np.random.default_rng(seed)
        sides = []
        for length in num_steps:
            valid = np.arange(length) < rng.integers(2, length + 1, (num_pairs, 1))
            stage_t = np.sort(rng.integers(0, num_stages, (num_pairs, length)), axis=1)
            sides.append(
                {
                    "logp": np.float32(rng.normal(size=(num_pairs, length))),
                    "ref_logp": np.float32(rng.normal(size=(num_pairs, length))),
                    "valid": valid,
                    "mask": stage_t[:, None] == np.arange(num_stages)[:, None],
                    "cost": np.float32(rng.uniform(0, 0.1, (num_pairs, num_stages))),
                    "completed": np.arange(num_stages) < stage_t.max(axis=1, keepdims=True, where=valid, initial=0),
                }
            )
        self.chosen, self.rejected = sides

    @property
    def logps(self):
        sides = (self.chosen, self.rejected)
        return [side[name] for side in sides for name in ("logp", "ref_logp")] + [side["valid"] for side in sides]

    @property
    def arguments(self):
        sides = (self.chosen, self.rejected)
        return self.logps + [side[name] for name in ("mask", "cost", "completed") for side in sides]


def z_and_counts(pairs, beta, cost_coef, margin="paper"):
    """z `[B, K]` and which count, by loops over the definition."""
    chosen, rejected = pairs.chosen, pairs.rejected
    num_pairs, num_stages = chosen["cost"].shape
    z, counts = np.zeros((num_pairs, num_stages)), np.zeros((num_pairs, num_stages), bool)
    for b in range(num_pairs):
        for k in range(num_stages):
            q, exists = {}, True
            for name, side in (("+", chosen), ("-", rejected)):
                steps = side["mask"][b, k] & side["valid"][b]
                exists &= bool(steps.any()) and (k == 0 or bool(side["completed"][b, k - 1]))
                q[name] = (side["logp"] - side["ref_logp"])[b, steps].mean() if steps.any() else 0.0
            gap, m = q["+"] - q["-"], cost_coef * (rejected["cost"][b, k] - chosen["cost"][b, k])
            if margin == "offset":
                m = -m
            elif margin == "relabel":
                gap, m = (gap if chosen["cost"][b, k] <= rejected["cost"][b, k] else -gap), abs(m)
            z[b, k], counts[b, k] = beta * (gap + m), exists
    return z, counts


@pytest.mark.parametrize("margin", ["paper", "offset", "relabel"])
@pytest.mark.parametrize("stage_norm", ["K", "valid"])
def test_sta_tpo_follows_the_definition(stage_norm, margin):
    pairs, beta, cost_coef = Pairs(), 0.7, 10.0
    z, counts = z_and_counts(pairs, beta, cost_coef, margin)
    assert 0 < counts.sum() < counts.size
    divisor = 4 if stage_norm == "K" else np.maximum(counts.sum(axis=1), 1)
    expected = np.mean(np.sum(counts * np.log1p(np.exp(-z)), axis=1) / divisor)
    loss, metrics = sta_tpo_loss(*pairs.arguments, beta=beta, cost_coef=cost_coef, stage_norm=stage_norm, margin=margin)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics["tpo/num_valid_stages"] == pytest.approx(counts.sum(axis=1).mean())
    np.testing.assert_array_equal([metrics[f"tpo/count_stage_{k}"] for k in range(4)], counts.sum(axis=0))


def hand_made_pair(chosen_cost=0.01, rejected_cost=0.03):
    """One pair, two stages of two actions: q+ = 1, 2 and q- = 0, 4; stage 0 is completed in both."""
    mask = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], bool)
    zeros, valid = np.zeros((1, 4), np.float32), np.ones((1, 4), bool)
    chosen, rejected = np.float32([[0.5, 1.5, 2, 2]]), np.float32([[-1, 1, 3, 5]])
    costs = np.float32([[chosen_cost, 0.02]]), np.float32([[rejected_cost, 0.02]])
    completed = np.array([[True, False]])
    return [chosen, zeros, rejected, zeros, valid, valid, mask, mask, *costs, completed, completed]


@pytest.mark.parametrize(
    "margin, costs, expected",
    [
        # lambda = 10: m_0 = 10 (.03 - .01) = .2, m_1 = 0. z_0 = .5 (1 + .2), z_1 = .5 (2 - 4).
        ("paper", (0.01, 0.03), (0.6, -1.0)),
        ("offset", (0.01, 0.03), (0.4, -1.0)),
        ("relabel", (0.01, 0.03), (0.6, -1.0)),
        # The rejected trajectory was the cheaper one in stage 0: m_0 = -.2.
        ("paper", (0.03, 0.01), (0.4, -1.0)),
        ("offset", (0.03, 0.01), (0.6, -1.0)),
        ("relabel", (0.03, 0.01), (-0.4, -1.0)),
    ],
)
def test_margins_by_hand(margin, costs, expected):
    arguments = hand_made_pair(*costs)
    loss, metrics = sta_tpo_loss(*arguments, beta=0.5, cost_coef=10.0, margin=margin)
    assert loss == pytest.approx(-sum(map(log_sigmoid, expected)) / 2, rel=1e-6)
    sign = -1 if margin == "relabel" and costs[0] > costs[1] else 1
    expected_metrics = {
        "tpo/margin_stage_0": sign * 0.5,  # beta (q+ - q-), towards the side that is preferred in the stage
        "tpo/margin_stage_1": -1.0,
        "tpo/accuracy_stage_0": float(sign > 0),
        "tpo/accuracy_stage_1": 0.0,
        "tpo/cost_margin_stage_0": 10 * (costs[1] - costs[0]),
        "tpo/num_valid_stages": 2.0,
        "tpo/accuracy": float(sign > 0) / 2,
    }
    assert {name: float(metrics[name]) for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-5)


def test_relabelling_goes_by_the_costs_also_where_they_have_no_weight():
    # z_0 = -.5 (1 - 0), z_1 = .5 (2 - 4): the costs of stage 1 are equal.
    loss, _ = sta_tpo_loss(*hand_made_pair(0.03, 0.01), beta=0.5, cost_coef=0.0, margin="relabel")
    assert loss == pytest.approx(-(log_sigmoid(-0.5) + log_sigmoid(-1)) / 2, rel=1e-6)


def test_a_stage_counts_only_after_the_one_before_is_completed_in_both():
    arguments = hand_made_pair()
    first_alone = -log_sigmoid(0.6) / 2
    for side in (10, 11):
        incomplete = list(arguments)
        incomplete[side] = np.array([[False, False]])
        loss, metrics = sta_tpo_loss(*incomplete, beta=0.5, cost_coef=10.0)
        assert loss == pytest.approx(first_alone, rel=1e-6)
        assert metrics["tpo/num_valid_stages"] == 1 and metrics["tpo/count_stage_1"] == 0
        by_count, _ = sta_tpo_loss(*incomplete, beta=0.5, cost_coef=10.0, stage_norm="valid")
        assert by_count == pytest.approx(2 * first_alone, rel=1e-6)
    skipped = list(arguments)
    skipped[7] = np.array([[[1, 1, 1, 1], [0, 0, 0, 0]]], bool)  # No action of the rejected one is in stage 1.
    # Then q- = mean(-1, 1, 3, 5) = 2 in stage 0, z_0 = .5 (1 - 2 + .2).
    assert sta_tpo_loss(*skipped, beta=0.5, cost_coef=10.0)[0] == pytest.approx(-log_sigmoid(-0.4) / 2, rel=1e-6)


def test_one_stage_without_costs_is_tpo():
    pairs = Pairs(num_stages=1)
    tpo = jax.jit(jax.value_and_grad(functools.partial(tpo_loss, beta=0.3), argnums=(0, 2), has_aux=True))
    for margin in ("paper", "offset"):
        function = functools.partial(sta_tpo_loss, beta=0.3, cost_coef=0.0, margin=margin)
        staged = jax.jit(jax.value_and_grad(function, argnums=(0, 2), has_aux=True))
        (loss, metrics), gradients = staged(*pairs.arguments)
        (expected, expected_metrics), expected_gradients = tpo(*pairs.logps)
        assert loss == pytest.approx(float(expected), rel=1e-6)
        for name in ("tpo/loss", "tpo/accuracy", "tpo/margin", "tpo/chosen_logratio", "tpo/rejected_logratio"):
            assert metrics[name] == pytest.approx(float(expected_metrics[name]), rel=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), gradients, expected_gradients)


def test_gradient_is_the_weight_of_every_step_and_two_passes_are_exact():
    # First pass: q^ without gradient gives the weight of a step of stage k, beta sigma(-z_k) / (K T_k |B|). Second
    # pass: the weighted log-probabilities, one step at a time. Here they are those of a linear softmax.
    pairs, beta, cost_coef = Pairs(1), 0.7, 10.0
    rng = np.random.default_rng(2)
    features = [np.float32(rng.normal(size=(*side["logp"].shape, 5, 3))) for side in (pairs.chosen, pairs.rejected)]
    theta = jnp.array(rng.normal(size=3), jnp.float32)

    def logp(theta, feature):
        return jax.nn.log_softmax(feature @ theta)[..., 0]

    def one_pass(theta):
        arguments = list(pairs.arguments)
        arguments[0], arguments[2] = logp(theta, features[0]), logp(theta, features[1])
        return sta_tpo_loss(*arguments, beta=beta, cost_coef=cost_coef)[0]

    expected = jax.jit(jax.grad(one_pass))(theta)

    for side, feature in zip((pairs.chosen, pairs.rejected), features, strict=True):
        side["logp"] = np.asarray(logp(theta, feature))
    z, counts = z_and_counts(pairs, beta, cost_coef)
    loss_fn = functools.partial(sta_tpo_loss, beta=beta, cost_coef=cost_coef)
    weights = jax.jit(jax.grad(loss_fn, argnums=(0, 2), has_aux=True))(*pairs.arguments)[0]
    microbatch = jax.jit(jax.grad(lambda theta, feature, weight: jnp.sum(weight * logp(theta, feature))))
    accumulated = np.zeros(3)
    for side, feature, weight, sign in zip((pairs.chosen, pairs.rejected), features, weights, (-1, 1), strict=True):
        steps = side["mask"] & side["valid"][:, None]
        by_stage = counts * beta / (1 + np.exp(z)) / (4 * np.maximum(steps.sum(axis=-1), 1) * len(z))
        np.testing.assert_allclose(weight, sign * np.einsum("bk,bkt->bt", by_stage, steps), atol=1e-6)
        for t in range(weight.shape[1]):
            accumulated += np.asarray(microbatch(theta, feature[:, t], weight[:, t]))
    np.testing.assert_allclose(accumulated, expected, atol=1e-6)


def test_costs_and_reference_carry_no_gradient():
    arguments = Pairs().arguments
    function = functools.partial(sta_tpo_loss, beta=0.7, cost_coef=10.0)
    gradients = jax.jit(jax.grad(function, argnums=(0, 1, 2, 3, 8, 9), has_aux=True))(*arguments)[0]
    chosen, chosen_ref, rejected, rejected_ref, chosen_cost, rejected_cost = gradients
    assert chosen.any() and rejected.any()
    assert not any(gradient.any() for gradient in (chosen_ref, rejected_ref, chosen_cost, rejected_cost))


def test_padding_changes_nothing():
    pairs = Pairs()
    function = functools.partial(sta_tpo_loss, beta=0.7, cost_coef=10.0)
    gradient_fn = jax.jit(jax.value_and_grad(function, argnums=(0, 2), has_aux=True))
    loss, metrics = function(*pairs.arguments)  # Not jitted, the other one is.
    expected = gradient_fn(*pairs.arguments)[1]
    num_pairs = len(pairs.chosen["logp"])
    for side in (pairs.chosen, pairs.rejected):
        for name, garbage in (("logp", np.nan), ("ref_logp", np.inf), ("valid", False), ("mask", True)):
            width = [(0, 2)] + [(0, 0)] * (side[name].ndim - 2) + [(0, 3)]  # Two more pairs, three more actions.
            side[name] = np.pad(side[name], width, constant_values=garbage)
        side["cost"] = np.pad(side["cost"], ((0, 2), (0, 0)), constant_values=5.0)
        side["completed"] = np.pad(side["completed"], ((0, 2), (0, 0)), constant_values=True)
    (padded_loss, padded_metrics), gradients = gradient_fn(*pairs.arguments)
    assert padded_loss == pytest.approx(float(loss), rel=1e-6)
    assert {name: float(value) for name, value in padded_metrics.items()} == pytest.approx(
        {name: float(value) for name, value in metrics.items()}, rel=1e-5
    )
    for gradient, unpadded in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient[:num_pairs, :-3], unpadded, atol=1e-6)
        assert not gradient[num_pairs:].any() and not gradient[:, -3:].any()
    plain = tpo_loss(*pairs.logps, beta=0.7)[0]
    assert plain == pytest.approx(float(tpo_loss(*Pairs().logps, beta=0.7)[0]), rel=1e-6)


def test_metrics_are_flat_float32_scalars():
    arguments = Pairs().arguments
    for loss, metrics in (
        sta_tpo_loss(*arguments, beta=0.1, cost_coef=10.0),
        tpo_loss(*arguments[:6], beta=0.1),
    ):
        assert loss.shape == () and loss.dtype == jnp.float32
        for name, value in metrics.items():
            assert name.startswith("tpo/") and value.shape == () and value.dtype == jnp.float32


@pytest.mark.parametrize("wrong", [{"stage_norm": "T"}, {"margin": "hinge"}])
def test_refuses_unknown_variants(wrong):
    with pytest.raises(ValueError, match="'T', expected|'hinge', expected"):
        sta_tpo_loss(*Pairs().arguments, beta=0.1, cost_coef=10.0, **wrong)


def test_shapes_are_checked():
    arguments = Pairs().arguments
    arguments[6] = arguments[6][:, :, :-1]
    with pytest.raises(AssertionError):
        sta_tpo_loss(*arguments, beta=0.1, cost_coef=10.0)
