"""Learning rates, schedules, decay and freezing, parameter by parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.state.optimizer import OptimizerConfig, make_optimizer, merge_params, split_params

PARAMS = {
    "trunk": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "value_head": {"kernel": jnp.ones((2, 1))},
    "tower": {"value_proj": {"kernel": jnp.ones((2, 2))}},
}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def first_step(config, grads=ONES, num_steps=100, **extra):
    tx = make_optimizer(config, num_steps=num_steps)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, **extra)
    return updates


def test_the_value_head_has_a_learning_rate_of_its_own():
    # The first step of Adam is the learning rate, whatever the gradient.
    updates = first_step(OptimizerConfig(learning_rate=1e-3, value_learning_rate=1e-2, weight_decay=0.0))
    np.testing.assert_allclose(updates["value_head"]["kernel"], -1e-2, rtol=1e-4)
    np.testing.assert_allclose(updates["trunk"]["kernel"], -1e-3, rtol=1e-4)
    # A projection that happens to be called "value" is not the value head.
    np.testing.assert_allclose(updates["tower"]["value_proj"]["kernel"], -1e-3, rtol=1e-4)


def test_weights_decay_and_biases_do_not():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = first_step(OptimizerConfig(learning_rate=1e-3, weight_decay=0.1), grads=zero)
    np.testing.assert_allclose(updates["trunk"]["kernel"], -1e-4, rtol=1e-5)
    assert not updates["trunk"]["bias"].any()


def test_gradients_are_clipped_together():
    config = OptimizerConfig(max_grad_norm=1.0, eps=1.0, b1=0.0, b2=0.0, weight_decay=0.0, learning_rate=1.0)
    # 12 ones have the norm sqrt(12), so each becomes g = 1 / sqrt(12); without memory Adam's step is g / (g + eps).
    clipped = 1 / np.sqrt(12)
    np.testing.assert_allclose(first_step(config)["trunk"]["bias"], -clipped / (clipped + 1), rtol=1e-5)


def test_where_the_value_head_moves_alone_the_gradients_of_the_rest_do_not_clip_it():
    config = OptimizerConfig(max_grad_norm=2.0, eps=1.0, b1=0.0, b2=0.0, weight_decay=0.0, learning_rate=1.0)
    large = jax.tree.map(lambda x: 1e6 * x, ONES)
    grads = large | {"value_head": {"kernel": jnp.ones((2, 1))}}
    # The norm of two ones is below 2: nothing is clipped, and a step without memory is g / (g + eps).
    for train_policy in (False, np.bool_(False), jnp.bool_(False)):
        updates = first_step(config, grads=grads, train_policy=train_policy)
        np.testing.assert_allclose(updates["value_head"]["kernel"], -0.5, rtol=1e-5)
        assert not updates["trunk"]["kernel"].any()
    updates = first_step(config, grads=grads, train_policy=True)
    assert (np.abs(updates["value_head"]["kernel"]) < 1e-5).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 3 steps of warm-up to 1, then 4 steps down to 0.
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, (1 + np.sqrt(0.5)) / 2, 0.5, (1 - np.sqrt(0.5)) / 2, 0]),
    ],
)
def test_schedules_warm_up_and_decay(schedule, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=3, weight_decay=0.0, max_grad_norm=None)
    tx = make_optimizer(config, num_steps=7)
    state, sizes = tx.init(PARAMS), []
    for _ in expected:
        updates, state = tx.update(ONES, state, PARAMS)
        sizes.append(-float(updates["trunk"]["bias"][0]))
    np.testing.assert_allclose(sizes, expected, atol=1e-3)


def test_without_a_number_of_steps_only_the_warm_up_is_the_optimisers():
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=1, weight_decay=0.0, max_grad_norm=None)
    tx = make_optimizer(config, num_steps=None)
    state, sizes = tx.init(PARAMS), []
    for _ in range(4):
        updates, state = tx.update(ONES, state, PARAMS)
        sizes.append(-float(updates["trunk"]["bias"][0]))
    np.testing.assert_allclose(sizes, [0.5, 1, 1, 1], atol=1e-3)


def test_split_and_merge_are_inverse_and_frozen_parameters_have_no_optimiser_state():
    trainable, frozen = split_params(PARAMS, ("^tower", "bias$"))
    assert jax.tree.map(jnp.shape, trainable) == {"trunk": {"kernel": (2, 2)}, "value_head": {"kernel": (2, 1)}}
    assert jax.tree.map(jnp.shape, frozen) == {"trunk": {"bias": (2,)}, "tower": {"value_proj": {"kernel": (2, 2)}}}
    merged = merge_params(trainable, frozen)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, PARAMS)
    state = make_optimizer(OptimizerConfig(), num_steps=1).init(trainable)
    # Two moments for each of the 6 trainable numbers, and counters.
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 6


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("^tower", "^towr"), r"freeze: no parameter matches '\^towr'"),
        (("trunk", "value", "tower"), "leave no parameter to train"),
    ],
)
def test_a_freeze_that_cannot_be_meant_is_refused(freeze, message):
    with pytest.raises(ValueError, match=message):
        split_params(PARAMS, freeze)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("value_learning_rate", -1.0),
        ("b1", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
    ],
)
def test_config_names_the_field_it_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value}, expected"):
        OptimizerConfig(**{field: value})
    with pytest.raises(ValueError, match="schedule: got 'step', expected one of"):
        OptimizerConfig(schedule="step")
