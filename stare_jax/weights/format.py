"""Formats of other people's weights as records of functions, and weights that are compared before they are read."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from stare_jax.config import ConfigError
from stare_jax.models import ModelConfig
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.state.storage import flatten
from stare_jax.types import NormStats, PyTree
from stare_jax.weights.heads import fresh_params, open_heads
from stare_jax.weights.safetensors_folder import Spec, Stored, Tensors, WeightsError, check_tensors
from stare_jax.weights.tensor_table import (
    FLOATS,
    Entry,
    Leaves,
    adapted_module,
    insert,
    is_adapter,
    leaf_shapes,
    read_tree,
    table_specs,
)

OnBytes = Callable[[int], None]


class Clean(NamedTuple):
    """Tensors under the names that a format's table has them under."""

    tensors: dict[str, Stored]
    left: tuple[str, ...] = ()
    """names in the file of those that no part of the model corresponds to"""


class Format(NamedTuple):
    """Form in which other programs keep weights of one kind of model."""

    name: str
    """"openvla", "openpi", "safetensors" (of openpi's PyTorch port), "lerobot" or "paligemma\""""
    model: type
    """configuration of the model"""
    kept: str
    """folder of a converted folder in which everything but the parameters is kept"""
    find: Callable[[Path], Tensors | None]
    """lists the tensors of a folder or file; None where it is not in this format"""
    clean: Callable[[Path, Tensors], Clean]
    """gives tensors the names of the table"""
    read_config: Callable[[Path], ModelConfig]
    """reads what the folder says of its model; raises ConfigError where it does not say it"""
    table: Callable[[ModelConfig, Collection[str]], dict[str, Entry]]
    """places of our leaves, given the names of the tensors that there are"""
    statistics: Callable[[Sequence[Path], str | None, int | None, int | None], tuple[str | None, NormStats | None]]
    """reads name and statistics of a data set, given folders, of which later ones go over earlier ones, its name where
    there are several, and how many numbers of actions and states to take; None, None where there are none"""
    add_statistics: Callable[[Path, str, NormStats], None]
    """puts statistics into a folder under a name"""
    unused: Callable[[ModelConfig, str], dict[str, Spec]] = lambda config, dtype: {}
    """tensors of the format that are never run, given the type of all others"""
    finish: Callable[[Path, ModelConfig, str | None], None] = lambda folder, config, dtype: None
    """writes what else a folder of this format needs, given the type of its tensors, None where they have several"""
    write_tree: Callable[[Path, Sequence[str], Leaves, OnBytes], None] | None = None
    """writes leaves, given their paths, where the format is no safetensors"""
    prefix: str = ""
    """beginning of all tensors' names in a file that is written"""
    max_bytes: int | None = None
    """size of one file that is written; None writes one file"""
    keeps_unused: bool = False
    """tensors that are never run are kept and given back, instead of left out and written as zeros"""
    one_dtype: bool = False
    """all tensors have the same type"""
    for_robot: Callable[[ModelConfig, int, int], ModelConfig] | None = None
    """gives a model the robot's numbers of actions and states, where the statistics say these and no weight does"""
    read_lora: Callable[[Mapping[str, Spec]], LoRAConfig | None] = lambda specs: None
    """reads the configuration of adapters among the format's own tensors; None where there are none"""
    known: Callable[[Path], dict[str, Any]] = lambda folder: {}
    """reads the fields of the model's configuration that a folder tells, and its tensors' shapes do not"""


class Opened(NamedTuple):
    """Weights in the format of others, compared with a configuration, not read yet."""

    form: Format
    folder: Path
    """folder of what is beside the weights"""
    config: ModelConfig
    table: dict[str, Entry]
    """places of the leaves that are there"""
    tensors: dict[str, Stored]
    unused: dict[str, Stored]
    """tensors that are never run and are kept"""
    dtypes: dict[str, str]
    """type of each tensor of the model, heads apart"""
    left: tuple[str, ...] = ()
    """names of tensors that no part of ours corresponds to"""

    def join(self, adapter: "Opened") -> "Opened":
        """Returns the weights together with an adapter of them, whose heads, if it has any, replace theirs."""
        table, heads = open_heads(adapter.folder, self.config)
        tensors = self.tensors | adapter.tensors | heads
        return self._replace(config=adapter.config, table=self.table | adapter.table | table, tensors=tensors)

    @property
    def dtype(self) -> str:
        """Type in which no tensor of the model is rounded, adapters apart."""
        found = {dtype for name, dtype in self.dtypes.items() if not is_adapter(name)}
        return found.pop() if len(found) == 1 else "float32"

    @property
    def fresh(self) -> list[str]:
        """Paths of the leaves, adapters apart, that are not there and begin with random values."""
        return [path for path in leaf_shapes(self.config) if path not in self.table and not is_adapter(path)]


def open_format(
    form: Format, source: Path, found: Tensors, config: ModelConfig | None, *, adopt_adapters: bool = False
) -> Opened:
    """Compares what was found with what a configuration asks for.

    Args:
        form: the format.
        source: a folder or a file.
        found: its tensors.
        config: of the model; None takes what the folder says.
        adopt_adapters: add adapters that are among the tensors to a configuration without any, instead of refusing.

    Raises:
        WeightsError: tensors are missing, unknown, of another shape or type (all are listed), or the model has parts
            that others do not have.
        ConfigError: the configuration is of another kind of model, or the folder does not say which model it is.
    """
    config = config or form.read_config(source)
    if not isinstance(config, form.model):
        got = f"got weights for {form.model.__name__} in {source}"
        raise ConfigError(f"{got}, expected those of a {type(config).__name__}")
    check_counterpart(config, form)
    tensors, left = form.clean(source, found)
    config = _with_adapters(form, source, tensors, config, adopt=adopt_adapters)
    table, shapes = form.table(config, tensors), leaf_shapes(config)
    dtypes = {stored.spec.dtype for stored in tensors.values()}
    # Where tensors that should have one type differ among each other, the configuration says which are right.
    dtype = dtypes.pop() if len(dtypes) == 1 else config.execution.param_dtype
    if form.one_dtype and dtype not in FLOATS:
        raise WeightsError(f"{source}: got tensors of {dtype}, expected one of {FLOATS}")
    used, unused = table_specs(table, shapes, dtype), form.unused(config, dtype) if form.keeps_unused else {}
    if not form.one_dtype:
        own = {name: tensors[name].spec.dtype for name in used if name in tensors}
        used = {name: spec._replace(dtype=_float(own.get(name, FLOATS[0]))) for name, spec in used.items()}
    check_tensors(source, tensors, used | unused)
    parts = ({name: tensors[name] for name in part} for part in (used, unused))
    opened = Opened(form, source, config, table, *parts, {name: tensors[name].spec.dtype for name in used}, left)
    head_table, heads = open_heads(source, config)
    return opened._replace(table=table | head_table, tensors=opened.tensors | heads)


def _with_adapters(form: Format, source: Path, tensors: Tensors, config: ModelConfig, *, adopt: bool) -> ModelConfig:
    """Returns the configuration with adapters that are among the tensors, having compared those that it has."""
    lora = form.read_lora({name: stored.spec for name, stored in tensors.items()})
    if lora is None:
        return config
    if config.lora is None and adopt:
        return dataclasses.replace(config, lora=lora)
    if config.lora is None:
        unknown = [f"unknown {name} {stored.spec}" for name, stored in tensors.items() if is_adapter(name)]
        raise WeightsError(f"{source}: got adapters, expected none without model.lora:\n  " + "\n  ".join(unknown))
    for path in filter(is_adapter, tensors):
        module = adapted_module(path)
        rank, scale = config.lora.rank_of(module), config.lora.scale_of(module)
        if scale != 1.0:
            raise ConfigError(
                f"model.lora.alpha: got {scale * rank}, expected the rank {rank} of {module}, as openpi's"
            )
    return config


def _float(dtype: str) -> str:
    return dtype if dtype in FLOATS else FLOATS[0]


def check_counterpart(config: ModelConfig, form: Format) -> None:
    """Makes sure that a model is one that checkpoints of a format have, its heads apart.

    Raises:
        WeightsError: names the parts that they do not have.
    """
    parts = {name: getattr(config, name) for name in ("stem", "state_tokens")}
    if foreign := [f"model.{name} = {value!r}" for name, value in parts.items() if value]:
        whose = "OpenVLA" if form.name == "openvla" else "openpi"
        raise WeightsError(f"got a model with {', '.join(foreign)}, expected one that {whose}'s checkpoints have")


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """Returns a configuration with the type of activations and parameters."""
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, dtype=dtype, param_dtype=dtype))


def read_params(
    opened: Opened,
    key: jax.Array,
    *,
    like: PyTree | None = None,
    on_bytes: OnBytes = lambda num_bytes: None,
) -> PyTree:
    """Reads weights, each leaf onto its devices, and makes the leaves that are not there, adapters apart.

    Args:
        opened: the weights.
        key: of the leaves that are not there; consumed.
        like: `jax.ShapeDtypeStruct`s of the parameters, with the shardings that they are to have; None gives NumPy
            arrays in the types of the configuration.
        on_bytes: called with the size of every leaf that is read.
    """
    wanted = leaf_shapes(opened.config) if like is None else flatten(like)
    params = read_tree(opened.table, opened.tensors, wanted, on_bytes)
    for path, leaf in flatten(fresh_params(opened.config, key, wanted, opened.fresh)).items():
        insert(params, path, leaf)
    return params
