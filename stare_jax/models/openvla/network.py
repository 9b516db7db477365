"""The network of OpenVLA: two vision towers, a projector, a Llama decoder over action bins, a value head.

In studies without images a linear embedding of the state into a few tokens replaces the towers.

The sequence is `[BOS] + patches + text + actions`, causal throughout. The text is right-aligned, so that its last
token, which predicts the first action token and carries the value, stands at the same place in every row of a batch.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Interval

from stare_jax.config import Count, Natural, NonNegative, Pattern, check_fields
from stare_jax.models.bins import NUM_BINS, Greedy
from stare_jax.models.nn.attention import KeyValue
from stare_jax.models.nn.heads import ValueHead
from stare_jax.models.nn.linear import Execution, Linear, gelu
from stare_jax.models.nn.llama import Cache, Llama, LlamaConfig
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.nn.placement import constrain_batch
from stare_jax.models.nn.vit import ConvStem, ViT, ViTConfig, stem_stride
from stare_jax.models.preprocess import Resize, crop_center, normalize_image, resize_image
from stare_jax.models.tokenizer import check_template
from stare_jax.types import PyTree

Pixels = tuple[jax.Array, jax.Array]
"""float32 `[B, H, W, 3]`, normalised for DINO and for SigLIP."""
SceneInput = Pixels | jax.Array
"""Input of the network besides text: images, or the normalised state float32 `[B, S]`."""


@dataclasses.dataclass(frozen=True)
class OpenVLAConfig:
    """Sizes and choices of an OpenVLA policy; presets: `openvla_7b()`, `openvla_tiny()`, `openvla_state()`."""

    dino: ViTConfig | None
    """None, like `siglip`, where `state_tokens` replace the towers."""
    siglip: ViTConfig | None
    projector_dim: Natural
    """width of the projector's first hidden layer."""
    llm: LlamaConfig
    action_vocab_end: Count
    """action bin `b` is token `action_vocab_end - 1 - b`."""
    tokenizer: str
    """folder of a Hugging Face tokenizer, or "words" for the built-in one."""
    prompt_template: str
    """with `{instruction}` (lower-cased), and `{state}` where the binned state is part of the prompt. With
    `state_tokens` it may be empty: a policy of a single task then sees the state alone."""
    prompt_length: Annotated[int, Interval(ge=3)]
    """most tokens of a prompt, including BOS and the token that predicts the first action; a run pads to fewer where
    its instructions need fewer (`models.prompts`)."""
    camera: str = "base_camera"
    """name of the camera whose image the policy sees."""
    image_size: Natural = 224
    """side of the square image, in pixels."""
    resize: Resize = "bicubic"
    """resizer of images of another size, see `models/preprocess.py`."""
    center_crop: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """share of the image's area, around its middle, that is enlarged to the whole; 1 crops nothing, 0.9 is for
    checkpoints that were trained on random crops."""
    stem: tuple[Count, ...] = ()
    """channels of a convolutional stem that both towers read instead of the image; empty has none."""
    state_tokens: Natural = 0
    """number of tokens into which the state is embedded in place of images; 0 uses images."""
    action_dim: Annotated[int, Interval(ge=2)] = 7
    """numbers of an action, one token each."""
    state_dim: Natural = 0
    """numbers of the state; 0 where the policy reads none."""
    label_width: NonNegative = 0.0
    """standard deviation of the imitation target in bins; 0 is one-hot."""
    restrict_logits: bool = False
    """True normalises the imitation loss over the action tokens alone, as sampling does; False over all tokens."""
    greedy: Greedy = "mode"
    """decision at temperature 0, see `models.bins.Greedy`; the bin that holds it is the token that the next one sees.
    OpenVLA is published with "mode"."""
    value_dims: tuple[Count, ...] = (512, 128)
    """sizes of the hidden layers of the value head."""
    critic: Literal["shared", "detached", "own", "state"] = "shared"
    """input of the value head: "shared", the decoder's last hidden state of the prompt; "detached", the same without a
    gradient; "own", features of a stem of its own, or the state where there are no images; "state", the state, also
    where the policy does not see it (an asymmetric critic, arXiv:1710.06542)."""
    execution: Execution = Execution()
    lora: LoRAConfig | None = None
    """adapters; with them only they and the value head are trained."""
    frozen_patterns: tuple[Pattern, ...] = ()
    """regexes of parameters that no phase trains, in addition to those that adapters freeze; frozen parameters have the
    type `execution.dtype`, trained ones `execution.param_dtype`."""
    decode_unroll: Count = 1
    """action tokens per iteration of the decoding loop."""
    unstack_layers: bool = False
    """True copies each decoder layer's weights out of their stack before a rollout (`Policy.prepare`): on GPUs a token
    then costs a third of the memory traffic, and the decoder's weights are in memory twice meanwhile."""

    @property
    def cameras(self) -> tuple[str, ...]:
        return () if self.state_tokens else (self.camera,)

    def __post_init__(self):
        check_fields(self)
        if self.state_tokens:
            self._check_state_only()
        else:
            self._check_towers()
        if not NUM_BINS < self.action_vocab_end <= self.llm.vocab_size:
            expected = f"more than {NUM_BINS}, at most vocab_size {self.llm.vocab_size}"
            raise ValueError(f"action_vocab_end: got {self.action_vocab_end}, expected {expected}")
        check_template(self.prompt_template)
        if "{instruction}" not in self.prompt_template and not (self.state_tokens and not self.prompt_template):
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected {{instruction}} in it")
        if "{state}" in self.prompt_template and not self.state_dim:
            raise ValueError(
                f"state_dim: got 0, expected > 0 for {{state}} in prompt_template {self.prompt_template!r}"
            )

    def _check_towers(self):
        for name in ("dino", "siglip"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: got None, expected a tower, as state_tokens is 0")
        stride = stem_stride(self.stem) * self.dino.patch_size
        if self.siglip.patch_size != self.dino.patch_size:
            raise ValueError(f"siglip.patch_size: got {self.siglip.patch_size}, expected dino's {self.dino.patch_size}")
        if self.image_size % stride:
            raise ValueError(f"image_size: got {self.image_size}, expected a multiple of {stride} (stem times patch)")
        if self.stem and (self.dino.mean, self.dino.std) != (self.siglip.mean, self.siglip.std):
            raise ValueError(f"siglip.mean, std: got {self.siglip}, expected those of dino, as the stem is shared")
        if self.critic == "state" and not self.state_dim:
            raise ValueError("state_dim: got 0, expected > 0 for critic = 'state'")
        if self.critic == "own" and not self.stem:
            raise ValueError("critic: got 'own', expected 'shared', 'detached' or 'state' where stem is empty")

    def _check_state_only(self):
        for name, expected in (("dino", None), ("siglip", None), ("stem", ()), ("image_size", 0)):
            if getattr(self, name) != expected:
                got = f"got {getattr(self, name)!r}, expected {expected!r}"
                raise ValueError(f"{name}: {got}, as state_tokens = {self.state_tokens} replace the towers")
        if not self.state_dim:
            raise ValueError(f"state_dim: got 0, expected > 0 for state_tokens = {self.state_tokens}")


class Projector(nn.Module):
    """Three linear layers with exact GELU between them, from the towers' features to the decoder's width."""

    hidden_dim: int
    width: int
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = partial(Linear, execution=self.execution, lora=self.lora)
        x = gelu(linear((self.hidden_dim,), name="fc1")(constrain_batch(x)))
        x = gelu(constrain_batch(linear((self.width,), name="fc2")(x)))
        return constrain_batch(linear((self.width,), name="fc3")(x))


class OpenVLA(nn.Module):
    """The network. Images come in normalised for each tower; actions go in and come out as bins."""

    config: OpenVLAConfig

    def setup(self):
        cfg, execution = self.config, self.config.execution
        if cfg.state_tokens:
            self.state_embed = Linear((cfg.state_tokens, cfg.llm.width), execution)
        else:
            self.stem = ConvStem(cfg.stem, execution) if cfg.stem else None
            self.dino = ViT(cfg.dino, execution, cfg.lora)
            self.siglip = ViT(cfg.siglip, execution, cfg.lora)
            self.projector = Projector(cfg.projector_dim, cfg.llm.width, execution, cfg.lora)
            if cfg.critic == "own":
                self.value_stem = ConvStem(cfg.stem, execution)
        self.llm = Llama(cfg.llm, execution, cfg.lora)
        self.value_head = ValueHead(cfg.value_dims)

    def vision(self, pixels: Pixels) -> jax.Array:
        """Returns both towers' features, DINO's first, `[B, patches, width_dino + width_siglip]`."""
        if self.stem is not None:
            pixels = (self.stem(pixels[0]),) * 2
        return jnp.concatenate([self.dino(pixels[0]), self.siglip(pixels[1])], axis=-1)

    def embed_prompt(self, scene: SceneInput, tokens: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns embeddings `[B, P, width]` of BOS, patches and text, and their mask bool `[B, P]`, P = patches + L.

        Args:
            scene: images or state; the tokens of a state stand in the place of an image's patches.
            tokens: int32 `[B, L]`: BOS, padding, text.
            token_mask: bool `[B, L]`, False on padding.
        """
        patches = self.state_embed(scene) if self.config.state_tokens else self.projector(self.vision(scene))
        text = self.llm.embed(tokens)
        embeds = jnp.concatenate([text[:, :1], patches.astype(text.dtype), text[:, 1:]], axis=1)
        is_patch = jnp.ones(patches.shape[:2], bool)
        return embeds, jnp.concatenate([token_mask[:, :1], is_patch, token_mask[:, 1:]], axis=1)

    def prefill(
        self, scene: SceneInput, tokens: jax.Array, token_mask: jax.Array, layers: Sequence[PyTree] | None = None
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Runs the prompt; `layers` are the decoder's parameters from `layout.unstack`, for this and all of `decode`.

        Returns:
            The hidden state `[B, width]` of the last prompt token, a cache with room for the action tokens that are fed
            back (all but the last), and the mask bool `[B, P]` of the cache's prefix.
        """
        embeds, mask = self.embed_prompt(scene, tokens, token_mask)
        hidden, prefix, mask = self._read(embeds, mask, 1, layers)
        num_slots = self.config.action_dim - 1
        suffix = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-3], num_slots, *x.shape[-2:]), x.dtype), prefix)
        return hidden[:, 0], Cache(prefix, suffix), mask

    def _read(
        self, embeds: jax.Array, mask: jax.Array, num_last: int, layers: Sequence[PyTree] | None = None
    ) -> tuple[jax.Array, KeyValue | tuple[KeyValue, ...], jax.Array]:
        """Returns the last tokens' hidden states `[B, num_last, width]`, keys and values, and the mask of these."""
        if self.config.execution.attention == "xla":
            x, kept = self.llm.run(embeds, mask, layers)
            return self.llm.norm(x[:, -num_last:]), kept, mask
        order = jnp.argsort(~mask, axis=1, stable=True)
        mask = jnp.take_along_axis(mask, order, axis=1)
        x, kept = self.llm.run(jnp.take_along_axis(embeds, order[..., None], axis=1), mask, layers)
        last = mask.sum(axis=1, keepdims=True) - num_last + jnp.arange(num_last)
        return self.llm.norm(jnp.take_along_axis(x, last[..., None], axis=1)), kept, mask

    def decode(
        self,
        bins: jax.Array,
        cache: Cache,
        mask: jax.Array,
        index: jax.Array,
        layers: Sequence[PyTree] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs the bins int32 `[B]` of action dimension `index`; returns the next hidden state and the cache."""
        embeds = self.llm.embed(self.token_ids(bins))[:, None]
        hidden, cache = self.llm.decode(embeds, cache, mask, index, layers)
        return hidden[:, 0], cache

    def score(self, scene: SceneInput, tokens: jax.Array, token_mask: jax.Array, bins: jax.Array) -> jax.Array:
        """Returns the hidden states `[B, A, width]` that predict each action token, given the ones before it.

        The first of them is that of the last prompt token.
        """
        embeds, mask = self.embed_prompt(scene, tokens, token_mask)
        actions = self.llm.embed(self.token_ids(bins[:, :-1]))
        embeds = jnp.concatenate([embeds, actions], axis=1)
        mask = jnp.concatenate([mask, jnp.ones(actions.shape[:2], bool)], axis=1)
        hidden, _, _ = self._read(embeds, mask, bins.shape[1])
        return hidden

    def token_ids(self, bins: jax.Array) -> jax.Array:
        """Returns the vocabulary's ids of action bins."""
        return self.config.action_vocab_end - 1 - bins

    def action_logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits `[..., 256]` of the action bins, in the order of the bins."""
        stop = self.config.action_vocab_end
        return self.llm.logits(hidden, stop - NUM_BINS, stop)[..., ::-1]

    def all_logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits `[..., vocab_size]` of all tokens."""
        return self.llm.logits(hidden, 0, self.config.llm.vocab_size)

    def value(self, hidden: jax.Array, scene: SceneInput, state: jax.Array) -> jax.Array:
        """Returns float32 `[B]` from the input that `config.critic` selects.

        Args:
            hidden: `[B, width]` of the last prompt token.
            scene: images or state, as in `embed_prompt`.
            state: float32 `[B, S]`, normalised.
        """
        cfg = self.config
        if cfg.critic == "state" or (cfg.critic == "own" and cfg.state_tokens):
            return self.value_head(state)
        if cfg.critic == "own":
            # No pooling, which would lose the positions of objects.
            return self.value_head(self.value_stem(scene[0]).reshape(hidden.shape[0], -1))
        return self.value_head(jax.lax.stop_gradient(hidden) if cfg.critic == "detached" else hidden)

    def __call__(
        self, scene: SceneInput, tokens: jax.Array, token_mask: jax.Array, bins: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns action logits `[B, A, 256]` and values `[B]`; `init` makes all parameters by this method."""
        hidden = self.score(scene, tokens, token_mask, bins)
        return self.action_logits(hidden), self.value(hidden[:, 0], scene, state)


def preprocess(image: jax.Array, config: OpenVLAConfig) -> Pixels:
    """Resizes and crops uint8 images `[B, H, W, 3]` as the configuration says, and normalises them for each tower."""
    pixels = crop_center(resize_image(image, config.image_size, config.resize), config.center_crop)
    dino, siglip = (normalize_image(pixels, tower.mean, tower.std) for tower in (config.dino, config.siglip))
    return dino, siglip
