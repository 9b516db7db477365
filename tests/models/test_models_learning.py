"""The network learns from pixels: where a bright square is decides the action."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from nano_policy import jit, nano_config

from stare_jax.models import make_policy, with_prompt
from stare_jax.models.normalize import identity_stats
from stare_jax.types import Observation


def squares(rng, num):
    """Dark noisy images `[num, 32, 32, 3]` with a 10x10 square; the action is its centre in [-1, 1], and a constant."""
    images = rng.integers(0, 60, (num, 32, 32, 3)).astype(np.uint8)
    corners = rng.integers(0, 23, (num, 2))
    for image, (row, column) in zip(images, corners, strict=True):
        image[row : row + 10, column : column + 10] = (30, 80, 250)
    action = np.concatenate([(corners[:, ::-1] + 5) / 16 - 1, np.full((num, 1), -1.0)], axis=1)
    return images, action.astype(np.float32)


@pytest.mark.slow
def test_action_is_read_off_the_image():
    config = nano_config(state_dim=0, prompt_template="{instruction}", prompt_length=5)
    towers = {name: dataclasses.replace(getattr(config, name), std=(0.2, 0.2, 0.2)) for name in ("dino", "siglip")}
    policy = make_policy(dataclasses.replace(config, **towers), identity_stats(3, 0))
    rng = np.random.default_rng(0)

    def observe(images):
        blank = np.zeros((len(images), 0))
        observation = Observation({"base_camera": images}, blank.astype(np.float32), blank, blank)
        return with_prompt(policy, observation, ["push the cube"] * len(images))

    optimizer = optax.adam(1e-3)

    @jit
    def step(params, state, observation, action):
        loss = lambda params: policy.imitation_loss(params, observation, action)[0].mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = jit(policy.init)(jax.random.key(0))
    state, losses = optimizer.init(params), []
    for _ in range(180):
        images, action = squares(rng, 32)
        params, state, loss = step(params, state, observe(images), action)
        losses.append(float(loss))
    # Blind, two dimensions are uniform over 175 of the bins, and the third costs the entropy of its label, cut off at
    # the edge: (2 ln 175 + 2.1) / 3 = 4.15. Knowing the square's place, the entropy of the labels remains, 2.7.
    assert np.mean(losses[-20:]) < 3.8, losses[::20]
