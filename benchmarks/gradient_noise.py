"""Measures how alike the policy gradients of independent batches of episodes are, with and without shaping.

An imitation plays episodes. Two critics learn, each from a quarter of them; the other half are batches as large as an
iteration's. Of each batch there is the gradient of mean(advantage * log-probability), with the values of one critic
or the other in turn. The table shows the mean cosine between gradients of different critics, so that what they have in
common is no error of one critic, for GAE of every lambda: of the first layer, and of all that acts. The share of a step
that is of use grows with it; n batches have n c / (1 + (n - 1) c) where one has c.

    python benchmarks/gradient_noise.py --sft runs/franka_state/StackCube-v1/sft/seed_0/sft
    python benchmarks/gradient_noise.py --sft RUN/sft --temperature 0.4 --episodes 1800 --json gradient_noise.json
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ppo_carryover import CRITIC_EPOCHS, Learner, collect

from stare_jax.config import home_path
from stare_jax.rollout.collect import Rollout
from stare_jax.runs.load import LoadedPolicy, load_policy
from stare_jax.sharding.mesh import path_name
from stare_jax.types import PyTree

ARMS = {"STA-PPO": {"shaping": True}, "PPO": {"shaping": False}}
LAMBDAS = (0.0, 0.4, 0.8, 0.95)
VALUE_RATE = 3e-3
NUM_PARTS = 4
"""Parts of the episodes: one for each critic, two that are batches."""


def measure(restored: LoadedPolicy, rollout: Rollout, lambdas: Sequence[float], size: int) -> list[dict[str, Any]]:
    """Returns the rows of the table.

    Args:
        restored: the imitation and its configuration.
        rollout: E episodes of it.
        lambdas: of GAE.
        size: episodes of a batch.
    """
    parts = np.array_split(np.arange(len(rollout.trajectory.valid)), NUM_PARTS)
    batches = [rows for rows in batched(np.concatenate(parts[2:]), size) if len(rows) == size]
    rows = []
    for arm, changes in ARMS.items():
        critics = [train_critic(restored, changes, chosen(rollout, part)) for part in parts[:2]]
        for gae_lambda in lambdas:
            learner = make_learner(restored, changes, gae_lambda)
            gradients = [
                policy_gradient(learner, critics[i % 2], chosen(rollout, batch)) for i, batch in enumerate(batches)
            ]
            found = {name: mean_cosine(gradients, name) for name in (first_layer(gradients[0]), "")}
            rows.append({"arm": arm, "lambda": gae_lambda, "batches": len(batches), "cosine": found})
            cosines = "  ".join(f"{name or 'all'} {value:.3f}" for name, value in found.items())
            print(f"{arm:>8}  lambda {gae_lambda:<4}  {cosines}", flush=True)
    return rows


def batched(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def chosen(rollout: Rollout, rows: np.ndarray) -> Rollout:
    """Returns some of the episodes."""
    trajectory = jax.tree.map(lambda x: x[rows], rollout.trajectory)
    return rollout._replace(trajectory=trajectory, task=rollout.task[rows])


def make_learner(restored: LoadedPolicy, changes: dict[str, Any], gae_lambda: float) -> Learner:
    ppo = dataclasses.replace(restored.config.ppo, gae_lambda=gae_lambda, **changes)
    ppo = dataclasses.replace(ppo, optimizer=dataclasses.replace(ppo.optimizer, value_learning_rate=VALUE_RATE))
    return Learner(restored._replace(config=dataclasses.replace(restored.config, ppo=ppo)), 1e-4)


def train_critic(restored: LoadedPolicy, changes: dict[str, Any], rollout: Rollout) -> PyTree:
    """Returns the parameters with a value head that has learnt from the returns of episodes."""
    learner = make_learner(restored, changes, gae_lambda=1.0)
    state, rng = learner.start(restored.params), np.random.default_rng(0)
    for _ in range(2 * CRITIC_EPOCHS):
        state = learner.epoch(state, learner.annotated(state.params, rollout), rng, rate=1e-4, train_policy=False)
    return state.params


def policy_gradient(learner: Learner, params: PyTree, rollout: Rollout) -> dict[str, np.ndarray]:
    """Returns the gradient by parameter, without the critic's, which have none."""
    batch = learner.annotated(params, rollout)
    at = np.nonzero(batch.decisions.valid)
    observation, trace = jax.tree.map(lambda x: x[at], (batch.observation, batch.decisions.trace))

    def objective(params):
        score = learner.score(params, observation, trace)
        return jnp.mean(score.logp.sum(axis=-1) * batch.advantage[at])

    leaves = jax.tree.leaves_with_path(jax.grad(objective)(params))
    found = {path_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
    critic = learner.config.optimizer.value_params
    return {name: gradient for name, gradient in found.items() if not re.search(critic, name)}


def first_layer(gradient: dict[str, np.ndarray]) -> str:
    """Returns the name of the layer whose parameters come first by name."""
    return min(gradient).split("/")[0]


def mean_cosine(gradients: Sequence[dict[str, np.ndarray]], beginning: str) -> float:
    """Returns the mean cosine between gradients of even and of odd number, of parameters whose names begin so."""
    flat = np.stack(
        [
            np.concatenate([x.ravel() for name, x in gradient.items() if name.startswith(beginning)])
            for gradient in gradients
        ]
    )
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return float((flat[::2] @ flat[1::2].T).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", required=True, metavar="RUN/sft", help="phase of a run, whose policy plays")
    parser.add_argument("--episodes", type=int, default=1800, help="in all (default: 1800)")
    parser.add_argument("--size", type=int, default=96, help="episodes of a batch (default: 96)")
    parser.add_argument("--temperature", type=float, help="of the actions (default: the run's ppo.temperature)")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS, help="of GAE")
    parser.add_argument("--json", metavar="FILE", help="where the numbers are written, too")
    arguments = parser.parse_args()
    restored = load_policy(home_path(arguments.sft))
    if arguments.temperature is not None:
        ppo = dataclasses.replace(restored.config.ppo, temperature=arguments.temperature)
        restored = restored._replace(config=dataclasses.replace(restored.config, ppo=ppo))
    rollout = collect(restored, restored.policy, arguments.episodes, num_batches=1)[0]
    rate = rollout.trajectory.signals.success.any(axis=1).mean()
    print(f"{arguments.episodes} episodes, {rollout.num_steps:,} actions, success {100 * rate:.0f} %")
    rows = measure(restored, rollout, arguments.lambdas, arguments.size)
    if arguments.json:
        with home_path(arguments.json).open("w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
