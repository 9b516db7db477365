"""Compares settings of PPO: short runs from one imitation of PushCube, each with one thing changed.

The base is `configs/study_pushcube_state.py:sta_ppo_zero`, STA-PPO from the low-dimensional state with potentials
that end at zero. A run takes about 20 thousand environment steps, a tenth of a run of the configuration, so the numbers
say how fast a setting learns, not where it ends. `before` is the imitation, `after` the policy at the end, both sampled
at temperature 1 on the same 300 episodes. Runs are kept and not repeated. Once the first row is there, several
processes can share the others with `--only`, each with imitations of its own; the table shows all runs in the folder.

    python benchmarks/ppo_settings.py --out runs/ppo_settings --json benchmarks/results/ppo_settings_cpu.json
    taskset -c 0 python benchmarks/ppo_settings.py --out runs/ppo_settings --only critic_shared critic_detached
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.config import home_path
from stare_jax.logging import last_lines, read_metrics

VARIANT = "sta_ppo_zero"
TRAIN = Path(__file__).parents[1] / "launch" / "train.py"
NUM_ITERATIONS = 12
CONTROLLED = {"num_iterations": NUM_ITERATIONS, "checkpoint_every": NUM_ITERATIONS}
LAST = 5
"""iterations whose mean is shown of what the updates report"""


class Setting(NamedTuple):
    """One thing that is changed."""

    topic: str
    change: str
    ppo: dict = {}
    sft: str = "width30"
    """which imitation it starts from"""


IMITATIONS = {
    "width30": {},
    "width5": {"label_width": 5.0},
    "width15": {"label_width": 15.0},
    "raw": {},
    "shared": {"critic": "shared"},
    "detached": {"critic": "detached"},
}
"""changes of the model that imitates; "raw" leaves actions as the simulator takes them, all seven dimensions decided"""

SETTINGS = {
    "base": Setting("as committed", "configs/study_pushcube_state.py, shorter"),
    "plain": Setting("as committed", "PPO without shaping", {"shaping": False}),
    "raw_actions": Setting("actions", "not normalised, 7 dimensions", sft="raw"),
    "width_5": Setting("exploration", "label width 5", sft="width5"),
    "width_5_hot": Setting("exploration", "label width 5, temperature 2", {"temperature": 2.0}, sft="width5"),
    "width_15": Setting("exploration", "label width 15", sft="width15"),
    "lr_1e-4": Setting("step size", "learning rate 1e-4", {"optimizer.learning_rate": 1e-4}),
    "lr_1e-3": Setting("step size", "learning rate 1e-3", {"optimizer.learning_rate": 1e-3}),
    "kl_0.03": Setting("step size", "KL stop at 0.03", {"target_kl": 0.03}),
    "kl_none": Setting("step size", "no KL stop", {"target_kl": 1e9}),
    "critic_shared": Setting("critic", "on the policy's features", sft="shared"),
    "critic_detached": Setting("critic", "on its features, detached", sft="detached"),
    "critic_cold": Setting("critic", "own, no warm-up", {"value_warmup_iterations": 0}),
    "lambda_0.95": Setting("critic", "GAE lambda 0.95", {"gae_lambda": 0.95}),
    "batch_32": Setting(
        "batch", "32 episodes, 36 iterations", {"num_episodes": 32, "num_iterations": 36, "value_warmup_iterations": 3}
    ),
    "batch_192": Setting("batch", "192 episodes, 6 iterations", {"num_episodes": 192, "num_iterations": 6}),
    "num_steps": Setting("episodes", "1500 steps, cut episodes bootstrapped", {"num_steps": 1500}),
    "bootstrap": Setting(
        "episodes", "time limit bootstrapped, potential kept", {"time_limit": "bootstrap", "terminal_potential": "keep"}
    ),
}


def config_flags(overrides: dict) -> list[str]:
    """Returns the configuration and what is changed in it, as `launch/train.py` takes them."""
    config = f"--config={TRAIN.parents[1] / 'configs' / 'study_pushcube_state.py'}:{VARIANT}"
    return [config, *(f"--config.{name}={value}" for name, value in overrides.items())]


def changes(name: str) -> dict:
    """Returns the fields of the configuration that a setting changes."""
    setting = SETTINGS[name]
    model = {f"model.{field}": value for field, value in IMITATIONS[setting.sft].items()}
    return model | {f"ppo.{field}": value for field, value in (CONTROLLED | setting.ppo).items()}


def train(directory: Path, overrides: dict) -> None:
    """Runs `launch/train.py` in a directory, or goes on with what is there; its output is kept beside the directory."""
    command = [sys.executable, TRAIN, f"--workdir={directory}", *config_flags(overrides)]
    log = directory.with_name(f"{directory.name}.log")  # A dot in the name is no suffix.
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        sys.exit(f"{directory.name}: launch/train.py ended with {status}, see {log}")


def imitate(out: Path, name: str, workers: dict) -> Path:
    """Returns the folder of an imitation; all learn from the demonstrations of the first."""
    first, directory = out / "sft_width30", out / f"sft_{name}"
    overrides = {
        "phases": ("sft",),
        "evaluation.num_episodes": 300,
        **workers,
        **{f"model.{k}": v for k, v in IMITATIONS[name].items()},
    }
    if directory != first:
        demos = imitate(out, "width30", workers) / "data" / "demos"
        if name == "raw":
            demos = _without_statistics(demos, out / "demos_raw")
        overrides["demos_from"] = str(demos)
    if not (directory / "report.html").exists():
        train(directory, overrides)
    return directory


def _without_statistics(demos: Path, copy: Path) -> Path:
    """Copies a data set and replaces its quantiles of actions by the range the simulator takes."""
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}.unfinished")
        shutil.copytree(demos, unfinished, dirs_exist_ok=True)
        path = unfinished / "norm_stats.json"
        content = json.loads(path.read_text("utf-8"))
        for statistics in content.values():
            action = statistics["action"]
            action["q01"], action["q99"] = [-1.0] * len(action["q01"]), [1.0] * len(action["q99"])
        path.write_text(json.dumps(content), "utf-8")
        unfinished.rename(copy)
    return copy


def run_setting(out: Path, name: str, workers: dict, seed: int) -> None:
    setting, directory = SETTINGS[name], out / f"{name}_{seed}"
    if (directory / "report.html").exists():
        return
    print(f"{name}: {setting.change}", flush=True)
    sft = imitate(out, setting.sft, workers)
    start = {"phases": ("ppo",), "init_from": str(sft / "sft"), "seed": seed}
    train(directory, start | workers | changes(name))


def measure(out: Path, name: str, seeds: list[int]) -> dict | None:
    """Returns a row of the table, means over the seeds that are there."""
    directories = [out / f"{name}_{seed}" for seed in seeds]
    rows = [_measure_run(directory) for directory in directories if (directory / "report.html").exists()]
    if not rows:
        return None
    setting = SETTINGS[name]
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    means["before"] = _evaluated(out / f"sft_{setting.sft}", "sft")
    means["gain"] = means["after"] - means["before"]
    return {"name": name, "topic": setting.topic, "change": setting.change, "seeds": len(rows), **means}


def _evaluated(directory: Path, phase: str) -> float:
    return json.loads((directory / "eval" / f"{phase}.json").read_text("utf-8"))["summary"]["success_once"]["value"]


def _measure_run(directory: Path) -> dict[str, float]:
    lines = last_lines(read_metrics(directory), "ppo")
    seconds = sum(line[f"time/{area}_s"] for line in lines for area in ("env", "policy", "update", "other"))
    diagnostics = ("approx_kl", "clip_frac", "entropy", "explained_variance")
    return {
        "after": _evaluated(directory, "ppo"),
        "env_steps": lines[-1]["env/steps"],
        "env_steps_per_s": lines[-1]["env/steps"] / seconds,
        "epochs": float(np.mean([line["ppo/epochs"] for line in lines])),
        **{name: float(np.mean([line[f"ppo/{name}"] for line in lines[-LAST:]])) for name in diagnostics},
    }


def print_table(rows: list[dict]) -> None:
    print(f"\n{'topic':<13}{'setting':<40}{'before':>7}{'after':>7}{'gain':>7}{'steps':>7}{'steps/s':>9}", end="")
    print(f"{'epochs':>8}{'KL':>7}{'clip':>6}{'entropy':>9}{'EV':>6}")
    for row in rows:
        before, after, gain = (100 * row[key] for key in ("before", "after", "gain"))
        print(f"{row['topic']:<13}{row['change']:<40}{before:>7.0f}{after:>7.0f}{gain:>+7.0f}", end="")
        print(f"{row['env_steps'] / 1000:>6.0f}k{row['env_steps_per_s']:>9.0f}{row['epochs']:>8.1f}", end="")
        print(f"{row['approx_kl']:>7.3f}{row['clip_frac']:>6.2f}{row['entropy']:>9.2f}", end="")
        print(f"{row['explained_variance']:>6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=home_path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="which")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=1, help="simulator processes (%(default)s)")
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the table there")
    args = parser.parse_args()
    workers = {"env.num_workers": args.workers, "env.envs_per_worker": 16}
    for seed in args.seeds:
        for name in args.only:
            run_setting(args.out, name, workers, seed)
    rows = [row for name in SETTINGS if (row := measure(args.out, name, args.seeds))]
    print_table(rows)
    if args.json:
        machine = {"cores": os.cpu_count(), "jax": jax.__version__}
        command = f"python benchmarks/ppo_settings.py --out {args.out} --workers {args.workers}"
        command += f" --seeds {' '.join(map(str, args.seeds))} --only {' '.join(row['name'] for row in rows)}"
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": command, "machine": machine, "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
