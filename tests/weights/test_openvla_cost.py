"""The benchmark's count of floating point operations, by hand and against XLA's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from device import known_peak

from stare_jax.models import make_policy, openvla_7b
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.normalize import identity_stats
from stare_jax.plan.chips import Cost, Peak
from stare_jax.plan.openvla_cost import decoder_products, generation_phases, update_flops, vision_products

RANK, LENGTH, BATCH = 8, 12, 2


def unrolled_config(**changes):
    """Wide enough for products to outweigh all else; without loops, whose bodies XLA counts once."""
    base = openvla_7b(prompt_length=LENGTH)
    return dataclasses.replace(
        base,
        dino=dataclasses.replace(base.dino, width=128, depth=3, num_heads=2, mlp_dim=512),
        siglip=dataclasses.replace(base.siglip, width=144, depth=2, num_heads=2, mlp_dim=538),
        projector_dim=1088,
        llm=LlamaConfig(vocab_size=512, width=256, depth=2, num_heads=4, num_kv_heads=4, mlp_dim=688),
        action_vocab_end=448,
        image_size=56,
        execution=Execution(unroll=2),
        decode_unroll=6,
        **changes,
    )


def test_the_counts_of_the_published_model():
    config = openvla_7b()
    # One token through 32 layers: 2 (4 * 4096² + 3 * 4096 * 11008) operations each, and attention to itself.
    linear, attention, adapters = decoder_products(config, 1, 1, rank=32)
    assert linear == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) and attention == 4 * 32 * 4096
    # Adapters of the decoder's layers have 79,953,920 weights, each of which a token meets once.
    assert adapters == 2 * 79_953_920
    # The towers' 0.69 and the projector's 0.07 billion weights, on 256 patches: nearly 0.4 TFLOP.
    assert 0.36e12 < sum(vision_products(config)) < 0.42e12
    prompt, *later = generation_phases(config, 1, 30)
    assert len(later) == 6 and 4.0e12 < prompt.flops < 4.4e12
    # Every further token reads the decoder's 6.48 billion weights in 16 bits.
    assert all(12.9e9 < phase.bytes < 13.2e9 for phase in later)


def test_the_least_time_is_that_of_products_or_of_memory():
    peak = Peak(flops=10.0, bandwidth=2.0)
    assert Cost(100.0, 4.0).least_time(peak) == 10.0 and Cost(10.0, 4.0).least_time(peak) == 2.0
    assert known_peak("NVIDIA H100 80GB HBM3").flops == 989e12 and known_peak("NVIDIA H100 PCIe").flops == 756e12
    assert known_peak("TPU v5 lite").flops == 197e12 and known_peak("TPU v5p").flops == 459e12
    assert known_peak("cpu") is None


def count_by_xla(function, *args, **kwargs):
    return jax.jit(function).lower(*args, **kwargs).cost_analysis()["flops"]


def test_generation_agrees_with_xla():
    config = unrolled_config()
    policy = make_policy(config, identity_stats(7, 0))
    params, key = jax.eval_shape(policy.init, jax.random.key(0)), jax.eval_shape(lambda: jax.random.key(0))
    counted = count_by_xla(policy.sample, params, policy.observation_shape(BATCH), key)
    # XLA adds norms, activations, softmax and rotary positions, of which there are more in a narrow model.
    assert 1.0 < counted / sum(phase.flops for phase in generation_phases(config, BATCH, LENGTH)) < 1.06


def test_the_update_agrees_with_xla():
    config = unrolled_config(lora=LoRAConfig(rank=RANK))
    policy = make_policy(config, identity_stats(7, 0))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    trained = {path: leaf for path, leaf in _leaves(params).items() if "lora_" in path or path.startswith("value")}

    def loss(trained, params, observation, bins):
        leaves = jax.tree.unflatten(jax.tree.structure(params), (_leaves(params) | trained).values())
        score = policy.log_prob(leaves, observation, {"bins": bins})
        return score.logp.sum() + score.value.sum()

    bins = jax.ShapeDtypeStruct((BATCH, 7), jnp.int32)
    counted = count_by_xla(jax.grad(loss), trained, params, policy.observation_shape(BATCH), bins)
    assert math.isclose(counted, update_flops(config, BATCH, LENGTH, RANK), rel_tol=0.08)


def _leaves(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("factor", [2, 4])
def test_counts_grow_with_the_batch(factor):
    config = unrolled_config()
    one, many = (generation_phases(config, batch, LENGTH)[0] for batch in (1, factor))
    assert many.flops == factor * one.flops and one.bytes < many.bytes < factor * one.bytes
