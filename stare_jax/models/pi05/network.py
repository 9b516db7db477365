"""The network of pi0.5: PaliGemma reads images and text, an action expert turns noise into a chunk of actions.

The chunk follows from an ordinary differential equation in the flow time t, from noise at t = 1 to actions at t = 0:
`x_t = t · noise + (1 - t) · actions`, and the network predicts the velocity `noise - actions`.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Interval

from stare_jax.config import Count, Natural, Pattern, Positive, check_fields
from stare_jax.models.nn.attention import KeyValue
from stare_jax.models.nn.gemma import Gemma, GemmaConfig
from stare_jax.models.nn.heads import NoiseHead, ValueHead
from stare_jax.models.nn.linear import Execution, Linear
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.nn.placement import constrain_batch
from stare_jax.models.nn.siglip import SigLIP, SigLIPConfig
from stare_jax.models.nn.vit import ConvStem, stem_stride
from stare_jax.models.tokenizer import check_template
from stare_jax.types import PyTree

SceneInput = tuple[jax.Array, ...] | jax.Array
"""Input of the network besides text: images float32 `[B, H, W, 3]` in [-1, 1], or the scaled state float32 `[B, S]`."""

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""least and largest period of the sines and cosines of `time_embedding`."""
_PREFIX = r"^(?:PaliGemma/(?:img/|llm/(?!.*_1/))|stem/|state_embed/)"
"""regex of the parameters that images and text go through."""


@dataclasses.dataclass(frozen=True)
class Pi05Config:
    """Sizes and choices of a pi0.5 policy; `models/pi05/presets.py` has those of published checkpoints."""

    siglip: SigLIPConfig | None
    """vision tower; None where `state_tokens` replace the images."""
    paligemma: GemmaConfig
    expert: GemmaConfig
    vocab_size: Count
    """rows of the embedding table."""
    tokenizer: str
    """folder of a Hugging Face tokenizer, or "words" for the built-in one."""
    prompt_template: str
    """with `{instruction}`, and `{state}` where the binned state is part of the prompt."""
    prompt_length: Annotated[int, Interval(ge=2)]
    """most tokens of a prompt; a run pads to fewer where its instructions need fewer (`models.prompts`)."""
    window: Count
    """H, actions that one decision predicts."""
    chunk: Count
    """C, actions of the window that are executed before the next decision."""
    model_action_dim: Count = 32
    """numbers of an action in the network, of which the robot's are the first; 32 in all published weights."""
    action_dim: Count = 7
    """A, numbers of the robot's action."""
    state_dim: Natural = 0
    """S, numbers of the robot's state; 0 where the policy reads none."""
    cameras: tuple[str, ...] = ("3rd_view_camera",)
    """names of the cameras, in the order of base, left wrist, right wrist. A camera that the robot does not have is
    left out of the list. openpi masks its image instead, which gives the same numbers: no token sees a masked image,
    and it takes no position. Every camera in the list has to be in the observation."""
    image_size: Natural = 224
    """side of the square image, in pixels; images of another size are resized to fit and padded with black."""
    stem: tuple[Count, ...] = ()
    """channels of a convolutional stem that the tower reads instead of the image; empty has none."""
    state_tokens: Natural = 0
    """number of tokens into which the state is embedded in place of images; 0 uses images."""
    num_denoising_steps: Count = 10
    """N, steps from noise to actions."""
    noise: Literal["ode", "sde", "learned"] = "sde"
    """randomness of sampling besides the noise at the start, at temperatures above 0: "sde" makes one step of each row
    random (Flow-SDE), "learned" all steps, with deviations from a head (Flow-Noise), "ode" none, so that decisions have
    no log-probability and PPO is not possible."""
    noise_level: Positive = 0.5
    """a of Flow-SDE."""
    noise_std: tuple[Positive, Positive] = (0.08, 0.16)
    """least and largest deviation of Flow-Noise."""
    preference: Literal["flow", "chain"] = "flow"
    """score of actions in preference learning: "flow" is the error of the velocity at noises and times that policy,
    reference and both sides of a pair share; "chain" is the density of the chain that the policy drew."""
    pad_actions: bool = True
    """True teaches the policy to repeat an episode's last action beyond its end, as openpi does; False leaves actions
    beyond the end out of the loss."""
    value_dims: tuple[Count, ...] = (1024, 512, 256)
    """sizes of the hidden layers of the value head."""
    critic: Literal["shared", "detached", "state"] = "shared"
    """input of the value head: "shared", the mean of PaliGemma's valid tokens; "detached", the same without a gradient;
    "state", the state, also where the policy does not see it (an asymmetric critic, arXiv:1710.06542)."""
    execution: Execution = Execution()
    lora: LoRAConfig | None = None
    """adapters of both language models, trained in place of their layers; `presets.LORA` is openpi's recipe."""
    frozen_patterns: tuple[Pattern, ...] = ()
    """regexes of parameters that no phase trains, in addition to those that adapters freeze; frozen parameters have
    the type `execution.dtype`, trained ones `execution.param_dtype`. `presets.PALIGEMMA` freezes all but the expert."""
    unstack_layers: bool = True
    """True copies each layer of the action expert out of its stack before a rollout (`Policy.prepare`), as XLA's
    compilers for GPUs and CPUs would do in every denoising step: 0.85 GB in bfloat16 for the published sizes. Each
    device has all of it, also where the mesh cuts weights over `fsdp`: no step gathers any."""

    def __post_init__(self):
        check_fields(self)
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            got, expected = getattr(self.expert, name), getattr(self.paligemma, name)
            if got != expected:
                raise ValueError(f"expert.{name}: got {got}, expected {expected}, that of paligemma")
        self._check_scene()
        if self.preference == "chain" and self.noise != "learned":
            raise ValueError(f"preference: got 'chain', expected 'flow' with noise {self.noise!r}")
        check_template(self.prompt_template)
        if "{instruction}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected {{instruction}} in it")
        if not self.state_dim and ("{state}" in self.prompt_template or self.critic == "state" or self.state_tokens):
            raise ValueError("state_dim: got 0, expected > 0 for a prompt, a critic or tokens that show the state")
        if self.chunk > self.window:
            raise ValueError(f"chunk: got {self.chunk}, expected in [1, {self.window}], the window")
        if self.model_action_dim < self.action_dim:
            raise ValueError(f"model_action_dim: got {self.model_action_dim}, expected >= {self.action_dim}")
        if self.noise_std[0] > self.noise_std[1]:
            raise ValueError(f"noise_std: got {self.noise_std}, expected the smaller first")

    def _check_scene(self):
        if self.state_tokens:
            for name, expected in (("siglip", None), ("stem", ()), ("cameras", ()), ("image_size", 0)):
                if getattr(self, name) != expected:
                    got = f"got {getattr(self, name)!r}, expected {expected!r}"
                    raise ValueError(f"{name}: {got}, as state_tokens = {self.state_tokens} replace the images")
            return
        if self.siglip is None or not self.cameras:
            raise ValueError(f"siglip, cameras: got {self.siglip}, {self.cameras}, expected both; state_tokens is 0")
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras: got {self.cameras}, expected each once")
        stride = stem_stride(self.stem) * self.siglip.patch_size
        if self.image_size < stride or self.image_size % stride:
            raise ValueError(f"image_size: got {self.image_size}, expected a multiple of {stride} (stem times patch)")


def time_embedding(time: jax.Array, width: int) -> jax.Array:
    """Returns sines and cosines of `2 π t / period`, float32 `[..., width]`, for flow times `[...]` in [0, 1].

    The `width / 2` periods go from 4e-3 to 4, equally far apart in their logarithm.
    """
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = 2 * jnp.pi * time.astype(jnp.float32)[..., None] / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class PaliGemma(nn.Module):
    """The vision tower and the two-expert language model."""

    config: Pi05Config

    def setup(self):
        cfg = self.config
        if cfg.siglip is not None:
            self.img = SigLIP(cfg.siglip, cfg.paligemma.width, cfg.execution)
        self.llm = Gemma((cfg.paligemma, cfg.expert), cfg.vocab_size, cfg.execution, cfg.lora)


class Pi05(nn.Module):
    """The network; images in [-1, 1], actions normalised, times in [0, 1].

    Chunks come in groups, `[B, G, H, A]`: G noisy chunks, each at a time of its own, that follow one prefix and do not
    see each other.
    """

    config: Pi05Config

    def setup(self):
        cfg, width = self.config, self.config.expert.width
        self.PaliGemma = PaliGemma(cfg)
        # Outside the bfloat16 part, as the flow is integrated in float32.
        exact = partial(Linear, execution=cfg.execution, is_exact=True)
        self.action_in_proj = exact((width,))
        self.action_out_proj = exact((cfg.model_action_dim,))
        self.time_mlp_in = exact((width,))
        self.time_mlp_out = exact((width,))
        if cfg.state_tokens:
            self.state_embed = Linear((cfg.state_tokens, cfg.paligemma.width), cfg.execution)
        else:
            self.stem = ConvStem(cfg.stem, cfg.execution) if cfg.stem else None
        self.value_head = ValueHead(cfg.value_dims)
        if cfg.noise == "learned":
            self.noise_head = NoiseHead(cfg.model_action_dim)

    def embed_scene(self, scene: SceneInput) -> jax.Array:
        """Returns embeddings `[B, cameras * patches, width]`, or `[B, state_tokens, width]`."""
        if self.config.state_tokens:
            return self.state_embed(scene)
        # All cameras in one batch: one pass through the tower. Those of a row stay together, and so on their device.
        images = jnp.stack(scene, axis=1)
        images = images.reshape(-1, *images.shape[2:])
        patches = self.PaliGemma.img(images if self.stem is None else self.stem(images))
        return patches.reshape(scene[0].shape[0], -1, patches.shape[-1])

    def embed_prefix(
        self, scene: SceneInput, scene_mask: jax.Array | None, tokens: jax.Array, token_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns embeddings `[B, P, width]` of scene and text, in this order, and which are valid, bool `[B, P]`.

        Args:
            scene: images of all cameras, or the state.
            scene_mask: bool `[B, cameras]`, False where an image is missing; None where none is.
            tokens: int32 `[B, L]`.
            token_mask: bool `[B, L]`, False on padding.
        """
        seen, text = self.embed_scene(scene), self.PaliGemma.llm.embed(tokens)
        is_seen = jnp.ones(seen.shape[:2], bool)
        if scene_mask is not None:
            is_seen = jnp.repeat(scene_mask, seen.shape[1] // scene_mask.shape[1], axis=1)
        embeds = jnp.concatenate([seen.astype(text.dtype), text], axis=1)
        return embeds, jnp.concatenate([is_seen, token_mask], axis=1)

    def prefix(
        self, scene: SceneInput, scene_mask: jax.Array | None, tokens: jax.Array, token_mask: jax.Array
    ) -> tuple[jax.Array, KeyValue, jax.Array]:
        """Runs scene and text, which do not see the actions: once for every observation.

        Returns:
            Hidden states `[B, P, width]`, meaningful where the prefix is valid; keys and values; the validity `[B, P]`.
        """
        embeds, valid = self.embed_prefix(scene, scene_mask, tokens, token_mask)
        mask = valid[:, :, None] & valid[:, None, :]
        # Padding comes last where no image is missing: text is the end of the prefix, and padded at its own.
        lengths = None if scene_mask is not None else valid.sum(axis=1, dtype=jnp.int32)
        (hidden, _), cache = self.PaliGemma.llm((embeds, None), _positions(valid), [mask], lengths=lengths)
        return hidden, cache, valid

    def condition(self, time: jax.Array) -> jax.Array:
        """Returns the condition of the expert's norms, float32 `[..., width]`, for flow times `[...]`."""
        embedding = constrain_batch(time_embedding(time, self.config.expert.width))
        hidden = nn.swish(constrain_batch(self.time_mlp_in(embedding)))
        return nn.swish(constrain_batch(self.time_mlp_out(hidden)))

    def suffix(
        self,
        cache: KeyValue | Sequence[KeyValue],
        valid: jax.Array,
        noisy: jax.Array,
        time: jax.Array,
        layers: Sequence[PyTree] | None = None,
    ) -> jax.Array:
        """Returns hidden states `[B, G, H, width]` of noisy chunks `[B, G, H, A]` at times `[B, G]` after a prefix;
        `layers` are those of `gemma.unstack_expert`, the cache is then one of each layer.
        """
        batch, groups, window = noisy.shape[:3]
        embeds = self.action_in_proj(noisy).astype(self.config.execution.dtype)
        embeds = embeds.reshape(batch, groups * window, -1)
        positions = valid.sum(axis=1, keepdims=True, dtype=jnp.int32) + jnp.tile(jnp.arange(window), groups)
        to_prefix = jnp.broadcast_to(valid[:, None, :], (batch, groups * window, valid.shape[1]))
        group = jnp.repeat(jnp.arange(groups), window)
        to_group = jnp.broadcast_to(group[:, None] == group, (batch, groups * window, groups * window))
        masks, cond = [to_prefix, to_group], self.condition(time)
        (_, hidden), _ = self.PaliGemma.llm((None, embeds), positions, masks, cond=cond, cache=cache, layers=layers)
        return hidden.reshape(batch, groups, window, -1)

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Returns the velocity float32 `[..., H, A]` of hidden states `[..., H, width]`."""
        return self.action_out_proj(hidden.astype(jnp.float32))

    def deviation(self, hidden: jax.Array) -> jax.Array:
        """Returns the noise head's output float32 `[..., H, A]` for hidden states `[..., H, width]`."""
        return self.noise_head(hidden)

    def value(self, pooled: jax.Array, state: jax.Array) -> jax.Array:
        """Returns float32 `[B]` from the input that `config.critic` selects.

        Args:
            pooled: `[B, width]` of `pool_prefix`.
            state: float32 `[B, S]`, scaled.
        """
        if self.config.critic == "state":
            return self.value_head(state)
        return self.value_head(jax.lax.stop_gradient(pooled) if self.config.critic == "detached" else pooled)

    def __call__(
        self,
        scene: SceneInput,
        scene_mask: jax.Array | None,
        tokens: jax.Array,
        token_mask: jax.Array,
        noisy: jax.Array,
        time: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs prefix and one chunk together; returns the velocity and the hidden states of both.

        The same numbers as `prefix` and `suffix` one after the other, for chunks `[B, H, A]` at times `[B]`.
        """
        embeds, valid = self.embed_prefix(scene, scene_mask, tokens, token_mask)
        batch, window = noisy.shape[:2]
        is_action = jnp.arange(valid.shape[1] + window) >= valid.shape[1]
        all_valid = jnp.concatenate([valid, jnp.ones((batch, window), bool)], axis=1)
        mask = all_valid[:, :, None] & all_valid[:, None, :] & (is_action[:, None] | ~is_action[None, :])
        chunk = self.action_in_proj(noisy).astype(self.config.execution.dtype)
        xs, cond = (embeds, chunk), self.condition(time)[:, None]
        (prefix, hidden), _ = self.PaliGemma.llm(xs, _positions(all_valid), [mask], cond=cond)
        return self.velocity(hidden), prefix, hidden

    def init_pass(
        self, scene: SceneInput, tokens: jax.Array, token_mask: jax.Array, state: jax.Array, noisy: jax.Array
    ) -> None:
        """Uses every parameter; `init` makes the parameters by this method."""
        _, prefix, hidden = self(scene, None, tokens, token_mask, noisy, jnp.zeros(noisy.shape[0], jnp.float32))
        self.value(pool_prefix(prefix, jnp.ones(prefix.shape[:2], bool)), state)
        if self.config.noise == "learned":
            self.deviation(hidden)


def pool_prefix(hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the mean, float32 `[B, width]`, of the valid ones `[B, P]` of hidden states `[B, P, width]`."""
    return jnp.mean(hidden.astype(jnp.float32), axis=1, where=valid[..., None])


def _positions(valid: jax.Array) -> jax.Array:
    """Returns int32 `[B, T]`: how many valid tokens there are before each; padding takes no position."""
    return jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1


def has_frozen_prefix(names: Iterable[str], frozen_patterns: Sequence[str]) -> bool:
    """Returns whether all parameters that images and text go through are frozen, so that a prefix never changes.

    Args:
        names: paths of the model's parameters.
        frozen_patterns: regexes of the frozen ones.
    """
    prefix = [name for name in names if re.search(_PREFIX, name)]
    return all(any(re.search(pattern, name) for pattern in frozen_patterns) for name in prefix)
