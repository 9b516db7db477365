"""Evaluation of a policy: whole episodes on named seeds, measured one by one, in parts, so that it can be resumed."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from annotated_types import Interval
from jax.sharding import Mesh

from stare_jax.config import Natural, NonNegative, check_fields, to_dict
from stare_jax.envs.base import VecEnv
from stare_jax.envs.seeds import EVALUATION_SEEDS, REGION_SIZE, SLOT_SIZE
from stare_jax.evaluate.episodes import Episodes, initial_states, join_episodes, measure
from stare_jax.evaluate.films import Film, FilmShelf, film_of
from stare_jax.evaluate.parts import NOTHING_DONE, PartsDone, load_parts, save_parts, split_into_parts
from stare_jax.logging import Clock, Interrupted, progress
from stare_jax.models.policy import Policy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import Rollout, collect_episodes
from stare_jax.rollout.decisions import Act
from stare_jax.rollout.prepared import prepare_params
from stare_jax.rollout.rounds import collect_round
from stare_jax.sharding import pod
from stare_jax.stages import TaskSpecs, as_specs, shared_stage_names, take_turns
from stare_jax.types import PyTree, Trajectory

ActOf = Callable[[int], Act]
"""(number of a part, from 0) -> who acts in it; the same part gets the same actions, also after an interruption."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Episodes of an evaluation, and the temperature of the actions."""

    num_episodes: Annotated[int, Interval(ge=0, le=SLOT_SIZE)] = 100
    """Number of episodes, of each task where there are several; 0, with no seeds below, switches evaluation off, as for
    data without a simulator."""
    first_seed: Natural = EVALUATION_SEEDS
    """Seed of the first episode; the others use the seeds first_seed + 1, first_seed + 2, ..."""
    seeds: tuple[Natural, ...] = ()
    """Seeds of the episodes; they replace the two fields above, unless empty."""
    temperature: NonNegative = 0.0
    """Temperature of the action distribution; 0 is greedy, for tokens as `model.greedy` says. A flow still starts from
    noise, which is drawn by tick and environment, so that equal numbers of environments draw the same."""
    num_videos: Natural = 4
    """Number of episodes to film, half of them successes and half failures where there are enough of both."""

    def __post_init__(self):
        check_fields(self)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got repeated seeds in {self.seeds}, expected each once")
        outside = [s for s in episode_seeds(self) if not 0 <= s - EVALUATION_SEEDS < REGION_SIZE]
        if outside:
            region = f"[{EVALUATION_SEEDS}, {EVALUATION_SEEDS + REGION_SIZE}), in which no phase trains"
            raise ValueError(f"seeds: got {outside[0]}, expected one in {region}")


def episode_seeds(config: EvalConfig) -> list[int]:
    """Returns the seeds of the episodes, in order."""
    return list(config.seeds) or list(range(config.first_seed, config.first_seed + config.num_episodes))


class Conditions(NamedTuple):
    """Circumstances of an evaluation beside its simulator and its configuration; "" stands for unknown."""

    checkpoint: str = ""
    """Name of the weights, as `ppo/500/3f0a5e9c11d2`, or "expert"."""
    backend: str = ""
    """Device of the physics, "cpu" or "cuda"; on the other one a seed may begin with another state."""
    jitter: str = ""
    """Random displacement of the task's official starts; "none" for tasks without official starts."""
    perturbation: str = ""
    """Name of a change of all episodes, as "vision/light"; "" for none."""
    settings: dict[str, Any] | None = None
    """All else about the simulators that episodes depend on, JSON-able; None for unknown."""


UNKNOWN = Conditions()


class TaskStages(NamedTuple):
    """Names of one of several tasks."""

    env_id: str
    stage_names: tuple[str, ...]


class EvalInfo(NamedTuple):
    """Protocol and cost of an evaluation."""

    env_id: str
    """Name of the task; of several all, joined by "+"."""
    stage_names: tuple[str, ...]
    """Names of the stages; numbers where several tasks have different ones."""
    horizon: Natural
    """Actions of an episode."""
    temperature: NonNegative
    num_steps: Natural
    """Actions executed, those of lost episodes included."""
    wall_s: NonNegative
    """Wall-clock seconds, without the time between an interruption and the next start."""
    backend: str = ""
    """Field of `Conditions`, like the two below; "" in files of earlier versions."""
    jitter: str = ""
    checkpoint: str = ""
    tasks: tuple[TaskStages, ...] = ()
    """The tasks that `Episodes.task` counts; empty where there is one."""
    perturbation: str = ""
    settings: dict[str, Any] | None = None
    """Field of `Conditions`, like the one above; both are empty in files of earlier versions."""


class Evaluation(NamedTuple):
    info: EvalInfo
    episodes: Episodes


def evaluate(
    policy: Policy,
    params: PyTree,
    env: VecEnv,
    spec: TaskSpecs,
    config: EvalConfig,
    *,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    conditions: Conditions = UNKNOWN,
    folder: Path | None = None,
    desc: str = "evaluate",
    should_stop: Callable[[], bool] | None = None,
    clock: Clock | None = None,
) -> tuple[Evaluation, list[Film]]:
    """Runs a policy to the horizon on the config's seeds; see `evaluate_act`.

    Args:
        policy: the policy that acts, at the config's temperature.
        params: its parameters.
        env: B environments; episodes are handed out among them.
        spec: the task's stages; of several tasks all, in the order of the environments' tasks.
        config: which episodes.
        key: consumed; part n uses `fold_in(key, n)`. Of no effect on token policies at temperature 0.
        mesh: devices that act, over which observations are split; None takes those of the parameters.
        conditions, folder, desc, should_stop, clock: as for `evaluate_act`.
    """
    key = jax.random.key(0) if key is None else key
    act_of = policy_act_of(policy, params, key, temperature=config.temperature, mesh=mesh)
    del params  # Where the caller keeps none, those that are prepared are alone in memory.
    return evaluate_act(
        act_of,
        env,
        spec,
        config,
        depends_on_batch=True,
        conditions=conditions,
        folder=folder,
        desc=desc,
        should_stop=should_stop,
        clock=clock,
    )


def policy_act_of(
    policy: Policy, params: PyTree, key: jax.Array, *, temperature: float, mesh: Mesh | None = None
) -> ActOf:
    """Returns the actors of a policy: their random numbers depend on the part, and not on the parts before it.

    Parameters are prepared once. Random numbers are drawn for all environments at once: actors depend on the batch.
    """
    params = prepare_params(policy, params)

    def act_of(part: int) -> Act:
        return policy_act(policy, params, jax.random.fold_in(key, part), temperature=temperature, mesh=mesh)

    return act_of


def evaluate_act(
    act_of: ActOf,
    env: VecEnv,
    spec: TaskSpecs,
    config: EvalConfig,
    *,
    depends_on_batch: bool = False,
    conditions: Conditions = UNKNOWN,
    folder: Path | None = None,
    desc: str = "evaluate",
    should_stop: Callable[[], bool] | None = None,
    clock: Clock | None = None,
) -> tuple[Evaluation, list[Film]]:
    """Runs an actor to the horizon, success or not, from reproducible resets, in about ten parts.

    Processes share a part. Episodes that are lost with a simulator are run again, up to three times. With a `folder`,
    the results are on disk after every part; a later call with the same arguments goes on after the last finished part,
    and its result equals that of an uninterrupted call. The caller deletes the folder when the result is stored.

    Args:
        act_of: makes the actor of a part.
        env: B environments.
        spec: the task's stages; of several tasks all, in the order of the environments' tasks.
        config: which episodes; every task has as many, on the same seeds.
        depends_on_batch: whether actions in an episode depend on the other episodes under way; then all episodes of a
            part are run again if one is lost.
        conditions: circumstances to record; with a folder, results of other conditions in it are set aside.
        folder: folder for the results so far; None keeps nothing on disk.
        desc: text of the progress line.
        should_stop: polled every tick.
        clock: charged with the time in the simulator and in the actor.

    Returns:
        The evaluation, and films of the first `max(1, num_videos)` successes and as many failures, in process 0 of
        all, elsewhere of its own; the films have frames only if `num_videos` is positive.

    Raises:
        Interrupted: `should_stop` answered True.
        ValueError: a folder is given without the name of the checkpoint.
    """
    if folder is not None and not conditions.checkpoint:
        raise ValueError("conditions.checkpoint: got '', expected the name of the weights, to resume from a folder")
    # The tasks take turns, so that every part has all of them.
    seeds = [seed for seed in episode_seeds(config) for _ in as_specs(spec)]
    tasks = take_turns(spec, range(len(seeds)))
    identity = _identity(env, spec, config, conditions)
    done = NOTHING_DONE if folder is None else pod.on_main(load_parts, folder, identity)
    num_before = 0 if done.episodes is None else len(done.episodes.seed)
    num_successes = 0 if done.episodes is None else int(done.episodes.success_once.sum())
    shelf = FilmShelf(max(1, config.num_videos), done.films)
    collect = functools.partial(collect_episodes, should_stop=should_stop, clock=clock, in_turns=depends_on_batch)
    with progress(len(seeds), desc, "episode", initial=num_before) as bar:
        num_over = num_before

        def on_episode(trajectory: Trajectory) -> None:
            nonlocal num_over, num_successes
            num_over += 1
            num_successes += bool((trajectory.signals.success & trajectory.valid).any())
            bar.update(1, success=num_successes / num_over)

        for number, indices in enumerate(split_into_parts(len(seeds), env.num_envs * pod.num_processes())):
            if number < done.num_parts:
                continue
            start = time.monotonic()
            part = _Part(env, act_of, number, seeds, tasks, indices, shelf, config.num_videos > 0, collect)
            rollout = collect_round(part.run, len(indices), as_a_whole=depends_on_batch, on_episode=on_episode)
            if not rollout.is_complete:
                kept = "" if folder is None else f"; {indices.start} are kept on disk"
                raise Interrupted(f"{desc}: stopped after {num_over} of {len(seeds)} episodes{kept}")
            shelf.gather()
            part_seeds = [seeds[e] for e in indices]
            done = _add_part(done, spec, rollout, part_seeds, time.monotonic() - start, shelf.films)
            if folder is not None and pod.is_main():
                save_parts(folder, identity, done)
    return Evaluation(_info(env, spec, config, conditions, done), done.episodes), list(done.films)


def _info(env: VecEnv, spec: TaskSpecs, config: EvalConfig, conditions: Conditions, done: PartsDone) -> EvalInfo:
    specs = as_specs(spec)
    tasks = tuple(TaskStages(one.env_id, one.stage_names) for one in specs)
    return EvalInfo(
        env_id=env.env_id,
        stage_names=shared_stage_names(specs),
        horizon=env.horizon,
        temperature=config.temperature,
        num_steps=done.num_steps,
        wall_s=done.wall_s,
        tasks=tasks if len(tasks) > 1 else (),
        **conditions._asdict(),
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """One part of an evaluation: the arguments of every try to run its episodes."""

    env: VecEnv
    act_of: ActOf
    number: int
    seeds: Sequence[int]
    """Seeds of all episodes of the evaluation."""
    tasks: np.ndarray | None
    """Their tasks; None where there is one."""
    indices: range
    """Episodes of the part among these."""
    shelf: FilmShelf
    has_frames: bool
    collect: Callable[..., Rollout]
    """`collect_episodes` with the arguments that are those of all parts."""

    def run(self, chosen: Sequence[int], on_episode: Callable[[int, Trajectory], None]) -> Rollout:
        """Runs some episodes of the part, counted from its first; a film shows the last try of its episode."""
        episodes = [self.indices[i] for i in chosen]
        has_frames = self.has_frames and any(self.shelf.may_keep(e) for e in episodes)

        def film_and_tell(row: int, trajectory: Trajectory) -> None:
            e = episodes[row]
            self.shelf.drop(e)
            if trajectory.valid[0] and self.shelf.may_keep(e):
                self.shelf.put(film_of(e, trajectory))
            on_episode(row, trajectory)

        return self.collect(
            self.env,
            self.act_of(self.number),
            [self.seeds[e] for e in episodes],
            stop_at_success=False,
            tasks=None if self.tasks is None else self.tasks[episodes],
            reproducible=True,
            on_episode=film_and_tell,
            # Images are freed as soon as an episode is over, because its film is a copy.
            keep_images=(lambda row, episode: False) if has_frames else False,
        )


def _add_part(
    done: PartsDone, spec: TaskSpecs, rollout: Rollout, seeds: Sequence[int], wall_s: float, films: Sequence[Film]
) -> PartsDone:
    """Returns the results of the parts so far with those of the part that has just been run."""
    signals, valid = rollout.trajectory.signals, rollout.trajectory.valid
    episodes, initial = [measure(spec, signals, valid, seeds, rollout.task)], [initial_states(signals)]
    if done.episodes is not None:
        episodes, initial = [done.episodes, *episodes], [done.initial, *initial]
    initial = np.concatenate(initial)
    return PartsDone(
        num_parts=done.num_parts + 1,
        episodes=join_episodes(episodes, initial),
        initial=initial,
        num_steps=done.num_steps + rollout.num_steps,
        wall_s=done.wall_s + wall_s,
        films=tuple(films),
    )


def _identity(env: VecEnv, spec: TaskSpecs, config: EvalConfig, conditions: Conditions) -> dict[str, Any]:
    """Returns the JSON values on which the results of a part depend."""
    layout = {"num_groups": len(env.groups)} if len(env.groups) > 1 else {}  # Earlier versions had one, and no spares.
    if any(group.spare_of_env is not None for group in env.groups):
        layout["has_spares"] = True
    if pod.num_processes() > 1:
        layout["num_processes"] = pod.num_processes()
    return layout | {
        "env_id": env.env_id,
        "horizon": env.horizon,
        "num_envs": env.num_envs,
        "stages": [repr(one.params) for one in as_specs(spec)],
        "evaluation": to_dict(config),
        "conditions": conditions._asdict(),
    }
