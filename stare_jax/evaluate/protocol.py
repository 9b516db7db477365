"""How a policy is judged: whole episodes on named seeds, success at the end and at any step, stage by stage."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from stare_jax.envs.base import VecEnv
from stare_jax.envs.seeds import EVALUATION_SEEDS, REGION_SIZE
from stare_jax.logging import Interrupted, progress
from stare_jax.models.policy import Policy
from stare_jax.rollout.collect import Act, Rollout, collect_episodes, policy_act
from stare_jax.stages import TaskSpec, separate, stage_mask
from stare_jax.types import Array, PyTree, Signals, Trajectory

START_TOLERANCE = 1e-4
"""metres, or units of a quaternion: initial states nearer than this are the same start."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Which episodes an evaluation consists of and how actions are decoded."""

    num_episodes: int = 100
    """0, without seeds below, is no evaluation: where there is no simulator of what was learnt."""
    first_seed: int = EVALUATION_SEEDS
    """episodes use the seeds first_seed, first_seed + 1, ..."""
    seeds: tuple[int, ...] = ()
    """if not empty, exactly these instead."""
    temperature: float = 0.0
    """of the action distribution; 0 is greedy, up to the noise that a flow starts from, which is drawn by tick and
    environment: equal numbers of environments draw alike."""
    num_videos: int = 4
    """episodes to film, half of them successes and half failures where there are enough of both."""

    def __post_init__(self):
        if self.num_episodes < 0:
            raise ValueError(f"num_episodes: got {self.num_episodes}, expected at least 0")
        if self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}, expected at least 0")
        if self.num_videos < 0:
            raise ValueError(f"num_videos: got {self.num_videos}, expected at least 0")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got repeated seeds in {self.seeds}, expected each once")
        outside = [s for s in episode_seeds(self) if not 0 <= s - EVALUATION_SEEDS < REGION_SIZE]
        if outside:
            raise ValueError(f"seeds: got {outside[0]}, expected one of the evaluation region: nobody trains there")


def episode_seeds(config: EvalConfig) -> list[int]:
    """Returns the seeds of the episodes, in order."""
    return list(config.seeds) or list(range(config.first_seed, config.first_seed + config.num_episodes))


class Episodes(NamedTuple):
    """What each of `E` episodes came to; NumPy arrays. T is the number of states up to the horizon, K of stages."""

    seed: Array
    """int64 `[E]`."""
    start: Array
    """int32 `[E]`: index of the first episode that began in the same state; its own where it is the first."""
    valid: Array
    """bool `[E]`: False where the simulator died; all else in that row means nothing."""
    success_end: Array
    """bool `[E]`: success in the last state of the episode."""
    success_once: Array
    """bool `[E]`: success in some state."""
    success_at: Array
    """int32 `[E]`: first state with success, T where none."""
    grasped: Array
    """bool `[E]`: the object was held in some state."""
    contacted: Array
    """bool `[E]`: the robot touched the object at some time."""
    stage_reached: Array
    """int32 `[E]`: label of the last state, in [0, K)."""
    completed: Array
    """bool `[E, K]`."""
    entered_at: Array
    """int32 `[E, K]`: first state with the label, T where none."""
    stage_len: Array
    """int32 `[E, K]`: number of states with the label."""


class EvalInfo(NamedTuple):
    """What the episodes are episodes of."""

    env_id: str
    stage_names: tuple[str, ...]
    horizon: int
    temperature: float
    num_steps: int
    """actions executed, those of dropped episodes included."""
    wall_s: float


class Evaluation(NamedTuple):
    info: EvalInfo
    episodes: Episodes


def evaluate(
    policy: Policy,
    params: PyTree,
    env: VecEnv,
    spec: TaskSpec,
    config: EvalConfig,
    *,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    **collect_args: Any,
) -> tuple[Evaluation, Rollout]:
    """Runs a policy to the horizon on the config's seeds; see `evaluate_act`.

    Args:
        policy: who acts, at the config's temperature.
        params: its parameters.
        env: B environments; episodes are handed out among them.
        spec: the task's stages.
        config: which episodes.
        key: consumed; of no effect at temperature 0.
        mesh: devices that act; None takes those of the parameters.
        **collect_args: desc, should_stop, clock of `evaluate_act`.
    """
    key = jax.random.key(0) if key is None else key
    act = policy_act(policy, params, key, temperature=config.temperature, mesh=mesh)
    return evaluate_act(act, env, spec, config, **collect_args)


def evaluate_act(
    act: Act,
    env: VecEnv,
    spec: TaskSpec,
    config: EvalConfig,
    *,
    desc: str = "evaluate",
    should_stop: Callable[[], bool] | None = None,
    clock: Callable | None = None,
) -> tuple[Evaluation, Rollout]:
    """Runs whoever acts (a policy, an expert) to the horizon, success or not, from reproducible resets.

    Args:
        act: observations and signals to decisions, see `rollout.collect.Act`.
        env: B environments.
        spec: the task's stages.
        config: which episodes; images are kept only if some of them are to be filmed.
        desc: what the progress line says.
        should_stop: polled every tick.
        clock: charged with the time in the simulator and in `act`.

    Returns:
        what the episodes came to, and the episodes themselves.

    Raises:
        Interrupted: `should_stop` answered True.
    """
    seeds = episode_seeds(config)
    start = time.monotonic()
    num_done = num_successes = 0
    with progress(len(seeds), desc, "episode") as bar:

        def on_episode(index: int, trajectory: Trajectory) -> None:
            nonlocal num_done, num_successes
            num_done += 1
            num_successes += bool((trajectory.signals.success & trajectory.valid).any())
            bar.update(1, success=num_successes / num_done)

        rollout = collect_episodes(
            env,
            act,
            seeds,
            stop_at_success=False,
            reproducible=True,
            on_episode=on_episode,
            should_stop=should_stop,
            clock=clock,
            keep_images=config.num_videos > 0,
        )
    if not rollout.is_complete:
        raise Interrupted(f"{desc}: stopped after {num_done} of {len(seeds)} episodes")
    wall_s = time.monotonic() - start
    info = EvalInfo(env.env_id, spec.stage_names, env.horizon, config.temperature, rollout.num_steps, wall_s)
    trajectory = rollout.trajectory
    return Evaluation(info, measure(spec, trajectory.signals, trajectory.valid, seeds)), rollout


def measure(spec: TaskSpec, signals: Signals, valid: Array, seeds: Sequence[int]) -> Episodes:
    """Returns what episodes came to.

    Args:
        spec: the task, K stages.
        signals: leaves `[E, T, ...]`.
        valid: bool `[E, T]`, a prefix of each row.
        seeds: the E seeds.
    """
    valid = np.asarray(valid)
    separation, masks = jax.device_get(_separate_batch(spec)(signals, valid))
    rows, last = np.arange(len(valid)), np.maximum(valid.sum(axis=1) - 1, 0)
    success = np.asarray(signals.success) & valid
    success_once = success.any(axis=1)
    return Episodes(
        seed=np.asarray(seeds, np.int64),
        start=_same_starts(signals),
        valid=valid[:, 0],
        success_end=success[rows, last],
        success_once=success_once,
        success_at=np.where(success_once, success.argmax(axis=1), valid.shape[1]).astype(np.int32),
        grasped=(np.asarray(signals.is_grasped) & valid).any(axis=1),
        contacted=(np.asarray(signals.is_contact) & valid).any(axis=1),
        stage_reached=separation.stage_t[rows, last],
        completed=separation.completed,
        entered_at=separation.entered_at,
        stage_len=masks.sum(axis=-1, dtype=np.int32),
    )


@functools.lru_cache(maxsize=16)
def _separate_batch(spec: TaskSpec) -> Callable:
    def separate_one(signals, valid):
        separation = separate(spec, signals, valid)
        return separation, stage_mask(separation, len(spec.stage_names), valid)

    return jax.jit(jax.vmap(separate_one))


def _same_starts(signals: Signals) -> np.ndarray:
    fields = (signals.tcp_pos, signals.tcp_quat, signals.obj_pos, signals.obj_quat, signals.goal_pos)
    first = np.concatenate([np.asarray(field)[:, 0] for field in fields], axis=-1)
    is_near = np.abs(first[:, None] - first[None]).max(axis=-1) < START_TOLERANCE
    return is_near.argmax(axis=1).astype(np.int32)
