"""Parameters that others' checkpoints do not have: value head and noise head, and the side file that they are in."""

from pathlib import Path

from stare_jax.models import ModelConfig
from stare_jax.models.nn.heads import NoiseHead
from stare_jax.weights.files import Stored, check_tensors, list_file, write_file
from stare_jax.weights.side_files import HEADS
from stare_jax.weights.tensor_table import KERNEL, LINEAR, Entry, Leaves, make_entries, table_specs, table_values

OUR_OWN = ("value_head/", "noise_head/", "stem/", "state_embed/")
"""parts of our models that others' checkpoints do not have"""


def head_table(config: ModelConfig) -> dict[str, Entry]:
    """Returns the places of the heads' leaves in their side file; the value head has RL4VLA's names."""
    num_layers = len(config.value_dims)
    rows = {f"value_head/layer_{i}": (f"head_l{i + 1}", LINEAR) for i in range(num_layers)}
    rows["value_head/out"] = (f"head_l{num_layers + 1}", KERNEL)
    if getattr(config, "noise", None) == "learned":
        names = [*(f"layer_{i}" for i in range(len(NoiseHead.hidden_dims))), "out"]
        rows |= {f"noise_head/{name}": (f"noise_head.{name}", LINEAR) for name in names}
    return make_entries(rows)


def open_heads(folder: Path, config: ModelConfig) -> tuple[dict[str, Entry], dict[str, Stored]]:
    """Returns table and tensors of a folder's heads, empty without a side file; raises WeightsError for other heads."""
    file = folder / HEADS
    if not file.is_file():
        return {}, {}
    table, tensors = head_table(config), list_file(file)
    check_tensors(file, tensors, table_specs(table, config, "float32"))
    return table, tensors


def write_heads(to: Path, config: ModelConfig, leaves: Leaves) -> None:
    """Writes the side file of a folder."""
    table = head_table(config)
    specs = table_specs(table, config, "float32")
    write_file(to / HEADS, specs, table_values(table, leaves, specs))
