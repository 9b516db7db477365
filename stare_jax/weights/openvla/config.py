"""JSON files of an OpenVLA checkpoint: configuration, processing of images, statistics of data sets in and out."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.normalize import action_range
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.models.openvla.presets import openvla_7b
from stare_jax.types import NormStats
from stare_jax.weights.safetensors_folder import WeightsError, read_json
from stare_jax.weights.side_files import write_json

CONFIG, STATISTICS = "config.json", "dataset_statistics.json"
TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
OVERRIDES = "tiny_timm_overrides"
"""field of config.json, found in small checkpoints for tests: sizes of the towers that their timm ids do not say"""
BICUBIC = ("bicubic", 3)
"""names under which timm and PIL know it"""
_REQUIRED = ("timm_model_ids", "text_config", "image_sizes", "pad_to_multiple_of")


def read_config(folder: str | Path) -> OpenVLAConfig:
    """Builds our configuration from a checkpoint's config.json; what it leaves out is as in OpenVLA-7B.

    Raises:
        WeightsError: a field is missing, its vision towers are not the two of OpenVLA-7B, or its images are not resized
            as theirs.
    """
    file = Path(folder) / CONFIG
    description = read_json(file)
    if missing := [name for name in _REQUIRED if name not in description]:
        raise WeightsError(f"{file}: got no {', '.join(missing)}, expected the configuration of an OpenVLA checkpoint")
    if tuple(description["timm_model_ids"]) != TIMM_IDS:
        raise WeightsError(f"{file}: timm_model_ids: got {description['timm_model_ids']}, expected {TIMM_IDS}")
    try:
        config = _build(openvla_7b(tokenizer=str(folder)), description)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: {error}") from error
    return read_preprocessor(folder, config)


def _build(base: OpenVLAConfig, description: Mapping[str, Any]) -> OpenVLAConfig:
    overrides = description.get(OVERRIDES, {})
    dino, siglip = (
        _override(tower, overrides.get(name, {}))
        for name, tower in zip(TIMM_IDS, (base.dino, base.siglip), strict=True)
    )
    llm = _read_llama(description["text_config"], base.llm)
    dtype = description.get("torch_dtype") or "float32"
    return dataclasses.replace(
        base,
        dino=dino,
        siglip=siglip,
        projector_dim=4 * (dino.width + siglip.width),
        llm=llm,
        action_vocab_end=llm.vocab_size - description["pad_to_multiple_of"],
        image_size=description["image_sizes"][0],
        execution=dataclasses.replace(base.execution, dtype=dtype, param_dtype=dtype),
    )


def _override(tower: ViTConfig, sizes: Mapping[str, Any]) -> ViTConfig:
    width = sizes.get("embed_dim", tower.width)
    # A ratio gives a whole number, which rounding must not lessen.
    mlp_dim = int(width * sizes.get("mlp_ratio", tower.mlp_dim / tower.width) + 1e-6)
    depth, num_heads = sizes.get("depth", tower.depth), sizes.get("num_heads", tower.num_heads)
    return dataclasses.replace(tower, width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)


def _read_llama(text: Mapping[str, Any], base: LlamaConfig) -> LlamaConfig:
    num_heads = text.get("num_attention_heads", base.num_heads)
    return LlamaConfig(
        vocab_size=text.get("vocab_size", base.vocab_size),
        width=text.get("hidden_size", base.width),
        depth=text.get("num_hidden_layers", base.depth),
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads", num_heads),
        mlp_dim=text.get("intermediate_size", base.mlp_dim),
        rope_theta=text.get("rope_theta", base.rope_theta),
        norm_eps=text.get("rms_norm_eps", base.norm_eps),
    )


def read_preprocessor(folder: str | Path, config: OpenVLAConfig) -> OpenVLAConfig:
    """Takes means and standard deviations from preprocessor_config.json, where there is one, and checks the resizing.

    The published files carry the statistics twice, and those that Hugging Face's processor uses, in
    `tvf_normalize_params`, are rounded to bfloat16.

    Args:
        folder: the checkpoint.
        config: what its config.json says.

    Raises:
        WeightsError: images are to be resized in another way than bicubically to a square of `config.image_size`.
    """
    for file in (Path(folder) / "config.json", Path(folder) / "preprocessor_config.json"):
        description = read_json(file) if file.exists() else {}
        if not isinstance(description, dict):
            raise WeightsError(f"{file}: got a {type(description).__name__}, expected an object of named fields")
        _check_resizing(file, description, config.image_size)
    if not description:
        return config
    fields = description.get("tvf_normalize_params")
    if fields is None:
        fields = [{"mean": m, "std": s} for m, s in zip(description["means"], description["stds"], strict=True)]
    if len(fields) != 2:
        raise WeightsError(f"{file}: tvf_normalize_params: got {len(fields)}, expected 2, of DINO's tower and SigLIP's")
    towers = {
        name: dataclasses.replace(getattr(config, name), mean=tuple(stats["mean"]), std=tuple(stats["std"]))
        for name, stats in zip(("dino", "siglip"), fields, strict=True)
    }
    return dataclasses.replace(config, **towers)


def _check_resizing(file: Path, description: dict[str, Any], size: int) -> None:
    """Raises WeightsError where images would go through anything but a bicubic squash, as far as the file says."""
    square = [size, size]
    wanted = [
        ("image_resize_strategy", description.get("image_resize_strategy"), ("resize-naive",)),
        ("tvf_do_letterbox", description.get("tvf_do_letterbox"), (False,)),
    ]
    wanted += [("interpolations", name, BICUBIC) for name in description.get("interpolations", ())]
    wanted += [("input_sizes", shape, ([3, *square],)) for shape in description.get("input_sizes", ())]
    for resize in description.get("tvf_resize_params", ()):
        wanted += [("tvf_resize_params.size", resize.get("size"), (square,))]
        wanted += [("tvf_resize_params.interpolation", resize.get("interpolation"), BICUBIC)]
    for name, got, allowed in wanted:
        if got is not None and got not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise WeightsError(f"{file}: {name}: got {got!r}, expected {expected}")


def read_statistics(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the statistics of all data sets, by name.

    dataset_statistics.json, which fine-tuned checkpoints carry, goes over the statistics in config.json, and a later
    folder, such as that of an adapter, over an earlier one.
    """
    statistics: dict[str, Any] = {}
    for folder in folders:
        if (folder / CONFIG).exists():
            statistics |= read_json(folder / CONFIG).get("norm_stats") or {}
        if (folder / STATISTICS).exists():
            statistics |= read_json(folder / STATISTICS)
    return statistics


def read_norm_stats(
    folder: str | Path, *more: str | Path, unnorm_key: str | None = None, state_dim: int = 0
) -> NormStats:
    """Reads the action quantiles of one data set, and the state's where `state_dim` asks for them.

    Args:
        folder: of the checkpoint.
        *more: see `read_statistics`.
        unnorm_key: which data set; may be left out where there is only one.
        state_dim: S.

    Raises:
        WeightsError: the data set is not there, or is not named although there are several.
    """
    statistics = read_statistics([Path(folder), *map(Path, more)])
    if unnorm_key is None and len(statistics) == 1:
        (unnorm_key,) = statistics
    if unnorm_key not in statistics:
        raise WeightsError(f"unnorm_key: got {unnorm_key!r}, expected one of {sorted(statistics)} for {folder}")
    try:
        action = statistics[unnorm_key]["action"]
        state = statistics[unnorm_key]["proprio"] if state_dim else {"q01": [], "q99": []}
        mask = np.asarray(action.get("mask", [True] * len(action["q01"])), bool)
        low, high = action_range(action, mask)
    except KeyError as error:
        raise WeightsError(f"{folder}: statistics of {unnorm_key!r}: got no {error}, expected them") from error
    return NormStats(
        action_q01=low,
        action_q99=high,
        action_mask=mask,
        state_q01=np.asarray(state["q01"], np.float32),
        state_q99=np.asarray(state["q99"], np.float32),
    )


def to_statistics(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as `read_norm_stats` reads them: quantiles and mask, which is all that a policy needs."""
    columns = {name: np.asarray(value).tolist() for name, value in stats._asdict().items()}
    action = {"q01": columns["action_q01"], "q99": columns["action_q99"], "mask": columns["action_mask"]}
    statistics = {"action": action}
    if columns["state_q01"]:
        statistics["proprio"] = {"q01": columns["state_q01"], "q99": columns["state_q99"]}
    return statistics


def find_statistics(
    folders: Sequence[Path], unnorm_key: str | None, action_dim: int | None, state_dim: int | None
) -> tuple[str | None, NormStats | None]:
    """Returns name and statistics of a data set, see `read_norm_stats`; those of actions are never cut."""
    del action_dim
    statistics = read_statistics(folders)
    if unnorm_key is None and len(statistics) == 1:
        (unnorm_key,) = statistics
    return unnorm_key, read_norm_stats(*folders, unnorm_key=unnorm_key, state_dim=state_dim or 0)


def add_statistics(to: Path, name: str, stats: NormStats) -> None:
    """Puts statistics of a data set over those of a folder, in both places where they are looked for."""
    merge_statistics(to, {name: to_statistics(stats)})


def merge_statistics(to: Path, statistics: Mapping[str, Any]) -> None:
    """Puts statistics of data sets, by name, over those of a folder, in both places where they are looked for."""
    side = read_json(to / STATISTICS) if (to / STATISTICS).exists() else {}
    write_json(to / STATISTICS, {**side, **statistics})
    if (to / CONFIG).exists():
        description = read_json(to / CONFIG)
        description["norm_stats"] = {**(description.get("norm_stats") or {}), **statistics}
        write_json(to / CONFIG, description)
