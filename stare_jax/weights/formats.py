"""All formats, and the choice among them by what a folder or file holds."""

from pathlib import Path

from stare_jax.config import ConfigError
from stare_jax.models import ModelConfig
from stare_jax.state.checkpoint import load_norm_stats, resolve_step
from stare_jax.state.train_state import CHECKPOINTS
from stare_jax.types import NormStats
from stare_jax.weights.format import Format, Opened, open_format
from stare_jax.weights.openvla.format import OPENVLA, describe
from stare_jax.weights.peft import ADAPTER_CONFIG
from stare_jax.weights.pi05.formats import LEROBOT, OPENPI, PALIGEMMA, PORT
from stare_jax.weights.safetensors_folder import Tensors, WeightsError

FORMATS = (OPENVLA, PALIGEMMA, LEROBOT, PORT, OPENPI)
_EXPECTED = (
    "expected an OpenVLA checkpoint (config.json, model*.safetensors), one of pi0.5 (params, or model*.safetensors), a "
    "converted one (checkpoints) or a phase of a run (checkpoints)"
)


def is_ours(source: Path) -> bool:
    """Returns whether a folder has checkpoints of ours: a phase of a run, or a converted folder."""
    return (source / CHECKPOINTS).is_dir()


def find_format(source: Path) -> tuple[Format, Tensors] | None:
    """Finds the format of a folder or file by what is in it, and lists its tensors; None where it is one of ours.

    Raises:
        ConfigError: it is none of these; says what it is, where that can be told.
        CheckpointError: it is one of ours without a complete checkpoint.
        WeightsError: it is one of the others' without safetensors or with damaged ones, or config.json is not JSON.
    """
    if not source.exists():
        raise ConfigError(f"{source}: got no such folder, {_EXPECTED}")
    if is_ours(source):
        resolve_step(source / CHECKPOINTS)
        return None
    description = describe(source)
    if "phases" in description:
        phases = ", ".join(sorted(path.parent.name for path in source.glob(f"*/{CHECKPOINTS}"))) or "none yet"
        raise ConfigError(f"{source}: got a run, expected one of its phases with checkpoints: {phases}")
    if (source / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{source}: got a PEFT adapter, {_EXPECTED}; --from takes the model that it adapts, --adapter the adapter"
        )
    for form in FORMATS:
        if (found := form.find(source)) is not None:
            return form, found
    if source.is_file():
        raise ConfigError(f"{source}: got tensors that are not pi0.5's, {_EXPECTED}")
    kind, names = description.get("model_type"), sorted(path.name for path in source.iterdir())
    got = f"a model_type {kind!r} in config.json" if kind else ", ".join(names[:10]) or "nothing"
    raise ConfigError(f"{source}: got {got}, {_EXPECTED}")


def open_weights(source: Path, *, config: ModelConfig | None = None, adopt_adapters: bool = False) -> Opened:
    """Finds weights of others by what is in a folder or file, and compares them with what a configuration asks for.

    Args:
        source: an OpenVLA checkpoint in Hugging Face's form; openpi's, its PyTorch port's, lerobot's; PaliGemma's npz.
        config: of the model; None takes what the folder says.
        adopt_adapters: see `open_format`.

    Raises:
        ConfigError, WeightsError: see `find_format` and `open_format`.
    """
    found = find_format(source)
    if found is None:
        raise WeightsError(f"{source}: got a checkpoint of ours, expected one in the format of others")
    return open_format(found[0], source, found[1], config, adopt_adapters=adopt_adapters)


def read_norm_stats(
    source: Path, unnorm_key: str | None = None, *, action_dim: int | None = None, state_dim: int | None = None
) -> NormStats:
    """Reads the statistics that the policy of a checkpoint acts with, without reading its weights.

    Args:
        source: a phase of a run, a converted folder, or a checkpoint in the format of others.
        unnorm_key: name of the data set, or asset, where a checkpoint of others has statistics of several.
        action_dim: A of the robot, to which longer statistics of openpi's are cut; None takes them all.
        state_dim: S, likewise; OpenVLA's have none of the state where it is None.

    Raises:
        ConfigError, CheckpointError: there are no such weights.
        WeightsError: there are no statistics, or the name is missing or unknown.
    """
    found = find_format(source)
    if found is None:
        return load_norm_stats(source / CHECKPOINTS)
    _, stats = found[0].statistics([source], unnorm_key, action_dim, state_dim)
    if stats is None:
        raise WeightsError(
            f"unnorm_key: got {unnorm_key!r}, expected statistics of a data set in {source}; there are none"
        )
    return stats
