"""Toy episodes with pictures, and a run directory made of them."""

import numpy as np
import pytest

from stare_jax.envs import toy
from stare_jax.evaluate.protocol import EvalConfig, evaluate_act
from stare_jax.logging import make_writer, write_config
from stare_jax.models.policy import Decision
from stare_jax.report.films import record_evaluation
from stare_jax.runs.evaluation import training_rewards
from stare_jax.train.ppo import PPOConfig


def pusher(speed):
    """Returns an actor that pushes at a fraction of full speed; 0 does nothing."""

    def act(observation, signals, instructions, is_first):
        action = speed * toy.expert_action(signals) if speed else np.zeros((len(is_first), 2), np.float32)
        return Decision(action), observation

    return act


class PicturedToy(toy.ToyPush):
    """The toy with a camera, which sees the gripper as a red line."""

    def reset(self, seeds, *, reproducible=False):
        return self._with_pictures(super().reset(seeds, reproducible=reproducible))

    def receive(self):
        return self._with_pictures(super().receive())

    def _with_pictures(self, state):
        frames = np.full((self.num_envs, 32, 32, 3), 200, np.uint8)
        column = np.clip(np.rint(16 + 60 * state.observation.state[:, 0]), 0, 31).astype(int)
        frames[np.arange(self.num_envs), :, column] = (220, 40, 40)
        return state._replace(observation=state.observation._replace(images={"base": frames}))


@pytest.fixture(scope="session")
def expert_act():
    return pusher


@pytest.fixture(scope="session")
def spec():
    return toy.task_spec()


@pytest.fixture(scope="session")
def evaluated(spec):
    """Evaluation and films of a slow expert, which reaches the goal in some episodes."""
    return evaluate_act(lambda part: pusher(0.2), PicturedToy(4), spec, EvalConfig(num_episodes=12, num_videos=2))


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory, spec, evaluated):
    """Files of a small run of two phases, under a name that HTML has to escape."""
    directory = tmp_path_factory.mktemp("runs") / "a <b> & c"
    write_config(directory, {"name": "<script>alert(1)</script>", "ppo": {"gamma": 0.98}})
    with make_writer(directory, tensorboard=False) as writer:
        for step in range(60):
            writer(step, {"sft/loss": 1 / (1 + step), "time/update_s": 2.0, "time/data_s": 0.5}, phase="sft")
        for num_pairs in (3, 12):  # as a run that was stopped and gone on with
            counts = {
                "pairs/num_pairs": num_pairs,
                "pairs/success_same_start": num_pairs - 1,
                "pairs/stage_other_start": 1,
            }
            writer(16, counts, phase="pairs")
        for step in range(3):
            writer(step, {"ppo/loss": 0.1, "env/success": step / 3, "time/env_s": 7.0}, phase="ppo")
    rewards_fn = training_rewards(spec, PPOConfig(gamma=0.98))
    idle = evaluate_act(lambda part: pusher(0.0), PicturedToy(4), spec, EvalConfig(num_episodes=12, num_videos=2))
    record_evaluation(directory, "sft", *idle, spec, [rewards_fn], num_videos=2)
    record_evaluation(directory, "ppo", *evaluated, spec, [rewards_fn], num_videos=2)
    return directory
