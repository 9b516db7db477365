"""OpenVLA as a policy: its presets, and the pure functions around the network.

Decision.trace has one field, `bins`: int32 `[B, A]` action bins in [0, 256), counted upwards with the action, whatever
the vocabulary. Action dimensions in which the data never moves are not decided: their action is the data's, their bin
that of 0, they take no part in log-probabilities, entropies and losses, and tokens after the last dimension that moves
are not even computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.losses.imitation import soft_cross_entropy, soft_labels
from stare_jax.models.nn.heads import (
    NUM_BINS,
    ZERO_BIN,
    bin_coordinate,
    decode_bins,
    encode_bins,
    kl_of_bins,
    sample_bins,
    score_bins,
)
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig, unstack
from stare_jax.models.nn.lora import BASE_PARAMS, store_frozen
from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.normalize import (
    check_stats,
    is_constant_action,
    normalize_action,
    normalize_state,
    scale_state,
    unnormalize_action,
)
from stare_jax.models.openvla.network import OpenVLA, OpenVLAConfig, Scene, preprocess
from stare_jax.models.openvla.sharding import sharding_rules
from stare_jax.models.policy import ActionScore, Decision, Policy
from stare_jax.models.tokenizer import (
    OPENVLA_TEMPLATE,
    Tokenizer,
    bin_state,
    encode_prompt,
    format_prompt,
    make_tokenizer,
)
from stare_jax.types import Array, NormStats, Observation, PyTree


def openvla_7b(tokenizer: str = "openvla/openvla-7b", **changes) -> OpenVLAConfig:
    """Returns OpenVLA-7B as published: DINOv2 ViT-L/14 with registers, SigLIP So400m/14, Llama 2 7B.

    Args:
        tokenizer: folder (or hub name) of the checkpoint's tokenizer; read when the first prompt is tokenised.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    config = OpenVLAConfig(
        dino=ViTConfig(
            width=1024,
            depth=24,
            num_heads=16,
            mlp_dim=4096,
            num_prefix=5,
            layer_scale=1e-5,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        siglip=ViTConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304),
        projector_dim=8704,
        llm=LlamaConfig(vocab_size=32064, width=4096, depth=32, num_heads=32, num_kv_heads=32, mlp_dim=11008),
        action_vocab_end=32000,
        tokenizer=tokenizer,
        prompt_template=OPENVLA_TEMPLATE,
        prompt_length=40,
        camera="3rd_view_camera",
        execution=Execution(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
    )
    return dataclasses.replace(config, **changes)


def openvla_tiny(state_dim: int = 0, *, critic: str = "shared", **changes) -> OpenVLAConfig:
    """Returns the same network at about a million parameters, for 64x64 images and training from scratch on CPUs.

    Args:
        state_dim: dimensions of the state that the prompt shows, binned; 0 shows none. With `critic` "state" the critic
            alone sees them.
        critic: what the value head reads, see `OpenVLAConfig`.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    prompt_dim = 0 if critic == "state" else state_dim
    tower = ViTConfig(width=64, depth=3, num_heads=2, mlp_dim=256, patch_size=2)
    config = OpenVLAConfig(
        dino=dataclasses.replace(tower, num_prefix=2, layer_scale=1.0),
        siglip=tower,
        projector_dim=256,
        llm=LlamaConfig(vocab_size=896, width=96, depth=3, num_heads=4, num_kv_heads=4, mlp_dim=256),
        action_vocab_end=896,
        tokenizer="words",
        prompt_template="{instruction} {state}" if prompt_dim else "{instruction}",
        prompt_length=12 + prompt_dim,
        image_size=64,
        stem=(32, 64),
        state_dim=state_dim,
        label_width=5.0,
        restrict_logits=True,
        value_dims=(128, 64),
        critic=critic,
        execution=Execution(unroll=8),
        decode_unroll=8,
    )
    return dataclasses.replace(config, **changes)


def openvla_state(state_dim: int = 29, **changes) -> OpenVLAConfig:
    """Returns the same policy without eyes: the state is embedded in four tokens. For studies of algorithms on CPUs.

    Args:
        state_dim: dimensions of the state that is seen; 29 is that of `EnvConfig(use_state="low_dim")`.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    config = OpenVLAConfig(
        dino=None,
        siglip=None,
        projector_dim=0,
        llm=LlamaConfig(vocab_size=896, width=64, depth=2, num_heads=4, num_kv_heads=4, mlp_dim=192),
        action_vocab_end=896,
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=12,
        image_size=0,
        state_tokens=4,
        state_dim=state_dim,
        label_width=5.0,
        restrict_logits=True,
        value_dims=(128, 64),
        critic="own",
        execution=Execution(unroll=8),
        decode_unroll=8,
    )
    return dataclasses.replace(config, **changes)


def make_openvla(config: OpenVLAConfig, norm_stats: NormStats) -> Policy:
    """Builds the policy record; normalisation statistics are baked in.

    Args:
        config: sizes and choices.
        norm_stats: of actions `[A]` and states `[S]`.

    Raises:
        ValueError: the statistics are of another number of dimensions than the config.
    """
    check_stats(norm_stats, action_dim=config.action_dim, state_dim=config.state_dim)
    network = OpenVLA(config)
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
        frozen=_frozen(config),
    )


def _apply(network: OpenVLA, params: PyTree, *args, method: str):
    return network.apply({"params": params}, *args, method=method)


def _is_decided(norm_stats: NormStats) -> np.ndarray:
    """Returns bool `[A']`: which of the action's tokens are decided, up to the last one that is."""
    is_decided = ~is_constant_action(norm_stats)
    return is_decided[: np.flatnonzero(is_decided)[-1] + 1]


def _prompt(network: OpenVLA, norm_stats: NormStats, observation: Observation) -> tuple[Scene, jax.Array, jax.Array]:
    """Returns what the network reads: images normalised for each tower, or the scaled state; token ids, their mask."""
    tokens = jnp.asarray(observation.tokens)
    if tokens.shape[-1] < 2:
        raise ValueError(f"observation.tokens: got shape {tokens.shape}, expected a prompt; see models.with_prompt")
    if network.config.state_tokens:
        scene = _state(norm_stats, observation)
    else:
        camera = network.config.camera
        if camera not in observation.images:
            raise ValueError(f"camera: got images of {sorted(observation.images)}, expected {camera!r}")
        scene = preprocess(jnp.asarray(observation.images[camera]), network.config)
    return scene, tokens, jnp.asarray(observation.token_mask)


def _state(norm_stats: NormStats, observation: Observation) -> jax.Array:
    return scale_state(jnp.asarray(observation.state), norm_stats)


def _frozen(config: OpenVLAConfig) -> tuple[str, ...]:
    return (*config.frozen, *(() if config.lora is None else (BASE_PARAMS,)))


def _init(network: OpenVLA, norm_stats: NormStats, key: jax.Array) -> PyTree:
    config = network.config
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), observation_shape(config, 1))
    bins = jnp.zeros((1, config.action_dim), jnp.int32)
    params = network.init(key, *_prompt(network, norm_stats, blank), bins, _state(norm_stats, blank))["params"]
    return store_frozen(params, _frozen(config), config.execution.dtype)


def _sample(
    network: OpenVLA,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    key: jax.Array,
    *,
    temperature: Array | float = 1.0,
) -> Decision:
    """Runs the prompt once, then one token at a time against its keys and values."""
    is_decided = _is_decided(norm_stats)
    num_later = len(is_decided) - 1
    keys = jax.random.split(key, network.config.action_dim)
    prompt = _prompt(network, norm_stats, observation)
    layers = unstack(params["llm"]["layers"], network.config.llm.depth) if network.config.unstack_layers else None
    hidden, cache, mask = _apply(network, params, *prompt, layers, method="prefill")

    def choose(hidden, key, is_decided):
        logits = _apply(network, params, hidden, method="action_logits")
        return jnp.where(is_decided, sample_bins(key, logits, temperature), ZERO_BIN), logits

    def decode_next(carry, inputs):
        bins, suffix = carry
        index, key, is_decided = inputs
        decoded = bins, cache._replace(suffix=suffix), mask, index, layers
        hidden, (_, suffix) = _apply(network, params, *decoded, method="decode")
        bins, logits = choose(hidden, key, is_decided)
        return (bins, suffix), (bins, logits)

    first_bins, first_logits = choose(hidden, keys[0], is_decided[0])
    inputs = (jnp.arange(num_later), keys[1 : num_later + 1], is_decided[1:])
    unroll = max(min(network.config.decode_unroll, num_later), 1)
    _, (later_bins, later_logits) = jax.lax.scan(decode_next, (first_bins, cache.suffix), inputs, unroll=unroll)
    bins = jnp.concatenate([first_bins[None], later_bins]).T
    logits = jnp.concatenate([first_logits[None], later_logits]).swapaxes(0, 1)
    logp, _ = score_bins(logits, bins, temperature, is_decided)
    num_undecided = network.config.action_dim - len(is_decided)
    bins = jnp.pad(bins, [(0, 0), (0, num_undecided)], constant_values=ZERO_BIN)
    action = unnormalize_action(decode_bins(bins), norm_stats)
    value = _apply(network, params, hidden, prompt[0], _state(norm_stats, observation), method="value")
    return Decision(action, {"bins": bins}, logp, value)


def _log_prob(
    network: OpenVLA,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    trace: Mapping[str, Array],
    *,
    temperature: Array | float = 1.0,
    reference_params: PyTree | None = None,
) -> ActionScore:
    """Scores all tokens of an action in one pass, each given the ones before it; divergences are summed over them."""
    is_decided, prompt = _is_decided(norm_stats), _prompt(network, norm_stats, observation)
    bins = jnp.asarray(trace["bins"])[:, : len(is_decided)]

    def score(params):
        hidden = _apply(network, params, *prompt, bins, method="score")
        return hidden, _apply(network, params, hidden, method="action_logits")

    hidden, logits = score(params)
    logp, entropy = score_bins(logits, bins, temperature, is_decided)
    value = _apply(network, params, hidden[:, 0], prompt[0], _state(norm_stats, observation), method="value")
    if reference_params is None:
        return ActionScore(logp, entropy, value)
    _, reference = jax.lax.stop_gradient(score(reference_params))
    kl = kl_of_bins(logits, reference, temperature)
    return ActionScore(logp, entropy, value, kl.sum(axis=-1, where=is_decided))


def _value(network: OpenVLA, norm_stats: NormStats, params: PyTree, observation: Observation) -> jax.Array:
    prompt = _prompt(network, norm_stats, observation)
    hidden, _, _ = _apply(network, params, *prompt, method="prefill")
    return _apply(network, params, hidden, prompt[0], _state(norm_stats, observation), method="value")


def _imitation_loss(
    network: OpenVLA,
    norm_stats: NormStats,
    params: PyTree,
    observation: Observation,
    action: Array,
    *,
    valid: Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the cross entropy `[B]` of raw actions `[B, A]`, mean over decided tokens, and how far the greedy is."""
    del valid, key
    is_decided, prompt = _is_decided(norm_stats), _prompt(network, norm_stats, observation)
    unit = normalize_action(jnp.asarray(action), norm_stats)[:, : len(is_decided)]
    bins = jnp.where(is_decided, encode_bins(unit), ZERO_BIN)
    hidden = _apply(network, params, *prompt, bins, method="score")
    logits, labels = _apply(network, params, hidden, method="action_logits"), _action_labels(unit, bins, network.config)
    if network.config.restrict_logits:
        loss = soft_cross_entropy(logits, labels)
    else:
        all_logits = _apply(network, params, hidden, method="all_logits")
        loss = soft_cross_entropy(all_logits, _in_vocabulary(labels, network.config))
    greedy = jnp.argmax(logits, axis=-1)
    error = jnp.abs(decode_bins(greedy) - jnp.clip(unit, -1.0, 1.0))
    mean = functools.partial(jnp.mean, axis=-1, where=is_decided)
    return mean(loss), {"token_accuracy": mean(greedy == bins), "l1": mean(error)}


def _action_labels(unit_action: jax.Array, bins: jax.Array, config: OpenVLAConfig) -> jax.Array:
    """Returns target probabilities `[B, A, 256]` of normalised actions `[B, A]`, whose bins are given."""
    if config.label_width == 0:
        return jax.nn.one_hot(bins, NUM_BINS)
    # The last two ids decode to the same action: soft targets are spread over the 255 centres.
    labels = soft_labels(bin_coordinate(unit_action), num_bins=NUM_BINS - 1, width=config.label_width)
    return jnp.pad(labels, [(0, 0), (0, 0), (0, 1)])


def _in_vocabulary(labels: jax.Array, config: OpenVLAConfig) -> jax.Array:
    """Places probabilities of bins `[..., 256]` at their token ids, `[..., vocab_size]`."""
    before, after = config.action_vocab_end - NUM_BINS, config.llm.vocab_size - config.action_vocab_end
    return jnp.pad(labels[..., ::-1], [(0, 0)] * (labels.ndim - 1) + [(before, after)])


def observation_shape(config: OpenVLAConfig, batch_size: int) -> Observation:
    """Returns the shapes of what the policy reads, as jax.ShapeDtypeStruct; cameras of other sizes are resized."""
    size, length = config.image_size, config.prompt_length
    image = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
    return Observation(
        images={} if config.state_tokens else {config.camera: image},
        state=jax.ShapeDtypeStruct((batch_size, config.state_dim), jnp.float32),
        tokens=jax.ShapeDtypeStruct((batch_size, length), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((batch_size, length), jnp.bool_),
    )


def make_tokenize(config: OpenVLAConfig, norm_stats: NormStats) -> Callable:
    """Returns `Policy.tokenize`; the tokenizer is loaded when the first prompt comes, so shapes need no files."""

    @functools.cache
    def tokenizer() -> Tokenizer:
        loaded = make_tokenizer(config.tokenizer)
        free = config.action_vocab_end - NUM_BINS
        if config.tokenizer == "words" and loaded.vocab_size > free:
            raise ValueError(f"action_vocab_end: got {free} ids below the actions, expected >= {loaded.vocab_size}")
        if loaded.vocab_size > config.llm.vocab_size:
            expected = f"at most vocab_size {config.llm.vocab_size}"
            raise ValueError(f"tokenizer {config.tokenizer!r}: got {loaded.vocab_size} ids, expected {expected}")
        return loaded

    @functools.lru_cache(maxsize=1024)
    def encode(prompt: str) -> tuple[np.ndarray, np.ndarray]:
        return encode_prompt(tokenizer(), prompt, length=config.prompt_length)

    def tokenize(instructions: Sequence[str], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if "{state}" in config.prompt_template:
            state_bins = bin_state(normalize_state(np.asarray(state, np.float32), norm_stats))
        else:
            state_bins = [()] * len(instructions)
        prompts = [
            format_prompt(config.prompt_template, text, row) for text, row in zip(instructions, state_bins, strict=True)
        ]
        rows = [encode(prompt) for prompt in prompts]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    return tokenize
