"""Measures how well the experts can be imitated from the state, and how the imitation decides best.

For each task and seed an expert's demonstrations are collected, most of them disturbed by noise, and imitated by a
policy that sees nothing but `low_dim_state`: an MLP, or `openvla_state`, which takes several times as long. The
imitation then acts in several ways: by the most likely bin of each number of an action ("mode"), by the mean of its
bins ("mean"), and by samples at a temperature. Rates are success at any step and success at the end of an episode, with
95 % Wilson intervals; behind them is the share of episodes that complete each stage. The WidowX tasks have 24 official
starts (eggplant: 64), so that a rate rests on no more; where nothing is random each is run once.

Runs and results are kept in the folder and not repeated; an interrupted run goes on with the same command.

    python benchmarks/imitation.py --out runs/imitation --json benchmarks/results/imitation_cpu.json
    python benchmarks/imitation.py --out runs/imitation --tasks StackCube-v1 --demos 100 --seeds 0 1
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from stare_jax.config import from_dict, home_path
from stare_jax.envs import EnvConfig, make_vec_env
from stare_jax.evaluate.protocol import EvalConfig, evaluate
from stare_jax.evaluate.record import evaluation_file, load_evaluation, partial_folder, save_evaluation
from stare_jax.evaluate.summary import summarize
from stare_jax.models import MLPConfig, ModelConfig, make_policy, openvla_state
from stare_jax.models.bins import Greedy
from stare_jax.runs.config import RunConfig
from stare_jax.runs.evaluation import evaluation_conditions
from stare_jax.runs.ipi import run_ipi
from stare_jax.runs.load import identify_checkpoint
from stare_jax.runs.start import read_statistics
from stare_jax.sharding.mesh import make_mesh
from stare_jax.stages import TASKS
from stare_jax.state.checkpoint import load_params
from stare_jax.state.train_state import CHECKPOINTS, abstract_params

ROOT = Path(__file__).resolve().parents[1]
LINGER = 8
"""actions of a demonstration after its success, so that the imitation learns to stay"""


class Decision(NamedTuple):
    """A way to decide."""

    greedy: Greedy
    temperature: float


DECISIONS: Mapping[str, Decision] = {
    "mode": Decision("mode", 0.0),
    "mean": Decision("mean", 0.0),
    "sampled_0.4": Decision("mode", 0.4),
    "sampled_1": Decision("mode", 1.0),
}


def make_model(name: str, state_dim: int, label_width: float) -> ModelConfig:
    if name == "openvla":
        return openvla_state(state_dim, label_width=label_width)
    hidden_dims = (192, 192, 192)
    return MLPConfig(state_dim, action_dim=7, num_bins=256, hidden_dims=hidden_dims, label_width=label_width)


def run_config(env_id: str, args: argparse.Namespace, seed: int) -> RunConfig:
    sys.path.insert(0, str(ROOT))
    from configs.presets import base_config, demos_with_recoveries, imitation_on_cpu

    env = EnvConfig(
        env_id, image_size=0, use_state="low_dim", num_workers=args.workers, envs_per_worker=args.environments
    )
    config = base_config(env, make_model(args.model, env.state_dim, args.label_width), name="imitation")
    config.phases = ("sft",)
    config.seed = seed
    demos_with_recoveries(config)
    config.demos.num_demos = args.demos
    config.demos.linger = LINGER
    imitation_on_cpu(config, args.steps)
    config.sft.batch_size = 128
    config.evaluation.num_episodes = 0
    values = config.to_dict()
    del values["name"]
    return from_dict(RunConfig, values)


def measure(config: RunConfig, directory: Path, name: str, num_episodes: int) -> dict[str, Any]:
    """Returns the summary of the imitation that decides in one way; it is measured once and kept."""
    file = evaluation_file(directory, name.replace(".", "_"))
    if not file.exists():
        decision, num_starts = DECISIONS[name], config.env.scene.num_starts
        if num_starts and not decision.temperature:
            num_episodes = num_starts
        protocol = EvalConfig(num_episodes=num_episodes, temperature=decision.temperature, num_videos=0)
        model, phase = dataclasses.replace(config.model, greedy=decision.greedy), directory / "sft"
        policy = make_policy(model, read_statistics(directory))
        params = load_params(phase / CHECKPOINTS, abstract_params(policy, make_mesh(data=1)))
        with contextlib.closing(make_vec_env(config.env)) as env:
            evaluation, _ = evaluate(
                policy,
                params,
                env,
                config.env.spec,
                protocol,
                conditions=evaluation_conditions(config.env, identify_checkpoint(phase)[1]),
                folder=partial_folder(file),
                desc=name,
            )
        save_evaluation(file, evaluation, phase=name)
    return summarize(load_evaluation(file))._asdict()


def print_row(row: Mapping[str, Any]) -> None:
    rates = [[100 * value for value in row[outcome]] for outcome in ("success_once", "success_end")]
    cells = (f"{rate:.1f} [{low:.1f}, {high:.1f}]" for rate, low, high in rates)
    print(f"{row['env_id']:<46}{row['seed']:>3}  {row['decision']:<13}{row['num_distinct']:>5}", end="")
    print("".join(f"{cell:>23}" for cell in cells), end="   ")
    print(", ".join(f"{name} {100 * rate:.0f}" for name, rate in row["stages"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=home_path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="ENV_ID", help="(all)")
    parser.add_argument("--decisions", nargs="+", choices=DECISIONS, default=list(DECISIONS), help="(all)")
    parser.add_argument("--model", choices=("mlp", "openvla"), default="mlp", help="(%(default)s)")
    parser.add_argument("--demos", type=int, default=500, help="demonstrations (%(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="of imitation (%(default)s)")
    parser.add_argument("--label-width", type=float, default=4.0, help="in bins (%(default)s)")
    parser.add_argument("--episodes", type=int, default=200, help="of an evaluation (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    parser.add_argument("--workers", type=int, default=1, help="processes of simulators (%(default)s)")
    parser.add_argument("--environments", type=int, default=16, help="of a process (%(default)s)")
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    rows = []
    for env_id in args.tasks:
        for seed in args.seeds:
            config = run_config(env_id, args, seed)
            directory = args.out / f"{env_id}_{args.model}_{args.demos}_{args.steps}_{args.label_width:g}_{seed}"
            run_ipi(config, directory)
            for name in args.decisions:
                summary = measure(config, directory, name, args.episodes)
                stages = {stage.name: stage.num_completed / summary["num_episodes"] for stage in summary["stages"]}
                fields = ("num_episodes", "num_distinct", "success_once", "success_end")
                row = {"env_id": env_id, "seed": seed, "decision": name} | {key: summary[key] for key in fields}
                rows.append(row | {"stages": stages})
    print(f"{'task':<46}{'seed':>4} {'decision':<13}{'n':>5}{'any step, %':>23}{'end, %':>23}   completed, %")
    for row in rows:
        print_row(row)
    if args.json:
        command = f"python benchmarks/imitation.py --model {args.model} --demos {args.demos} --steps {args.steps}"
        command += f" --label-width {args.label_width:g} --episodes {args.episodes}"
        command += f" --seeds {' '.join(map(str, args.seeds))}"
        document = {"command": command, "machine": {"cores": os.cpu_count(), "jax": jax.__version__}, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
