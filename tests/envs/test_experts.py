import jax
import numpy as np
import pytest

from stare_jax.envs.experts import execution_noise, make_expert
from stare_jax.envs.panda_experts import BASE, PEG_GRIP, REACH
from stare_jax.stages import get_task, separate

# Expected: 1.00, 1.00, .995, 1.00 of the episodes within 30 steps, measured over 200; the seeds are fixed.
EPISODES = {"PushCube-v1": 8, "PullCube-v1": 5, "StackCube-v1": 3, "LiftPegUpright-v1": 3}
HORIZON = 30
SEED = 40_000


def run(simulator, expert, seed, perturb=lambda action, is_first: action):
    memory, frame = expert.init(), simulator.reset(seed)
    signals = [frame.signals]
    while len(signals) <= HORIZON and not frame.signals.success:
        action, memory = expert.act(frame.signals, memory)
        frame = simulator.step(perturb(action[None], np.zeros(1, bool))[0])
        signals.append(frame.signals)
    return signals


@pytest.mark.parametrize("env_id", EPISODES)
def test_experts_succeed_and_act_in_every_stage_in_order(env_id, simulators):
    label = jax.jit(lambda signals, valid: separate(get_task(env_id), signals, valid).stage_t)
    for seed in range(SEED, SEED + EPISODES[env_id]):
        signals = run(simulators(env_id), make_expert(env_id), seed)
        assert signals[-1].success, seed
        num_actions = len(signals) - 1
        padded = signals + [signals[-1]] * (HORIZON - num_actions)
        valid = np.arange(HORIZON + 1) <= num_actions
        stages = np.asarray(label(jax.tree.map(lambda *leaves: np.stack(leaves), *padded), valid))[:num_actions]
        assert sorted(set(stages)) == [0, 1, 2, 3], (seed, stages)
        assert (np.diff(stages) >= 0).all()


@pytest.mark.parametrize(
    ("env_id", "seed"),
    [("StackCube-v1", 150_000_000), ("StackCube-v1", 150_000_041), ("LiftPegUpright-v1", 150_000_167)],
)
def test_experts_lean_the_tool_where_it_does_not_reach_pointing_down(env_id, seed, simulators):
    signals = run(simulators(env_id), make_expert(env_id), seed)
    held_point = signals[0].obj_pos + (PEG_GRIP if env_id == "LiftPegUpright-v1" else 0, 0, 0)
    assert np.hypot(*(held_point[:2] - BASE)) > REACH
    assert signals[-1].success


def test_push_expert_recovers_from_execution_noise(simulators):
    expert = make_expert("PushCube-v1")
    perturb = execution_noise(np.random.default_rng(0), 0.15, expert.noise_range)
    successes = [run(simulators("PushCube-v1"), expert, SEED + e, perturb)[-1].success for e in range(10)]
    assert sum(successes) >= 9


def test_noise_leaves_rotation_gripper_and_clean_actions_alone():
    action = np.tile(np.linspace(-1, 1, 7, dtype=np.float32), (200, 1))
    noise_range = make_expert("PushCube-v1").noise_range
    is_first = np.zeros(200, bool)
    noisy = execution_noise(np.random.default_rng(0), 0.3, noise_range)(action, is_first)
    np.testing.assert_array_equal(noisy[:, 3:], action[:, 3:])
    assert noisy.dtype == np.float32 and np.abs(noisy[:, :3]).max() <= 1
    # Column 1 is at -0.67, 1.1 standard deviations from the clip: the interior column 2 at -0.33 has 2.2 to it.
    assert abs((noisy[:, 2] - action[:, 2]).std() - 0.3) < 0.05
    clean = execution_noise(np.random.default_rng(0), 0.0, noise_range)(action, is_first)
    np.testing.assert_array_equal(clean, action)


def test_unknown_task():
    with pytest.raises(ValueError, match="env_id: got 'Juggle-v1', expected one of"):
        make_expert("Juggle-v1")
