import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from stare_jax.envs import EnvConfig, SimulatorError, make_expert, make_vec_env
from stare_jax.envs.maniskill.perturbations import episode_instruction
from stare_jax.envs.maniskill.simulator import Frame
from stare_jax.envs.pool import fork_server, workers
from stare_jax.envs.pool.worker import _check_finite, _serve, map_slots, read_answer, shared_size
from stare_jax.envs.pool.workers import SimulatorPool
from stare_jax.stages import get_task
from stare_jax.types import SIGNAL_SHAPES, Signals


@pytest.fixture(scope="module")
def pool():
    """Two processes of two simulators without images, quick to restart."""
    config = EnvConfig(envs_per_worker=2, image_size=None, use_state="tcp", worker_timeout_s=5.0)
    with contextlib.closing(make_vec_env(config)) as pool:
        yield pool


@pytest.fixture(scope="module")
def rendering_pool(vulkan_driver):
    with contextlib.closing(make_vec_env(EnvConfig(envs_per_worker=2, image_size=64))) as pool:
        yield pool


def leaves(step):
    return [*step.observation.images.values(), step.observation.state, *step.signals]


def expert_actions(signals):
    act = make_expert("PushCube-v1").act
    rows = range(len(signals.success))
    return np.stack([act(type(signals)(*(leaf[i] for leaf in signals)), None)[0] for i in rows])


def is_gone(pid):
    """Says whether a process has ended, waiting for it a while."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_shapes_and_instructions(pool):
    state = pool.reset([0, 1, 2, 3])
    assert (pool.env_id, pool.num_envs, pool.horizon, pool.action_dim) == ("PushCube-v1", 4, 30, 7)
    assert tuple(pool.instructions) == (get_task("PushCube-v1").instruction,) * 4
    assert state.alive.tolist() == [True] * 4
    assert state.observation.images == {}
    np.testing.assert_array_equal(state.observation.state, state.signals.tcp_pos)
    assert state.observation.tokens.shape == state.observation.token_mask.shape == (4, 0)
    assert state.signals.obj_quat.shape == (4, 4) and state.signals.success.shape == (4,)


def test_the_words_of_an_episode_are_those_of_its_seed(pool, monkeypatch):
    monkeypatch.setattr(pool, "config", dataclasses.replace(pool.config, perturbation="semantics/words"))
    spec = get_task("PushCube-v1")
    pool.reset([0, 1, 2, 3])
    pool.step(np.zeros((4, 7), np.float32), {1: 40})
    assert pool.instructions == [episode_instruction("semantics/words", spec, seed) for seed in (0, 40, 2, 3)]
    monkeypatch.undo()
    pool.reset([0, 1, 2, 3])
    assert pool.instructions == [spec.instruction] * 4


def test_steps_are_those_of_a_simulator_of_ones_own(pool, simulators):
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 4, 7)).astype(np.float32)
    states = [pool.reset([11, 12, 13, 14], reproducible=True)] + [pool.step(action) for action in actions]
    for i in range(4):
        alone = simulators("PushCube-v1")
        frames = [alone.reset(11 + i, reproducible=True)] + [alone.step(action[i]) for action in actions]
        for state, frame in zip(states, frames, strict=True):
            for ours, expected in zip(state.signals, frame.signals, strict=True):
                np.testing.assert_array_equal(ours[i], expected)


def test_environments_are_reset_one_by_one_in_a_step(pool):
    before = pool.reset([20, 21, 22, 23])
    after = pool.step(np.full((4, 7), 0.5, np.float32), {1: 24, 3: 25})
    fresh = pool.reset([20, 24, 22, 25])
    for row, is_reset in enumerate([False, True, False, True]):
        assert np.array_equal(after.signals.tcp_pos[row], fresh.signals.tcp_pos[row]) == is_reset
        np.testing.assert_allclose(after.signals.obj_pos[row], fresh.signals.obj_pos[row], atol=1e-4)
        assert not np.array_equal(after.signals.tcp_pos[row], before.signals.tcp_pos[row])


def test_idle_environments_stay_as_they_are(pool):
    before = pool.reset([40, 41, 42, 43])
    is_idle = np.array([False, True, True, True])
    pool._workers[1].process.send_signal(signal.SIGSTOP)  # that of the last two, which is not even asked
    try:
        after = pool.step(np.full((4, 7), 0.5, np.float32), is_idle=is_idle)
    finally:
        pool._workers[1].process.send_signal(signal.SIGCONT)
    assert after.alive.all()
    is_same = np.isclose(after.signals.tcp_pos, before.signals.tcp_pos, rtol=0, atol=0).all(axis=-1)
    np.testing.assert_array_equal(is_same, is_idle)
    # A reset begins an episode whether an environment was idle or not; the others go on from where they rest.
    later = pool.step(np.full((4, 7), 0.5, np.float32), {1: 44}, is_idle=np.array([True, True, False, False]))
    assert later.alive.all()
    np.testing.assert_array_equal(later.signals.tcp_pos[0], after.signals.tcp_pos[0])
    moved = np.linalg.norm(later.signals.tcp_pos - after.signals.tcp_pos, axis=-1)
    assert moved[0] == 0 and (moved[2:] > 1e-3).all()
    fresh = pool.reset([40, 44, 42, 43])
    np.testing.assert_allclose(later.signals.obj_pos[1], fresh.signals.obj_pos[1], atol=1e-4)


def test_a_step_can_be_taken_in_two_parts(pool):
    action = np.full((4, 7), 0.5, np.float32)
    pool.reset([40, 41, 42, 43], reproducible=True)
    expected = pool.step(action, {1: 44}, reproducible=True)
    pool.reset([40, 41, 42, 43], reproducible=True)
    pool._workers[1].process.send_signal(signal.SIGSTOP)
    try:
        pool.send(action, {1: 44}, reproducible=True)  # does not wait for the simulators
        with pytest.raises(RuntimeError, match="send: got a second call, expected `receive` after the first"):
            pool.send(action)
    finally:
        pool._workers[1].process.send_signal(signal.SIGCONT)
    for ours, theirs in zip(leaves(pool.receive()), leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(RuntimeError, match="receive: got nothing that was sent, expected `send` before it"):
        pool.receive()
    pool.send(action)  # States that nobody has received do not get in the way of a reset.
    for ours, theirs in zip(leaves(pool.reset([1, 2, 3, 4])), leaves(pool.reset([1, 2, 3, 4])), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_call_that_was_interrupted_does_not_get_in_the_way_of_a_reset(pool, monkeypatch):
    receive, calls = workers._receive, []

    def interrupted(connection):
        calls.append(connection)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return receive(connection)

    pool.reset([1, 2, 3, 4])
    monkeypatch.setattr(workers, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.step(np.full((4, 7), 0.5, np.float32))
    monkeypatch.undo()
    assert pool.reset([1, 2, 3, 4]).alive.all()
    # No answer is left over, which the next call would take for its own.
    assert not any(each.connection.poll(0.2) for each in pool._workers)


class Counted:
    """A simulator that writes down its resets."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def reset(self, seed, *, reproducible=False):
        self.log.append((self.name, seed, reproducible))
        if seed == 13 and self.name == "b":
            raise ValueError("unlucky")
        return self.step(None, tcp=seed)

    def step(self, action, *, is_drawn=True, tcp=0):
        signals = {name: np.zeros(shape, np.float32) for name, shape in SIGNAL_SHAPES._asdict().items()}
        return Frame(None, np.zeros(0, np.float32), Signals(**signals | {"tcp_pos": np.full(3, tcp)}))


def test_a_spare_simulator_takes_the_place_of_one_that_would_have_to_be_reset():
    log = []
    config = EnvConfig(num_workers=1, envs_per_worker=2, image_size=0)
    slots = map_slots(config, bytearray(shared_size(config)))
    ours, theirs = multiprocessing.Pipe()
    arguments = theirs, [Counted("a", log), Counted("b", log)], Counted("spare", log), slots, 0
    thread = threading.Thread(target=_serve, args=arguments)
    thread.start()

    def tell(message):
        ours.send_bytes(message)
        lost = read_answer(ours.recv_bytes())
        return lost, slots.signals.tcp_pos[:, 0].tolist()

    assert tell(b"r1 r2 -") == ({}, [1, 2])
    assert tell(b"s s r5") == ({}, [0, 0])
    assert tell(b"s s r5") == ({}, [0, 0])
    assert tell(b"s r5 -") == ({}, [0, 5])
    assert log == [("a", 1, False), ("b", 2, False), ("spare", 5, False)]
    # The one whose place was taken is the spare now. Where it raises, no episode is lost, and its scene is rebuilt.
    log.clear()
    assert tell(b"s s r13") == ({}, [0, 0])
    assert tell(b"r13 s r13") == ({}, [13, 0])
    assert tell(b"s s r8") == ({}, [0, 0])
    assert tell(b"r8 s -") == ({}, [8, 0])
    assert log == [("b", 13, False), ("a", 13, False), ("b", 8, True)]
    # A reproducible beginning serves whoever asks for its seed, and is not begun again; a plain one serves no more.
    log.clear()
    assert tell(b"s s R20") == ({}, [0, 0])
    assert tell(b"s s r20") == ({}, [0, 0])
    assert tell(b"r20 s r21") == ({}, [20, 0])
    assert tell(b"s R21 -") == ({}, [0, 21])
    assert [(seed, reproducible) for _, seed, reproducible in log] == [(20, True), (21, False), (21, True)]
    ours.send_bytes(b"c")
    thread.join(10)
    assert not thread.is_alive()


def test_a_pool_with_spare_simulators_begins_the_same_episodes():
    config = EnvConfig(num_workers=1, envs_per_worker=2, image_size=None, use_state="tcp", has_spares=True)
    with contextlib.closing(make_vec_env(config)) as pool:
        assert pool.spare_of_env.tolist() == [0, 0]
        action, still = np.full((2, 7), 0.5, np.float32), np.zeros((2, 7), np.float32)
        fresh = pool.reset([1, 5])
        pool.reset([1, 2])
        pool.step(action, next_seeds={0: 5})
        state = pool.step(action, {1: 5}, next_seeds={0: 6})
        later = pool.step(still)
    assert state.alive.all() and later.alive.all()
    np.testing.assert_allclose(state.signals.obj_pos[1], fresh.signals.obj_pos[1], atol=1e-4)
    np.testing.assert_allclose(state.signals.tcp_pos[1], fresh.signals.tcp_pos[1], atol=1e-4)
    np.testing.assert_allclose(later.signals.tcp_pos[1], fresh.signals.tcp_pos[1], atol=1e-3)


def test_a_step_in_chunks_draws_what_is_looked_at(rendering_pool):
    action = np.full((4, 7), 0.5, np.float32)
    before = rendering_pool.reset([1, 2, 3, 4], reproducible=True)
    seen = rendering_pool.step(action, {3: 5}, is_drawn=np.array([True, False, True, False]), reproducible=True)
    rendering_pool.reset([1, 2, 3, 4], reproducible=True)
    every = rendering_pool.step(action, {3: 5}, reproducible=True)
    for ours, theirs in zip(seen.signals, every.signals, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (old,), (some,), (all_,) = (state.observation.images.values() for state in (before, seen, every))
    np.testing.assert_array_equal(some[[0, 2, 3]], all_[[0, 2, 3]])
    np.testing.assert_array_equal(some[1], old[1])
    assert (all_[1] != old[1]).any()


def test_an_idle_environment_is_lost_with_its_process(pool):
    pool.reset([40, 41, 42, 43])
    pool._workers[1].process.kill()
    is_idle = np.array([False, False, False, True])
    assert pool.step(np.zeros((4, 7)), is_idle=is_idle).alive.tolist() == [True, True, False, False]
    assert pool.step(np.zeros((4, 7)), is_idle=is_idle).alive.tolist() == [True, True, False, False]
    assert pool.reset([40, 41, 42, 43]).alive.all()


def test_results_are_owned_by_the_caller(pool):
    state = pool.reset([30, 31, 32, 33])
    kept = [leaf.copy() for leaf in leaves(state)]
    pool.step(np.ones((4, 7), np.float32))
    for leaf, copy in zip(leaves(state), kept, strict=True):
        np.testing.assert_array_equal(leaf, copy)


def test_calls_are_checked(pool):
    pool.reset([0, 1, 2, 3])
    with pytest.raises(ValueError, match="seeds: got 1, expected one for each of 4"):
        pool.reset([0])
    with pytest.raises(ValueError, match=r"action: got shape \(4, 6\), expected \(4, 7\)"):
        pool.step(np.zeros((4, 6)))
    with pytest.raises(ValueError, match="action: got .*nan.*, expected finite"):
        pool.step(np.full((4, 7), np.nan))
    with pytest.raises(ValueError, match="reset_seeds: got \\[4\\], expected indices below 4"):
        pool.step(np.zeros((4, 7)), {4: 0})


def test_interrupts_are_the_parents_affair(pool):
    pool.reset([0, 1, 2, 3])
    for each in pool._workers:
        each.process.send_signal(signal.SIGINT)
        each.process.send_signal(signal.SIGTERM)
    assert pool.step(np.zeros((4, 7))).alive.all()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_a_lost_worker_is_restarted_and_the_others_go_on(number, pool):
    pool.reset([40, 41, 42, 43])
    losses, lost = pool.num_losses, pool._workers[1].process
    lost.send_signal(number)
    state = pool.step(np.full((4, 7), 0.3))
    assert state.alive.tolist() == [True, True, False, False]
    assert pool.num_losses == losses + 1
    assert is_gone(lost.pid)
    # Not reset, it stays out of the way.
    assert pool.step(np.zeros((4, 7))).alive.tolist() == [True, True, False, False]
    # A call that asks the lost ones alone waits for them.
    pool._needs_reset[:2] = True
    assert pool.step(np.zeros((4, 7)), {2: 42}).alive.tolist() == [False, False, True, False]
    state = pool.step(np.zeros((4, 7)), {0: 40, 1: 41, 3: 43})
    assert state.alive.all()
    for _ in range(20):
        state = pool.step(expert_actions(state.signals))
    assert state.signals.success.all()


@pytest.mark.slow
def test_the_process_that_forks_workers_is_replaced_when_it_is_lost(pool):
    pool.reset([0, 1, 2, 3])
    orphan, server = pool._workers[0].process, fork_server._servers[-1].process
    server.kill()
    server.wait()
    assert pool.step(np.zeros((4, 7))).alive.all()  # What it has forked goes on,
    orphan.send_signal(signal.SIGSTOP)  # and can be ended although nobody tells any more that it has.
    assert pool.step(np.zeros((4, 7))).alive.tolist() == [False, False, True, True]
    assert is_gone(orphan.pid) and orphan.exit_status() is None
    assert pool.reset([0, 1, 2, 3]).alive.all()
    assert fork_server._servers[-1].process.poll() is None


def test_it_is_told_how_a_worker_ended(pool):
    process = pool._workers[0].process  # begun by a server that lives
    assert process.exit_status() is None
    process.kill()
    process.wait(10.0)
    assert process.exit_status() == -signal.SIGKILL
    process.kill()  # does nothing
    assert pool.reset([0, 1, 2, 3]).alive.tolist() == [False, False, True, True]
    assert pool.reset([0, 1, 2, 3]).alive.all()


def test_a_server_that_is_silent_or_ends_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(fork_server, "_servers", [])
    for code, timeout_s, expected in (
        ("import time; time.sleep(60)", 0.5, "silent after 0.5 s"),
        ("raise SystemExit(3)", 60.0, "status 3"),  # a busy machine needs seconds to start Python
    ):
        monkeypatch.setattr(fork_server, "_SERVER", code)
        with pytest.raises(SimulatorError, match=f"(?s)PushCube-v1 did not start: .*{expected}.*doctor.py"):
            SimulatorPool(EnvConfig(num_workers=1, image_size=None, start_timeout_s=timeout_s))
    fork_server._end_servers()


def test_losing_workers_for_ever_is_an_error(pool):
    """The last test of this pool: the process that it kills stays lost."""
    pool.reset([0, 1, 2, 3])
    pool.num_losses = pool.config.max_restarts
    pool._workers[0].process.kill()
    with pytest.raises(SimulatorError, match="(?s)max_restarts: .* lost 101 times, expected at most 100.*doctor.py"):
        pool.step(np.zeros((4, 7)))


# ---- Simulators that fail --------------------------------------------------------------------------------------------

FAILING_TASK = """
from pathlib import Path

import numpy as np

from stare_jax.envs import load_task

HERE = Path(__file__).parent
TASK = load_task("PushCube-v1")


def read_grasp_point(obj_pos, obj_quat, tcp_pos):
    if (HERE / "diverge").exists():
        return np.full_like(obj_pos, np.nan)
    if (HERE / "fail always").exists():
        raise RuntimeError("this is to fail always")
    try:
        (HERE / "fail once").unlink()  # by one of those that try
    except FileNotFoundError:
        return obj_pos
    raise RuntimeError("this is to fail once")


TASK = TASK._replace(scene=TASK.scene._replace(grasp_point=read_grasp_point))
"""


def test_a_state_that_is_not_finite_is_as_good_as_a_crash():
    """The simulator is reset and its episode lost; a policy never sees the state."""
    signals = Signals(*(np.zeros(shape) for shape in SIGNAL_SHAPES))
    _check_finite(Frame(None, np.zeros(3), signals))
    with pytest.raises(FloatingPointError, match=r"state: got \[ 0. nan  0.\], expected finite numbers"):
        _check_finite(Frame(None, np.array([0.0, np.nan, 0.0]), signals))


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """Two processes of two simulators of a task that fails on demand; its folder; and the lines that are reported."""
    folder, lines = tmp_path_factory.mktemp("failing"), []
    (folder / "task.py").write_text(FAILING_TASK)
    config = EnvConfig(
        task=str(folder / "task.py"), envs_per_worker=2, image_size=None, use_state="tcp", max_restarts=6
    )
    with contextlib.closing(SimulatorPool(config, report=lines.append)) as pool:
        lines.clear()
        yield pool, folder, lines


def test_a_simulator_that_raises_once_loses_its_episode_alone(failing):
    pool, folder, lines = failing
    pool.reset([0, 1, 2, 3])
    losses, pids = pool.num_losses, [each.process.pid for each in pool._workers]
    (folder / "fail once").touch()
    state = pool.step(np.full((4, 7), 0.3))
    assert state.alive.sum() == 3 and pool.num_losses == losses + 1
    (row,) = np.flatnonzero(~state.alive)
    (line,) = lines
    assert line.startswith(
        f"simulator {row} of PushCube-v1 raised an error and loses its episode (loss 1 of at most 6)"
    )
    assert "Traceback" in line and "RuntimeError: this is to fail once" in line
    # Its neighbour in the same process was stepped as the others were, and it stays out of the way until it is reset.
    alone = pool.step(np.full((4, 7), 0.3))
    assert alone.alive.tolist() == state.alive.tolist()
    moved = np.linalg.norm(alone.signals.tcp_pos - state.signals.tcp_pos, axis=1)
    assert (moved[state.alive] > 1e-3).all() and moved[row] == 0
    assert pool.step(np.zeros((4, 7)), {int(row): 9}).alive.all()
    assert [each.process.pid for each in pool._workers] == pids
    lines.clear()


def test_physics_that_diverges_is_such_a_loss(failing):
    pool, folder, lines = failing
    pool.reset([0, 1, 2, 3])
    losses = pool.num_losses
    (folder / "diverge").touch()
    state = pool.step(np.zeros((4, 7)), {0: 7})  # in a reset as in a step
    (folder / "diverge").unlink()
    assert not state.alive.any() and pool.num_losses == losses + 4
    assert len(lines) == 4 and "signals.grasp_pos: got [nan nan nan], expected finite numbers" in lines[0]
    assert pool.reset([0, 1, 2, 3]).alive.all()
    pool.num_losses = 0
    lines.clear()


def test_others_step_while_a_lost_worker_starts(failing):
    pool, folder, lines = failing
    before = pool.reset([0, 1, 2, 3])
    pool._workers[1].process.kill()
    is_gone(pool._workers[1].process.pid)
    state = pool.step(np.zeros((4, 7)))
    assert state.alive.tolist() == [True, True, False, False]
    assert "simulator process 1 of PushCube-v1 is restarted and loses its episodes (loss 1" in lines[-1]
    pool._workers[1].process.send_signal(signal.SIGSTOP)  # So it has not started, however long the others take.
    for _ in range(12):
        state = pool.step(np.full((4, 7), 0.5), {2: 5, 3: 6})
        assert state.alive.tolist() == [True, True, False, False]
    assert (state.signals.tcp_pos[:2, 0] > before.signals.tcp_pos[:2, 0] + 0.1).all()
    pool._workers[1].process.send_signal(signal.SIGCONT)
    for _ in range(20_000):  # steps of 4 ms, ended by the start
        state = pool.step(np.zeros((4, 7)), {2: 5, 3: 6} if not state.alive.all() else None)
        if state.alive.all():
            break
    assert state.alive.all() and pool.num_losses == 1
    lines.clear()


def test_a_worker_that_does_not_start_in_time_is_lost_again(failing):
    pool, _, lines = failing
    pool.reset([0, 1, 2, 3])
    losses = pool.num_losses
    pool._workers[0].process.kill()
    pool.step(np.zeros((4, 7)))
    started = pool._workers[0]
    started.process.send_signal(signal.SIGSTOP)
    started.must_start_by = 0.0
    state = pool.step(np.zeros((4, 7)), {0: 0, 1: 1})
    assert state.alive.tolist() == [False, False, True, True] and pool.num_losses == losses + 2
    assert pool._workers[0] is not started and "did not start: still silent" in lines[-1]
    assert pool.step(np.zeros((4, 7)), {0: 0}).alive.tolist()[2:] == [True, True]


def test_a_simulator_that_always_raises_ends_the_run_with_its_traceback(failing):
    """The last test of this pool."""
    pool, folder, _ = failing
    (folder / "fail always").touch()
    with pytest.raises(SimulatorError) as error:
        for _ in range(10):
            assert not pool.reset([0, 1, 2, 3]).alive.any()
    message = str(error.value)
    assert message.startswith("max_restarts: simulators of PushCube-v1 were lost 7 times, expected at most 6; the last")
    assert "Traceback" in message and "RuntimeError: this is to fail always" in message and "doctor.py" in message


def test_a_task_that_cannot_be_read_fails_at_the_start(tmp_path):
    (tmp_path / "task.py").write_text(FAILING_TASK)
    (tmp_path / "fail always").touch()
    with pytest.raises(SimulatorError, match="(?s)process 0 of PushCube-v1:\nTraceback.*to fail always.*doctor.py"):
        SimulatorPool(EnvConfig(task=str(tmp_path / "task.py"), num_workers=1, image_size=None))


# ---- Images, end -----------------------------------------------------------------------------------------------------


def test_images_and_reproducible_resets(rendering_pool):
    def episode(seeds):
        states = [rendering_pool.reset(seeds, reproducible=True)]
        for _ in range(6):
            states.append(rendering_pool.step(expert_actions(states[-1].signals)))
        return [leaf for state in states for leaf in leaves(state)]

    first = episode([3, 4, 5, 6])
    images = first[0]
    assert images.shape == (4, 64, 64, 3) and images.dtype == np.uint8
    assert images.std() > 20 and len(np.unique(images, axis=0)) == 4
    episode([7, 8, 9, 10])
    for leaf, again in zip(first, episode([3, 4, 5, 6]), strict=True):
        np.testing.assert_array_equal(leaf, again)


def test_close_leaves_no_process_and_no_file(rendering_pool):
    """Runs last: the pool is of no use afterwards."""
    pids = [each.process.pid for each in rendering_pool._workers]
    rendering_pool.close()
    rendering_pool.close()
    assert all(is_gone(pid) for pid in pids)
    for descriptor in [rendering_pool._file, *(each.connection._handle for each in rendering_pool._workers)]:
        assert descriptor is None or not os.path.exists(f"/proc/self/fd/{descriptor}")


def test_a_start_that_fails_says_why(monkeypatch):
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.setenv(name, "/nowhere/driver.json")
    with pytest.raises(SimulatorError, match="(?s)process 0 of PushCube-v1:\nTraceback.*RuntimeError.*doctor.py"):
        SimulatorPool(EnvConfig(num_workers=1, image_size=64))


def test_workers_end_with_their_parent(tmp_path):
    script = (
        "import os, signal\n"
        "from stare_jax.envs import EnvConfig, make_vec_env\n"
        "pool = make_vec_env(EnvConfig(num_workers=1, image_size=None))\n"
        "from stare_jax.envs.pool import fork_server\n"
        "print(pool._workers[0].process.pid, fork_server._servers[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert output.returncode == -signal.SIGKILL, output.stderr
    assert all(is_gone(int(pid)) for pid in output.stdout.split())


@pytest.mark.slow
def test_processes_play_the_same_perturbed_episode_of_a_seed(simulators):
    config = EnvConfig(envs_per_worker=1, image_size=None, use_state="tcp", perturbation="execution/object_moved")
    simulator = simulators("PushCube-v1")
    usual, simulator.config = simulator.config, config
    try:
        with contextlib.closing(SimulatorPool(config, report=lambda line: None)) as pool:
            pool.reset([8, 4], reproducible=True)
            pool.step(np.zeros((2, 7), np.float32), {0: 5}, reproducible=True)  # Workers have played something else.
            both, alone = pool.reset([9, 9]), simulator.reset(9)
            for _ in range(8):
                action = expert_actions(both.signals)
                both, alone = pool.step(action), simulator.step(action[0])
                for leaf, own in zip(both.signals, alone.signals, strict=True):
                    np.testing.assert_array_equal(leaf, [own, own])
    finally:
        simulator.config = usual
        simulator.reset(0)
