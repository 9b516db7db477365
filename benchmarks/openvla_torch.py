"""OpenVLA in PyTorch, of timm's vision transformers and transformers' Llama, for benchmarks and tests to compare with.

It shares no code with the library, only the sizes (`OpenVLAConfig`). Names in its state dict are those of the public
checkpoint, so weights are exchanged as a dict of arrays; the value head and the adapters have names of their own.

    config = stare_jax.models.openvla_7b()
    model = build(config, device="cuda", dtype=torch.bfloat16)
    tokens = generate(model, pixels, ids, mask)
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

NUM_BINS = 256


class MissingPackage(ImportError):
    """A package that this file needs is not there; the message says what to install."""


def import_peers() -> tuple[Any, Any]:
    """Imports timm and transformers.

    Raises:
        MissingPackage: one of them, or torchvision, which timm imports, is not there.
    """
    _declare_torchvision_operators()
    try:
        import timm.models.vision_transformer as timm_vit
        import transformers
    except ImportError as error:
        raise MissingPackage(f"{error}; pip install 'timm>=1,<2' 'transformers>=5,<6' torchvision") from error
    return timm_vit, transformers


def _declare_torchvision_operators() -> None:
    """Lets torchvision be imported beside a build of torch that its compiled operators do not fit.

    PyPI's torchvision is compiled for CUDA. Next to a CPU build of torch its library does not load, and the import of
    its Python part fails for want of the signatures of two operators, which nothing here calls.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        global _signatures  # The declarations last as long as this object.
        _signatures = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _signatures.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# ---- The model -------------------------------------------------------------------------------------------------------


class LayerScale(nn.Module):
    """timm's, with its vector named as in OpenVLA's checkpoints."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class VisionBackbone(nn.Module):
    """DINOv2 (`featurizer`) and SigLIP (`fused_featurizer`), features side by side."""

    def __init__(self, config):
        super().__init__()
        self.featurizer = _make_tower(config.dino, config.image_size)
        self.fused_featurizer = _make_tower(config.siglip, config.image_size)

    def forward(self, pixels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Maps two normalised images `[B, 3, H, W]` to `[B, patches, widths]`."""
        towers = (self.featurizer, self.fused_featurizer)
        return torch.cat([tower_features(tower, x) for tower, x in zip(towers, pixels, strict=True)], dim=-1)


def tower_features(tower: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Returns the patches' output of the second-to-last block, without the final norm, `[B, patches, width]`."""
    (features,) = tower.forward_intermediates(
        image, indices=[len(tower.blocks) - 2], stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    return features


def _make_tower(sizes, image_size: int) -> nn.Module:
    timm_vit, _ = import_peers()
    tower = timm_vit.VisionTransformer(
        img_size=image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=(sizes.mlp_dim + 0.5) / sizes.width,  # timm rounds the product down
        init_values=sizes.layer_scale,
        class_token=sizes.num_prefix > 0,
        reg_tokens=max(sizes.num_prefix - 1, 0),
        no_embed_class=True,
        global_pool="token" if sizes.num_prefix else "map",
        num_classes=0,
    )
    if sizes.layer_scale is not None:
        for block in tower.blocks:
            block.ls1, block.ls2 = LayerScale(sizes.width), LayerScale(sizes.width)
    return tower


class Projector(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class OpenVLA(nn.Module):
    """The network; attention is torch's `scaled_dot_product_attention` in all three parts."""

    def __init__(self, config):
        super().__init__()
        _, transformers = import_peers()
        llm = config.llm
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config.dino.width + config.siglip.width, config.projector_dim, llm.width)
        llama = transformers.LlamaConfig(
            vocab_size=llm.vocab_size,
            hidden_size=llm.width,
            num_hidden_layers=llm.depth,
            num_attention_heads=llm.num_heads,
            num_key_value_heads=llm.num_kv_heads,
            intermediate_size=llm.mlp_dim,
            rms_norm_eps=llm.norm_eps,
            rope_theta=llm.rope_theta,
            pad_token_id=None,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        self.language_model = transformers.LlamaForCausalLM(llama)
        self.action_vocab_end, self.action_dim = config.action_vocab_end, config.action_dim

    def embed_prompt(self, pixels, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns embeddings `[B, P, width]` of BOS, patches and text, and their mask bool `[B, P]`."""
        patches = self.projector(self.vision_backbone(pixels))
        text = self.language_model.model.embed_tokens(ids)
        is_patch = torch.ones(patches.shape[:2], dtype=torch.bool, device=mask.device)
        embeds = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        return embeds, torch.cat([mask[:, :1], is_patch, mask[:, 1:]], dim=1)

    def action_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits `[..., 256]` of the action tokens, in the vocabulary's order."""
        head, stop = self.language_model.lm_head, self.action_vocab_end
        if hasattr(head, "rows"):  # with an adapter
            return head.rows(hidden, stop - NUM_BINS, stop).float()
        return F.linear(hidden, head.weight[stop - NUM_BINS : stop]).float()

    def score(self, pixels, ids: torch.Tensor, mask: torch.Tensor, actions: torch.Tensor, *, padded: bool = True):
        """Runs prompt and actions in one pass.

        Args:
            pixels: two normalised images `[B, 3, H, W]`.
            ids: `[B, L]`: BOS, padding, text.
            mask: bool `[B, L]`, False on padding.
            actions: token ids `[B, A]`.
            padded: False promises that nothing is padding, which spares attention its mask.

        Returns:
            The hidden states `[B, A, width]` that predict the actions, after the final norm.
        """
        embeds, mask = self.embed_prompt(pixels, ids, mask)
        embeds = torch.cat([embeds, self.language_model.model.embed_tokens(actions[:, :-1])], dim=1)
        mask = F.pad(mask, (0, actions.shape[1] - 1), value=True)
        out = self.language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask.long() if padded else None,
            position_ids=mask.long().cumsum(1) - 1,
            use_cache=False,
        )
        return out.last_hidden_state[:, -actions.shape[1] :]

    def log_prob(self, *inputs, padded: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns log-probabilities summed over the tokens and mean entropies, float32 `[B]`, and the first hidden."""
        hidden, actions = self.score(*inputs, padded=padded), inputs[-1]
        log_probs = F.log_softmax(self.action_logits(hidden), dim=-1)
        index = (actions - (self.action_vocab_end - NUM_BINS))[..., None]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, index)[..., 0].sum(1), entropy.mean(1), hidden[:, 0]


def build(config, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> OpenVLA:
    """Makes the model with its weights uninitialised where they are to be, frozen, in evaluation mode."""
    with torch.device("meta"):
        model = OpenVLA(config)
    model = model.to(dtype).to_empty(device=device)
    # Frequencies are no weights, and were never computed on the meta device.
    rotary = model.language_model.model.rotary_emb
    fresh = type(rotary)(config=rotary.config)
    rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq.to(device), fresh.inv_freq.clone().to(device)
    return model.requires_grad_(False).eval()


def load_weights(model: OpenVLA, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into the model; what the forward pass never runs may be left out.

    Raises:
        ValueError: names are unknown, or others than those are missing.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in weights and not is_never_run(model, name)]
    if problems := sorted(set(weights) - set(parameters)) + missing:
        raise ValueError(f"weights: got {len(weights)} names, expected the model's; unknown or missing: {problems}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in weights:
                parameter.copy_(weights[name])
            else:
                parameter.zero_()


def is_never_run(model: OpenVLA, name: str) -> bool:
    """Returns whether a parameter belongs to a tower's last block, final norm or attention pool."""
    for tower_name, tower in model.vision_backbone.named_children():
        prefix = f"vision_backbone.{tower_name}."
        parts = ("norm.", "attn_pool.", f"blocks.{len(tower.blocks) - 1}.")
        if name.startswith(tuple(prefix + part for part in parts)):
            return True
    return False


# ---- Generation ------------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """Functions that run the decoder during generation; see `make_decoder`."""

    prefill: Callable
    decode: Callable
    cache: Any
    """a `StaticCache` that is written over every time, or None for a `DynamicCache` that grows."""


class Generated(NamedTuple):
    tokens: torch.Tensor
    """int64 `[B, A]`, token ids."""
    logits: torch.Tensor
    """float32 `[B, A, 256]` of the action tokens, in the vocabulary's order."""


def make_decoder(model: OpenVLA, batch_size: int, prompt_length: int, *, compiled: bool) -> Decoder:
    """Returns the eager decoder, or the compiled one: one graph for the prompt, one (a CUDA graph) for a token.

    Args:
        model: the network.
        batch_size: of the cache.
        prompt_length: P, patches included.
        compiled: with `torch.compile`, and keys and values in buffers of the full length, as it needs them.
    """
    llama = model.language_model
    if not compiled:
        return Decoder(llama.model, llama.model, None)
    _, transformers = import_peers()
    config, weight = llama.config, llama.lm_head.weight
    cache = transformers.StaticCache(config=config, max_cache_len=prompt_length + model.action_dim - 1)
    head_dim = config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch_size, config.num_key_value_heads, head_dim, weight.dtype, weight.device)
    prefill = torch.compile(llama.model, dynamic=False)
    return Decoder(prefill, torch.compile(llama.model, mode="reduce-overhead", dynamic=False), cache)


@torch.inference_mode()
def generate(
    model: OpenVLA,
    pixels: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float = 0.0,
    padded: bool = True,
    decoder: Decoder | None = None,
) -> Generated:
    """Decodes the action tokens one by one against keys and values.

    Args:
        model: the network.
        pixels: two normalised images `[B, 3, H, W]`.
        ids: `[B, L]`: BOS, padding, text.
        mask: bool `[B, L]`, False on padding.
        temperature: 0 takes the most likely action token.
        padded: False promises that nothing is padding, which spares the eager decoder its masks.
        decoder: see `make_decoder`; None is eager.
    """
    llama, start = model.language_model, model.action_vocab_end - NUM_BINS
    embeds, mask = model.embed_prompt(pixels, ids, mask)
    prompt_length, num_later = embeds.shape[1], model.action_dim - 1
    decoder = decoder or make_decoder(model, len(ids), prompt_length, compiled=False)
    cache, is_static = decoder.cache, decoder.cache is not None
    if is_static:
        cache.reset()
        allowed = _causal(F.pad(mask, (0, num_later), value=True))
    else:
        cache = import_peers()[1].DynamicCache(config=llama.config)
    positions, tokens, logits = mask.long().cumsum(1) - 1, [], []
    for i in range(model.action_dim):
        stop = prompt_length + i
        attention_mask = mask.long() if padded else None
        if is_static:
            attention_mask = allowed[:, :, stop - embeds.shape[1] : stop].contiguous()
            torch.compiler.cudagraph_mark_step_begin()
        hidden = (decoder.decode if i else decoder.prefill)(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits.append(model.action_logits(hidden))
        tokens.append(start + _choose(logits[-1], temperature))
        if i < num_later:
            embeds = llama.model.embed_tokens(tokens[-1])[:, None]
            mask, positions = F.pad(mask, (0, 1), value=True), positions[:, -1:] + 1
    return Generated(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))


def _causal(mask: torch.Tensor) -> torch.Tensor:
    """Returns bool `[B, 1, S, S]`: which tokens each one may look at."""
    return (mask[:, None, :] & mask.new_ones(mask.shape[1], mask.shape[1]).tril())[:, None]


def _choose(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)[:, 0]
