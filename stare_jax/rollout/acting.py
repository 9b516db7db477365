"""The one actor of policies: where rows of observations go, what is compiled, and what comes back."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from stare_jax.logging import announce_compiling
from stare_jax.models.policy import Decision, Policy, with_prompt
from stare_jax.rollout.decisions import Act
from stare_jax.rollout.kept import KEPT_ROW, ContextStore, jit_sample_and_keep
from stare_jax.rollout.prepared import prepare_params
from stare_jax.sharding import pod
from stare_jax.sharding.mesh import BATCH_AXES, batch_sharding
from stare_jax.types import Observation, PyTree


def policy_act(
    policy: Policy,
    params: PyTree,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    keep: ContextStore | None = None,
) -> Act:
    """Returns an `Act` that samples from a policy; equal keys act equally, new parameters compile nothing.

    Observations are put where the policy acts, in one place for all callers: their rows are split over the batch axes
    of the mesh, after repeating some where the mesh does not divide their number B. Decisions have B rows again. A
    simulator whose states are on a device finds the actions there. What sampling reads in another type or layout is
    in memory beside the parameters for as long as the actor is.

    Args:
        policy: its `sample` is compiled once per batch size, however many actors are made.
        params: on the devices where they are to be used; from `prepare_params`, or prepared here.
        key: consumed; tick n of the actor uses `fold_in(key, n)`, of several processes each of a key of its own.
        temperature: temperature of the action distribution; 0 is greedy.
        mesh: the devices that act; None takes those of `params`.
        keep: takes the contexts of all calls, on the devices of `mesh`, and decisions say in their trace which row each
            has (`KEPT_ROW`); None keeps none. For policies with `encode`.
    """
    params = prepare_params(policy, params)
    sample = _announced_sample(policy.sample) if keep is None else _announced_keeping(policy.sample, policy.encode)
    sharding = acting_sharding(params) if mesh is None else batch_sharding(mesh)
    ticks = itertools.count()
    key, temperature = pod.own_key(key), np.float32(temperature)

    def act(observation, signals, instructions, is_first):
        del signals, is_first
        seen = with_prompt(policy, observation, instructions)
        inputs = (params, place_rows(seen, sharding), key, np.uint32(next(ticks)), temperature)
        if keep is None:
            return _take_rows(sample(*inputs), len(instructions), observation), seen
        decision, row = keep.write(functools.partial(sample, *inputs), len(inputs[1].state))
        decision = _take_rows(decision, len(instructions), observation)
        return decision._replace(trace=decision.trace | {KEPT_ROW: row[: len(instructions)]}), seen

    return act


def acting_sharding(params: PyTree) -> Sharding | None:
    """Returns the sharding of a batch that meets parameters: split over the batch axes of their mesh, or on their only
    device; None for NumPy arrays, with which any device will do."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    return batch_sharding(named[0].mesh) if named else next(iter(shardings), None)


def place_rows(batch: PyTree, sharding: Sharding | None) -> PyTree:
    """Puts a batch on devices, wherever it is now; rows are repeated until the sharding divides their number.

    Args:
        batch: leaves `[B, ...]`, NumPy or JAX arrays on any device.
        sharding: the sharding that `acting_sharding` returns; None leaves the batch as it is.
    """
    if sharding is None:
        return batch
    num_rows = len(jax.tree.leaves(batch)[0])
    is_split = isinstance(sharding, NamedSharding)
    num_parts = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES) if is_split else 1
    if num_missing := -num_rows % num_parts:
        rows = np.arange(num_rows + num_missing) % num_rows
        batch = jax.tree.map(lambda x: x[rows], batch)
    return jax.device_put(batch, sharding)


def _take_rows(decision: Decision, num_rows: int, observation: Observation) -> Decision:
    """Returns the first rows of a decision, its action on the device that the observation is on, if it is on one."""
    if len(decision.logp) != num_rows:
        decision = jax.tree.map(lambda x: x[:num_rows], jax.device_get(decision))
    if isinstance(observation.state, jax.Array):
        decision = decision._replace(action=jax.device_put(decision.action, observation.state.sharding))
    return decision


@functools.lru_cache(maxsize=16)
def jit_sample(sample: Callable) -> Callable:
    """Compiles what an actor runs at every tick: (params, observation, key, tick, temperature) -> Decision."""

    @jax.jit
    def sample_at(params, observation, key, tick, temperature):
        return sample(params, observation, jax.random.fold_in(key, tick), temperature=temperature)

    return sample_at


@functools.lru_cache(maxsize=16)
def _announced_sample(sample: Callable) -> Callable:
    return announce_compiling("compiling the policy that acts", jit_sample(sample))


@functools.lru_cache(maxsize=16)
def _announced_keeping(sample: Callable, encode: Callable) -> Callable:
    return announce_compiling("compiling the policy that acts", jit_sample_and_keep(sample, encode))
