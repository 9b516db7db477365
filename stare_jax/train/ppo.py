"""Interaction: PPO, and STA-PPO, which is PPO on rewards shaped by the potentials of stages."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from stare_jax.data.seeds import PPO_SEEDS, first_seed
from stare_jax.envs.base import VecEnv
from stare_jax.logging import Clock, Interrupted, progress, say
from stare_jax.losses import explained_variance, whiten
from stare_jax.models.policy import Policy
from stare_jax.rollout.collect import Rollout, collect_episodes, policy_act
from stare_jax.stages import TaskSpec
from stare_jax.train.annotate import Annotation, annotate_episode
from stare_jax.train.checkpoint import Checkpoints
from stare_jax.train.compilations import num_compilations
from stare_jax.train.optimizer import OptimizerConfig, make_optimizer
from stare_jax.train.sharding import check_batch_size
from stare_jax.train.state import Run, check_finite, checkpoint_directory, place, start_phase
from stare_jax.train.steps import DecisionBatch, check_microbatch, make_ppo_step
from stare_jax.types import PyTree

PHASE = "ppo"


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO and STA-PPO; the defaults are the paper's (B.3, B.4), or RL4VLA's where the paper is silent."""

    shaping: bool = True
    """True is STA-PPO, False is PPO; which potential is a field of the task's `StageParams`."""
    num_iterations: int = 400
    num_episodes: int = 64
    """episodes of an iteration's batch, all of them whole."""
    num_epochs: int = 1
    minibatch_size: int = 160
    """decisions of one optimiser step."""
    microbatch_size: int | None = None
    """decisions in one forward and backward pass; None takes the whole minibatch."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    value_coef: float = 1.0
    value_clip_eps: float | None = None
    huber_delta: float | None = None
    entropy_coef: float = 0.0
    target_kl: float | None = None
    """a minibatch whose approximate KL divergence from the policy that acted is above this ends the iteration."""
    value_warmup_iterations: int = 0
    """iterations at the start in which only the value head moves."""
    time_limit: str = "bootstrap"
    """at the horizon: "bootstrap" from the value of the last state, or "terminate"."""
    terminal_potential: str = "zero"
    """"zero", or "keep" to shape with the real potential of a terminal state."""
    temperature: float = 1.0
    """of the actions that are sampled and scored."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, value_learning_rate=3e-3, max_grad_norm=10.0)
    seed: int = 0
    """of actions, minibatches and episodes (`data.seeds`)."""
    checkpoint_every: int = 10
    """iterations."""
    keep_checkpoints: int = 2

    def __post_init__(self):
        counts = ("num_iterations", "num_episodes", "num_epochs", "minibatch_size", "checkpoint_every")
        for name in (*counts, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected in [0, 1]")
        for name in ("value_coef", "entropy_coef", "value_warmup_iterations"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        for name in ("clip_eps", "temperature", "value_clip_eps", "huber_delta", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        for name, allowed in (("time_limit", ("bootstrap", "terminate")), ("terminal_potential", ("zero", "keep"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        check_microbatch(self.microbatch_size, self.minibatch_size, "minibatch_size")


def train_ppo(policy: Policy, params: PyTree, env: VecEnv, spec: TaskSpec, config: PPOConfig, run: Run) -> PyTree:
    """Alternates between whole episodes and updates on them, and returns the parameters.

    Args:
        policy: who acts.
        params: to start from; not consumed.
        env: where; the number of its environments is independent of `config.num_episodes`.
        spec: the task's stages.
        config: see `PPOConfig`.
        run: see `Run`.

    Raises:
        Interrupted: `run.should_stop` asked for it; a checkpoint has been saved. A batch that was being collected is
            collected again when the run goes on; an update that was under way counts as done.
        FloatingPointError: the loss is not finite.
    """
    # ---- Set-up -----------------------------------------------------------------------------------------------------
    check_batch_size("minibatch_size", config.minibatch_size, run.mesh)
    num_minibatches = config.num_epochs * math.ceil(config.num_episodes * env.horizon / config.minibatch_size)
    tx = make_optimizer(config.optimizer, num_steps=config.num_iterations * num_minibatches)
    state, counters = start_phase(
        PHASE, run, params, tx, rules=policy.sharding_rules, freeze=config.optimizer.freeze
    )
    step_fn = jax.jit(make_ppo_step(policy, tx, config), donate_argnums=0)
    annotate = jax.jit(make_annotate(spec, config))
    seeds = first_seed(PPO_SEEDS, config.seed) + np.arange(config.num_episodes)
    first, num_env_steps = counters.get("iteration", 0), counters.get("env_steps", 0)
    clock, compiled = Clock(), None

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(config.num_iterations - first, PHASE, "iteration") as bar,
    ):

        def save(iteration):
            extra = {"iteration": iteration, "env_steps": num_env_steps}
            checkpoints.save(iteration, state, extra=extra, norm_stats=run.norm_stats)

        for iteration in range(first, config.num_iterations):
            # ---- Collect --------------------------------------------------------------------------------------------
            key = jax.random.fold_in(jax.random.key(config.seed), iteration)
            with progress(config.num_episodes, "collect", "episode") as episodes:
                rollout = collect_episodes(
                    env,
                    policy_act(policy, state.params, key, temperature=config.temperature),
                    seeds + iteration * config.num_episodes,
                    stop_at_success=True,
                    on_episode=lambda e, trajectory, episodes=episodes: episodes.update(1),
                    should_stop=run.should_stop,
                    clock=clock,
                )
            if not rollout.is_complete:
                save(iteration)
                raise Interrupted(f"{PHASE}: stopped and saved after {iteration} of {config.num_iterations} iterations")
            num_env_steps += rollout.num_steps

            # ---- Annotate and update --------------------------------------------------------------------------------
            train_policy = np.bool_(iteration >= config.value_warmup_iterations)
            pending = []
            with clock("update"):
                trajectory = rollout.trajectory
                annotation, advantage = jax.device_get(
                    annotate(trajectory.signals, trajectory.valid, trajectory.value)
                )
                order = np.random.default_rng((config.seed, iteration))
                for batch in minibatches(rollout, annotation, advantage, config, order):
                    state, metrics = step_fn(state, place(batch, run.mesh), train_policy)
                    pending.append(metrics)
                    is_stopped = config.target_kl is not None and bool(metrics["ppo/stopped"])
                    if is_stopped or run.should_stop():
                        break
                pending = jax.device_get(pending)

            # ---- Report ---------------------------------------------------------------------------------------------
            check_finite(
                [m["ppo/loss"] for m in pending], phase=f"{PHASE} iteration {iteration + 1}", first_step=1
            )
            metrics = {name: float(np.mean([m[name] for m in pending])) for name in pending[0]} if pending else {}
            compiled = num_compilations() if compiled is None else compiled
            metrics |= rollout_metrics(rollout, annotation, spec) | {
                "env/steps": num_env_steps,
                "ppo/num_minibatches": len(pending),
                "perf/compilations": num_compilations() - compiled,
                "perf/env_steps_per_s": rollout.num_steps / sum(clock.seconds().values()),
                **{f"time/{area}_s": seconds for area, seconds in clock.seconds().items()},
            }
            run.writer(iteration + 1, metrics, phase=PHASE)
            say(report_line(iteration + 1, metrics, config) + " | " + clock.line())
            bar.update(1, success=metrics["env/success"], kl=metrics.get("ppo/approx_kl", 0.0))
            compiled = num_compilations()
            clock.reset()

            # ---- Save -----------------------------------------------------------------------------------------------
            is_last = iteration + 1 == config.num_iterations
            if (iteration + 1) % config.checkpoint_every == 0 or is_last or run.should_stop():
                save(iteration + 1)
            if run.should_stop() and not is_last:
                raise Interrupted(
                    f"{PHASE}: stopped and saved after {iteration + 1} of {config.num_iterations} iterations"
                )
    return state.params
