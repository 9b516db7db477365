"""Places of arrays: one mesh, one table of (regex, PartitionSpec) for the whole train state, one layout of batches."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stare_jax.config import UserError
from stare_jax.types import PyTree

BATCH_AXES = ("data", "fsdp")
"""axes of the mesh over which rows of a batch are split."""
AXES = (*BATCH_AXES, "tensor")
# Auto, because under the default (Explicit) an embedding's gather raises.
AXIS_TYPES = (AxisType.Auto,) * len(AXES)
Rule = tuple[str, P]
"""regex over a parameter's path, and the PartitionSpec of the parameters in whose paths it is found."""
Rules = Sequence[Rule]


class ShardingError(UserError, ValueError):
    """The table and the tree do not fit; the message names every path or rule concerned."""


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the first `data * fsdp * tensor` devices; of all, host by host, where there are several hosts.

    Args:
        data: replicas of the model; -1 takes all devices that the other two leave.
        fsdp: over how many devices weights and optimiser state are cut; the batch is cut over these, too.
        tensor: over how many devices single matrices are cut.
        devices: to choose from; those of all processes if None.

    Raises:
        ShardingError: more devices asked for than there are, or fewer, so that a process would have none.
    """
    num_hosts = 1 if devices is not None else len({device.process_index for device in jax.devices()})
    devices = jax.devices() if devices is None else devices
    num_devices = len(devices)
    if data == -1:
        data = num_devices // max(fsdp * tensor, 1)  # sizes that are too small are refused below
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1 or np.prod(sizes) > num_devices:
        expected = f"at most {num_devices} device(s), and at least 1 along each axis"
        raise ShardingError(f"mesh: got data x fsdp x tensor = {sizes}, expected {expected}")
    if num_hosts == 1:
        return jax.make_mesh(sizes, AXES, AXIS_TYPES, devices=devices[: int(np.prod(sizes))])
    if np.prod(sizes) < num_devices:
        expected = f"all {num_devices} devices of {num_hosts} processes"
        raise ShardingError(f"mesh: got data x fsdp x tensor = {sizes}, expected {expected}; data = -1 takes them")
    by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(by_host).reshape(sizes), AXES, AXIS_TYPES)


def make_abstract_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Returns a mesh of devices that need not be there, for layouts; arguments as for `make_mesh`, -1 at least one."""
    if data == -1:
        data = max(jax.device_count() // max(fsdp * tensor, 1), 1)
    if min(data, fsdp, tensor) < 1:
        raise ShardingError(f"mesh: got data x fsdp x tensor = {(data, fsdp, tensor)}, expected at least 1 of each")
    return AbstractMesh((data, fsdp, tensor), AXES, AXIS_TYPES)


def path_name(path: tuple) -> str:
    """Returns a key path of `jax.tree` as `params/trunk/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cut_over_processor(shapes: PyTree) -> PyTree:
    """Gives shapes shardings over the devices that the host's processor counts as: each leaf is cut, if it can be."""
    devices = jax.local_devices(backend="cpu")
    mesh, whole = Mesh(np.array(devices), ("part",)), SingleDeviceSharding(devices[0])

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % len(devices) == 0]
        sharding = NamedSharding(mesh, P(*[None] * axes[0], "part")) if axes else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(cut, shapes)


def tree_shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules) -> PyTree:
    """Returns the NamedSharding of every leaf of a train state: the first rule whose regex is found in its path.

    Optimiser moments carry the path of their parameter inside their own, so they land where the parameter does.
    Scalars are replicated and need no rule.

    Args:
        tree: leaves with shapes.
        mesh: axes `data, fsdp, tensor`.
        rules: (regex, PartitionSpec).

    Raises:
        ShardingError: leaves that no rule matches, rules that are first match of no leaf, shapes that do not divide.
    """
    used, unmatched, unfit = set(), [], []

    def one(path, leaf):
        name = path_name(path)
        if np.ndim(leaf) == 0:
            return NamedSharding(mesh, P())
        for index, (pattern, spec) in enumerate(rules):
            if re.search(pattern, name):
                used.add(index)
                if not _fits(np.shape(leaf), spec, mesh):
                    unfit.append(f"{name}: got shape {np.shape(leaf)}, expected one that {spec} divides")
                return NamedSharding(mesh, spec)
        unmatched.append(name)
        return NamedSharding(mesh, P())

    shardings = jax.tree.map_with_path(one, tree)
    unused = [f"{pattern!r}" for index, (pattern, _) in enumerate(rules) if index not in used]
    problems = [
        *([f"no rule matches {', '.join(unmatched)}"] if unmatched else []),
        *([f"no parameter is left for the rule(s) {', '.join(unused)}"] if unused else []),
        *([f"on the mesh {dict(mesh.shape)}, {'; '.join(unfit)}"] if unfit else []),
    ]
    if problems:
        raise ShardingError("sharding rules: " + "; ".join(problems))
    return shardings


def _fits(shape: tuple[int, ...], spec: P, mesh: Mesh) -> bool:
    if len(spec) > len(shape):
        return False
    for size, axes in zip(shape, spec, strict=False):
        names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
        if size % int(np.prod([mesh.shape[name] for name in names])):
            return False
    return True


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def num_parts(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts that a batch is cut into, data x fsdp."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def num_hosts(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of processes whose devices a mesh has; 1 for devices that need not be there."""
    return 1 if isinstance(mesh, AbstractMesh) else len({device.process_index for device in mesh.devices.flat})


def has_own_parts(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether each part of a batch lies on the devices of one process: `tensor` stays within a host."""
    return num_parts(mesh) % num_hosts(mesh) == 0


def check_shares(name: str, size: int, unit: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ShardingError unless processes can share `size` in equal parts of whole units; `name` is to blame."""
    if size % (num_hosts(mesh) * unit):
        expected = f"a multiple of {num_hosts(mesh)} processes" + (f" x {unit}" if unit > 1 else "")
        raise ShardingError(f"{name}: got {size}, expected {expected}")


def check_batch_size(name: str, size: int | None, mesh: Mesh | AbstractMesh) -> None:
    """Raises ShardingError unless a batch of `size` can be cut over the mesh; `name` is the config field to blame."""
    if size is not None and size % num_parts(mesh):
        raise ShardingError(f"{name}: got {size}, expected a multiple of data x fsdp = {num_parts(mesh)}")
    if size is not None and not has_own_parts(mesh) and size % mesh.size:
        expected = f"a multiple of {mesh.size}, all devices, as tensor = {mesh.shape['tensor']} goes across hosts"
        raise ShardingError(f"{name}: got {size}, expected {expected}")
