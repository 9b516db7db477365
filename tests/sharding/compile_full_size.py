"""Compiles a model of full size for eight fake devices without allocating it; run by the tests beside it.

    python tests/sharding/compile_full_size.py ppo 8 1             # phase, fsdp, tensor: OpenVLA-7B's adapters
    python tests/sharding/compile_full_size.py sample 8 1
    python tests/sharding/compile_full_size.py ppo 8 1 full        # all weights, not adapters
    python tests/sharding/compile_full_size.py ppo 8 1 pi05        # the words of `configs.presets`: the action expert
    python tests/sharding/compile_full_size.py sft 8 1 pi05 full

prints what it found as one line of JSON.
"""

import dataclasses
import functools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
from collectives import is_of_token, moved_out, not_zero3, num_passes, numbers_of_token

from configs import ipi_widowx
from configs.devices import ON_NODE, set_passes
from stare_jax.config import from_dict
from stare_jax.models import make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.plan.exchanges import read_collectives
from stare_jax.plan.programs import placed
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.plan import plan_phase
from stare_jax.sharding.mesh import batch_sharding, make_mesh, path_name
from stare_jax.state.train_state import abstract_params
from stare_jax.train.update import lower_step

# Nothing is run: what makes programs fast may be left out.
QUICK = {"xla_backend_optimization_level": 0}


def load(fsdp, tensor, words):
    """Returns the recipe with its weights cut over the mesh, in the passes of recipes that cut them."""
    config = ipi_widowx.get_config(",".join(["PutCarrotOnPlateInScene-v1", *words]))
    set_passes(config, ON_NODE["pi05 full" if "pi05" in words else "openvla full"])
    config.ppo.context_gb = 0.0
    values = config.to_dict()
    values.pop("name")
    return dataclasses.replace(from_dict(RunConfig, values), mesh=MeshConfig(1, fsdp, tensor))


def lower_phase(phase, config, mesh):
    """The step of a phase as `train_*` compiles it, and the arguments that it reuses and that it only reads."""
    state, batch, _, step, inputs = placed(plan_phase(config, phase), mesh)
    lowered = lower_step(step, state, batch, *inputs)
    reference, contexts = inputs[-2:] if phase == "ppo" else (None, None)
    # A compiled program is not given what it does not read: values are asked for in PPO alone, and not of a reference.
    frozen = state.frozen if phase == "ppo" else without_value(state.frozen)
    return lowered, state.replace(frozen=None), (frozen, batch, without_value(reference or {}), contexts)


def without_value(params):
    return {name: leaf for name, leaf in params.items() if name != "value_head"}


def lower_sampling(policy, mesh, size=64):
    params = abstract_params(policy, mesh)
    sharding = batch_sharding(mesh)
    shapes = policy.observation_shape(size)
    observation = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    sample = functools.partial(policy.sample, temperature=1.0)
    return jax.jit(sample).lower(params, observation, jax.random.key(0)), (), (params, observation)


def bytes_on_a_device(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def main(phase, fsdp, tensor, *words):
    config = load(fsdp, tensor, words)
    policy = make_policy(config.model, identity_stats(config.model.action_dim, config.model.state_dim))
    mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    start = time.perf_counter()
    if phase == "sample":
        lowered, moving, read = lower_sampling(policy, mesh)
    else:
        lowered, moving, read = lower_phase(phase, config, mesh)
    compiled = lowered.compile(compiler_options=QUICK)
    seconds = time.perf_counter() - start
    found, memory = read_collectives(compiled.as_text()), compiled.memory_analysis()
    params = jax.tree.leaves_with_path(abstract_params(policy, mesh))
    leaves = [(path_name(path), leaf.shape, not leaf.sharding.is_fully_replicated) for path, leaf in params]
    trained = "full" if "full" in words else "expert" if "pi05" in words and "lora" not in words else "lora"
    has_reference = phase == "ppo" and config.ppo.kl_coef is not None
    passes = num_passes(phase, trained, scores_first=phase == "tpo", has_reference=has_reference)
    is_decoded = phase == "sample" and "pi05" not in words
    of_weights = [one for one in found if not (is_decoded and is_of_token(one))]
    largest = max(found, key=lambda one: max(one.sizes))
    print(
        json.dumps(
            {
                "not_zero3": not_zero3(of_weights, leaves, passes),
                "token_numbers": numbers_of_token(found) if is_decoded else None,
                "moved_out": moved_out(found),
                "largest": max(largest.sizes),
                "largest_is": str(largest),
                "argument_bytes": memory.argument_size_in_bytes,
                "expected_bytes": bytes_on_a_device((moving, read)),
                "reused_bytes": memory.alias_size_in_bytes,
                "moving_bytes": bytes_on_a_device(moving),
                "temporary_bytes": memory.temp_size_in_bytes,
                "compile_s": seconds,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
