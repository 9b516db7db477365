"""OpenVLA at full size, without allocating it: parameter counts by the reference's arithmetic, types, sharding."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from stare_jax.models import make_policy, openvla_7b, openvla_tiny
from stare_jax.models.nn.linear import Execution
from stare_jax.models.normalize import identity_stats

CONFIGS = {"7b": openvla_7b(), "tiny": openvla_tiny()}


def abstract_leaves(config):
    policy = make_policy(config, identity_stats(config.action_dim, config.state_dim))
    leaves = jax.tree.leaves_with_path(jax.eval_shape(policy.init, jax.random.key(0)))
    return policy, {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def leaves_7b():
    return abstract_leaves(CONFIGS["7b"])[1]


def count(leaves, prefix):
    return sum(leaf.size for path, leaf in leaves.items() if path.startswith(prefix))


def vit_block(width, mlp_dim, layer_scale):
    """Parameters of a block: two norms, qkv and proj with biases, two MLP layers with biases, LayerScale."""
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * mlp_dim + mlp_dim + mlp_dim * width + width
    return 4 * width + attention + mlp + (2 * width if layer_scale else 0)


def test_parameters_are_the_published_ones_less_what_never_runs(leaves_7b):
    dino_unused = vit_block(1024, 4096, True) + 2 * 1024  # the last block and the final norm
    # SigLIP's attention pool: latent, q, kv, proj, norm, MLP.
    pool = 1152 + (1152 * 1152 + 1152) + (1152 * 2304 + 2304) + (1152 * 1152 + 1152) + 2 * 1152
    pool += 1152 * 4304 + 4304 + 4304 * 1152 + 1152
    siglip_unused = vit_block(1152, 4304, False) + 2 * 1152 + pool
    assert count(leaves_7b, "dino") == 303_230_976 - dino_unused
    assert count(leaves_7b, "siglip") == 427_680_704 - siglip_unused
    assert count(leaves_7b, "projector") == 71_385_600
    assert count(leaves_7b, "llm") == 6_738_939_904
    assert count(leaves_7b, "value_head") == 2_163_456
    assert count(leaves_7b, "") == 7_541_237_184 - dino_unused - siglip_unused + 2_163_456


def test_types_are_bfloat16_but_for_the_value_head(leaves_7b):
    for path, leaf in leaves_7b.items():
        assert leaf.dtype == (jnp.float32 if path.startswith("value_head") else jnp.bfloat16), path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(name):
    policy, leaves = abstract_leaves(CONFIGS[name])
    used = set()
    for path, leaf in leaves.items():
        matches = [(pattern, spec) for pattern, spec in policy.sharding_rules if re.search(pattern, path)]
        assert len(matches) == 1, f"{path}: {matches}"
        pattern, spec = matches[0]
        used.add(pattern)
        assert len(spec) <= len(leaf.shape), f"{path}: {spec} for {leaf.shape}"
        # Eight ways over one axis, or four times two, must divide what they split.
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis in (None, "fsdp", "tensor", ("tensor", "fsdp")), f"{path}: {spec}"
            assert axis is None or size % 2 == 0, f"{path}: {spec} for {leaf.shape}"
            assert name != "7b" or axis is None or size % 8 == 0, f"{path}: {spec} for {leaf.shape}"
    assert used == {pattern for pattern, _ in policy.sharding_rules}


def test_large_parameters_are_split_over_both_axes(leaves_7b):
    policy, _ = abstract_leaves(CONFIGS["7b"])
    for path, leaf in leaves_7b.items():
        if leaf.size > 10_000_000:
            spec = next(spec for pattern, spec in policy.sharding_rules if re.search(pattern, path))
            axes = {axis for part in spec if part for axis in ([part] if isinstance(part, str) else part)}
            assert axes == {"fsdp", "tensor"}, f"{path}: {spec}"


def test_the_full_size_policy_traces(leaves_7b):
    """Sampling, scoring and the imitation loss with its gradient, as shapes."""
    del leaves_7b
    policy = make_policy(CONFIGS["7b"], identity_stats(7, 0))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    observation = policy.observation_shape(2)
    assert observation.images["3rd_view_camera"].shape == (2, 224, 224, 3)
    decision = jax.eval_shape(policy.sample, params, observation, jax.random.key(0), temperature=1.0)
    assert decision.action.shape == (2, 7)
    score = jax.eval_shape(policy.log_prob, params, observation, decision.trace, reference_params=params)
    assert {leaf.dtype for leaf in score} == {jnp.dtype("float32")}
    loss = lambda p, o, a: policy.imitation_loss(p, o, a)[0].mean()  # noqa: E731
    grads = jax.eval_shape(jax.grad(loss), params, observation, decision.action)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_tiny_is_about_a_million_parameters():
    _, leaves = abstract_leaves(CONFIGS["tiny"])
    assert 0.7e6 < sum(math.prod(leaf.shape) for leaf in leaves.values()) < 1.3e6


def test_precision_is_configurable():
    _, leaves = abstract_leaves(openvla_7b(execution=Execution(dtype="bfloat16", param_dtype="float32")))
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
