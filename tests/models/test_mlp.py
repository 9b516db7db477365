"""The small policy keeps the promises of the `Policy` record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.normalize import identity_stats
from stare_jax.sharding.mesh import make_mesh, tree_shardings
from stare_jax.types import Observation

CONFIG = MLPConfig(state_dim=3, action_dim=2, num_bins=6, hidden_dims=(8,), value_dims=(8,))
STATS = identity_stats(2, 3)._replace(action_q01=np.float32([-2, 0]), action_q99=np.float32([2, 1]))
POLICY = make_mlp(CONFIG, STATS)


def observe(batch_size):
    state = np.random.default_rng(0).uniform(-1, 1, (batch_size, 3)).astype(np.float32)
    tokens, token_mask = POLICY.tokenize(["push"] * batch_size, state)
    return Observation({}, state, tokens, token_mask)


@pytest.fixture(scope="module")
def params():
    return jax.jit(POLICY.init)(jax.random.key(0))


def test_shapes_are_those_that_are_promised(params):
    observation = observe(5)
    promised = POLICY.observation_shape(5)
    assert jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), observation) == jax.tree.map(
        lambda x: (x.shape, jnp.dtype(x.dtype)), promised
    )
    decision = POLICY.sample(params, observation, jax.random.key(1))
    assert decision.action.shape == (5, 2) and decision.trace["bins"].dtype == jnp.int32
    assert (decision.action >= np.float32([-2, 0])).all() and (decision.action <= np.float32([2, 1])).all()
    np.testing.assert_allclose(decision.value, POLICY.value(params, observation), rtol=1e-6)


def test_it_starts_nearly_uniform_and_scores_its_samples_as_it_drew_them(params):
    observation = observe(7)
    for temperature in (1.0, 0.5):
        decision = POLICY.sample(params, observation, jax.random.key(1), temperature=temperature)
        score = POLICY.log_prob(params, observation, decision.trace, temperature=temperature)
        np.testing.assert_allclose(score.logp, decision.logp, rtol=1e-6)
    np.testing.assert_allclose(POLICY.log_prob(params, observation, decision.trace).logp, -np.log(6), atol=0.05)
    np.testing.assert_allclose(score.entropy, np.log(6), atol=0.05)


def test_imitation_is_least_for_the_bin_of_the_action(params):
    observation = observe(1)
    params = dict(params) | {"logits": jax.tree.map(jnp.zeros_like, params["logits"])}
    # Actions -2 and 1 lie in the first and in the last of five bins; ids 4 and 5 share a centre.
    params["logits"]["bias"] = jnp.zeros(12).at[jnp.array([0, 6 + 4])].set(20.0)
    loss, metrics = POLICY.imitation_loss(params, observation, np.float32([[-2, 1 - 1e-3]]))
    assert loss[0] < 1e-3 and metrics["accuracy"][0] == 1.0
    assert POLICY.imitation_loss(params, observation, np.float32([[2, 0]]))[0][0] > 30


def test_soft_labels_have_the_loss_of_their_entropy_at_least(params):
    soft = make_mlp(MLPConfig(state_dim=3, num_bins=6, hidden_dims=(8,), value_dims=(8,), label_width=1.0), STATS)
    loss, _ = soft.imitation_loss(params, observe(1), np.zeros((1, 2), np.float32))
    assert 2.0 < loss[0] < 2 * np.log(6) + 0.1


def test_actor_and_critic_share_no_parameter_and_the_rules_cover_all(params):
    grads = jax.grad(lambda p: POLICY.value(p, observe(3)).sum())(params)
    assert not any(g.any() for name in ("trunk_0", "logits") for g in jax.tree.leaves(grads[name]))
    tree_shardings(params, make_mesh(), POLICY.sharding_rules)


@pytest.mark.parametrize(
    ("field", "value"), [("num_bins", 2), ("state_dim", 0), ("label_width", -1.0), ("hidden_dims", (0,))]
)
def test_config_names_the_field_it_refuses(field, value):
    with pytest.raises(ValueError, match=rf"^{field}(\[0\])?: got"):
        MLPConfig(**{field: value})
