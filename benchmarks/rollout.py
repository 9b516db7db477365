"""Measures where the time of a rollout goes, and what is saved where simulators and policy work at the same time.

All cases take turns in one run, over the same simulators, and each is compared with its neighbour:

- a free policy: the part of the time that is neither the simulators' nor the policy's;
- a policy as dear as the simulators, in one group of environments and in two that take turns. The policy waits, as this
  process does for an accelerator, in proportion to the rows that it decides for. There are twice as many processes as
  cores, so that either group alone keeps all cores at work: with as many as cores, a group has half of them, and two
  groups cannot be more than 4 / 3 times as fast as one;
- decisions on some actions at a time, with images of all states and with those alone that decisions are made in;
- of another task, whose resets are dear: a step in which an environment of every process begins an episode, with and
  without spare simulators, beside steps in which none does.

What is asked of each is printed beside what was found. On two idle cores it takes three to four minutes, and with
`--quick` two.

    python benchmarks/rollout.py --json benchmarks/results/rollout_cpu.json
    python benchmarks/rollout.py --quick
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import time
from typing import Any

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
RESET_EVERY = 4
"""steps from one reset in every process to the next"""


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


class Promise:
    """An action that is on its way from a device, as JAX's arrays are: reading it waits until it is there."""

    def __init__(self, action: np.ndarray, ready_at: float):
        self._action, self._ready_at = action, ready_at
        self.shape, self.ndim = action.shape, action.ndim

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        return self._action

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._action[index]


def waiting_act(case: Case, env: VecEnv, step_s: float) -> Act:
    """Returns an actor that moves at random, slowly, as a device does that makes one decision after another.

    Args:
        case: cost and number of actions of a decision.
        env: simulators of the whole batch.
        step_s: seconds that these take for a step.
    """
    rng, ready_at = np.random.default_rng(0), 0.0

    def act(observation, signals, instructions, is_first):
        nonlocal ready_at
        rows = len(is_first)
        ready_at = max(ready_at, time.perf_counter()) + case.policy_cost * step_s * rows / env.num_envs
        action = rng.uniform(-0.3, 0.3, (rows, case.chunk, env.action_dim)).astype(np.float32)
        zeros = np.zeros(rows, np.float32)
        action = action if case.chunk > 1 else action[:, 0]
        return Decision(Promise(action, ready_at), {}, zeros, zeros), observation

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


def measure_resets(config: EnvConfig, num_steps: int) -> dict[str, float]:
    """Returns milliseconds of a step with a reset in every process and of one without, medians, and their ratio.

    Between two steps a policy waits, as long as a step without a reset takes.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    number, seeds = config.envs_per_worker, itertools.count()
    rng = np.random.default_rng(0)
    with contextlib.closing(make_vec_env(config)) as env:
        env.reset([next(seeds) for _ in range(env.num_envs)])
        spares = range(config.num_workers if config.has_spares else 0)
        begun, wait_s = {spare: next(seeds) for spare in spares}, 0.0
        for step in range(num_steps):
            time.sleep(wait_s)
            reset_seeds = {}
            if step % RESET_EVERY == RESET_EVERY - 1:
                for process in range(config.num_workers):
                    row = process * number + step // RESET_EVERY % number
                    reset_seeds[row] = begun.pop(process) if begun else next(seeds)
                begun = {spare: next(seeds) for spare in spares}
            action = rng.uniform(-0.3, 0.3, (env.num_envs, env.action_dim)).astype(np.float32)
            start = time.perf_counter()
            env.step(action, reset_seeds, next_seeds=begun)
            seconds[bool(reset_seeds)].append(time.perf_counter() - start)
            wait_s = statistics.median(seconds[False])
    found = {name: 1e3 * statistics.median(seconds[has]) for name, has in (("reset_ms", True), ("step_ms", False))}
    return found | {"ratio": found["reset_ms"] / found["step_ms"]}


def goals(rows: list[dict], resets: dict[str, dict[str, float]]) -> list[dict]:
    """Returns what is asked for, what was found, and whether that is enough."""
    ratios = {row["case"]: row["ratio"] for row in rows}
    chunks = next(name for name in ratios if name.endswith(", and two groups"))
    asked = [
        ("neither simulators nor policy, of the time", rows[0]["other_fraction"], "at most", 0.05),
        ("dear policy: two groups beside one, steps/s", ratios["dear policy, two groups"], "at least", 1.6),
        (f"{chunks} beside all images, steps/s", ratios[chunks], "at least", 2.0),
        ("step with resets beside one without, spares", resets["spares"]["ratio"], "at most", 1.2),
    ]
    table = []
    for what, found, bound, limit in asked:
        is_met = found <= limit if bound == "at most" else found >= limit
        table.append({"goal": what, "found": found, "asked": f"{bound} {limit:g}", "is_met": is_met})
    return table


def print_goals(resets: dict[str, dict[str, float]], found: list[dict]) -> None:
    print()
    for name, row in resets.items():
        times = f"{row['reset_ms']:.1f} ms a step with resets, {row['step_ms']:.1f} ms without"
        print(f"{name}: {times}, {row['ratio']:.2f}")
    print()
    for row in found:
        verdict = "met" if row["is_met"] else "MISSED"
        print(f"{row['goal']:<48}{row['found']:>8.3f}  {row['asked']:<14}{verdict}")


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
    add("--workers", type=int, default=4, help="processes, an even number, twice the cores (%(default)s)")
    add("--envs-per-worker", type=int, default=4, help="(%(default)s)")
    add("--image-size", type=int, default=64, help="pixels; 0 draws nothing (%(default)s)")
    add("--chunk", type=int, default=5, help="actions of a decision (%(default)s)")
    add("--rounds", type=int, default=2, help="episodes of an environment (%(default)s)")
    add("--repeats", type=int, default=3, help="that count, after one that warms up (%(default)s)")
    add("--reset-task", default="PutEggplantInBasketScene-v1", help="whose resets are measured (%(default)s)")
    add("--reset-steps", type=int, default=48, help="steps of these, of four environments a process (%(default)s)")
    add("--quick", action="store_true", help="a single repeat of a single round")
    add("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    if args.quick:
        args.rounds = args.repeats = 1
    config = EnvConfig(
        args.task,
        num_workers=args.workers,
        envs_per_worker=args.envs_per_worker,
        num_groups=2,
        image_size=args.image_size,
    )
    rows = compare(config, args.chunk, args.rounds, args.repeats)
    resetting = EnvConfig(args.reset_task, num_workers=args.workers // 2, envs_per_worker=4, image_size=args.image_size)
    resets = {
        name: measure_resets(dataclasses.replace(resetting, has_spares=has_spares), args.reset_steps)
        for name, has_spares in (("no spares", False), ("spares", True))
    }
    print_table(rows)
    print_goals(resets, found := goals(rows, resets))
    if args.json:
        load = [round(x, 2) for x in os.getloadavg()]
        machine = {"cores": os.cpu_count(), "load_average": load, "jax": jax.__version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": "python benchmarks/rollout.py", "arguments": vars(args) | {"json": None}}
        document |= {"machine": machine, "rows": rows, "resets": resets, "goals": found}
        args.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
