"""RLDS data sets as tensorflow-datasets keeps them on disk (TFRecord, ArrayRecord), in the order of the files.

The only file that needs TensorFlow, and not before a data set is opened. Images are decoded and resized by TensorFlow,
too, as OpenVLA's own loader does it: Lanczos-3 with antialiasing, rounded, clipped to uint8.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from stare_jax.data.rlds_layouts import Layout
from stare_jax.data.schema import DatasetError
from stare_jax.documents import refuse_pointer

RESIZE = "lanczos3"
MAX_STEPS = 1 << 14
"""Most steps of an episode; TensorFlow reserves as many places for each."""
_TEXT, _CODES = r"string \[\]", r"u?int\d+ \[(\d+|None)\]"
"""Kinds of an instruction: a text, or the codes of its characters with zeros behind them."""
_NUMBERS, _IMAGE = r"(bool|(bfloat|float|u?int)\d+) \[.*\]", r"uint8 \[(\d+|None), (\d+|None), (\d+|None)\]"
_NO_STEPS = "Dataset was empty"
"""TensorFlow's words for an episode without any step."""
_LAST_LATIN, _WHITE = 0x24F, (9, 10, 13)


class RldsSource(NamedTuple):
    """An RLDS data set on disk."""

    directory: Path
    builder: Any
    """Builder of tensorflow-datasets."""
    name: str
    version: str
    fields: dict[str, str]
    """Fields of a step: path, such as `observation/image_0` -> type and shape."""
    num_episodes: dict[str, int]
    """Split -> number of its episodes."""


class EpisodeSteps(NamedTuple):
    """The fields of T steps of an episode that are read."""

    image: np.ndarray
    """uint8 `[T, size, size, 3]`."""
    state: np.ndarray
    """float32 `[T, S]`; S = 0 where the layout has none."""
    action: np.ndarray
    """float32 `[T, A]`, the layout's fields one after another."""
    instruction: list[str]
    """`[T]`."""


def open_source(directory: str | os.PathLike) -> RldsSource:
    """Opens a data set without reading its episodes.

    Args:
        directory: folder of one version of it, `.../NAME/VERSION`, with `dataset_info.json` and `features.json`.

    Raises:
        DatasetError: it is no such folder, its episodes are not made of steps, or TensorFlow is not installed.
    """
    directory = Path(directory)
    for name in ("dataset_info.json", "features.json"):
        if not (directory / name).exists():
            raise DatasetError(
                f"{directory} is no data set of tensorflow-datasets: it has no {name}; expected .../NAME/VERSION"
            )
    tfds = _tensorflow()[1]
    try:
        builder = tfds.builder_from_directory(str(directory))
        features = dict(builder.info.features.items())
        num_episodes = {split: info.num_examples for split, info in builder.info.splits.items()}
    except Exception as error:  # whatever tensorflow-datasets makes of a damaged file
        reason = f"{type(error).__name__}: {_line(error)}"
        raise DatasetError(f"{directory}: dataset_info.json or features.json cannot be read: {reason}") from error
    if not isinstance(features.get("steps"), tfds.features.Dataset):
        raise DatasetError(f"{directory}: got episodes of {sorted(features)}, expected RLDS, with 'steps' among them")
    fields = {path: _kind(feature) for path, feature in _step_features(builder).items()}
    return RldsSource(directory, builder, builder.name, str(builder.version), fields, num_episodes)


def check_source(source: RldsSource, layout: Layout, split: str) -> None:
    """Makes sure that a split, and the fields of a layout, are there and of a kind that can be read.

    Raises:
        DatasetError: names what was found and what was expected.
    """
    if split not in source.num_episodes:
        raise DatasetError(f"{source.directory}: split: got {split!r}, expected one of {sorted(source.num_episodes)}")
    state = [layout.state] if layout.state else []
    wanted = (layout.image, *state, *layout.action, layout.instruction)
    if missing := ", ".join(path for path in wanted if path not in source.fields):
        raise DatasetError(f"{source.directory}: got steps of {list_fields(source)}; expected {missing} as well")
    texts = ", ".join(path for path, kind in source.fields.items() if re.fullmatch(_TEXT, kind)) or "none of its fields"
    text = f"a text, 'string []', as {texts}, or codes of characters, 'int32 [N]'"
    kinds = [(layout.image, _IMAGE, "images"), (layout.instruction, f"{_TEXT}|{_CODES}", text)]
    kinds += [(path, _NUMBERS, "numbers") for path in (*state, *layout.action)]
    for path, kind, expected in kinds:
        if not re.fullmatch(kind, got := source.fields[path]):
            raise DatasetError(f"{source.directory}: {path}: got {got}, expected {expected}")


def check_files(source: RldsSource, split: str, first: int, last: int, *, may_miss: bool) -> None:
    """Makes sure that the files of the episodes [first, last) of a split are there, before hours of reading.

    Args:
        source, split, first, last: see `read_episodes`.
        may_miss: whether some may be missing, so that their episodes cannot be read.

    Raises:
        DatasetError: names the files that are missing.
        DocumentError: names one that Git LFS has not fetched.
    """
    info, start, missing = source.builder.info.splits[split], 0, []
    for name, length in zip(info.filepaths, info.shard_lengths, strict=True):
        path, is_wanted = Path(str(name)), start < last and first < start + length
        start += length
        if is_wanted:
            refuse_pointer(path)
            missing += [] if path.is_file() else [path.name]
    if missing and not may_miss:
        named = ", ".join(missing[:5]) + (" ..." if missing[5:] else "")
        advice = "--limit reads the first ones alone, --skip-broken leaves out and counts their episodes"
        raise DatasetError(f"{source.directory}: got no {named}, expected {len(missing)} more file(s); {advice}")


def list_fields(source: RldsSource) -> str:
    """Returns the fields of a step, in words."""
    return ", ".join(f"{path} ({kind})" for path, kind in sorted(source.fields.items()))


def name_episode(source: RldsSource, split: str, index: int) -> str:
    """Returns how messages name an episode."""
    return f"{source.directory}: episode {index} of {split!r}"


def read_episodes(
    source: RldsSource, layout: Layout, split: str, first: int, last: int, *, image_size: int
) -> Iterator[EpisodeSteps | DatasetError]:
    """Yields the episodes [first, last) of a split, or, in the place of one that cannot be read, the reason.

    One without steps has none of anything.

    Those before are passed over without reading their files; files are opened again behind an episode that cannot be
    read. Where a TFRecord file is damaged the rest of it cannot be read either.

    Raises:
        DatasetError: none of the episodes can be read.
    """
    tf, _ = _tensorflow()
    index = first
    while index < last:
        try:
            for row in _rows(source, layout, split, index, last, image_size=image_size):
                yield EpisodeSteps(*row[:3], [_spell(value) for value in row[3]])
                index += 1
            problem = "the files end before it" if index < last else None
        except (tf.errors.OpError, OSError, ValueError, IndexError) as error:
            problem = _line(error)
        if problem and _NO_STEPS in problem:
            none = np.zeros((0, 0), np.float32)
            yield EpisodeSteps(np.zeros((0, image_size, image_size, 3), np.uint8), none, none, [])
            index += 1
        elif problem:
            yield DatasetError(f"{name_episode(source, split, index)} cannot be read: {problem}")
            index += 1


def _rows(
    source: RldsSource, layout: Layout, split: str, first: int, last: int, *, image_size: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields image, state, action and instruction of the steps of each of the episodes [first, last).

    Raises:
        DatasetError: tensorflow-datasets cannot read such features.
    """
    try:
        return _pipeline(source, layout, split, first, last, image_size).as_numpy_iterator()
    except Exception as error:  # whatever tensorflow-datasets makes of a description that files do not fit
        raise DatasetError(f"{source.directory}: cannot be read: {type(error).__name__}: {_line(error)}") from error


def _pipeline(source: RldsSource, layout: Layout, split: str, first: int, last: int, image_size: int) -> Any:
    """Returns the `tf.data.Dataset` of these rows."""
    tf, tfds = _tensorflow()
    decoders = _undecoded_images(tfds, source.builder)

    def all_steps(episode):
        steps = episode["steps"].map(lambda step: _step(tf, step, layout, image_size))
        return steps.batch(MAX_STEPS).get_single_element()

    if source.builder.info.file_format.value == "array_record":  # which tensorflow-datasets does not give to tf.data
        features = source.builder.info.features
        records = tf.data.Dataset.from_generator(
            lambda: _array_records(source, split, first, last), output_signature=tf.TensorSpec((), tf.string)
        )
        raw = records.map(lambda record: features.deserialize_example(record, decoders=decoders))
    else:
        raw = source.builder.as_dataset(
            split=tfds.core.ReadInstruction(split, from_=first, to=last, unit="abs"),
            shuffle_files=False,
            decoders=decoders,
            # In order, nothing kept in memory.
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
    return raw.map(all_steps, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(1)


def _array_records(source: RldsSource, split: str, first: int, last: int) -> Iterator[bytes]:
    """Yields the serialized episodes [first, last) of a split that is kept as ArrayRecord."""
    info, start = source.builder.info.splits[split], 0
    for path, expected in zip(info.filepaths, info.shard_lengths, strict=True):
        wanted = range(max(first, start), min(last, start + expected))
        if wanted:
            reader = ArrayRecordReader(str(path))
            if (got := reader.num_records()) != expected:
                raise ValueError(f"{path}: got {got} episodes, expected {expected}")
            for index in wanted:
                (record,) = reader.read([index - start])
                yield record
            reader.close()
        start += expected


def _spell(value: bytes | np.ndarray) -> str:
    """Returns an instruction of a step as a text.

    Raises:
        ValueError: numbers are no codes of characters.
    """
    if isinstance(value, bytes):
        return value.decode(errors="replace").strip()
    codes = value.tolist()
    codes = codes[: codes.index(0)] if 0 in codes else codes
    # The numbers of a tokenizer, which would give a text without a meaning, are not as small.
    if not all(code in _WHITE or 32 <= code <= _LAST_LATIN for code in codes):
        raise ValueError(f"instruction: got the numbers {codes[:8]}, expected codes of Latin characters, then zeros")
    return "".join(map(chr, codes)).strip()


def _line(error: Exception) -> str:
    """Returns the message of an error as one line: its end, where TensorFlow puts a whole traceback before it."""
    return " ".join(str(error).split())[-300:]


def _tensorflow() -> tuple[Any, Any]:
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(f"RLDS is read with TensorFlow: pip install -e '.[rlds]' ({error})") from error
    tf.config.set_visible_devices([], "GPU")  # It would take all the memory there, for resizing images.
    return tf, tfds


def _step_features(builder: Any) -> dict[str, Any]:
    """Returns the features of a step by their paths."""

    def flat(features: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, feature in features.items():
            if hasattr(feature, "items"):
                yield from flat(feature, f"{prefix}{name}/")
            else:
                yield prefix + name, feature

    return dict(flat(builder.info.features["steps"].feature, ""))


def _kind(feature: Any) -> str:
    is_array = isinstance(feature.shape, tuple)
    return f"{feature.tf_dtype.name} {list(feature.shape)}" if is_array else type(feature).__name__


def _undecoded_images(tfds: Any, builder: Any) -> dict[str, Any]:
    """Returns decoders that leave images encoded, since only one camera of several is used."""
    decoders: dict[str, Any] = {}
    for path, feature in _step_features(builder).items():
        if isinstance(feature, tfds.features.Image):
            *folders, name = path.split("/")
            place = decoders
            for folder in folders:
                place = place.setdefault(folder, {})
            place[name] = tfds.decode.SkipDecoding()
    return {"steps": decoders}


def _step(tf: Any, step: Mapping[str, Any], layout: Layout, image_size: int) -> tuple[Any, Any, Any, Any]:
    """Returns image, state, action and instruction of a step, as tensors."""

    def field(path: str) -> Any:
        value = step
        for name in path.split("/"):
            value = value[name]
        return value

    def numbers(paths: tuple[str, ...]) -> Any:
        return tf.concat([tf.zeros(0), *(tf.reshape(tf.cast(field(path), tf.float32), [-1]) for path in paths)], axis=0)

    image = field(layout.image)
    if image.dtype == tf.string:
        image = tf.io.decode_image(image, channels=3, expand_animations=False)
    size = (image_size, image_size)
    image = tf.image.resize(tf.cast(image, tf.float32), size, method=RESIZE, antialias=True)
    image = tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)
    state = numbers((layout.state,) if layout.state else ())
    return image, state, numbers(layout.action), field(layout.instruction)
