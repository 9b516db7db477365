"""Contexts that are kept, in the numbers of a plan: operations of an iteration, and memory."""

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
from stare_jax.runs.plan import plan_policy
from stare_jax.sharding.mesh import make_mesh
from stare_jax.stages import get_task
from stare_jax.state.storage import num_bytes
from stare_jax.train.ppo import PPOConfig, kept_contexts

NUM_ROWS, PART, EPOCHS, PATCHES, PROMPT = 16, 8, 5, 256, 12
ATTENTION = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}


def small_run(context_gb):
    """pi0.5 whose prefix costs 20 to 30 times as much as what is trained, as at full size."""
    model = pi05_tiny(
        siglip=SigLIPConfig(width=32, depth=2, num_heads=2, mlp_dim=128, patch_size=4),
        paligemma=GemmaConfig(width=64, mlp_dim=1024, **ATTENTION),
        expert=GemmaConfig(width=32, mlp_dim=128, **ATTENTION),
        stem=(),
        image_size=64,
        prompt_length=PROMPT,
        value_dims=(8,),
        num_denoising_steps=4,
        noise="learned",
        frozen_patterns=(PI05_PALIGEMMA,),
        execution=Execution(remat="full"),
    )
    env = EnvConfig("PushCube-v1", num_workers=1, envs_per_worker=2, horizon=8, image_size=64)
    ppo = PPOConfig(num_episodes=4, minibatch_size=NUM_ROWS, microbatch_size=PART, context_gb=context_gb)
    return RunConfig(env, model, get_task("PushCube-v1").params, phases=("ppo",), ppo=ppo)


def flops(lowered):
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return sum(product.flops * product.times for product in read_products(compiled.as_text()))


def test_an_iteration_of_five_epochs_takes_a_quarter_of_the_operations_with_contexts():
    without, kept = (lower_program("ppo", small_run(context_gb), make_mesh()) for context_gb in (0.0, 1.0))
    policy = plan_policy(small_run(1.0))
    params, seen = jax.eval_shape(policy.init, jax.random.key(0)), policy.observation_shape(PART)
    encode = NUM_ROWS / PART * flops(jax.jit(policy.encode).lower(params, seen))
    whole, rest = flops(without.program), flops(kept.program)
    # What the step saves is what the contexts cost.
    assert whole - rest == pytest.approx(encode, rel=0.02)
    assert 20 < encode / rest < 30
    assert EPOCHS * rest + encode <= 0.25 * EPOCHS * whole
    # A plan counts contexts, and neither the images nor the prompts of a minibatch.
    contexts = kept_contexts(policy, small_run(1.0).ppo, 8)
    read_once = NUM_ROWS * (64 * 64 * 3 + PROMPT * (4 + 1))
    assert kept.held - without.held == num_bytes(contexts) + 4 * NUM_ROWS - read_once
