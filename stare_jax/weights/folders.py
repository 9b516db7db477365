"""Folders of weights: whose they are, told by what is in them; room for more; the checkpoint of what was converted."""

import shutil
from pathlib import Path

from stare_jax.config import ConfigError, to_dict
from stare_jax.logging import Interruption, say
from stare_jax.models import ModelConfig
from stare_jax.state.checkpoint import resolve_step, save_params
from stare_jax.state.train_state import CHECKPOINTS, num_bytes
from stare_jax.types import NormStats, PyTree
from stare_jax.weights.openvla.config import CONFIG
from stare_jax.weights.peft import ADAPTER_CONFIG
from stare_jax.weights.pi05.files import holds_pi05
from stare_jax.weights.safetensors_folder import list_model, read_json

_EXPECTED = (
    "expected an OpenVLA checkpoint (config.json, model*.safetensors), one of pi0.5 (params, or model*.safetensors), a "
    "converted one (checkpoints) or a phase of a run (checkpoints)"
)
OPENVLA, PI05, OURS = "openvla", "pi05", "ours"


def find_kind(folder: Path) -> str:
    """Returns whose weights a folder holds.

    Args:
        folder: or a file of safetensors, or PaliGemma's npz file.

    Returns:
        "openvla", in Hugging Face's format; "pi05", in that of openpi, its PyTorch port, lerobot or PaliGemma; "ours".

    Raises:
        ConfigError: it is none of these; says what it is, where that can be told.
        CheckpointError: it is one of ours without a complete checkpoint.
        WeightsError: it is one of theirs without safetensors or with damaged ones, or config.json is not JSON.
    """
    if folder.is_file():
        if holds_pi05(folder):
            return PI05
        raise ConfigError(f"{folder}: got tensors that are not pi0.5's, {_EXPECTED}")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: got no such folder, {_EXPECTED}")
    if (folder / CHECKPOINTS).is_dir():
        resolve_step(folder / CHECKPOINTS)
        return OURS
    description = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    description = description if isinstance(description, dict) else {}
    if "phases" in description:
        phases = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{CHECKPOINTS}"))) or "none yet"
        raise ConfigError(f"{folder}: got a run, expected one of its phases with checkpoints: {phases}")
    if (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{folder}: got a PEFT adapter, {_EXPECTED}; --from takes the model that it adapts, --adapter the adapter"
        )
    kind = description.get("model_type")
    if kind == "openvla" or "timm_model_ids" in description:
        list_model(folder)
        return OPENVLA
    if holds_pi05(folder):
        return PI05
    names = sorted(path.name for path in folder.iterdir())
    got = f"a model_type {kind!r} in config.json" if kind else ", ".join(names[:10]) or "nothing"
    raise ConfigError(f"{folder}: got {got}, {_EXPECTED}")


def save_converted(folder: Path, params: PyTree, config: ModelConfig, norm_stats: NormStats) -> None:
    """Saves converted parameters, their configuration and statistics as the checkpoint of a folder.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came while it saved.
    """
    say(f"saving {num_bytes(params) / 1e9:.2f} GB")
    with Interruption() as interruption:  # Orbax writes from many threads, which go on when one is interrupted
        save_params(folder / CHECKPOINTS, 0, params, model=to_dict(config), norm_stats=norm_stats)
    if interruption.requested:
        raise KeyboardInterrupt


def check_space(to: Path, size: int) -> None:
    """Makes sure that a disk has room before anything is written.

    Args:
        to: what is to be written.
        size: in bytes.

    Raises:
        ConfigError: it has not.
    """
    parent = next(path for path in to.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ConfigError(f"{parent}: got {free / 1e9:.1f} GB free on its disk, expected at least {size / 1e9:.1f} GB")
