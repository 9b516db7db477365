"""The plan of a run: shapes, sizes and places of state and batches, phase by phase, without allocating any of it.

The devices need not be there: the plan of a run on eight accelerators can be made on a laptop.
"""

import math

import jax

from stare_jax.config import user_input
from stare_jax.logging import print_table
from stare_jax.models import make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.runs.config import PHASES, RunConfig
from stare_jax.sharding.mesh import make_abstract_mesh
from stare_jax.train.ppo import plan_ppo
from stare_jax.train.sft import plan_sft
from stare_jax.train.tpo import plan_tpo
from stare_jax.train.update import StepPlan
from stare_jax.types import PyTree


def plan_run(config: RunConfig) -> dict[str, StepPlan]:
    """Traces one optimiser step of every phase of a run on shapes alone.

    Raises:
        ConfigError: a phase would train parameters of less than float32, lacks the adapters it asks for, freezes
            nothing by a pattern, or does not fit its batch.
        ShardingError: the rules, the mesh, the model and the batches do not fit.
    """
    stats = identity_stats(config.model.action_dim, config.model.state_dim)
    policy = make_policy(config.model, stats)
    mesh = make_abstract_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    horizon, num_stages = config.env.horizon, config.env.spec.num_stages
    plans = {
        "sft": lambda: plan_sft(policy, config.sft, mesh),
        "tpo": lambda: plan_tpo(policy, config.tpo, mesh, horizon=horizon, num_stages=num_stages),
        "ppo": lambda: plan_ppo(policy, config.ppo, mesh),
    }
    with user_input():  # such as a pattern of `freeze` that matches nothing
        return {phase: plans[phase]() for phase in config.phases}


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

    def num_bytes(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape) if on_device else leaf.shape) * leaf.dtype.itemsize

    total = sum(map(num_bytes, jax.tree.leaves(tree)))
    return f"{total / 2**30:.2f} GiB" if total > 2**28 else f"{total / 2**20:.2f} MiB"
