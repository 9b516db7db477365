"""Evaluation by the command on eight fake devices; run by a test in a process of its own, prints one line of JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_evaluation import load_command, use_toy, write_run

from stare_jax.evaluate.record import load_evaluation

MESHES = {
    "one": ["--mesh.data=1", "--mesh.fsdp=1", "--mesh.tensor=1"],
    "all": [],  # as the run has it: data=-1
    "tensor": ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"],
}
rows = []
"""(rows of a device, all rows) at every compilation of `sample`."""


def watched(policy):
    def sample(params, observation, key, *, temperature):
        def note(sharding):
            rows.append([sharding.shard_shape(observation.state.shape)[0], len(observation.state)])

        jax.debug.inspect_array_sharding(observation.state, callback=note)
        return policy.sample(params, observation, key, temperature=temperature)

    return policy._replace(sample=sample)


directory = Path(sys.argv[1])
command, policy = load_command(), write_run(directory)
found, evaluations = {}, {}
for name, options in MESHES.items():
    rows.clear()
    with pytest.MonkeyPatch.context() as patch:
        use_toy(command, watched(policy), patch)
        layout = ["--num-episodes=6", "--num-workers=1", "--envs-per-worker=6"]
        arguments = [f"--run={directory}", "--phase=ppo", f"--name={name}", *layout, *options]
        status = command.main(arguments)
    evaluations[name] = load_evaluation(directory / f"eval/{name}.json").episodes
    is_same = all(map(np.array_equal, evaluations[name], evaluations["one"]))
    found[name] = {"status": status, "rows": rows[-1], "is_same": is_same}
print(json.dumps(found))
