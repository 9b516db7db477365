"""Contexts that are kept, in the numbers of a plan: operations of an iteration, and memory."""

import dataclasses

import jax
import pytest

from stare_jax.envs import EnvConfig
from stare_jax.models import PI05_PALIGEMMA, pi05_tiny
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.plan.products import read_products
from stare_jax.plan.programs import lower_program
from stare_jax.runs.config import RunConfig
from stare_jax.runs.plan import plan_kept, plan_policy
from stare_jax.sharding.mesh import make_mesh, path_name
from stare_jax.stages import get_task
from stare_jax.state.storage import num_bytes
from stare_jax.train.ppo import PPOConfig

NUM_ROWS, PART, EPOCHS, PATCHES, PROMPT = 16, 8, 5, 256, 12
ATTENTION = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}


def small_run(context_gb, is_compiled):
    """pi0.5 whose prefix costs as many times as much as what is trained as at full size: 16, with rematerialisation."""
    model = pi05_tiny(
        siglip=SigLIPConfig(width=32, depth=2, num_heads=2, mlp_dim=128, patch_size=4),
        paligemma=GemmaConfig(width=64, mlp_dim=704, **ATTENTION),
        expert=GemmaConfig(width=32, mlp_dim=128, **ATTENTION),
        stem=(),
        image_size=64,
        prompt_length=PROMPT,
        value_dims=(8,),
        num_denoising_steps=4,
        noise="learned",
        frozen_patterns=(PI05_PALIGEMMA,),
        # As it is written, XLA counts the bodies of loops once; compiled, they are counted as often as they run.
        execution=Execution(remat="full") if is_compiled else Execution(unroll=2),
    )
    env = EnvConfig("PushCube-v1", num_workers=1, envs_per_worker=2, horizon=8, image_size=64)
    part = PART if is_compiled else None
    ppo = PPOConfig(num_episodes=4, minibatch_size=NUM_ROWS, microbatch_size=part, context_gb=context_gb)
    return RunConfig(env, model, get_task("PushCube-v1").params, phases=("ppo",), ppo=ppo)


def flops(lowered, is_compiled):
    if not is_compiled:
        return lowered.cost_analysis()["flops"]
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return sum(product.flops * product.times for product in read_products(compiled.as_text()))


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_iteration_of_five_epochs_takes_a_quarter_of_the_operations_with_contexts(is_compiled):
    config = small_run(1.0, is_compiled)
    without, kept = (lower_program("ppo", run, make_mesh()) for run in (small_run(0.0, is_compiled), config))
    policy = plan_policy(config)
    params, seen = jax.eval_shape(policy.init, jax.random.key(0)), policy.observation_shape(PART)
    encode = NUM_ROWS / PART * flops(jax.jit(policy.encode).lower(params, seen), is_compiled)
    whole, rest = (flops(lowered.program, is_compiled) for lowered in (without, kept))
    # What the step saves is what the contexts cost.
    assert whole - rest == pytest.approx(encode, rel=0.02)
    assert encode / rest < (18 if is_compiled else 24)
    assert EPOCHS * rest + encode <= 0.25 * EPOCHS * whole
    # Where the actor leaves them behind, updates compute none.
    contexts = plan_kept(config, policy, make_mesh())
    assert contexts.is_from_rollout and rest <= 0.06 * whole
    # A plan counts contexts, and neither the images nor the prompts of a minibatch.
    read_once = NUM_ROWS * (64 * 64 * 3 + PROMPT * (4 + 1))
    assert kept.held - without.held == num_bytes(contexts.shapes) + 4 * NUM_ROWS - read_once


def test_a_plan_of_acting_counts_the_contexts_that_stay():
    kept, without = (small_run(context_gb, is_compiled=False) for context_gb in (1.0, 0.0))
    after, before = (lower_program("sample", config, make_mesh()) for config in (kept, without))
    contexts = plan_kept(kept, plan_policy(kept), make_mesh())
    assert after.held - before.held == num_bytes(contexts.shapes)
    # Reading happens once, and what is read is put aside.
    assert flops(after.program, False) == pytest.approx(flops(before.program, False), rel=0.02)


def test_prepared_parameters_are_counted_beside_those_that_a_run_keeps():
    config = small_run(0.0, is_compiled=False)
    stacked = dataclasses.replace(config, model=dataclasses.replace(config.model, unstack_layers=False))
    apart, given = (lower_program("sample", run, make_mesh()).held for run in (config, stacked))
    layers = jax.eval_shape(plan_policy(config).init, jax.random.key(0))["PaliGemma"]["llm"]["layers"]
    expert = [leaf for path, leaf in jax.tree.leaves_with_path(layers) if "_1/" in path_name(path)]
    assert apart - given == num_bytes(expert) > 0
