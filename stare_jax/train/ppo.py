"""Interaction: PPO, and STA-PPO, which is PPO on rewards shaped by the potentials of stages."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from stare_jax import targets
from stare_jax.config import Count, Fraction, Natural, NonNegative, Positive, Seed, check_fields
from stare_jax.documents import check_record
from stare_jax.envs.base import VecEnv
from stare_jax.envs.experts.base import Expert
from stare_jax.envs.seeds import phase_key
from stare_jax.logging import Interrupted, Window, progress, say
from stare_jax.losses import Ratio, ppo_loss, reference_penalty
from stare_jax.models.policy import Policy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.jump_start import JumpStartConfig, lead
from stare_jax.rollout.validation import Best, ValidationConfig, check_best, validate
from stare_jax.sharding import arrays
from stare_jax.sharding.mesh import check_batch_size, check_shares
from stare_jax.sharding.microbatch import check_microbatch
from stare_jax.stages import Reward, TaskSpec, TerminalPotential, TimeLimit, check_ends
from stare_jax.stages.several import TaskSpecs, as_specs, by_task
from stare_jax.state import optimizer
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.contexts import plan_contexts, score_rows
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer, merge_params, without_critic
from stare_jax.state.train_state import TrainState, copy_trainable
from stare_jax.train import ppo_batch, update
from stare_jax.train.loop import Run, checkpoint_directory, next_turn, save, start_phase
from stare_jax.train.ppo_metrics import iteration_metrics, report_line, warn_of_rounding
from stare_jax.types import PyTree

PHASE = "ppo"


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO and STA-PPO; the defaults are the paper's (B.3, B.4), or RL4VLA's where the paper is silent."""

    shaping: bool = True
    """True is STA-PPO, False is PPO; the potential is chosen by the task's `StageParams`."""
    reward: Reward = "success"
    """reward before shaping, see `stages.rewards`."""
    stop_at_success: bool = True
    """True ends an episode at its first success; False plays it to the horizon."""
    num_iterations: Count = 400
    """batches of episodes, each followed by updates on it."""
    num_episodes: Count = 64
    """episodes of an iteration's batch, all of them whole; not used with `num_steps`."""
    num_steps: Count | None = None
    """actions of a batch, whose last episodes are cut short and bootstrapped; None: whole episodes, `num_episodes` of
    them. Below the horizon times the number of environments, no failure is ever seen to its end."""
    num_epochs: Count = 1
    """passes over a batch."""
    minibatch_size: Count = 160
    """decisions of one optimiser step."""
    microbatch_size: Count | None = None
    """decisions in one forward and backward pass; None takes the whole minibatch."""
    gamma: Fraction = 0.99
    """discount of rewards and potentials, an action or a decision (`chunk_discount`)."""
    advantage: ppo_batch.Advantage = "gae"
    """"gae", over the critic; "grpo" or "rloo", of an episode's return over those of its group: the critic is frozen,
    and nothing is whitened (`losses.group_advantages`)."""
    group_size: Count = 1
    """episodes of each start, one after the other, of which `num_episodes` is a multiple."""
    gae_lambda: Fraction = 0.95
    """decay of generalised advantage estimation."""
    clip_eps: Positive = 0.2
    """distance from 1 at which ratios are clipped."""
    clip_eps_high: Positive | None = None
    """upper clip; None: the same."""
    dual_clip: Positive | None = None
    """bound of the loss of a bad action that has become likelier, in advantages; RLinf uses 3."""
    ratio: Ratio = "decision"
    """ratio that is clipped: of a whole "decision"; of each "token", or step of a flow; or "mean", the decision's with
    its logarithm divided by the number of terms, as RLinf tempers flows."""
    context_gb: NonNegative = 0.0
    """memory in GB, on all devices together, for the contexts of an iteration's decisions (`Policy.encode`). Where they
    fit, the actor keeps those that it makes; where those of decisions alone fit, and not of idle environments, they are
    computed once an iteration; and otherwise in every epoch."""
    rescore: bool | None = None
    """True computes log-probabilities of the rollout again, rounded as those of the updates, so that ratios begin at 1;
    None: where the network computes in less than float32."""
    value_coef: NonNegative = 1.0
    """weight of the value's error in the loss."""
    value_clip_eps: Positive | None = None
    """clip of the value's change from that of the rollout; None: no clip."""
    huber_delta: Positive | None = None
    """error of the value at which its loss becomes linear; None: a squared error."""
    entropy_coef: NonNegative = 0.0
    """weight of the entropy bonus in the loss."""
    target_kl: Positive | None = None
    """a minibatch whose approximate KL divergence from the policy that acted is above this ends the iteration."""
    value_warmup_iterations: Natural = 0
    """iterations at the start in which only the value head moves."""
    kl_coef: NonNegative | None = None
    """weight in the loss of the KL divergence from the policy that the phase starts from (`ActionScore.divergence`); 0
    measures it alone, None does neither and keeps no copy of that policy's trained parameters."""
    chunk_discount: targets.ChunkDiscount = "step"
    """discount of chunks of actions: "step", gamma an action; "decision", gamma a decision, as pi_RL does."""
    time_limit: TimeLimit = "terminate"
    """end of an episode at the horizon: "terminate", or "bootstrap" from the value of the last state."""
    terminal_potential: TerminalPotential = "keep"
    """potential after which nothing follows: "keep" its own, or "zero"."""
    whiten_over: ppo_batch.WhitenOver = "all"
    """decisions among which advantages are whitened: "all" of a batch, or those of each "task" or "stage"."""
    temperature: Positive = 1.0
    """temperature of the actions that are sampled and scored."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, value_learning_rate=3e-3, max_grad_norm=10.0)
    seed: Seed = 0
    """seed of actions, minibatches and episodes (`envs.seeds`)."""
    jump_start: JumpStartConfig = JumpStartConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint_every: Count = 10
    """iterations."""
    keep_checkpoints: Count = 2
    """newest checkpoints that are kept, beside the best if `validation.keep_best`."""

    def __post_init__(self):
        check_fields(self)
        check_microbatch(self.microbatch_size, self.minibatch_size, "minibatch_size")
        check_best(self.validation, self.checkpoint_every)
        if self.shaping:
            check_ends(self.terminal_potential, self.time_limit)
        if self.num_episodes % self.group_size or (self.group_size > 1 and self.num_steps is not None):
            expected = f"a divisor of num_episodes = {self.num_episodes}, or 1 with num_steps"
            raise ValueError(f"group_size: got {self.group_size}, expected {expected}")
        if self.advantage != "gae":
            for name, is_wrong, expected in (
                ("group_size", self.group_size < 2, "at least 2"),
                ("time_limit", self.time_limit != "terminate", "'terminate'"),
                ("value_warmup_iterations", self.value_warmup_iterations > 0, "0"),
                ("jump_start", self.jump_start.fraction > 0, "none"),
            ):
                if is_wrong:
                    got = f"{name}: got {getattr(self, name)!r}, expected {expected}"
                    raise ValueError(f"{got} without a critic (advantage = {self.advantage!r})")
            object.__setattr__(self, "optimizer", without_critic(self.optimizer))


# ---- Batch: `ppo_batch.DecisionBatch` -------------------------------------------------------------------------------
def make_prepare(spec: TaskSpecs, config: PPOConfig, *, chunk: int = 1) -> Callable[..., ppo_batch.PPOBatch]:
    """Returns the function that computes rewards and advantages of a rollout whose decisions are on `chunk` actions."""
    targets_fn = by_task(spec, lambda one, *episode: make_targets_fn(one, config, chunk=chunk)(*episode))
    return ppo_batch.compile_targets(
        targets_fn,
        chunk=chunk,
        num_steps=config.num_steps,
        whiten_over=config.whiten_over,
        num_parts={"all": 1, "task": len(as_specs(spec)), "stage": as_specs(spec)[0].num_stages}[config.whiten_over],
        advantage=config.advantage,
        group_size=config.group_size,
    )


def make_targets_fn(spec: TaskSpec, config: PPOConfig, *, chunk: int = 1) -> Callable[..., targets.Targets]:
    """Returns `targets.episode_targets` of signals, valid and value with the settings of a configuration."""
    return functools.partial(
        targets.episode_targets,
        spec=spec,
        shaping=config.shaping,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda if config.advantage == "gae" else 1.0,
        time_limit=config.time_limit,
        terminal_potential=config.terminal_potential,
        reward=config.reward,
        stop_at_success=config.stop_at_success,
        chunk=chunk,
        chunk_discount=config.chunk_discount,
    )


# ---- Step -----------------------------------------------------------------------------------------------------------
def make_ppo_step(
    policy: Policy, tx: optax.GradientTransformationExtraArgs, config: PPOConfig
) -> Callable[..., tuple[TrainState, update.Metrics]]:
    """Returns the step (2): (state, batch, train_policy, fraction_done, reference, contexts) -> (state, metrics).

    Where the approximate KL divergence of the batch is above `config.target_kl` the step changes nothing and says so in
    `ppo/stopped`. `train_policy` False moves the value head alone. `fraction_done`, of all iterations, is the time of
    `config.optimizer.schedule`; the optimiser itself has none. `reference` are the trained parameters of the policy
    that the loss may keep to, None where `config.kl_coef` is; `contexts` are `PPOBatch.contexts`.
    """

    def loss_fn(params, batch, reference, frozen, contexts):
        score = score_rows(policy, contexts, batch.row)(
            params,
            batch.observation,
            batch.trace,
            temperature=config.temperature,
            reference_params=None if config.kl_coef is None else merge_params(reference, frozen),
        )
        loss, metrics = ppo_loss(
            score.logp,
            batch.old_logp,
            batch.advantage,
            score.value,
            batch.old_value,
            batch.return_,
            score.entropy,
            batch.valid,
            clip_eps=config.clip_eps,
            clip_eps_high=config.clip_eps_high,
            dual_clip=config.dual_clip,
            value_coef=config.value_coef if config.advantage == "gae" else 0.0,
            value_clip_eps=config.value_clip_eps,
            huber_delta=config.huber_delta,
            entropy_coef=config.entropy_coef,
            ratio=config.ratio,
            num_fixed_terms=policy.num_fixed_terms,
        )
        if config.kl_coef is None:
            return loss, metrics
        penalty, penalty_metrics = reference_penalty(score.divergence, batch.valid, kl_coef=config.kl_coef)
        return loss + penalty, metrics | penalty_metrics | {"ppo/loss": loss + penalty}

    def step(state, batch, train_policy, fraction_done, reference=None, contexts=None):
        loss = functools.partial(loss_fn, reference=reference, frozen=state.frozen, contexts=contexts)
        weight = batch.valid.astype(jnp.float32)
        grads, metrics = update.loss_gradients(loss, state, batch, weight, config.microbatch_size)
        is_far = metrics["ppo/approx_kl"] > (jnp.inf if config.target_kl is None else config.target_kl)
        scale = jnp.float32(optimizer.decay_schedule(config.optimizer.schedule, 1.0, 1.0)(fraction_done))

        def move(state):
            return update.apply_gradients(state, grads, tx, scale=scale, train_policy=train_policy)

        state = jax.lax.cond(is_far, lambda state: state, move, state)
        return state, metrics | {"ppo/stopped": is_far.astype(jnp.float32), "ppo/lr_scale": scale}

    return step


def check_mesh(config: PPOConfig, mesh: AbstractMesh) -> None:
    """Raises ShardingError where the mesh does not divide a minibatch, or its hosts do not the episodes."""
    check_batch_size("ppo.minibatch_size", config.minibatch_size, mesh)
    check_batch_size("ppo.microbatch_size", config.microbatch_size, mesh)
    name = "num_episodes" if config.num_steps is None else "num_steps"
    check_shares(f"ppo.{name}", getattr(config, name), config.group_size, mesh)


# ---- Loop -----------------------------------------------------------------------------------------------------------
def train_ppo(
    policy: Policy,
    params: PyTree,
    env: VecEnv,
    spec: TaskSpecs,
    config: PPOConfig,
    run: Run,
    experts: Sequence[Expert] = (),
) -> PyTree:
    """Alternates between episodes and updates on them, and returns the parameters.

    Args:
        policy: policy that acts and is trained.
        params: parameters to start from; consumed.
        env: simulators; the number of environments is independent of the size of a batch.
        spec: the task's stages; of several tasks all, in the order of the environments' tasks. They take
            turns, so that a batch of episodes has as many of each, to within one.
        config: see `PPOConfig`.
        run: see `Run`.
        experts: one a task, for `config.jump_start` alone.

    Raises:
        Interrupted: `run.should_stop` asked for it; a checkpoint has been saved. A batch that was being collected is
            collected again when the run goes on; an update that was under way has been finished.
        FloatingPointError: the loss is not finite.
        SimulatorError, CheckpointError: every episode of an iteration was lost; see `loop.start_phase`.
    """
    # ---- Set-up -----------------------------------------------------------------------------------------------------
    check_mesh(config, run.mesh)
    tx = make_optimizer(config.optimizer, num_steps=None)
    reference = None if config.kl_coef is None else copy_trainable(policy, params, config.optimizer, run.mesh)
    state, saved = start_phase(PHASE, run, policy, params, tx, config.optimizer)
    del params
    step_fn = update.jit_step(make_ppo_step(policy, tx, config), state)
    prepare, is_warned = make_prepare(spec, config, chunk=policy.chunk), False
    kept = plan_contexts(policy, config, env.horizon, [group.num_envs for group in env.groups], run.mesh)
    encode = ppo_batch.make_encode(policy, kept, config.microbatch_size or config.minibatch_size)
    rescore = ppo_batch.make_rescore(policy, config.temperature, config.minibatch_size, config.microbatch_size)
    is_rescoring = policy.compute_dtype != "float32" if config.rescore is None else config.rescore
    led = lead(env, spec, experts, config.jump_start, chunk=policy.chunk)
    counters = check_record(ppo_batch.Counters, saved, str(checkpoint_directory(run, PHASE)), path="counters")
    best = check_record(Best, saved, str(checkpoint_directory(run, PHASE)), path="counters")
    window = Window(PHASE, run.writer, num_steps=int(state.step))
    stopped = f"{PHASE}: stopped and saved after {{}} of {config.num_iterations} iterations"

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(config.num_iterations, PHASE, "iteration", initial=counters.iteration) as bar,
    ):
        while counters.iteration < config.num_iterations:
            # ---- Collect --------------------------------------------------------------------------------------------
            key = jax.random.fold_in(phase_key(config.seed, PHASE), counters.iteration)
            acting = functools.partial(policy_act, policy, arrays.on_host(state.params))
            rates = validate(
                acting, env, spec, config.validation, counters.iteration, config.seed, run.should_stop, window.clock
            )
            best = best.after(counters.iteration, rates) if config.validation.keep_best else best
            store = ppo_batch.make_store(kept, run.mesh)
            rollout, whole, after = ppo_batch.collect(  # An actor with a name would keep what it prepared.
                acting(key, temperature=config.temperature, keep=store), led, spec, counters, config, run, window
            )
            if not whole.is_complete:
                save(checkpoints, counters.iteration, state, run, counters._asdict() | best.kept)
                raise Interrupted(stopped.format(counters.iteration))
            del acting

            # ---- Targets and updates; a stop waits for them ---------------------------------------------------------
            train_policy = np.bool_(counters.iteration >= config.value_warmup_iterations)
            fraction_done = np.float32(counters.iteration / config.num_iterations)
            rng = np.random.default_rng((config.seed, counters.iteration))
            with window.clock("update"):
                batch = encode(state.params, prepare(rollout, whole), run.mesh, store)
                batch = rescore(state.params, batch, run.mesh) if is_rescoring else batch
                epochs = ppo_batch.minibatches(batch, size=config.minibatch_size, rng=rng, num_epochs=config.num_epochs)
                for minibatch in epochs:
                    placed = arrays.to_mesh(minibatch, run.mesh)
                    with run.profiler.step(PHASE, counters.iteration):
                        state, metrics = step_fn(state, placed, train_policy, fraction_done, reference, batch.contexts)
                    window.add(metrics)
                    if config.target_kl is not None and metrics["ppo/stopped"]:
                        break
            updates, counters = window.read(state.trainable), after
            turn = next_turn(run, counters.iteration, config.num_iterations, checkpoint_every=config.checkpoint_every)

            metrics = rates | {"env/steps": counters.env_steps}
            metrics |= iteration_metrics(whole, batch, updates, spec, config.minibatch_size, config.shaping)
            say(f"{report_line(counters.iteration, config.num_iterations, metrics)} | {window.clock.line()}")
            is_warned = warn_of_rounding(metrics, is_warned=is_warned)
            window.write(counters.iteration, metrics, env_steps=whole.num_steps)
            bar.update(1, success=metrics["env/success"], kl=metrics["ppo/approx_kl"])

            if turn.is_saving:
                save(checkpoints, counters.iteration, state, run, counters._asdict() | best.kept)
            del rollout, whole, batch, epochs  # Images and contexts of one iteration are enough to hold.
            if turn.is_stopping:
                raise Interrupted(stopped.format(counters.iteration))
    return state.result
