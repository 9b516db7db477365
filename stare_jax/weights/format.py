"""Records: formats of other people's weights, and weights that are opened in one of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.models import ModelConfig
from stare_jax.models.blank import leaf_shapes
from stare_jax.models.nn.lora import LoRAConfig, is_adapter
from stare_jax.types import NormStats
from stare_jax.weights.files import Named, OnBytes, Spec, Stored, Tensors
from stare_jax.weights.tensor_table import Entry, widest


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
    clean: Callable[[Path, Tensors], tuple[Tensors, Sequence[str]]]
    """gives tensors the names of the table; returns also the names of those that no part of the model corresponds to"""
    read_config: Callable[[Path], ModelConfig]
    """reads what the folder says of its model; raises ConfigError where it does not say it"""
    table: Callable[[ModelConfig, Collection[str]], dict[str, Entry]]
    """places of our leaves, given the names of the tensors that there are"""
    statistics: Callable[[Sequence[Path], str | None, int | None, int | None], tuple[str | None, NormStats | None]]
    """reads name and statistics of a data set, or None twice, given folders, of which later ones go over earlier ones,
    its name where there are several, and how many numbers of actions and states to take"""
    add_statistics: Callable[[Path, str, NormStats], None]
    """puts statistics into a folder under a name"""
    unused: Callable[[ModelConfig, str], dict[str, Spec]] = lambda config, dtype: {}
    """tensors of the format that are never run, given the type of all others"""
    finish: Callable[[Path, ModelConfig, str | None], None] = lambda folder, config, dtype: None
    """writes what else a folder of this format needs, given the type of its tensors, None where they have several"""
    write_tree: Callable[[Path, Named, OnBytes], None] | None = None
    """writes leaves where the format is no safetensors"""
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
    table: Mapping[str, Entry]
    """places of the leaves that are there"""
    tensors: Tensors
    unused: Mapping[str, Stored]
    """tensors that are never run and are kept"""
    dtypes: Mapping[str, str]
    """type of each tensor of the model, heads apart"""
    left: Sequence[str] = ()
    """names of tensors that no part of ours corresponds to"""

    @property
    def dtype(self) -> str:
        """Type in which no tensor of the model is rounded, adapters apart."""
        return widest(dtype for name, dtype in self.dtypes.items() if not is_adapter(name))

    @property
    def fresh(self) -> list[str]:
        """Paths of the leaves, adapters apart, that are not there and begin with random values."""
        return [path for path in leaf_shapes(self.config) if path not in self.table and not is_adapter(path)]
