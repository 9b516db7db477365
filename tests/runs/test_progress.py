"""How far the runs of a study are, and how long the rest takes."""

import dataclasses
import json
import math

import pytest
import toy_run

from stare_jax.logging import make_writer
from stare_jax.runs.jobs import Queue, Record, record_file
from stare_jax.runs.progress import (
    Progress,
    in_hours,
    job_seconds_left,
    progress_table,
    read_progress,
    read_rows,
    seconds_of_kinds,
    summary_line,
)
from stare_jax.runs.study import Job

CONFIG = toy_run.make_config()
PPO = dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, num_iterations=10))


def write_iterations(directory, number):
    with make_writer(directory, tensorboard=False) as writer:
        for i in range(1, number + 1):
            writer(i, {"env/success": i / 10, "perf/env_steps_per_s": 100.0}, phase="ppo")


def test_progress_of_a_run_is_what_it_has_written(tmp_path):
    assert read_progress(tmp_path, PPO, "ppo")[0] == 0.0
    write_iterations(tmp_path, 7)
    # The last five iterations succeed in 3, 4, 5, 6 and 7 of 10 episodes.
    assert read_progress(tmp_path, PPO, "ppo") == pytest.approx(Progress(0.7, 0.5, 100.0))
    done, success, rate = read_progress(tmp_path, PPO, "tpo")  # the number of steps depends on the pairs
    assert math.isnan(done) and math.isnan(success) and math.isnan(rate)
    assert read_progress(tmp_path, CONFIG, "demos")[0] == 0.0


def test_progress_of_demonstrations_is_their_number(finished_run):
    more = dataclasses.replace(CONFIG, demos=dataclasses.replace(CONFIG.demos, num_demos=8))
    assert read_progress(finished_run, CONFIG, "demos")[0] == 1.0
    assert read_progress(finished_run, more, "demos")[0] == 0.5  # there are four


def test_time_that_is_left():
    job, known = Job("Push/ppo/seed_0", (), (), "ppo"), {"Push/ppo": 100.0, "Pull/sta_ppo": 60.0}
    # A quarter in 10 s: three more of them. From a half to three quarters in 10 s: one more.
    assert job_seconds_left(job, 0.25, known, elapsed=10.0) == pytest.approx(30.0)
    assert job_seconds_left(job, 0.75, known, elapsed=10.0, done_before=0.5) == pytest.approx(10.0)
    assert job_seconds_left(job, 0.0, known) == 100.0
    assert job_seconds_left(job, 0.0, known, elapsed=30.0) == 70.0  # it compiles
    assert job_seconds_left(job, 0.5, known, done_before=0.5) == 50.0
    other = Job("Push/sta_ppo/seed_0", (), (), "ppo")
    assert job_seconds_left(other, 0.0, known) == 60.0  # as on another task
    assert math.isnan(job_seconds_left(Job("Push/ipi/seed_0", (), (), "ppo"), 0.0, known))


@pytest.fixture
def queue(tmp_path):
    """A study of four runs: one finished in 80 s, one that has done 3 of 10, one failed, one that waits."""
    jobs = [Job(f"Push/ppo/seed_{seed}", (str(seed),), (), "ppo") for seed in range(4)]
    records = [
        Record(("0",), 0, 1, 0.0, done_before=0.2, seconds=80.0, exit_code=0),
        None,
        Record(("2",), 0, 1, 0.0, seconds=5.0, exit_code=1),
        None,
    ]
    for job, record in zip(jobs, records, strict=True):
        if record is not None:
            record_file(tmp_path, job).parent.mkdir(parents=True, exist_ok=True)
            record_file(tmp_path, job).write_text(json.dumps(record._asdict()))
    write_iterations(tmp_path / jobs[1].name, 3)
    queue = Queue(jobs, tmp_path, ["true"], [(0,)])
    queue.states[jobs[2].name] = "failed"
    return queue


def test_rows_and_line_of_a_study(queue):
    assert seconds_of_kinds(queue.folder, queue.jobs) == {"Push/ppo": pytest.approx(100.0)}  # 0.8 of it in 80 s
    rows = read_rows(queue, {job.name: PPO for job in queue.jobs})
    assert [row.left for row in rows] == pytest.approx([0.0, 70.0, 0.0, 100.0])
    line = summary_line("x", rows, num_places=1)
    assert line == "x: 1 of 4 runs finished, 1 failed, about 2:50 min left"
    assert "about 1:25 min left" in summary_line("x", rows, num_places=2)
    header, cells = progress_table(rows, everything=True)
    assert header[:4] == ("run", "state", "done", "success") and len(cells) == 4
    assert cells[0][:3] == ("Push/ppo/seed_0", "finished", "100 %")
    assert cells[1] == ("Push/ppo/seed_1", "waiting", "30 %", "20 %", "100", "0:00 min", "1:10 min")
    assert [row[0] for row in progress_table(rows)[1]] == ["Push/ppo/seed_2"]


def test_hours_and_minutes():
    assert [in_hours(seconds) for seconds in (0, 59.6, 3599, 3600, 36_061, math.nan)] == [
        "0:00 min",
        "1:00 min",
        "59:59 min",
        "1:00 h",
        "10:01 h",
        "–",
    ]
