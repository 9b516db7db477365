"""Collects demonstrations of an expert, and preference pairs from the rollouts of a trained policy.

    python launch/collect.py --task=PushCube-v1 --demos=100 --out=data/pushcube
    python launch/collect.py --demos=760 --noise=0:100,0.15:594,0.3:66 --out=data/pushcube
    python launch/collect.py --pairs=50 --checkpoint=runs/quickstart/sft --out=data/pushcube

Demonstrations go to OUT/demos, rollouts and their pairs to OUT/pairs, each a data set (stare_jax/data/schema.py) with a
picture of some episodes, episodes.png. Ctrl-C or SIGTERM stops; the same command goes on, and with a larger number adds
to what is there. `--config.demos_from=OUT/demos` trains on the demonstrations.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from stare_jax.data.demos import DemosConfig, collect_demos, is_collected
from stare_jax.data.pairs import PairsConfig, count_kinds
from stare_jax.data.reader import Dataset
from stare_jax.data.rollouts import collect_pairs
from stare_jax.data.schema import DatasetError
from stare_jax.data.summary import contact_sheet, summarize_stages
from stare_jax.envs import STATE_DIMS, EnvConfig, SimulatorError, execution_noise, make_expert, make_vec_env
from stare_jax.logging import Clock, Interrupted, Interruption, print_table, say
from stare_jax.rollout.collect import policy_act
from stare_jax.stages import TASKS, TaskSpec, get_task
from stare_jax.train.checkpoint import CheckpointError
from stare_jax.train.config import ConfigError

DEMOS, PAIRS, ENV = DemosConfig(), PairsConfig(), EnvConfig()


class UsageError(ValueError):
    """Something that the user can put right; printed without a traceback."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Where values from the command line are checked: what is refused is the user's, not a bug."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the data sets go")
    add("--demos", type=int, metavar="N", help="successful episodes of the expert to collect")
    add("--pairs", type=int, metavar="N", help="preference pairs to make; needs --checkpoint")
    add("--checkpoint", type=Path, metavar="RUN/PHASE", help="the policy to roll out, e.g. runs/quickstart/sft")
    add("--task", choices=TASKS, metavar="ENV_ID", help=f"one of {', '.join(TASKS)} (default: {ENV.env_id})")
    add("--seed", type=int, default=0, help="of the run, 0 to 99: picks the simulator's seeds (default: 0)")
    add("--workers", type=int, help=f"simulator processes (default: {ENV.num_workers})")
    add("--horizon", type=int, help=f"actions an episode may take (default: {ENV.horizon})")
    add("--image-size", type=int, metavar="PIXELS", help=f"0 for no images (default: {ENV.image_size})")
    add("--state", choices=tuple(STATE_DIMS), help=f"proprioception to store (default: {ENV.use_state})")
    demos = parser.add_argument_group("demonstrations")
    add = demos.add_argument
    add(
        "--noise",
        type=parse_noise,
        default=DEMOS.noise_scales,
        metavar="SCALE[:SHARE],...",
        help="standard deviations of the noise on executed actions, in the action's unit, and the share of the "
        "demonstrations that gets each (default: 0)",
    )
    pairs = parser.add_argument_group("pairs")
    add = pairs.add_argument
    add("--temperature", type=float, default=PAIRS.temperature, help=f"of the policy (default: {PAIRS.temperature})")
    add(
        "--rollouts-per-seed",
        type=int,
        default=PAIRS.rollouts_per_seed,
        metavar="N",
        help=f"episodes from each initial state (default: {PAIRS.rollouts_per_seed})",
    )
    add(
        "--max-rollouts",
        type=int,
        default=PAIRS.max_rollouts,
        metavar="N",
        help=f"episodes at most (default: {PAIRS.max_rollouts})",
    )
    arguments = parser.parse_args(argv)
    if arguments.demos is None and arguments.pairs is None:
        parser.error("nothing to collect: give --demos=N, or --pairs=N with --checkpoint=RUN/PHASE")
    if (arguments.pairs is None) != (arguments.checkpoint is None):
        parser.error("--pairs and --checkpoint go together: the pairs are made of the rollouts of a policy")
    return arguments


def parse_noise(text: str) -> tuple[tuple[float, float], ...]:
    """Parses `0:0.4,0.15:0.6`, or a single scale."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((float(scale), float(*share or ["1"])) for scale, *share in pairs)
    except (TypeError, ValueError) as error:
        message = f"got {text!r}, expected SCALE:SHARE,SCALE:SHARE,... such as 0:0.4,0.15:0.6"
        raise argparse.ArgumentTypeError(message) from error


def env_config(arguments: argparse.Namespace, base: EnvConfig) -> EnvConfig:
    """Returns the simulator's configuration: `base` with what the command line changes."""
    given = {
        "env_id": arguments.task,
        "num_workers": arguments.workers,
        "horizon": arguments.horizon,
        "image_size": arguments.image_size,
        "use_state": arguments.state,
    }
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


def make_demos(arguments: argparse.Namespace, should_stop: Callable[[], bool]) -> None:
    """Collects demonstrations and says what they are."""
    with user_input():
        config = DemosConfig(num_demos=arguments.demos, noise_scales=arguments.noise, seed=arguments.seed)
        env = env_config(arguments, ENV)
        expert = make_expert(env.env_id)
    directory = arguments.out / "demos"
    if is_collected(directory, config, env_id=env.env_id):
        say(f"{directory} holds all of these already")
        dataset = Dataset(directory)
    else:
        with contextlib.closing(make_vec_env(env)) as simulator:
            clock = Clock()
            options = {"control_mode": env.resolved_control_mode, "should_stop": should_stop, "clock": clock}
            dataset = collect_demos(simulator, expert, config, directory, noise_fn=execution_noise, **options)
            say(clock.line())
    report(dataset, get_task(env.env_id))


def make_pairs(arguments: argparse.Namespace, should_stop: Callable[[], bool]) -> None:
    """Rolls out a policy, pairs its episodes and says what they are."""
    from stare_jax.train.restore import restore_policy  # all of training, which demonstrations do without

    run, policy, params = restore_policy(arguments.checkpoint)
    with user_input():
        config = PairsConfig(
            num_pairs=arguments.pairs,
            rollouts_per_seed=arguments.rollouts_per_seed,
            max_rollouts=arguments.max_rollouts,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
        env = env_config(arguments, run.env)
    seen = ("env_id", "image_size", "use_state")
    if changed := [name for name in seen if getattr(env, name) != getattr(run.env, name)]:
        raise UsageError(f"{arguments.checkpoint} was trained with another {', '.join(changed)}")
    spec = dataclasses.replace(get_task(env.env_id), params=run.stages)
    act = policy_act(policy, params, jax.random.key(config.seed), temperature=config.temperature)
    directory = arguments.out / "pairs"
    with contextlib.closing(make_vec_env(env)) as simulator:
        clock = Clock()
        options = {"control_mode": env.resolved_control_mode, "should_stop": should_stop, "clock": clock}
        source = str(arguments.checkpoint)
        dataset, pairs = collect_pairs(simulator, act, spec, config, directory, source=source, **options)
        say(clock.line())
    report(dataset, spec)
    print_table(["preference pairs by", "number"], list(count_kinds(pairs).items()))
    if len(pairs) < config.num_pairs:
        say(f"these are {len(pairs)} of {config.num_pairs}; a larger --max-rollouts or --temperature may give the rest")


def report(dataset: Dataset, spec: TaskSpec) -> None:
    """Prints tables of a data set and draws some of its episodes."""
    lengths = np.array([episode.length for episode in dataset.episodes])
    groups = sorted(Counter(episode.noise_scale for episode in dataset.episodes).items())
    progress = dataset.manifest.progress
    rows = [
        ("episodes", dataset.num_episodes),
        ("successful", sum(episode.success for episode in dataset.episodes)),
        *((f"with noise {scale:g}", number) for scale, number in groups if scale or len(groups) > 1),
        ("episodes tried", progress["num_attempts"]),
        ("lost with a simulator", progress["num_dropped"]),
        ("actions: mean", f"{lengths.mean():.1f}"),
        ("actions: 90 % quantile", f"{np.quantile(lengths, 0.9):.0f}"),
        ("actions: maximum", lengths.max()),
        ("frames", dataset.num_frames),
    ]
    print_table([str(dataset.directory), ""], rows)
    stages = [
        (row.name, f"{row.completed:.0%}", f"{row.skipped:.0%}", _mean(row.num_steps, 1), _mean(row.cost, 4))
        for row in summarize_stages(dataset, spec)
    ]
    print_table(["stage", "completed", "skipped", "states: mean", "cost: mean"], stages)
    if any(name.startswith("image/") for name in dataset.manifest.shapes):
        path = dataset.directory / "episodes.png"
        contact_sheet(dataset, spec).save(path)
        say(f"some episodes: {path}")


def _mean(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    command = shlex.join(["python", *sys.argv] if argv is None else ["python", sys.argv[0], *argv])
    try:
        with Interruption() as interruption:
            if arguments.demos is not None:
                make_demos(arguments, lambda: interruption.requested)
            if arguments.pairs is not None:
                make_pairs(arguments, lambda: interruption.requested)
    except (Interrupted, KeyboardInterrupt) as stopped:
        say(f"{stopped}\ngo on with: {command}")
        return 130
    except (UsageError, ConfigError, CheckpointError, DatasetError, SimulatorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
