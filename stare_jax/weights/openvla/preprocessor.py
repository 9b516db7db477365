"""Reads preprocessor_config.json of an OpenVLA checkpoint: what its images must go through, and their normalisation."""

import dataclasses
from pathlib import Path
from typing import Any

from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights.safetensors_folder import WeightsError, read_json

BICUBIC = ("bicubic", 3)
"""the names under which timm and PIL know it."""


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
