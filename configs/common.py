"""What all configurations start from: the defaults that live in the code, as one `ConfigDict`."""

import ml_collections

from stare_jax.envs import EnvConfig
from stare_jax.models import OpenVLAConfig
from stare_jax.stages import get_task
from stare_jax.train.config import to_dict
from stare_jax.train.ipi import IPIConfig


def base_config(env: EnvConfig, model: OpenVLAConfig, *, name: str) -> ml_collections.ConfigDict:
    """Returns the whole configuration of a run, every field of which can be overridden as `--config.ppo.gamma=0.98`.

    Args:
        env: the task and its simulators.
        model: the policy.
        name: of the run, which is kept in `runs/<name>` unless `--workdir` says otherwise.
    """
    values = to_dict(IPIConfig(env=env, model=model, stages=get_task(env.env_id).params))
    # Fields that default to None hold a number or a tuple once they are set: ConfigDict must not fix their type.
    config = ml_collections.ConfigDict(values, type_safe=False)
    config.name = name
    for section in ("demos", "pairs", "ppo", "tpo"):
        config[section].seed = config.get_ref("seed")
    return config
