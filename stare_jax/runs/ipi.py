"""IPI (4.4): imitation, preference, interaction, in this order, each from the weights of the one before.

What a run has finished is on disk and is not done again: demonstrations, rollouts, checkpoints, evaluations. A run that
was stopped anywhere goes on from there.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from stare_jax.config import ConfigError, to_dict, user_input
from stare_jax.data.batches import imitation_batches
from stare_jax.data.norm_stats import read_norm_stats
from stare_jax.data.pairs import count_kinds, load_pairs
from stare_jax.data.reader import Dataset
from stare_jax.data.rollouts import policy_actor
from stare_jax.data.schema import read_manifest
from stare_jax.envs import make_vec_env
from stare_jax.envs.base import VecEnv
from stare_jax.envs.tasks import make_expert
from stare_jax.evaluate.protocol import evaluate
from stare_jax.evaluate.record import evaluation_file, partial_folder
from stare_jax.logging import Clock, Interruption, make_writer, say
from stare_jax.models import Policy, make_policy
from stare_jax.report.films import record_evaluation
from stare_jax.report.report import print_report, write_report
from stare_jax.runs.collection import find_or_collect_demos, find_or_collect_pairs
from stare_jax.runs.config import PHASES, RunConfig
from stare_jax.runs.directory import begin_phase, finish_phase, is_finished, locked, open_directory
from stare_jax.runs.evaluation import evaluation_conditions, training_rewards
from stare_jax.runs.load import identify_checkpoint
from stare_jax.sharding.mesh import make_mesh
from stare_jax.stages import TaskSpec
from stare_jax.state.checkpoint import load_norm_stats, load_params
from stare_jax.state.train_state import CHECKPOINTS, abstract_params
from stare_jax.train.loop import Run
from stare_jax.train.ppo import train_ppo
from stare_jax.train.sft import train_sft
from stare_jax.train.tpo import train_tpo
from stare_jax.types import NormStats, PyTree
from stare_jax.weights.load import initial_params


class Experiment:
    """What the phases of a run share; the simulators start when they are first needed, and live as long as the run."""

    def __init__(self, config: RunConfig, directory: Path, stack: contextlib.ExitStack):
        self.config, self.directory, self._stack = config, directory, stack
        self.spec: TaskSpec = dataclasses.replace(config.env.spec, params=config.stages)
        self._interruption = stack.enter_context(Interruption())
        self.writer = stack.enter_context(make_writer(directory))
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh))

    def should_stop(self) -> bool:
        return self._interruption.requested

    @functools.cached_property
    def simulator(self) -> VecEnv:
        return self._stack.enter_context(contextlib.closing(make_vec_env(self.config.env)))

    @functools.cached_property
    def norm_stats(self) -> NormStats:
        checkpoints = Path(self.config.init_from) / CHECKPOINTS
        if self.config.init_from and checkpoints.is_dir():
            return load_norm_stats(checkpoints)
        sizes = {"action_dim": self.config.model.action_dim, "state_dim": self.config.model.state_dim}
        key = self.config.demos_of or self.config.env.env_id
        return read_norm_stats(self.demonstrations.directory, **sizes, key=key)

    @functools.cached_property
    def policy(self) -> Policy:
        return make_policy(self.config.model, self.norm_stats)

    @functools.cached_property
    def run(self) -> Run:
        return Run(
            directory=self.directory,
            norm_stats=self.norm_stats,
            model=to_dict(self.config.model),
            writer=self.writer,
            should_stop=self.should_stop,
            mesh=self.mesh,
            resume=True,
        )

    @functools.cached_property
    def demonstrations(self) -> Dataset:
        """The demonstrations to imitate: given, on disk from before, or collected now."""
        config, directory = self.config, Path(self.config.demos_from or self.directory / "data" / "demos")
        if config.demos_from:
            return Dataset(directory, skip_broken=config.skip_broken)
        expert, clock = make_expert(config.env.task_name), Clock()
        demos, is_new = find_or_collect_demos(
            directory,
            config.env,
            expert,
            config.demos,
            simulator=lambda: self.simulator,
            should_stop=self.should_stop,
            clock=clock,
        )
        if is_new:
            self.report_collection("demos", demos, clock)
        return demos

    def report_collection(self, phase: str, dataset: Dataset, clock: Clock) -> None:
        """Says how much was collected and where the time went."""
        num_steps = dataset.manifest.progress["num_steps"]
        metrics = {"env/num_episodes": dataset.num_episodes, "env/steps": num_steps}
        metrics |= {f"time/{area}_s": seconds for area, seconds in clock.seconds().items()}
        self.writer(dataset.num_episodes, metrics, phase=phase)
        say(f"{phase}: {dataset.num_episodes} episodes, {num_steps} simulator steps | {clock.line()}")


def check_demonstrations(config: RunConfig) -> None:
    """Makes sure that the data set given shows what the policy will see and does what the simulator takes.

    Raises:
        ConfigError: names every field of the manifest that differs, got and expected.
        DatasetError: there is no data set.
    """
    manifest, env, model = read_manifest(config.demos_from), config.env, config.model
    expected = {"env_id": config.demos_of or env.env_id, "action": [model.action_dim]}
    if not config.demos_of:
        expected["control_mode"] = env.resolved_control_mode
    if model.state_dim:  # A policy that sees no state is not shown what is stored.
        expected["state"] = [model.state_dim]
    if env.image_size:
        expected |= {f"image/{camera}": [*env.image_shape, 3] for camera in model.cameras}
    got = manifest._asdict() | manifest.shapes
    wrong = {name: value for name, value in expected.items() if got.get(name) != value}
    if wrong:
        fields = "; ".join(f"{name}: got {got.get(name)!r}, expected {value!r}" for name, value in wrong.items())
        raise ConfigError(f"config.demos_from: {config.demos_from} is not for this run: {fields}")


def check_instructions(demonstrations: Dataset, policy: Policy, state_dim: int) -> None:
    """Makes sure that every instruction fits into the policy's prompt, before anything is trained.

    Raises:
        ConfigError: one does not.
    """
    instructions = sorted({episode.instruction for episode in demonstrations.episodes})
    with user_input():
        # Far below the data's range, where numbers are written the longest.
        policy.tokenize(instructions, np.full((len(instructions), state_dim), -1e6, np.float32))


def run_ipi(config: RunConfig, directory: str | Path, *, resume: bool = False) -> Path:
    """Runs the phases, evaluates after each on the same seeds, and returns the path of the report.

    Args:
        config: see `RunConfig`.
        directory: the run directory.
        resume: go on with what is in the directory; without it the directory has to be new.

    Raises:
        Interrupted: SIGINT or SIGTERM; what is finished is safe, and `resume` goes on from there.
        ConfigError: the directory holds a run already, or one of another configuration, or another process is at work
            in it; the demonstrations given are not for this run.
    """
    directory = Path(directory)
    if config.init_from and not Path(config.init_from).is_dir():
        raise ConfigError(f"config.init_from: got {config.init_from!r}, expected a folder; there is none")
    if config.demos_of and not config.demos_from:
        raise ConfigError(f"config.demos_from: got '', expected the folder that {config.demos_of} was imported into")
    if config.demos_from:
        check_demonstrations(config)
    trainers = {"sft": _train_sft, "tpo": _train_tpo, "ppo": _train_ppo}
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(directory))
        open_directory(directory, to_dict(config), resume=resume)
        experiment = Experiment(config, directory, stack)
        if config.demos_from:
            check_instructions(experiment.demonstrations, experiment.policy, config.model.state_dim)
        for phase in config.phases:
            params = _run_phase(experiment, phase, trainers[phase])
            _evaluate_phase(experiment, phase, params)
        report = write_report(directory)
        print_report(directory)
    return report


def _run_phase(experiment: Experiment, phase: str, train: Callable[[Experiment, PyTree], PyTree]) -> PyTree:
    """Returns the parameters at the end of a phase, from disk if it has been finished with this configuration."""
    config, directory = experiment.config, experiment.directory / phase
    section = to_dict(getattr(config, phase)) | ({"pairs": to_dict(config.pairs)} if phase == "tpo" else {})
    if begin_phase(directory, section, _predecessor(experiment, phase)):
        return load_params(directory / CHECKPOINTS, abstract_params(experiment.policy, experiment.mesh))
    evaluation_file(experiment.directory, phase).unlink(missing_ok=True)
    params = train(experiment, _starting_params(experiment, phase))
    finish_phase(directory)
    return params


def _predecessor(experiment: Experiment, phase: str) -> Path | None:
    """The directory of the last phase before this one that is in the run directory, finished."""
    earlier = [experiment.directory / name for name in PHASES[: PHASES.index(phase)]]
    return next((path for path in reversed(earlier) if is_finished(path)), None)


def _starting_params(experiment: Experiment, phase: str) -> PyTree:
    """The weights of the last finished phase before this one, or what the configuration starts from."""
    config, source = experiment.config, _predecessor(experiment, phase)
    if source is None and config.init_from:
        source = Path(config.init_from)
    return initial_params(source, experiment.policy, config.model, experiment.mesh, jax.random.key(config.seed))


def _train_sft(experiment: Experiment, params: PyTree) -> PyTree:
    config, policy = experiment.config, experiment.policy

    def batches(start_step):
        order = {"batch_size": config.sft.batch_size, "seed": config.seed, "start_step": start_step}
        order |= {"with_state": config.model.state_dim > 0, "window": policy.window}
        return imitation_batches(experiment.demonstrations, policy.tokenize, **order)

    return train_sft(policy, params, batches, config.sft, experiment.run)


def _train_tpo(experiment: Experiment, params: PyTree) -> PyTree:
    config, policy, clock = experiment.config, experiment.policy, Clock()
    rollouts, pairs, is_new = find_or_collect_pairs(
        experiment.directory / "data" / "pairs",
        config.env,
        policy_actor(lambda: (policy, params), config.pairs, source="sft"),
        experiment.spec,
        config.pairs,
        simulator=lambda: experiment.simulator,
        should_stop=experiment.should_stop,
        clock=clock,
    )
    if is_new:
        experiment.report_collection("pairs", rollouts, clock)
    kinds = {kind: count for kind, count in count_kinds(pairs).items() if count}
    say(f"pairs: {len(pairs)} of {config.pairs.num_pairs} wanted: {kinds}")
    counts = {f"pairs/{kind.replace(', ', '_').replace(' ', '_')}": count for kind, count in kinds.items()}
    experiment.writer(rollouts.num_episodes, {"pairs/num_pairs": len(pairs)} | counts, phase="pairs")
    loaded = load_pairs(rollouts, pairs, horizon=config.env.horizon, tokenize=policy.tokenize)
    return train_tpo(policy, params, loaded, experiment.spec, config.tpo, experiment.run)


def _train_ppo(experiment: Experiment, params: PyTree) -> PyTree:
    config = experiment.config.ppo
    return train_ppo(experiment.policy, params, experiment.simulator, experiment.spec, config, experiment.run)


def _evaluate_phase(experiment: Experiment, phase: str, params: PyTree) -> None:
    """Evaluates a phase and shows some of its episodes, unless that is not wanted, or has been done in the same way."""
    config, clock = experiment.config.evaluation, Clock()
    if not experiment.config.has_evaluation:
        return
    settings = json.loads(json.dumps(to_dict(config)))
    file = evaluation_file(experiment.directory, phase)
    if file.exists() and json.loads(file.read_text()).get("settings") == settings:
        return
    directory, policy, spec = experiment.directory, experiment.policy, experiment.spec
    _, checkpoint = identify_checkpoint(directory / phase)
    evaluation, films = evaluate(
        policy,
        params,
        experiment.simulator,
        spec,
        config,
        conditions=evaluation_conditions(experiment.config.env, checkpoint),
        folder=partial_folder(file),
        desc=f"evaluate {phase}",
        should_stop=experiment.should_stop,
        clock=clock,
    )
    say(f"evaluate {phase}: {len(evaluation.episodes.seed)} episodes | {clock.line()}")
    rewards_fn = training_rewards(spec, experiment.config.ppo, chunk=policy.chunk)
    num_videos = config.num_videos
    record_evaluation(directory, phase, evaluation, films, spec, rewards_fn, num_videos=num_videos, settings=settings)
