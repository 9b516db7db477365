"""Layout of OpenVLA's parameters: one table of (regex over the path, PartitionSpec), axes `fsdp` and `tensor`.

Heads and hidden units are split over `tensor`, the other side of each product over `fsdp`; vectors of the model's width
are replicated. Adapters are split like the kernel beside them, except for the axis of their rank.
"""

from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.sharding.mesh import Rule


class Kernel(NamedTuple):
    """Layout of the kernel of one module."""

    path: str
    num_stacked: int
    """1 with a leading axis of layers, which is never split; 0 without."""
    inputs: tuple[str | None, ...]
    """mesh axes of the input axes."""
    outputs: tuple[str | None, ...]
    """mesh axes of the output axes."""


def sharding_rules(config: OpenVLAConfig) -> tuple[Rule, ...]:
    """Returns the rules of the model's parameters: every parameter has one, and every rule a parameter."""
    vectors = [
        (r"llm/embed_tokens$", P(("tensor", "fsdp"))),
        (r"norm/scale$", P()),
        (r"value_head/layer_\d+/(kernel|bias)$|value_head/out/kernel$", P()),
    ]
    if config.state_tokens:
        vectors += [(r"state_embed/kernel$", P(None, None, "fsdp")), (r"state_embed/bias$", P())]
    else:
        vectors += [
            (r"(dino|siglip)/blocks/qkv/bias$", P(None, None, "tensor", None)),
            (r"(dino|siglip)/blocks/fc1/bias$", P(None, "tensor")),
            (r"(dino|siglip)/blocks/((proj|fc2)/bias|norm[12]/(scale|bias)|ls[12])$", P()),
            (r"(dino|siglip)/(pos_embed|cls_token|reg_token|patch_embed/bias)$", P()),
            (r"projector/fc1/bias$", P("tensor")),
            (r"projector/fc[23]/bias$", P()),
        ]
        if config.stem:
            vectors.append((r"stem/conv_\d+/(kernel|bias)$", P()))
    return (*vectors, *(rule for kernel in _kernels(config) for rule in _kernel_rules(kernel, config.lora)))


def adaptable_modules(config: OpenVLAConfig) -> tuple[str, ...]:
    """Returns the module paths of all products that can have adapters."""
    return tuple(kernel.path for kernel in _kernels(config))


def _kernels(config: OpenVLAConfig) -> list[Kernel]:
    if config.state_tokens:
        return _decoder_kernels()
    return [*_decoder_kernels(), *_tower_kernels("dino"), *_tower_kernels("siglip"), *_projector_kernels()]


def _decoder_kernels() -> list[Kernel]:
    return [
        Kernel("llm/lm_head", 0, ("fsdp",), ("tensor",)),
        *(Kernel(f"llm/layers/{name}_proj", 1, ("fsdp",), ("tensor", None)) for name in "qkv"),
        Kernel("llm/layers/o_proj", 1, ("tensor", None), ("fsdp",)),
        *(Kernel(f"llm/layers/{name}_proj", 1, ("fsdp",), ("tensor",)) for name in ("gate", "up")),
        Kernel("llm/layers/down_proj", 1, ("tensor",), ("fsdp",)),
    ]


def _tower_kernels(tower: str) -> list[Kernel]:
    return [
        Kernel(f"{tower}/patch_embed", 0, (None, None, None), ("fsdp",)),
        Kernel(f"{tower}/blocks/qkv", 1, ("fsdp",), (None, "tensor", None)),
        Kernel(f"{tower}/blocks/proj", 1, ("tensor", None), ("fsdp",)),
        Kernel(f"{tower}/blocks/fc1", 1, ("fsdp",), ("tensor",)),
        Kernel(f"{tower}/blocks/fc2", 1, ("tensor",), ("fsdp",)),
    ]


def _projector_kernels() -> list[Kernel]:
    return [
        Kernel("projector/fc1", 0, ("fsdp",), ("tensor",)),
        Kernel("projector/fc2", 0, ("tensor",), ("fsdp",)),
        Kernel("projector/fc3", 0, ("fsdp",), ("tensor",)),
    ]


def _kernel_rules(kernel: Kernel, lora: LoRAConfig | None) -> list[Rule]:
    stacked = (None,) * kernel.num_stacked
    rules = [(rf"{kernel.path}/kernel$", P(*stacked, *kernel.inputs, *kernel.outputs))]
    if lora is not None and lora.adapts(kernel.path):
        rules.append((rf"{kernel.path}/lora_a$", P(*stacked, *kernel.inputs, None)))
        rules.append((rf"{kernel.path}/lora_b$", P(*stacked, None, *kernel.outputs)))
    return rules
