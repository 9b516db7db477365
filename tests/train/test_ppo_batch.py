"""Episodes to rewards and advantages, by hand and by the properties of shaping."""

import functools

import jax
import numpy as np
import pytest
from stage_signals import FAMILY_TASKS, random_signals, with_params
from toy_task import expert_episodes, random_pairs

from stare_jax.stages import TASKS, action_stages, get_task, potentials, separate
from stare_jax.targets import episode_targets
from stare_jax.train.ppo import PPOConfig

targets_of = jax.jit(
    episode_targets,
    static_argnames=(
        "spec",
        "shaping",
        "gamma",
        "gae_lambda",
        "time_limit",
        "terminal_potential",
        "reward",
        "stop_at_success",
        "chunk",
        "chunk_discount",
    ),
)
PLAIN = {"shaping": False, "gamma": 0.5, "gae_lambda": 1.0, "time_limit": "bootstrap", "terminal_potential": "zero"}


@pytest.fixture(scope="module")
def episodes(policy, params):
    """Signals and validity of 8 episodes of a random policy, which fails, and 4 of the expert, which does not."""
    parts = (random_pairs(policy, params, 8).chosen, expert_episodes(4))
    return jax.tree.map(lambda *x: np.concatenate(x), *[(part.signals, part.valid) for part in parts])


def hand_made(signals, *, num_states, success_at):
    """The first states of an episode with the success that is wanted, padded to four states."""
    first = jax.tree.map(lambda x: x[0, :4], signals)
    return first._replace(success=np.arange(4) == success_at), np.arange(4) < num_states


def test_success_ends_an_episode_for_good(episodes, spec):
    signals, valid = hand_made(episodes[0], num_states=3, success_at=2)
    got = targets_of(signals, valid, np.float32([0.1, 0.2, 9.0, 9.0]), spec=spec, **PLAIN)
    np.testing.assert_array_equal(got.valid_t, [True, True, False])
    np.testing.assert_array_equal(got.reward_t, [0, 1, 0])
    # A_1 = 1 - 0.2; A_0 = (0 + 0.5 * 0.2 - 0.1) + 0.5 * A_1; the value of the last state does not count.
    np.testing.assert_allclose(got.advantage_d, [0.4, 0.8, 0.0], atol=1e-6)
    np.testing.assert_allclose(got.return_d, [0.5, 1.0, 0.0], atol=1e-6)
    assert got.completed.all()


@pytest.mark.parametrize(
    ("time_limit", "expected"),
    [
        # delta = [0.5 * 0.2 - 0.1, 0.5 * 0.3 - 0.2, 0.5 * 0.4 - 0.3] = [0, -0.05, -0.1]
        ("bootstrap", [-0.05, -0.1, -0.1]),
        # the last delta is -0.3
        ("terminate", [-0.1, -0.2, -0.3]),
    ],
)
def test_the_time_limit_bootstraps_or_terminates(episodes, spec, time_limit, expected):
    signals, valid = hand_made(episodes[0], num_states=4, success_at=None)
    value = np.float32([0.1, 0.2, 0.3, 0.4])
    got = targets_of(signals, valid, value, spec=spec, **(PLAIN | {"time_limit": time_limit}))
    np.testing.assert_allclose(got.advantage_d, expected, atol=1e-6)


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminate"])
def test_an_episode_that_was_cut_short_is_bootstrapped_whatever_the_time_limit(episodes, spec, time_limit):
    signals, valid = hand_made(episodes[0], num_states=3, success_at=None)
    value = np.float32([0.1, 0.2, 0.3, 9.0])
    options = PLAIN | {"time_limit": time_limit}
    got = targets_of(signals, valid, value, spec=spec, **options)
    # delta = [0.5 * 0.2 - 0.1, 0.5 * 0.3 - 0.2]
    np.testing.assert_allclose(got.advantage_d, [-0.025, -0.05, 0], atol=1e-6)
    got = targets_of(signals, valid, value, spec=spec, **(options | {"shaping": True}))
    potential = jax.jit(lambda s, v: potentials(spec, s, separate(spec, s, v)))(signals, valid)
    np.testing.assert_allclose(got.shaped_reward_t[1], 0.5 * potential[2] - potential[1], atol=1e-6)


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminate"])
def test_shaping_telescopes(episodes, spec, time_limit):
    gamma = 0.9
    options = PLAIN | {"shaping": True, "gamma": gamma, "time_limit": time_limit}
    signals, valid = episodes
    value = np.zeros(valid.shape, np.float32)
    got = jax.vmap(functools.partial(targets_of, spec=spec, **options))(signals, valid, value)
    potential = jax.jit(jax.vmap(lambda s, v: potentials(spec, s, separate(spec, s, v))))(signals, valid)
    assert got.reward_t.any() and not got.reward_t.any(axis=1).all()
    for e, length in enumerate(valid.sum(axis=1) - 1):
        weight = gamma ** np.arange(length)
        is_kept = time_limit == "bootstrap" and not got.reward_t[e].any()
        expected = weight @ got.reward_t[e, :length] - potential[e, 0]
        expected += gamma**length * potential[e, length] * is_kept
        # With lambda 1 and values 0 the first advantage is the discounted sum of shaped rewards.
        np.testing.assert_allclose(got.advantage_d[e, 0], expected, atol=1e-4)
        np.testing.assert_allclose(weight @ got.shaped_reward_t[e, :length], expected, atol=1e-4)


def test_what_is_not_valid_does_not_count(episodes, spec):
    options = PLAIN | {"shaping": True, "gae_lambda": 0.9}
    signals, valid = jax.tree.map(lambda x: x[0, :12], episodes)
    assert valid.all()
    value = np.linspace(0, 1, 12, dtype=np.float32)

    def pad(x):
        return np.concatenate([x, np.full((5, *x.shape[1:]), 1 if x.dtype == bool else 77, x.dtype)])

    padded_valid = np.concatenate([valid, np.zeros(5, bool)])
    got = targets_of(signals, valid, value, spec=spec, **options)
    padded = targets_of(jax.tree.map(pad, signals), padded_valid, pad(value), spec=spec, **options)
    for a, b in zip(got[:6], padded[:6], strict=True):
        np.testing.assert_allclose(b[:11], a, atol=1e-6)
        assert not b[11:].any()
    stages_of = jax.jit(action_stages, static_argnames="spec")
    stages = stages_of(signals, valid, spec=spec)
    padded_stages = stages_of(jax.tree.map(pad, signals), padded_valid, spec=spec)
    np.testing.assert_allclose(padded_stages.cost, stages.cost, atol=1e-6)
    np.testing.assert_array_equal(padded_stages.mask[:, :11], stages.mask)
    assert not padded_stages.mask[:, 11:].any()


@pytest.mark.parametrize("chunk_discount", ["step", "decision"])
@pytest.mark.parametrize("time_limit", ["bootstrap", "terminate"])
@pytest.mark.parametrize("chunk", [2, 3, 7, 40])
def test_shaping_telescopes_at_the_ends_of_chunks(episodes, spec, chunk, time_limit, chunk_discount):
    """`sum_k d_0 .. d_{k-1} F_k = -Phi(s_0)`, plus what is left at a time limit; short last chunks included."""
    signals, valid = episodes
    options = PLAIN | {"gamma": 0.9, "time_limit": time_limit, "chunk": chunk, "chunk_discount": chunk_discount}
    for e in (0, 9):  # a failure, which runs to the horizon, and a success, which ends within a chunk
        one = jax.tree.map(lambda x, e=e: x[e], (signals, valid))
        zero = np.zeros(-(-(len(one[1]) - 1) // chunk) + 1, np.float32)
        # With a critic of zero and lambda 1 the first return is the sum of all that decisions earn.
        shaped, plain = (targets_of(*one, zero, spec=spec, **(options | {"shaping": on})) for on in (True, False))
        potential = jax.jit(lambda s, v: potentials(spec, s, separate(spec, s, v)))(*one)
        length = int(one[1].sum()) - 1
        is_open = plain.reward_t.sum() == 0 and time_limit == "bootstrap"
        num_decisions = -(-length // chunk)
        discount = 0.9 ** (num_decisions if chunk_discount == "decision" else length) if is_open else 0.0
        gap = shaped.return_d[0] - plain.return_d[0]
        np.testing.assert_allclose(gap, discount * potential[length] - potential[0], atol=1e-5)
        assert plain.valid_d.sum() == num_decisions and not plain.advantage_d[~plain.valid_d].any()
        assert plain.advantage_d.shape == plain.return_d.shape == (len(zero) - 1,)


def test_decisions_earn_what_their_actions_do(episodes, spec):
    """Five actions in chunks of two, success at the fifth: by hand."""
    first = jax.tree.map(lambda x: x[0, :6], episodes[0])
    signals, valid = first._replace(success=np.arange(6) == 5), np.ones(6, bool)
    value = np.float32([0.1, 0.2, 0.4, 9.0])  # 9 after the success, which nothing follows
    got = targets_of(signals, valid, value, spec=spec, **(PLAIN | {"chunk": 2}))
    # From the last: A = 1 - 0.4; A = 0.25 * 0.4 - 0.2 + 0.25 * 0.6; A = 0.25 * 0.2 - 0.1 + 0.25 * 0.05
    np.testing.assert_allclose(got.advantage_d, [-0.0375, 0.05, 0.6], atol=1e-6)
    np.testing.assert_allclose(got.return_d, [0.0625, 0.25, 1.0], atol=1e-6)
    got = targets_of(signals, valid, value, spec=spec, **(PLAIN | {"chunk": 2, "chunk_discount": "decision"}))
    # A = 0.6; A = 0.5 * 0.4 - 0.2 + 0.5 * 0.6; A = 0.5 * 0.2 - 0.1 + 0.5 * 0.3
    np.testing.assert_allclose(got.advantage_d, [0.15, 0.3, 0.6], atol=1e-6)


# ---- Episodes that go on after success -------------------------------------------------------------------------------
def test_an_episode_that_goes_on_after_success_is_rewarded_once_and_discounted_throughout(episodes, spec):
    signals, valid = hand_made(episodes[0], num_states=4, success_at=1)
    signals = signals._replace(success=np.array([False, True, False, True]))
    value, options = np.float32([0.1, 0.2, 0.3, 0.4]), PLAIN | {"stop_at_success": False}
    got = targets_of(signals, valid, value, spec=spec, **options)
    np.testing.assert_array_equal(got.reward_t, [1, 0, 0])
    # delta = [1 + 0.5 * 0.2 - 0.1, 0.5 * 0.3 - 0.2, 0.5 * 0.4 - 0.3] = [1, -0.05, -0.1]
    np.testing.assert_allclose(got.advantage_d, [0.95, -0.1, -0.1], atol=1e-6)
    np.testing.assert_array_equal(got.success_t, [True, False, False])
    assert got.is_over
    # At a horizon that ends everything the last delta is -0.3.
    got = targets_of(signals, valid, value, spec=spec, **(options | {"time_limit": "terminate"}))
    np.testing.assert_allclose(got.advantage_d, [0.9, -0.2, -0.3], atol=1e-6)
    # An episode that ends at success stops the sum there.
    got = targets_of(signals, np.arange(4) < 2, value, spec=spec, **PLAIN)
    np.testing.assert_allclose(got.advantage_d, [0.9, 0, 0], atol=1e-6)
    assert got.is_over


def test_an_episode_that_is_cut_short_is_not_over(episodes, spec):
    signals, _ = hand_made(episodes[0], num_states=4, success_at=1)
    cases = ((2, True, True), (2, False, False), (3, False, False), (4, False, True))
    for num_states, stop_at_success, expected in cases:
        options = PLAIN | {"stop_at_success": stop_at_success}
        got = targets_of(signals, np.arange(4) < num_states, np.zeros(4, np.float32), spec=spec, **options)
        assert bool(got.is_over) == expected


def test_the_reward_is_the_one_that_is_asked_for(episodes, spec):
    """RL4VLA pays .1 for the grasp and 1 for success in the hand; the dense reward is the distance that remains."""
    signals, valid = hand_made(episodes[0], num_states=4, success_at=3)
    signals = signals._replace(is_grasped=np.array([False, True, True, True]))
    value = np.zeros(4, np.float32)
    got = targets_of(signals, valid, value, spec=get_task("StackCube-v1"), **(PLAIN | {"reward": "rl4vla"}))
    np.testing.assert_allclose(got.reward_t, [0.1, 0, 1.0], atol=1e-6)
    np.testing.assert_array_equal(got.success_t, [False, False, True])
    got = targets_of(signals, valid, value, spec=spec, **(PLAIN | {"reward": "dense"}))
    assert (np.asarray(got.reward_t) < 0).all() and got.success_t[2]
    with pytest.raises(ValueError, match="reward: got 'rl4vla', expected another one for ToyPush-v0"):
        targets_of(signals, valid, value, spec=spec, **(PLAIN | {"reward": "rl4vla"}))


# ---- What shaping can do: identities ---------------------------------------------------------------------------------
HORIZON = 30


def random_episode(seed):
    """Signals, validity and values of a random episode: every other one ends in success, the rest at the horizon."""
    rng = np.random.default_rng(seed)
    num_states = HORIZON + 1 if seed % 2 == 0 else int(rng.integers(5, HORIZON + 1))
    signals = random_signals(seed, HORIZON + 1)
    success = (np.arange(HORIZON + 1) == num_states - 1) & (seed % 2 == 1)
    value = rng.normal(size=HORIZON + 1).astype(np.float32)
    return signals._replace(success=success), np.arange(HORIZON + 1) < num_states, value


@pytest.mark.parametrize(("time_limit", "chunk"), [("bootstrap", 1), ("terminate", 1), ("terminate", 4)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_a_potential_that_ends_at_zero_is_ppo_with_another_critic(env_id, progressive, time_limit, chunk):
    """A of r' with the critic V' is A of r with the critic V' + Phi, and the returns differ by Phi."""
    spec = with_params(get_task(env_id), progressive=progressive)
    options = {"gamma": 0.99, "gae_lambda": 0.95, "time_limit": time_limit, "terminal_potential": "zero"}
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(random_episode(seed) for seed in range(12)))
    signals, valid, value = batch
    # The critic is asked in the states of decisions, and in the last state.
    first = np.arange(-(-HORIZON // chunk) + 1) * chunk
    value = value[:, : len(first)]
    phi = jax.jit(jax.vmap(lambda s, v: potentials(spec, s, separate(spec, s, v))))(signals, valid)
    phi = np.take_along_axis(np.asarray(phi), np.minimum(first, valid.sum(axis=1, keepdims=True) - 1), axis=1)
    of = functools.partial(targets_of, spec=spec, chunk=chunk, **options)
    shaped = jax.vmap(functools.partial(of, shaping=True))(signals, valid, value)
    plain = jax.vmap(functools.partial(of, shaping=False))(signals, valid, value + phi)
    np.testing.assert_allclose(shaped.advantage_d, plain.advantage_d, atol=5e-6)
    difference = np.where(shaped.valid_d, plain.return_d - shaped.return_d, phi[:, :-1])
    np.testing.assert_allclose(difference, phi[:, :-1], atol=5e-6)
    assert np.abs(shaped.shaped_reward_t - plain.shaped_reward_t).max() > 0.1  # the rewards themselves differ


@pytest.mark.parametrize("terminal_potential", ["zero", "keep"])
@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_with_a_potential_of_zero_sta_ppo_is_ppo(env_id, terminal_potential):
    spec = with_params(get_task(env_id), enabled=(False,) * 4)
    options = {"gamma": 0.97, "gae_lambda": 0.9, "time_limit": "terminate", "terminal_potential": terminal_potential}
    for seed in range(4):
        shaped, plain = (
            targets_of(*random_episode(seed), spec=spec, shaping=shaping, **options) for shaping in (True, False)
        )
        jax.tree.map(np.testing.assert_array_equal, shaped, plain)


@pytest.mark.parametrize("env_id", FAMILY_TASKS)
def test_with_the_defaults_success_is_best_and_failures_are_graded_by_how_far_they_came(env_id):
    """The discounted sum of r' is that of r plus gamma^N Phi_N less Phi_0, also where the episode ends for good."""
    spec, gamma = get_task(env_id), 0.99
    config = PPOConfig()
    options = {"gamma": gamma, "gae_lambda": 1.0, "shaping": config.shaping}
    options |= {"time_limit": config.time_limit, "terminal_potential": config.terminal_potential}
    for seed in range(6):
        signals, valid, _ = random_episode(seed)
        got = targets_of(signals, valid, np.zeros(HORIZON + 1, np.float32), spec=spec, **options)
        phi = jax.jit(lambda s, v: potentials(spec, s, separate(spec, s, v)))(signals, valid)
        last = int(valid.sum()) - 1
        expected = gamma ** (last - 1) * (seed % 2) + gamma**last * phi[last] - phi[0]
        np.testing.assert_allclose(got.return_d[0], expected, atol=1e-5)


def test_the_defaults_are_those_that_theory_and_measurement_ask_for():
    config = PPOConfig()
    assert (config.reward, config.stop_at_success) == ("success", True)
    assert (config.time_limit, config.terminal_potential) == ("terminate", "keep")
    assert all(get_task(env_id).params.progressive for env_id in TASKS)


def test_shaping_that_ends_at_zero_where_the_time_limit_does_not_is_refused():
    refused = {"terminal_potential": "zero", "time_limit": "bootstrap"}
    with pytest.raises(ValueError, match="shaping, terminal_potential, time_limit: got True, 'zero', 'bootstrap'"):
        PPOConfig(**refused)
    PPOConfig(**refused, shaping=False)
    for field, value in (("terminal_potential", "keep"), ("time_limit", "terminate")):
        PPOConfig(**(refused | {field: value}))
