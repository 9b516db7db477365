"""The boundary between networks and everything else: a policy is a record of pure functions.

Outside a policy all is raw: uint8 images, states and actions in the simulator's units. Normalisation statistics are
baked in when a policy is built, so whoever restores a checkpoint restores them with it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stare_jax.types import Array, Observation


class Decision(NamedTuple):
    """What a policy decided in a batch of states."""

    action: Array
    """float32 `[B, A]` in the simulator's units."""
    action_tokens: Array
    """int32 `[B, A]`, or whatever else `Policy.log_prob` needs to score the action again."""
    logp: Array
    """float32 `[B]`, summed over the action's tokens, of the distribution that was sampled."""
    value: Array
    """float32 `[B]`."""


class ActionScore(NamedTuple):
    """What a policy thinks of given actions in a batch of states; all float32 `[B]`."""

    logp: Array
    entropy: Array
    """mean over the action's tokens, in nats."""
    value: Array


class Policy(NamedTuple):
    """Pure functions over a plain nested dict of parameters; none is jitted, callers jit once.

    init(key) -> params
    sample(params, observation, key, *, temperature=1.0) -> Decision; temperature 0 is greedy, and may be traced
    log_prob(params, observation, action_tokens, *, temperature=1.0) -> ActionScore
    value(params, observation) -> float32 [B]
    imitation_loss(params, observation, action) -> (loss float32 [B], metrics: dict of float32 [B])
    tokenize(instructions, state [B, S]) -> (tokens int32 [B, L], token_mask bool [B, L]), on the host
    observation_shape(batch_size) -> Observation of jax.ShapeDtypeStruct
    """

    init: Callable
    sample: Callable
    log_prob: Callable
    value: Callable
    imitation_loss: Callable
    tokenize: Callable
    observation_shape: Callable
    action_dim: int
    sharding_rules: tuple
    """(regex over the parameter's path, jax.sharding.PartitionSpec), first match wins."""
    frozen: tuple[str, ...] = ()
    """regexes of the parameters that are never trained: what adapters are beside."""


def with_prompt(policy: Policy, observation: Observation, instructions: Sequence[str]) -> Observation:
    """Returns the batched observation `[B, ...]` with the prompt of each row filled in, on the host."""
    tokens, token_mask = policy.tokenize(instructions, np.asarray(observation.state))
    return observation._replace(tokens=tokens, token_mask=token_mask)
