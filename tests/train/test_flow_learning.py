"""pi0.5 learns on the toy: imitation of windows, then preference, then interaction, all with chunks of two actions.

Success rates are of actions sampled at temperature 1, which is what the algorithms improve.
"""

import jax
import numpy as np
import pytest
from flow_policy import flow_policy, prompted
from toy_task import Writer, demo_batches, demo_windows, fresh

from stare_jax.data.pairs import make_pairs, measure_outcomes
from stare_jax.envs import toy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.state.optimizer import OptimizerConfig
from stare_jax.train.loop import Run
from stare_jax.train.ppo import PPOConfig, train_ppo
from stare_jax.train.sft import SFTConfig, train_sft
from stare_jax.train.tpo import TPOConfig, train_tpo
from stare_jax.types import PreferencePair

NUM_ENVS = 128
SFT = SFTConfig(
    num_steps=240, batch_size=128, checkpoint_every=1000, optimizer=OptimizerConfig(1e-3, freeze=("^value",))
)
STA_TPO = TPOConfig(
    num_epochs=4,
    batch_size=32,
    beta=0.3,
    optimizer=OptimizerConfig(3e-4, freeze=("^value",)),
    reference_batch_size=128,
    checkpoint_every=1000,
    log_every=10,
)
STA_PPO = PPOConfig(
    num_iterations=10,
    num_episodes=128,
    num_epochs=4,
    minibatch_size=512,
    gamma=0.95,
    time_limit="bootstrap",
    value_warmup_iterations=1,
    kl_coef=0.0,
    target_kl=0.2,
    optimizer=OptimizerConfig(3e-4, value_learning_rate=4e-3),
    checkpoint_every=1000,
)


@pytest.fixture(scope="module")
def policy():
    return flow_policy()


@pytest.fixture(scope="module")
def weak(policy, tmp_path_factory):
    """Parameters after a brief imitation of a few demonstrations."""
    observation, *windows = demo_windows(64, window=policy.window)
    batches = demo_batches(prompted(policy, observation), *windows, size=SFT.batch_size)
    run = Run(tmp_path_factory.mktemp("sft"), toy.norm_stats())
    return train_sft(policy, jax.jit(policy.init)(jax.random.key(0)), batches, SFT, run)


def rollouts(policy, params, seeds, key):
    act = policy_act(policy, params, jax.random.key(key))
    return collect_episodes(toy.ToyPush(NUM_ENVS), act, seeds, stop_at_success=True)


def success_rate(policy, params):
    trajectory = rollouts(policy, params, np.arange(512), key=99).trajectory
    return float((trajectory.signals.success & trajectory.valid).any(axis=1).mean())


@pytest.mark.slow
def test_interaction_improves_a_weak_flow_policy(policy, weak, make_run):
    run = make_run("ppo", writer=Writer())
    before = success_rate(policy, weak)
    after = success_rate(policy, train_ppo(policy, fresh(weak), toy.ToyPush(NUM_ENVS), toy.task_spec(), STA_PPO, run))
    print(f"success {before:.3f} -> {after:.3f} in {run.writer.lines[-1]['env/steps']} steps")
    assert 0.4 < before < 0.75 and after > before + 0.2
    assert sum(run.writer.column("perf/compilations")[1:]) == 0
    # Chunks of two: about half as many decisions as actions, and every one of them is scored as it was drawn.
    divergence = run.writer.column("ppo/reference_kl")
    assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[-1] > 0.01
    assert run.writer.column("ppo/approx_kl")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_preferences_between_its_own_rollouts_improve_a_weak_flow_policy(policy, weak, make_run):
    spec, seeds = toy.task_spec(), 10_000 + np.repeat(np.arange(256), 4)
    rollout = rollouts(policy, weak, seeds, key=0)
    trajectory = rollout.trajectory
    outcomes = measure_outcomes(spec, trajectory.signals, trajectory.valid, rollout.instructions, seeds.tolist())
    pairs = make_pairs(outcomes, num_pairs=400)
    chosen, rejected = (
        jax.tree.map(lambda x, rows=rows: x[rows], trajectory)
        for rows in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    run = make_run("tpo", writer=Writer())
    before = success_rate(policy, weak)
    params = train_tpo(policy, fresh(weak), PreferencePair(chosen, rejected), spec, STA_TPO, run)
    after = success_rate(policy, params)
    print(f"success {before:.3f} -> {after:.3f} with {len(pairs)} pairs")
    # One standard error of a rate over 512 episodes is 0.02.
    assert after > before + 0.06
    assert sum(run.writer.column("perf/compilations")[1:]) == 0
