"""One of the processes of a run, by the entry point that users start: `pod_process.py MODE FOLDER FLAG...`.

    record   trains, keeps the episodes of interaction in FOLDER, and tries the functions of `sharding.pod`
    replay   one process trains on these episodes, goes on from the other run's imitation, and says how far both differ
    train    trains
    fail     trains, until process 1 raises an error in its second iteration

Prints JSON at last.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]

import train  # noqa: E402, beside the commands


def run(*flags):
    train.parse_flags(["train.py", *flags])
    return train.main([])


def record(folder):
    """Lets the learner keep each process's episodes, and the counters after them."""
    from stare_jax.sharding import pod
    from stare_jax.train import ppo_batch

    collect = ppo_batch.collect

    def keep(*arguments):
        found = collect(*arguments)
        (folder / f"{found[2].iteration}_{pod.process_id()}.pkl").write_bytes(pickle.dumps(found))
        return found

    ppo_batch.collect = keep


def fail():
    """Lets process 1 raise an error while the other one collects."""
    from stare_jax.sharding import pod
    from stare_jax.train import ppo_batch

    collect = ppo_batch.collect

    def broken(act, env, spec, counters, *rest):
        if counters.iteration == 1 and pod.process_id() == 1:
            raise ValueError("a simulator of one host is broken")
        return collect(act, env, spec, counters, *rest)

    ppo_batch.collect = broken


def replay(folder):
    """Gives the learner the episodes of all processes."""
    from stare_jax.rollout.rounds import join_rollouts
    from stare_jax.train import ppo_batch

    def stored(act, env, spec, counters, config, run, window):
        files = sorted(folder.glob(f"{counters.iteration + 1}_*.pkl"))
        rollouts, _, after = zip(*(pickle.loads(file.read_bytes()) for file in files), strict=True)
        whole = join_rollouts(rollouts)
        return whole, whole, after[0]

    ppo_batch.collect = stored


def try_functions():
    """Returns what the functions of `sharding.pod` give this process; each raises where it gives something wrong."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from stare_jax.sharding import pod
    from stare_jax.sharding.mesh import ShardingError, check_batch_size, make_mesh

    own, rows = pod.process_id(), np.arange(48, dtype=np.float32).reshape(16, 3)
    weight = np.arange(64, dtype=np.float32).reshape(8, 8)
    large = pod.gather({"rows": np.full(3_000_000, own, np.uint8)})  # in several pieces
    assert [part["rows"].mean() for part in large] == [0, 1]
    assert pod.gather(own, on_main=True) == ([0, 1] if own == 0 else [1])
    assert pod.on_main(lambda: own) == 0 and pod.agree(own == 1) and not pod.agree(False)
    layouts = []
    for sizes in ({"data": -1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 8}):
        mesh = make_mesh(**sizes)
        batch = pod.to_mesh(pod.share(rows), mesh)
        assert batch.shape == rows.shape and float(jax.jit(lambda x: (x * x).sum())(batch)) == (rows * rows).sum()
        np.testing.assert_array_equal(pod.own_rows(batch), pod.share(rows))
        (here,) = pod.on_host((jax.device_put(weight, NamedSharding(mesh, P("fsdp", "tensor"))),))
        np.testing.assert_array_equal(np.asarray(here), weight)  # all of it is on devices of this process
        layouts.append(tuple(here.sharding.mesh.shape.values()))
    refused = []
    for check in (lambda: make_mesh(fsdp=2), lambda: check_batch_size("size", 12, make_mesh(tensor=8))):
        try:
            check()
        except ShardingError as error:
            refused.append(str(error))
    return {"shared": pod.share(range(5))[:], "dealt": pod.deal(4, 2).tolist(), "layouts": layouts, "refused": refused}


def differences(runs, phases):
    """Returns phase -> largest difference of the parameters of two runs."""
    import jax
    import numpy as np

    from stare_jax.runs.load import load_policy

    found = {}
    for phase in phases:
        a, b = (jax.device_get(load_policy(run / phase).params) for run in runs)
        found[phase] = max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))
    return found


def main():
    mode, folder, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    two, alone, after_imitation = (folder / name for name in ("two", "alone", "after_imitation"))
    if mode == "fail":
        fail()
    if mode in ("train", "fail"):
        sys.exit(run(*flags))
    if mode == "record":
        record(folder)
        code = run(f"--workdir={two}", *flags)
        print(json.dumps({"code": code} | try_functions(), default=list), flush=True)
        os._exit(code)  # what the functions have found is told; JAX's own end is that of the other runs here
    replay(folder)
    codes = [run(f"--workdir={alone}", "--config.phases=sft", *flags)]
    for name in ("config.json", "norm_stats.json", "data", "sft", "tpo/pairs"):
        source, target = two / name, after_imitation / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    codes.append(run(f"--workdir={after_imitation}", "--config.phases=sft,tpo,ppo", *flags))
    report = {"codes": codes, "sft": differences((two, alone), ("sft",))["sft"]}
    report |= differences((two, after_imitation), ("tpo", "ppo"))
    report["moved"] = {p: differences((two / "sft", two / p), ("",))[""] for p in ("tpo", "ppo")}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
