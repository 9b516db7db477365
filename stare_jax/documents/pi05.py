"""JSON beside the weights of pi0.5: config.json of openpi's PyTorch port and of lerobot, and lerobot's processors.

As in `documents.openvla`, a field that may have only one value is there to refuse all others by name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Interval

from stare_jax.documents.openvla import CONFIG, Off
from stare_jax.documents.reader import (
    NOTHING,
    DocumentError,
    Size,
    check_record,
    one_value,
    read_json,
    read_record,
)
from stare_jax.documents.statistics import check_quantiles

PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
_IMAGES = "observation.images."
_STATE, _ACTION = "observation.state", "action"
_Mode = Literal["QUANTILES", "QUANTILE10", "MIN_MAX", "MEAN_STD", "IDENTITY"]
_COLUMNS = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}
"""mode of normalisation -> statistics that become -1 and 1"""


class Feature(NamedTuple):
    """An input or output of a policy of lerobot."""

    type: Literal["STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE"]
    shape: tuple[Size, ...]


class Switch(NamedTuple):
    """A part that has to be off."""

    enabled: Off = None


class Description(NamedTuple):
    """config.json of lerobot, or of openpi's PyTorch port, which has fewer fields and other names."""

    type: Literal["pi05"] | None = None
    pi05: Literal[True] | None = None
    paligemma_variant: Literal["gemma_2b", "gemma_2b_lora"] | None = None
    action_expert_variant: Literal["gemma_300m", "gemma_300m_lora"] | None = None
    action_dim: Size | None = None
    max_action_dim: Size | None = None
    action_horizon: Size | None = None
    chunk_size: Size | None = None
    n_action_steps: Size | None = None
    n_obs_steps: Literal[1] | None = None
    num_inference_steps: Size | None = None
    image_resolution: tuple[Size, Size] | None = None
    input_features: dict[str, Feature] | None = None
    min_period: Annotated[float, Interval(ge=4e-3, le=4e-3)] | None = None
    max_period: Annotated[float, Interval(ge=4, le=4)] | None = None
    use_relative_actions: Off = None
    use_peft: Off = None
    rtc_config: Switch | None = None
    quantization: None = None
    quantization_config: None = None


class Told(NamedTuple):
    """Content of a model's config.json, written by another program, as our configuration has it."""

    fields: dict[str, Any]
    """fields of `Pi05Config`, which weights do not tell"""
    chunk: int | None = None
    """actions that lerobot executes before the next decision"""
    cameras: tuple[str, ...] | None = None
    """names of lerobot's cameras, None where it is not lerobot's"""


_NAMES = {
    "window": ("chunk_size", "action_horizon"),
    "model_action_dim": ("max_action_dim", "action_dim"),
    "num_denoising_steps": ("num_inference_steps",),
}
"""field of `Pi05Config` -> names in config.json of lerobot and of the port"""


def read_description(folder: Path) -> Told:
    """Reads config.json of lerobot or of openpi's PyTorch port, if it is there.

    Raises:
        DocumentError: a field is damaged, or of a policy that computes something else.
    """
    file = folder / CONFIG
    fields = read_json(file, optional=True)
    if not {"type", "action_horizon", "chunk_size"} & set(fields):
        return Told({})
    description = check_record(Description, fields, str(file))
    told = {ours: one_value(str(file), {n: getattr(description, n) for n in names}) for ours, names in _NAMES.items()}
    width, height = description.image_resolution or (None, None)
    if width != height:
        raise DocumentError(f"{file}: image_resolution: got {width} and {height}, expected a square")
    told = {name: value for name, value in (told | {"image_size": width}).items() if value is not None}
    inputs = description.input_features or {}
    names = [name.removeprefix(_IMAGES) for name, feature in inputs.items() if feature.type == "VISUAL"]
    cameras = tuple(name for name in names if not name.startswith("empty_camera"))
    is_lerobots = description.type is not None
    return Told(told, description.n_action_steps, cameras if is_lerobots and cameras else None)


class Step(NamedTuple):
    """A step of one of lerobot's processors; those that are not named here are refused."""

    registry_name: Literal[
        "rename_observations_processor",
        "to_batch_processor",
        "normalizer_processor",
        "unnormalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
        "relative_actions_processor",
        "absolute_actions_processor",
    ]
    config: dict[str, Any] = {}
    state_file: str | None = None


class Processor(NamedTuple):
    """policy_preprocessor.json and policy_postprocessor.json."""

    steps: tuple[Step, ...]


class Normalizer(NamedTuple):
    """`config` of the step that normalises, or of the one that undoes it."""

    norm_map: dict[str, _Mode] = {}
    features: dict[str, Feature] = {}
    normalize_observation_keys: tuple[str, ...] | None = None


Load = Callable[[Path], Mapping[str, np.ndarray]]
"""file of safetensors -> its tensors by name"""


def read_processor_stats(
    folder: Path, load: Load, *, action_dim: int | None, state_dim: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None] | None:
    """Reads what lerobot's processors normalise by, as columns q01 and q99 of actions and of states.

    All of lerobot's modes are lines through two points, and quantiles here: those of MEAN_STD are `mean - std` and
    `mean + std`, those of what is not normalised -1 and 1.

    Args:
        folder: of the checkpoint.
        load: reads the tensors of a file.
        action_dim: A of the robot, to which longer statistics are cut; None takes them all.
        state_dim: S, likewise; 0 reads none.

    Returns:
        Columns of actions and of states, None where there are no states; None where the processors have no statistics.

    Raises:
        DocumentError: statistics are missing or damaged, processors contradict each other, or have a step that computes
            something else than openpi does.
    """
    before, after = (_read_ranges(folder / name, load) for name in PROCESSORS)
    actions = {name: x[_ACTION] for name, x in zip(PROCESSORS, (before, after), strict=True) if _ACTION in x}
    if not actions:
        return None
    if list(actions) == [PROCESSORS[1]] and (folder / PROCESSORS[0]).is_file():  # states would be taken as they are
        raise DocumentError(f"{folder / PROCESSORS[0]}: got no statistics, expected some, as {PROCESSORS[1]} has them")
    if len(actions) == 2 and len({str(value) for value in actions.values()}) > 1:
        got = "got other statistics of actions than in policy_preprocessor.json"
        raise DocumentError(f"{folder / PROCESSORS[1]}: {got}, expected the same")
    name, action = next(iter(actions.items()))
    action = check_quantiles(action, str(folder / name), _ACTION, dim=action_dim, may_be_longer=True)
    if state_dim == 0 or (state_dim is None and _STATE not in before):
        return action, None
    state = check_quantiles(
        before.get(_STATE, NOTHING), str(folder / PROCESSORS[0]), _STATE, dim=state_dim, may_be_longer=True
    )
    return action, state


def _read_ranges(file: Path, load: Load) -> dict[str, dict[str, Any]]:
    """Returns the values of each feature that become -1 and 1; none where there is no file or no statistics."""
    if not file.is_file():
        return {}
    ranges: dict[str, dict[str, Any]] = {}
    for i, step in enumerate(read_record(Processor, file).steps):
        path = f"steps[{i}].config"
        if step.registry_name in ("relative_actions_processor", "absolute_actions_processor"):
            check_record(Switch, step.config, str(file), path=path)
        if step.registry_name not in ("normalizer_processor", "unnormalizer_processor") or step.state_file is None:
            continue
        if Path(step.state_file).name != step.state_file:
            got = f"steps[{i}].state_file: got {step.state_file!r}"
            raise DocumentError(f"{file}: {got}, expected the name of a file beside it")
        config, tensors = (
            check_record(Normalizer, step.config, str(file), path=path),
            load(file.parent / step.state_file),
        )
        for name, feature in config.features.items():
            if feature.type in ("STATE", "ACTION") and any(key.rpartition(".")[0] == name for key in tensors):
                mode = config.norm_map.get(feature.type, "IDENTITY")
                keys = config.normalize_observation_keys
                if name != _ACTION and keys is not None and name not in keys:
                    mode = "IDENTITY"
                ranges[name] = _range(tensors, name, mode, feature.shape[0], str(file.parent / step.state_file))
    return ranges


def _range(tensors: Mapping[str, np.ndarray], name: str, mode: str, size: int, place: str) -> dict[str, Any]:
    if mode == "IDENTITY":
        return {"q01": [-1.0] * size, "q99": [1.0] * size}
    wanted = ("mean", "std") if mode == "MEAN_STD" else _COLUMNS[mode]
    if missing := [f"{name}.{column}" for column in wanted if f"{name}.{column}" not in tensors]:
        raise DocumentError(f"{place}: got no {' and no '.join(missing)}, expected what {mode} normalises by")
    low, high = (np.asarray(tensors[f"{name}.{column}"], np.float32) for column in wanted)
    if mode == "MEAN_STD":
        low, high = low - high, low + high
    return {"q01": low.tolist(), "q99": high.tolist()}
