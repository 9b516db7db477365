"""Validation of a policy in training: what it draws, and what it keeps."""

import jax
import numpy as np

from stare_jax.envs import toy
from stare_jax.envs.seeds import phase_key
from stare_jax.logging import Clock
from stare_jax.models.policy import Decision
from stare_jax.rollout import validation
from stare_jax.rollout.validation import ValidationConfig, validate


class Filmed(toy.ToyPush):
    def _observe(self, measured):
        state = super()._observe(measured)
        images = {"camera": np.zeros((self.num_envs, 2, 2, 3), np.uint8)}
        return state._replace(observation=state.observation._replace(images=images))


def test_every_validation_draws_the_same_noise_which_is_not_that_of_training_and_keeps_no_images(monkeypatch):
    asked, rollouts, collect = [], [], validation.collect_episodes

    def act_of(key, *, temperature):
        asked.append((jax.random.key_data(key).tolist(), temperature))
        return lambda observation, signals, instructions, is_first: (Decision(toy.expert_action(signals)), observation)

    def collected(*arguments, **options):
        rollouts.append(collect(*arguments, **options))
        return rollouts[-1]

    monkeypatch.setattr(validation, "collect_episodes", collected)
    config, env = ValidationConfig(every=5, num_episodes=6, temperature=0.5), Filmed(4)
    for iteration in (0, 4, 5):
        rates = validate(act_of, env, toy.task_spec(), config, iteration, 3, lambda: False, Clock())
        # The toy's expert pushes on when it is there.
        assert rates == ({} if iteration == 4 else {"validation/success": 1.0, "validation/success_end": 0.0})
    of_training = jax.random.fold_in(phase_key(3, "ppo"), 0)
    (first, temperature), second = asked
    assert second == (first, temperature) and temperature == 0.5 and first != jax.random.key_data(of_training).tolist()
    assert [rollout.trajectory.observation.images for rollout in rollouts] == [{}, {}]
