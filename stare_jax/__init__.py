"""Reinforcement fine-tuning of vision-language-action models, stage by stage, in JAX.

Rooms are imported when they are first looked at, so that `import stare_jax` costs nothing and needs no simulator:

    stages    stages of a task: labels, costs, potentials, shaped rewards
    losses    imitation, flow matching, TPO and STA-TPO, GAE, PPO
    models    policies as records of pure functions: OpenVLA, pi0.5, an MLP
    envs      simulators behind one interface, and toy ones in pure JAX
    rollout   episodes, as a policy and a simulator make them
    data      demonstrations and preference pairs on disk
    weights   checkpoints of Hugging Face and openpi, in and out
    train     the three learners: sft, tpo, ppo
    evaluate  success rates with intervals, stage by stage
    report    figures, films and a page about a run
    runs      whole runs on disk: the phases in order, resumed where they stopped
    plan      what a run will cost on devices that need not be there
    serve     a policy behind a socket
"""

import importlib
from types import ModuleType

__all__ = [
    *("config", "data", "documents", "envs", "evaluate", "logging", "losses", "models", "plan", "report", "rollout"),
    *("runs", "serve", "sharding", "stages", "state", "targets", "train", "types", "weights"),
]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"stare_jax.{name}")
    raise AttributeError(f"module 'stare_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
