"""Learning on the toys as one compiled program: episodes, and PPO with one of several rewards.

All of it runs on the device, in scans over steps, minibatches and iterations, for several seeds at a time. Stages,
rewards, advantages, losses and policies are the library's own; the loops replace `rollout.collect` and `train.ppo`,
which talk to simulators on the host. E is the number of episodes, N of an episode's actions, S of the state's numbers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from stare_jax.envs.toys import Toy
from stare_jax.losses import ppo_loss, whiten
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.policy import Policy
from stare_jax.stages import (
    Reward,
    StageCarry,
    TaskSpec,
    TerminalPotential,
    TimeLimit,
    potentials,
    separate,
    step_stage,
)
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.targets import Targets, episode_targets
from stare_jax.train.ppo_batch import DecisionBatch
from stare_jax.types import Array, Observation, PyTree, Signals

CLIP_EPS = 0.2
MAX_GRAD_NORM = 10.0
NUM_MINIBATCHES = 4
"""minibatches of an epoch."""


class Arm(NamedTuple):
    """A way to make advantages of episodes."""

    shaping: bool = True
    progressive: bool = True
    terminal_potential: TerminalPotential = "keep"
    time_limit: TimeLimit = "terminate"
    reward: Reward = "success"
    is_reward_larger: bool = False
    """The reward is 1 + gamma times as large: what success is paid, all in all, where the potential is kept."""
    has_potential_in_critic: bool = False
    """No shaping; the critic is V + Phi, and V is what is learned."""
    jump_start: float = 0.0
    """Share of the episodes that the expert begins, see `rollout.jump_start`; success is that of the others."""
    whiten_by_stage: bool = False
    """Advantages are whitened among the decisions of each stage."""


class Hyper(NamedTuple):
    """Settings that are tuned; scalars, which may be traced."""

    learning_rate: Array | float
    value_learning_rate: Array | float
    gae_lambda: Array | float
    gamma: Array | float
    entropy_coef: Array | float
    num_epochs: Array | int


class Episodes(NamedTuple):
    """Episodes of a policy or an expert, leaves `[E, ...]`; they end at their first success."""

    state: Array
    """`[E, N + 1, S]` observed states."""
    signals: Signals
    valid: Array
    """bool `[E, N + 1]`: states that exist."""
    record: PyTree
    """leaves `[E, N, ...]`: what was decided."""


class Curve(NamedTuple):
    """Training of one seed, `[I]` iterations."""

    success: Array
    """share of successes among the iteration's episodes."""
    steps: Array
    """int32: environment steps so far, those of the iteration included."""
    completed: Array
    """`[I, K]` share of episodes that completed each stage."""


def make_policy(toy: Toy) -> Policy:
    """Builds the policy that learns a toy."""
    config = MLPConfig(
        toy.state_dim, toy.action_dim, hidden_dims=(32, 32), value_dims=(32, 32), num_bins=12, label_width=0.5
    )
    return make_mlp(config, toy.norm_stats)


def observation_of(state: Array) -> Observation:
    """Returns what a policy sees of states `[..., S]`."""
    no_tokens = jnp.zeros((*state.shape[:-1], 0), jnp.int32)
    return Observation({}, state, no_tokens, no_tokens.astype(bool))


# ---- Episodes -------------------------------------------------------------------------------------------------------
def play(
    toy: Toy, choose: Callable, seeds: Array, key: Array, *, max_step: Array | float, until: Array | None = None
) -> Episodes:
    """Plays one episode of each seed.

    Args:
        toy: the task.
        choose: (states `[E, S]`, signals, key) -> (actions `[E, A]`, record with leaves `[E, ...]`).
        seeds: uint32 `[E]`.
        key: consumed.
        max_step: see `Toy`.
        until: int32 `[E]`, the stage until which the toy's expert acts; None for 0.
    """
    move, observe = jax.vmap(functools.partial(toy.step, max_step=max_step)), jax.vmap(toy.observe)
    label = jax.vmap(functools.partial(step_stage, toy.spec))
    until = jnp.zeros(seeds.shape, jnp.int32) if until is None else until

    def step(carry, key):
        state, (seen, signals), is_running, completed = carry
        action, record = choose(seen, signals, key)
        (completed,), stage = label(StageCarry(completed), signals)
        action = _where(stage < until, toy.expert(signals, max_step=max_step), action)
        moved = jax.tree.map(functools.partial(_where, is_running), move(state, action), state)
        measured = observe(moved)
        return (moved, measured, is_running & ~measured[1].success, completed), (*measured, is_running, record)

    state = jax.vmap(toy.reset)(seeds)
    exists = (*observe(state), jnp.ones(seeds.shape, bool))
    start = (state, exists[:2], exists[2], jnp.zeros(seeds.shape, jnp.int32))
    _, (*measured, is_action, record) = jax.lax.scan(step, start, jax.random.split(key, toy.horizon))
    state, signals, valid = jax.tree.map(
        lambda first, others: jnp.concatenate([first[None], others]), exists, (*measured, is_action)
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1), Episodes(state, signals, valid, record))


def _where(condition: Array, a: Array, b: Array) -> Array:
    return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)


def draw_seeds(key: Array, num_episodes: int) -> Array:
    """Draws seeds of episodes."""
    return jax.random.bits(key, (num_episodes,), jnp.uint32)


def play_policy(policy: Policy, params: PyTree, toy: Toy, seeds: Array, key: Array, **options) -> Episodes:
    """Plays episodes of a policy, sampled at temperature 1; the record is its `Decision`. `options` are of `play`."""

    def choose(state, signals, key):
        decision = policy.sample(params, observation_of(state), key)
        return decision.action, decision

    return play(toy, choose, seeds, key, **options)


def draw_until(key: Array, fraction: Array, num_episodes: int, num_stages: int) -> Array:
    """Draws the stage that a policy takes over in, int32 `[E]`: 0, or in a fraction of the episodes a later one."""
    share_key, stage_key = jax.random.split(key)
    later = jax.random.randint(stage_key, (num_episodes,), 1, num_stages)
    return jnp.where(jax.random.uniform(share_key, (num_episodes,)) < fraction, later, 0)


def flat(x: Array) -> Array:
    """Joins the first two axes."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


# ---- Advantages -----------------------------------------------------------------------------------------------------
def arm_targets(arm: Arm, spec: TaskSpec) -> Callable[..., Targets]:
    """Returns (signals `[N + 1]`, valid `[N + 1]`, value `[N + 1]`, gamma, gae_lambda) -> `Targets` of one episode."""
    spec = dataclasses.replace(spec, params=dataclasses.replace(spec.params, progressive=arm.progressive))

    def targets(signals, valid, value, gamma, gae_lambda):
        potential = potentials(spec, signals, separate(spec, signals, valid)) * arm.has_potential_in_critic
        scale = 1.0 + gamma if arm.is_reward_larger else 1.0
        # Advantages are linear in rewards and values together, so that this is a reward `scale` times as large.
        made = episode_targets(
            signals,
            valid,
            (value + potential) / scale,
            spec=spec,
            shaping=arm.shaping,
            gamma=gamma,
            gae_lambda=gae_lambda,
            time_limit=arm.time_limit,
            terminal_potential=arm.terminal_potential,
            reward=arm.reward,
        )
        return_d = scale * made.return_d - jnp.where(made.valid_d, potential[:-1], 0.0)
        return made._replace(advantage_d=scale * made.advantage_d, return_d=return_d)

    return targets


# ---- PPO ------------------------------------------------------------------------------------------------------------
def make_batch(
    policy: Policy,
    params: PyTree,
    episodes: Episodes,
    targets_fn: Callable,
    *,
    until: Array | int = 0,
    by_stage: Array | bool = False,
) -> tuple[DecisionBatch, Targets]:
    """Labels and rewards episodes and whitens the advantages of decisions from stage `until`, `[E]` or one, on."""
    decision = episodes.record
    last_value = policy.value(params, observation_of(episodes.state[:, -1]))
    value = jnp.concatenate([decision.value, last_value[:, None]], axis=1)
    targets = jax.vmap(targets_fn)(episodes.signals, episodes.valid, value)
    stage_d = targets.stage_t[:, :-1]
    own_d = targets.valid_d & (stage_d >= jnp.reshape(until, (-1, 1)))
    parts = [whiten(targets.advantage_d, own_d & (stage_d == k)) for k in range(targets.completed.shape[1])]
    batch = DecisionBatch(
        observation=observation_of(episodes.state[:, :-1]),
        trace=decision.trace,
        old_logp=decision.logp,
        old_value=decision.value,
        advantage=jnp.where(by_stage, sum(parts), whiten(targets.advantage_d, own_d)),
        return_=targets.return_d,
        valid=own_d,
    )
    return jax.tree.map(flat, batch), targets


def update(policy: Policy, params: PyTree, opt_state: PyTree, batch: DecisionBatch, key: Array, hyper: Hyper):
    """Passes over a batch `hyper.num_epochs` times and returns parameters and the optimiser's state."""
    tx, rates = _optimizer(), _learning_rates(params, hyper)
    size = len(batch.valid)

    def loss_fn(params, part):
        score = policy.log_prob(params, part.observation, part.trace)
        loss, _ = ppo_loss(
            score.logp,
            part.old_logp,
            part.advantage,
            score.value,
            part.old_value,
            part.return_,
            score.entropy,
            part.valid,
            clip_eps=CLIP_EPS,
            entropy_coef=hyper.entropy_coef,
        )
        return loss

    def step(carry, rows):
        params, opt_state = carry
        part = jax.tree.map(lambda x: x[rows], batch)
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, part), opt_state, params)
        return (optax.apply_updates(params, jax.tree.map(jnp.multiply, rates, updates)), opt_state), None

    def epoch(i, carry):
        order = jax.random.permutation(jax.random.fold_in(key, i), size)
        order = order[: size // NUM_MINIBATCHES * NUM_MINIBATCHES].reshape(NUM_MINIBATCHES, -1)
        return jax.lax.scan(step, carry, order)[0]

    return jax.lax.fori_loop(0, hyper.num_epochs, epoch, (params, opt_state))


def _optimizer() -> optax.GradientTransformation:
    """The library's optimiser with steps of size 1, which `_learning_rates` scales: rates may be traced there."""
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
    return make_optimizer(config, num_steps=None)


def _learning_rates(params: PyTree, hyper: Hyper) -> PyTree:
    def one(path, _):
        return hyper.value_learning_rate if path[0].key == "value_head" else hyper.learning_rate

    return jax.tree.map_with_path(one, params)


def make_training(toy: Toy, arms: Sequence[Arm], *, num_iterations: int, num_episodes: int) -> Callable[..., Curve]:
    """Compiles PPO on a toy: (params `[R, ...]`, keys `[R]`, arm, hyper, max_step) -> `Curve` of `[R, I, ...]`.

    The R rows are seeds, or settings and seeds: `hyper` has leaves `[R]`, except for the number of epochs, which they
    share.

    Args:
        toy: the task.
        arms: the program can run any of them; it takes the index.
        num_iterations: I.
        num_episodes: E of an iteration.
    """
    policy = make_policy(toy)
    all_targets = [arm_targets(arm, toy.spec) for arm in arms]
    fractions = jnp.array([arm.jump_start for arm in arms])
    by_stage = jnp.array([arm.whiten_by_stage for arm in arms])

    def train(params, key, arm, hyper, max_step):
        def targets_fn(signals, valid, value):
            inputs = (signals, valid, value, hyper.gamma, hyper.gae_lambda)
            return jax.lax.switch(arm, all_targets, *inputs)

        def iteration(carry, key):
            params, opt_state, num_steps = carry
            seed_key, play_key, update_key, until_key = jax.random.split(key, 4)
            seeds = draw_seeds(seed_key, num_episodes)
            until = draw_until(until_key, fractions[arm], num_episodes, toy.spec.num_stages)
            episodes = play_policy(policy, params, toy, seeds, play_key, max_step=max_step, until=until)
            batch, targets = make_batch(policy, params, episodes, targets_fn, until=until, by_stage=by_stage[arm])
            params, opt_state = update(policy, params, opt_state, batch, update_key, hyper)
            num_steps += targets.valid_d.sum()  # those of the expert, too
            own = until == 0
            success = targets.success_t.any(axis=1).mean(where=own)
            completed = targets.completed.mean(axis=0, where=own[:, None])
            return (params, opt_state, num_steps), Curve(success, num_steps, completed)

        start = (params, _optimizer().init(params), jnp.int32(0))
        return jax.lax.scan(iteration, start, jax.random.split(key, num_iterations))[1]

    rows = Hyper(*(None if name == "num_epochs" else 0 for name in Hyper._fields))
    return jax.jit(jax.vmap(train, in_axes=(0, 0, None, rows, None)))
