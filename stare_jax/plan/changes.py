"""Changes of a configuration that make a program fit its devices: computed by compiling them, or scaled from sizes."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from stare_jax.config import UserError
from stare_jax.models import MLPConfig
from stare_jax.plan.programs import SAMPLE, Forecast, batch_rows
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.plan import plan_policy, plan_state
from stare_jax.sharding.mesh import make_abstract_mesh
from stare_jax.state.storage import num_bytes
from stare_jax.state.train_state import abstract_params

SLOW = 120.0
"""seconds of a compilation from which on changes are judged by sizes alone, where that is possible"""
_HALVINGS = 4


class Change(NamedTuple):
    """A change of a configuration."""

    flags: dict[str, object]
    """field, such as `ppo.microbatch_size`, -> value."""
    config: RunConfig
    rows: float | None
    """share of the rows that a device works on at a time; None where more changes than that."""


class Proposal(NamedTuple):
    change: Change
    peak: float
    """bytes of a device."""
    is_compiled: bool
    """False where the peak is scaled from that of the program that does not fit."""


def changes_of(config: RunConfig, name: str) -> Iterator[Change]:
    """Yields changes that take memory off a device.

    They are halvings of the microbatch, or of the simulators that act at once; rematerialisation; weights and optimiser
    cut over more devices; then rematerialisation with the smallest microbatch, on this mesh and on the others.
    """
    remat = None if name == SAMPLE else _full_remat(config)
    yield from _fewer_rows(config, name)
    if remat is not None:
        yield remat
    yield from _more_fsdp(config)
    for mesh in (None, *_more_fsdp(config)):
        smallest = [*_fewer_rows(config, name)][-1:]
        parts = [part for part in (mesh, remat, *smallest) if part is not None]
        if len(parts) > 1:
            yield _joined(config, *parts)


def first_that_fits(
    config: RunConfig,
    before: Forecast,
    memory: float,
    forecast: Callable[[str, RunConfig], Forecast],
    *,
    max_compilations: int,
) -> Proposal | None:
    """Returns the first of `changes_of` with which a program fits; None where none was found.

    Args:
        config: with which it does not.
        before: of the program, by this configuration.
        memory: bytes of a device.
        forecast: (program, configuration) -> what it costs, see `programs.forecast`.
        max_compilations: changes that are compiled at most. One that is known not to fit by its sizes is not.
    """
    is_slow, num_compiled = before.compile_s > SLOW, 0
    for change in changes_of(config, before.program):
        try:
            estimate = _estimate(before, config, change)
        except UserError:  # it does not fit its mesh
            continue
        if estimate.least > memory or (estimate.peak is not None and estimate.peak > 1.1 * memory):
            continue
        if is_slow and estimate.peak is not None and estimate.peak <= memory:
            return Proposal(change, estimate.peak, is_compiled=False)
        if num_compiled == max_compilations:
            continue
        num_compiled += 1
        after = forecast(before.program, change.config)
        if after.peak <= memory and after.is_compiled:
            return Proposal(change, after.peak, is_compiled=True)
    return None


class _Estimate(NamedTuple):
    least: float
    """bytes that lie on a device in any case."""
    peak: float | None
    """bytes with intermediates in proportion to the rows; None where there is no proportion."""


def _estimate(before: Forecast, config: RunConfig, change: Change) -> _Estimate:
    was, held = held_bytes(before.program, config), held_bytes(before.program, change.config)
    fixed = before.peak - before.intermediates - was.total
    if change.rows is None:
        return _Estimate(held.total, None)
    # Gradients and their sum over microbatches stay as large as they are.
    constant = min(2 * was.trained, before.intermediates)
    intermediates = constant + (before.intermediates - constant) * change.rows
    return _Estimate(held.total, held.total + max(fixed, 0) + intermediates)


class Held(NamedTuple):
    total: int
    """bytes of weights and optimiser state on a device."""
    trained: int
    """bytes of the weights that the program trains."""


def held_bytes(name: str, config: RunConfig) -> Held:
    """Returns what lies on a device while a program runs, from shapes alone."""
    sizes, policy = config.mesh, plan_policy(config)
    mesh = make_abstract_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
    if name != SAMPLE:
        state = plan_state(config, name, policy, mesh)
        return Held(num_bytes(state, on_device=True), num_bytes(state.trainable, on_device=True))
    total = num_bytes(abstract_params(policy, mesh), on_device=True)
    if "ppo" in config.phases:
        total += num_bytes(plan_state(config, "ppo", policy, mesh).opt_state, on_device=True)
    return Held(total, 0)


def _fewer_rows(config: RunConfig, name: str) -> Iterator[Change]:
    """Yields halvings of the rows that are worked on at a time, as often as the run and its mesh accept them."""
    halvings = _fewer_simulators(config) if name == SAMPLE else _smaller_microbatches(config, name)
    yield from itertools.islice(halvings, _HALVINGS)


def _smaller_microbatches(config: RunConfig, name: str) -> Iterator[Change]:
    size = start = getattr(config, name).microbatch_size or batch_rows(config, name)
    while size % 2 == 0 and size // 2 % (config.mesh.data * config.mesh.fsdp) == 0:
        size //= 2
        try:
            changed = dataclasses.replace(getattr(config, name), microbatch_size=size)
            changed = dataclasses.replace(config, **{name: changed})
        except ValueError:
            return
        yield Change({f"{name}.microbatch_size": size}, changed, size / start)


def _fewer_simulators(config: RunConfig) -> Iterator[Change]:
    """Yields halvings of the simulators of a group, those that the policy decides for at a time.

    They are halvings of the processes, as long as every group has one of each task, and then of their environments.
    """
    changed, flags = config, {}
    while True:
        for field in ("num_workers", "envs_per_worker"):
            size, rest = divmod(getattr(changed.env, field), 2)
            with contextlib.suppress(ValueError):  # a group, or a task, without a process
                if not rest:
                    changed = dataclasses.replace(changed, env=dataclasses.replace(changed.env, **{field: size}))
                    break
        else:
            return
        flags = flags | {f"env.{field}": size}
        yield Change(flags, changed, changed.env.of_group.num_envs / config.env.of_group.num_envs)


def _full_remat(config: RunConfig) -> Change | None:
    model = config.model
    if isinstance(model, MLPConfig) or model.execution.remat == "full":
        return None
    changed = dataclasses.replace(model, execution=dataclasses.replace(model.execution, remat="full"))
    return Change({"model.execution.remat": "full"}, dataclasses.replace(config, model=changed), None)


def _more_fsdp(config: RunConfig) -> Iterator[Change]:
    """Yields meshes that cut weights over more of the devices that hold the batch already."""
    data, fsdp = config.mesh.data, config.mesh.fsdp
    while data % 2 == 0:
        data, fsdp = data // 2, 2 * fsdp
        mesh = MeshConfig(data, fsdp, config.mesh.tensor)
        yield Change({"mesh.data": data, "mesh.fsdp": fsdp}, dataclasses.replace(config, mesh=mesh), None)


def _joined(config: RunConfig, *changes: Change) -> Change:
    """Returns several changes, of different sections, as one."""
    flags = {name: value for change in changes for name, value in change.flags.items()}
    sections = {name.partition(".")[0]: change.config for change in changes for name in change.flags}
    parts = {section: getattr(changed, section) for section, changed in sections.items()}
    return Change(flags, dataclasses.replace(config, **parts), None)
