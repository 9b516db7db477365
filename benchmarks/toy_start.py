"""Starts of training on the toys: imitations of the expert, the weaker the shorter, as one compiled program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from toy_learning import draw_seeds, flat, make_policy, observation_of, play, play_policy

from stare_jax.envs.toys import Toy
from stare_jax.models.policy import Policy
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.types import Array, PyTree

DEMO_EPISODES = 256
DEMO_NOISE = 0.3
"""Standard deviation of the disturbance of the expert, whose actions are at most 1; what it wanted is imitated."""
IMITATION_BATCH = 256
IMITATION_RATE = 1e-3


def imitate(policy: Policy, params: PyTree, toy: Toy, key: Array, *, num_steps: Array, max_step: Array) -> PyTree:
    """Imitates the toy's expert for `num_steps` steps, which may be traced; more make a better start."""
    play_key, seed_key, step_key = jax.random.split(key, 3)

    def choose(state, signals, key):
        action = toy.expert(signals, max_step=max_step)
        return jnp.clip(action + DEMO_NOISE * jax.random.normal(key, action.shape), -1, 1), action

    demos = play(toy, choose, draw_seeds(seed_key, DEMO_EPISODES), play_key, max_step=max_step)
    state, action, is_action = (flat(x) for x in (demos.state[:, :-1], demos.record, demos.valid[:, 1:]))
    tx = make_optimizer(OptimizerConfig(IMITATION_RATE, weight_decay=0.0), num_steps=None)

    def loss_fn(params, rows):
        loss, _ = policy.imitation_loss(params, observation_of(state[rows]), action[rows])
        return jnp.mean(loss, where=is_action[rows])

    def step(i, carry):
        params, opt_state = carry
        rows = jax.random.randint(jax.random.fold_in(step_key, i), (IMITATION_BATCH,), 0, len(is_action))
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, rows), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.lax.fori_loop(0, num_steps, step, (params, tx.init(params)))[0]


def make_start(toy: Toy, *, num_episodes: int = 512) -> Callable[..., tuple[PyTree, Array]]:
    """Compiles the start of training: (seeds `[S]`, number of imitation steps, max_step) -> (params, success `[S]`)."""
    policy = make_policy(toy)

    def start(seed, num_steps, max_step):
        init_key, imitation_key, seed_key, play_key = jax.random.split(jax.random.key(seed), 4)
        params = policy.init(init_key)
        params = imitate(policy, params, toy, imitation_key, num_steps=num_steps, max_step=max_step)
        seeds = draw_seeds(seed_key, num_episodes)
        episodes = play_policy(policy, params, toy, seeds, play_key, max_step=max_step)
        return params, (episodes.signals.success & episodes.valid).any(axis=1).mean()

    return jax.jit(jax.vmap(start, in_axes=(0, None, None)))
