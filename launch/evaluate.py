"""Evaluates a trained policy, or the expert, prints the table and renews the run's report.

    python launch/evaluate.py --run=runs/quickstart --phase=ppo --episodes=100
    python launch/evaluate.py --run=runs/quickstart --phase=ppo --temperature=1 --name=ppo_sampled
    python launch/evaluate.py --run=runs/quickstart --phase=expert
    python launch/evaluate.py --run=runs/on_gpu --phase=ppo --backend=cpu --workers=8 --envs-per-worker=4
    python launch/evaluate.py --report=runs/quickstart
    python launch/evaluate.py --across runs/seed0 runs/seed1 runs/seed2

What is not given is as the run's own configuration has it, so the episodes are those of the run's other evaluations.
--report writes report.html again from the run's files; --across gives mean and deviation over runs of several seeds.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import command
import jax

from stare_jax.config import ConfigError, user_input
from stare_jax.data.demos import expert_act
from stare_jax.envs import BACKENDS, EnvConfig, make_vec_env
from stare_jax.envs.tasks import make_expert
from stare_jax.evaluate.protocol import EvalConfig, episode_seeds, evaluate_act
from stare_jax.evaluate.summary import mean_and_std
from stare_jax.logging import Clock, Interruption, print_table, say
from stare_jax.report.record import evaluation_file, record_evaluation
from stare_jax.report.report import load_results, print_report, write_report
from stare_jax.rollout.collect import Act, policy_act
from stare_jax.runs.config import RunConfig
from stare_jax.runs.load import load_config, load_policy

EXPERT = "expert"
OUTCOMES = {"success_once": "success, any step", "success_end": "success, end"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="RUN", help="run directory to evaluate a phase of")
    what.add_argument("--report", type=Path, metavar="RUN", help="only write the report of this run directory again")
    what.add_argument("--across", type=Path, nargs="+", metavar="RUN", help="only compare evaluated run directories")
    add = parser.add_argument
    add("--phase", help=f"sft, tpo, ppo, or {EXPERT}; needed with --run")
    add("--step", type=int, help="of the checkpoint (default: the phase's latest)")
    add("--name", help="under which the result is kept (default: PHASE, or PHASE_again beside the run's own)")
    add("--episodes", type=int, metavar="N", help="how many, on the seeds from the first on")
    add("--first-seed", type=int, metavar="SEED")
    add("--temperature", type=float, help="0 is greedy; a flow still starts from noise")
    add("--videos", type=int, metavar="N", help="episodes to film")
    add("--backend", choices=BACKENDS, help="where physics runs; only with cpu are episodes reproducible")
    add("--workers", type=int, metavar="N", help="simulator processes")
    add("--envs-per-worker", type=int, metavar="N", help="simulators of a process")
    arguments = parser.parse_args(argv)
    if arguments.run and not arguments.phase:
        parser.error("--run needs --phase")
    return arguments


def eval_config(config: EvalConfig, arguments: argparse.Namespace) -> EvalConfig:
    """Returns the run's own choice of episodes with what the command line changes."""
    changes = {
        "num_episodes": arguments.episodes,
        "first_seed": arguments.first_seed,
        "temperature": arguments.temperature,
        "num_videos": arguments.videos,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if {"num_episodes", "first_seed"} & changes.keys():
        changes["seeds"] = ()
    config = dataclasses.replace(config, **changes)
    if not episode_seeds(config):
        raise ValueError(f"num_episodes: got {config.num_episodes}, expected at least 1; --episodes=N says how many")
    return config


def env_config(config: EnvConfig, arguments: argparse.Namespace) -> EnvConfig:
    """Returns the run's own simulators with what the command line changes.

    On a GPU as many are one batch; elsewhere such a batch would be one process, so there the default layout is taken.
    """
    given = {
        "backend": arguments.backend,
        "num_workers": arguments.workers,
        "envs_per_worker": arguments.envs_per_worker,
    }
    changes = given = {name: value for name, value in given.items() if value is not None}
    if arguments.backend == "cuda":
        changes = {"num_workers": 1, "envs_per_worker": config.num_envs} | given
    elif arguments.backend and config.backend == "cuda":
        changes = {name: getattr(EnvConfig(), name) for name in ("num_workers", "envs_per_worker")} | given
    return dataclasses.replace(config, **changes)


def make_act(config: RunConfig, temperature: float, arguments: argparse.Namespace) -> Act:
    """Returns the expert, or the policy of a phase's checkpoint."""
    if arguments.phase == EXPERT:
        with user_input():
            return expert_act(make_expert(config.env.task_name))
    _, policy, params = load_policy(arguments.run / arguments.phase, step=arguments.step)
    return policy_act(policy, params, jax.random.key(0), temperature=temperature)


def default_name(arguments: argparse.Namespace) -> str:
    """Returns a name that leaves the run's own evaluation of the phase as it is."""
    is_taken = evaluation_file(arguments.run, arguments.phase).exists()
    return f"{arguments.phase}_again" if is_taken else arguments.phase


def evaluate_run(arguments: argparse.Namespace) -> None:
    """Evaluates one phase of a run and adds the result to the run directory."""
    config, name = load_config(arguments.run), arguments.name or default_name(arguments)
    with user_input():
        evaluation_file(arguments.run, name)
        evaluation_config = eval_config(config.evaluation, arguments)
        simulators = env_config(config.env, arguments)
    spec = dataclasses.replace(simulators.spec, params=config.stages)
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        act = make_act(config, evaluation_config.temperature, arguments)
        simulator = stack.enter_context(contextlib.closing(make_vec_env(simulators)))
        clock = Clock()
        watched = {"desc": f"evaluate {name}", "should_stop": lambda: interruption.requested, "clock": clock}
        evaluation, rollout = evaluate_act(act, simulator, spec, evaluation_config, **watched)
        say(f"evaluate {name}: {rollout.num_steps} steps | {clock.line()}")
    shown = {"num_videos": evaluation_config.num_videos, "gamma": config.ppo.gamma}
    record_evaluation(arguments.run, name, evaluation, rollout, spec, **shown)


def compare_runs(directories: Sequence[Path]) -> None:
    """Prints mean and standard deviation of the rates of each phase over runs."""
    results = [result for directory in directories for result in load_results(directory)]
    rows = []
    for phase in dict.fromkeys(result.phase for result in results):
        evaluations = [result.evaluation for result in results if result.phase == phase]
        rates = [mean_and_std(evaluations, outcome) for outcome in OUTCOMES]
        rows.append((phase, *(f"{100 * mean:.1f} ± {100 * std:.1f}" for mean, std in rates), len(evaluations)))
    print_table(("phase", *OUTCOMES.values(), "runs"), rows, title="Mean and standard deviation over runs, %")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def work() -> None:
        if arguments.across:
            return compare_runs(arguments.across)
        if arguments.run:
            evaluate_run(arguments)
        directory = arguments.run or arguments.report
        if not directory.is_dir():
            raise ConfigError(f"{directory}: expected a run directory, but there is none")
        print_report(directory)
        say(f"report: {write_report(directory)}")
        return None

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
