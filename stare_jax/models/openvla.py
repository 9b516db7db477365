"""OpenVLA: two vision towers, a projector, a Llama decoder that speaks in action bins, and a value head.

The sequence is `[BOS] + patches + text`, causal throughout; the text is right-aligned, so that its last token, which
predicts the first action token and carries the value, stands at the same place in every row of a batch.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.heads import NUM_BINS, ValueHead
from stare_jax.models.llama import Cache, Llama, LlamaConfig
from stare_jax.models.vit import ConvStem, Execution, ViT, ViTConfig, stem_stride


@dataclasses.dataclass(frozen=True)
class OpenVLAConfig:
    """Everything that `make_openvla` needs to know; `openvla_7b()` and `openvla_tiny()` are the presets."""

    dino: ViTConfig
    siglip: ViTConfig
    projector_dim: int
    """width of the projector's first hidden layer."""
    llm: LlamaConfig
    action_vocab_end: int
    """action bin `b` is token `action_vocab_end - 1 - b`."""
    tokenizer: str
    """folder of a Hugging Face tokenizer, or "words" for the built-in one."""
    prompt_template: str
    """with `{instruction}` (lower-cased), and `{state}` where the binned state is part of the prompt."""
    prompt_length: int
    """tokens of the padded prompt, including BOS and the token that predicts the first action."""
    camera: str = "base_camera"
    image_size: int = 224
    resize: str = "cubic"
    """`jax.image.resize` method for cameras of another size; antialiased and rounded to uint8, as PIL does."""
    stem: tuple[int, ...] = ()
    """channels of a convolutional stem that both towers read instead of the image; empty has none."""
    action_dim: int = 7
    state_dim: int = 0
    label_width: float = 0.0
    """standard deviation of the imitation target in bins; 0 is one-hot."""
    restrict_logits: bool = False
    """whether the imitation loss normalises over the action tokens alone, as sampling always does."""
    value_dims: tuple[int, ...] = (512, 128)
    value_stop_gradient: bool = False
    """whether the value's gradient stays out of the decoder."""
    execution: Execution = Execution()
    decode_unroll: int = 1
    """action tokens per iteration of the decoding loop."""

    def __post_init__(self):
        stride = stem_stride(self.stem)
        for name, tower in (("dino", self.dino), ("siglip", self.siglip)):
            if self.image_size % (stride * tower.patch_size):
                raise ValueError(
                    f"image_size: got {self.image_size}, expected a multiple of {stride * tower.patch_size}, "
                    f"the stem's stride {stride} times {name}.patch_size {tower.patch_size}"
                )
        if self.dino.patch_size != self.siglip.patch_size:
            raise ValueError(f"siglip.patch_size: got {self.siglip.patch_size}, expected dino's {self.dino.patch_size}")
        if self.stem and (self.dino.mean, self.dino.std) != (self.siglip.mean, self.siglip.std):
            raise ValueError(f"siglip.mean, std: got {self.siglip}, expected those of dino, as both share the stem")
        if not NUM_BINS < self.action_vocab_end <= self.llm.vocab_size:
            raise ValueError(
                f"action_vocab_end: got {self.action_vocab_end}, expected in ({NUM_BINS}, {self.llm.vocab_size}]"
            )
        if "{instruction}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected {{instruction}} in it")
        if "{state}" in self.prompt_template and not self.state_dim:
            raise ValueError(
                f"state_dim: got 0, expected > 0 for {{state}} in prompt_template {self.prompt_template!r}"
            )
        for name, low in (("label_width", 0), ("state_dim", 0), ("action_dim", 1), ("prompt_length", 3)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {low}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // (stem_stride(self.stem) * self.dino.patch_size)) ** 2


class Projector(nn.Module):
    """Three linear layers with exact GELU between them, from the towers' features to the decoder's width."""

    hidden_dim: int
    width: int
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.execution.dtype, param_dtype=self.execution.param_dtype)
        x = nn.gelu(nn.Dense(self.hidden_dim, name="fc1", **types)(x), approximate=False)
        x = nn.gelu(nn.Dense(self.width, name="fc2", **types)(x), approximate=False)
        return nn.Dense(self.width, name="fc3", **types)(x)


class OpenVLA(nn.Module):
    """The network. Images come in normalised for each tower; actions go in and out as bins."""

    config: OpenVLAConfig

    def setup(self):
        cfg, exe = self.config, self.config.execution
        self.stem = ConvStem(cfg.stem, exe) if cfg.stem else None
        self.dino = ViT(cfg.dino, exe)
        self.siglip = ViT(cfg.siglip, exe)
        self.projector = Projector(cfg.projector_dim, cfg.llm.width, exe)
        self.llm = Llama(cfg.llm, exe)
        self.value_head = ValueHead(cfg.value_dims)

    def vision(self, pixels: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Returns both towers' features, DINO's first, `[B, patches, width_dino + width_siglip]`."""
        if self.stem is not None:
            pixels = (self.stem(pixels[0]),) * 2
        return jnp.concatenate([self.dino(pixels[0]), self.siglip(pixels[1])], axis=-1)

    def embed_prompt(self, pixels: tuple[jax.Array, jax.Array], tokens: jax.Array, token_mask: jax.Array):
        """Returns embeddings `[B, P, width]`, bool mask `[B, P]` and int32 positions `[B, P]`, P = patches + L.

        Args:
            pixels: float32 `[B, H, W, 3]` normalised for DINO and for SigLIP.
            tokens: int32 `[B, L]`: BOS, padding, text.
            token_mask: bool `[B, L]`, False on padding.
        """
        patches = self.projector(self.vision(pixels))
        text = self.llm.embed(tokens)
        embeds = jnp.concatenate([text[:, :1], patches.astype(text.dtype), text[:, 1:]], axis=1)
        is_patch = jnp.ones(patches.shape[:2], bool)
        mask = jnp.concatenate([token_mask[:, :1], is_patch, token_mask[:, 1:]], axis=1)
        return embeds, mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1

    def prefill(self, pixels, tokens, token_mask):
        """Returns the last hidden state `[B, width]`, a cache with room for the actions, and its mask `[B, P]`."""
        embeds, mask, positions = self.embed_prompt(pixels, tokens, token_mask)
        hidden, prefix = self.llm(embeds, _causal(mask), positions)
        num_slots = max(self.config.action_dim - 1, 1)  # the last action token is never fed back
        suffix = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], num_slots, *x.shape[3:]), x.dtype), prefix)
        return hidden[:, -1], Cache(prefix, suffix), mask

    def decode(self, bins: jax.Array, cache: Cache, mask: jax.Array, index: jax.Array | int):
        """Feeds action bins int32 `[B]`, the action's dimension `index`; returns the hidden state and the cache."""
        embeds = self.llm.embed(self.token_ids(bins))[:, None]
        position = mask.sum(axis=1, dtype=jnp.int32) + index
        hidden, cache = self.llm.decode(embeds, cache, mask, position, index)
        return hidden[:, 0], cache

    def score(self, pixels, tokens, token_mask, bins: jax.Array) -> jax.Array:
        """Returns the hidden states `[B, A, width]` that predict each action token, the tokens before it given."""
        embeds, mask, _ = self.embed_prompt(pixels, tokens, token_mask)
        actions = self.llm.embed(self.token_ids(bins[:, :-1]))
        embeds = jnp.concatenate([embeds, actions], axis=1)
        mask = jnp.concatenate([mask, jnp.ones(actions.shape[:2], bool)], axis=1)
        hidden, _ = self.llm(embeds, _causal(mask), jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1)
        return hidden[:, -bins.shape[1] :]

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

    def value(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 `[B]` from the hidden state `[B, width]` of the last prompt token."""
        return self.value_head(jax.lax.stop_gradient(hidden) if self.config.value_stop_gradient else hidden)

    def __call__(self, pixels, tokens, token_mask, bins):
        """Returns action logits `[B, A, 256]` and values `[B]`; touches every parameter, for initialisation."""
        hidden = self.score(pixels, tokens, token_mask, bins)
        return self.action_logits(hidden), self.value(hidden[:, 0])


def _causal(mask: jax.Array) -> jax.Array:
    """Returns bool `[B, T, T]`: keys that exist and do not come after the query."""
    return jnp.tril(jnp.ones((mask.shape[1],) * 2, bool)) & mask[:, None, :]


def preprocess(images: jax.Array, config: OpenVLAConfig) -> tuple[jax.Array, jax.Array]:
    """Resizes uint8 images `[B, H, W, 3]` where needed and normalises them for each tower, float32."""
    size = config.image_size
    pixels = images.astype(jnp.float32)
    if images.shape[1:3] != (size, size):
        shape = (images.shape[0], size, size, 3)
        pixels = jnp.clip(jnp.round(jax.image.resize(pixels, shape, config.resize, antialias=True)), 0.0, 255.0)
    towers = (config.dino, config.siglip)
    return tuple((pixels / 255.0 - np.float32(t.mean)) / np.float32(t.std) for t in towers)
