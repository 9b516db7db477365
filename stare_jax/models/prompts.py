"""Lengths of prompts: the shortest of a few that holds all instructions that a policy will read.

Programs are compiled for one length, and padding is masked and takes no position: a policy gives the same numbers at
any length, and the same parameters have them all.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from stare_jax.models import MLPConfig, ModelConfig, Policy
from stare_jax.models.blank import blank_policy

PROMPT_LENGTHS = (16, 32, 48, 64, 96, 128, 200)
"""tokens that prompts are padded to; few, so that other instructions seldom mean other programs."""


def count_tokens(policy: Policy, instructions: Sequence[str]) -> int:
    """Returns the tokens of the longest prompt that a policy makes of some instructions, whatever the state.

    Raises:
        ValueError: one does not fit, or is refused by the tokenizer, or there is no tokenizer.
    """
    if not instructions:
        return 0
    state_dim = policy.observation_shape(1).state.shape[1]
    # Beyond the data's range numbers are the longest: "-1", and "255", of which Gemma and Llama read each digit.
    ends = np.repeat(np.float32([-1e6, 1e6]), len(instructions))
    _, mask = policy.tokenize([*instructions] * 2, np.tile(ends[:, None], (1, state_dim)))
    return int(mask.sum(axis=1).max(initial=0))


def with_short_prompts(config: ModelConfig, instructions: Sequence[str]) -> ModelConfig:
    """Returns the same model with prompts that are padded no further than some instructions need.

    Args:
        config: its `prompt_length` is the most that is returned.
        instructions: all that the policy will read; without any the model stays as it is.

    Raises:
        ValueError: see `count_tokens`.
    """
    if isinstance(config, MLPConfig) or not instructions:
        return config
    needed = count_tokens(blank_policy(config), instructions)
    lengths = [length for length in PROMPT_LENGTHS if needed <= length < config.prompt_length]
    return dataclasses.replace(config, prompt_length=min(lengths, default=config.prompt_length))
