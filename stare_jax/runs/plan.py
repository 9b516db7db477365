"""What a run is made of, without allocating any of it: shapes, sizes and places of state and batches, phase by phase.

The devices need not be there: the plan of a run on eight accelerators can be made on a laptop.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from stare_jax.config import user_input
from stare_jax.logging import print_table
from stare_jax.models import make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.models.policy import Policy
from stare_jax.runs.config import PHASES, RunConfig
from stare_jax.sharding.mesh import batch_sharding, check_batch_size, make_abstract_mesh
from stare_jax.state.optimizer import frozen_params, keep_average, make_optimizer, split_params
from stare_jax.state.train_state import abstract_state
from stare_jax.train.steps import (
    DecisionBatch,
    PairBatch,
    ScoredTrajectory,
    SFTBatch,
    make_ppo_step,
    make_sft_step,
    make_tpo_step,
)
from stare_jax.train.tpo import check_reference
from stare_jax.types import PyTree, TrainState


class PhasePlan(NamedTuple):
    """Trees of `jax.ShapeDtypeStruct`, with the shardings of the configuration's mesh."""

    state: TrainState
    batch: PyTree
    metrics: PyTree
    """what one step returns beside the new state."""


def plan_run(config: RunConfig) -> dict[str, PhasePlan]:
    """Traces one optimiser step of every phase of a run on shapes alone.

    Raises:
        ShardingError: the rules, the mesh, the model and the batches do not fit.
        TypeError, ValueError: a step does not fit its batch.
    """
    stats = identity_stats(config.model.action_dim, config.model.state_dim)
    policy = make_policy(config.model, stats)
    mesh = make_abstract_mesh(**dataclasses.asdict(config.mesh))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    steps = {"sft": make_sft_step, "tpo": make_tpo_step, "ppo": make_ppo_step}
    plans = {}
    for phase in config.phases:
        if phase == "tpo":
            check_reference(config.tpo.reference, params)
        section = getattr(config, phase)
        tx = keep_average(make_optimizer(section.optimizer, num_steps=1), getattr(section, "ema_decay", None))
        layout = {"mesh": mesh, "rules": policy.sharding_rules, "freeze": frozen_params(policy, section.optimizer)}
        with user_input():  # a pattern of `freeze` that matches nothing
            state = abstract_state(params, tx, **layout)
        for name in ("batch_size", "minibatch_size", "microbatch_size"):
            check_batch_size(f"{phase}.{name}", getattr(section, name, None), mesh)
        batch = _batch(phase, policy, config, batch_sharding(mesh))
        extra = ()
        if phase == "ppo":
            reference = None if section.kl_coef is None else split_params(state.params, layout["freeze"])[0]
            extra = (np.bool_(True), np.float32(0.0), reference)
        _, metrics = jax.eval_shape(steps[phase](policy, tx, section), state, batch, *extra)
        plans[phase] = PhasePlan(state, batch, metrics)
    return plans


def _batch(phase: str, policy: Policy, config: RunConfig, sharding: NamedSharding) -> PyTree:
    """The batch of one optimiser step, as shapes."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def reshaped(tree, *leading):
        return jax.tree.map(lambda x: array(*leading, *x.shape[1:], dtype=x.dtype), tree)

    observation = policy.observation_shape(1)
    window = (policy.action_dim,) if policy.window is None else (policy.window, policy.action_dim)
    if phase == "sft":
        size = config.sft.batch_size
        return SFTBatch(reshaped(observation, size), array(size, *window), array(size, *window[:-1], dtype=bool))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    trace = jax.eval_shape(policy.sample, params, observation, jax.random.key(0)).trace
    if phase == "ppo":
        size = config.ppo.minibatch_size
        rest = (*(array(size) for _ in range(4)), array(size, dtype=bool))
        return DecisionBatch(reshaped(observation, size), reshaped(trace, size), *rest)
    size, steps, num_stages = config.tpo.batch_size, config.env.horizon, config.env.spec.num_stages
    num_decisions, is_exact = -(-steps // policy.chunk), policy.preference_score is None
    num_draws, num_scores = (1, num_decisions) if is_exact else (config.tpo.num_draws, steps)
    side = ScoredTrajectory(
        observation=reshaped(observation, size, num_decisions),
        decision=reshaped(trace, size, num_decisions) if is_exact else array(size, num_decisions, *window),
        seed=array(size, num_decisions, num_draws, dtype=jnp.uint32),
        ref_logp=array(size, num_scores, num_draws),
        valid=array(size, num_scores, dtype=bool),
        stage_mask=array(size, num_stages, num_scores, dtype=bool),
        stage_cost=array(size, num_stages),
        completed=array(size, num_stages, dtype=bool),
    )
    return PairBatch(side, side)


def print_plan(config: RunConfig) -> None:
    """Prints parameters, optimiser state and batch of each phase, in all and on one device of the mesh."""
    mesh = make_abstract_mesh(**dataclasses.asdict(config.mesh))
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

    def num_bytes(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape) if on_device else leaf.shape) * leaf.dtype.itemsize

    total = sum(map(num_bytes, jax.tree.leaves(tree)))
    return f"{total / 2**30:.2f} GiB" if total > 2**28 else f"{total / 2**20:.2f} MiB"
