"""Collection of pairs by the command on eight fake devices; run by a test in a process of its own, prints JSON."""

import json
import sys
from pathlib import Path

import collect as command
import jax
from toy_run import DressedToy, make_config, make_policy

from stare_jax.config import to_dict
from stare_jax.logging import write_config
from stare_jax.models.normalize import identity_stats
from stare_jax.runs import load
from stare_jax.state.checkpoint import save_params

STATS = identity_stats(7, 6)
rows = []
"""(rows of a device, all rows) at every compilation of `sample`."""


def watched(config, norm_stats):
    policy = make_policy(config, norm_stats)

    def sample(params, observation, key, *, temperature):
        def note(sharding):
            rows.append([sharding.shard_shape(observation.state.shape)[0], len(observation.state)])

        jax.debug.inspect_array_sharding(observation.state, callback=note)
        return policy.sample(params, observation, key, temperature=temperature)

    return policy._replace(sample=sample)


directory = Path(sys.argv[1])
write_config(directory, to_dict(make_config()))
params = jax.jit(make_policy(make_config().model, STATS).init)(jax.random.key(0))
save_params(directory / "sft" / "checkpoints", 1, params, norm_stats=STATS, model={})
load.make_policy = watched
command.make_vec_env = lambda config: DressedToy(config.num_envs)
found = {}
for name, mesh in {"all": [], "one": ["--mesh.data=1"]}.items():
    rows.clear()
    arguments = ["--pairs=1", "--rollouts-per-seed=4", "--max-rollouts=16", "--temperature=3"]
    status = command.main([*arguments, f"--checkpoint={directory / 'sft'}", f"--out={directory / name}", *mesh])
    found[name] = {"status": status, "rows": rows[-1]}
print(json.dumps(found))
