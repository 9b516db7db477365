"""Measures how much of a PPO update carries over to unseen episodes, by the gain of the surrogate.

The policy of an imitation plays three batches of episodes. A critic learns from the first two, Adam's moments come from
the first; then PPO updates the policy on the second alone, at several learning rates, each from the same start. The
gain is that of ratio times advantage of an action, in standard deviations of the advantage: `trained` on the decisions
of the update, `unseen` on those of the third batch, with its standard error. The second is the value of the update.

    python benchmarks/ppo_carryover.py --sft runs/study_pushcube_state_sta_ppo_zero/sft
    python benchmarks/ppo_carryover.py --sft runs/study_pushcube_images_sta_ppo_zero/sft --rates 1e-5 1e-4 --epochs 1 4
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator

import jax
import numpy as np

from stare_jax.config import home_path
from stare_jax.envs import make_vec_env
from stare_jax.envs.seeds import PPO_SEEDS
from stare_jax.models import Policy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import Rollout, collect_episodes
from stare_jax.runs.load import LoadedPolicy, load_policy
from stare_jax.state.optimizer import frozen_params, make_optimizer, split_params
from stare_jax.state.train_state import TrainState
from stare_jax.train.ppo import PPOConfig, make_ppo_step, make_prepare
from stare_jax.train.ppo_batch import PPOBatch, minibatches
from stare_jax.types import PyTree

CRITIC_EPOCHS, MOMENT_EPOCHS = 4, 4
SIZE = 512
"""decisions of a minibatch."""


class Learner:
    """A policy, and one compiled PPO step whose learning rate is scaled by its schedule."""

    def __init__(self, restored: LoadedPolicy, peak: float):
        self.policy, self.peak = restored.policy, peak
        stages = dataclasses.replace(restored.config.stages, progressive=True)
        self.spec = dataclasses.replace(restored.config.env.spec, params=stages)
        ppo = restored.config.ppo
        optimizer = dataclasses.replace(ppo.optimizer, learning_rate=peak, schedule="linear", warmup_steps=0)
        self.config: PPOConfig = dataclasses.replace(ppo, optimizer=optimizer, target_kl=None, minibatch_size=SIZE)
        self.tx = make_optimizer(optimizer, num_steps=None)
        self.step = jax.jit(make_ppo_step(self.policy, self.tx, self.config))
        self.score = jax.jit(functools.partial(self.policy.log_prob, temperature=ppo.temperature))
        self.prepare = make_prepare(self.spec, self.config)

    def start(self, params: PyTree) -> TrainState:
        trainable, frozen = split_params(params, frozen_params(self.policy, self.config.optimizer))
        return TrainState(np.int32(0), trainable, frozen, self.tx.init(trainable))

    def epoch(self, state: TrainState, batch: PPOBatch, rng, *, rate: float, train_policy: bool = True) -> TrainState:
        for minibatch in minibatches(batch, size=SIZE, rng=rng):
            state, _ = self.step(state, minibatch, np.bool_(train_policy), np.float32(1 - rate / self.peak))
        return state

    def scores(self, params: PyTree, rollout: Rollout, where: np.ndarray) -> Iterator[tuple[tuple, np.ndarray]]:
        """Yields indices of states where `where` `[E, N + 1]`, and the float32 log-probabilities and values there."""
        trajectory, (episode, t) = rollout.trajectory, np.nonzero(where)
        bins = trajectory.decisions.trace["bins"]
        for first in range(0, len(episode), SIZE):
            rows = np.arange(first, first + SIZE) % len(episode)
            at = (episode[rows], t[rows])
            trace = {"bins": bins[at[0], np.minimum(at[1], bins.shape[1] - 1)]}
            score = self.score(params, jax.tree.map(lambda x, at=at: x[at], trajectory.observation), trace)
            number = min(SIZE, len(episode) - first)
            yield (at[0][:number], at[1][:number]), np.stack([score.logp.sum(axis=1), score.value])[:, :number]

    def annotated(self, params: PyTree, rollout: Rollout) -> PPOBatch:
        """Returns the batch with the values that the critic has for it now."""
        value = np.zeros(rollout.trajectory.valid.shape, np.float32)
        for at, (_, values) in self.scores(params, rollout, rollout.trajectory.valid):
            value[at] = values
        decisions = rollout.trajectory.decisions._replace(value=value)
        return self.prepare(rollout._replace(trajectory=rollout.trajectory._replace(decisions=decisions)))

    def gain(self, params: PyTree, rollout: Rollout, batch: PPOBatch) -> dict[str, float]:
        """Returns how much the surrogate has gained, its standard error, and the KL divergence (k3)."""
        where = np.pad(batch.targets.valid_t, [(0, 0), (0, 1)])
        gains, divergences, episodes = [], [], []
        for at, (logp, _) in self.scores(params, rollout, where):
            log_ratio, advantage = logp - batch.decisions.logp[at].sum(axis=1), batch.advantage[at]
            # Not clipped: min(.., clip(..)) takes away gains and keeps losses, so it falls for a step in any direction.
            gains.append(np.expm1(log_ratio) * advantage)
            divergences.append(np.expm1(log_ratio) - log_ratio)
            episodes.append(at[0])
        gains, divergences, episodes = (np.concatenate(parts) for parts in (gains, divergences, episodes))
        # Decisions of one episode share its luck: the error is that of independent episodes.
        residuals = np.bincount(episodes, gains - gains.mean())
        error = math.sqrt(np.sum(residuals**2)) / len(gains)
        return {"gain": float(gains.mean()), "error": error, "kl": float(divergences.mean())}


def collect(restored: LoadedPolicy, policy: Policy, episodes: int, num_batches: int = 3) -> list[Rollout]:
    """Returns batches of episodes of the imitation, sampled at the run's temperature."""
    act = policy_act(policy, restored.params, jax.random.key(0), temperature=restored.config.ppo.temperature)
    with contextlib.closing(make_vec_env(restored.config.env)) as env:
        batches = np.split(PPO_SEEDS + np.arange(num_batches * episodes), num_batches)
        return [collect_episodes(env, act, seeds, stop_at_success=True, in_turns=True) for seeds in batches]


def measure(restored: LoadedPolicy, episodes: int, rates: list[float], epochs: list[int]) -> list[dict]:
    learner = Learner(restored, max(rates))
    before, trained, unseen = collect(restored, learner.policy, episodes)
    state, rng = learner.start(restored.params), np.random.default_rng(0)
    for rollout in (before, trained) * CRITIC_EPOCHS:
        batch = learner.annotated(state.params, rollout)
        state = learner.epoch(state, batch, rng, rate=max(rates), train_policy=False)
    params = state.params
    earlier = learner.annotated(params, before)
    batches = [learner.annotated(params, rollout) for rollout in (trained, unseen)]
    for name, batch in zip(("trained", "unseen"), batches, strict=True):
        number = int(batch.targets.valid_t.sum())
        print(f"{name}: {number} decisions, explained variance {batch.explained_variance:.2f}")
    print(f"{'rate':>10}{'epochs':>8}{'KL':>10}{'trained':>10}{'unseen':>10}")
    rows = []
    for rate in rates:
        start, rng = learner.start(params), np.random.default_rng(1)
        state = start
        # Adam's first steps are of full length in every direction, whatever the gradient. Its moments come from an
        # update on other decisions, as in an iteration that is not the first; where that has led is forgotten.
        for _ in range(MOMENT_EPOCHS):
            state = learner.epoch(state, earlier, rng, rate=rate)
        state = dataclasses.replace(state, trainable=start.trainable)
        for epoch in range(1, max(epochs) + 1):
            state = learner.epoch(state, batches[0], rng, rate=rate)
            if epoch in epochs:
                pairs = zip(("trained", "unseen"), (trained, unseen), batches, strict=True)
                gains = {name: learner.gain(state.params, rollout, batch) for name, rollout, batch in pairs}
                rows.append({"learning_rate": rate, "epochs": epoch} | gains)
                print_row(rows[-1])
    return rows


def print_row(row: dict) -> None:
    trained, unseen = row["trained"], row["unseen"]
    start = f"{row['learning_rate']:>10.0e}{row['epochs']:>8}{unseen['kl']:>10.4f}{trained['gain']:>+10.4f}"
    print(f"{start}{unseen['gain']:>+10.4f} ± {unseen['error']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=home_path, required=True, metavar="FOLDER", help="the imitation's phase of a run")
    parser.add_argument("--episodes", type=int, default=192, help="of each batch (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-4, 3e-5], metavar="RATE")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    rows = measure(load_policy(args.sft), args.episodes, args.rates, args.epochs)
    if args.json:
        rates, epochs = (" ".join(map(str, values)) for values in (args.rates, args.epochs))
        command = f"python benchmarks/ppo_carryover.py --sft {args.sft} --episodes {args.episodes}"
        command += f" --rates {rates} --epochs {epochs}"
        machine = {"cores": os.cpu_count(), "jax": jax.__version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": command, "machine": machine, "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
