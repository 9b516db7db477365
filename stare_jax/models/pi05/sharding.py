"""Layout of pi0.5's parameters: one table of (regex over the path, PartitionSpec), axes `fsdp` and `tensor`.

Heads and hidden units are split
over `tensor`, the other side of each product over `fsdp`. PaliGemma has one key-value head, which every device of a
`tensor` group keeps. Adapters are split like the weight beside them, except for the axis of their rank.
"""

from jax.sharding import PartitionSpec as P

from stare_jax.models.pi05.network import Pi05Config
from stare_jax.sharding.mesh import Rule


def sharding_rules(config: Pi05Config) -> tuple[Rule, ...]:
    """Returns the rules of the model's parameters: every parameter has one, and every rule a parameter."""
    rules = [
        (r"llm/embedder/input_embedding$", P(("tensor", "fsdp"))),
        (r"llm/.*norm/scale$", P()),
        (r"llm/layers/pre_\w+_norm_1/Dense_0/kernel$", P(None, "fsdp", None)),
        (r"llm/final_norm_1/Dense_0/kernel$", P("fsdp", None)),
        (r"llm/.*norm_1/Dense_0/bias$", P()),
        (r"(action_(in|out)_proj|time_mlp_(in|out)|value_head/\w+|noise_head/\w+)/(kernel|bias)$", P()),
    ]
    if config.state_tokens:
        rules += [(r"state_embed/kernel$", P(None, None, "fsdp")), (r"state_embed/bias$", P())]
    else:
        rules += _tower_rules()
        if config.stem:
            rules.append((r"stem/conv_\d+/(kernel|bias)$", P()))
    for path, (*stack, inputs, outputs) in _WEIGHTS.items():
        rules.append((rf"{path}$", P(None, *stack, inputs, outputs)))
        for module in _modules(path):
            if config.lora is not None and config.lora.adapts(module):
                beside = f"{module}/" if path.endswith("/w") else f"{module}_"
                rules.append((rf"{beside}lora_a$", P(None, *stack, inputs, None)))
                rules.append((rf"{beside}lora_b$", P(None, *stack, None, outputs)))
    return tuple(rules)


def adaptable_modules() -> tuple[str, ...]:
    """Returns the module paths of all products that can have adapters: those of both language models."""
    return tuple(module for path in _WEIGHTS for module in _modules(path))


_WEIGHTS = {
    "llm/layers/attn/q_einsum(_1)?/w": ("tensor", "fsdp", None),
    "llm/layers/attn/kv_einsum(_1)?/w": (None, None, "fsdp", None),
    "llm/layers/attn/attn_vec_einsum(_1)?/w": ("tensor", None, "fsdp"),
    "llm/layers/mlp(_1)?/gating_einsum": (None, "fsdp", "tensor"),
    "llm/layers/mlp(_1)?/linear": ("tensor", "fsdp"),
}
"""weights of both experts by path: mesh axes of all their axes after that of the layers; input and output come last."""


def _modules(path: str) -> tuple[str, str]:
    """Returns the module paths in PaliGemma and in the action expert of a key of `_WEIGHTS`."""
    module = f"PaliGemma/{path.removesuffix('/w')}"
    return module.replace("(_1)?", ""), module.replace("(_1)?", "_1")


def _tower_rules() -> list[Rule]:
    block = r"img/Transformer/encoderblock"
    attention, mlp = rf"{block}/MultiHeadDotProductAttention_0", rf"{block}/MlpBlock_0"
    return [
        (r"img/embedding/kernel$", P(None, None, None, "fsdp")),
        (r"img/(embedding/bias|pos_embedding)$", P()),
        (rf"{attention}/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),
        (rf"{attention}/(query|key|value)/bias$", P(None, "tensor", None)),
        (rf"{attention}/out/kernel$", P(None, "tensor", None, "fsdp")),
        (rf"{mlp}/Dense_0/kernel$", P(None, "fsdp", "tensor")),
        (rf"{mlp}/Dense_0/bias$", P(None, "tensor")),
        (rf"{mlp}/Dense_1/kernel$", P(None, "tensor", "fsdp")),
        (rf"({attention}/out|{mlp}/Dense_1)/bias$|{block}/LayerNorm_[01]/(scale|bias)$", P()),
        (r"img/Transformer/encoder_norm/(scale|bias)$", P()),
        (r"img/head/kernel$", P("fsdp", "tensor")),
        (r"img/head/bias$", P("tensor")),
    ]
