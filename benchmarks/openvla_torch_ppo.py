"""LoRA and RL4VLA's PPO update of the PyTorch OpenVLA in `openvla_torch.py`."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from openvla_torch import OpenVLA, is_never_run
from torch import nn
from torch.nn import functional as F


class ValueHead(nn.Sequential):
    """RL4VLA's: linear layers with GELU between, the last without bias; float32."""

    def __init__(self, width: int, dims: tuple[int, ...]):
        sizes = (width, *dims)
        hidden = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.GELU())]
        super().__init__(*hidden, nn.Linear(sizes[-1], 1, bias=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.float())[..., 0]


class LoRALinear(nn.Module):
    """`y = x Wᵀ + b + (alpha / rank) (x Aᵀ) Bᵀ` around a frozen linear layer; A and B are float32, used in x's type."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        options = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **options) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self._delta(x, self.lora_b)

    def rows(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Returns the outputs [start, stop) alone; for layers without bias."""
        return F.linear(x, self.base.weight[start:stop]) + self._delta(x, self.lora_b[start:stop])

    def _delta(self, x: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
        return F.linear(self.scale * F.linear(x, self.lora_a.to(x.dtype)), lora_b.to(x.dtype))


class LoRAConv(nn.Module):
    """The same around the convolution that embeds patches: A is a convolution, B is 1x1."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        options = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.randn(rank, *base.weight.shape[1:], **options) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_channels, rank, 1, 1, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.conv2d(x, self.lora_a.to(x.dtype), stride=self.base.stride)
        return self.base(x) + F.conv2d(self.scale * low, self.lora_b.to(x.dtype))


def add_lora(model: OpenVLA, *, rank: int = 32, alpha: float = 16.0) -> None:
    """Puts adapters around every linear layer and patch embedding that the forward pass runs."""
    for path, module in list(model.named_modules()):
        kinds = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv}
        if type(module) in kinds and not is_never_run(model, path + "."):
            parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            setattr(parent, name, kinds[type(module)](module, rank, alpha))


def lora_parameters(model: OpenVLA) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if ".lora_" in name)


def checkpoint_layers(model: OpenVLA) -> None:
    """Recomputes every layer in the backward pass, in all three parts."""
    for tower in model.vision_backbone.children():
        tower.set_grad_checkpointing(True)
    llama, arguments = model.language_model, {"use_reentrant": False}
    # transformers 5 has changed the name on the way.
    getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)(arguments)
    model.language_model.train()  # transformers checkpoints in training mode alone; there is no dropout


def ppo_loss(logp, value, batch: Mapping[str, torch.Tensor], *, clip_eps: float, value_clip_eps: float, huber: float):
    """RL4VLA's loss: the clipped surrogate, and the larger of two Huber losses of the value; float32."""
    ratio = torch.exp(logp - batch["old_logp"])
    advantage, old_value = batch["advantage"], batch["old_value"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage)
    clipped = old_value + (value - old_value).clamp(-value_clip_eps, value_clip_eps)
    errors = [F.huber_loss(v, batch["return_"], delta=huber, reduction="none") for v in (value, clipped)]
    return torch.maximum(*errors).mean() - surrogate.mean()


def make_ppo_step(
    model: OpenVLA, value_head: ValueHead, *, microbatch: int, learning_rate: float, value_learning_rate: float, **loss
) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    """Returns step(batch) -> the mean loss: gradients of all microbatches, clipped to a norm of 10, AdamW.

    The batch holds `pixels`, `ids`, `mask`, `actions`, `old_logp`, `old_value`, `advantage`, `return_`, `[N, ...]`;
    nothing of it is padded.
    """
    lora, head = list(lora_parameters(model.requires_grad_(False))), list(value_head.parameters())
    for parameter in (*lora, *head):
        parameter.requires_grad_(True)
    groups = [{"params": lora, "lr": learning_rate}, {"params": head, "lr": value_learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    names = ("old_logp", "old_value", "advantage", "return_")

    def step(batch: Mapping[str, Any]) -> torch.Tensor:
        num_parts, total = math.ceil(len(batch["ids"]) / microbatch), 0.0
        for i in range(num_parts):
            part = slice(i * microbatch, (i + 1) * microbatch)
            pixels = tuple(x[part] for x in batch["pixels"])
            inputs = (pixels, *(batch[name][part] for name in ("ids", "mask", "actions")))
            logp, _, hidden = model.log_prob(*inputs, padded=False)
            scores = {name: batch[name][part] for name in names}
            mean = ppo_loss(logp, value_head(hidden), scores, **loss) / num_parts
            mean.backward()
            total += mean.detach()
        torch.nn.utils.clip_grad_norm_((*lora, *head), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step
