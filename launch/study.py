"""Runs a study: every method on every task with every seed, several runs at a time, each on cores of its own.

    python launch/study.py --study=configs/studies/franka_state.py
    python launch/study.py --study=configs/studies/franka_state.py --jobs=2 --cores=4 --nice=19
    python launch/study.py --study=configs/studies/franka_state.py --only='StackCube-v1/*ppo/*'
    python launch/study.py --study=configs/studies/franka_state.py --print > commands.sh
    python launch/study.py --study=configs/studies/franka_state.py --status
    python launch/study.py --study=FILE --workdir=runs/slow --config.ppo.optimizer.learning_rate=1e-4

Every run is one of launch/train.py, in FOLDER/TASK/METHOD/seed_N. Demonstrations of a task, and the imitation of a task
and a seed, are made once, and all methods begin from them. What is finished is not done again: after Ctrl-C, a crash or
a power cut, the same command goes on, and with more seeds it adds to what is there. A run that fails is shown with the
end of its log and does not stop the others; the next call tries it again. launch/compare.py --study=FOLDER makes the
tables and the curves.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import command
from annotated_types import Interval
from configuration import last_line, load_configuration, place, split_fields

from stare_jax.config import ConfigError, UserError, from_dict, user_input
from stare_jax.logging import Interruption, print_table, say
from stare_jax.runs.config import RunConfig
from stare_jax.runs.directory import locked
from stare_jax.runs.fit import check_fit
from stare_jax.runs.jobs import Queue, place_cores, run_queue
from stare_jax.runs.progress import failure_texts, progress_table, read_progress, read_rows, summary_line
from stare_jax.runs.study import Job, Study, plan_study, select_jobs

NICE = Annotated[int, Interval(ge=0, le=19)]
TRAIN = command.ROOT / "launch" / "train.py"


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Returns the options, and the arguments `--config...` that are passed on to every run."""
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--study", type=command.path, required=True, metavar="FILE", help="a Python file that defines get_study()")
    add("--workdir", type=command.path, metavar="FOLDER", help="the study's folder (default: runs/<name of the file>)")
    add("--only", action="append", metavar="PATTERN", help="runs of these names, and those they begin with")
    add(
        "--jobs",
        type=command.count,
        metavar="N",
        help="runs at a time (default: as many as there are cores for)",
    )
    add("--cores", type=command.count, default=1, metavar="N", help="cores of a run (default: 1)")
    add(
        "--nice",
        type=command.number(NICE),
        default=0,
        metavar="N",
        help="how much lower the priority of the runs is, 0 to 19",
    )
    add(
        "--every",
        type=command.positive,
        default=60.0,
        metavar="SECONDS",
        help="between two tables of progress (default: 60)",
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--print", action="store_true", help="print the commands of what is not finished, and stop")
    does.add_argument("--status", action="store_true", help="print the state of every run, and stop")
    arguments, more = parser.parse_known_args(argv)
    if wrong := [word for word in more if not (word.startswith("--config.") and "=" in word)]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    return arguments, tuple(more)


def load_study(file: Path) -> Study:
    """Returns the study that a file defines.

    Raises:
        ConfigError: there is no such file, or no study in it.
    """
    if not file.is_file() or file.suffix != ".py":
        why = "it has another ending" if file.is_file() else "there is none"
        raise ConfigError(f"study: got {file}, expected a Python file that defines get_study(); {why}")
    spec = importlib.util.spec_from_file_location(f"stare_jax_study_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        study = module.get_study() if hasattr(module, "get_study") else None
    except UserError:
        raise
    except Exception as error:  # Whatever it is, it is a mistake in a file that the user has named.
        raise ConfigError(f"study: {place(error, str(file))}: {last_line(error)}") from error
    if not isinstance(study, Study):
        raise ConfigError(f"study: {file}: got {type(study).__name__}, expected get_study() that returns a Study")
    return study


def read_config(job: Job) -> RunConfig:
    """Returns the configuration that launch/train.py would build of a job's arguments.

    Raises:
        ConfigError: names the job, and the field with got and expected.
    """
    fields, others = split_fields(job.arguments)
    (choice,) = [word.removeprefix("--config=") for word in others if word.startswith("--config=")]
    try:
        values = load_configuration(choice, fields)
        config = from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"})
        check_fit(config)
    except UserError as error:
        raise ConfigError(f"{job.name}: {error}") from error
    return config


def print_commands(queue: Queue) -> None:
    """Prints the commands of the jobs that are not finished, each after those that it begins with."""
    print(f"cd {shlex.quote(str(command.ROOT))}")
    for job in queue.jobs:
        if queue.states[job.name] != "finished":
            after = f", after {', '.join(job.after)}" if job.after else ""
            print(f"# {job.name}{after}\n{shlex.join(['python', *map(_near, queue.command[1:]), *job.arguments])}")


def _near(path: str) -> str:
    return str(Path(path).relative_to(command.ROOT)) if Path(path).is_relative_to(command.ROOT) else path


def show(name: str, queue: Queue, configs: Mapping[str, RunConfig], *, everything: bool = False) -> None:
    """Prints the state of the study."""
    rows = read_rows(queue, configs)
    say("\n" + summary_line(name, rows, len(queue.places)))
    header, cells = progress_table(rows, everything=everything)
    if cells:
        print_table(header, cells)


def run_study(arguments: argparse.Namespace, more: tuple[str, ...], file: Path, folder: Path) -> int:
    """Runs a study to its end, or prints what is asked for; returns the exit code."""
    from configs.methods import METHODS

    jobs = plan_study(load_study(file), METHODS, folder, more=more)
    if arguments.only:
        names = {job.name for job in jobs if any(fnmatch.fnmatch(job.name, pattern) for pattern in arguments.only)}
        if not names:
            known = ", ".join(job.name for job in jobs)
            raise ConfigError(f"only: got {', '.join(arguments.only)}, expected some of {known}")
        jobs = select_jobs(jobs, names)
    configs = {job.name: read_config(job) for job in jobs}  # Mistakes are found before anything runs.
    with user_input():
        places = place_cores(sorted(os.sched_getaffinity(0)), arguments.jobs, arguments.cores)

    def done_of(job: Job) -> float:
        return read_progress(folder / job.name, configs[job.name], job.phase).done

    queue = Queue(jobs, folder, [sys.executable, str(TRAIN)], places, nice=arguments.nice, done_of=done_of)
    if arguments.print:
        with command.quiet_pipe():
            print_commands(queue)
        return command.DONE
    if arguments.status:
        queue.look()
        show(file.stem, queue, configs, everything=True)
        return command.DONE
    with locked(folder), Interruption() as interruption:
        told: set[str] = set()

        def on_change() -> None:
            show(file.stem, queue, configs)
            for text in failure_texts(queue):
                if text not in told:
                    told.add(text)
                    print(text, file=sys.stderr)

        run_queue(
            queue, on_change=on_change, should_stop=lambda: interruption.requested, report_every_s=arguments.every
        )
    show(file.stem, queue, configs, everything=True)
    return command.FAILED if "failed" in queue.states.values() else command.DONE


def main(argv: Sequence[str] | None = None) -> int:
    arguments, more = parse_arguments(argv)
    file = arguments.study.resolve()
    folder = (arguments.workdir or command.ROOT / "runs" / file.stem).resolve()
    if folder.is_relative_to(command.ROOT):
        folder = folder.relative_to(command.ROOT)  # so that runs can be moved together with the clone

    def work() -> int:
        with contextlib.chdir(command.ROOT):
            return run_study(arguments, more, file, folder)

    return command.run(work, go_on=command.repeat_command(argv))


if __name__ == "__main__":
    sys.exit(main())
