"""The network learns from pixels: where a bright square is decides the action."""

import jax
import numpy as np
import optax
from nano_policy import nano_config

from stare_jax.models import make_policy, with_prompt
from stare_jax.models.normalize import identity_stats
from stare_jax.types import Observation


def squares(rng, num):
    """Dark noisy images `[num, 32, 32, 3]` with a 6x6 square; the action is its centre in [-1, 1], and a constant."""
    images = rng.integers(0, 60, (num, 32, 32, 3)).astype(np.uint8)
    corners = rng.integers(0, 27, (num, 2))
    for image, (row, column) in zip(images, corners, strict=True):
        image[row : row + 6, column : column + 6] = (30, 80, 250)
    action = np.concatenate([(corners[:, ::-1] + 3) / 16 - 1, np.full((num, 1), -1.0)], axis=1)
    return images, action.astype(np.float32)


def test_action_is_read_off_the_image():
    policy = make_policy(nano_config(state_dim=0, prompt_template="{instruction}"), identity_stats(3, 0))
    rng = np.random.default_rng(0)

    def observe(images):
        blank = np.zeros((len(images), 0))
        observation = Observation({"base_camera": images}, blank.astype(np.float32), blank, blank)
        return with_prompt(policy, observation, ["push the cube"] * len(images))

    def loss(params, observation, action):
        loss, metrics = policy.imitation_loss(params, observation, action)
        return loss.mean(), metrics["l1"].mean()

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, observation, action):
        (_, error), grads = jax.value_and_grad(loss, has_aux=True)(params, observation, action)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, error

    params = jax.jit(policy.init)(jax.random.key(0))
    state = optimizer.init(params)
    errors = []
    for _ in range(300):
        images, action = squares(rng, 32)
        params, state, error = step(params, state, observe(images), action)
        errors.append(float(error))
    # Blind, the best constant answer is off by 0.27 (two uniform dimensions of three).
    print(errors[::20], np.mean(errors[-20:]))
    assert np.mean(errors[-20:]) < 0.1
