"""Episodes of which nobody measured anything, such as those of real robots: they can be imitated, and nothing else."""

import numpy as np
import pytest

from stare_jax.data.batches import imitation_batches
from stare_jax.data.norm_stats import dataset_statistics
from stare_jax.data.pairs import Pair, dataset_outcomes, load_pairs
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import DatasetError
from stare_jax.data.summary import contact_sheet, summarize_stages
from stare_jax.data.writer import DatasetWriter
from stare_jax.stages import get_task

SPEC = get_task("PushCube-v1")


@pytest.fixture
def dataset(tmp_path, make_trajectory):
    with DatasetWriter(tmp_path, env_id="real_robot", control_mode="as recorded") as writer:
        for i, length in enumerate((3, 4)):
            trajectory = make_trajectory(i, length=length)._replace(signals=None)
            writer.append(trajectory, instruction="put it there", seed=None, source="real_robot/1.0.0", attempt=i)
    return Dataset(tmp_path)


def test_they_are_stored_and_read(dataset, make_trajectory, assert_same):
    assert [(row.seed, row.success, row.length) for row in dataset.episodes] == [(None, None, 3), (None, None, 4)]
    trajectory, _ = dataset.episode(0, horizon=5)
    assert_same(trajectory, make_trajectory(0, length=3, horizon=5)._replace(signals=None))


def test_they_are_imitated(dataset):
    assert dataset_statistics(dataset)["num_transitions"] == 7

    def tokenize(instructions, state):
        assert state.shape == (7, 0)
        tokens = np.array([[len(text)] for text in instructions], np.int32)
        return tokens, np.ones(tokens.shape, bool)

    batches = imitation_batches(dataset, tokenize, batch_size=7, seed=0, with_state=False)
    batch = next(batches)
    batches.close()
    actions = np.concatenate([dataset.episode_record(i)["action"] for i in range(2)])
    np.testing.assert_array_equal(np.unique(batch.action, axis=0), np.unique(actions, axis=0))
    assert batch.observation.state.shape == (7, 0)


def test_they_are_shown(dataset):
    assert contact_sheet(dataset, None).size == (8 * 128, 2 * 142)


@pytest.mark.parametrize(
    "use",
    [
        lambda dataset: dataset.signals(),
        lambda dataset: dataset_outcomes(dataset, SPEC),
        lambda dataset: summarize_stages(dataset, SPEC),
        lambda dataset: contact_sheet(dataset, SPEC),
        lambda dataset: load_pairs(dataset, [Pair(0, 1, "success, same start")], horizon=5),
    ],
    ids=["signals", "outcomes", "stages", "picture of stages", "pairs"],
)
def test_stages_and_preferences_refuse_them(dataset, use):
    with pytest.raises(DatasetError, match="got episodes of real_robot without signals, expected those of a simulator"):
        use(dataset)
