"""The boundary between networks and everything else: a policy is a record of pure functions.

Outside a policy all is raw: uint8 images, states and actions in the simulator's units. Normalisation statistics are
baked in when a policy is built, so whoever restores a checkpoint restores them with it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stare_jax.types import Array, Observation


class Decision(NamedTuple):
    """Decisions in a batch of states. Actors that are no policy, such as experts, give the action alone."""

    action: Array
    """float32 `[B, A]` in the simulator's units; `[B, C, A]` of a policy that decides on C actions at a time."""
    trace: dict[str, Array] | None = None
    """Named fields `[B, ...]`: all that `Policy.log_prob` needs to score the decision again."""
    logp: Array | None = None
    """float32 `[B]` log-probability of the decision under the distribution that was sampled."""
    value: Array | None = None
    """float32 `[B]` value of the states."""


class ActionScore(NamedTuple):
    """What a policy thinks of given actions in a batch of states; all float32 `[B]`."""

    logp: Array
    entropy: Array
    """mean over the action's tokens, in nats."""
    value: Array
    divergence: Array | None = None
    """KL(policy ‖ reference) of what would be decided, along the decision that was made, in nats; None without a
    reference."""


class Policy(NamedTuple):
    """Pure functions over a plain nested dict of parameters; none is jitted, callers jit once.

    init(key) -> params
    sample(params, observation, key, *, temperature=1.0) -> Decision; temperature may be traced, and at 0 nothing is
        random but the noise that a flow starts from
    log_prob(params, observation, trace, *, temperature=1.0, reference_params=None) -> ActionScore; the
        reference gets no gradient, and its frozen parameters are the policy's
    value(params, observation) -> float32 [B]
    imitation_loss(params, observation, action, *, valid=None, key=None) -> (loss float32 [B], metrics: dict of float32
        [B]); action [B, A], or [B, H, A] with valid bool [B, H], False beyond an episode's end, where `window` is H;
        key [B], one for every row, of policies that draw something
    tokenize(instructions, state [B, S]) -> (tokens int32 [B, L], token_mask bool [B, L]), on the host
    observation_shape(batch_size) -> Observation of jax.ShapeDtypeStruct
    preference_score(params, observation, action, seeds uint32 [B, K]) -> float32 [B, K, C], what stands for the
        log-probability of each executed action [B, H, A] in preference learning, K estimates that equal seeds make
        comparable; None where `log_prob` itself does
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
    frozen_patterns: tuple[str, ...] = ()
    """regexes of the parameters that are never trained: what adapters are beside."""
    window: int | None = None
    """H, actions that the policy predicts at a time, and that are imitated; None where it is one action, and arrays
    have no axis for it."""
    chunk: int = 1
    """C, actions that one decision executes; at most H."""
    preference_score: Callable | None = None


def with_prompt(policy: Policy, observation: Observation, instructions: Sequence[str]) -> Observation:
    """Returns the batched observation `[B, ...]` with the prompt of each row filled in, on the host."""
    tokens, token_mask = policy.tokenize(instructions, np.asarray(observation.state))
    return observation._replace(tokens=tokens, token_mask=token_mask)
