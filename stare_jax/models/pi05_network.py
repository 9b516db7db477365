"""The network of pi0.5: PaliGemma reads images and text, an action expert turns noise into a chunk of actions.

The chunk follows from an ordinary differential equation in the flow time t, from noise at t = 1 to actions at t = 0:
`x_t = t · noise + (1 - t) · actions`, and the network predicts the velocity `noise - actions`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from stare_jax.models.attention import KeyValue
from stare_jax.models.gemma import Gemma, GemmaConfig
from stare_jax.models.layers import Execution, Linear
from stare_jax.models.siglip import SigLIP, SigLIPConfig

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""of the sines and cosines that a flow time becomes."""


@dataclasses.dataclass(frozen=True)
class Pi05NetworkConfig:
    """Sizes of the network."""

    siglip: SigLIPConfig
    paligemma: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int
    """of the model, at least as many as the robot's."""
    horizon: int
    """actions in a chunk."""
    execution: Execution = Execution()

    def __post_init__(self):
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            got, expected = getattr(self.expert, name), getattr(self.paligemma, name)
            if got != expected:
                raise ValueError(f"expert.{name}: got {got}, expected {expected}, that of paligemma")


def time_embedding(time: jax.Array, width: int) -> jax.Array:
    """Returns sines and cosines of `2 π t / period`, float32 `[B, width]`, for flow times `[B]` in [0, 1].

    The `width / 2` periods go from 4e-3 to 4, equally far apart in their logarithm.
    """
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = 2 * jnp.pi * time.astype(jnp.float32)[:, None] / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class PaliGemma(nn.Module):
    """The vision tower and the two-expert language model."""

    config: Pi05NetworkConfig

    def setup(self):
        cfg = self.config
        self.img = SigLIP(cfg.siglip, cfg.paligemma.width, cfg.execution)
        self.llm = Gemma((cfg.paligemma, cfg.expert), cfg.vocab_size, cfg.execution)


class Pi05(nn.Module):
    """The network; images in [-1, 1], actions normalised, times in [0, 1]."""

    config: Pi05NetworkConfig

    def setup(self):
        cfg, width = self.config, self.config.expert.width
        self.PaliGemma = PaliGemma(cfg)
        # Outside the bfloat16 part, as the flow is integrated in float32.
        exact = dataclasses.replace(cfg.execution, dtype="float32")
        self.action_in_proj = Linear((width,), exact)
        self.action_out_proj = Linear((cfg.action_dim,), exact)
        self.time_mlp_in = Linear((width,), exact)
        self.time_mlp_out = Linear((width,), exact)

    def embed_prefix(
        self,
        images: tuple[jax.Array, ...],
        image_masks: tuple[jax.Array, ...],
        tokens: jax.Array,
        token_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns embeddings `[B, P, width]` of images and text, in this order, and which are valid, bool `[B, P]`.

        Args:
            images: float32 `[B, H, W, 3]` each.
            image_masks: bool `[B]` each, False where a camera is missing.
            tokens: int32 `[B, L]`.
            token_mask: bool `[B, L]`, False on padding.
        """
        # All cameras in one batch: one pass through the tower.
        batch = tokens.shape[0]
        patches = self.PaliGemma.img(jnp.concatenate(images))
        patches = patches.reshape(len(images), batch, *patches.shape[1:]).swapaxes(0, 1)
        text = self.PaliGemma.llm.embed(tokens)
        embeds = jnp.concatenate([patches.reshape(batch, -1, text.shape[-1]).astype(text.dtype), text], axis=1)
        is_seen = jnp.repeat(jnp.stack(image_masks, axis=1), patches.shape[2], axis=1)
        return embeds, jnp.concatenate([is_seen, token_mask], axis=1)

    def prefix(
        self,
        images: tuple[jax.Array, ...],
        image_masks: tuple[jax.Array, ...],
        tokens: jax.Array,
        token_mask: jax.Array,
    ) -> tuple[jax.Array, KeyValue, jax.Array]:
        """Runs images and text, which do not see the actions: once for every observation.

        Returns:
            Hidden states `[B, P, width]`, meaningful where the prefix is valid; keys and values; the validity `[B, P]`.
        """
        embeds, valid = self.embed_prefix(images, image_masks, tokens, token_mask)
        mask = valid[:, :, None] & valid[:, None, :]
        (hidden, _), cache = self.PaliGemma.llm((embeds, None), _positions(valid), [mask])
        return hidden, cache, valid

    def condition(self, time: jax.Array) -> jax.Array:
        """Returns what flow times `[B]` modulate the expert's norms by, float32 `[B, width]`."""
        hidden = nn.swish(self.time_mlp_in(time_embedding(time, self.config.expert.width)))
        return nn.swish(self.time_mlp_out(hidden))

    def suffix(self, cache: KeyValue, valid: jax.Array, noisy: jax.Array, time: jax.Array) -> jax.Array:
        """Returns the hidden states `[B, H, width]` of a noisy chunk `[B, H, A]` at flow times `[B]` after a prefix."""
        batch, horizon = noisy.shape[:2]
        cond = self.condition(time)
        embeds = self.action_in_proj(noisy).astype(self.config.execution.dtype)
        positions = valid.sum(axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(horizon)
        to_prefix = jnp.broadcast_to(valid[:, None, :], (batch, horizon, valid.shape[1]))
        masks = [to_prefix, jnp.ones((batch, horizon, horizon), bool)]
        (_, hidden), _ = self.PaliGemma.llm((None, embeds), positions, masks, cond=cond, cache=cache)
        return hidden

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Returns the velocity float32 `[B, H, A]` of hidden states `[B, H, width]`."""
        return self.action_out_proj(hidden.astype(jnp.float32))

    def __call__(
        self,
        images: tuple[jax.Array, ...],
        image_masks: tuple[jax.Array, ...],
        tokens: jax.Array,
        token_mask: jax.Array,
        noisy: jax.Array,
        time: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs prefix and chunk together; returns the velocity and the hidden states of both, `[B, P, ·]`, `[B, H, ·]`.

        The same numbers as `prefix` and `suffix` one after the other; touches every parameter, for initialisation.
        """
        embeds, valid = self.embed_prefix(images, image_masks, tokens, token_mask)
        batch, horizon = noisy.shape[:2]
        is_action = jnp.arange(valid.shape[1] + horizon) >= valid.shape[1]
        all_valid = jnp.concatenate([valid, jnp.ones((batch, horizon), bool)], axis=1)
        mask = all_valid[:, :, None] & all_valid[:, None, :] & (is_action[:, None] | ~is_action[None, :])
        chunk = self.action_in_proj(noisy).astype(self.config.execution.dtype)
        xs, cond = (embeds, chunk), self.condition(time)
        (prefix, suffix), _ = self.PaliGemma.llm(xs, _positions(all_valid), [mask], cond=cond)
        return self.velocity(suffix), prefix, suffix


def _positions(valid: jax.Array) -> jax.Array:
    """Returns int32 positions `[B, T]`; what is not valid takes none."""
    return jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
