"""Generation: logits of 256 tokens and no others, all of which can be drawn, and rollout equal to update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_policy import INSTRUCTIONS, jit, nano_config, random_observation, random_params, some_stats

from stare_jax.models import Policy, make_policy, openvla_state
from stare_jax.models.bins import NUM_BINS
from stare_jax.models.nn.linear import Execution
from stare_jax.types import Observation, PyTree


def with_output_layer(params, kernel):
    return params | {"llm": params["llm"] | {"lm_head": params["llm"]["lm_head"] | {"kernel": kernel}}}


@pytest.fixture(scope="module")
def sharp(nano):
    """Parameters whose distributions are far from uniform: entropies of about 2 nats, of 5.5."""
    return with_output_layer(nano.params, 20 * nano.params["llm"]["lm_head"]["kernel"])


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_rollout_and_update_agree_to_rounding(nano, sharp, temperature):
    """Tokens one at a time against a cache, and all at once: the same masks, the same temperature."""
    for seed in range(3):
        decision = nano.sample(sharp, nano.observation, jax.random.key(seed), temperature=temperature)
        score = nano.log_prob(sharp, nano.observation, decision.trace, temperature=temperature)
        np.testing.assert_allclose(decision.logp, score.logp, rtol=0, atol=1e-5)
        np.testing.assert_allclose(decision.value, score.value, rtol=0, atol=1e-5)
        assert (score.entropy < 3).all()


def test_no_token_but_the_256_takes_part_in_rollout_or_update(nano, sharp):
    outside = np.array(sharp["llm"]["lm_head"]["kernel"])
    outside[:, : 896 - NUM_BINS] = 50.0
    outside[:, 896:] = -50.0
    other = with_output_layer(sharp, outside)
    first, second = (nano.sample(p, nano.observation, jax.random.key(0), temperature=0.6) for p in (sharp, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    first, second = (nano.log_prob(p, nano.observation, first.trace, temperature=0.6) for p in (sharp, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def equations(jaxpr):
    """Every equation of a traced function, those inside loops, branches and calls among them."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def widths_of_products(fn, *args):
    """The last axes of all matrix products in a function, and of all arrays in it that are not parameters."""
    found = list(equations(jax.make_jaxpr(fn)(*args).jaxpr))
    products = {e.outvars[0].aval.shape[-1] for e in found if e.primitive.name == "dot_general"}
    return products, {v.aval.shape[-1] for e in found for v in e.outvars if v.aval.shape}


def test_decoding_computes_logits_of_256_tokens_and_no_more(nano):
    policy, args = nano.policy, (nano.params, nano.observation)
    trace, vocab_size = {"bins": np.zeros((3, 3), np.int32)}, 960
    for fn in (
        lambda p, o: policy.sample(p, o, jax.random.key(0), temperature=1.0),
        lambda p, o: policy.log_prob(p, o, trace),
    ):
        products, arrays = widths_of_products(fn, *args)
        assert NUM_BINS in products and vocab_size not in arrays
    # The imitation loss over the whole vocabulary does compute them, and this would see it.
    whole = make_policy(nano_config(restrict_logits=False), some_stats(3, 2))
    products, _ = widths_of_products(lambda p, o: whole.imitation_loss(p, o, np.zeros((3, 3), np.float32)), *args)
    assert vocab_size in products


class InBfloat16(NamedTuple):
    """A policy of the state, computed in bfloat16, and a large batch."""

    policy: Policy
    params: PyTree
    observation: Observation
    sample: Callable


@pytest.fixture(scope="module")
def in_bfloat16():
    execution = Execution(dtype="bfloat16", param_dtype="bfloat16")
    policy = make_policy(openvla_state(2, execution=execution, decode_unroll=1), some_stats(7, 2))
    observation = random_observation(policy, INSTRUCTIONS[:1] * 1024)
    return InBfloat16(policy, random_params(policy), observation, jit(policy.sample))


def test_every_one_of_the_256_tokens_can_be_drawn(in_bfloat16):
    _, params, observation, sample = in_bfloat16
    params = with_output_layer(params, jnp.zeros_like(params["llm"]["lm_head"]["kernel"]))
    decision = sample(params, observation, jax.random.key(0), temperature=0.6)
    # 7168 draws of 256 equally likely tokens: one is missing in one of 10^9 keys, and 206 with a top-k of 50.
    counts = np.bincount(np.ravel(decision.trace["bins"]), minlength=NUM_BINS)
    assert counts.shape == (NUM_BINS,) and counts.min() > 0
    np.testing.assert_allclose(decision.logp, -np.log(NUM_BINS), rtol=1e-5)


def test_log_probabilities_and_values_are_float32_in_bfloat16_networks(in_bfloat16):
    policy, params, observation, sample = in_bfloat16
    decision = sample(params, observation, jax.random.key(0), temperature=1.0)
    settings = {"temperature": 1.0, "reference_params": jax.tree.map(lambda x: 1.1 * x, params)}
    score = jit(policy.log_prob)(params, observation, decision.trace, **settings)
    for numbers in (decision.action, decision.logp, decision.value, *score):
        assert numbers.dtype == jnp.float32
        # Not merely bfloat16 in a wider type.
        assert (numbers != numbers.astype(jnp.bfloat16)).any()
    # The decoder rounds differently where it reads a cache: by some bfloat16 steps of the logits.
    np.testing.assert_allclose(decision.logp, score.logp, atol=0.2)
