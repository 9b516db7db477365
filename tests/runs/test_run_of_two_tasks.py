"""One policy for two tasks, through a whole run that is stopped again and again: the toy, and its mirror image."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import toy_run
from toy_run import DressedToy, make_config

from stare_jax.config import ConfigError
from stare_jax.data.pairs import read_pairs
from stare_jax.data.reader import Dataset
from stare_jax.envs import EnvConfig, toy
from stare_jax.envs.seeds import SLOT_SIZE
from stare_jax.evaluate.record import load_results
from stare_jax.logging import Interrupted, read_metrics
from stare_jax.report.report import print_report
from stare_jax.rollout.validation import ValidationConfig
from stare_jax.runs import ipi
from stare_jax.runs.fit import check_fit
from stare_jax.runs.ipi import run_ipi
from stare_jax.runs.start import read_statistics
from stare_jax.stages import get_task

TASKS = ("PushCube-v1", "PullCube-v1")
JOINED = "+".join(TASKS)
ENV = EnvConfig(tasks=TASKS, num_workers=2, envs_per_worker=2, horizon=toy.HORIZON, image_size=0)
CONFIG = make_config(env=ENV)
CONFIG = dataclasses.replace(CONFIG, pairs=dataclasses.replace(CONFIG.pairs, write_every=1))  # a stop loses less


class TwoToys(DressedToy):
    """The toy for the first task, its mirror image, whose goals lie to the left, for the second."""

    stop_after = None
    """Calls until a signal asks to stop; None for never."""

    def __init__(self, config):
        super().__init__(config.num_envs)
        self.env_id, self.task_index = config.env_id, config.task_index
        self.instructions = [config.specs[k].instruction for k in self.task_index]
        self._sign = np.where(self.task_index == 1, -1.0, 1.0).astype(np.float32)[:, None]

    def send(self, action, reset_seeds=None, **options):
        if TwoToys.stop_after is not None:
            TwoToys.stop_after -= 1
            if TwoToys.stop_after == 0:
                signal.raise_signal(signal.SIGTERM)
        super().send(np.array(action) * np.where(np.arange(7) == 0, self._sign, 1), reset_seeds, **options)

    def _observe(self, measured):
        state = super()._observe(measured)
        places = {
            name: leaf * np.where(np.arange(3) == 0, self._sign, 1).astype(np.float32)
            for name, leaf in state.signals._asdict().items()
            if name.endswith("_pos")
        }
        seen = state.observation.state * np.where(np.arange(6) % 2 == 0, self._sign, 1).astype(np.float32)
        return state._replace(
            observation=state.observation._replace(state=seen), signals=state.signals._replace(**places)
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run in one piece."""
    folder = tmp_path_factory.mktemp("several") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        toy_run.replace_simulator(patch)
        patch.setattr(ipi, "make_vec_env", TwoToys)
        run_ipi(CONFIG, folder)
    return folder


@pytest.mark.slow  # Every part compiles anew.
def test_a_run_that_was_stopped_comes_to_the_same_end(whole, tmp_path, monkeypatch):
    toy_run.replace_simulator(monkeypatch)
    monkeypatch.setattr(ipi, "make_vec_env", TwoToys)
    num_stops = 0
    while True:
        monkeypatch.setattr(TwoToys, "stop_after", 120)
        try:
            run_ipi(CONFIG, tmp_path / "stopped")
            break
        except Interrupted:
            num_stops += 1
            assert num_stops < 9, "the run does not get on"
    assert num_stops >= 2
    for phase in ("sft", "tpo", "ppo"):
        first, second = (
            json.loads((run / "eval" / f"{phase}.json").read_text()) for run in (whole, tmp_path / "stopped")
        )
        assert first["episodes"] == second["episodes"]


def test_demonstrations_and_pairs_know_their_task(whole):
    demos = Dataset(whole / "data" / "demos")
    assert demos.manifest.env_id == JOINED
    assert [episode.task for episode in demos.episodes] == [0] * 4 + [1] * 4  # as many of each as the config says
    for index, row in enumerate(demos.episodes):
        signals = demos.episode(index, toy.HORIZON)[0].signals
        assert row.instruction == get_task(TASKS[row.task]).instruction
        assert np.sign(signals.goal_pos[0, 0] - signals.obj_pos[0, 0]) == (1, -1)[row.task]
    rollouts = Dataset(whole / "tpo" / "pairs")
    of_pairs = [
        (rollouts.episodes[p.chosen].task, rollouts.episodes[p.rejected].task) for p in read_pairs(rollouts.directory)
    ]
    assert {chosen == rejected for chosen, rejected in of_pairs} == {True}
    assert 1 <= len(of_pairs) <= 2 * CONFIG.pairs.num_pairs


def test_an_iteration_has_as_many_episodes_of_each_task(whole):
    lines = [line for line in read_metrics(whole) if line["phase"] == "ppo" and "env/success" in line]
    assert len(lines) == 2
    for line in lines:
        of_tasks = [line[f"env/success_{task}"] for task in TASKS]
        assert line["env/num_episodes"] == 4 and line["env/success"] == pytest.approx(np.mean(of_tasks))


def test_evaluation_and_report_tell_each_task_and_the_average(whole, capsys):
    for result in load_results(whole):
        episodes, info = result.evaluation.episodes, result.evaluation.info
        assert episodes.task.tolist() == [0, 1] * 4 and episodes.seed.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [task.env_id for task in info.tasks] == list(result.summary.tasks) == list(TASKS)
        assert [len(part.stages) for part in result.summary.tasks.values()] == [4, 4]
    print_report(whole)
    printed, page = capsys.readouterr().out, (whole / "report.html").read_text()
    for text in (printed, page):
        for row in (*TASKS, "average"):
            assert row in text
    for task in TASKS:
        assert (whole / "figures" / f"stages_{task}.png").exists()


def test_numbers_of_the_stages_hold_for_all_tasks_where_they_are_given():
    assert CONFIG.specs == tuple(map(get_task, TASKS))
    given = dataclasses.replace(CONFIG, stages=dataclasses.replace(CONFIG.stages, progressive=False, d_push=0.3))
    for spec, own in zip(given.specs, CONFIG.specs, strict=True):
        assert (spec.params.progressive, spec.params.d_push) == (False, 0.3)
        assert dataclasses.replace(spec.params, progressive=True, d_push=own.params.d_push) == own.params


def test_demonstrations_of_one_task_are_not_those_of_two(whole, tmp_path):
    folder = whole / "data" / "demos"
    alone = dataclasses.replace(make_config(), demos_from=str(folder), phases=("sft",))
    with pytest.raises(ConfigError, match=f"env_id: got '{JOINED}', expected 'PushCube-v1'".replace("+", r"\+")):
        run_ipi(alone, tmp_path / "run")


def test_the_reward_of_a_grasp_is_refused_where_one_task_has_none():
    ppo = dataclasses.replace(CONFIG.ppo, reward="rl4vla")
    env = dataclasses.replace(ENV, tasks=("StackCube-v1", "PushCube-v1"))
    with pytest.raises(ValueError, match="reward: got 'rl4vla', expected another one for PushCube-v1"):
        dataclasses.replace(CONFIG, env=env, ppo=ppo, stages=get_task("StackCube-v1").params)


def test_seeds_have_to_be_enough_for_all_tasks():
    demos = dataclasses.replace(CONFIG.demos, num_demos=SLOT_SIZE // 2 + 1)
    with pytest.raises(ConfigError, match="demos.num_demos of each of 2 tasks: got 1,000,002, expected at most 1,000,"):
        check_fit(dataclasses.replace(CONFIG, demos=demos))
    for every in (1, 0):
        validation = ValidationConfig(every=every, num_episodes=SLOT_SIZE + 1)
        with pytest.raises(ConfigError) as refused:  # in any case, as this model is the toy's
            check_fit(dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, validation=validation)))
        expected = "config.ppo.validation.num_episodes: got 1,000,001, expected at most 1,000,000,"
        assert (expected in str(refused.value)) == (every > 0)


def test_statistics_are_over_all_tasks(whole):
    stats = read_statistics(whole)
    assert stats.state_q01[4] < -0.02 and stats.state_q99[4] > 0.02  # goals lie to both sides
