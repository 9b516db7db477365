"""A small Bridge V2, written to disk by a tensorflow-datasets builder of its own, and the numbers that are in it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME, VERSION, NUM_SHARDS = "bridge_dataset", "1.0.0", 3
SHAPE = (80, 96, 3)
"""shape of the images that policies look at; those of the second camera are 32 x 32."""
SMALL = (32, 32, 3)


class Raw(NamedTuple):
    """An episode of T steps as it was recorded."""

    instruction: list[str]
    state: np.ndarray
    action: np.ndarray
    image_0: np.ndarray
    image_1: np.ndarray


def _raw(seed, num_steps, instruction, gripper=None):
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(num_steps, 7)).astype(np.float32)
    action = rng.normal(size=(num_steps, 7)).astype(np.float32)
    action[:, 6] = rng.choice([0.0, 0.02, 0.3, 0.7, 0.97, 1.0], num_steps) if gripper is None else gripper
    action[:1] = 0.0
    images = [rng.integers(0, 256, (num_steps, *shape), dtype=np.uint8) for shape in (SHAPE, SMALL)]
    return Raw([instruction] * num_steps, state, action, *images)


def raw_episodes() -> dict[str, list[Raw]]:
    """Returns the episodes of each split, in order."""
    train = [
        _raw(0, 6, "put the carrot on the plate"),
        _raw(1, 5, ""),
        _raw(2, 2, "put the carrot on the plate"),
        _raw(3, 7, "close the drawer", gripper=[0.0, 1.0, 0.5, 0.0, 0.2, 0.3, 0.6]),
        _raw(4, 5, " open the drawer\n"),
        _raw(5, 4, "wait", gripper=1.0),
        _raw(6, 8, "put the carrot on the plate"),
        _raw(7, 6, "close the drawer"),
    ]
    train[4].instruction[0] = ""
    train[5].state[:] = train[5].state[0]
    broken = [_raw(8 + i, 4, "close the drawer") for i in range(NUM_SHARDS)]
    broken[1].state[2, 3] = np.nan
    changing = [_raw(11 + i, 8, "close the drawer") for i in range(NUM_SHARDS)]
    changing[0].instruction[:] = ["", "open the drawer", "", "open the drawer", "wait", "wait", "", "open the drawer"]
    empty = [_raw(14 + i, num_steps, "close the drawer") for i, num_steps in enumerate((4, 0, 4))]
    return {"train": train, "broken": broken, "changing": changing, "empty": empty}


def codes_of(text: str) -> np.ndarray:
    """Returns the codes of a text's characters with zeros behind them, int32 `[40]`."""
    return np.array([*map(ord, text), *[0] * (40 - len(text))], np.int32)


def build(data_dir: Path, file_format: str = "tfrecord") -> Path:
    """Writes the data set and returns its folder, `data_dir/NAME/VERSION`.

    The instruction is there in other forms as well: codes of characters, two texts, an embedding, numbers.
    """
    import tensorflow_datasets as tfds

    class BridgeDataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # There may be several.
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            numbers = tfds.features.Tensor(shape=(7,), dtype=np.float32)
            images = {
                "image_0": tfds.features.Image(shape=SHAPE, encoding_format="png"),
                "image_1": tfds.features.Image(shape=SMALL, encoding_format="png"),
            }
            step = {
                "observation": tfds.features.FeaturesDict({**images, "state": numbers}),
                "action": numbers,
                "language_instruction": tfds.features.Text(),
                "codes": tfds.features.Tensor(shape=(40,), dtype=np.int32),
                "tokens": tfds.features.Tensor(shape=(3,), dtype=np.int32),
                "texts": tfds.features.Tensor(shape=(2,), dtype=np.str_),
                "embedding": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                "task": np.int32,
                "is_first": np.bool_,
                "is_last": np.bool_,
            }
            metadata = tfds.features.FeaturesDict({"file_path": tfds.features.Text()})
            features = {"steps": tfds.features.Dataset(step), "episode_metadata": metadata}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(episodes) for split, episodes in raw_episodes().items()}

        def _generate_examples(self, episodes):
            for e, raw in enumerate(episodes):
                steps = [
                    {
                        "observation": {"image_0": raw.image_0[t], "image_1": raw.image_1[t], "state": raw.state[t]},
                        "action": raw.action[t],
                        "language_instruction": raw.instruction[t],
                        "codes": codes_of(raw.instruction[t]),
                        "tokens": np.array([101, 2330, 102], np.int32),
                        "texts": [raw.instruction[t], "the same in other words"],
                        "embedding": np.zeros(4, np.float32),
                        "task": e,
                        "is_first": t == 0,
                        "is_last": t == len(raw.state) - 1,
                    }
                    for t in range(len(raw.state))
                ]
                yield e, {"steps": steps, "episode_metadata": {"file_path": f"recordings/{e}"}}

    builder = BridgeDataset(data_dir=str(data_dir), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=NUM_SHARDS))
    return data_dir / NAME / VERSION
