"""What a training loop is given (`Run`) and what it moves forward (`TrainState`)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stare_jax.config import ConfigError
from stare_jax.models.policy import Policy
from stare_jax.sharding import mesh as sharding
from stare_jax.state import checkpoint
from stare_jax.state.optimizer import OptimizerConfig, frozen_params, merge_params, split_params
from stare_jax.types import NormStats, PyTree, TrainState

CHECKPOINTS = "checkpoints"
"""name of the folder of checkpoints within a phase's folder."""


def _write_nothing(step: int, metrics: Mapping[str, Any], *, phase: str) -> None:
    del step, metrics, phase


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a phase writes, when it stops, and on which devices it works."""

    directory: Path
    """the run directory; a phase keeps its checkpoints in `<directory>/<phase>/checkpoints`."""
    norm_stats: NormStats
    """of the policy; saved with every checkpoint."""
    writer: Callable[..., None] = _write_nothing
    """writer(step, {"area/quantity": float}, phase="sft"); see `logging.make_writer`."""
    should_stop: Callable[[], bool] = lambda: False
    """polled once a step: the loop saves and raises `logging.Interrupted`."""
    mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    resume: bool = False
    """go on from the phase's latest checkpoint, if there is one."""


def checkpoint_directory(run: Run, phase: str) -> Path:
    """Returns where a phase keeps its checkpoints."""
    return Path(run.directory) / phase / CHECKPOINTS


def abstract_params(policy: Policy, mesh: Mesh) -> PyTree:
    """Returns shapes and shardings of a policy's parameters, without allocating anything."""
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    shardings = sharding.tree_shardings(shapes, mesh, policy.sharding_rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def num_bytes(tree: PyTree) -> int:
    """Returns how large the arrays of a tree are, or will be."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def abstract_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    rules: sharding.Rules,
    freeze: Sequence[str] = (),
) -> TrainState:
    """Returns shapes and shardings of a train state, without allocating anything.

    Args:
        params: nested dict of arrays or `jax.ShapeDtypeStruct`s.
        tx: see `optimizer.make_optimizer`; it sees the trainable parameters alone.
        mesh: where the state is to live.
        rules: see `sharding.tree_shardings`.
        freeze: see `OptimizerConfig`.
    """
    shapes = jax.eval_shape(functools.partial(_build, tx=tx, freeze=freeze), params)
    shardings = sharding.tree_shardings(shapes, mesh, rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    rules: sharding.Rules,
    freeze: Sequence[str] = (),
) -> TrainState:
    """Copies parameters to their devices and makes the optimiser state there; arguments as for `abstract_state`.

    Frozen parameters that are where they belong are shared with the caller, not copied.
    """
    layout = abstract_state(params, tx, mesh=mesh, rules=rules, freeze=freeze)
    shardings = jax.tree.map(lambda x: x.sharding, layout)
    (trainable, frozen), (to, frozen_to) = (split_params(tree, freeze) for tree in (params, shardings.params))
    # Without out_shardings, the moments that tx.init makes under jit end up on one device.
    build = jax.jit(functools.partial(_build, tx=tx, freeze=()), out_shardings=shardings.replace(params=to))
    state = build(trainable)
    return state.replace(params=merge_params(state.params, jax.device_put(frozen, frozen_to)))


def _build(params: PyTree, *, tx: optax.GradientTransformation, freeze: Sequence[str]) -> TrainState:
    trainable, _ = split_params(params, freeze)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(trainable))


def check_precision(trainable: PyTree) -> None:
    """Raises ConfigError where a parameter that is trained is not float32: small steps would be lost in rounding."""
    leaves = jax.tree.leaves_with_path(trainable)
    rounded = [sharding.path_name(path) for path, leaf in leaves if jnp.dtype(leaf.dtype).itemsize < 4]
    if rounded:
        raise ConfigError(
            f"model.execution.param_dtype: got {len(rounded)} trained parameters of less, {rounded[0]} among "
            "them, expected float32; train adapters (model.lora) or freeze the rest (model.frozen_patterns)"
        )


def start_phase(
    phase: str,
    run: Run,
    policy: Policy,
    params: PyTree,
    tx: optax.GradientTransformation,
    config: OptimizerConfig,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state a phase starts in, and the counters of the checkpoint it goes on from ({} without one).

    Raises:
        CheckpointError: not resuming, but the phase has checkpoints here already.
        ConfigError: parameters of less than float32 would be trained.
    """
    layout = {"mesh": run.mesh, "rules": policy.sharding_rules, "freeze": frozen_params(policy, config)}
    check_precision(split_params(params, layout["freeze"])[0])
    directory = checkpoint_directory(run, phase)
    steps = checkpoint.complete_steps(directory)
    if not steps:
        return create_state(params, tx, **layout), {}
    if not run.resume:
        raise checkpoint.CheckpointError(
            f"{directory}: got checkpoints of the steps {steps}, expected none; resume them or choose another directory"
        )
    restored = checkpoint.restore(directory, abstract_state(params, tx, **layout))
    return restored.state, restored.extra


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch onto the mesh, cut along its leading axis."""
    return jax.device_put(tree, sharding.batch_sharding(mesh))


def check_finite(updates: Sequence[Mapping[str, float]], *, phase: str, first_step: int) -> None:
    """Stops a run whose loss or gradient is not finite, before what came of it is saved.

    Args:
        updates: metrics of consecutive optimiser steps.
        phase: whose; the loss is the metric `<phase>/loss`.
        first_step: number of the first of them.

    Raises:
        FloatingPointError: names the step.
    """
    for step, metrics in enumerate(updates, first_step):
        for name in (f"{phase}/loss", "grad/norm"):
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(f"{phase}: {name} of step {step} is {metrics[name]}")
