import numpy as np
import pytest

from stare_jax.data.batches import imitation_batches
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import DatasetError
from stare_jax.data.writer import DatasetWriter

CACHES = pytest.mark.parametrize("cache_mib", [0, 64], ids=["from disk", "cached"])


def _tokenize(instructions, state):
    """Stands in for `Policy.tokenize`: the length of the instruction and the first state value in hundredths."""
    tokens = np.stack([np.array([len(text) for text in instructions]), (100 * state[:, 0]).astype(int)], axis=1)
    return tokens.astype(np.int32), np.ones(tokens.shape, bool)


@pytest.fixture
def demos(tmp_path, make_trajectory):
    """Ten episodes of three actions: frames 0, 1, 2, 4, 5, 6, ... can be imitated, thirty in all."""
    with DatasetWriter(tmp_path, env_id="X", episodes_per_shard=4) as writer:
        for i in range(10):
            writer.append(make_trajectory(i), instruction="push" if i < 5 else "pull it", seed=i, source="expert")
    return tmp_path


@pytest.fixture
def take(demos):
    def take(num_batches, **changes):
        arguments = {"batch_size": 4, "seed": 0, "cache_mib": 64} | changes
        batches = imitation_batches(Dataset(demos), _tokenize, **arguments)
        taken = [next(batches) for _ in range(num_batches)]
        batches.close()
        return taken

    return take


@CACHES
def test_a_batch_is_frames_with_their_prompts(take, make_trajectory, cache_mib):
    (batch,) = take(1, cache_mib=cache_mib)
    assert batch.observation.images["base_camera"].shape == (4, 8, 8, 3)
    assert batch.action.dtype == np.float32 and batch.observation.state.dtype == np.float32
    episodes = [make_trajectory(i) for i in range(10)]
    for b in range(4):
        (match,) = [(i, t) for i in range(10) for t in range(3) if (episodes[i].action[t] == batch.action[b]).all()]
        i, t = match
        observation = episodes[i].observation
        np.testing.assert_array_equal(batch.observation.images["base_camera"][b], observation.images["base_camera"][t])
        np.testing.assert_array_equal(batch.observation.state[b], observation.state[t])
        tokens, _ = _tokenize(["push" if i < 5 else "pull it"], observation.state[t : t + 1])
        np.testing.assert_array_equal(batch.observation.tokens[b], tokens[0])


def test_cache_changes_nothing(take, assert_same):
    assert_same(take(9, cache_mib=0), take(9, cache_mib=64))


@CACHES
def test_resuming_continues(take, assert_same, cache_mib):
    through = take(20, cache_mib=cache_mib)
    assert_same(take(7, cache_mib=cache_mib, start_step=13), through[13:])


def test_seed_decides_the_order(take, assert_same):
    assert_same(take(3), take(3))
    assert not np.array_equal(take(1)[0].action, take(1, seed=1)[0].action)


def test_an_epoch_goes_once_through_all_frames(take):
    # 15 batches of 4 are two epochs of 30 frames, the second in another order.
    actions = np.concatenate([batch.action for batch in take(15)])
    first, second = actions[:30], actions[30:]
    assert len(np.unique(first, axis=0)) == len(np.unique(second, axis=0)) == 30
    assert not np.array_equal(first, second)


def test_a_batch_may_be_larger_than_the_data_set(take):
    (batch,) = take(1, batch_size=64)
    assert batch.action.shape == (64, 7)


def test_policies_without_images(tmp_path, make_trajectory):
    trajectory = make_trajectory()
    trajectory = trajectory._replace(observation=trajectory.observation._replace(images={}))
    with DatasetWriter(tmp_path, env_id="X") as writer:
        writer.append(trajectory, instruction="push", seed=0, source="expert")
    batch = next(imitation_batches(Dataset(tmp_path), _tokenize, batch_size=2, seed=0))
    assert batch.observation.images == {} and batch.observation.state.shape == (2, 4)


def test_damage_in_the_background_reaches_the_caller(demos):
    dataset = Dataset(demos)
    for path in demos.glob("frames-*"):
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"frames-0000\d\.array_record is damaged"):
        next(imitation_batches(dataset, _tokenize, batch_size=2, seed=0, cache_mib=0))
