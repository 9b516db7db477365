"""Measures this library's OpenVLA in a process of its own, which `openvla.py` starts: a line of JSON for every row.

python benchmarks/openvla_run_jax.py '{"size": "reduced", ...}'
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

# This process has the device to itself; what is left over is for cuBLAS and cuDNN.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from device import jax_peak, measure, reported
from openvla_cases import Inputs, Spec, make_block, make_config, make_inputs, weight_recipe
from stored import draw_observation, make_acting, measure_acting, peak_bytes, with_stored_prompt

from stare_jax.models import OpenVLAConfig, Policy
from stare_jax.models.blank import blank_policy, leaf_shapes
from stare_jax.models.nn.lora import add_adapters, init_adapters
from stare_jax.rollout.prepared import prepare_params
from stare_jax.state.optimizer import frozen_params, make_optimizer, split_params
from stare_jax.state.storage import nest
from stare_jax.state.train_state import TrainState
from stare_jax.train.ppo import PPOConfig, make_ppo_step
from stare_jax.train.ppo_batch import DecisionBatch
from stare_jax.train.update import jit_step
from stare_jax.types import Observation, PyTree
from stare_jax.weights.openvla import tensor_table
from stare_jax.weights.tensor_table import checkpoint_shape, layer_shape, to_ours

# ---- Weights and inputs ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "kind", "dtype", "is_stacked"))
def _fill(block, offsets, scale, shift, *, shape, kind, dtype, is_stacked):
    """Makes one leaf of the parameters from the checkpoint's tensors, which `shape` is the arrangement of in ours."""
    size = math.prod(shape)

    def one(offset):
        values = jnp.tile(jnp.roll(block, -offset), -(-size // block.size))[:size]
        return to_ours((scale * values + shift).astype(dtype).reshape(checkpoint_shape(shape, kind)), shape, kind)

    return jax.lax.map(one, offsets) if is_stacked else one(offsets[0])


def make_params(policy: Policy, config: OpenVLAConfig, seed: int) -> PyTree:
    """Returns the base model's parameters on the device, a fresh value head, and adapters that change nothing yet."""
    leaves, block, params = leaf_shapes(config), jnp.asarray(make_block(seed)), {}
    for path, entry in tensor_table(config).items():
        shape = layer_shape(leaves[path].shape, entry)
        recipes = [weight_recipe(name, checkpoint_shape(shape, entry.kind)) for name in entry.names]
        offsets = np.array([offset for offset, _, _ in recipes], np.int32)
        options = {"shape": shape, "kind": entry.kind, "is_stacked": bool(entry.num_stacked)}
        params[path] = _fill(block, offsets, *recipes[0][1:], dtype=leaves[path].dtype, **options)
    head = jax.jit(lambda key: policy.init(key)["value_head"])(jax.random.key(seed))  # nothing else is computed
    params = nest(params) | {"value_head": head}
    return add_adapters(params, init_adapters(policy.init, jax.random.key(1)))


def observe(inputs: Inputs, config: OpenVLAConfig) -> Observation:
    ids = jnp.asarray(inputs.ids)
    state = jnp.zeros((len(ids), config.state_dim), jnp.float32)
    return Observation({config.camera: jnp.asarray(inputs.images)}, state, ids, jnp.ones(ids.shape, bool))


# ---- Measurements ----------------------------------------------------------------------------------------------------


def run_generate(spec: Spec, errors: list[str]) -> Iterator[dict[str, Any]]:
    config = make_config(spec)
    policy = blank_policy(config)
    params = prepare_params(policy, make_params(policy, config, spec.seed))
    for batch in spec.batches:
        with reported(errors, f"stare_jax, generate {batch}"):
            yield from _generate(policy, params, make_inputs(config, batch, spec.seed), spec)


def _generate(policy: Policy, params: PyTree, inputs: Inputs, spec: Spec) -> list[dict[str, Any]]:
    batch = len(inputs.ids)
    policy, seen = with_stored_prompt(policy, inputs.ids), draw_observation(policy, batch, spec.seed)
    seen = seen._replace(images=dict.fromkeys(seen.images, inputs.images))
    acting = make_acting(policy, params, seen, ("",) * batch, temperature=0.0)
    start = time.perf_counter()
    decision = acting.decide_on_device()
    row = {"batch": batch, "compile_s": time.perf_counter() - start}
    acting.decide(), acting.decide_on_device()
    seconds = measure_acting(acting, spec.repeats)
    check = {
        "bins": np.asarray(decision.trace["bins"]).tolist(),
        "logp": np.asarray(decision.logp.sum(axis=1)).tolist(),
    }
    _profile(acting.decide_on_device, spec, f"generate_{batch}")
    row |= {"peak_bytes": peak_bytes()}
    return [
        {"case": "act", "seconds": seconds["act"]} | row,
        {"case": "generate", "seconds": seconds["device"]} | row | check,
    ]


def run_update(spec: Spec, errors: list[str]) -> Iterator[dict[str, Any]]:
    with reported(errors, f"stare_jax, update {spec.update_batch}"):
        yield _update(spec)


def _update(spec: Spec) -> dict[str, Any]:
    config = make_config(spec)
    # RL4VLA's numbers where they are not the defaults.
    sizes = {"minibatch_size": spec.update_batch, "microbatch_size": spec.microbatch}
    settings = PPOConfig(value_clip_eps=0.2, huber_delta=10.0, **sizes)
    policy = blank_policy(config)
    params = make_params(policy, config, spec.seed)
    tx = make_optimizer(settings.optimizer, num_steps=None)
    trainable, frozen = split_params(params, frozen_params(policy, settings.optimizer))
    state = TrainState(jnp.int32(0), trainable, frozen, jax.jit(tx.init)(trainable))
    inputs = make_inputs(config, spec.update_batch, spec.seed)
    scores = [jnp.asarray(x) for x in (inputs.old_logp, inputs.old_value, inputs.advantage, inputs.return_)]
    trace = {"bins": jnp.asarray(inputs.bins)}
    batch = DecisionBatch(observe(inputs, config), trace, *scores, jnp.ones(spec.update_batch, bool))
    # Ratios near one, so that the surrogate is not clipped away.
    score = jax.jit(policy.log_prob)
    parts = [slice(i, i + spec.microbatch) for i in range(0, spec.update_batch, spec.microbatch)]
    logp = [score(params, *jax.tree.map(lambda x, part=part: x[part], batch[:2])).logp for part in parts]
    batch = batch._replace(old_logp=jnp.concatenate(logp))
    step = jit_step(make_ppo_step(policy, tx, settings), state)
    del params, trainable, frozen
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch, True, jnp.float32(0.0)))
    compile_s = time.perf_counter() - start

    def run():
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch, True, jnp.float32(0.0)))

    run()
    row = {"case": "update", "batch": spec.update_batch, "seconds": measure(run, spec.repeats), "compile_s": compile_s}
    check = {"loss": float(metrics["ppo/loss"]), "grad_norm": float(metrics["grad/norm"])}
    _profile(run, spec, "update")
    return row | check | {"logp": np.asarray(batch.old_logp.sum(axis=1)).tolist(), "peak_bytes": peak_bytes()}


def _profile(run, spec: Spec, name: str) -> None:
    if spec.profile:
        with jax.profiler.trace(os.path.join(spec.profile, name)):
            run()


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # compilers talk
        spec = Spec(**json.loads(sys.argv[1]))
        device = jax.devices()[0]
        errors: list[str] = []
        runs = {"generate": run_generate, "update": run_update}
        for row in (row for case in spec.cases for row in runs[case](spec, errors)):
            print(json.dumps(row), file=sys.__stdout__, flush=True)
        result = {"device": device.device_kind, "versions": {"jax": jax.__version__}, "errors": errors}
        if device.platform == "cpu":
            result["peak"] = jax_peak(spec.dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
