"""Run directories with metrics and evaluations made by hand."""

import numpy as np

from stare_jax.evaluate.episodes import Episodes
from stare_jax.evaluate.protocol import EvalInfo, Evaluation, TaskStages
from stare_jax.evaluate.record import save_evaluation
from stare_jax.logging import make_writer, write_config

NUM_ITERATIONS = 8


def save_rate(path, phase, num_successes, num_episodes=10, tasks=("PushCube-v1",)):
    """The first episodes succeed; several tasks take turns."""
    is_success = np.arange(num_episodes) < num_successes
    ones, numbers = np.ones(num_episodes, bool), np.arange(num_episodes)
    episodes = Episodes(
        seed=numbers,
        start=numbers,
        start_hash=numbers.astype(str),
        valid=ones,
        success_end=is_success,
        success_once=is_success,
        success_at=np.where(is_success, 3, 6),
        grasped=ones,
        contacted=ones,
        stage_reached=numbers * 0,
        completed=is_success[:, None],
        entered_at=np.zeros((num_episodes, 1), int),
        stage_len=np.ones((num_episodes, 1), int),
        task=numbers % len(tasks),
    )
    several = tuple(TaskStages(task, ("goal",)) for task in tasks if len(tasks) > 1)
    info = EvalInfo("+".join(tasks), ("goal",), horizon=5, temperature=0.0, num_steps=50, wall_s=1.0, tasks=several)
    save_evaluation(path / f"eval/{phase}.json", Evaluation(info, episodes), phase=phase)


def save_stages(path, phase, reached, task="LiftPegUpright-v1", hashes=""):
    """Episode e completes `reached[e]` of four stages, and succeeds where it completes all, in its last state, too."""
    reached, numbers = np.array(reached), np.arange(len(reached))
    completed, is_success, names = reached[:, None] > np.arange(4), reached == 4, ("reach", "grasp", "lift", "upright")
    episodes = Episodes(
        seed=numbers,
        start=numbers,
        start_hash=np.array([f"{hashes}{number}" for number in numbers]),
        valid=numbers >= 0,
        success_end=is_success,
        success_once=is_success,
        success_at=np.where(is_success, 3, 6),
        grasped=completed[:, 1],
        contacted=completed[:, 0],
        stage_reached=np.minimum(reached, 3),
        completed=completed,
        entered_at=np.zeros(completed.shape, int),
        stage_len=np.ones(completed.shape, int),
        task=0 * numbers,
    )
    info = EvalInfo(task, names, horizon=5, temperature=0.0, num_steps=50, wall_s=120.0)
    save_evaluation(path / f"eval/{phase}.json", Evaluation(info, episodes), phase=phase)


def make_run(directory, rise, seed, task="PushCube-v1", **config):
    """Success is 0, then 1 from iteration `rise` on; 100 steps and 6 seconds an iteration."""
    write_config(directory, {"seed": seed, "env": {"env_id": task}, **config})
    with make_writer(directory, tensorboard=False) as writer:
        writer(1, {"sft/loss": 1.0}, phase="sft")
        for i in range(1, NUM_ITERATIONS + 1):
            metrics = {"env/success": float(i >= rise), "env/steps": 100.0 * i, "time/env_s": 4.0, "time/update_s": 2.0}
            writer(i, metrics | {"ppo/approx_kl": 0.01 * i, "ppo/entropy": -float(i)}, phase="ppo")
    return directory
