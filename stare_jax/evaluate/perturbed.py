"""Evaluations with perturbations against one without, on the same seeds: differences and means of axes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stare_jax.evaluate.bootstrap import ratio_intervals
from stare_jax.evaluate.intervals import Estimate
from stare_jax.evaluate.protocol import Evaluation
from stare_jax.evaluate.summary import PairingError, SuccessName

SAME = ("env_id", "horizon", "temperature", "backend", "jitter", "checkpoint")
"""Fields of `EvalInfo` that perturbed and undisturbed evaluations of a policy have in common."""


class Perturbed(NamedTuple):
    """Success with perturbations, and its difference from success without, over the episodes that all have."""

    rate: Estimate
    """Mean over perturbations and tasks, with a 95 % bootstrap interval."""
    difference: Estimate
    """The same minus the undisturbed rate on the same seeds, with a 95 % paired bootstrap interval."""
    num_pairs: int
    """Seeds and tasks that were played in all of the evaluations."""


def against_undisturbed(
    perturbed: Sequence[Evaluation], undisturbed: Evaluation, outcome: SuccessName = "success_once"
) -> Perturbed:
    """Compares one perturbation, or the mean of several such as those of an axis, with the undisturbed episodes.

    Episodes are paired by seed and task: a perturbation may change the state in which the seed begins. What is drawn
    anew for the interval are the distinct undisturbed starts, with all their episodes, within each task: repeats of an
    official start are not independent. The interval tells nothing of other training seeds; where no episode ends
    otherwise than without perturbation, it has no width.

    Args:
        perturbed: evaluations of one policy, one or several.
        undisturbed: that policy's evaluation without perturbation.
        outcome: field of `Episodes`.

    Raises:
        PairingError: an evaluation is of another policy, task or protocol, is perturbed where it is not to be, or has
            no seed in common with the others.
    """
    for one in perturbed:
        _check(one, undisturbed)
    outcomes = [_by_seed(evaluation, outcome) for evaluation in (*perturbed, undisturbed)]
    shared = sorted(set.intersection(*map(set, outcomes)))
    if not shared:
        raise PairingError("seeds: got none in common, expected some, to compare like with like")
    start_of = _by_seed(undisturbed, "start")
    # A row of a stratum is a start: sums of successes with perturbations and of differences, number of episodes.
    strata: dict[int, dict[int, np.ndarray]] = {}
    for key in shared:
        rate = np.mean([of[key] for of in outcomes[:-1]])
        rows = strata.setdefault(key[0], {})
        rows[start_of[key]] = rows.get(start_of[key], 0.0) + np.array([rate, rate - outcomes[-1][key], 1.0])
    return Perturbed(*ratio_intervals([np.array(list(rows.values())) for rows in strata.values()]), len(shared))


def _check(perturbed: Evaluation, undisturbed: Evaluation) -> None:
    for name in SAME:
        got, expected = getattr(perturbed.info, name), getattr(undisturbed.info, name)
        if got != expected:
            raise PairingError(f"{name}: got {got}, expected {expected}, as undisturbed")
    if undisturbed.info.perturbation:
        raise PairingError(f"perturbation: got {undisturbed.info.perturbation}, expected none of the undisturbed")


def _by_seed(evaluation: Evaluation, field: str) -> Mapping[tuple[int, int], float]:
    """Returns (task, seed) -> a field of `Episodes`, of the episodes that were not lost."""
    episodes = evaluation.episodes
    columns = (episodes.task, episodes.seed, episodes.valid, getattr(episodes, field))
    rows = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
    return {(task, seed): value for task, seed, valid, value in rows if valid}
