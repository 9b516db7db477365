"""Measures where the time of a rollout goes, and what is saved where simulators and policy work at the same time.

All cases take turns in one run, over the same simulators, and each is compared with its neighbour:

- a free policy: the part of the time that is neither the simulators' nor the policy's;
- a policy as dear as the simulators, in one group of environments and in two that take turns. The policy waits, as this
  process does for an accelerator, in proportion to the rows that it decides for;
- decisions on some actions at a time, with images of all states and with those alone that decisions are made in.

    python benchmarks/rollout.py --json benchmarks/results/rollout_cpu.json
    python benchmarks/rollout.py --workers 2 --envs-per-worker 2 --rounds 1 --repeats 1
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time

import jax
import numpy as np

from stare_jax.config import home_path
from stare_jax.envs import EnvConfig, VecEnv, make_vec_env
from stare_jax.logging import Clock
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes
from stare_jax.rollout.decisions import Act
from stare_jax.rollout.records import KeepImages

AREAS = {"env": "simulator", "policy": "policy", "other": "other"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to collect the same number of actions."""

    name: str
    policy_cost: float = 0.0
    """time of a decision for all rows, as a fraction of the simulators' time of a step."""
    in_turns: bool = False
    chunk: int = 1
    keep_images: KeepImages = "decisions"
    beside: str = ""
    """name of the case that it is compared with."""


def cases(chunk: int) -> list[Case]:
    """Returns all cases; `chunk` is the number of actions of the decisions that hold several."""
    dear, chunks = "dear policy, one group", f"chunks of {chunk}, all images"
    return [
        Case("free policy"),
        Case(dear, 1.0),
        Case("dear policy, two groups", 1.0, in_turns=True, beside=dear),
        Case(chunks, 1.0, chunk=chunk, keep_images=True),
        Case(f"chunks of {chunk}, decisions' images", 1.0, chunk=chunk, beside=chunks),
        Case(f"chunks of {chunk}, and two groups", 1.0, in_turns=True, chunk=chunk, beside=chunks),
    ]


def waiting_act(case: Case, env: VecEnv, step_s: float) -> Act:
    """Returns an actor that waits and then moves at random, slowly.

    Args:
        case: cost and number of actions of a decision.
        env: simulators of the whole batch.
        step_s: seconds that these take for a step.
    """
    rng = np.random.default_rng(0)

    def act(observation, signals, instructions, is_first):
        rows = len(is_first)
        time.sleep(case.policy_cost * step_s * rows / env.num_envs)
        action = rng.uniform(-0.3, 0.3, (rows, case.chunk, env.action_dim)).astype(np.float32)
        zeros = np.zeros(rows, np.float32)
        action = action if case.chunk > 1 else action[:, 0]
        return Decision(action, {}, zeros, zeros), observation

    return act


def measure(case: Case, env: VecEnv, step_s: float, rounds: int) -> dict[str, float]:
    """Returns seconds by area, of the whole, and steps per second, of `rounds` episodes in every environment."""
    clock, seeds = Clock(), range(rounds * env.num_envs)
    start = time.perf_counter()
    rollout = collect_episodes(
        env,
        waiting_act(case, env, step_s),
        seeds,
        stop_at_success=False,
        clock=clock,
        keep_images=case.keep_images,
        in_turns=case.in_turns,
    )
    total = time.perf_counter() - start
    seconds = clock.seconds()
    return {area: seconds.get(area, 0.0) for area in AREAS} | {"total": total, "rate": rollout.num_steps / total}


def compare(config: EnvConfig, chunk: int, rounds: int, repeats: int) -> list[dict]:
    """Returns a row a case, of medians; the first round of all cases warms up and does not count."""
    rows: dict[str, list[dict]] = {}
    with contextlib.closing(make_vec_env(config)) as env:
        warm = measure(Case("warm-up"), env, 0.0, 1)
        step_s = warm["env"] / config.horizon
        for number in range(1 + repeats):
            for case in cases(chunk):
                found = measure(case, env, step_s, rounds)
                if number:
                    rows.setdefault(case.name, []).append(found)
                if case.name == "free policy":  # The load of a machine changes.
                    step_s = found["env"] / (rounds * config.horizon)
    table = []
    for case in cases(chunk):
        found = {name: statistics.median(row[name] for row in rows[case.name]) for name in rows[case.name][0]}
        parts = {f"{area}_fraction": found[area] / found["total"] for area in AREAS}
        pairs = zip(rows[case.name], rows.get(case.beside, rows[case.name]), strict=True)
        ratio = statistics.median(own["rate"] / other["rate"] for own, other in pairs)
        table.append({"case": case.name, "steps_per_s": found["rate"], **parts, "beside": case.beside, "ratio": ratio})
    return table


def print_table(rows: list[dict]) -> None:
    print(f"\n{'case':<32}{'steps/s':>9}" + "".join(f"{name:>11}" for name in AREAS.values()) + f"{'ratio':>8}")
    for row in rows:
        shares = "".join(f"{100 * row[f'{area}_fraction']:>9.0f} %" for area in AREAS)
        ratio = f"{row['ratio']:>8.2f}" if row["beside"] else ""
        print(f"{row['case']:<32}{row['steps_per_s']:>9.1f}{shares}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="PushCube-v1", help="(%(default)s)")
    add("--workers", type=int, default=2, help="processes, an even number (%(default)s)")
    add("--envs-per-worker", type=int, default=8, help="(%(default)s)")
    add("--image-size", type=int, default=64, help="pixels; 0 draws nothing (%(default)s)")
    add("--chunk", type=int, default=5, help="actions of a decision (%(default)s)")
    add("--rounds", type=int, default=2, help="episodes of an environment (%(default)s)")
    add("--repeats", type=int, default=3, help="that count, after one that warms up (%(default)s)")
    add("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    config = EnvConfig(
        args.task,
        num_workers=args.workers,
        envs_per_worker=args.envs_per_worker,
        num_groups=2,
        image_size=args.image_size,
    )
    rows = compare(config, args.chunk, args.rounds, args.repeats)
    print_table(rows)
    if args.json:
        load = [round(x, 2) for x in os.getloadavg()]
        machine = {"cores": os.cpu_count(), "load_average": load, "jax": jax.__version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": "python benchmarks/rollout.py", "arguments": vars(args) | {"json": None}}
        args.json.write_text(json.dumps(document | {"machine": machine, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
