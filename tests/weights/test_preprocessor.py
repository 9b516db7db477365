"""Image processors of checkpoints: statistics are taken from the file, what is not implemented is refused."""

import dataclasses
import json
import re

import pytest

from stare_jax.documents import DocumentError
from stare_jax.models import openvla_7b
from stare_jax.weights.openvla import read_preprocessor

ROUNDED = {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
PUBLISHED = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "tvf_crop_params": [{"output_size": [224, 224]}] * 2,
    "tvf_do_letterbox": False,
    "tvf_letterbox_fill": None,
    "tvf_normalize_params": [{"inplace": False} | ROUNDED, {"inplace": False} | HALF],
    "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [224, 224]}] * 2,
    "use_fused_vision_backbone": True,
}


@pytest.fixture
def read(tmp_path):
    def read_written(description):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(description))
        return read_preprocessor(tmp_path, openvla_7b())

    return read_written


def test_without_the_file_nothing_changes(tmp_path):
    assert read_preprocessor(tmp_path, openvla_7b()) == openvla_7b()


def test_the_statistics_are_those_that_the_processor_uses(read):
    config, base = read(PUBLISHED), openvla_7b()
    # Of the two sets in the file it is the one rounded to bfloat16.
    assert config.dino == dataclasses.replace(base.dino, **{name: tuple(x) for name, x in ROUNDED.items()})
    assert dataclasses.replace(config, dino=base.dino) == base
    assert read({name: value for name, value in PUBLISHED.items() if name != "tvf_normalize_params"}) == base


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_resize_strategy", "letterbox", ": got 'letterbox', expected 'resize-naive'"),
        ("tvf_do_letterbox", True, ": got True, expected False"),
        ("interpolations", ["bicubic", "lanczos"], "[1]: got 'lanczos', expected 'bicubic' or 3"),
        ("input_sizes", [[3, 224, 224], [3, 384, 384]], "[1]: got [3, 384, 384], expected [3, 224, 224]"),
        ("tvf_normalize_params", [HALF], "[1]: got [{'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}], expected one"),
        ("tvf_normalize_params", [HALF, {"mean": [0.5] * 3}], "[1].std: got nothing, expected a list"),
        ("tvf_normalize_params", [HALF, HALF | {"std": [0.5, 0.5]}], "[1].std: got [0.5, 0.5], expected at least 3"),
        ("tvf_normalize_params", [HALF, HALF | {"std": [0.5, 0, 0.5]}], "[1].std[1]: got 0, expected greater than 0"),
        (
            "tvf_normalize_params",
            [HALF, HALF | {"mean": [float("nan")] * 3}],
            "[1].mean[0]: got nan, expected a finite",
        ),
        ("tvf_crop_params", [{"output_size": [200, 200]}], "[0].output_size: got [200, 200], expected [224, 224]"),
        ("image_processor_type", "SiglipImageProcessor", ": got 'SiglipImageProcessor', expected 'Prismatic"),
    ],
)
def test_what_is_not_implemented_is_refused(read, field, value, message):
    with pytest.raises(DocumentError, match=re.escape(f"preprocessor_config.json: {field}{message}")):
        read(PUBLISHED | {field: value})


def test_means_without_deviations_are_refused_and_neither_changes_nothing(read):
    rest = {name: value for name, value in PUBLISHED.items() if name not in ("tvf_normalize_params", "stds")}
    with pytest.raises(DocumentError, match="means and stds: got one of them, expected both or none"):
        read(rest)
    assert read({name: value for name, value in rest.items() if name != "means"}) == openvla_7b()


def test_both_files_that_a_processor_may_be_in_are_read(tmp_path):
    """Since version 5 of transformers the processor's file has the image processor in it."""
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"processor_class": "PrismaticProcessor", "image_processor": PUBLISHED}))
    assert read_preprocessor(tmp_path, openvla_7b()).dino.mean == tuple(ROUNDED["mean"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED | {"tvf_normalize_params": [HALF, HALF]}))
    with pytest.raises(
        DocumentError, match="got other statistics of colours in preprocessor_config.json and processor"
    ):
        read_preprocessor(tmp_path, openvla_7b())
    file.write_text(json.dumps({"image_processor": PUBLISHED | {"tvf_do_letterbox": True}}))
    with pytest.raises(
        DocumentError, match="processor_config.json: image_processor.tvf_do_letterbox: got True, expected"
    ):
        read_preprocessor(tmp_path, openvla_7b())


def test_the_strategy_in_the_configuration_is_checked_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"image_resize_strategy": "letterbox", "image_sizes": [224, 224]}))
    with pytest.raises(ValueError, match=r"/config.json: image_resize_strategy: got 'letterbox', expected"):
        read_preprocessor(tmp_path, openvla_7b())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 224, "got 224, expected [224, 224]"),  # of the shorter side: "resize-crop"
        ("interpolation", 1, "got 1, expected 'bicubic' or 3"),
        ("max_size", 100, "got 100, expected null"),
    ],
)
def test_another_way_of_resizing_is_refused(read, field, value, message):
    resize = PUBLISHED["tvf_resize_params"][0] | {field: value}
    with pytest.raises(ValueError, match=re.escape(f"tvf_resize_params[1].{field}: {message}")):
        read(PUBLISHED | {"tvf_resize_params": [*PUBLISHED["tvf_resize_params"][:1], resize]})


def test_another_kind_of_file(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="preprocessor_config.json: got a list, expected an object"):
        read_preprocessor(tmp_path, openvla_7b())
