"""Mesh, microbatches and rematerialisation that fit a run's devices best.

The search is by sizes and rates, and compiles nothing: memory is scaled from the programs of the given configuration,
which are compiled; time is a roofline, the largest of products, of reading weights, and of exchanging weights,
gradients and sums. What it finds best is then compiled.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stare_jax.config import UserError
from stare_jax.envs.maniskill.perturbations import instructions_of
from stare_jax.models import MLPConfig, OpenVLAConfig, Pi05Config
from stare_jax.models.prompts import PROMPT_LENGTHS
from stare_jax.plan.chips import CHIPS, Chip, Devices
from stare_jax.plan.programs import SAMPLE, Forecast, batch_rows, itemsize_of
from stare_jax.plan.stacks import Stack, kept_bytes, stacks_of
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.plan import plan_policy, plan_state
from stare_jax.sharding.mesh import make_abstract_mesh, path_name
from stare_jax.state.train_state import abstract_params
from stare_jax.train import ppo, sft, tpo
from stare_jax.types import PyTree

UNKNOWN = "A100-80"
"""device whose rates order configurations where memory alone is known"""
_REMATS = ("none", "dots", "full")
_CHECKS = {"sft": sft.check_mesh, "tpo": tpo.check_mesh, "ppo": ppo.check_mesh}
_REPEATED = {OpenVLAConfig: r"^llm/layers/", Pi05Config: r"^PaliGemma/llm/layers/.*_1/"}
"""regex of the weights that sampling reads more than once"""


class Estimate(NamedTuple):
    """Cost of one program to one device, by sizes and rates; times in seconds."""

    peak: float
    """bytes."""
    compute: float
    memory: float
    exchange: float

    @property
    def seconds(self) -> float:
        return max(self[1:])


class Fit(NamedTuple):
    """A configuration whose programs fit."""

    config: RunConfig
    estimates: dict[str, Estimate]
    """estimate of each program."""
    forecasts: tuple[Forecast, ...] = ()
    """the programs, compiled; empty where they are not."""

    @property
    def order(self) -> tuple[float, int, float]:
        """Time of all programs, one after the other, to two digits; of equal ones the smallest part of matrices is the
        last, as small products are slower than their roofline, and after that what takes most of links and memory."""
        found = self.estimates.values()
        seconds = float(f"{sum(one.seconds for one in found):.1e}")
        return seconds, self.config.mesh.tensor, sum(sum(one[1:]) for one in found)


class _Program(NamedTuple):
    """A program of the given configuration, and what lies on devices beside it."""

    forecast: Forecast
    held: PyTree
    """weights and optimiser state, shapes with the axes of the mesh that cut them."""
    trained: PyTree
    params: PyTree
    stacks: Sequence[Stack]


def propose(
    config: RunConfig,
    found: Sequence[Forecast],
    devices: Devices,
    num_devices: int,
    forecast: Callable[[str, RunConfig], Forecast],
    *,
    max_compilations: int,
) -> Fit | None:
    """Returns the configuration that fits best, compiled; None where none was found.

    Args:
        config: with the sizes of the mesh, for which the programs were compiled.
        found: programs of the run.
        devices: to fit.
        num_devices: their number; all are used.
        forecast: (program, configuration) -> what it costs, see `programs.forecast`.
        max_compilations: configurations that are compiled at most, until one fits; with 0 the best is returned as it
            is.
    """
    programs, scale = [program_of(one, config) for one in found], {}
    chip = devices.chip or CHIPS[UNKNOWN]
    for _ in range(max(max_compilations, 1)):
        fits = best_fits(config, programs, num_devices, devices.memory, chip, scale)
        if not fits or not max_compilations:
            return next(iter(fits), None)
        best = fits[0]
        compiled = tuple(forecast(one.program, best.config) for one in found)
        if all(one.is_compiled and one.peak <= devices.memory for one in compiled):
            return best._replace(forecasts=compiled)
        for one in compiled:
            least = one.peak if one.is_compiled else max(one.peak, 1.1 * devices.memory)
            scale[one.program] = max(scale.get(one.program, 1.0), least / best.estimates[one.program].peak)
    return None


def best_fits(
    config: RunConfig,
    programs: Sequence[_Program],
    num_devices: int,
    memory: float,
    chip: Chip,
    scale: Mapping[str, float],
) -> list[Fit]:
    """Returns what fits by its sizes, the fastest first: of each mesh and rematerialisation one with the fastest
    microbatches.

    Args:
        scale: program -> how many times as much as by its sizes it took when it was compiled; others took that much.
    """
    fits = []
    for mesh in meshes_of(num_devices):
        for remat in _remats(config):
            chosen, estimates = _with(config, mesh, remat), {}
            for program in programs:
                name = program.forecast.program
                options = [
                    (one, changed)
                    for changed in _microbatches(chosen, name)
                    if (one := estimate(program, config, changed, chip)) is not None
                    and one.peak * scale.get(name, 1.0) <= memory
                ]
                if not options:
                    break
                estimates[name], chosen = min(options, key=lambda option: (option[0].seconds, sum(option[0][1:])))
            else:
                fits.append(Fit(chosen, estimates))
    return sorted(fits, key=lambda fit: fit.order)


def meshes_of(num_devices: int) -> list[MeshConfig]:
    """Returns all meshes of so many devices."""
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    pairs = [(fsdp, tensor) for tensor in sizes for fsdp in sizes if num_devices % (fsdp * tensor) == 0]
    return [MeshConfig(num_devices // (fsdp * tensor), fsdp, tensor) for fsdp, tensor in pairs]


def changed_fields(before: RunConfig, after: RunConfig) -> dict[str, object]:
    """Returns the fields in which a proposal differs from the given configuration -> values."""
    found: dict[str, object] = {}
    for axis in ("data", "fsdp", "tensor"):
        if getattr(before.mesh, axis) != (size := getattr(after.mesh, axis)):
            found[f"mesh.{axis}"] = size
    for phase in _CHECKS:
        if getattr(before, phase).microbatch_size != (size := getattr(after, phase).microbatch_size):
            found[f"{phase}.microbatch_size"] = size
    if _remat(before) != _remat(after):
        found["model.execution.remat"] = _remat(after)
    return found


def enough_tokens(config: RunConfig) -> int | None:
    """Returns a shorter `model.prompt_length` that holds all instructions of the simulator's tasks, whatever the
    tokenizer, of whose tokens none has less than a byte of text; None where there is no shorter one, and where a data
    set has others.
    """
    model = config.model
    if isinstance(model, MLPConfig) or config.demos_from or config.demos_of:
        return None
    texts = (text for spec in config.env.specs for text in instructions_of(config.env.perturbation, spec))
    state = " -100" * model.state_dim
    prompts = [model.prompt_template.replace("{instruction}", text).replace("{state}", state) for text in texts]
    most = max(len(prompt.encode()) for prompt in prompts) + 2  # one at each end
    return min((length for length in PROMPT_LENGTHS if most <= length < model.prompt_length), default=None)


# ---- Choices --------------------------------------------------------------------------------------------------------


def _remat(config: RunConfig) -> str:
    return "none" if isinstance(config.model, MLPConfig) else config.model.execution.remat


def _remats(config: RunConfig) -> tuple[str, ...]:
    return ("none",) if isinstance(config.model, MLPConfig) else _REMATS


def _with(config: RunConfig, mesh: MeshConfig, remat: str) -> RunConfig:
    if _remat(config) == remat:
        return dataclasses.replace(config, mesh=mesh)
    execution = dataclasses.replace(config.model.execution, remat=remat)
    return dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, execution=execution))


def _microbatches(config: RunConfig, name: str) -> Iterator[RunConfig]:
    """Yields a configuration with every microbatch of a phase that the mesh and the batch allow."""
    if name == SAMPLE:
        yield config
        return
    section, rows, size = getattr(config, name), batch_rows(config, name), config.mesh.data * config.mesh.fsdp
    mesh = make_abstract_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    sizes = {section.microbatch_size: None}  # that of the run itself, whatever it is
    while size <= rows:
        sizes[size], size = None, 2 * size
    for size in sizes:
        try:
            changed = dataclasses.replace(section, microbatch_size=size)
            _CHECKS[name](changed, mesh)
        except (ValueError, UserError):  # it does not divide the batch
            continue
        yield dataclasses.replace(config, **{name: changed})


# ---- Estimates ------------------------------------------------------------------------------------------------------


def program_of(forecast: Forecast, config: RunConfig) -> _Program:
    """Returns a program with the shapes of what it needs, traced once for all meshes."""
    policy, mesh, name = plan_policy(config), make_abstract_mesh(), forecast.program
    stacks = stacks_of(config.model, is_prefix_trained=policy.encode is None)
    if name != SAMPLE:
        state = plan_state(config, name, policy, mesh)
        return _Program(forecast, state, state.trainable, state.params, stacks)
    params = abstract_params(policy, mesh)
    beside = plan_state(config, "ppo", policy, mesh).opt_state if "ppo" in config.phases else None
    return _Program(forecast, (params, beside), None, params, stacks)


def estimate(program: _Program, before: RunConfig, config: RunConfig, chip: Chip) -> Estimate | None:
    """Returns the cost of a program; None where the mesh does not divide its weights.

    Args:
        program: see `program_of`.
        before: configuration for which it was compiled.
        config: another one, in mesh, microbatch or rematerialisation.
        chip: rates.
    """
    held = cut_bytes(program.held, config.mesh)
    if held is None:
        return None
    work = _sampling if program.forecast.program == SAMPLE else _update
    return work(program, held, before, config, chip)


def cut_bytes(tree: PyTree, mesh: MeshConfig) -> float | None:
    """Returns the bytes of a tree on a device of a mesh; None where the mesh does not divide it.

    Args:
        tree: shapes whose shardings name the axes that cut them.
        mesh: sizes of the axes.
    """
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = list(leaf.shape)
        for i, axes in enumerate(leaf.sharding.spec):
            names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
            shape[i], rest = divmod(shape[i], math.prod(getattr(mesh, name) for name in names))
            if rest:
                return None
        total += math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
    return total


def _update(program: _Program, held: float, before: RunConfig, config: RunConfig, chip: Chip) -> Estimate:
    found, name, mesh = program.forecast, program.forecast.program, config.mesh
    size, stacks, remat = itemsize_of(config), program.stacks, _remat(config)
    rows, old_rows = (_rows_at_once(one, name) for one in (config, before))
    was, trained = cut_bytes(program.held, before.mesh), cut_bytes(program.trained, mesh)
    # Batch and contexts are cut like rows, gradients and their sum like weights; the rest is what layers keep.
    fixed = max(found.peak - found.intermediates - was, 0) * _parts(before) / _parts(config)
    constant = min(2 * cut_bytes(program.trained, before.mesh), found.intermediates)
    kept = kept_bytes(stacks, remat, size) / kept_bytes(stacks, _remat(before), size) * rows / old_rows
    num_parts = batch_rows(config, name) / (rows * _parts(config))
    peak = held + fixed + trained * (2 if num_parts > 1 else 1) + (found.intermediates - constant) * kept
    numbers, of_trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (program.params, program.trained))
    # A forward pass is a third of what is trained as a whole, and half of it where gradients of inputs alone are taken.
    forward = 1 / 3 if of_trained > numbers / 2 else 1 / 2
    repeated, was_repeated = (forward * (one == "full") for one in (remat, _remat(before) if found.flops else "none"))
    flops = _all_flops(found, before) * (1 + repeated) / (1 + was_repeated)
    passes, f, d, t = (3 if remat == "full" else 2), mesh.fsdp, mesh.data, mesh.tensor
    sent = passes * size * numbers / t * (f - 1) / f
    sent += 4 * of_trained / t * ((f - 1) / f + 2 * (d - 1) / (d * f))
    sent += passes * size * rows * sum(stack.summed for stack in stacks) * 2 * (t - 1) / t
    return Estimate(
        peak,
        flops / (d * f * t) / chip.peak.flops,
        num_parts * passes * size * numbers / t / chip.peak.bandwidth,
        num_parts * sent / chip.link,
    )


def _sampling(program: _Program, held: float, before: RunConfig, config: RunConfig, chip: Chip) -> Estimate:
    found, mesh, model, size = program.forecast, config.mesh, config.model, itemsize_of(config)
    f, d, t = mesh.fsdp, mesh.data, mesh.tensor
    group = config.env.of_group.num_envs
    rows, old_rows = (-(-group // _parts(one)) for one in (config, before))  # of a device
    fixed = max(found.peak - found.intermediates - cut_bytes(program.held, before.mesh), 0)
    numbers = {path_name(path): x.size for path, x in jax.tree.leaves_with_path(program.params)}
    pattern = _REPEATED.get(type(model), "$^")
    repeated = sum(n for path, n in numbers.items() if re.search(pattern, path))
    whole, times, reads, sent = sum(numbers.values()), 0, 0.0, 0.0
    if isinstance(model, OpenVLAConfig):
        times = model.action_dim - 1
        few = rows * f < model.llm.width  # weights stay where they are (models/nn/placement.py)
        reads, sent = repeated / (f if few else 1), repeated * min(1, rows * f / model.llm.width)
    elif isinstance(model, Pi05Config):
        times, reads, whole = model.num_denoising_steps, repeated, whole - repeated  # gathered once a rollout
    exchanged = (whole + times * sent) / t * (f - 1) / f
    exchanged += rows * sum(stack.summed for stack in program.stacks) * 2 * (t - 1) / t
    flops = _all_flops(found, before) * rows * _parts(config) / (old_rows * _parts(before))
    return Estimate(
        held + fixed + found.intermediates * rows / old_rows,
        flops / (d * f * t) / chip.peak.flops,
        size * (whole + times * reads) / t / chip.peak.bandwidth,
        size * exchanged / chip.link,
    )


def _all_flops(found: Forecast, config: RunConfig) -> float:
    """Returns the operations of all devices, as compiled or, where that failed, as counted; 0 where nobody has counted,
    so that the other times decide."""
    mesh = config.mesh
    return (found.flops or found.needed or 0.0) * mesh.data * mesh.fsdp * mesh.tensor


def _parts(config: RunConfig) -> int:
    return config.mesh.data * config.mesh.fsdp


def _rows_at_once(config: RunConfig, name: str) -> float:
    """Returns the rows that a device works on at a time."""
    return (getattr(config, name).microbatch_size or batch_rows(config, name)) / _parts(config)
