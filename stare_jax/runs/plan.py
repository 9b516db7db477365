"""The plan of a run: shapes, sizes and places of state and batches, phase by phase, without allocating any of it.

The devices need not be there: the plan of a run on eight accelerators can be made on a laptop.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh

from stare_jax.config import user_input
from stare_jax.logging import print_table
from stare_jax.models import make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.models.policy import Policy
from stare_jax.runs.config import PHASES, RunConfig
from stare_jax.sharding.mesh import batch_sharding, make_abstract_mesh
from stare_jax.state.optimizer import OptimizerConfig, frozen_params, make_optimizer
from stare_jax.state.storage import num_bytes
from stare_jax.state.train_state import TrainState, abstract_params, abstract_state, check_precision
from stare_jax.train import ppo, sft, tpo
from stare_jax.train.ppo_batch import batch_shapes as decision_shapes
from stare_jax.train.tpo_reference import check_reference
from stare_jax.types import PyTree


class StepPlan(NamedTuple):
    """One optimiser step of a phase, as trees of `jax.ShapeDtypeStruct` with the shardings of the run's mesh."""

    state: TrainState
    batch: PyTree
    metrics: dict[str, jax.ShapeDtypeStruct]
    """metrics that the step returns, without shardings."""


def plan_run(config: RunConfig) -> dict[str, StepPlan]:
    """Traces one optimiser step of every phase of a run on shapes alone.

    Raises:
        ConfigError: a phase would train parameters of less than float32, lacks the adapters it asks for, freezes
            nothing by a pattern, or does not fit its batch.
        ShardingError: the rules, the mesh, the model and the batches do not fit.
    """
    stats = identity_stats(config.model.action_dim, config.model.state_dim)
    mesh = make_abstract_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    plans = {"sft": _plan_sft, "tpo": _plan_tpo, "ppo": _plan_ppo}
    with user_input():  # such as a pattern of `freeze` or of `lora.targets` that matches nothing
        policy = make_policy(config.model, stats)
        return {phase: plans[phase](config, policy, mesh) for phase in config.phases}


def _plan_sft(config: RunConfig, policy: Policy, mesh: AbstractMesh) -> StepPlan:
    phase = config.sft
    sft.check_mesh(phase, mesh)
    tx = make_optimizer(phase.optimizer, num_steps=phase.num_steps)
    step, batch = sft.make_sft_step(policy, tx, phase), sft.batch_shapes(phase, policy)
    has_average = phase.ema_decay is not None
    return _trace_step(policy, mesh, tx, phase.optimizer, step, batch, has_average=has_average)


def _plan_tpo(config: RunConfig, policy: Policy, mesh: AbstractMesh) -> StepPlan:
    phase = config.tpo
    tpo.check_mesh(phase, mesh)
    check_reference(phase.reference, jax.eval_shape(policy.init, jax.random.key(0)))
    tx = make_optimizer(phase.optimizer, num_steps=1)
    horizon, num_stages = config.env.horizon, config.env.spec.num_stages
    batch = tpo.batch_shapes(phase, policy, horizon=horizon, num_stages=num_stages)
    return _trace_step(policy, mesh, tx, phase.optimizer, tpo.make_tpo_step(policy, tx, phase), batch)


def _plan_ppo(config: RunConfig, policy: Policy, mesh: AbstractMesh) -> StepPlan:
    phase = config.ppo
    ppo.check_mesh(phase, mesh)
    tx = make_optimizer(phase.optimizer, num_steps=None)
    step, batch = ppo.make_ppo_step(policy, tx, phase), decision_shapes(policy, phase.minibatch_size)

    def more_inputs(state):
        return np.bool_(True), np.float32(0.0), None if phase.kl_coef is None else state.trainable

    return _trace_step(policy, mesh, tx, phase.optimizer, step, batch, more_inputs=more_inputs)


def _trace_step(
    policy: Policy,
    mesh: AbstractMesh,
    tx: optax.GradientTransformation,
    optimizer: OptimizerConfig,
    step: Callable,
    batch: PyTree,
    *,
    has_average: bool = False,
    more_inputs: Callable[[TrainState], tuple] = lambda state: (),
) -> StepPlan:
    """Traces (state, batch, *more inputs) -> (state, metrics) on shapes, with the checks that training begins with."""
    state = abstract_state(
        abstract_params(policy, mesh),
        tx,
        mesh=mesh,
        rules=policy.sharding_rules,
        freeze=frozen_params(policy, optimizer),
        has_average=has_average,
    )
    check_precision(state.trainable)
    sharding = batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
    _, metrics = jax.eval_shape(step, state, batch, *more_inputs(state))
    return StepPlan(state, batch, metrics)


def print_plan(config: RunConfig) -> None:
    """Prints parameters, optimiser state and batch of each phase, in all and on one device of the mesh."""
    mesh = make_abstract_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    rows = []
    for phase, plan in plan_run(config).items():
        num_params = sum(leaf.size for leaf in jax.tree.leaves(plan.state.params))
        num_rows = max(leaf.shape[0] for leaf in jax.tree.leaves(plan.batch))
        trees = (plan.state.params, plan.state.opt_state, plan.batch)
        rows.append((phase, f"{num_params:,}", f"{num_rows}", *(_gib(tree) for tree in trees)))
        if mesh.size > 1:
            rows.append(("  on a device", "", "", *(_gib(tree, on_device=True) for tree in trees)))
    phases = ", ".join(p for p in PHASES if p in config.phases)
    title = f"{config.env.env_id}, phases {phases}, data x fsdp x tensor = {mesh.axis_sizes}"
    print_table(("phase", "parameters", "batch size", "weights", "optimiser", "batch"), rows, title=title)


def _gib(tree: PyTree, *, on_device: bool = False) -> str:
    """Returns the size of a tree, or that of the part of it that lies on one device."""
    total = num_bytes(tree, on_device=on_device)
    return f"{total / 2**30:.2f} GiB" if total > 2**28 else f"{total / 2**20:.2f} MiB"
