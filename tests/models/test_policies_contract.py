"""Every preset through every function of the `Policy` record: shapes, types, finiteness, initial state."""

import jax
import numpy as np
import pytest
from nano_policy import jit, random_observation, some_stats

from stare_jax.models import (
    ActionScore,
    Decision,
    MLPConfig,
    Policy,
    make_policy,
    openvla_state,
    openvla_tiny,
    pi05_state,
    pi05_tiny,
)
from stare_jax.models.nn.linear import Execution

ROLLED = {"execution": Execution(), "decode_unroll": 1}  # compiles faster
CONFIGS = {
    "openvla_tiny": openvla_tiny(state_dim=3, **ROLLED),
    "openvla_state": openvla_state(**ROLLED),
    "openvla_state, no prompt": openvla_state(prompt_template="", prompt_length=3, **ROLLED),
    "pi05_tiny": pi05_tiny(state_dim=3, execution=Execution()),
    "pi05_state": pi05_state(noise="learned", execution=Execution()),
    "mlp": MLPConfig(),
}
INSTRUCTIONS = ("push the blue cube to the target", "lift the peg upright")


def assert_arrays(record, shapes):
    for name, (shape, dtype) in shapes.items():
        leaf = getattr(record, name)
        assert (leaf.shape, leaf.dtype) == (shape, np.dtype(dtype)), name
        assert np.isfinite(leaf).all(), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_policy(config):
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    assert isinstance(policy, Policy) and policy.action_dim == config.action_dim
    params = jit(policy.init)(jax.random.key(0))
    abstract = jax.eval_shape(policy.init, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    observation = random_observation(policy, INSTRUCTIONS)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), observation)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), policy.observation_shape(2))

    floats, logp = ((2,), np.float32), ((2, config.action_dim), np.float32)
    trace, action = {"bins": ((2, config.action_dim), np.int32)}, ((2, config.action_dim), np.float32)
    if policy.window is not None:
        num_steps = config.num_denoising_steps
        chain = ((2, num_steps + 1, policy.window, config.model_action_dim), np.float32)
        trace = {"chain": chain, "is_drawn": ((2, num_steps), bool)}
        action = ((2, policy.chunk, config.action_dim), np.float32)
        logp = ((2, num_steps if config.noise == "learned" else 1), np.float32)
    assert policy.num_fixed_terms == int(getattr(config, "noise", None) == "learned")
    decision = jit(policy.sample)(params, observation, jax.random.key(1), temperature=1.0)
    assert isinstance(decision, Decision)
    assert_arrays(decision, {"action": action, "logp": logp, "value": floats})
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in decision.trace.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in trace.items()
    }
    assert jax.eval_shape(policy.log_prob, params, observation, decision.trace).divergence is None
    score = jit(policy.log_prob)(params, observation, decision.trace, reference_params=params)
    assert isinstance(score, ActionScore)
    assert_arrays(score, dict.fromkeys(("entropy", "value", "divergence"), floats) | {"logp": logp})
    np.testing.assert_allclose(score.logp, decision.logp, atol=1e-4)
    np.testing.assert_allclose(score.value, decision.value, atol=1e-4)
    # A fresh critic is close to zero, and a fresh policy close to uniform over its bins, where it has bins.
    assert (np.abs(score.value) < 0.5).all()
    if policy.window is None:
        assert (score.entropy > 0.95 * np.log(getattr(config, "num_bins", 256))).all()
    np.testing.assert_allclose(score.divergence, 0, atol=1e-6)

    def total_divergence(reference_params):
        scored = (params, observation, decision.trace)
        return policy.log_prob(*scored, reference_params=reference_params).divergence.sum()

    gradient = jit(jax.grad(total_divergence))(jax.tree.map(lambda x: 1.02 * x, params))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    value = jit(policy.value)(params, observation)
    np.testing.assert_allclose(value, score.value, atol=1e-4)
    shown = decision.action
    if policy.window is not None:
        shown = np.zeros((2, policy.window, config.action_dim), np.float32)
    keys = jax.random.split(jax.random.key(2), 2)
    loss, metrics = jit(policy.imitation_loss)(params, observation, shown, key=keys)
    assert (loss.shape, loss.dtype) == floats and np.isfinite(loss).all()
    assert {(leaf.shape, leaf.dtype) for leaf in metrics.values()} == {((2,), np.dtype("float32"))}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_floats_have_32_bits_where_jax_has_64_as_well(config):
    """Another library in the process may have asked for them (jax_enable_x64)."""
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    observation = random_observation(policy, INSTRUCTIONS)
    shape = (2, config.action_dim) if policy.window is None else (2, policy.window, config.action_dim)

    def everything(seed):
        params = policy.init(jax.random.key(seed))
        decision = policy.sample(params, observation, jax.random.key(seed), temperature=1.0)
        score = policy.log_prob(params, observation, decision.trace, reference_params=params)
        keys = jax.random.split(jax.random.key(seed), 2)
        loss = policy.imitation_loss(params, observation, np.zeros(shape, np.float32), key=keys)
        return params, decision, score, policy.value(params, observation), loss

    with jax.enable_x64(True):
        leaves = jax.tree.leaves_with_path(jax.eval_shape(everything, 0))
    wide = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.dtype == np.float64]
    assert not wide


def test_unknown_configurations_are_refused():
    with pytest.raises(TypeError, match="config: got dict, expected one of MLPConfig, OpenVLAConfig, Pi05Config"):
        make_policy({}, some_stats(2, 2))
