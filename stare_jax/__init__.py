"""Stage-aware reinforcement fine-tuning of vision-language-action models in JAX.

stages      labels, costs, potentials and shaped rewards of one trajectory
losses      GAE, PPO, TPO and STA-TPO, imitation
types       the records everyone shares
models      policies as records of pure functions
envs        simulators
train       the loops
"""

from stare_jax import losses, stages, types

__all__ = [
    "losses",
    "stages",
    "types",
]
__version__ = "0.1.0"
