"""Observations as OpenVLA reads them: images normalised for either tower, and the prompt as token ids."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.bins import NUM_BINS, bin_state
from stare_jax.models.normalize import normalize_state, scale_state
from stare_jax.models.observation import check_finite, check_observation
from stare_jax.models.openvla.network import OpenVLAConfig, SceneInput, preprocess
from stare_jax.models.tokenizer import Tokenizer, make_tokenizer
from stare_jax.types import NormStats, Observation

OPENVLA_TEMPLATE = "In: What action should the robot take to {instruction}?\nOut:"
OPENVLA_STATE_TEMPLATE = "In: What action should the robot take to {instruction}? State: {state};\nOut:"


def read_observation(
    config: OpenVLAConfig, norm_stats: NormStats, observation: Observation
) -> tuple[SceneInput, jax.Array, jax.Array]:
    """Returns the network's scene, token ids int32 `[B, L]` and their mask.

    Raises:
        ObservationError: it is not an observation of the configuration's, see `check_observation`.
    """
    check_observation(observation, observation_shape(config, 1))
    if config.state_tokens:
        scene = scale_state(jnp.asarray(observation.state), norm_stats)
    else:
        scene = preprocess(jnp.asarray(observation.images[config.camera]), config)
    return scene, jnp.asarray(observation.tokens), jnp.asarray(observation.token_mask)


def format_prompt(template: str, instruction: str, state_bins: Sequence[int]) -> str:
    """Fills a template: the instruction in lower case, the state as integers with spaces between."""
    return template.format(instruction=instruction.strip().lower(), state=" ".join(str(int(b)) for b in state_bins))


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a prompt as `[BOS, padding.., text.., answer]`.

    The text is right-aligned, so that the token that predicts the first action is the last of every row of a batch.
    BOS comes first, because the image patches follow it.

    Args:
        tokenizer: maps text to ids.
        prompt: the text.
        length: L, total number of tokens.

    Returns:
        Token ids int32 `[L]` and a mask bool `[L]`, False on padding.

    Raises:
        ValueError: the prompt needs more than `length` tokens.
    """
    ids = tokenizer.encode(prompt)
    if ids[-1:] != [tokenizer.answer_id]:
        ids = [*ids, tokenizer.answer_id]
    if len(ids) + 1 > length:
        raise ValueError(f"prompt_length: got {length}, expected at least {len(ids) + 1} for {prompt!r}")
    tokens = np.full(length, tokenizer.pad_id, np.int32)
    tokens[0] = tokenizer.bos_id
    tokens[length - len(ids) :] = ids
    mask = np.zeros(length, bool)
    mask[0] = True
    mask[length - len(ids) :] = True
    return tokens, mask


def observation_shape(config: OpenVLAConfig, batch_size: int) -> Observation:
    """Returns the shapes of an observation, as jax.ShapeDtypeStruct; images of other sizes are resized."""
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
        check_finite(np.asarray(state))
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
