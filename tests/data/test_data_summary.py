import numpy as np
import pytest

from stare_jax.data.reader import Dataset
from stare_jax.data.summary import contact_sheet, summarize_stages
from stare_jax.data.writer import DatasetWriter
from stare_jax.stages import get_task

SPEC = get_task("PushCube-v1")


@pytest.fixture
def write(tmp_path, make_trajectory):
    def write(*episodes, **arguments):
        with DatasetWriter(tmp_path, env_id="PushCube-v1") as writer:
            for seed, episode in enumerate(episodes):
                writer.append(
                    make_trajectory(seed, **episode, **arguments), instruction="push", seed=0, source="expert"
                )
        return Dataset(tmp_path)

    return write


def test_stages_by_hand(write):
    # The gripper is 10 m from the object in x, y and z all along: reaching costs 10 * sqrt(3) wherever it is labelled.
    # First episode, states 0 .. 3: reach until the contact at 2, then push until success at 3, which ends all.
    # Second episode, states 0 .. 4: reach, reach, reach, reach, reach.
    dataset = write({"length": 3, "contact_at": 2}, {"length": 4, "success": False})
    reach, contact, push, goal = summarize_stages(dataset, SPEC)
    assert [stage.name for stage in (reach, contact, push, goal)] == list(SPEC.stage_names)
    assert [stage.completed for stage in (reach, contact, push, goal)] == [0.5, 0.5, 0.5, 0.5]
    assert (reach.num_steps, reach.skipped) == ((2 + 5) / 2, 0.0)
    np.testing.assert_allclose(reach.cost, 10 * np.sqrt(3), rtol=1e-5)
    # Contact ends in the state in which it begins, so that no state is labelled with it.
    assert contact.skipped == 1.0 and np.isnan(contact.num_steps) and np.isnan(contact.cost)
    assert (push.num_steps, push.skipped) == (1.0, 0.5)
    assert (goal.num_steps, goal.skipped) == (1.0, 0.5)


def test_contact_sheet_has_a_row_an_episode(write):
    dataset = write({"length": 3}, {"length": 5}, {"length": 2, "success": False}, size=16)
    sheet = np.asarray(contact_sheet(dataset, SPEC, num_episodes=2, num_columns=4))
    assert sheet.shape == (2 * 142, 4 * 128, 3)
    # The first tile is the first frame of the first episode, each pixel eight times as large.
    first = dataset.frame(0)["images"]["base_camera"]
    np.testing.assert_array_equal(sheet[:128, :128], first.repeat(8, axis=0).repeat(8, axis=1))
    # Rows are spread: the second is of the last episode, whose three states leave the last column empty.
    last = dataset.frame(int(dataset.first_frame[2]))["images"]["base_camera"]
    np.testing.assert_array_equal(sheet[142:270:8, :128:8], last)
    assert (sheet[142:270, 384:] == 255).all()


@pytest.mark.parametrize(("shape", "height"), [((96, 256), 48), ((1, 2000), 1)])
def test_contact_sheet_of_large_and_oblong_images(tmp_path, make_trajectory, shape, height):
    trajectory = make_trajectory(length=2)
    images = {"front": np.zeros((6, *shape, 3), np.uint8)}
    with DatasetWriter(tmp_path, env_id="PushCube-v1") as writer:
        writer.append(
            trajectory._replace(observation=trajectory.observation._replace(images=images)),
            instruction="push",
            seed=0,
            source="expert",
        )
    sheet = np.asarray(contact_sheet(Dataset(tmp_path), SPEC))
    assert sheet.shape == (height + 14, 8 * 128, 3)
    assert (sheet[:height, :128] == 0).all() and sheet[height:].mean() > 200


def test_contact_sheet_needs_images(tmp_path, make_trajectory):
    trajectory = make_trajectory()
    with DatasetWriter(tmp_path, env_id="PushCube-v1") as writer:
        writer.append(
            trajectory._replace(observation=trajectory.observation._replace(images={})),
            instruction="push",
            seed=0,
            source="expert",
        )
    with pytest.raises(ValueError, match="got no camera"):
        contact_sheet(Dataset(tmp_path), SPEC)
