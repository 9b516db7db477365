"""Imitation: supervised fine-tuning on expert actions."""

import dataclasses
from collections.abc import Callable, Iterator

from stare_jax.logging import Interrupted, progress, say
from stare_jax.models.policy import Policy
from stare_jax.sharding.mesh import check_batch_size
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.optimizer import (
    VALUE_PARAMS,
    OptimizerConfig,
    averaged_params,
    frozen_params,
    keep_average,
    make_optimizer,
)
from stare_jax.state.train_state import Run, checkpoint_directory, place, start_phase
from stare_jax.train.step_metrics import StepMetrics
from stare_jax.train.steps import SFTBatch, check_microbatch, jit_step, make_sft_step
from stare_jax.types import Array, Observation, PyTree

PHASE = "sft"


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning; the defaults are the paper's (B.1)."""

    num_steps: int = 30_000
    batch_size: int = 64
    microbatch_size: int | None = None
    """rows in one forward and backward pass; None takes the whole batch."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, freeze=(VALUE_PARAMS,))
    ema_decay: float | None = None
    """of an exponential moving average of the parameters, with which the phase ends, and its last checkpoint; None
    keeps none."""
    seed: int = 0
    """of what the loss draws, such as the noise and the times of flow matching."""
    log_every: int = 20
    """steps."""
    checkpoint_every: int = 1000
    """steps."""
    keep_checkpoints: int = 2

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, expected in (0, 1) or None")
        check_microbatch(self.microbatch_size, self.batch_size, "batch_size")


def train_sft(
    policy: Policy,
    params: PyTree,
    batches: Callable[[int], Iterator[tuple[Observation, Array, Array]]],
    config: SFTConfig,
    run: Run,
) -> PyTree:
    """Trains on batches of expert actions and returns the parameters.

    Args:
        policy: whose `imitation_loss` is minimised.
        params: to start from; not consumed.
        batches: called with the number of steps already taken, returns an iterator over what `SFTBatch` holds, with
            prompts, from there on.
        config: see `SFTConfig`.
        run: see `Run`.

    Raises:
        Interrupted: `run.should_stop` asked for it; a checkpoint has been saved.
        FloatingPointError: the loss is not finite.
    """
    # ---- Set-up -----------------------------------------------------------------------------------------------------
    check_batch_size("batch_size", config.batch_size, run.mesh)
    check_batch_size("microbatch_size", config.microbatch_size, run.mesh)
    tx = keep_average(make_optimizer(config.optimizer, num_steps=config.num_steps), config.ema_decay)
    state, _ = start_phase(PHASE, run, policy, params, tx, config.optimizer)
    step_fn = jit_step(make_sft_step(policy, tx, config), policy, config, state)
    first = int(state.step)
    batch_iterator = batches(first)
    steps = StepMetrics(PHASE, run, batch_size=config.batch_size, unit="frames")

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(config.num_steps - first, PHASE, "step") as bar,
    ):
        for step in range(first + 1, config.num_steps + 1):
            # ---- Update ---------------------------------------------------------------------------------------------
            with steps.clock("data"):
                batch = SFTBatch(*next(batch_iterator))
            with steps.clock("update"):
                state, metrics = step_fn(state, place(batch, run.mesh))
            steps.add(metrics)
            is_stopping, is_last = run.should_stop(), step == config.num_steps

            # ---- Report ---------------------------------------------------------------------------------------------
            is_saving = step % config.checkpoint_every == 0 or is_last or is_stopping
            if step % config.log_every == 0 or is_saving:  # so that nothing unchecked is saved
                num_steps, means = steps.write(step)
                bar.update(num_steps, loss=means["sft/loss"])

            # ---- Save -----------------------------------------------------------------------------------------------
            if is_last and config.ema_decay is not None:
                state = state.replace(params=averaged_params(state, frozen_params(policy, config.optimizer)))
            if is_saving:
                checkpoints.save(step, state, extra={}, norm_stats=run.norm_stats)
            if is_stopping and not is_last:
                raise Interrupted(f"{PHASE}: stopped and saved at step {step} of {config.num_steps}")
    say(f"{PHASE}: {config.num_steps - first} steps | {steps.clock.total_line()}")
    return state.params
