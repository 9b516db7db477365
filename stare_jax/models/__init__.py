"""Networks as records of pure functions."""

from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.nn.lora import LoRAConfig, LoRAOverride, add_adapters, drop_adapters, merge_adapters
from stare_jax.models.observation import ObservationError
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.models.openvla.policy import make_openvla
from stare_jax.models.openvla.presets import openvla_7b, openvla_state, openvla_tiny
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.models.pi05.policy import make_pi05
from stare_jax.models.pi05.presets import EXPERTS as PI05_EXPERTS
from stare_jax.models.pi05.presets import LORA as PI05_LORA
from stare_jax.models.pi05.presets import PALIGEMMA as PI05_PALIGEMMA
from stare_jax.models.pi05.presets import pi05_base, pi05_droid, pi05_libero, pi05_maniskill, pi05_state, pi05_tiny
from stare_jax.models.policy import ActionScore, Decision, Policy, with_prompt
from stare_jax.types import NormStats

ModelConfig = OpenVLAConfig | Pi05Config | MLPConfig
"""configuration of a policy, which `make_policy` builds."""


def make_policy(config: ModelConfig, norm_stats: NormStats) -> Policy:
    """Builds the policy of a configuration; the statistics of its training data become part of its functions.

    Args:
        config: sizes and choices of the network; its type selects the network.
        norm_stats: quantiles of actions `[A]` and states `[S]`.

    Raises:
        TypeError: no network has such a configuration.
        ValueError: the statistics or a pattern of the adapters do not fit the configuration.
    """
    makers = {OpenVLAConfig: make_openvla, Pi05Config: make_pi05, MLPConfig: make_mlp}
    if type(config) not in makers:
        expected = ", ".join(sorted(cls.__name__ for cls in makers))
        raise TypeError(f"config: got {type(config).__name__}, expected one of {expected}")
    return makers[type(config)](config, norm_stats)


__all__ = [
    "PI05_EXPERTS",
    "PI05_LORA",
    "PI05_PALIGEMMA",
    "ActionScore",
    "Decision",
    "LoRAConfig",
    "LoRAOverride",
    "MLPConfig",
    "ModelConfig",
    "ObservationError",
    "OpenVLAConfig",
    "Pi05Config",
    "Policy",
    "add_adapters",
    "drop_adapters",
    "make_mlp",
    "make_openvla",
    "make_pi05",
    "make_policy",
    "merge_adapters",
    "openvla_7b",
    "openvla_state",
    "openvla_tiny",
    "pi05_base",
    "pi05_droid",
    "pi05_libero",
    "pi05_maniskill",
    "pi05_state",
    "pi05_tiny",
    "with_prompt",
]
