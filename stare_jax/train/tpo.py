"""Preference: TPO on whole trajectories, and STA-TPO stage by stage."""

import dataclasses
import functools
import math

import jax
import numpy as np

from stare_jax.config import ConfigError
from stare_jax.data.windows import window_indices
from stare_jax.logging import Interrupted, progress, say
from stare_jax.models.nn.lora import drop_adapters, keep_adapters
from stare_jax.models.policy import Policy
from stare_jax.sharding.mesh import check_batch_size
from stare_jax.stages import TaskSpec
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.optimizer import VALUE_PARAMS, OptimizerConfig, make_optimizer
from stare_jax.state.train_state import Run, checkpoint_directory, place, start_phase
from stare_jax.train.annotate import action_stages
from stare_jax.train.step_metrics import StepMetrics
from stare_jax.train.steps import PairBatch, ScoredTrajectory, flatten_scores, jit_step, make_tpo_step
from stare_jax.types import Observation, PreferencePair, PyTree, Trajectory

PHASE = "tpo"


@dataclasses.dataclass(frozen=True)
class TPOConfig:
    """TPO and STA-TPO; learning rate and optimiser are the paper's (B.2)."""

    variant: str = "sta_tpo"
    """"sta_tpo" (6), or "tpo" (1)."""
    num_epochs: int = 5
    batch_size: int = 4
    """pairs of one optimiser step."""
    microbatch_size: int | None = None
    """decisions in one forward and backward pass; None takes all of a batch of pairs."""
    beta: float = 0.1
    cost_coef: float = 10.0
    """lambda, weight of the stage costs (STA-TPO)."""
    stage_norm: str = "K"
    """see `losses.sta_tpo_loss`, and likewise below."""
    margin: str = "paper"
    anchor_coef: float = 0.0
    """weight of minus the mean log-probability of what was chosen, which keeps that from falling together with what was
    rejected; the paper has none."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5, freeze=(VALUE_PARAMS,))
    reference: str = "start"
    """whose log-probabilities the policy's are compared with: "start", the policy the phase starts from, adapters
    included; "base", the same with its adapters off. Neither is a second copy of the weights."""
    num_draws: int = 16
    """noises and times at which a flow policy's reference is asked about every decision, once, before the first step;
    policies with a log-probability need none of them."""
    draws_per_step: int = 8
    """of these, how many a step uses; they take turns."""
    reference_batch_size: int = 64
    """decisions that the reference policy scores at a time, once, before the first step."""
    seed: int = 0
    """of the order of pairs."""
    log_every: int = 1
    """steps."""
    checkpoint_every: int = 100
    """steps."""
    keep_checkpoints: int = 2

    def __post_init__(self):
        counts = ("num_epochs", "batch_size", "reference_batch_size", "log_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints", "num_draws", "draws_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(f"microbatch_size: got {self.microbatch_size}, expected >= 1 or None")
        if self.num_draws % self.draws_per_step:
            expected = f"a divisor of num_draws = {self.num_draws}"
            raise ValueError(f"draws_per_step: got {self.draws_per_step}, expected {expected}")
        if not self.beta > 0:
            raise ValueError(f"beta: got {self.beta}, expected > 0")
        for name in ("cost_coef", "anchor_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        choices = {
            "variant": ("sta_tpo", "tpo"),
            "reference": ("start", "base"),
            "stage_norm": ("K", "valid"),
            "margin": ("paper", "offset", "relabel"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")


def train_tpo(
    policy: Policy, params: PyTree, pairs: PreferencePair, spec: TaskSpec, config: TPOConfig, run: Run
) -> PyTree:
    """Trains on preference pairs and returns the parameters.

    Args:
        policy: whose `log_prob` is compared.
        params: to start from, and at the same time the reference policy (`TPOConfig.reference`); not consumed.
        pairs: NumPy leaves `[P, ...]`.
        spec: the task's stages.
        config: see `TPOConfig`.
        run: see `Run`.

    Raises:
        Interrupted: `run.should_stop` asked for it; a checkpoint has been saved.
        FloatingPointError: the loss is not finite.
        ConfigError: the reference is to be the base of a policy that has no adapters.
    """
    # ---- Set-up -----------------------------------------------------------------------------------------------------
    check_batch_size("batch_size", config.batch_size, run.mesh)
    check_batch_size("microbatch_size", config.microbatch_size, run.mesh)
    check_reference(config.reference, params)
    num_pairs = len(pairs.chosen.valid)
    if num_pairs == 0:
        raise ValueError("pairs: got none, expected at least one")
    num_steps = math.ceil(config.num_epochs * num_pairs / config.batch_size)
    tx = make_optimizer(config.optimizer, num_steps=num_steps)
    state, _ = start_phase(PHASE, run, policy, params, tx, config.optimizer)
    step_fn = jit_step(make_tpo_step(policy, tx, config), policy, config, state)
    reference = jax.device_put(params, jax.tree.map(lambda x: x.sharding, state.params))
    reference = drop_adapters(reference) if config.reference == "base" else reference
    sizes = {"batch_size": config.reference_batch_size, "num_draws": config.num_draws}
    scored = score_pairs(policy, reference, pairs, spec, **sizes)
    del reference
    first = int(state.step)
    steps = StepMetrics(PHASE, run, batch_size=config.batch_size, unit="pairs")

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(num_steps - first, PHASE, "step") as bar,
    ):
        for step in range(first + 1, num_steps + 1):
            # ---- Update ---------------------------------------------------------------------------------------------
            with steps.clock("data"):
                rows = pair_indices(step - 1, num_pairs=num_pairs, batch_size=config.batch_size, seed=config.seed)
                batch = jax.tree.map(lambda x, rows=rows: x[rows], scored)
            with steps.clock("update"):
                state, metrics = step_fn(state, place(batch, run.mesh))
            steps.add(metrics)
            is_stopping, is_last = run.should_stop(), step == num_steps

            # ---- Report ---------------------------------------------------------------------------------------------
            is_saving = step % config.checkpoint_every == 0 or is_last or is_stopping
            if step % config.log_every == 0 or is_saving:  # so that nothing unchecked is saved
                num_written, means = steps.write(step)
                bar.update(num_written, loss=means["tpo/loss"], accuracy=means["tpo/accuracy"])

            # ---- Save -----------------------------------------------------------------------------------------------
            if is_saving:
                checkpoints.save(step, state, extra={}, norm_stats=run.norm_stats)
            if is_stopping and not is_last:
                raise Interrupted(f"{PHASE}: stopped and saved at step {step} of {num_steps}")
    say(f"{PHASE}: {num_steps - first} steps | {steps.clock.total_line()}")
    return state.params


def check_reference(reference: str, params: PyTree) -> None:
    """Raises ConfigError where `TPOConfig.reference` is "base" and there are no adapters to switch off."""
    if reference == "base" and not jax.tree.leaves(keep_adapters(params)):
        raise ConfigError("tpo.reference: got 'base', expected 'start' for a policy without adapters (model.lora)")


def pair_indices(step: int, *, num_pairs: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the pairs of one optimiser step, int `[batch_size]`.

    Batches are cut from epochs laid end to end, each a permutation of its own, so that all pairs are seen equally often
    and the step number alone says which come next.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng((seed, e)).permutation(num_pairs) for e in np.unique(position // num_pairs)}
    return np.array([orders[p // num_pairs][p % num_pairs] for p in position])


def score_pairs(
    policy: Policy, params: PyTree, pairs: PreferencePair, spec: TaskSpec, *, batch_size: int, num_draws: int = 1
) -> PairBatch:
    """Computes what stays the same throughout training: reference log-probabilities, stage masks and costs.

    Args:
        policy: of the reference.
        params: of the reference.
        pairs: NumPy leaves `[P, ...]`.
        spec: the task's stages.
        batch_size: decisions scored at a time.
        num_draws: M, estimates of each score where the policy makes estimates.

    Returns:
        NumPy leaves `[P, ...]`.
    """
    stages = jax.jit(jax.vmap(functools.partial(action_stages, spec=spec)))

    @jax.jit
    def score_decisions(params, observation, decision, seed):
        if policy.preference_score is None:
            return policy.log_prob(params, observation, decision).logp[:, None, None]
        return policy.preference_score(params, observation, decision, seed)

    def score(trajectory: Trajectory) -> ScoredTrajectory:
        observation, decision, is_decided = decisions_of(policy, trajectory)
        num_pairs, num_decisions = is_decided.shape
        shape = (num_pairs, num_decisions, 1 if policy.preference_score is None else num_draws)
        seed = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
        scores = np.zeros((*shape, 1 if policy.preference_score is None else policy.chunk), np.float32)
        pair, d = np.nonzero(is_decided)
        for start in range(0, len(pair), batch_size):
            rows = np.arange(start, start + batch_size) % len(pair)
            at = (pair[rows], d[rows])
            inputs = jax.tree.map(lambda x, at=at: x[at], (observation, decision, seed))
            scores[at] = score_decisions(params, *inputs)
        mask, cost, completed = jax.device_get(stages(trajectory.signals, trajectory.valid))
        valid = np.asarray(trajectory.valid)[:, 1:]
        if policy.preference_score is None:
            valid, mask = is_decided, mask[..., :: policy.chunk]
        ref_logp = np.moveaxis(flatten_scores(scores.swapaxes(1, 2), valid.shape[1]), 1, 2)
        return ScoredTrajectory(
            observation, decision, seed, np.ascontiguousarray(ref_logp), valid, mask, cost, completed
        )

    return PairBatch(score(pairs.chosen), score(pairs.rejected))


def decisions_of(policy: Policy, trajectory: Trajectory) -> tuple[Observation, PyTree, np.ndarray]:
    """Returns the decisions of trajectories, as they are to be scored.

    Args:
        policy: that is to score the decisions.
        trajectory: NumPy leaves `[P, ...]`.

    Returns:
        Observations `[P, D, ...]`; `ScoredTrajectory.decision`; bool `[P, D]`, which decisions exist.

    Raises:
        ValueError: log-probabilities are asked of decisions that this policy did not make.
    """
    valid = np.asarray(trajectory.valid)[:, 1:]
    starts = np.arange(0, valid.shape[1], policy.chunk)
    observation = jax.tree.map(lambda x: x[:, starts], trajectory.observation)
    if policy.preference_score is not None:
        index, _ = window_indices(starts, valid.sum(axis=1)[:, None], policy.window)
        return observation, trajectory.action[np.arange(len(valid))[:, None, None], index], valid[:, starts]
    decisions, params = trajectory.decisions, jax.eval_shape(policy.init, jax.random.key(0))
    made = jax.eval_shape(policy.sample, params, policy.observation_shape(1), jax.random.key(0)).trace
    expected = jax.tree.map(lambda x: x.shape[1:], made)
    found = None if decisions is None else jax.tree.map(lambda x: x.shape[2:], decisions.trace)
    if found != expected or decisions.valid.shape[1] != len(starts):
        remedy = "collect them anew with this policy" + ("; model.preference 'flow' does without" * bool(policy.window))
        raise ValueError(f"pairs: got decisions {found}, expected {expected} of the policy that is trained; {remedy}")
    return observation, decisions.trace, np.asarray(decisions.valid)
