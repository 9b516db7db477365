"""Programs of a run, compiled ahead of time from shapes alone for devices that need not be there, and their cost."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stare_jax.config import ConfigError, check_fields, user_input
from stare_jax.logging import announced
from stare_jax.models import MLPConfig, OpenVLAConfig, Pi05Config
from stare_jax.plan.analytic import needed_flops
from stare_jax.plan.chips import GIB, Chip, Devices
from stare_jax.plan.exchanges import read_collectives
from stare_jax.plan.products import read_products
from stare_jax.plan.text import Program
from stare_jax.rollout.acting import jit_sample
from stare_jax.rollout.kept import jit_sample_and_keep
from stare_jax.rollout.prepared import prepared_shapes
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.fit import acts
from stare_jax.runs.plan import StepPlan, plan_kept, plan_phase, plan_policy, plan_state
from stare_jax.sharding.mesh import ShardingError, batch_sharding, make_mesh, num_parts
from stare_jax.state.contexts import lay_out
from stare_jax.state.storage import num_bytes
from stare_jax.state.train_state import abstract_params
from stare_jax.train.update import lower_step
from stare_jax.types import PyTree

SAMPLE = "sample"
_EXCEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMG])")
"""the memory that a program would take, in XLA's message that there is not so much"""
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind in the same loops."""

    kind: str
    loops: tuple[tuple[int, str], ...]
    """passes of each loop around them, the outermost first, and what a pass is; 0 where the text does not say."""
    num_bytes: float
    """bytes in one pass of the innermost loop."""
    sent_bytes: float
    """bytes that a device sends at least, in all passes."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The cost of one program to one device; sizes in bytes, times in seconds."""

    program: str
    """"sample", or the phase whose optimiser step it is."""
    num_rows: int
    """rows on all devices together."""
    arguments: float
    outputs: float
    reused: float
    """outputs that take the memory of arguments."""
    intermediates: float
    beside: float
    """bytes that lie there meanwhile and are no argument, such as the optimiser's state during a rollout."""
    flops: float
    needed: float | None
    """operations by the analytic count; None where there is none."""
    exchanges: tuple[Exchange, ...]
    cycles: int | None
    """XLA's estimate of its cost model, exchanges apart; None where the backend has none."""
    compute_s: float | None
    """time of the products at the device's peak; None where the device is not known."""
    memory_s: float | None
    """time of moving their factors and results."""
    products_s: float | None
    """time of the products, each at the slower of the two."""
    exchange_s: float | None
    compile_s: float
    num_unknown_loops: int
    is_compiled: bool = True
    """False where XLA says that there is not enough memory; nothing but sizes is known then."""

    def __post_init__(self):
        check_fields(self)

    @property
    def peak(self) -> float:
        """Bytes of a device that are in use at once."""
        return self.arguments + self.outputs - self.reused + self.intermediates + self.beside

    @property
    def roofline_s(self) -> float | None:
        """Least time, exchanges beside products."""
        return None if self.products_s is None else max(self.products_s, self.exchange_s)

    @property
    def bound(self) -> str:
        """Name of the largest of three times: of products, of memory, of exchanges; empty where it is not known."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "exchange": self.exchange_s}
        return "" if self.compute_s is None else max(times, key=times.get)


# ---- Devices and meshes ---------------------------------------------------------------------------------------------


def find_devices(devices: Devices) -> Sequence[jax.Device]:
    """Returns the devices of a topology, or the fake ones of this process.

    Raises:
        ConfigError: libtpu knows no such topology.
    """
    if devices.number is not None:
        return jax.devices("cpu")[: devices.number]
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(devices.text, "tpu").devices
    except Exception as error:  # whatever libtpu raises is about the name
        raise ConfigError(f"--topology: got {devices.text!r}: {' '.join(str(error).split())}") from error


def with_mesh(config: RunConfig, num_devices: int) -> RunConfig:
    """Returns a configuration whose mesh has its size along `data` written out.

    Raises:
        ShardingError: the mesh does not fit so many devices.
    """
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    if data == -1:
        data = num_devices // (fsdp * tensor)
    if not 1 <= data * fsdp * tensor <= num_devices:
        sizes = (config.mesh.data, fsdp, tensor)
        raise ShardingError(
            f"mesh: got data x fsdp x tensor = {sizes}, expected at most {num_devices} device(s); "
            f"--config.mesh.fsdp={num_devices} --config.mesh.tensor=1 fits"
        )
    return dataclasses.replace(config, mesh=MeshConfig(data, fsdp, tensor))


def programs_of(config: RunConfig) -> tuple[str, ...]:
    """Returns the programs that a run spends its time in: sampling, if its policy acts, and a step of each phase."""
    return (*([SAMPLE] if acts(config) else []), *config.phases)


# ---- Lowering -------------------------------------------------------------------------------------------------------


class Lowered(NamedTuple):
    program: jax.stages.Lowered
    held: int
    """bytes that lie on a device while it runs, arguments included."""
    num_rows: int


def lower_program(name: str, config: RunConfig, mesh: Mesh) -> Lowered:
    """Lowers one of `programs_of` as a run compiles it.

    Args:
        name: of the program.
        config: with the sizes of the mesh.
        mesh: devices that need not be there.
    """
    if name != SAMPLE:
        state, batch, _, step, inputs = placed(plan_phase(config, name), mesh)
        kept = [tree for tree in inputs if not isinstance(tree, np.generic)]
        held = num_bytes((state, batch, kept), on_device=True)
        return Lowered(lower_step(step, state, batch, *inputs), held, batch_rows(config, name))
    with user_input():
        policy = plan_policy(config)
        params = abstract_params(policy, mesh)
    group = config.env.of_group.num_envs  # which the policy decides for at a time
    num_rows = group + -group % num_parts(mesh)
    sharding = batch_sharding(mesh)
    observation = jax.tree.map(lambda x: x.update(sharding=sharding), policy.observation_shape(num_rows))
    prepared, made = prepared_shapes(policy, params)
    held = num_bytes((params, made, observation), on_device=True)
    if "ppo" in config.phases:  # whose optimiser keeps its state during the rollouts
        state = plan_state(config, "ppo", policy, mesh)
        reference = None if config.ppo.kl_coef is None else state.trainable
        held += num_bytes((state.opt_state, reference), on_device=True)
    inputs = (prepared, observation, jax.random.key(0), np.uint32(0), np.float32(1))
    kept = plan_kept(config, policy, mesh) if "ppo" in config.phases else None
    if kept is None or not kept.is_from_rollout:
        return Lowered(jit_sample(policy.sample).lower(*inputs), held, num_rows)
    contexts = lay_out(kept.shapes, mesh)
    held += num_bytes(contexts, on_device=True)
    sample = jit_sample_and_keep(policy.sample, policy.encode)
    return Lowered(sample.lower(*inputs, contexts, np.int32(0)), held, num_rows)


def placed(plan: StepPlan, mesh: Mesh) -> StepPlan:
    """Returns a plan whose shapes lie on a mesh of devices."""

    def place(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
                if isinstance(x, jax.ShapeDtypeStruct)
                else x
            ),
            tree,
        )

    return plan._replace(state=place(plan.state), batch=place(plan.batch), inputs=place(plan.inputs))


# ---- Compilation ----------------------------------------------------------------------------------------------------


def forecast(name: str, config: RunConfig, devices: Devices, *, windowed: bool = False) -> Forecast:
    """Compiles a program and returns what it costs one device.

    Args:
        name: of the program, see `programs_of`.
        config: with the sizes of the mesh, see `with_mesh`.
        devices: to compile for.
        windowed: let a TPU's compiler cut products into windows, with which large steps take it very long.

    Raises:
        ConfigError, ShardingError: the configuration does not fit itself, its mesh or its model.
    """
    found, sizes = find_devices(devices), config.mesh
    mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, devices=found)
    is_tpu = devices.number is None
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}  # nothing is run
    if is_tpu:
        options = {} if windowed else {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    start = time.monotonic()
    with announced(f"compiling {name} for {devices.text}, mesh {tuple(mesh.shape.values())}"):
        lowered = lower_program(name, config, mesh)
        needed = needed_flops(config, name, lowered.num_rows)
        known = {"program": name, "num_rows": lowered.num_rows, "needed": needed and needed / mesh.size}
        try:
            compiled = lowered.program.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _exceeded(known, lowered.held, str(error), time.monotonic() - start)
    memory, seconds = compiled.memory_analysis(), time.monotonic() - start
    return Forecast(
        **known,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        intermediates=memory.temp_size_in_bytes,
        beside=max(lowered.held - memory.argument_size_in_bytes, 0),
        compile_s=seconds,
        # A processor's compiler widens to float32 what other devices multiply in bfloat16.
        **_work(compiled.as_text(), config, name, devices.chip, widest=8.0 if is_tpu else itemsize_of(config)),
    )


def _work(text: str, config: RunConfig, name: str, chip: Chip | None, *, widest: float) -> dict[str, Any]:
    """Returns the fields of a forecast that its text tells."""
    program = Program(text)
    products, collectives = read_products(program, widest=widest), read_collectives(program)
    flops = sum(product.flops * product.times for product in products)
    grouped: dict[tuple, list] = {}
    for one in collectives:
        grouped.setdefault((one.kind, one.trips), []).append(one)
    exchanges = tuple(
        Exchange(
            kind,
            _named(trips, config, name),
            sum(one.num_bytes for one in found),
            sum(one.sent_bytes * one.times for one in found),
        )
        for (kind, trips), found in grouped.items()
    )
    times: dict[str, float | None] = dict.fromkeys(("compute_s", "memory_s", "products_s", "exchange_s"))
    if chip is not None:
        each = [(p.flops / chip.peak.flops, p.num_bytes / chip.peak.bandwidth, p.times) for p in products]
        times = {
            "compute_s": sum(compute * n for compute, _, n in each),
            "memory_s": sum(memory * n for _, memory, n in each),
            "products_s": sum(max(compute, memory) * n for compute, memory, n in each),
            "exchange_s": sum(exchange.sent_bytes for exchange in exchanges) / chip.link,
        }
    unknown, cycles = program.num_unknown_loops, program.estimated_cycles()
    return {"flops": flops, "exchanges": exchanges, "cycles": cycles, "num_unknown_loops": unknown, **times}


def _exceeded(known: dict[str, Any], held: int, message: str, seconds: float) -> Forecast:
    """Returns the forecast of a program that its compiler refuses because it needs more memory than there is."""
    match = _EXCEEDED.search(message)
    needed = float(match.group(1)) * _UNITS[match.group(2)] if match else 0.0
    is_total = match is not None and match.group().startswith("Used")  # arguments and all
    nothing = {"outputs": 0, "reused": 0, "beside": 0, "flops": 0, "exchanges": (), "num_unknown_loops": 0}
    times = dict.fromkeys(("cycles", "compute_s", "memory_s", "products_s", "exchange_s"))
    intermediates = max(needed - held, 0) if is_total else needed
    return Forecast(
        **known, **nothing, **times, arguments=held, intermediates=intermediates, compile_s=seconds, is_compiled=False
    )


def itemsize_of(config: RunConfig) -> float:
    """Returns the bytes of a number in products."""
    return 4.0 if isinstance(config.model, MLPConfig) else jnp.dtype(config.model.execution.dtype).itemsize


def _named(trips: Sequence[int | None], config: RunConfig, name: str) -> tuple[tuple[int, str], ...]:
    """Returns the passes of loops, each with what a pass is, by the numbers that a configuration has."""
    model = config.model
    outer, layers = {num_microbatches(config, name): "microbatch"} if name != SAMPLE else {}, set()
    if isinstance(model, OpenVLAConfig):
        layers = {model.llm.depth, *(tower.depth - 1 for tower in (model.dino, model.siglip) if tower is not None)}
        outer |= {model.action_dim - 1: "token"} if name == SAMPLE else {}
    elif isinstance(model, Pi05Config):
        layers = {model.paligemma.depth, *([model.siglip.depth] if model.siglip is not None else [])}
        outer |= {model.num_denoising_steps: "denoising step"} if name in (SAMPLE, "ppo") else {}
    words = []
    for trip in trips:
        word = "layer" if trip in layers else "pass"
        if not any(known in outer.values() for known in words):
            word = outer.get(trip, word)
        words.append(word)
    return tuple((trip or 0, word) for trip, word in zip(trips, words, strict=True))


def num_microbatches(config: RunConfig, phase: str) -> int:
    """Returns the number of forward and backward passes of an optimiser step."""
    section = getattr(config, phase)
    rows = batch_rows(config, phase)
    return 1 if section.microbatch_size is None else -(-rows // section.microbatch_size)


def batch_rows(config: RunConfig, phase: str) -> int:
    """Returns the rows of an optimiser step, of which microbatches are parts: frames, or decisions."""
    if phase == "tpo":
        return 2 * config.tpo.batch_size * -(-config.env.horizon // getattr(config.model, "chunk", 1))
    return config.ppo.minibatch_size if phase == "ppo" else config.sft.batch_size
