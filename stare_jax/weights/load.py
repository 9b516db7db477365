"""What a phase starts from: weights of ours or in the formats of others, with adapters of their own or fresh ones."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from stare_jax.config import ConfigError
from stare_jax.logging import progress_bytes
from stare_jax.models import OpenVLAConfig, Policy
from stare_jax.models.nn.lora import add_adapters, drop_adapters, init_adapters, keep_adapters
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.state.checkpoint import load_model, load_params, param_shapes
from stare_jax.state.train_state import CHECKPOINTS, abstract_params, num_bytes
from stare_jax.types import PyTree
from stare_jax.weights.import_pi05 import open_weights
from stare_jax.weights.openvla.config import read_config
from stare_jax.weights.openvla.read import load_openvla_params
from stare_jax.weights.openvla.side_files import KEPT
from stare_jax.weights.pi05.read import load_weights


def starting_params(
    source: Path | None, policy: Policy, model: OpenVLAConfig | Pi05Config, mesh: Mesh, key: jax.Array
) -> PyTree:
    """Returns parameters on the mesh.

    Args:
        source: a folder with `checkpoints`, an OpenVLA checkpoint in Hugging Face's format, or one of pi0.5 in openpi's
            or lerobot's; None takes random weights.
        policy: whose parameters they are to be.
        model: what the policy was made of. Where it has adapters and the source has none, they are fresh.
        mesh: where the parameters are to be.
        key: of all that is random; consumed.

    Raises:
        ConfigError: the model computes something else than the source's, or its adapters count more or less.
        CheckpointError, WeightsError: the source does not fit.
    """
    like = abstract_params(policy, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    if source is None:
        return jax.jit(policy.init, out_shardings=shardings)(key)
    adapters_key, key = jax.random.split(key)
    base = drop_adapters(like)
    if not (source / CHECKPOINTS).is_dir() and isinstance(model, Pi05Config):
        weights = open_weights(source, config=model)
        has_adapters = any(path.endswith("lora_a") for path in weights.dtypes)
        if has_adapters and model.lora.alpha != model.lora.rank:
            raise ConfigError(
                f"model.lora.alpha: got {model.lora.alpha}, expected the rank {model.lora.rank}, as openpi's"
            )
        with progress_bytes(num_bytes(base), f"read {source.name}") as on_bytes:
            loaded = load_weights(weights, key, config=model, like=like, on_bytes=on_bytes)
        if has_adapters:
            return loaded
    elif not (source / CHECKPOINTS).is_dir():
        check_model(source, model)
        with progress_bytes(num_bytes(base), f"read {source.name}") as on_bytes:
            loaded = load_openvla_params(source, key, config=model, like=base, on_bytes=on_bytes)
    else:
        if (source / KEPT).is_dir():
            check_model(source / KEPT, model)
        has_adapters = any(name.endswith("lora_a") for name in param_shapes(source / CHECKPOINTS))
        if has_adapters and model.lora is not None:
            _check_alpha(source, model)
        loaded = load_params(source / CHECKPOINTS, like if has_adapters else base, cast=True)
        if has_adapters:
            return loaded
    if model.lora is None:
        return loaded
    adapters = init_adapters(policy.init, adapters_key, out_shardings=keep_adapters(shardings))
    return add_adapters(loaded, adapters)


def check_model(folder: Path, model: OpenVLAConfig) -> None:
    """Makes sure that a run's model is that of a checkpoint folder, also in what no tensor's shape tells.

    Means and deviations of the images' colours may differ by rounding: those of published files are in bfloat16.

    Raises:
        ConfigError: names all fields that differ, got and expected.
    """
    if not isinstance(model, OpenVLAConfig):
        raise ConfigError(f"init_from: got weights of OpenVLA in {folder}, expected those of {type(model).__name__}")
    origin, problems = read_config(folder), []
    for name in ("llm", "action_vocab_end", "image_size"):
        if (got := getattr(model, name)) != (expected := getattr(origin, name)):
            problems.append(f"model.{name}: got {got}, expected {expected}")
    for name in ("dino", "siglip"):
        got, expected = getattr(model, name), getattr(origin, name)
        colours = [(*tower.mean, *tower.std) for tower in (got, expected) if tower is not None]
        is_same = len(colours) == 2 and np.allclose(*colours, atol=2e-3)
        if not is_same or dataclasses.replace(got, mean=expected.mean, std=expected.std) != expected:
            problems.append(f"model.{name}: got {got}, expected {expected}")
    if problems:
        raise ConfigError(f"init_from: {folder} is of another model:\n  " + "\n  ".join(problems))


def _check_alpha(source: Path, model: OpenVLAConfig) -> None:
    """Makes sure that adapters count as much as where they come from, which their shapes do not tell."""
    origin = load_model(source / CHECKPOINTS)
    expected = (origin.get("lora") or {}).get("alpha")
    if expected is not None and expected != model.lora.alpha:
        raise ConfigError(f"model.lora.alpha: got {model.lora.alpha}, expected {expected}, as the adapters of {source}")
