"""OpenVLA as a policy: its configuration, its presets, and the pure functions around the network.

Decision.action_tokens holds action bins in [0, 256), counted upwards with the action, whatever the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from stare_jax.losses.imitation import soft_cross_entropy, soft_labels
from stare_jax.models.heads import (
    NUM_BINS,
    bin_coordinate,
    decode_bins,
    encode_bins,
    sample_bins,
    score_bins,
)
from stare_jax.models.layers import Execution
from stare_jax.models.llama import LlamaConfig
from stare_jax.models.normalize import normalize_action, normalize_state, unnormalize_action
from stare_jax.models.openvla_network import OpenVLA, OpenVLAConfig, Pixels, preprocess
from stare_jax.models.policy import ActionScore, Decision, Policy
from stare_jax.models.tokenizer import (
    OPENVLA_TEMPLATE,
    Tokenizer,
    bin_state,
    encode_prompt,
    format_prompt,
    make_tokenizer,
)
from stare_jax.models.vit import ViTConfig
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


def openvla_tiny(state_dim: int = 0, **changes) -> OpenVLAConfig:
    """Returns the same network at about a million parameters, for 64x64 images and training from scratch on CPUs.

    Args:
        state_dim: dimensions of the state that the prompt shows, binned; 0 shows none.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    tower = ViTConfig(width=64, depth=3, num_heads=2, mlp_dim=256, patch_size=2)
    config = OpenVLAConfig(
        dino=dataclasses.replace(tower, num_prefix=2, layer_scale=1.0),
        siglip=tower,
        projector_dim=256,
        llm=LlamaConfig(vocab_size=896, width=96, depth=3, num_heads=4, num_kv_heads=4, mlp_dim=256),
        action_vocab_end=896,
        tokenizer="words",
        prompt_template="{instruction} {state}" if state_dim else "{instruction}",
        prompt_length=12 + state_dim,
        image_size=64,
        stem=(32, 64),
        state_dim=state_dim,
        label_width=5.0,
        restrict_logits=True,
        value_dims=(128, 64),
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
    for name, size in (("action_q01", config.action_dim), ("state_q01", config.state_dim)):
        if np.shape(getattr(norm_stats, name)) != (size,):
            raise ValueError(f"norm_stats.{name}: got shape {np.shape(getattr(norm_stats, name))}, expected ({size},)")
    network = OpenVLA(config)
    return Policy(
        init=functools.partial(_init, network),
        sample=functools.partial(_sample, network, norm_stats),
        log_prob=functools.partial(_log_prob, network),
        value=functools.partial(_value, network),
        imitation_loss=functools.partial(_imitation_loss, network, norm_stats),
        tokenize=make_tokenize(config, norm_stats),
        observation_shape=functools.partial(observation_shape, config),
        action_dim=config.action_dim,
        sharding_rules=sharding_rules(config),
    )


def _apply(network: OpenVLA, params: PyTree, *args, method: str):
    return network.apply({"params": params}, *args, method=method)


def _prompt(network: OpenVLA, observation: Observation) -> tuple[Pixels, jax.Array, jax.Array]:
    """Returns what the network reads: images normalised for each tower, token ids, their mask."""
    camera = network.config.camera
    if camera not in observation.images:
        raise ValueError(f"camera: got images of {sorted(observation.images)}, expected {camera!r}")
    tokens = jnp.asarray(observation.tokens)
    if tokens.shape[-1] < 2:
        raise ValueError(f"observation.tokens: got shape {tokens.shape}, expected a prompt; see models.with_prompt")
    pixels = preprocess(jnp.asarray(observation.images[camera]), network.config)
    return pixels, tokens, jnp.asarray(observation.token_mask)


def _init(network: OpenVLA, key: jax.Array) -> PyTree:
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), observation_shape(network.config, 1))
    bins = jnp.zeros((1, network.config.action_dim), jnp.int32)
    return network.init(key, *_prompt(network, blank), bins)["params"]


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
    num_later = network.config.action_dim - 1
    keys = jax.random.split(key, network.config.action_dim)
    hidden, cache, mask = _apply(network, params, *_prompt(network, observation), method="prefill")

    def choose(hidden, key):
        logits = _apply(network, params, hidden, method="action_logits")
        return sample_bins(key, logits, temperature), logits

    def decode_next(carry, inputs):
        bins, cache = carry
        index, key = inputs
        hidden, cache = _apply(network, params, bins, cache, mask, index, method="decode")
        bins, logits = choose(hidden, key)
        return (bins, cache), (bins, logits)

    first_bins, first_logits = choose(hidden, keys[0])
    inputs = (jnp.arange(num_later), keys[1:])
    unroll = min(network.config.decode_unroll, num_later)
    _, (later_bins, later_logits) = jax.lax.scan(decode_next, (first_bins, cache), inputs, unroll=unroll)
    bins = jnp.concatenate([first_bins[None], later_bins]).T
    logits = jnp.concatenate([first_logits[None], later_logits]).swapaxes(0, 1)
    logp, _ = score_bins(logits, bins, temperature)
    action = unnormalize_action(decode_bins(bins), norm_stats)
    return Decision(action, bins, logp, _apply(network, params, hidden, method="value"))


def _log_prob(
    network: OpenVLA,
    params: PyTree,
    observation: Observation,
    action_tokens: Array,
    *,
    temperature: Array | float = 1.0,
) -> ActionScore:
    """Scores all tokens of an action in one pass, each given the ones before it."""
    bins = jnp.asarray(action_tokens)
    hidden = _apply(network, params, *_prompt(network, observation), bins, method="score")
    logp, entropy = score_bins(_apply(network, params, hidden, method="action_logits"), bins, temperature)
    return ActionScore(logp, entropy, _apply(network, params, hidden[:, 0], method="value"))


def _value(network: OpenVLA, params: PyTree, observation: Observation) -> jax.Array:
    hidden, _, _ = _apply(network, params, *_prompt(network, observation), method="prefill")
    return _apply(network, params, hidden, method="value")


def _imitation_loss(
    network: OpenVLA, norm_stats: NormStats, params: PyTree, observation: Observation, action: Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the cross entropy of raw actions `[B, A]`, mean over their tokens, `[B]`, and how close the greedy is."""
    unit = normalize_action(jnp.asarray(action), norm_stats)
    bins = encode_bins(unit)
    hidden = _apply(network, params, *_prompt(network, observation), bins, method="score")
    logits, labels = _apply(network, params, hidden, method="action_logits"), _action_labels(unit, bins, network.config)
    if network.config.restrict_logits:
        loss = soft_cross_entropy(logits, labels)
    else:
        all_logits = _apply(network, params, hidden, method="all_logits")
        loss = soft_cross_entropy(all_logits, _in_vocabulary(labels, network.config))
    greedy = jnp.argmax(logits, axis=-1)
    error = jnp.abs(decode_bins(greedy) - jnp.clip(unit, -1.0, 1.0))
    metrics = {"token_accuracy": jnp.mean(greedy == bins, axis=-1), "l1": jnp.mean(error, axis=-1)}
    return loss.mean(axis=-1), metrics


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
    return Observation(
        images={config.camera: jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)},
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


def sharding_rules(config: OpenVLAConfig) -> tuple[tuple[str, P], ...]:
    """Returns (regex, PartitionSpec) over the axes `fsdp` and `tensor`; a leading None is the axis of layers.

    Heads and hidden units are split over `tensor`, the other side of each product over `fsdp`; vectors of the model's
    width are replicated.
    """
    rules = (
        (r"llm/embed_tokens$", P("tensor", "fsdp")),
        (r"llm/lm_head$", P("fsdp", "tensor")),
        (r"llm/layers/[qkv]_proj/kernel$", P(None, "fsdp", "tensor", None)),
        (r"llm/layers/o_proj/kernel$", P(None, "tensor", None, "fsdp")),
        (r"llm/layers/(gate|up)_proj/kernel$", P(None, "fsdp", "tensor")),
        (r"llm/layers/down_proj/kernel$", P(None, "tensor", "fsdp")),
        (r"norm/scale$", P()),
        (r"(dino|siglip)/blocks/qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
        (r"(dino|siglip)/blocks/qkv/bias$", P(None, None, "tensor", None)),
        (r"(dino|siglip)/blocks/proj/kernel$", P(None, "tensor", None, "fsdp")),
        (r"(dino|siglip)/blocks/fc1/kernel$", P(None, "fsdp", "tensor")),
        (r"(dino|siglip)/blocks/fc1/bias$", P(None, "tensor")),
        (r"(dino|siglip)/blocks/fc2/kernel$", P(None, "tensor", "fsdp")),
        (r"(dino|siglip)/blocks/((proj|fc2)/bias|norm[12]/(scale|bias)|ls[12])$", P()),
        (r"(dino|siglip)/(pos_embed|cls_token|reg_token|patch_embed/bias)$", P()),
        (r"(dino|siglip)/patch_embed/kernel$", P(None, None, None, "fsdp")),
        (r"projector/fc[13]/kernel$", P("fsdp", "tensor")),
        (r"projector/fc2/kernel$", P("tensor", "fsdp")),
        (r"projector/fc1/bias$", P("tensor")),
        (r"projector/fc[23]/bias$", P()),
        (r"value_head/layer_\d+/(kernel|bias)$|value_head/out/kernel$", P()),
    )
    return (*rules, (r"stem/conv_\d+/(kernel|bias)$", P())) if config.stem else rules
