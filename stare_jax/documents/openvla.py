"""JSON beside the weights of OpenVLA: config.json, preprocessor_config.json, and the signs of another policy.

The records hold what is read, and what would compute other numbers than our network does: a field that may have only
one value is there to refuse all others by name. Fields that change no number are not in a record and are passed over.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Interval, Len

from stare_jax.config import Natural, Positive
from stare_jax.documents.reader import (
    DocumentError,
    Numbers,
    Size,
    check_record,
    one_value,
    raise_problems,
    read_json,
    read_record,
)
from stare_jax.documents.statistics import check_tables

CONFIG, STATISTICS = "config.json", "dataset_statistics.json"
PROCESSORS = (("preprocessor_config.json", ""), ("processor_config.json", "image_processor"))
"""file of the image processor and the field that it is in; the second since version 5 of transformers"""
_GENERATION = "generation_config.json"
FloatType = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES = ("torch_dtype", "dtype")
"""names of the type of the weights in config.json, the second since version 4.56 of transformers"""
Off = Literal[False] | None
_One = Annotated[float, Interval(ge=1, le=1)] | None
_OTHER_PART = re.compile(r"\w+--\w+_checkpoint\.pt|(action_head|proprio_projector|noisy_action_projector)\b.*")
"""names of files that OpenVLA-OFT and its relatives save beside the weights"""
_OTHER_CODE = re.compile(r"\b(NUM_ACTIONS_CHUNK|proprio_projector|action_head)\b")
"""names in the code that comes with a checkpoint of theirs"""


class Rope(NamedTuple):
    """Rotary positions: transformers' `rope_scaling`, or `rope_parameters`, which holds the base, too."""

    rope_type: Literal["default"] | None = None
    type: Literal["default"] | None = None
    rope_theta: Positive | None = None
    factor: _One = None
    partial_rotary_factor: _One = None
    full_attention: None = None
    """positions of one kind of layer, where kinds have their own"""
    sliding_attention: None = None


class Text(NamedTuple):
    """`text_config`: a Llama, Llama 2 7B where it leaves a size out."""

    model_type: Literal["llama"] = "llama"
    vocab_size: Size = 32064
    hidden_size: Size = 4096
    num_hidden_layers: Annotated[int, Interval(ge=1, le=1000)] = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    intermediate_size: Size = 11008
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu"] | None = None
    attention_bias: Off = None
    mlp_bias: Off = None
    tie_word_embeddings: Off = None
    partial_rotary_factor: _One = None
    sliding_window: None = None
    use_sliding_window: Off = None
    layer_types: tuple[Literal["full_attention"], ...] | None = None
    quantization_config: None = None


def _rope_bases(text: Text) -> dict[str, float | None]:
    """Returns the base of the rotary positions by each of its names; None where it is not there."""
    inside = {name: (getattr(text, name) or Rope()).rope_theta for name in ("rope_parameters", "rope_scaling")}
    return {f"text_config.{name}": base for name, base in {"rope_theta": text.rope_theta, **inside}.items()}


class Tower(NamedTuple):
    """Sizes of a vision tower that its timm id does not say, in small checkpoints for tests."""

    embed_dim: Size | None = None
    depth: Annotated[int, Interval(ge=2, le=1000)] | None = None
    num_heads: Size | None = None
    mlp_ratio: Positive | None = None


class Description(NamedTuple):
    """config.json."""

    timm_model_ids: tuple[Literal["vit_large_patch14_reg4_dinov2.lvd142m"], Literal["vit_so400m_patch14_siglip_224"]]
    text_config: Text
    image_sizes: tuple[Size, Size]
    pad_to_multiple_of: Natural
    model_type: Literal["openvla"] | None = None
    arch_specifier: Literal["no-align+fused-gelu-mlp"] | None = None
    llm_backbone_id: Literal["llama2-7b-pure", "llama2-13b-pure"] | None = None
    """language models whose prompt is the one that is built here; others have prompts of their own"""
    n_action_bins: Literal[256] | None = None
    use_fused_vision_backbone: Literal[True] | None = None
    timm_override_act_layers: tuple[None, ...] | None = None
    quantization_config: None = None
    torch_dtype: FloatType | None = None
    dtype: FloatType | None = None
    tiny_timm_overrides: dict[str, Tower] = {}

    @property
    def float_type(self) -> str | None:
        """Type of the weights, under whichever name it is there."""
        return self.torch_dtype or self.dtype

    @property
    def rope_theta(self) -> float | None:
        """Base of the rotary positions, likewise."""
        return next(filter(None, _rope_bases(self.text_config).values()), None)


class Generation(NamedTuple):
    """generation_config.json: what changes the most likely token of every step."""

    num_beams: Literal[1] | None = None
    repetition_penalty: _One = None
    no_repeat_ngram_size: Literal[0] | None = None
    suppress_tokens: None = None
    begin_suppress_tokens: None = None
    bad_words_ids: None = None
    forced_bos_token_id: None = None


class Resize(NamedTuple):
    """A step of the image processor, for one tower."""

    size: Any = None
    interpolation: Literal["bicubic", 3] | None = None
    """the names under which timm and PIL know it"""
    max_size: None = None


class Crop(NamedTuple):
    """A step of the image processor, for one tower."""

    output_size: Any = None


_Means = Annotated[Numbers, Len(3, 3)]
_Deviations = Annotated[tuple[Positive, ...], Len(3, 3)]


class Colours(NamedTuple):
    """Statistics by which the images of one tower are normalised."""

    mean: _Means
    std: _Deviations


class Processor(NamedTuple):
    """preprocessor_config.json, and what config.json says of images: no more than a bicubic squash."""

    image_processor_type: Literal["PrismaticImageProcessor"] | None = None
    image_resize_strategy: Literal["resize-naive"] | None = None
    tvf_do_letterbox: Off = None
    interpolations: tuple[Literal["bicubic", 3], ...] | None = None
    input_sizes: tuple[Any, ...] | None = None
    tvf_resize_params: tuple[Resize, ...] | None = None
    tvf_crop_params: tuple[Crop, ...] | None = None
    tvf_normalize_params: tuple[Colours, Colours] | None = None
    means: tuple[_Means, _Means] | None = None
    stds: tuple[_Deviations, _Deviations] | None = None


def read_description(folder: Path) -> Description:
    """Reads config.json of a plain OpenVLA.

    Raises:
        DocumentError: a field is missing or damaged, fields contradict each other, or the original would compute
            something else than our network.
    """
    file = folder / CONFIG
    description = read_record(Description, file)
    text, (width, height) = description.text_config, description.image_sizes
    one_value(str(file), {name: getattr(description, name) for name in DTYPE_NAMES})
    one_value(str(file), _rope_bases(text))
    problems = [] if width == height else [f"image_sizes: got {width} and {height}, expected a square"]
    if text.head_dim is not None and text.head_dim * text.num_attention_heads != text.hidden_size:
        expected = f"expected {text.hidden_size} / {text.num_attention_heads}, hidden_size by num_attention_heads"
        problems.append(f"text_config.head_dim: got {text.head_dim}, {expected}")
    raise_problems(str(file), problems)
    if (folder / _GENERATION).is_file():
        read_record(Generation, folder / _GENERATION)
    refuse_other_policies(folder)
    return description


class Table(NamedTuple):
    """Statistics of one data set, not checked yet."""

    file: str
    path: str
    """names of the fields on the way from the file to the table"""
    fields: dict[str, Any]


def read_tables(folders: Sequence[Path]) -> dict[str, Table]:
    """Returns what OpenVLA's files say of all data sets, by name.

    dataset_statistics.json, which fine-tuned checkpoints carry, goes over config.json, and a later folder, such as that
    of an adapter, over an earlier one.

    Raises:
        DocumentError: a file has something else than tables in the place of them.
    """
    tables = {}
    for folder in folders:
        file, own = folder / CONFIG, folder / STATISTICS
        inside = read_json(file, optional=True).get("norm_stats") or {}
        inside = check_tables(inside, str(file), "norm_stats")
        tables |= {name: Table(str(file), f"norm_stats.{name}", fields) for name, fields in inside.items()}
        beside = check_tables(read_json(own, optional=True), str(own))
        tables |= {name: Table(str(own), name, fields) for name, fields in beside.items()}
    return tables


def refuse_other_policies(folder: Path) -> None:
    """Raises DocumentError where files beside weights say that another policy than OpenVLA's own runs them."""
    if parts := sorted(path.name for path in folder.glob("*") if _OTHER_PART.fullmatch(path.name)):
        got = f"got {', '.join(parts)}, parts of another policy such as OpenVLA-OFT"
        raise DocumentError(f"{folder}: {got}, expected a plain OpenVLA, whose language model gives the actions")
    code = folder / "modeling_prismatic.py"
    if code.is_file() and (found := _OTHER_CODE.search(code.read_text("utf-8", errors="replace"))):
        got = f"got {found.group()}, in the code of a policy such as OpenVLA-OFT"
        raise DocumentError(f"{code}: {got}, expected that of a plain OpenVLA, which decodes one action")


def read_colours(folder: Path, size: int) -> tuple[Colours, Colours] | None:
    """Reads the statistics of the images' colours, for either tower, from the file of the processor, if it is there.

    The published files carry them twice, and those that Hugging Face's processor uses, in `tvf_normalize_params`, are
    rounded to bfloat16.

    Args:
        folder: of the checkpoint.
        size: side of the network's square image, in pixels.

    Raises:
        DocumentError: images are to be resized in another way than bicubically to a square of this size, or a field is
            damaged.
    """
    found = []
    for name, field in ((CONFIG, ""), *PROCESSORS):
        fields, place = read_json(folder / name, optional=True), str(folder / name)
        processor = check_record(Processor, fields.get(field, {}) if field else fields, place, path=field)
        raise_problems(place, _wrong_sizes(processor, size))
        means, stds = processor.means, processor.stds
        if processor.tvf_normalize_params is not None:
            found.append(processor.tvf_normalize_params)
        elif (means is None) != (stds is None):
            raise DocumentError(f"{place}: means and stds: got one of them, expected both or none")
        elif means is not None:
            found.append(tuple(map(Colours, means, stds)))
    if len(set(found)) > 1:
        got = f"got other statistics of colours in {' and '.join(name for name, _ in PROCESSORS)}"
        raise DocumentError(f"{folder}: {got}, expected the same")
    return found[0] if found else None


def _wrong_sizes(processor: Processor, size: int) -> list[str]:
    """Returns the sizes of images that are not the network's square, as far as a file names any."""
    square = [size, size]
    sizes = [(f"tvf_resize_params[{i}].size", x.size) for i, x in enumerate(processor.tvf_resize_params or ())]
    sizes += [
        (f"tvf_crop_params[{i}].output_size", x.output_size) for i, x in enumerate(processor.tvf_crop_params or ())
    ]
    wrong = [(name, got, square) for name, got in sizes if got not in (None, square)]
    shapes = [(f"input_sizes[{i}]", got, [3, *square]) for i, got in enumerate(processor.input_sizes or ())]
    wrong += [(name, got, expected) for name, got, expected in shapes if got != expected]
    return [f"{name}: got {got!r}, expected {expected}" for name, got, expected in wrong]
