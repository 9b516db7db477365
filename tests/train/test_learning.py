"""The algorithms learn: through the loops, steps and losses that the simulator's runs use, on the toy.

Success rates are of actions sampled at temperature 1, which is what the algorithms improve.
"""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from toy_task import Writer, demo_batches, demonstrations, fresh

from stare_jax.data.pairs import make_pairs, measure_outcomes
from stare_jax.envs import toy
from stare_jax.logging import Interrupted
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.state.optimizer import OptimizerConfig
from stare_jax.train.loop import Run
from stare_jax.train.ppo import PPOConfig, train_ppo
from stare_jax.train.sft import SFTConfig, train_sft
from stare_jax.train.tpo import TPOConfig, train_tpo
from stare_jax.types import PreferencePair

NUM_ENVS = 128
SEEDS = (0, 1)
TARGET = 0.9


@pytest.fixture(scope="module")
def learner():
    return make_mlp(MLPConfig(label_width=0.5), toy.norm_stats())


# ---- Interaction ----------------------------------------------------------------------------------------------------
PPO = PPOConfig(
    shaping=False,
    num_iterations=70,
    num_episodes=128,
    num_epochs=4,
    minibatch_size=1024,
    gamma=0.95,
    optimizer=OptimizerConfig(learning_rate=2e-3, value_learning_rate=4e-3, max_grad_norm=10.0),
    checkpoint_every=1000,
)
STA_PPO = dataclasses.replace(PPO, shaping=True)
"""All that shaping has to choose is the default: of potentials, their end, the time limit and the reward."""
MAX_STEPS = 150_000
"""about twice what PPO takes here"""


def steps_to_target(learner, spec, config, run):
    """Environment steps until a batch of 128 episodes reaches the target; infinity if none does."""

    def is_there():
        return bool(run.writer.lines) and run.writer.lines[-1]["env/success"] >= TARGET

    params = jax.jit(learner.init)(jax.random.key(config.seed))
    with contextlib.suppress(Interrupted):
        train_ppo(learner, params, toy.ToyPush(NUM_ENVS), spec, config, dataclasses.replace(run, should_stop=is_there))
    assert sum(run.writer.column("perf/compilations")[1:]) == 0
    # It starts from a policy that hardly ever succeeds.
    assert run.writer.lines[0]["env/success"] <= 0.05
    return run.writer.lines[-1]["env/steps"] if is_there() else np.inf


@pytest.mark.slow
def test_ppo_learns_from_random_weights_and_stage_aware_ppo_learns_it_faster(learner, make_run):
    spec = toy.task_spec()
    plain, staged = [], []
    for seed in SEEDS:
        runs = [make_run(f"{name}_{seed}", writer=Writer()) for name in ("plain", "staged")]
        plain.append(steps_to_target(learner, spec, dataclasses.replace(PPO, seed=seed), runs[0]))
        staged.append(steps_to_target(learner, spec, dataclasses.replace(STA_PPO, seed=seed), runs[1]))
    print(f"environment steps to {TARGET}: PPO {plain}, STA-PPO {staged}")
    assert max(plain) <= MAX_STEPS and max(staged) <= MAX_STEPS
    assert sum(staged) < sum(plain)


# ---- Preference -----------------------------------------------------------------------------------------------------
SFT = SFTConfig(
    num_steps=300, batch_size=128, checkpoint_every=1000, optimizer=OptimizerConfig(1e-3, freeze=("^value",))
)
TPO = TPOConfig(
    variant="tpo",
    num_epochs=6,
    batch_size=32,
    beta=20.0,
    optimizer=OptimizerConfig(5e-4, freeze=("^value",)),
    checkpoint_every=1000,
    log_every=10,
)
STA_TPO = dataclasses.replace(
    TPO, variant="sta_tpo", num_epochs=4, beta=3.0, optimizer=dataclasses.replace(TPO.optimizer, learning_rate=1e-3)
)
NUM_STARTS, NUM_PER_START, NUM_PAIRS = 512, 4, 800


@pytest.fixture(scope="module")
def weak_policy(learner, tmp_path_factory):
    """Parameters after a brief imitation of a few demonstrations, and the seed."""
    seed = 0
    run = Run(tmp_path_factory.mktemp("sft"), toy.norm_stats())
    batches = demo_batches(*demonstrations(64, seed=seed), size=SFT.batch_size, seed=seed)
    return train_sft(learner, jax.jit(learner.init)(jax.random.key(seed)), batches, SFT, run), seed


def rollouts(learner, params, seeds, key):
    act = policy_act(learner, params, jax.random.key(key))
    return collect_episodes(toy.ToyPush(NUM_ENVS), act, seeds, stop_at_success=True)


def success_rate(learner, params):
    trajectory = rollouts(learner, params, np.arange(1024), key=99).trajectory
    return float((trajectory.signals.success & trajectory.valid).any(axis=1).mean())


def own_pairs(learner, params, spec, seed):
    """Preference pairs of the policy's own rollouts, several from each initial state."""
    seeds = 10_000 + np.repeat(np.arange(NUM_STARTS), NUM_PER_START)
    rollout = rollouts(learner, params, seeds, key=seed)
    trajectory = rollout.trajectory
    outcomes = measure_outcomes(spec, trajectory.signals, trajectory.valid, rollout.instructions, seeds.tolist())
    pairs = make_pairs(outcomes, num_pairs=NUM_PAIRS)
    chosen, rejected = (
        jax.tree.map(lambda x, rows=rows: x[rows], trajectory)
        for rows in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    return PreferencePair(chosen, rejected)


def test_preferences_between_its_own_rollouts_improve_a_weak_policy(learner, weak_policy, make_run):
    params, seed = weak_policy
    spec = toy.task_spec()
    pairs = own_pairs(learner, params, spec, seed)
    before = success_rate(learner, params)
    after = {}
    for config in (TPO, STA_TPO):
        run = make_run(config.variant)
        after[config.variant] = success_rate(learner, train_tpo(learner, fresh(params), pairs, spec, config, run))
        assert sum(run.writer.column("perf/compilations")[1:]) == 0
    print(f"seed {seed}: success {before:.3f}, after {after} with {len(pairs.chosen.valid)} pairs")
    assert 0.3 < before < 0.7
    # One standard error of a rate over 1024 episodes is 0.016.
    assert after["tpo"] > before + 0.08
    assert after["sta_tpo"] > before + 0.08
