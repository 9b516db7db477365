"""The way from the episodes of an iteration to minibatches: stages, rewards (5), advantages (2), shuffling.

Functions that say so are for one episode, from its first state on; `compile_targets` vmaps and compiles them once.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.logging import announce_compiling
from stare_jax.losses import GroupAdvantage, chunk_rewards, explained_variance, gae, group_advantages, whiten
from stare_jax.models.policy import Policy
from stare_jax.rollout.collect import Rollout
from stare_jax.sharding.mesh import place
from stare_jax.stages import TaskSpec, potentials, separate, shape_rewards, success_rewards
from stare_jax.stages.rewards import Reward, episode_rewards
from stare_jax.stages.shaping import TerminalPotential, TimeLimit
from stare_jax.train import update
from stare_jax.types import Array, Decisions, Observation, Signals

Advantage = Literal["gae", *get_args(GroupAdvantage)]
"""Advantage of a decision: over the critic's expectation ("gae"), or its episode's over others that began alike."""
ChunkDiscount = Literal["step", "decision"]
WhitenOver = Literal["all", "task"]
"""Decisions among which advantages are whitened: all of a batch, or those of each task."""


class Targets(NamedTuple):
    """Rewards and advantages of one episode of N actions and D decisions, padded; zeros where there is none."""

    reward_t: Array
    """float32 `[N]` r_t."""
    shaped_reward_t: Array
    """float32 `[N]` r'_t (5), or r_t where there is no shaping."""
    advantage_d: Array
    """float32 `[D]` of each decision."""
    return_d: Array
    """float32 `[D]` of each decision."""
    valid_t: Array
    """bool `[N]`: actions that exist."""
    valid_d: Array
    """bool `[D]`: decisions that exist."""
    stage_t: Array
    """int32 `[N + 1]` labels of the states."""
    completed: Array
    """bool `[K]`."""
    success_t: Array
    """bool `[N]`: the action that led to the first success."""
    is_over: Array
    """bool: the episode reached its end, and was not cut short."""


class DecisionBatch(NamedTuple):
    """Decisions of rollouts, in any order."""

    observation: Observation
    """leaves `[B, ...]`."""
    trace: dict[str, Array]
    """`[B, ...]`, see `Decision.trace`."""
    old_logp: Array
    """float32 `[B, T]`."""
    old_value: Array
    """float32 `[B]`."""
    advantage: Array
    """float32 `[B]`."""
    return_: Array
    """float32 `[B]`."""
    valid: Array
    """bool `[B]`: False in rows that only fill up the batch."""


def batch_shapes(policy: Policy, size: int) -> DecisionBatch:
    """Returns a minibatch of `size` decisions as `jax.ShapeDtypeStruct`s."""
    params = jax.eval_shape(policy.init, jax.random.key(0))
    decision = jax.eval_shape(policy.sample, params, policy.observation_shape(size), jax.random.key(0))
    number, valid = (jax.ShapeDtypeStruct((size,), dtype) for dtype in (jnp.float32, bool))
    observation = policy.observation_shape(size)
    return DecisionBatch(observation, decision.trace, decision.logp, number, number, number, valid)


class PPOBatch(NamedTuple):
    """Decisions of episodes, and the targets of learning from them."""

    observation: Observation
    """NumPy leaves `[E, D, ...]`, views of the states in which decisions were made."""
    decisions: Decisions
    """NumPy leaves `[E, D, ...]`."""
    targets: Targets
    """NumPy leaves `[E, ...]`."""
    advantage: np.ndarray
    """float32 `[E, D]`, whitened over the decisions that exist, all or those of each task; those of a group are not."""
    explained_variance: np.ndarray
    """float32 scalar, share of the returns' variance that the values explain, at the time of acting."""


def episode_targets(
    signals: Signals,
    valid: Array,
    value: Array,
    *,
    spec: TaskSpec,
    shaping: bool,
    gamma: float,
    gae_lambda: float,
    time_limit: TimeLimit,
    terminal_potential: TerminalPotential,
    reward: Reward = "success",
    stop_at_success: bool = True,
    chunk: int = 1,
    chunk_discount: ChunkDiscount = "step",
) -> Targets:
    """Labels one episode, rewards its actions, shapes the reward (5) and estimates advantages (2).

    Args:
        signals: leaves `[N + 1, ...]`.
        valid: bool `[N + 1]` states that exist, a prefix. An episode of fewer than N actions that no success ended was
            cut short, and is bootstrapped from its last value.
        value: float32 `[D + 1]`, `types.Decisions.value`: of the states in which decisions were made, and of the state
            that the last one led to.
        spec: the task.
        shaping: whether GAE sees r' (STA-PPO) or r (PPO).
        gamma: discount factor.
        gae_lambda: lambda of GAE.
        reward: r, see `stages.rewards`.
        stop_at_success: True where the first success ends the episode; False where it goes on to the horizon, and
            actions after the success are discounted like all others.
        time_limit: at the horizon of N actions "bootstrap" from the value of the last state, or "terminate" with
            nothing after it.
        terminal_potential: see `stages.shaping.shape_rewards`.
        chunk: C, actions that one decision executes.
        chunk_discount: "step" discounts by gamma an action, "decision" by gamma a decision and not within it. Shaping
            follows: over a decision it is the decision's discount times the potential at its end, less the potential
            at its beginning.
    """
    separation = separate(spec, signals, valid)
    valid_t, success_t = valid[1:], success_rewards(signals.success, valid) > 0
    reward_t = episode_rewards(reward, spec, signals, separation, valid)
    stops_t = success_t & stop_at_success
    gamma_t, discount_t = _discounts(valid_t, stops_t, gamma, time_limit, chunk, chunk_discount)

    shaped_reward_t = reward_t
    if shaping:
        phi_t = potentials(spec, signals, separation)
        shaped_reward_t = shape_rewards(
            reward_t, phi_t[:-1], phi_t[1:], discount_t, gamma=gamma_t, terminal_potential=terminal_potential
        )
    shaped_reward_t = jnp.where(valid_t, shaped_reward_t, 0.0)
    reward_d, discount_d, valid_d = chunk_rewards(shaped_reward_t, discount_t, valid_t, chunk=chunk)
    is_last_decision = valid_d & ~jnp.append(valid_d[1:], False)
    value = jnp.where(jnp.append(True, valid_d), value, 0.0)
    advantage_d, return_d = gae(
        reward_d, discount_d, value[:-1], value[1:], gae_lambda=gae_lambda, truncated_t=is_last_decision
    )
    return Targets(
        reward_t=reward_t,
        shaped_reward_t=shaped_reward_t,
        advantage_d=jnp.where(valid_d, advantage_d, 0.0),
        return_d=jnp.where(valid_d, return_d, 0.0),
        valid_t=valid_t,
        valid_d=valid_d,
        stage_t=separation.stage_t,
        completed=separation.completed,
        success_t=success_t,
        is_over=valid_t[-1] | stops_t.any(),
    )


def _discounts(
    valid_t: Array, is_terminated: Array, gamma: float, time_limit: str, chunk: int, chunk_discount: str
) -> tuple[Array, Array]:
    """Returns the discount of each action, float32 `[N]`, and the same with 0 where nothing follows."""
    ends_t = is_terminated
    if time_limit == "terminate":
        ends_t = ends_t.at[-1].set(valid_t[-1])
    gamma_t = jnp.full(valid_t.shape, gamma, jnp.float32)
    if chunk_discount == "decision":
        is_last = valid_t & ~jnp.append(valid_t[1:], False)
        gamma_t = jnp.where(is_last | (jnp.arange(len(valid_t)) % chunk == chunk - 1), gamma_t, 1.0)
    return gamma_t, jnp.where(valid_t & ~ends_t, gamma_t, 0.0)


def compile_targets(
    targets_fn: Callable[..., Targets],
    *,
    chunk: int = 1,
    num_steps: int | None = None,
    num_tasks: int = 1,
    advantage: Advantage = "gae",
    group_size: int = 1,
) -> Callable[[Rollout], PPOBatch]:
    """Returns a function that computes the targets of all episodes of a rollout in one compiled call.

    Args:
        targets_fn: (task, signals, valid, value) -> `episode_targets` with its keyword arguments, those of the task.
        chunk: C, actions that one decision executes.
        num_steps: actions of the batch, if it is one of steps: the most episodes there can be. None: as many as there
            are.
        num_tasks: number of tasks whose advantages are whitened apart; 1 whitens all together.
        advantage: see `Advantage`; all decisions of an episode have that over its group.
        group_size: G, episodes in a row that begin alike.
    """

    @jax.jit
    def all_episodes(task, signals, valid, value):
        if advantage != "gae":
            value = jnp.zeros_like(value)  # There is no critic: nothing is subtracted, or added at an end.
        targets = jax.vmap(targets_fn)(task, signals, valid, value)
        explained = explained_variance(value[:, :-1], targets.return_d, targets.valid_d)
        if advantage != "gae":
            # An episode's return is what follows its first decision.
            of_groups = (x[:, 0].reshape(-1, group_size) for x in (targets.return_d, targets.valid_d))
            over_others = jax.vmap(functools.partial(group_advantages, kind=advantage))(*of_groups)
            return targets, jnp.where(targets.valid_d, over_others.reshape(-1, 1), 0.0), explained
        parts = [True] if num_tasks == 1 else [(task == k)[:, None] for k in range(num_tasks)]
        whitened = sum(whiten(targets.advantage_d, targets.valid_d & part) for part in parts)  # 0 outside a part
        return targets, whitened, explained

    def prepare(rollout):
        trajectory, decisions = rollout.trajectory, rollout.trajectory.decisions
        num_episodes, num_decisions = decisions.valid.shape
        # However many episodes make up the steps of a batch, the shapes are those of the most there can be.
        num_rows = num_steps or num_episodes
        inputs = (rollout.task, trajectory.signals, trajectory.valid, decisions.value)
        padding = (0, num_rows - num_episodes)
        padded = jax.tree.map(lambda x: np.pad(x, [padding] + [(0, 0)] * (x.ndim - 1)), inputs)
        results = jax.device_get(all_episodes(*padded))
        observation = jax.tree.map(lambda x: x[:, ::chunk][:, :num_decisions], trajectory.observation)
        return PPOBatch(observation, decisions, *jax.tree.map(lambda x: x[:num_episodes] if x.ndim else x, results))

    return prepare


def minibatches(
    batch: PPOBatch, *, size: int, rng: np.random.Generator, num_epochs: int = 1
) -> Iterator[DecisionBatch]:
    """Yields the decisions of a batch once an epoch, shuffled, in as few minibatches as can be.

    They have equal numbers of decisions, to within one, and are filled up to `size` with rows that are not valid. A
    last, small minibatch would move the policy as far as the others, on a few decisions, and measure the
    KL divergence by them.
    """
    episode, d = np.nonzero(batch.decisions.valid)
    num_parts = math.ceil(len(episode) / size)
    epochs = (np.array_split(rng.permutation(len(episode)), num_parts) for _ in range(num_epochs))
    for chosen in itertools.chain.from_iterable(epochs):
        yield _minibatch(batch, (episode[chosen], d[chosen]), size)


def _minibatch(batch: PPOBatch, at: tuple[np.ndarray, np.ndarray], size: int) -> DecisionBatch:
    """Returns the decisions at indices `[n]` of episodes and decisions, filled up to `size` rows."""
    number, at = len(at[0]), tuple(np.concatenate([x, np.repeat(x[:1], size - len(x))]) for x in at)
    observation, trace = jax.tree.map(lambda x: x[at], (batch.observation, batch.decisions.trace))
    scores = (batch.decisions.logp, batch.decisions.value, batch.advantage, batch.targets.return_d)
    return DecisionBatch(observation, trace, *(x[at] for x in scores), valid=np.arange(size) < number)


def make_rescore(policy: Policy, temperature: float, size: int, microbatch_size: int | None) -> Callable[..., PPOBatch]:
    """Returns (params, batch, mesh) -> the batch scored by these parameters, in parts as large as those of updates."""

    @jax.jit
    def score(params, rows):
        return update.map_rows(
            lambda part: policy.log_prob(params, *part, temperature=temperature).logp, rows, microbatch_size
        )

    score = announce_compiling("compiling the scores of decisions", score)

    def rescore(params, batch, mesh):
        logp, (episode, d) = np.zeros_like(batch.decisions.logp), np.nonzero(batch.decisions.valid)
        for start in range(0, len(episode), size):
            at = episode[start : start + size], d[start : start + size]
            rows = place(_minibatch(batch, at, size)[:2], mesh)
            logp[at] = np.asarray(score(params, rows))[: len(at[0])]
        return batch._replace(decisions=batch.decisions._replace(logp=logp))

    return rescore
