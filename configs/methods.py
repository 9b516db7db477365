"""Methods of the paper's tables and figures, each as a difference: one phase, and the fields that it sets.

A method starts from the weights of another one, so that methods of a study share what they have in common: STA-PPO and
PPO the imitation, IPI the preference phase of STA-TPO. The names are words of `configs/*.py` (`--config=FILE:ppo`), and
what a study lists (`configs/studies/`).
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_collections

from stare_jax.runs.config import Phase


class Method(NamedTuple):
    """One row of the paper's tables."""

    row: str
    """the paper's name of the row, and what it is."""
    phase: Phase
    """the phase that the method adds."""
    start: str
    """the method whose weights that phase starts from; empty for a method that starts a run."""
    changes: Mapping[str, Any]
    """field of the configuration -> value, all that tells the method from others with this phase."""


_STA_PPO = {
    "ppo.shaping": True,
    "ppo.reward": "success",
    "ppo.stop_at_success": True,
    "ppo.time_limit": "terminate",
    "ppo.terminal_potential": "keep",
    "ppo.chunk_discount": "step",
    "ppo.jump_start.fraction": 0.0,
    "stages.progressive": True,
}
_PPO = _STA_PPO | {"ppo.shaping": False}

METHODS: Mapping[str, Method] = {
    "sft": Method("SFT: imitation of demonstrations", "sft", "", {}),
    "grape": Method("GRAPE: TPO, preference among whole trajectories", "tpo", "sft", {"tpo.variant": "tpo"}),
    "sta_tpo": Method("SFT → STA-TPO: preference stage by stage", "tpo", "sft", {"tpo.variant": "sta_tpo"}),
    "chosen": Method(
        "no row of the paper: more imitation of the chosen trajectories of pairs, the control of GRAPE and STA-TPO",
        "tpo",
        "sft",
        {"tpo.variant": "imitation"},
    ),
    "ppo": Method("PPO (figure 4): 1 for a success, no shaping", "ppo", "sft", _PPO),
    "rl4vla": Method(
        "RL4VLA: PPO on its reward, in episodes of full length",
        "ppo",
        "sft",
        _PPO | {"ppo.reward": "rl4vla", "ppo.stop_at_success": False},
    ),
    "pi_rl": Method(
        "pi_RL: PPO on a flow, discounted by decisions", "ppo", "sft", _PPO | {"ppo.chunk_discount": "decision"}
    ),
    "dense": Method(
        "no row of the paper: PPO on minus the distance that remains", "ppo", "sft", _PPO | {"ppo.reward": "dense"}
    ),
    "sta_ppo": Method("SFT → STA-PPO: progressive potentials, kept at the end of an episode", "ppo", "sft", _STA_PPO),
    "sta_ppo_paper": Method(
        "SFT → STA-PPO with the paper's own potentials", "ppo", "sft", _STA_PPO | {"stages.progressive": False}
    ),
    "sta_ppo_jump_start": Method(
        "no row of the paper: STA-PPO, half of whose episodes begin, for the policy, in a later stage",
        "ppo",
        "sft",
        _STA_PPO | {"ppo.jump_start.fraction": 0.5},
    ),
    "sta_ppo_zero": Method(
        "no row of the paper: potentials that end at zero, which have the advantages of PPO with another critic",
        "ppo",
        "sft",
        _STA_PPO | {"ppo.terminal_potential": "zero"},
    ),
    "ipi": Method("IPI: SFT → STA-TPO → STA-PPO", "ppo", "sta_tpo", _STA_PPO),
}


def chain_of(name: str) -> tuple[str, ...]:
    """Returns the methods that lead to one, itself the last: ("sft", "sta_tpo", "ipi")."""
    start = METHODS[name].start
    return (*(chain_of(start) if start else ()), name)


def named_method(words: Collection[str], *, default: str) -> str:
    """Returns the one method among some words, or the default.

    Raises:
        ValueError: there are two.
    """
    named = sorted(set(words) & set(METHODS))
    if len(named) > 1:
        raise ValueError(f"variant: got {', '.join(named)}, expected one of them")
    return (named or [default])[0]


def set_method(config: ml_collections.ConfigDict, name: str) -> None:
    """Sets the phases of a method, and the fields of every method that leads to it; changes the configuration in place.

    Raises:
        ValueError: there is no such method, or it is not one for the model.
    """
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    if name == "pi_rl" and "num_denoising_steps" not in config.model:
        raise ValueError("method: got 'pi_rl' for a model of tokens, expected a flow: pi05")
    chain = [METHODS[each] for each in chain_of(name)]
    config.phases = tuple(method.phase for method in chain)
    for method in chain:
        config.update_from_flattened_dict(method.changes)
