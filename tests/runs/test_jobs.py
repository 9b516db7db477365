"""The queue of a study on small processes: order, places, failures, and a study that was killed."""

import json
import os
import sys
import time

import pytest

from stare_jax.config import UserError
from stare_jax.logging import Interrupted
from stare_jax.runs.jobs import (
    Queue,
    Record,
    is_locked,
    last_lines_of,
    log_file,
    place_cores,
    read_attempt,
    record_file,
    run_queue,
)
from stare_jax.runs.progress import failure_texts
from stare_jax.runs.study import Job

CORES = sorted(os.sched_getaffinity(0))
SCRIPT = """
import json, os, signal, sys, time
what, file = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
with open(file, "a") as told:
    print(json.dumps([what, sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"], os.nice(0)]), file=told)
print("working on", what)
if what == "fail":
    print("something", "is wrong", sep="\\n", file=sys.stderr)
    sys.exit(3)
if what.startswith("wait"):
    while not os.path.exists(what.split()[1]):
        time.sleep(0.01)
"""


@pytest.fixture
def make_queue(tmp_path):
    """make_queue((name, what, *after), ..., places=...) -> Queue of processes that write what they see."""
    queues = []

    def make(*rows, places=((CORES[0],),), **options):
        jobs = [Job(name, (what, str(tmp_path / "told")), tuple(after), "ppo") for name, what, *after in rows]
        queues.append(Queue(jobs, tmp_path / "study", [sys.executable, "-c", SCRIPT], places, **options))
        return queues[-1]

    yield make
    for queue in queues:
        queue.kill()


def run(queue, **options):
    states = []
    options = {"should_stop": lambda: False, "poll_s": 0.02} | options
    run_queue(queue, on_change=lambda: states.append(dict(queue.states)), **options)
    return states


def told(tmp_path):
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_run_after_those_that_they_begin_with(make_queue, tmp_path):
    queue = make_queue(("t/a/0", "a"), ("t/b/0", "b", "t/a/0"), ("t/c/0", "c", "t/b/0"), places=[(CORES[0],)] * 3)
    states = run(queue)
    assert [what for what, *_ in told(tmp_path)] == ["a", "b", "c"]
    assert all(sum(state == "running" for state in each.values()) <= 1 for each in states)
    assert set(queue.states.values()) == {"finished"}


def test_a_place_has_one_process_on_its_own_cores_at_a_lower_priority(make_queue, tmp_path):
    rows = [(f"t/m/{number}", f"wait {tmp_path / 'go'}") for number in range(4)]
    places = [(core,) for core in CORES[:2]]
    queue = make_queue(*rows, places=places, nice=3)
    for _ in range(5):
        queue.step()
        assert list(queue.states.values()).count("running") == len(places)
    wait_for(lambda: (tmp_path / "told").exists() and len(told(tmp_path)) == len(places))
    (tmp_path / "go").touch()
    run(queue)
    assert {tuple(cores) for _, cores, *_ in told(tmp_path)} == set(places)
    assert {(threads, nice) for *_, threads, nice in told(tmp_path)} == {("1", min(19, os.nice(0) + 3))}


def test_what_is_finished_is_not_done_again_unless_its_arguments_change(make_queue, tmp_path):
    run(make_queue(("t/a/0", "a"), ("t/b/0", "b")))
    assert make_queue(("t/a/0", "a"), ("t/b/0", "b")).is_over
    run(make_queue(("t/a/0", "a"), ("t/b/0", "longer b", "t/a/0")))
    assert [what for what, *_ in told(tmp_path)] == ["a", "b", "longer b"]


def test_a_failure_stops_what_depends_on_it_and_nothing_else(make_queue, tmp_path):
    rows = ("t/a/0", "fail"), ("t/b/0", "b", "t/a/0"), ("t/c/0", "c", "t/b/0"), ("t/d/0", "d")
    queue = make_queue(*rows)
    run(queue)
    assert queue.states == {"t/a/0": "failed", "t/b/0": "blocked", "t/c/0": "blocked", "t/d/0": "finished"}
    (text,) = failure_texts(queue, num_lines=2)
    assert text.splitlines()[0].startswith("t/a/0 ended with 3; ") and text.endswith("something\n    is wrong")
    again = make_queue(*rows)  # a failure is tried again
    assert [again.states[name] for name, *_ in rows] == ["waiting", "waiting", "waiting", "finished"]


def test_a_stop_lets_processes_save_and_the_next_study_goes_on(make_queue, tmp_path):
    rows = ("t/a/0", f"wait {tmp_path / 'never'}"), ("t/b/0", "b", "t/a/0")
    queue = make_queue(*rows)
    with pytest.raises(Interrupted, match="stopped after 0 of 2 runs"):
        run(queue, should_stop=lambda: (tmp_path / "told").exists())
    assert read_attempt(queue.folder, queue.jobs[0]).exit_code == 130
    assert not is_locked(log_file(queue.folder, queue.jobs[0]))
    assert set(make_queue(*rows).states.values()) == {"waiting"}


def test_an_error_of_the_study_leaves_no_process(make_queue, tmp_path):
    queue = make_queue(("t/a/0", f"wait {tmp_path / 'never'}"))
    with pytest.raises(RuntimeError, match="broken"):
        run_queue(queue, on_change=lambda: (_ for _ in ()).throw(RuntimeError("broken")), should_stop=lambda: False)
    assert not is_locked(log_file(queue.folder, queue.jobs[0]))


def test_processes_that_a_killed_study_has_left_keep_their_place_until_they_end(make_queue, tmp_path):
    rows = ("t/a/0", f"wait {tmp_path / 'go'}"), ("t/b/0", "b")
    first = make_queue(*rows)
    first.step()
    (attempt,) = first.attempts.values()
    wait_for((tmp_path / "told").exists)

    second = make_queue(*rows)  # of a study that has begun after the first was killed
    second.step()
    assert second.states == {"t/a/0": "elsewhere", "t/b/0": "waiting"} and not second.attempts
    (tmp_path / "go").touch()
    assert attempt.process.wait() == 0
    run(second)
    assert set(second.states.values()) == {"finished"}
    assert [what for what, *_ in told(tmp_path)] == [rows[0][1], rows[0][1], "b"]


def test_a_study_that_is_killed_while_it_starts_a_process_leaves_a_job_that_waits(make_queue):
    queue = make_queue(("t/a/0", "a"))
    file = record_file(queue.folder, queue.jobs[0])
    file.parent.mkdir(parents=True)
    record = {"arguments": list(queue.jobs[0].arguments), "slot": 0, "pid": 0, "started": 1.0}
    file.write_text(json.dumps(record))
    assert queue.look() == set() and queue.states == {"t/a/0": "waiting"}
    run(queue)
    assert queue.states == {"t/a/0": "finished"}


def test_cores_are_dealt_out():
    assert place_cores([0, 1, 2, 3, 4], None, 2) == [(0, 1), (2, 3)]
    assert place_cores([3, 5], 1, 1) == [(3,)]
    with pytest.raises(ValueError, match="jobs: got 3 of 2 cores, expected 1 to 2 on the 5 cores"):
        place_cores([0, 1, 2, 3, 4], 3, 2)


def test_the_end_of_a_log_is_what_a_terminal_would_show(tmp_path):
    (tmp_path / "log").write_bytes(b"first\n10 %\r20 %\rdone\n\nerror: x\n")
    assert last_lines_of(tmp_path / "log", 2) == ["done", "error: x"]
    assert last_lines_of(tmp_path / "none", 2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": None}, "seconds: got null and exit_code 0, expected both or neither"),
        ({"seconds": -1.0}, "seconds: got -1.0, expected greater than or equal to 0"),
        ({"done_before": 2.0}, r"done_before: got 2.0, expected less than or equal to 1"),
        ({"slot": -1}, "slot: got -1, expected greater than or equal to 0"),
        ({"arguments": "a"}, "arguments: got 'a', expected a list"),
    ],
)
def test_a_damaged_record_of_a_job_is_named(tmp_path, changes, message):
    job, record = Job("t/a/0", ("a",), (), "ppo"), Record(("a",), 0, 1, 0.0, seconds=2.0, exit_code=0)
    record_file(tmp_path, job).parent.mkdir(parents=True)
    record_file(tmp_path, job).write_text(json.dumps(record._asdict() | changes))
    with pytest.raises(UserError, match=f"t/a/0.json: {message}"):
        Queue((job,), tmp_path, (), ())
