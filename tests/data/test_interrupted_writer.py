"""A writer that is stopped, anywhere, leaves a data set that can be read and continued."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from stare_jax.data import schema
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import DatasetError
from stare_jax.data.writer import DatasetWriter

META = {"instruction": "push the cube", "source": "expert"}


@pytest.fixture
def open_writer(tmp_path):
    def open_writer(**changes):
        return DatasetWriter(tmp_path, **{"env_id": "PushCube-v1", "episodes_per_shard": 2} | changes)

    return open_writer


def _seeds(directory):
    return [episode.seed for episode in Dataset(directory).episodes]


def test_reopening_appends(tmp_path, open_writer, make_trajectory, assert_same):
    for first in (0, 3):
        with open_writer() as writer:
            for seed in range(first, first + 3):
                writer.append(make_trajectory(seed), seed=seed, **META)
    dataset = Dataset(tmp_path)
    assert _seeds(tmp_path) == [0, 1, 2, 3, 4, 5]
    # Shards of 2, 1, 2, 1 episodes: a new writer begins a shard of its own.
    assert [shard.episodes.num_records for shard in dataset.manifest.shards] == [2, 1, 2, 1]
    assert dataset.frame(int(dataset.first_frame[4]))["episode"] == 4
    for seed in range(6):
        assert_same(dataset.episode(seed, horizon=5)[0], make_trajectory(seed))


def test_flush_makes_episodes_and_progress_visible_together(tmp_path, open_writer, make_trajectory):
    with open_writer(episodes_per_shard=None) as writer:
        writer.append(make_trajectory(), seed=0, **META)
        assert _seeds(tmp_path) == [] and writer.manifest.episodes == ()
        writer.flush(progress={"num_attempts": 5})
        assert _seeds(tmp_path) == [0]
        assert schema.read_manifest(tmp_path).progress == {"num_attempts": 5}
        writer.flush()
        assert len(schema.read_manifest(tmp_path).shards) == 1


def test_an_exception_drops_the_open_shard(tmp_path, open_writer, make_trajectory, caplog):
    with pytest.raises(ZeroDivisionError), open_writer() as writer:
        for seed in range(3):
            writer.append(make_trajectory(seed), seed=seed, **META)
        1 / 0  # noqa: B018
    assert _seeds(tmp_path) == [0, 1]
    assert not list(tmp_path.glob("*.partial"))
    with caplog.at_level(logging.WARNING):
        open_writer().close()
    assert not caplog.records


def test_killed_between_shard_and_manifest(tmp_path, open_writer, make_trajectory, monkeypatch, caplog):
    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    writer = open_writer()
    for seed in range(3):
        writer.append(make_trajectory(seed), seed=seed, **META)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "write_manifest", die)
        with pytest.raises(Killed):
            writer.append(make_trajectory(3), seed=3, **META)
    os.close(writer._lock)  # as the system does when a process dies
    assert (tmp_path / "frames-00001.array_record").exists()
    assert _seeds(tmp_path) == [0, 1]
    names = ("frames-00001.array_record", "episodes-00001.array_record")
    unlisted = {name: (tmp_path / name).read_bytes() for name in names}
    mine = (
        "film.mp4.partial",
        "my.array_record.partial",
        "manifest.json.12.partial",
        "frames-00002.array_record.partial",
    )
    for name in mine:
        (tmp_path / name).write_text("")

    with caplog.at_level(logging.WARNING), open_writer() as writer:
        assert "the manifest does not name episodes-00001.array_record, frames-00001.array_record" in caplog.text
        # What was finished is not deleted: the manifest may be the older one. Nor is what has another name.
        for name, content in unlisted.items():
            assert (tmp_path / "set_aside" / "1" / name).read_bytes() == content
        assert [(tmp_path / name).exists() for name in mine] == [True, True, False, False]
        for seed in (2, 3):
            writer.append(make_trajectory(seed + 10), seed=seed, **META)
    assert _seeds(tmp_path) == [0, 1, 2, 3]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from made_trajectories import make_trajectory
from stare_jax.data.writer import DatasetWriter

with DatasetWriter(sys.argv[2], env_id="PushCube-v1", episodes_per_shard=2) as writer:
    seed = len(writer.manifest.episodes)
    while True:
        writer.append(make_trajectory(seed, size=32), instruction="push the cube", seed=seed, source="expert")
        seed += 1
"""


def test_kill_9_of_a_process_that_writes(tmp_path, open_writer, make_trajectory, assert_same, caplog):
    here, data = os.path.dirname(__file__), tmp_path / "data"
    root = os.path.dirname(os.path.dirname(here))
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    for num_wanted in (4, 20):
        child = subprocess.Popen([sys.executable, "-c", CHILD, here, str(data)], env=environment)
        try:
            deadline = time.monotonic() + 60
            while not (data / f"episodes-{num_wanted // 2:05d}.array_record").exists():
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    episodes = Dataset(data).episodes
    assert len(episodes) >= 20 and len(episodes) % 2 == 0
    with caplog.at_level(logging.WARNING), DatasetWriter(data, env_id="PushCube-v1") as writer:
        writer.append(make_trajectory(999, size=32), seed=999, **META)
    dataset = Dataset(data)
    assert [episode.seed for episode in dataset.episodes] == [*range(len(episodes)), 999]
    assert_same(dataset.episode(19, horizon=5)[0], make_trajectory(19, size=32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "PullCube-v1"}, "its env_id is 'PushCube-v1', not 'PullCube-v1'"),
        ({"control_mode": "pd_joint_pos"}, "its control_mode is '', not 'pd_joint_pos'"),
        ({"settings": {"seed": 1}}, "its settings.seed is 0, not 1"),
        ({"settings": {"seed": 0, "jitter": "none"}}, "its settings.jitter is None, not 'none'"),
        ({"settings": {}}, "its settings.seed is 0, not None"),
        ({"filters": {"idle": {}}}, "its filters.idle is None, not {}"),
    ],
)
def test_other_data_are_not_appended(open_writer, changes, message):
    open_writer(settings={"seed": 0}).close()
    with pytest.raises(DatasetError, match=message):
        open_writer(**{"settings": {"seed": 0}} | changes)


def test_two_writers_are_one_too_many(open_writer):
    with open_writer(), pytest.raises(DatasetError, match="another process is writing"):
        open_writer()
    open_writer().close()


def test_shard_size_has_to_be_positive(open_writer):
    with pytest.raises(ValueError, match="episodes_per_shard: got 0, expected at least 1"):
        open_writer(episodes_per_shard=0)
