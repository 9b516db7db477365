"""Observations as pi0.5 reads them: images in [-1, 1], and the prompt, with or without the state, as token ids."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.bins import bin_state
from stare_jax.models.normalize import scale_state, to_quantiles
from stare_jax.models.observation import check_finite, check_observation
from stare_jax.models.pi05.network import Pi05Config, SceneInput
from stare_jax.models.preprocess import resize_with_pad
from stare_jax.models.tokenizer import Tokenizer, make_tokenizer
from stare_jax.types import NormStats, Observation

STATE_TEMPLATE = "Task: {instruction}, State: {state};\nAction: "
"""template of checkpoints that read the state; the last space is part of it."""
STATELESS_TEMPLATE = "{instruction}\n"


def read_observation(
    config: Pi05Config, norm_stats: NormStats, observation: Observation
) -> tuple[SceneInput, jax.Array, jax.Array]:
    """Returns the network's scene, token ids int32 `[B, L]` and their mask.

    Raises:
        ObservationError: it is not an observation of the configuration's, see `check_observation`.
    """
    check_observation(observation, observation_shape(config, 1))
    if config.state_tokens:
        scene = scale_state(jnp.asarray(observation.state), norm_stats)
    else:
        images = (resize_with_pad(jnp.asarray(observation.images[name]), config.image_size) for name in config.cameras)
        scene = tuple(image / 255.0 * 2.0 - 1.0 for image in images)
    return scene, jnp.asarray(observation.tokens), jnp.asarray(observation.token_mask)


def clean(instruction: str) -> str:
    """Returns an instruction as openpi writes it: one line, no underscores, upper and lower case as they are."""
    return instruction.strip().replace("_", " ").replace("\n", " ")


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a prompt as `[BOS, text.., padding..]`; a newline at its end is encoded on its own, as in openpi.

    Returns:
        Token ids int32 `[L]` and a mask bool `[L]`, False on padding.

    Raises:
        ValueError: the prompt needs more than `length` tokens. openpi cuts off its end, which asks for the action.
    """
    text, end = (prompt[:-1], "\n") if prompt.endswith("\n") else (prompt, "")
    ids = [tokenizer.bos_id, *tokenizer.encode(text), *(tokenizer.encode(end) if end else [])]
    if len(ids) > length:
        raise ValueError(f"prompt_length: got {length}, expected at least {len(ids)} for {prompt!r}")
    tokens = np.full(length, tokenizer.pad_id, np.int32)
    tokens[: len(ids)] = ids
    return tokens, np.arange(length) < len(ids)


def make_tokenize(config: Pi05Config, norm_stats: NormStats) -> Callable:
    """Returns `Policy.tokenize`; the tokenizer is loaded when the first prompt comes, so shapes need no files."""

    @functools.cache
    def tokenizer() -> Tokenizer:
        return make_tokenizer(config.tokenizer)

    @functools.lru_cache(maxsize=1024)
    def encode(prompt: str) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = encode_prompt(tokenizer(), prompt, length=config.prompt_length)
        # Checked by the ids: PaliGemma's tokenizer has a token for images, for which the embedding table has no row.
        if tokens.max() >= config.vocab_size:
            expected = f"below vocab_size {config.vocab_size}"
            raise ValueError(
                f"tokenizer {config.tokenizer!r}: got id {tokens.max()} in {prompt!r}, expected {expected}"
            )
        return tokens, mask

    def tokenize(instructions: Sequence[str], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        check_finite(np.asarray(state))
        bins = [()] * len(instructions)
        if "{state}" in config.prompt_template:
            bins = bin_state(to_quantiles(np.asarray(state, np.float32), norm_stats.state_q01, norm_stats.state_q99))
        prompts = (
            config.prompt_template.format(instruction=clean(text), state=" ".join(map(str, row)))
            for text, row in zip(instructions, bins, strict=True)
        )
        rows = [encode(prompt) for prompt in prompts]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    return tokenize


def observation_shape(config: Pi05Config, batch_size: int) -> Observation:
    """Returns the shapes of an observation, as jax.ShapeDtypeStruct; images of other sizes are resized."""
    size, length = config.image_size, config.prompt_length
    image = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
    return Observation(
        images=dict.fromkeys(config.cameras, image),
        state=jax.ShapeDtypeStruct((batch_size, config.state_dim), jnp.float32),
        tokens=jax.ShapeDtypeStruct((batch_size, length), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((batch_size, length), jnp.bool_),
    )
