"""A pi0.5 for the toy that compiles in seconds."""

import dataclasses

from stare_jax.envs import toy
from stare_jax.models import make_policy, pi05_state, with_prompt
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution


def flow_policy(**changes):
    expert = GemmaConfig(width=32, depth=1, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
    config = pi05_state(
        6,
        action_dim=2,
        model_action_dim=2,
        paligemma=expert,
        expert=expert,
        prompt_length=8,
        value_dims=(64, 64),
        execution=Execution(),
    )
    return make_policy(dataclasses.replace(config, **changes), toy.norm_stats())


def prompted(policy, observation):
    instructions = [toy.task_spec().instruction] * len(observation.state)
    return with_prompt(policy, observation, instructions)
