"""Run by test_plan_programs.py with eight fake devices; prints what it found as one line of JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stare_jax.envs import EnvConfig
from stare_jax.models import LoRAConfig, MLPConfig, openvla_7b, pi05_tiny
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.plan.changes import first_that_fits
from stare_jax.plan.chips import parse_devices
from stare_jax.plan.exchanges import read_collectives
from stare_jax.plan.kept import Kept
from stare_jax.plan.page import excess_line, print_forecasts
from stare_jax.plan.products import read_products
from stare_jax.plan.programs import lower_program, with_mesh
from stare_jax.plan.proposals import changed_fields, propose
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.plan import plan_policy
from stare_jax.sharding.mesh import make_mesh
from stare_jax.stages import get_task
from stare_jax.state.storage import flatten, num_bytes
from stare_jax.train.ppo import PPOConfig

EIGHT = parse_devices("8xH100")


def known_loop():
    """Five layers whose weights are cut over eight devices: products and exchanges as one counts them by hand."""
    mesh = make_mesh(fsdp=8)

    def layers(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    def shape(sizes, spec):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    lowered = jax.jit(layers).lower(shape((16, 64), P("fsdp")), shape((5, 64, 64), P(None, "fsdp")))
    text = lowered.compile().as_text()
    (gather,) = read_collectives(text)
    return {
        "flops": sum(product.flops * product.times for product in read_products(text)),
        "gather": [gather.kind, gather.num_bytes, gather.sent_bytes, gather.times, gather.trips, gather.group_size],
    }


def run_of(model, image_size, **sections):
    env = EnvConfig("PushCube-v1", num_workers=2, envs_per_worker=4, horizon=30, image_size=image_size)
    config = RunConfig(env, model, get_task("PushCube-v1").params, phases=("ppo",), **sections)
    return with_mesh(dataclasses.replace(config, mesh=MeshConfig(-1, 4)), 8)


def openvla_run():
    """OpenVLA of its published form, with adapters."""
    base = openvla_7b(tokenizer="words", prompt_length=12, camera="base_camera")
    model = dataclasses.replace(
        base,
        dino=dataclasses.replace(base.dino, width=32, depth=2, num_heads=2, mlp_dim=128),
        siglip=dataclasses.replace(base.siglip, width=32, depth=2, num_heads=2, mlp_dim=128),
        projector_dim=64,
        llm=LlamaConfig(vocab_size=512, width=64, depth=3, num_heads=2, num_kv_heads=2, mlp_dim=128),
        action_vocab_end=512,
        image_size=14,
        lora=LoRAConfig(rank=8),
        execution=Execution(),
    )
    return run_of(model, 14)


def sampling(folder):
    config = openvla_run()
    found = Kept(folder, EIGHT)("sample", config)
    print_forecasts([found], config, EIGHT, 8)
    return {
        "num_rows": found.num_rows,
        "counted": found.flops / found.needed,
        "loops": sorted({word for one in found.exchanges for _, word in one.loops}),
        "bound": found.bound,
        "beside": found.beside,
        "unknown": found.num_unknown_loops,
    }


def denoising():
    """Sampling of pi0.5 whose weights are cut: what its steps exchange, and what lies on a device."""
    heads = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    model = pi05_tiny(
        siglip=SigLIPConfig(width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=8),
        paligemma=GemmaConfig(width=16, mlp_dim=32, **heads),
        expert=GemmaConfig(width=32, mlp_dim=64, **heads),
        stem=(),
        image_size=16,
        num_denoising_steps=5,
    )
    config, mesh = dataclasses.replace(run_of(model, 16), mesh=MeshConfig(1, 8)), make_mesh(fsdp=8)
    stacked = dataclasses.replace(config, model=dataclasses.replace(model, unstack_layers=False))
    apart, given = (lower_program("sample", one, mesh) for one in (config, stacked))
    llm = jax.eval_shape(plan_policy(config).init, jax.random.key(0))["PaliGemma"]["llm"]
    whole = {path: x for path, x in flatten(llm).items() if "_1/" in path}
    found = read_collectives(apart.program.compile().as_text())
    return {
        "of_steps": [str(one) for one in found if "Pi05.suffix" in one.source],
        "num_of_prefix": sum("Pi05.prefix" in one.source for one in found),
        "made": apart.held - given.held,
        "expert": num_bytes([x for path, x in whole.items() if path != "final_norm_1/Dense_0/bias"]),
    }


def fitting(folder):
    """An update of a small policy on many rows, for less memory than it takes."""
    model = MLPConfig(29, action_dim=7, num_bins=16, hidden_dims=(32,), value_dims=(32,))
    config, kept = run_of(model, 0, ppo=PPOConfig(minibatch_size=4096)), Kept(folder, EIGHT)
    compiled, compile_program = [], jax.stages.Lowered.compile

    def compile_and_keep(self, *args, **kwargs):
        compiled.append(compile_program(self, *args, **kwargs))
        return compiled[-1]

    jax.stages.Lowered.compile = compile_and_keep
    before = kept("ppo", config)
    memory = compiled[0].memory_analysis()
    limit = 0.8 * before.peak
    proposal = first_that_fits(config, before, limit, kept, max_compilations=1)
    slow = dataclasses.replace(before, compile_s=1e6)
    by_size = first_that_fits(config, slow, limit, kept, max_compilations=0)
    num_compiled = len(compiled)
    best = propose(config, [before], EIGHT._replace(memory=limit), 8, kept, max_compilations=2)
    return {
        "peak": before.peak - before.beside,
        "of_xla": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "limit": limit,
        "proposed": [proposal.change.flags, proposal.peak, proposal.is_compiled],
        "by_size": [by_size.change.flags, by_size.peak, by_size.is_compiled],
        "none": first_that_fits(config, before, 1.0, kept, max_compilations=3) is None,
        "line": excess_line(before, limit, proposal),
        "best": [changed_fields(config, best.config), best.forecasts[0].peak],
        "is_kept": Kept(folder, EIGHT)("ppo", config) == before and num_compiled == 2,
    }


kept_in = Path(sys.argv[1])
found = {"sampling": sampling(kept_in), "fitting": fitting(kept_in)}
print(json.dumps({"loop": known_loop(), "denoising": denoising(), **found}))
