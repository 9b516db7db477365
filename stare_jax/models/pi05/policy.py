"""pi0.5 as a policy: the pure functions around the network.

A decision predicts a window of H actions, of which the first C are executed. The window is the end of a chain of points
from noise, and Decision.trace holds the chain: `chain`, float32 `[B, N + 1, H, A]`, the points x_0 .. x_N, and
`is_drawn`, bool `[B, N]`, which of the N steps between them were drawn at random. Actions outside the network are raw;
inside they are normalised by their quantiles and padded with zeros to the network's width. Log-probabilities, entropies
and divergences are those of the actions that are executed, in the dimensions that the data moves.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.losses import flow, flow_matching_loss
from stare_jax.models.nn.attention import KeyValue
from stare_jax.models.nn.gemma import unstack_expert
from stare_jax.models.nn.layout import store_as, unstack
from stare_jax.models.nn.lora import check_patterns
from stare_jax.models.nn.placement import gather_weights
from stare_jax.models.normalize import (
    check_stats,
    from_quantiles,
    identity_stats,
    is_constant_action,
    scale_state,
    to_quantiles,
)
from stare_jax.models.observation import check_observation, without_scene
from stare_jax.models.pi05.network import Pi05, Pi05Config, has_frozen_prefix, pool_prefix
from stare_jax.models.pi05.presets import all_frozen_patterns
from stare_jax.models.pi05.prompt import make_tokenize, observation_shape, read_observation
from stare_jax.models.pi05.sharding import adaptable_modules, sharding_rules
from stare_jax.models.policy import ActionScore, Decision, Policy
from stare_jax.types import Array, NormStats, Observation, PyTree


def make_pi05(config: Pi05Config, norm_stats: NormStats) -> Policy:
    """Builds the policy record; normalisation statistics are baked in.

    Args:
        config: sizes and choices.
        norm_stats: statistics of actions `[A]` and states `[S]`.

    Raises:
        ValueError: the statistics have another number of dimensions than the configuration, or a pattern of its
            adapters matches no product of the network.
    """
    check_stats(norm_stats, action_dim=config.action_dim, state_dim=config.state_dim)
    if config.lora is not None:
        check_patterns(config.lora, adaptable_modules())
    network = Pi05(config)
    return Policy(
        init=functools.partial(_init, network, norm_stats),
        sample=functools.partial(_sample, network, norm_stats),
        log_prob=functools.partial(_log_prob, network, norm_stats),
        value=functools.partial(_value, network, norm_stats),
        imitation_loss=functools.partial(_imitation_loss, network, norm_stats),
        tokenize=make_tokenize(config, norm_stats),
        observation_shape=functools.partial(observation_shape, config),
        action_dim=config.action_dim,
        sharding_rules=sharding_rules(config),
        frozen_patterns=all_frozen_patterns(config),
        window=config.window,
        chunk=config.chunk,
        num_fixed_terms=int(config.noise == "learned"),
        compute_dtype=config.execution.dtype,
        encode=functools.partial(_encode, network, norm_stats) if _has_context(config) else None,
        prepare=functools.partial(_prepare, config),
        preference_score=functools.partial(_flow_score, network, norm_stats) if config.preference == "flow" else None,
    )


_IN_PRODUCTS = (
    r"^PaliGemma/llm/.*/(w|gating_einsum|linear|(\w+_)?lora_[ab]|Dense_0/(kernel|bias))$",
    r"^(PaliGemma/img/.*(MultiHead\w+/\w+|Dense_\d|head)|stem/\w+|state_embed)/(kernel|bias)$",
)
"""regexes of the parameters that are cast to `execution.dtype` before they do anything"""
_IN_EXACT_PRODUCTS = (r"^(action_(in|out)_proj|time_mlp_(in|out)|PaliGemma/img/embedding)/(kernel|bias)$",)
"""regexes of those that are cast to float32"""
_IN_STEPS = r"^PaliGemma/llm/.*_1/"
"""regex of the parameters that every denoising step reads, of those that a mesh may cut"""
_EXPERT_LAYERS = "expert_layers"
"""name of the action expert's layers among prepared parameters, a tuple"""


def _prepare(config: Pi05Config, params: PyTree) -> PyTree:
    """Returns parameters in the type of the products, the action expert's layers each by itself and whole."""
    params = store_as(params, _IN_PRODUCTS, config.execution.dtype)
    params = store_as(params, _IN_EXACT_PRODUCTS, "float32")
    if not config.unstack_layers or _EXPERT_LAYERS in params:
        return params
    params = gather_weights(params, _IN_STEPS, sharding_rules(config))
    paligemma, llm = params["PaliGemma"], params["PaliGemma"]["llm"]
    rest, expert = unstack_expert(llm["layers"], config.expert.depth)
    return params | {"PaliGemma": paligemma | {"llm": llm | {"layers": rest}}, _EXPERT_LAYERS: expert}


class _Prefix(NamedTuple):
    """Images and text after the network, to be attended to by chunks and read by the critic."""

    cache: KeyValue | tuple[KeyValue, ...]
    """`[layers, B, P, K, D]` keys and values; `[B, layers, P, K, D]` in a context; a tuple of those of each layer where
    the expert's layers are a tuple."""
    valid: jax.Array
    """bool `[B, P]`, False on padding."""
    pooled: jax.Array
    """float32 `[B, width]`, the mean of the valid hidden states."""


def _apply(network: Pi05, params: PyTree, *args, method: str):
    return network.apply({"params": params}, *args, method=method)


def _is_prefix_frozen(config: Pi05Config, params: PyTree) -> bool:
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params))
    return has_frozen_prefix(names, all_frozen_patterns(config))


@functools.cache
def _has_context(config: Pi05Config) -> bool:
    """Returns whether all that images and prompt go through is frozen; traces the network where anything is."""
    if not all_frozen_patterns(config):
        return False
    init = functools.partial(_init, Pi05(config), identity_stats(config.action_dim, config.state_dim))
    return _is_prefix_frozen(config, jax.eval_shape(init, jax.random.key(0)))


def _read(
    network: Pi05, norm_stats: NormStats, params: PyTree, observation: Observation, context: _Prefix | None = None
) -> _Prefix:
    """Returns the prefix of a context, or where there is none that of the observation."""
    if context is not None:
        check_observation(observation, jax.eval_shape(without_scene, observation_shape(network.config, 1)))
        return _with_first_axes_swapped(context)
    scene, tokens, token_mask = read_observation(network.config, norm_stats, observation)
    hidden, cache, valid = _apply(network, params, scene, None, tokens, token_mask, method="prefix")
    return _Prefix(cache, valid, pool_prefix(hidden, valid))


def _encode(network: Pi05, norm_stats: NormStats, params: PyTree, observation: Observation) -> _Prefix:
    return _with_first_axes_swapped(_read(network, norm_stats, params, observation))


def _with_first_axes_swapped(prefix: _Prefix) -> _Prefix:
    """Returns a prefix as a context, whose rows come first, or a context as the prefix that layers read."""
    return prefix._replace(cache=jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), prefix.cache))


def _critic(
    network: Pi05, norm_stats: NormStats, params: PyTree, prefix: _Prefix, observation: Observation
) -> jax.Array:
    state = scale_state(jnp.asarray(observation.state), norm_stats)
    return _apply(network, params, prefix.pooled, state, method="value")


def _init(network: Pi05, norm_stats: NormStats, key: jax.Array) -> PyTree:
    config = network.config
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), observation_shape(config, 1))
    noisy = jnp.zeros((1, config.window, config.model_action_dim), jnp.float32)
    scene = read_observation(config, norm_stats, blank)
    params = network.init(key, *scene, scale_state(blank.state, norm_stats), noisy, method="init_pass")["params"]
    return store_as(params, all_frozen_patterns(config), config.execution.dtype)


def _steps(
    network: Pi05, params: PyTree, prefix: _Prefix, points: jax.Array, index: jax.Array, temperature: Array | float
) -> tuple[flow.Transition, flow.Transition]:
    """Returns the steps of an ordinary and of a random chain from points x_i `[B, G, H, A]`, i int `[B, G]`."""
    config, num_steps = network.config, network.config.num_denoising_steps
    time = flow.denoising_times(num_steps)[index]
    inputs = prefix.cache, prefix.valid, points, time, params.get(_EXPERT_LAYERS)
    hidden = _apply(network, params, *inputs, method="suffix")
    velocity = _apply(network, params, hidden, method="velocity")
    ordinary = flow.ode_transition(points, velocity, num_steps)
    if config.noise == "ode":
        return ordinary, ordinary
    temperature = jnp.asarray(temperature, jnp.float32)
    if config.noise == "learned":
        low, high = config.noise_std
        std = flow.learned_deviation(_apply(network, params, hidden, method="deviation"), low=low, high=high)
        return ordinary, flow.Transition(ordinary.mean, temperature * std)
    step = functools.partial(flow.sde_transition, num_steps=num_steps, noise_level=config.noise_level * temperature)
    mean, std = jax.vmap(jax.vmap(step))(points, velocity, index)
    return ordinary, flow.Transition(mean, std[..., None, None])


def _choose(is_drawn: jax.Array, random: flow.Transition, ordinary: flow.Transition) -> flow.Transition:
    """Returns the random step where `is_drawn` `[B, G]`, elsewhere the ordinary one."""
    where = is_drawn[..., None, None]
    return flow.Transition(*(jnp.where(where, *pair) for pair in zip(random, ordinary, strict=True)))


def _over_executed(config: Pi05Config, norm_stats: NormStats, x: jax.Array) -> jax.Array:
    """Returns the numbers `[..., C, D]` of `[..., H, A]`: executed actions, in the dimensions that the data moves."""
    return x[..., : config.chunk, np.flatnonzero(~is_constant_action(norm_stats))]


def _entropy(config: Pi05Config, norm_stats: NormStats, std: jax.Array, is_drawn: jax.Array) -> jax.Array:
    """Returns the mean entropy `[B]` of the numbers of random steps; `std` broadcasts to `[B, G, H, A]`."""
    if config.noise != "learned":  # fixed by the schedule: a bonus for it would be a constant
        return jnp.zeros(len(is_drawn), jnp.float32)
    full = jnp.broadcast_to(std, (*is_drawn.shape, config.window, config.model_action_dim))
    entropy = _over_executed(config, norm_stats, flow.normal_entropy(full)).mean(axis=(-2, -1))
    return jnp.sum(jnp.where(is_drawn, entropy, 0.0), axis=1) / jnp.maximum(is_drawn.sum(axis=1), 1)


def _sample(
    network: Pi05,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    key: jax.Array,
    *,
    temperature: Array | float = 1.0,
    noise: Array | None = None,
    context: _Prefix | None = None,
) -> Decision:
    """Reads the prefix once, then integrates from noise `[B, H, A]` to actions; the noise is drawn if not given."""
    config, num_steps = network.config, network.config.num_denoising_steps
    prefix, batch = _read(network, norm_stats, params, observation, context), len(observation.state)
    if _EXPERT_LAYERS in params:
        prefix = prefix._replace(cache=unstack(prefix.cache, config.expert.depth))
    shape = (batch, config.window, config.model_action_dim)
    start_key, index_key, key = jax.random.split(key, 3)
    start = jax.random.normal(start_key, shape, jnp.float32) if noise is None else jnp.asarray(noise, jnp.float32)
    is_drawn = jnp.full((batch, num_steps), config.noise == "learned")
    if config.noise == "sde":
        drawn = jax.random.randint(index_key, (batch, 1), 0, num_steps)
        is_drawn = drawn == jnp.arange(num_steps)
    is_drawn &= jnp.asarray(temperature) > 0

    def step(x, inputs):
        index, is_drawn, key = inputs
        at = (x[:, None], jnp.full((batch, 1), index), temperature)
        ordinary, random = _steps(network, params, prefix, *at)
        mean, std = (leaf[:, 0] for leaf in _choose(is_drawn[:, None], random, ordinary))
        x = mean + std * jax.random.normal(key, shape, jnp.float32)
        return x, (x, mean, std)

    inputs = (jnp.arange(num_steps), is_drawn.T, jax.random.split(key, num_steps))
    x, (points, mean, std) = jax.lax.scan(step, start, inputs)
    points, mean, std = (jnp.moveaxis(leaf, 0, 1) for leaf in (points, mean, std))
    logp = _over_executed(config, norm_stats, flow.normal_logp(points, flow.Transition(mean, std))).sum(axis=(2, 3))
    if config.noise == "sde":  # the one random step's, as in `_log_prob`
        logp = logp.sum(axis=1, keepdims=True)
    trace = {"chain": jnp.concatenate([start[:, None], points], axis=1), "is_drawn": is_drawn}
    executed = x[:, : config.chunk, : config.action_dim]
    action = from_quantiles(executed, norm_stats.action_q01, norm_stats.action_q99)
    value = _critic(network, norm_stats, params, prefix, observation)
    return Decision(action, trace, logp, value)


def _scored_steps(config: Pi05Config, trace: Mapping[str, Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns points x_i and the points after them, `[B, G, H, A]`, i and whether the step was drawn, `[B, G]`.

    G is the number of steps, or 1 where at most one of them is random.
    """
    chain, is_drawn = jnp.asarray(trace["chain"], jnp.float32), jnp.asarray(trace["is_drawn"])
    if config.noise == "sde":
        index = jnp.argmax(is_drawn, axis=1)[:, None]
    else:
        index = jnp.broadcast_to(jnp.arange(is_drawn.shape[1]), is_drawn.shape)
    at = index[..., None, None]
    before, after = (jnp.take_along_axis(chain, at + i, axis=1) for i in (0, 1))
    return before, after, index, jnp.take_along_axis(is_drawn, index, axis=1)


def _log_prob(
    network: Pi05,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    trace: Mapping[str, Array],
    *,
    temperature: Array | float = 1.0,
    reference_params: PyTree | None = None,
    context: _Prefix | None = None,
) -> ActionScore:
    """Scores the random steps of a chain, all of them after one reading of the prefix, one term of the log-probability
    for each: `[B, N]` of Flow-Noise, `[B, 1]` of Flow-SDE, which has one such step. Divergences are their sum.

    Those are exact, each step's from the point it left. A reference reads the prefix anew where any of that is trained.
    """
    config = network.config
    before, after, index, is_drawn = _scored_steps(config, trace)

    def step(params, prefix):
        ordinary, random = _steps(network, params, prefix, before, index, temperature)
        return _choose(is_drawn, random, ordinary)

    def of_steps(x):
        return _over_executed(config, norm_stats, x).sum(axis=(2, 3))

    prefix = _read(network, norm_stats, params, observation, context)
    own = step(params, prefix)
    logp, entropy = of_steps(flow.normal_logp(after, own)), _entropy(config, norm_stats, own.std, is_drawn)
    value = _critic(network, norm_stats, params, prefix, observation)
    if reference_params is None:
        return ActionScore(logp, entropy, value)
    is_shared = _is_prefix_frozen(config, params)
    reference_prefix = prefix if is_shared else _read(network, norm_stats, reference_params, observation)
    reference = jax.lax.stop_gradient(step(reference_params, reference_prefix))
    return ActionScore(logp, entropy, value, of_steps(flow.transition_kl(own, reference)).sum(axis=1))


def _value(
    network: Pi05,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    *,
    context: _Prefix | None = None,
) -> jax.Array:
    prefix = _read(network, norm_stats, params, observation, context)
    return _critic(network, norm_stats, params, prefix, observation)


def _normalize(config: Pi05Config, norm_stats: NormStats, action: Array) -> jax.Array:
    """Returns `[B, H, A]` for raw actions `[B, H, A']`, zeros in the dimensions that the robot does not have."""
    unit = to_quantiles(jnp.asarray(action, jnp.float32), norm_stats.action_q01, norm_stats.action_q99)
    # Of a dimension with equal quantiles the rare other value would be enormous, and it is not decided anyway.
    unit = jnp.where(is_constant_action(norm_stats), 0.0, unit)
    return jnp.pad(unit, ((0, 0), (0, 0), (0, config.model_action_dim - config.action_dim)))


def _draw(config: Pi05Config, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns noise `[H, A]` and a flow time."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (config.window, config.model_action_dim), jnp.float32)
    return noise, flow.sample_times(time_key, ())


def _imitation_loss(
    network: Pi05,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    action: Array,
    *,
    valid: Array | None = None,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the flow-matching error `[B]` of raw windows `[B, H, A]`, and the error of a one-step estimate."""
    config, unit = network.config, _normalize(network.config, norm_stats, action)
    noise, time = jax.vmap(functools.partial(_draw, config))(key)
    valid = jnp.ones(unit.shape[:2], bool) if valid is None else valid
    prefix = _read(network, norm_stats, params, observation)
    at = time[:, None, None]
    noisy = flow.noisy_chunk(unit, noise, at)
    hidden = _apply(network, params, prefix.cache, prefix.valid, noisy[:, None], time[:, None], method="suffix")
    velocity = _apply(network, params, hidden, method="velocity")[:, 0]
    error = flow_matching_loss(velocity, noise - unit)
    counts = jnp.ones_like(valid) if config.pad_actions else valid
    loss = jnp.sum(jnp.where(counts, error, 0.0), axis=1) / jnp.maximum(counts.sum(axis=1), 1)
    estimate = jnp.abs(noisy - at * velocity - unit)
    l1 = estimate[:, : config.chunk, : config.action_dim].mean(axis=(1, 2))
    return loss, {"l1": l1}


def _flow_score(
    network: Pi05, norm_stats: NormStats, params: PyTree, observation: Observation, action: Array, seeds: Array
) -> jax.Array:
    """Returns minus the weighted flow-matching error of each executed action, `[B, K, C]`.

    Weighted so that the mean over times and noise is the log-likelihood's bound, but for a constant that is the same
    for policy and reference. A seed stands for one time and one noise, the same in every call.
    """
    config, unit = network.config, _normalize(network.config, norm_stats, action)

    keys = jax.vmap(jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed)))(jnp.asarray(seeds))
    noise, time = jax.vmap(jax.vmap(functools.partial(_draw, config)))(keys)
    unit = jnp.broadcast_to(unit[:, None], noise.shape)
    prefix = _read(network, norm_stats, params, observation)
    noisy = flow.noisy_chunk(unit, noise, time[..., None, None])
    hidden = _apply(network, params, prefix.cache, prefix.valid, noisy, time, method="suffix")
    velocity = _apply(network, params, hidden, method="velocity")
    error = _over_executed(config, norm_stats, flow.flow_matching_error(velocity, unit, noise)).sum(axis=-1)
    return -flow.elbo_weight(time)[..., None] * error
