"""Measures what a configuration spends its time in: decisions, and whole iterations of PPO, without a simulator.

The policy, with random weights, acts on stored images through the functions of a run, and learns from its episodes:

- act: a decision for a group of environments, from bytes on the host to actions on the host; the device's part alone;
- an iteration: the rollout, whose simulators are toys; what precedes the updates (targets, contexts, scores); the
  updates, and the root mean square of the log-ratios in the first minibatch;
- the largest memory in use on a device, beside the peak that `launch/plan.py` foresees;
- all of it on meshes of several devices, over which the same rows are split.

The first iteration compiles and does not count. What has been measured is written after every mesh.

    python benchmarks/iteration.py --config=configs/quickstart.py:pi05 --config.ppo.num_episodes=8
    python benchmarks/iteration.py --config=configs/ipi_maniskill.py:PushCube-v1 --config.mesh.fsdp=1 \\
        --config.model.tokenizer=words '--config.model.prompt_template={instruction}' --plan --out=result.json
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/iteration.py --config=configs/quickstart.py \\
        --meshes=data1,data8,fsdp8
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from device import reported, summary
from stored import StoredEnv, draw_observation, make_acting, measure_acting, peak_bytes, random_params

from stare_jax.config import from_dict, home_path
from stare_jax.documents import read_json
from stare_jax.envs.groups import GroupedEnvs
from stare_jax.envs.toys import push
from stare_jax.logging import Clock, print_table, replace_text
from stare_jax.models import Policy
from stare_jax.plan.programs import Forecast, with_mesh
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.fit import check_fit
from stare_jax.runs.plan import plan_policy
from stare_jax.sharding import arrays
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.contexts import plan_contexts
from stare_jax.state.optimizer import frozen_params, make_optimizer
from stare_jax.state.train_state import TrainState, copy_trainable, create_state
from stare_jax.train import ppo, ppo_batch
from stare_jax.train.ppo_metrics import update_metrics
from stare_jax.train.update import jit_step

GB = 1e9
ROOT = Path(__file__).resolve().parents[1]
ANY_MEMORY = 9999
"""Memory of a plan's devices in GB: whether something fits is not asked here."""
PROGRAMS = {"sample": "rollout", "ppo": "update"}
"""Program of a plan -> the part of an iteration that is over when it has run."""
PARTS = ("act_s", "env_s", "record_s", "prepare_s", "update_s")
"""Parts of an iteration: the policy's decisions, the toys, the collector's own time, what precedes updates, updates."""


# ---- One mesh --------------------------------------------------------------------------------------------------------


class Learner:
    """A policy that acts and learns as `train_ppo` has it do, with toys in the simulators' place."""

    def __init__(self, config: RunConfig, seed: int):
        """Fills the devices of the configuration's mesh with random parameters and the optimiser's state."""
        # The same work in every iteration, whatever the policy does.
        sizes, self.config = config.mesh, dataclasses.replace(config.ppo, stop_at_success=False, target_kl=None)
        self.mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
        self.policy: Policy = plan_policy(config)
        group = config.env.of_group.num_envs
        groups = [StoredEnv(self.policy, group, horizon=config.env.horizon) for _ in range(config.env.num_groups)]
        self.env = groups[0] if len(groups) == 1 else GroupedEnvs(groups)
        params = random_params(self.policy, seed, self.mesh)
        self.tx = make_optimizer(self.config.optimizer, num_steps=None)
        self.reference = None
        if self.config.kl_coef is not None:
            self.reference = copy_trainable(self.policy, params, self.config.optimizer, self.mesh)
        freeze = frozen_params(self.policy, self.config.optimizer)
        rules = self.policy.sharding_rules
        self.state: TrainState = create_state(params, self.tx, mesh=self.mesh, rules=rules, freeze=freeze)
        self._make_functions(config.env.horizon)
        self._number = itertools.count()

    def _make_functions(self, horizon: int) -> None:
        policy, config = self.policy, self.config
        part = config.microbatch_size or config.minibatch_size
        self._step = jit_step(ppo.make_ppo_step(policy, self.tx, config), self.state)
        self._prepare = ppo.make_prepare(push.TOY.spec, config, chunk=policy.chunk)
        groups = [env.num_envs for env in self.env.groups]
        self._kept = plan_contexts(policy, config, horizon, groups, self.mesh)
        self._encode = ppo_batch.make_encode(policy, self._kept, part)
        self._rescore = ppo_batch.make_rescore(
            policy, config.temperature, config.minibatch_size, config.microbatch_size
        )
        self._is_rescoring = policy.compute_dtype != "float32" if config.rescore is None else config.rescore

    def iterate(self) -> dict[str, Any]:
        """Collects episodes and learns from them; returns seconds, by part, and what the updates say."""
        config, mesh, number, clock = self.config, self.mesh, next(self._number), Clock()
        key, rng = jax.random.fold_in(jax.random.key(0), number), np.random.default_rng(number)
        start = time.perf_counter()
        num_seeds = config.num_steps or config.num_episodes
        store = ppo_batch.make_store(self._kept, mesh)
        rollout = collect_episodes(
            self.env,
            # Nothing of the actor is left when the updates begin.
            policy_act(self.policy, self.state.params, key, temperature=config.temperature, mesh=mesh, keep=store),
            number * num_seeds + np.arange(num_seeds) // config.group_size,
            stop_at_success=False,
            max_steps=config.num_steps,
            clock=clock,
            keep_images="decisions",
            in_turns=True,
        )
        seconds, rollout_peak = clock.seconds(), peak_bytes()
        prepared = time.perf_counter()
        batch = self._encode(self.state.params, self._prepare(rollout), mesh, store)
        batch = self._rescore(self.state.params, batch, mesh) if self._is_rescoring else batch
        jax.block_until_ready(batch.contexts)
        updated, updates = time.perf_counter(), []
        size = config.minibatch_size
        for minibatch in ppo_batch.minibatches(batch, size=size, rng=rng, num_epochs=config.num_epochs):
            inputs = (arrays.to_mesh(minibatch, mesh), np.bool_(True), np.float32(0.0), self.reference, batch.contexts)
            self.state, metrics = self._step(self.state, *inputs)
            updates.append(metrics)
        updates, num_decisions = jax.device_get(updates), int(batch.decisions.valid.sum())
        end = time.perf_counter()
        said = update_metrics(updates, num_decisions=num_decisions, size=size)
        parts = (seconds["policy"], seconds["env"], seconds["other"], updated - prepared, end - updated)
        return {
            **dict(zip(PARTS, parts, strict=True)),
            "iteration_s": end - start,
            "num_decisions": num_decisions,
            "num_updates": len(updates),
            "first_log_ratio_rms": said["ppo/first_log_ratio_rms"],
            "peak_bytes": {"rollout": rollout_peak, "update": peak_bytes()},
        }


def measure(config: RunConfig, *, repeats: int, seed: int) -> dict[str, Any]:
    """Returns the measurements of one mesh; the first iteration and the first decisions do not count."""
    learner, num_rows = Learner(config, seed), config.env.of_group.num_envs
    row: dict[str, Any] = {"mesh": dict(learner.mesh.shape), "rows": num_rows}
    start_peak, start = peak_bytes(), time.perf_counter()
    first = learner.iterate()
    row |= {"first_iteration_s": time.perf_counter() - start, "first_log_ratio_rms": first["first_log_ratio_rms"]}
    # Later peaks are the largest of the whole process.
    row["peak_bytes"] = {"start": start_peak} | first["peak_bytes"]
    observation, words = draw_observation(learner.policy, num_rows, seed), (push.INSTRUCTION,) * num_rows
    options = {"temperature": learner.config.temperature, "mesh": learner.mesh}
    acting = make_acting(learner.policy, learner.state.params, observation, words, **options)
    acting.decide(), acting.decide_on_device()
    row |= {name: summary(seconds) for name, seconds in measure_acting(acting, 3 * repeats).items()}
    del acting
    found = [learner.iterate() for _ in range(repeats)]
    for name in (*PARTS, "iteration_s", "num_decisions", "num_updates"):
        row[name] = statistics.median(one[name] for one in found)
    return row | {"decisions_per_s": row["num_decisions"] / row["iteration_s"]}


# ---- Meshes, and their plans -----------------------------------------------------------------------------------------


def parse_meshes(text: str, num_devices: int | None = None) -> list[MeshConfig]:
    """Returns the meshes of a text such as `data1,data8,fsdp8`; of `all` every power of two that there is.

    Raises:
        argparse.ArgumentTypeError: a word is not of this form.
    """
    if text == "all":
        numbers = [2**i for i in range((num_devices or jax.device_count()).bit_length())]
        text = ",".join(f"{axis}{n}" for n in numbers for axis in ("data", "fsdp") if n > 1 or axis == "data")
    words = [re.fullmatch(r"(data|fsdp)([1-9]\d*)", word) for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected all, or words such as data1,data8,fsdp8")
    return [MeshConfig(**({"data": 1} | {found[1]: int(found[2])})) for found in words]


@contextlib.contextmanager
def planning(arguments: Sequence[str], mesh: MeshConfig) -> Iterator[Callable[[], dict[str, float]]]:
    """Starts `launch/plan.py`, which works beside, with less right to the processors.

    Yields:
        A function that waits for it and returns the peaks of memory that it foresees, by part of an iteration; it
        raises RuntimeError where the plan failed.
    """

    def wait():
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"launch/plan.py ended with {process.returncode}: {said.strip().splitlines()[-1]}")
        forecasts = [from_dict(Forecast, read_json(file)) for file in Path(folder).glob("*.json")]
        return {PROGRAMS[one.program]: one.peak for one in forecasts}

    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"--config.mesh.{name}={value}" for name, value in dataclasses.asdict(mesh).items()]
        devices = f"--devices={mesh.data * mesh.fsdp * mesh.tensor}x{ANY_MEMORY}GB"
        command = ["nice", "-n", "5", sys.executable, str(ROOT / "launch" / "plan.py"), *arguments, *sizes, devices]
        command += ["--programs=sample,ppo", f"--kept={folder}"]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            try:
                yield wait
            finally:
                process.kill()


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Prints times of all meshes, and their memory."""
    header = ("mesh", "rows", "act, ms", "device, ms", "iteration, s", *PARTS, "decisions/s", "log-ratio")
    lines = []
    for row in rows:
        times = (f"{1e3 * row[name]['median_s']:.1f}" for name in ("act", "device"))
        parts = (f"{row[name]:.3f}" for name in ("iteration_s", *PARTS))
        lines.append((_name(row), row["rows"], *times, *parts, f"{row['decisions_per_s']:.2f}"))
        lines[-1] += (f"{row['first_log_ratio_rms']:.2g}",)
    print_table(header, lines)
    for row in rows:
        for name, found in row["peak_bytes"].items():
            foreseen = row.get("plan_bytes", {}).get(name)
            said = "not counted by this device" if found is None else f"{found / GB:.3f} GB"
            print(f"{_name(row)}, peak after {name}: {said}" + (f"; plan {foreseen / GB:.3f} GB" if foreseen else ""))


def _name(row: dict[str, Any]) -> str:
    return "x".join(f"{axis}{size}" for axis, size in row["mesh"].items() if size > 1) or "data1"


# ---- Command ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from configuration import split_fields

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="the run; --config.section.field=VALUE changes it")
    add("--meshes", type=parse_meshes, metavar="NAMES", help="data1,data8,fsdp8 or all; without it the run's own")
    add("--plan", action="store_true", help="also ask launch/plan.py for the first mesh's peaks of memory")
    add("--repeats", type=int, default=2, help="iterations that count (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and images (%(default)s)")
    add("--out", type=home_path, metavar="PATH", help="also write the result there, as JSON")
    fields, others = split_fields(sys.argv[1:] if argv is None else argv)
    return parser.parse_args(others, argparse.Namespace(fields=fields))


def main(argv: Sequence[str] | None = None) -> None:
    # `configs` and the commands, which are no packages that are installed.
    sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "launch")) if folder not in sys.path]
    from configuration import load_configuration

    # This process has the device to itself; what is left over is for cuBLAS and cuDNN.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    args = parse(argv)
    values = load_configuration(args.config, args.fields)
    config = from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"})
    check_fit(config, is_here=False)
    meshes = args.meshes or [with_mesh(config, jax.device_count()).mesh]
    machine = {"device": jax.devices()[0].device_kind, "num_devices": jax.device_count(), "cores": os.cpu_count()}
    machine |= {"load_average": os.getloadavg(), "python": platform.python_version(), "jax": jax.__version__}
    command = ["python", "benchmarks/iteration.py", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {"command": shlex.join(command), "machine": machine, "rows": [], "errors": []}
    rows, errors = result["rows"], result["errors"]
    choice = [f"--config={args.config}", *args.fields]
    with planning(choice, meshes[0]) if args.plan else contextlib.nullcontext() as wait_for_plan:
        for mesh in meshes:
            with reported(errors, f"mesh {dataclasses.asdict(mesh)}"):
                rows.append(measure(dataclasses.replace(config, mesh=mesh), repeats=args.repeats, seed=args.seed))
            write(result, args.out)
        for row in rows:
            if args.plan and row["mesh"] == dataclasses.asdict(meshes[0]):
                with reported(errors, "plan"):
                    row["plan_bytes"] = wait_for_plan()
                write(result, args.out)
    print_rows(rows)
    if errors:
        sys.exit("\n".join(errors))


def write(result: dict[str, Any], out: Path | None) -> None:
    """Writes what has been measured so far, if there is a file for it."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
