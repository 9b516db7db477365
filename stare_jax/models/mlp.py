"""A small policy over the state alone, for algorithm studies in seconds: the same `Policy` record as the large ones."""

import dataclasses
import functools
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Interval
from jax.sharding import PartitionSpec as P

from stare_jax.config import Count, NonNegative, check_fields
from stare_jax.losses import soft_cross_entropy, soft_labels
from stare_jax.models.bins import Greedy, bin_coordinate, choose_bins, encode_bins, kl_of_bins, score_bins
from stare_jax.models.nn.heads import ValueHead, exact_dense
from stare_jax.models.normalize import normalize_action, normalize_state, unnormalize_action
from stare_jax.models.observation import check_finite, check_observation
from stare_jax.models.policy import ActionScore, Decision, Policy
from stare_jax.types import NormStats, Observation

SHARDING_RULES = (
    (r"trunk_\d+/kernel", P(None, "fsdp")),
    (r"logits/kernel", P("fsdp", None)),
    (r"value_head/layer_\d+/kernel", P(None, "fsdp")),
    (r"value_head/out/kernel|bias", P()),
)


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes of the network: an actor with independent bins for each action dimension, and a critic of its own."""

    state_dim: Count = 6
    """numbers of a state."""
    action_dim: Count = 2
    """numbers of an action."""
    num_bins: Annotated[int, Interval(ge=3)] = 12
    """ids per action dimension; the last two share a centre (`models.bins`), so there are `num_bins` - 1 values."""
    hidden_dims: tuple[Count, ...] = (64, 64)
    """sizes of the actor's hidden layers."""
    value_dims: tuple[Count, ...] = (64, 64)
    """sizes of the critic's hidden layers."""
    label_width: NonNegative = 0.0
    """standard deviation of the imitation target in bins; 0 is one-hot."""
    greedy: Greedy = "mean"
    """decision at temperature 0, see `models.bins.Greedy`."""

    @property
    def cameras(self) -> tuple[str, ...]:
        return ()

    def __post_init__(self):
        check_fields(self)


class ActorCritic(nn.Module):
    """Logits `[B, A, num_bins]` and values `[B]` of normalised states `[B, S]`."""

    config: MLPConfig

    @nn.compact
    def __call__(self, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg = self.config
        x = state
        for i, dim in enumerate(cfg.hidden_dims):
            x = nn.tanh(exact_dense(dim, name=f"trunk_{i}")(x))
        # A small last layer starts from nearly uniform actions.
        init = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
        logits = exact_dense(cfg.action_dim * cfg.num_bins, kernel_init=init, name="logits")(x)
        value = ValueHead(cfg.value_dims, name="value_head")(state)
        return logits.reshape(-1, cfg.action_dim, cfg.num_bins), value


def make_mlp(config: MLPConfig, norm_stats: NormStats) -> Policy:
    """Builds the policy record; normalisation statistics are baked in.

    Args:
        config: sizes.
        norm_stats: of actions `[A]` and states `[S]`.
    """
    network = ActorCritic(config)
    num_bins = config.num_bins

    def apply(params, observation):
        check_observation(observation, _observation_shape(config, 1))
        return network.apply({"params": params}, normalize_state(jnp.asarray(observation.state), norm_stats))

    def init(key):
        return network.init(key, jnp.zeros((1, config.state_dim), jnp.float32))["params"]

    def sample(params, observation, key, *, temperature=1.0):
        logits, value = apply(params, observation)
        bins, unit_action = choose_bins(key, logits, temperature, greedy=config.greedy)
        logp, _ = score_bins(logits, bins, temperature)
        return Decision(unnormalize_action(unit_action, norm_stats), {"bins": bins}, logp, value)

    def log_prob(params, observation, trace, *, temperature=1.0, reference_params=None):
        logits, value = apply(params, observation)
        logp, entropy = score_bins(logits, trace["bins"], temperature)
        if reference_params is None:
            return ActionScore(logp, entropy, value)
        reference, _ = jax.lax.stop_gradient(apply(reference_params, observation))
        return ActionScore(logp, entropy, value, kl_of_bins(logits, reference, temperature).sum(axis=-1))

    def imitation_loss(params, observation, action, *, valid=None, key=None):
        del valid, key
        logits, _ = apply(params, observation)
        unit = normalize_action(jnp.asarray(action), norm_stats)
        # The last two ids decode to the same action: soft targets are spread over the others.
        centre = bin_coordinate(unit, num_bins=num_bins)
        labels = soft_labels(centre, num_bins=num_bins - 1, width=config.label_width)
        labels = jnp.pad(labels, [(0, 0), (0, 0), (0, 1)])
        is_right = jnp.argmax(logits, axis=-1) == encode_bins(unit, num_bins=num_bins)
        return soft_cross_entropy(logits, labels).sum(axis=-1), {"accuracy": is_right.mean(axis=-1)}

    return Policy(
        init=init,
        sample=sample,
        log_prob=log_prob,
        value=lambda params, observation: apply(params, observation)[1],
        imitation_loss=imitation_loss,
        tokenize=_no_prompt,
        observation_shape=functools.partial(_observation_shape, config),
        action_dim=config.action_dim,
        sharding_rules=SHARDING_RULES,
        trace_of=lambda action: {"bins": encode_bins(normalize_action(action, norm_stats), num_bins=num_bins)},
    )


def _no_prompt(instructions, state):
    del instructions
    check_finite(np.asarray(state))
    return np.zeros((len(state), 0), np.int32), np.zeros((len(state), 0), bool)


def _observation_shape(config: MLPConfig, batch_size: int) -> Observation:
    return Observation(
        images={},
        state=jax.ShapeDtypeStruct((batch_size, config.state_dim), jnp.float32),
        tokens=jax.ShapeDtypeStruct((batch_size, 0), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((batch_size, 0), jnp.bool_),
    )
