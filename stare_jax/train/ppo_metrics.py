"""What the episodes of a PPO iteration, and the updates on them, say about the policy and its critic."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from stare_jax.rollout.collect import Rollout
from stare_jax.stages import TaskSpec
from stare_jax.train.annotate import Annotation


def rollout_metrics(rollout: Rollout, annotation: Annotation, spec: TaskSpec, *, shaping: bool) -> dict[str, float]:
    """Returns `env/...` and `shaping/...` of the episodes that are over, and `ppo/...` of all decisions.

    An episode is over at success or at the horizon; those cut short and those lost do not count, and without any that
    is over, means are NaN. In a batch of a fixed number of steps short episodes end more often than long ones, so the
    success rate is above that of whole episodes.

    Args:
        rollout: E episodes.
        annotation: NumPy leaves `[E, ...]`.
        spec: the task.
        shaping: whether there is shaping to report on.
    """
    valid_t, valid_d = annotation.valid_t, annotation.valid_d
    is_success = annotation.reward_t.any(axis=1)
    is_over = is_success | valid_t[:, -1]
    num_over = int(is_over.sum())
    over = Annotation(*(x[is_over] for x in annotation))

    def per_episode(total):
        return float(total) / num_over if num_over else float("nan")

    completed = {
        f"env/completed_{name}": per_episode(over.completed[:, k].sum()) for k, name in enumerate(spec.stage_names)
    }
    return {
        "env/success": per_episode(is_success.sum()),
        "env/num_successes": int(is_success.sum()),
        "env/num_episodes": num_over,
        "env/num_cut": int((valid_t.any(axis=1) & ~is_over).sum()),
        "env/num_dropped": rollout.num_dropped,
        "env/episode_length": per_episode(over.valid_t.sum()),
        "env/return_raw": per_episode(over.reward_t.sum()),
        "env/return_shaped": per_episode(over.shaped_reward_t.sum()),
        **completed,
        **(shaping_metrics(over, spec) if shaping else {}),
        "ppo/advantage_std": float(annotation.advantage_d[valid_d].std()),
        "ppo/return_mean": float(annotation.return_d[valid_d].mean()),
        "ppo/value_mean": float(rollout.trajectory.decisions.value[:, :-1][valid_d].mean()),
    }


def shaping_metrics(annotation: Annotation, spec: TaskSpec) -> dict[str, float]:
    """Returns what shaping pays, r' - r, inside the stages, on the way into them, and at success.

    `shaping/within_<stage>` is the mean over episodes of the sum over actions that start and end in the stage,
    `shaping/into_<stage>` the mean over actions that enter it, `shaping/at_success` the mean over actions that succeed;
    0 where there is none. A successful action that enters a stage counts as both.

    Args:
        annotation: NumPy leaves `[E, ...]` of the episodes that count.
        spec: the task.
    """
    bonus_t = annotation.shaped_reward_t - annotation.reward_t
    stage_t, next_stage_t = annotation.stage_t[:, :-1], annotation.stage_t[:, 1:]
    is_change = annotation.valid_t & (stage_t != next_stage_t)
    is_within = annotation.valid_t & (stage_t == next_stage_t)

    def mean(mask):
        return float(bonus_t[mask].mean()) if mask.any() else 0.0

    num_episodes = max(len(bonus_t), 1)
    within = {
        f"shaping/within_{name}": float(bonus_t[is_within & (stage_t == k)].sum()) / num_episodes
        for k, name in enumerate(spec.stage_names)
    }
    # No action enters the first stage.
    into = {
        f"shaping/into_{name}": mean(is_change & (next_stage_t == k))
        for k, name in enumerate(spec.stage_names[1:], start=1)
    }
    return within | into | {"shaping/at_success": mean(annotation.reward_t > 0)}


def update_metrics(updates: Sequence[Mapping[str, float]], *, num_decisions: int, size: int) -> dict[str, float]:
    """Returns the means over an iteration's minibatches, the one that stopped it included, and how far it came.

    `ppo/kl_last` is the approximate KL divergence of the last minibatch; `ppo/epochs` counts the minibatches that moved
    parameters, in passes over the batch.

    Args:
        updates: metrics of each minibatch, see `steps.make_ppo_step`.
        num_decisions: of the batch.
        size: of a minibatch.
    """
    num_moves = sum(1 - update["ppo/stopped"] for update in updates)
    return {name: float(np.mean([update[name] for update in updates])) for name in updates[0]} | {
        "ppo/kl_last": float(updates[-1]["ppo/approx_kl"]),
        "ppo/epochs": float(num_moves / math.ceil(num_decisions / size)),
    }
