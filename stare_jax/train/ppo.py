"""Interaction: PPO, and STA-PPO, which is PPO on rewards shaped by the potentials of stages."""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.envs.base import VecEnv
from stare_jax.envs.seeds import PPO_SEEDS, first_seed
from stare_jax.logging import Clock, Interrupted, progress, say
from stare_jax.models.policy import Policy
from stare_jax.rollout.collect import Rollout, collect_episodes, policy_act
from stare_jax.sharding.mesh import check_batch_size
from stare_jax.stages import TaskSpec
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.optimizer import OptimizerConfig, frozen_params, make_optimizer, split_params
from stare_jax.state.train_state import Run, check_finite, checkpoint_directory, place, start_phase
from stare_jax.train.compilations import num_compilations
from stare_jax.train.ppo_batch import PPOBatch, make_prepare, minibatches
from stare_jax.train.ppo_metrics import rollout_metrics, update_metrics
from stare_jax.train.steps import check_microbatch, jit_step, make_ppo_step
from stare_jax.types import PyTree, TrainState

PHASE = "ppo"


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO and STA-PPO; the defaults are the paper's (B.3, B.4), or RL4VLA's where the paper is silent."""

    shaping: bool = True
    """True is STA-PPO, False is PPO; which potential is a field of the task's `StageParams`."""
    num_iterations: int = 400
    num_episodes: int = 64
    """episodes of an iteration's batch, all of them whole; not used with `num_steps`."""
    num_steps: int | None = None
    """actions of an iteration's batch; episodes under way at its end are cut short and bootstrapped; None:
    `num_episodes` whole episodes. Below the horizon times the number of environments, no failure is ever seen to its
    end."""
    num_epochs: int = 1
    minibatch_size: int = 160
    """decisions of one optimiser step."""
    microbatch_size: int | None = None
    """decisions in one forward and backward pass; None takes the whole minibatch."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    clip_eps_high: float | None = None
    """upper clip; None: the same."""
    dual_clip: float | None = None
    """bound of the loss of a bad action that has become likelier, in advantages; RLinf uses 3."""
    value_coef: float = 1.0
    value_clip_eps: float | None = None
    huber_delta: float | None = None
    entropy_coef: float = 0.0
    target_kl: float | None = None
    """a minibatch whose approximate KL divergence from the policy that acted is above this ends the iteration."""
    value_warmup_iterations: int = 0
    """iterations at the start in which only the value head moves."""
    kl_coef: float | None = None
    """weight in the loss of the KL divergence from the policy that the phase starts from (`ActionScore.divergence`); 0
    measures it alone, None does neither and keeps no copy of that policy's trained parameters."""
    chunk_discount: str = "step"
    """of policies that decide on several actions at a time: "step" discounts by gamma an action, "decision" by gamma a
    decision, as pi_RL does."""
    time_limit: str = "bootstrap"
    """at the horizon: "bootstrap" from the value of the last state, or "terminate"."""
    terminal_potential: str = "zero"
    """"zero", or "keep" to shape with the real potential of a terminal state."""
    temperature: float = 1.0
    """of the actions that are sampled and scored."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, value_learning_rate=3e-3, max_grad_norm=10.0)
    seed: int = 0
    """of actions, minibatches and episodes (`envs.seeds`)."""
    checkpoint_every: int = 10
    """iterations."""
    keep_checkpoints: int = 2

    def __post_init__(self):
        counts = ("num_iterations", "num_episodes", "num_epochs", "minibatch_size", "checkpoint_every")
        for name in (*counts, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps: got {self.num_steps}, expected >= 1 or None")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected in [0, 1]")
        for name in ("value_coef", "entropy_coef", "kl_coef", "value_warmup_iterations"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        for name in (
            "clip_eps",
            "clip_eps_high",
            "dual_clip",
            "temperature",
            "value_clip_eps",
            "huber_delta",
            "target_kl",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        choices = {
            "time_limit": ("bootstrap", "terminate"),
            "terminal_potential": ("zero", "keep"),
            "chunk_discount": ("step", "decision"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        check_microbatch(self.microbatch_size, self.minibatch_size, "minibatch_size")


def train_ppo(policy: Policy, params: PyTree, env: VecEnv, spec: TaskSpec, config: PPOConfig, run: Run) -> PyTree:
    """Alternates between episodes and updates on them, and returns the parameters.

    Args:
        policy: who acts.
        params: to start from; not consumed.
        env: where; the number of its environments is independent of the size of a batch.
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
    check_batch_size("microbatch_size", config.microbatch_size, run.mesh)
    tx = make_optimizer(config.optimizer, num_steps=None)
    state, saved = start_phase(PHASE, run, policy, params, tx, config.optimizer)
    step_fn = jit_step(make_ppo_step(policy, tx, config), policy, config, state)
    reference = reference_params(policy, params, state, config)
    prepare = make_prepare(spec, config, chunk=policy.chunk)
    counters = _Counters(**saved)
    clock, compiled = Clock(), None

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(config.num_iterations - counters.iteration, PHASE, "iteration") as bar,
    ):
        while counters.iteration < config.num_iterations:
            # ---- Collect --------------------------------------------------------------------------------------------
            rollout = _collect(policy, state.params, env, counters, config, run, clock=clock)
            if not rollout.is_complete:
                _save(checkpoints, state, counters, run)
                raise Interrupted(_stopped(counters, config))

            # ---- Annotate and update --------------------------------------------------------------------------------
            with clock("update"):
                batch = prepare(rollout)
                state, updates = _update(state, batch, step_fn, reference, config, run, counters.iteration)
            check_finite(updates, phase=PHASE, first_step=counters.updates + 1)
            counters = counters.after(rollout, updates)
            compiled = num_compilations() if compiled is None else compiled

            # ---- Report ---------------------------------------------------------------------------------------------
            metrics = _metrics(rollout, batch, updates, spec, config) | {
                "env/steps": counters.env_steps,
                "perf/compilations": num_compilations() - compiled,
                "perf/env_steps_per_s": rollout.num_steps / sum(clock.seconds().values()),
                **{f"time/{area}_s": seconds for area, seconds in clock.seconds().items()},
            }
            run.writer(counters.iteration, metrics, phase=PHASE)
            say(f"{report_line(counters.iteration, metrics, config)} | {clock.line()}")
            bar.update(1, success=metrics["env/success"], kl=metrics["ppo/approx_kl"])
            compiled = num_compilations()
            clock.reset()

            # ---- Save -----------------------------------------------------------------------------------------------
            is_last, is_stopping = counters.iteration == config.num_iterations, run.should_stop()
            if counters.iteration % config.checkpoint_every == 0 or is_last or is_stopping:
                _save(checkpoints, state, counters, run)
            del rollout, batch  # Images of one iteration are enough to hold.
            if is_stopping and not is_last:
                raise Interrupted(_stopped(counters, config))
    return state.params


class _Counters(NamedTuple):
    """How far a run has come; kept in its checkpoints."""

    iteration: int = 0
    env_steps: int = 0
    updates: int = 0
    seeds: int = 0
    """episodes begun; every episode takes the next seed of the run."""

    def after(self, rollout: Rollout, updates: list) -> "_Counters":
        return _Counters(
            self.iteration + 1,
            self.env_steps + rollout.num_steps,
            self.updates + len(updates),
            self.seeds + len(rollout.trajectory.valid),
        )


def _stopped(counters: _Counters, config: PPOConfig) -> str:
    return f"{PHASE}: stopped and saved after {counters.iteration} of {config.num_iterations} iterations"


def _save(checkpoints: Checkpoints, state: TrainState, counters: _Counters, run: Run) -> None:
    checkpoints.save(counters.iteration, state, extra=counters._asdict(), norm_stats=run.norm_stats)


def _collect(
    policy: Policy, params: PyTree, env: VecEnv, counters: _Counters, config: PPOConfig, run: Run, *, clock: Clock
) -> Rollout:
    """Returns the episodes of an iteration; raises RuntimeError where every one was lost."""
    key = jax.random.fold_in(jax.random.key(config.seed), counters.iteration)
    batch_size, unit = (config.num_episodes, "episode") if config.num_steps is None else (config.num_steps, "step")
    with progress(batch_size, "collect", unit) as bar:
        rollout = collect_episodes(
            env,
            policy_act(policy, params, key, temperature=config.temperature),
            first_seed(PPO_SEEDS, config.seed) + counters.seeds + np.arange(batch_size),
            stop_at_success=True,
            max_steps=config.num_steps,
            on_episode=lambda e, row: bar.update(1 if config.num_steps is None else int(row.valid[1:].sum())),
            should_stop=run.should_stop,
            clock=clock,
        )
    if rollout.is_complete and not rollout.trajectory.valid.any():
        number = counters.iteration + 1
        raise RuntimeError(f"{PHASE}: iteration {number} lost all of its {rollout.num_dropped} episodes")
    return rollout


def _metrics(rollout: Rollout, batch: PPOBatch, updates: list, spec: TaskSpec, config: PPOConfig) -> dict[str, float]:
    """Returns what an iteration says about learning."""
    num_decisions = batch.annotation.valid_d.sum()
    return (
        update_metrics(updates, num_decisions=num_decisions, size=config.minibatch_size)
        | rollout_metrics(rollout, batch.annotation, spec, shaping=config.shaping)
        | {"ppo/explained_variance": float(batch.explained_variance), "ppo/num_minibatches": len(updates)}
    )


def reference_params(policy: Policy, params: PyTree, state: TrainState, config: PPOConfig) -> PyTree:
    """Returns the trained parameters of the policy that a phase starts from, where the state's are; None without need.

    Args:
        policy: whose they are.
        params: that the phase starts from.
        state: of the phase.
        config: says whether the divergence from them is asked for.
    """
    if config.kl_coef is None:
        return None
    freeze = frozen_params(policy, config.optimizer)
    (start, _), (now, _) = split_params(params, freeze), split_params(state.params, freeze)
    return jax.device_put(start, jax.tree.map(lambda x: x.sharding, now))


def _update(state, batch: PPOBatch, step_fn, reference: PyTree, config: PPOConfig, run: Run, iteration: int):
    """Returns the state after the epochs of an iteration, and the metrics of every minibatch."""
    train_policy = np.bool_(iteration >= config.value_warmup_iterations)
    fraction_done = np.float32(iteration / config.num_iterations)
    rng = np.random.default_rng((config.seed, iteration))
    epochs = (minibatches(batch, size=config.minibatch_size, rng=rng) for _ in range(config.num_epochs))
    updates = []
    for minibatch in itertools.chain.from_iterable(epochs):
        state, metrics = step_fn(state, place(minibatch, run.mesh), train_policy, fraction_done, reference)
        updates.append(metrics)
        if (config.target_kl is not None and metrics["ppo/stopped"]) or run.should_stop():
            break
    return state, jax.device_get(updates)


def report_line(iteration: int, metrics: dict[str, float], config: PPOConfig) -> str:
    """Returns what a user wants to know about an iteration, on one line."""
    return (
        f"{PHASE} {iteration}/{config.num_iterations}  "
        f"success {metrics['env/num_successes']:.0f}/{metrics['env/num_episodes']:.0f} "
        f"({100 * metrics['env/success']:.0f} %)  return {metrics['env/return_shaped']:.2f}  "
        f"kl {metrics['ppo/approx_kl']:.4f}  clip {metrics['ppo/clip_frac']:.2f}  "
        f"ev {metrics['ppo/explained_variance']:.2f}  entropy {metrics['ppo/entropy']:.2f}  "
        f"{metrics['env/steps']} steps"
    )
