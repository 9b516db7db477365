"""A study: a grid of runs, methods x tasks x seeds, as a list of jobs that share what they have in common.

Every job is an ordinary run of one phase, in a folder of its own below the study's:

    <task>/demos/                  the demonstrations of a task, made once
    <task>/<method>/seed_<n>/      the phase that a method adds, from the weights of the method that it starts from

so the imitation of a task and a seed is trained once, and all methods begin from it. A job is described by the
arguments of `launch/train.py`; this module plans and runs nothing.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stare_jax.config import ConfigError, Seed, check_name, convert
from stare_jax.runs.config import Phase

DEMOS = "demos"
"""Name of the job that collects the demonstrations of a task."""
DEMOS_SEED = 0
"""Seed of the run that collects them; all seeds of a task imitate the same demonstrations."""


class Step(Protocol):
    """The part of a method that a plan needs: the phase that it adds, and the method it starts from ("" for none)."""

    phase: Phase
    start: str


class Variant(NamedTuple):
    """A method with other numbers, under a name of its own."""

    method: str
    changes: Mapping[str, Any]
    """field of the configuration -> value, of the phase that the method adds and of the stages."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of runs. All methods have the same numbers, but for what makes a method, or a variant, what it is."""

    config: str | Mapping[str, str]
    """configuration of a run as `--config` takes it, with {task} and {method} where these stand:
    "configs/franka_state.py:{task},{method}"; or task -> its configuration."""
    methods: tuple[str, ...]
    """names of methods and variants."""
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    """seeds of every task, or task -> its seeds."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """field of the configuration -> value, for all runs."""
    task_changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """task -> field -> value, for all runs of a task."""
    variants: Mapping[str, Variant] = dataclasses.field(default_factory=dict)
    """name -> a method with other numbers."""
    without: tuple[tuple[str, str], ...] = ()
    """pairs (task, method) that are left out."""
    init_from: str = ""
    """weights that the methods which start a run begin from; empty for random ones."""

    def config_of(self, task: str, method: str) -> str:
        """Returns the configuration of a method on a task."""
        text = self.config if isinstance(self.config, str) else self.config[task]
        return text.format(task=task, method=method)

    def seeds_of(self, task: str) -> tuple[int, ...]:
        """Returns the seeds of a task."""
        return tuple(self.seeds[task] if isinstance(self.seeds, Mapping) else self.seeds)


class Job(NamedTuple):
    """One run of a study."""

    name: str
    """name of the job, and of its run directory below the study's folder: "StackCube-v1/ppo/seed_0"."""
    arguments: tuple[str, ...]
    """arguments of `launch/train.py`."""
    after: tuple[str, ...]
    """names of the jobs whose results it begins with."""
    phase: str
    """the phase that it trains, or "demos"."""

    @property
    def kind(self) -> str:
        """Task and method, without the seed: jobs of one kind take about as long."""
        return "/".join(self.name.split("/")[:2])


def plan_study(
    study: Study, methods: Mapping[str, Step], folder: str | Path, *, more: tuple[str, ...] = ()
) -> tuple[Job, ...]:
    """Returns the jobs of a study, each after those that it begins with; all methods of a seed come before the next.

    Args:
        study: the grid.
        methods: all methods by name.
        folder: the study's folder, as the commands are to name it.
        more: further arguments of every job.

    Raises:
        ConfigError: a name is not known or stands for two things, a seed is given twice, or a variant changes a field
            that its phase does not read.
    """
    check_study(study, methods)
    jobs: dict[str, Job] = {}
    most = max(len(study.seeds_of(task)) for task in study.tasks)
    for number in range(most):
        for task in study.tasks:
            for seed in study.seeds_of(task)[number : number + 1]:
                for method in study.methods:
                    if (task, method) not in study.without:
                        for job in _chain(study, methods, Path(folder), task, method, seed, more):
                            jobs.setdefault(job.name, job)
    return tuple(jobs.values())


def _chain(
    study: Study, methods: Mapping[str, Step], folder: Path, task: str, method: str, seed: int, more: tuple[str, ...]
) -> Iterator[Job]:
    """Yields the jobs that lead to one run, itself the last."""
    base, changes = study.variants.get(method, Variant(method, {}))
    step, common = methods[base], {**study.changes, **study.task_changes.get(task, {})}

    def job(name: str, phase: str, fields: Mapping[str, Any], after: tuple[str, ...] = ()) -> Job:
        flags = [f"--config={study.config_of(task, base)}", *map(_flag, fields, fields.values()), *more]
        return Job(name, (*flags, f"--workdir={folder / name}"), after, phase)

    fields: dict[str, Any] = {"phases": (step.phase,), "seed": seed}
    after: tuple[str, ...] = ()
    if step.start:
        earlier = tuple(_chain(study, methods, folder, task, step.start, seed, more))
        yield from earlier
        start = earlier[-1]
        fields["init_from"], after = folder / start.name / start.phase, (start.name,)
    else:
        if study.init_from:
            fields["init_from"] = study.init_from
        if step.phase == "sft" and "demos_from" not in common:
            demos = job(f"{task}/{DEMOS}", DEMOS, {"phases": ("sft",), "seed": DEMOS_SEED} | common)
            yield demos._replace(arguments=("--demos_only", *demos.arguments))
            fields["demos_from"], after = folder / demos.name / "data" / "demos", (demos.name,)
    yield job(f"{task}/{method}/seed_{seed}", step.phase, fields | common | dict(changes), after)


def _flag(field: str, value: Any) -> str:
    """Returns a field of the configuration as a flag; words of a tuple are joined by commas, "sft,ppo"."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    return f"--config.{field}={value}"


def check_study(study: Study, methods: Mapping[str, Step]) -> None:
    """Makes sure that the fields of a study are of their types, and name what there is.

    Raises:
        ConfigError: names the field, got and expected.
    """
    _check_types(study)
    known = (*methods, *study.variants)
    for field, names in (("tasks", study.tasks), ("methods", study.methods)):
        for name in names:
            check_name(name, field)
    if twice := [name for name in study.variants if name in (*methods, DEMOS)]:
        raise ConfigError(f"variants: got {', '.join(twice)}, expected names that no method has")
    for field, got, expected in (
        ("methods", study.methods, known),
        ("variants", [variant.method for variant in study.variants.values()], tuple(methods)),
        ("task_changes", study.task_changes, study.tasks),
        ("without", [task for task, _ in study.without], study.tasks),
        ("without", [method for _, method in study.without], study.methods),
    ):
        if unknown := [name for name in got if name not in expected]:
            raise ConfigError(f"{field}: got {', '.join(unknown)}, expected some of {', '.join(expected)}")
    for field in ("config", "seeds"):
        value = getattr(study, field)
        if isinstance(value, Mapping) and set(value) != set(study.tasks):
            raise ConfigError(f"{field}: got those of {', '.join(value)}, expected those of {', '.join(study.tasks)}")
    for field, values in (("methods", study.methods), ("tasks", study.tasks), *_seeds(study)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{field}: got {values}, expected at least one, each once")
    for name, variant in study.variants.items():
        sections = sections_of(methods[variant.method].phase)
        if wrong := [field for field in variant.changes if field.split(".")[0] not in sections]:
            raise ConfigError(
                f"variants: {name}: got {', '.join(wrong)}, expected fields of {', '.join(sections)}: those of other "
                "phases are read by the methods that it starts from"
            )


def _check_types(study: Study) -> None:
    """Raises ConfigError where a field of a study is of another type, or its configuration has unknown braces."""
    names = tuple[str, ...]
    for field, hint in (
        ("init_from", str),
        ("methods", names),
        ("tasks", names),
        ("without", tuple[tuple[str, str], ...]),
    ):
        convert(hint, getattr(study, field), field)
    for field, hint in (("changes", Any), ("task_changes", Mapping), ("variants", Variant)):
        for name, value in convert(Mapping, getattr(study, field), field).items():
            convert(hint, value, f"{field}.{name}")
    for name, variant in study.variants.items():
        convert(str, variant.method, f"variants.{name}.method")
        convert(Mapping, variant.changes, f"variants.{name}.changes")
    seeds = study.seeds.items() if isinstance(study.seeds, Mapping) else [("all tasks", study.seeds)]
    for task, values in seeds:
        convert(tuple[Seed, ...], values, f"seeds of {task}")
    configs = study.config.items() if isinstance(study.config, Mapping) else [("", study.config)]
    for task, text in configs:
        field = f"config.{task}" if task else "config"
        convert(str, text, field)
        try:
            text.format(task="", method="")
        except (LookupError, ValueError, AttributeError) as error:
            raise ConfigError(f"{field}: got {text!r}, expected no braces but {{task}} and {{method}}") from error


def sections_of(phase: Phase) -> tuple[str, ...]:
    """Returns the sections of a configuration that decide one phase and none before it."""
    return (phase, "pairs", "stages") if phase == "tpo" else (phase, "stages")


def _seeds(study: Study) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"seeds of {task}", study.seeds_of(task)) for task in study.tasks]


def select_jobs(jobs: tuple[Job, ...], names: set[str]) -> tuple[Job, ...]:
    """Returns some jobs, by name, with all that they begin with, in order."""
    wanted = set(names)
    for job in reversed(jobs):
        if job.name in wanted:
            wanted |= set(job.after)
    return tuple(job for job in jobs if job.name in wanted)
