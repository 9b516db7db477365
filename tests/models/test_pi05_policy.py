"""pi0.5 as a policy: chains and their densities, the surrogate for preferences, what is trained, what it reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_flow import INSTRUCTIONS, flow_config, random_params
from nano_policy import jit, random_observation, some_stats
from PIL import Image

from stare_jax.losses import flow
from stare_jax.models import (
    PI05_EXPERTS,
    PI05_PALIGEMMA,
    LoRAConfig,
    LoRAOverride,
    drop_adapters,
    make_policy,
    merge_adapters,
    pi05_base,
    pi05_tiny,
    with_prompt,
)
from stare_jax.models.bins import bin_state
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.normalize import from_quantiles, identity_stats, to_quantiles
from stare_jax.models.observation import without_scene
from stare_jax.models.pi05.network import Pi05, has_frozen_prefix
from stare_jax.models.pi05.presets import ACTION_EXPERT
from stare_jax.models.pi05.prompt import STATE_TEMPLATE, clean, encode_prompt, read_observation
from stare_jax.models.preprocess import resize_with_pad
from stare_jax.models.tokenizer import word_tokenizer
from stare_jax.sharding.mesh import path_name
from stare_jax.stages import TASKS, get_task
from stare_jax.state.optimizer import merge_params, split_params

STATS = some_stats(3, 2)


@functools.cache
def case(noise="sde", **changes):
    policy = make_policy(flow_config(noise=noise, **changes), STATS)
    return policy, random_params(policy), random_observation(policy, INSTRUCTIONS)


@functools.cache
def decided(noise):
    policy, params, observation = case(noise)
    return jit(policy.sample)(params, observation, jax.random.key(1), temperature=0.7)


@pytest.mark.parametrize(("noise", "num_drawn"), [("sde", 1), ("learned", 3)])
def test_a_chain_is_scored_as_it_was_drawn(noise, num_drawn):
    policy, params, observation = case(noise)
    decision = decided(noise)
    chain, is_drawn = (np.asarray(decision.trace[name]) for name in ("chain", "is_drawn"))
    assert decision.action.shape == (2, 2, 3) and chain.shape == (2, 4, 4, 4) and is_drawn.shape == (2, 3)
    assert is_drawn.dtype == bool and (is_drawn.sum(axis=1) == num_drawn).all()
    score = jit(policy.log_prob)(params, observation, decision.trace, temperature=0.7)
    np.testing.assert_allclose(score.logp, decision.logp, rtol=1e-5, atol=1e-4)
    assert score.logp.shape == (2, num_drawn)
    np.testing.assert_allclose(score.value, decision.value, atol=1e-5)
    # The end of the chain is what is executed, in raw units.
    expected = from_quantiles(chain[:, -1, :2, :3], STATS.action_q01, STATS.action_q99)
    np.testing.assert_allclose(decision.action, expected, atol=1e-6)


def test_a_density_that_is_computed_by_hand():
    """Flow-SDE, from the drift form of pi_RL's paper, with the velocities of the network itself."""
    policy, params, observation = case("sde")
    chain, is_drawn = (np.asarray(decided("sde").trace[name]) for name in ("chain", "is_drawn"))
    config = flow_config()
    prefix, velocity = by_hand(config, params, observation)
    num_steps, level = 3, config.noise_level * 0.7
    for row in range(2):
        (i,) = np.flatnonzero(is_drawn[row])
        x, after = chain[row, i], chain[row, i + 1]
        t, delta = 1 - i / num_steps, 1 / num_steps
        sigma = level * np.sqrt(t / (1 - (t if i else 1 - delta)))
        v = velocity(prefix, np.broadcast_to(x, (2, *x.shape)), t)[row]
        mean = x - delta * v - sigma**2 * delta / (2 * t) * (x + (1 - t) * v)
        z = (after - mean)[:2, :3] / (sigma * np.sqrt(delta))  # executed steps, the robot's dimensions
        expected = np.sum(-0.5 * z**2 - np.log(sigma * np.sqrt(delta)) - 0.5 * np.log(2 * np.pi))
        np.testing.assert_allclose(decided("sde").logp[row], [expected], rtol=1e-4)


def by_hand(config, params, observation):
    """The prefix, and (prefix, points [B, H, A], time) -> velocities."""
    network = Pi05(config)
    apply = jit(
        lambda params, *args, method: network.apply({"params": params}, *args, method=method), static_argnames="method"
    )
    scene, tokens, mask = read_observation(config, STATS, observation)
    _, cache, valid = apply(params, scene, None, tokens, mask, method="prefix")

    def velocity(prefix, x, t):
        time = np.full((len(x), 1), t, np.float32)
        hidden = apply(params, *prefix, x[:, None].astype(np.float32), time, method="suffix")
        return np.asarray(apply(params, hidden, method="velocity"))[:, 0]

    return (cache, valid), velocity


def test_the_length_that_prompts_are_padded_to_does_not_matter():
    policy, params, short = case("sde")
    longer = make_policy(flow_config(noise="sde", prompt_length=200), STATS)
    observation = with_prompt(longer, short, INSTRUCTIONS)
    assert short.tokens.shape == (2, 18) and observation.tokens.shape == (2, 200)

    @jit
    def both(params, observation, key):
        drawn = longer.sample(params, observation, key, temperature=0.7)
        return drawn, longer.log_prob(params, observation, drawn.trace, temperature=0.7)

    got, score = both(params, observation, jax.random.key(1))
    expected = jit(policy.log_prob)(params, short, decided("sde").trace, temperature=0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), (got, score), (decided("sde"), expected))


@pytest.mark.parametrize("noise", ["ode", "sde", "learned"])
def test_without_temperature_it_is_eulers_method(noise):
    policy, params, observation = case(noise)
    decision = jit(policy.sample)(params, observation, jax.random.key(1), temperature=0.0)
    chain = np.asarray(decision.trace["chain"])
    prefix, velocity = by_hand(flow_config(noise=noise), params, observation)
    for i in range(3):
        np.testing.assert_allclose(
            chain[:, i + 1], chain[:, i] - velocity(prefix, chain[:, i], 1 - i / 3) / 3, atol=1e-5
        )
    assert not np.asarray(decision.trace["is_drawn"]).any() and not np.asarray(decision.logp).any()


@pytest.mark.parametrize("noise", ["sde", "learned"])
def test_the_divergence_is_zero_from_itself_and_that_of_normal_distributions_from_another(noise):
    policy, params, observation = case(noise)
    trace = decided(noise).trace
    other = jax.tree.map(lambda x: 1.02 * x, params)
    log_prob, scored = jit(policy.log_prob), (params, observation, trace)
    np.testing.assert_allclose(log_prob(*scored, reference_params=params).divergence, 0, atol=1e-6)
    score, alone = log_prob(*scored, reference_params=other), log_prob(*scored)
    for found, expected in zip(score[:3], alone[:3], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    found = np.asarray(score.divergence)
    assert (found > 1e-6).all() and alone.divergence is None
    if noise == "sde":
        # delta (1 + sigma^2 (1 - t) / 2 t)^2 |v - v_ref|^2 / 2 sigma^2
        (prefix, velocity), (ref_prefix, ref_velocity) = (
            by_hand(flow_config(), p, observation) for p in (params, other)
        )
        chain, is_drawn = (np.asarray(trace[name]) for name in ("chain", "is_drawn"))
        for row in range(2):
            (i,) = np.flatnonzero(is_drawn[row])
            t, x = 1 - i / 3, np.broadcast_to(chain[row, i], (2, 4, 4))
            sigma = 0.5 * np.sqrt(t / (1 - (t if i else 2 / 3)))
            gap = (velocity(prefix, x, t) - ref_velocity(ref_prefix, x, t))[row, :2, :3]
            factor = (1 + sigma**2 * (1 - t) / (2 * t)) ** 2 / (2 * sigma**2) / 3
            np.testing.assert_allclose(found[row], factor * np.sum(gap**2), rtol=2e-3)


def test_a_frozen_prefix_is_read_once_for_policy_and_reference():
    names = [
        path_name(path)
        for path, _ in jax.tree.leaves_with_path(case("sde", frozen_patterns=(PI05_PALIGEMMA, "^stem/"))[1])
    ]
    assert has_frozen_prefix(names, (PI05_PALIGEMMA, "^stem/")) and not has_frozen_prefix(names, (PI05_PALIGEMMA,))
    policy, params, observation = case("sde", frozen_patterns=(PI05_PALIGEMMA, "^stem/"))
    whole, _, _ = case("sde")
    trace = decided("sde").trace
    other = jax.tree.map_with_path(
        lambda path, x: x if has_frozen_prefix([path_name(path)], ()) is False else 1.02 * x, params
    )
    scored = (params, observation, trace)
    found, expected = (jit(p.log_prob)(*scored, reference_params=other).divergence for p in (policy, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    towers = [
        sum(
            "SigLIP.__call__" in str(eqn.source_info.name_stack) or "embed_scene" in str(eqn.source_info.name_stack)
            for eqn in jax.make_jaxpr(p.log_prob)(*scored, reference_params=reference).eqns
        )
        for p, reference in [(policy, None), (policy, other), (whole, other)]
    ]
    assert towers[2] == 2 * towers[1] and towers[1] == towers[0] > 0


def with_and_without_a_context(fn):
    """fn(policy, params, observation, **settings of a function of the policy's), on what the context's differs from."""
    policy, params, observation = case("learned", stem=(), image_size=8, frozen_patterns=(PI05_PALIGEMMA,))
    context = jit(policy.encode)(params, observation)
    assert {len(leaf) for leaf in jax.tree.leaves(context)} == {2}
    dark = jax.tree.map(np.zeros_like, observation)._replace(state=observation.state)
    expected = jit(functools.partial(fn, policy))(params, observation)
    found = jit(functools.partial(fn, policy))(params, dark, context=context)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    return policy, params, observation, context, found


def test_with_a_context_decisions_are_those_without_and_images_and_prompt_are_not_read():
    def decide(policy, params, observation, **given):
        decision = policy.sample(params, observation, jax.random.key(1), **given)
        score = policy.log_prob(params, observation, decision.trace, **given)
        return decision, score, policy.value(params, observation, **given)

    policy, params, observation, context, _ = with_and_without_a_context(decide)
    shown = without_scene(observation)  # nothing but the state need be there, and that has to be right
    assert jax.eval_shape(policy.value, params, shown, context=context).shape == (2,)
    with pytest.raises(ValueError, match=r"observation.state: got shape \(2, 1\), expected \[B, 2\]"):
        policy.value(params, shown._replace(state=shown.state[:, :1]), context=context)


@pytest.mark.slow
def test_with_a_context_gradients_and_divergences_are_those_without():
    def learn(policy, params, observation, **given):
        moving, still = split_params(params, policy.frozen_patterns)
        reference = jax.tree.map(lambda x: 1.02 * x, params)
        rng = np.random.default_rng(0)
        trace = {"chain": rng.normal(0, 1, (2, 4, 4, 4)).astype(np.float32), "is_drawn": np.ones((2, 3), bool)}

        def total(moving):
            rows = (merge_params(moving, still), observation, trace)
            score = policy.log_prob(*rows, reference_params=reference, **given)
            return 0.1 * sum(leaf.sum() for leaf in score), score.divergence

        return jax.grad(total, has_aux=True)(moving)

    *_, (gradient, divergence) = with_and_without_a_context(learn)
    assert (divergence > 1e-3).all() and np.abs(gradient["value_head"]["out"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{}, {"frozen_patterns": (PI05_PALIGEMMA,)}, {"stem": (), "lora": LoRAConfig(rank=2, targets=PI05_EXPERTS)}],
)
def test_there_is_no_context_where_anything_before_it_is_trained(changes):
    assert case("sde", **changes)[0].encode is None


def test_preference_scores_depend_on_seeds_and_executed_actions_alone():
    policy, params, observation = case("sde")
    score = jit(policy.preference_score)
    action = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 4, 3)).astype(np.float32)
    seeds = np.uint32([[1, 2, 3], [1, 2, 3]])
    found = np.asarray(score(params, observation, action, seeds))
    assert found.shape == (2, 3, 2) and (found < 0).all()
    # Draws are each other's strangers: one at a time they come out the same.
    for k in range(3):
        np.testing.assert_allclose(
            score(params, observation, action, seeds[:, k : k + 1])[:, 0], found[:, k], rtol=1e-4
        )
    assert np.abs(found[:, 0] - found[:, 1]).min() > 1e-3
    swapped = jax.tree.map(lambda x: x[::-1], (observation, action))
    np.testing.assert_allclose(score(params, *swapped, seeds), found[::-1], rtol=1e-4)


def test_the_imitation_loss_is_the_flow_matching_error():
    policy, params, observation = case("sde")
    config, rng = flow_config(), np.random.default_rng(0)
    action = rng.uniform(-0.3, 0.3, (2, 4, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 2)
    loss, metrics = jit(policy.imitation_loss)(params, observation, action, key=keys)
    prefix, velocity = by_hand(config, params, observation)
    unit = np.pad(to_quantiles(action, STATS.action_q01, STATS.action_q99), ((0, 0), (0, 0), (0, 1)))
    for row, key in enumerate(keys):
        noise_key, time_key = jax.random.split(key)
        noise, t = jax.random.normal(noise_key, (4, 4)), float(flow.sample_times(time_key, ()))
        noisy = t * noise + (1 - t) * unit[row]
        v = velocity(prefix, np.broadcast_to(noisy, (2, 4, 4)), t)[row]
        np.testing.assert_allclose(loss[row], np.mean((v - (noise - unit[row])) ** 2), rtol=1e-4)
    valid = np.bool_([[1, 1, 0, 0], [1, 1, 1, 1]])
    repeated, _ = jit(policy.imitation_loss)(params, observation, action, valid=valid, key=keys)
    np.testing.assert_allclose(repeated, loss, rtol=1e-6)
    strict = make_policy(dataclasses.replace(config, pad_actions=False), STATS)
    cut, _ = jit(strict.imitation_loss)(params, observation, action, valid=valid, key=keys)
    other = np.where(valid[..., None], action, 9.0).astype(np.float32)
    assert abs(cut[0] - loss[0]) > 1e-3 and cut[1] == pytest.approx(float(loss[1]), rel=1e-5)
    assert np.isfinite(jit(strict.imitation_loss)(params, observation, other, valid=valid, key=keys)[0]).all()


def test_attention_of_the_prefix_by_lengths_is_that_by_masks(monkeypatch):
    """Where cuDNN attends, images and text know no mask but their number, and padding is seen by nobody."""
    monkeypatch.setattr(Execution, "__post_init__", lambda self: None)  # its stand-in on this device takes float32
    _, params, observation = case("sde")
    images, tokens, mask = read_observation(flow_config(), STATS, observation)

    def reader(attention):
        network = Pi05(flow_config(execution=Execution(attention=attention)))

        @jit
        def read(images, scene_mask=None):
            inputs = images, scene_mask, tokens, mask
            hidden, cache, valid = network.apply({"params": params}, *inputs, method="prefix")
            kept = [jnp.where(valid[..., None, None], x, 0) for x in cache]
            return [jnp.where(valid[..., None], hidden, 0), *kept]

        return read

    def assert_equal(a, b):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)

    by_lengths = reader("cudnn")
    assert_equal(by_lengths(images), reader("xla")(images))
    # An image that is missing lies before the text, which no length says.
    is_seen, others = np.array([[False, True]] * 2), (0.5 * images[0], images[1])
    assert_equal(by_lengths(images, is_seen), by_lengths(others, is_seen))


def test_a_camera_that_is_left_out_is_one_that_is_masked():
    config = flow_config()
    policy, params, observation = case("sde")
    network = Pi05(config)
    scene, tokens, mask = read_observation(config, STATS, observation)
    noisy, time = jax.random.normal(jax.random.key(0), (2, 1, 4, 4)), jnp.full((2, 1), 0.5)

    def velocity(scene, scene_mask):
        _, cache, valid = network.apply({"params": params}, scene, scene_mask, tokens, mask, method="prefix")
        hidden = network.apply({"params": params}, cache, valid, noisy, time, method="suffix")
        return network.apply({"params": params}, hidden, method="velocity")

    masked = jit(velocity)(scene, np.tile([True, False], (2, 1)))
    np.testing.assert_allclose(jit(velocity)(scene[:1], None), masked, atol=1e-5)
    assert np.abs(jit(velocity)(scene, None) - masked).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_is_the_same(remat):
    """Layers are computed again in the vision tower and in both experts."""
    _, params, observation = case("sde")
    action = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 4, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 2)

    def gradient(remat):
        policy, _, _ = case("sde", execution=Execution(remat=remat))

        def loss(params):
            return policy.imitation_loss(params, observation, action, key=keys)[0].mean()

        return jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params)).count("= remat")

    expected, num_parts = gradient("none")
    assert num_parts == 0
    found, num_parts = gradient(remat)
    assert num_parts >= 3  # the tower, the prefix, the chunk
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, expected)


# ---- What is trained ------------------------------------------------------------------------------------------------
def test_the_expert_alone_is_trained_where_paligemma_is_frozen():
    config = pi05_base(frozen_patterns=(PI05_PALIGEMMA,))
    policy = make_policy(config, identity_stats(7, 8))
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    trainable, frozen = split_params(shapes, policy.frozen_patterns)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    value_head = 2048 * 1024 + 1024 * 513 + 512 * 257 + 2 * 256
    assert count(frozen) == 414_803_696 + 2_508_531_712
    assert count(trainable) == 427_932_672 + 2_165_792 + value_head
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}


def test_adapters_of_both_experts_start_as_nothing_and_merge():
    overrides = (LoRAOverride(ACTION_EXPERT, rank=3, alpha=6.0),)
    lora = LoRAConfig(rank=2, alpha=3.0, targets=PI05_EXPERTS, overrides=overrides)
    policy, params, observation = case("learned", lora=lora)
    base, _, _ = case("learned")
    adapters = [name for name in map(path_name, dict(jax.tree.leaves_with_path(params))) if name.endswith("lora_a")]
    assert len(adapters) == 10
    fresh = jit(policy.init)(jax.random.key(0))
    trainable, frozen = split_params(fresh, policy.frozen_patterns)
    assert set(trainable) == {"PaliGemma", *(set(fresh) - {"PaliGemma"})}
    trace = decided("learned").trace
    start, plain = (
        jit(p.log_prob)(tree, observation, trace) for p, tree in ((policy, fresh), (base, drop_adapters(fresh)))
    )
    np.testing.assert_allclose(start.logp, plain.logp, rtol=1e-5)
    score, merged, without = (
        jit(p.log_prob)(tree, observation, trace).logp.sum(axis=1)
        for p, tree in ((policy, params), (base, merge_adapters(params, lora)), (base, drop_adapters(params)))
    )
    np.testing.assert_allclose(score, merged, rtol=1e-4)
    assert np.abs(score - without).min() > 1e-2


# ---- What it reads --------------------------------------------------------------------------------------------------
def test_bins_of_the_state():
    state = np.float32([-1.5, -1, 0, 0.9921, 0.9922, 2])
    np.testing.assert_array_equal(bin_state(state), [-1, 0, 128, 254, 255, 255])


def test_prompts_begin_with_their_text_and_end_with_padding():
    tokenizer = word_tokenizer()
    assert clean(" pick_up the\nCube ") == "pick up the Cube"
    tokens, mask = encode_prompt(tokenizer, "push the cube\n", length=8)
    words = tokenizer.encode("push the cube")
    np.testing.assert_array_equal(
        tokens, [1, *words, *tokenizer.encode("\n"), *[0] * (7 - len(words) - len(tokenizer.encode("\n")))]
    )
    np.testing.assert_array_equal(mask, np.arange(8) < 1 + len(words) + len(tokenizer.encode("\n")))
    with pytest.raises(ValueError, match=r"prompt_length: got 3, expected at least 4 for 'push the cube'"):
        encode_prompt(tokenizer, "push the cube", length=3)


def test_the_state_is_part_of_the_prompt_where_the_template_says_so():
    policy = make_policy(flow_config(prompt_template=STATE_TEMPLATE, prompt_length=80), STATS)
    (first, _), (second, _) = (
        (tokens[0], mask[0])
        for tokens, mask in (policy.tokenize(["push the cube"], np.float32([[0, value]])) for value in (0.2, 0.9))
    )
    assert not np.array_equal(first, second)
    expected = "Task: push the cube, State: 0 51;\nAction: "
    tokens, _ = encode_prompt(word_tokenizer(), expected, length=80)
    np.testing.assert_array_equal(first, tokens)


def test_states_below_the_data_fit_into_the_tiny_preset_s_prompt():
    config = pi05_tiny(state_dim=29)
    policy = make_policy(config, identity_stats(7, 29))
    instructions = [get_task(env_id).instruction for env_id in TASKS]
    _, mask = policy.tokenize(instructions, np.full((len(TASKS), 29), -9.0, np.float32))
    assert (mask.sum(axis=1) <= config.prompt_length).all()


def test_a_token_beyond_the_table_is_refused_when_it_comes_up():
    """PaliGemma's tokenizer has one that prompts never contain."""
    policy = make_policy(flow_config(vocab_size=300), STATS)
    with pytest.raises(ValueError, match=r"tokenizer 'words': got id \d+ in .*, expected below vocab_size 300"):
        policy.tokenize(["push the cube"], np.zeros((1, 2), np.float32))


def test_dimensions_that_the_data_never_moves_do_not_explode():
    stats = STATS._replace(action_q01=np.float32([-0.5, 0, -0.1]), action_q99=np.float32([0.2, 0, 0.9]))
    policy = make_policy(flow_config(), stats)
    _, params, observation = case("sde")
    action = np.full((2, 4, 3), 0.1, np.float32)
    loss, _ = jit(policy.imitation_loss)(params, observation, action, key=jax.random.split(jax.random.key(0), 2))
    assert (loss < 100).all()
    decision = jit(policy.sample)(params, observation, jax.random.key(0))
    np.testing.assert_allclose(decision.action[..., 1], 0, atol=1e-5)


def test_quantiles_there_and_back():
    rng = np.random.default_rng(0)
    low, high = rng.normal(size=4).astype(np.float32), rng.normal(size=4).astype(np.float32) + 5
    x = rng.normal(size=(5, 3)).astype(np.float32) * 10
    unit = to_quantiles(x, low, high)  # statistics of more dimensions
    np.testing.assert_allclose(unit, 2 * (x - low[:3]) / (high[:3] - low[:3] + 1e-6) - 1, rtol=1e-6)
    np.testing.assert_allclose(from_quantiles(unit, low, high), x, atol=1e-4)
    padded = np.concatenate([unit, np.full((5, 2), 7, np.float32)], axis=1)  # of fewer
    raw = from_quantiles(padded, low[:3], high[:3])
    np.testing.assert_allclose(raw[:, :3], x, atol=1e-4)
    np.testing.assert_array_equal(raw[:, 3:], 7)
    with pytest.raises(ValueError, match="quantiles: got 2 and 2, expected at least 3"):
        to_quantiles(x, low[:2], high[:2])


@pytest.mark.parametrize(("height", "width"), [(480, 640), (100, 37), (28, 28), (9, 20), (64, 128)])
def test_images_are_shrunk_and_padded_as_pil_does(height, width):
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3)).astype(np.uint8)
    ratio = max(height, width) / 28
    new = (int(width / ratio), int(height / ratio))
    # Rows first, as Pillow always did up to version 12; later ones begin with what is cheaper.
    resized = Image.fromarray(image[0]).resize((new[0], height), Image.BILINEAR).resize(new, Image.BILINEAR)
    expected = Image.new("RGB", (28, 28))
    expected.paste(resized, ((28 - new[0]) // 2, (28 - new[1]) // 2))
    np.testing.assert_array_equal(resize_with_pad(jnp.asarray(image), 28)[0], np.asarray(expected))


def test_what_is_missing_is_named():
    policy, params, observation = case("sde")
    with pytest.raises(ValueError, match="images: got the cameras .'base_camera'., expected .'hand_camera'. as well"):
        policy.value(params, observation._replace(images={"base_camera": observation.images["base_camera"]}))
    with pytest.raises(ValueError, match="observation.tokens: got shape .*expected a prompt"):
        policy.value(params, observation._replace(tokens=np.zeros((2, 0), np.int32)))
    with pytest.raises(ValueError, match="prompt_length: got 18"):
        with_prompt(policy, observation, ["lift the peg upright " * 5] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 5}, r"chunk: got 5, expected in \[1, 4\], the window"),
        ({"noise": "white"}, "noise: got 'white', expected one of"),
        ({"model_action_dim": 2}, "model_action_dim: got 2, expected >= 3"),
        ({"preference": "chain"}, "preference: got 'chain', expected 'flow' with noise 'sde'"),
        ({"image_size": 30}, "image_size: got 30, expected a multiple of 16"),
        ({"cameras": ()}, "siglip, cameras: got"),
        ({"noise_std": (0.2, 0.1)}, "noise_std: got"),
        ({"noise_level": 0.0}, "noise_level: got 0.0, expected > 0"),
        ({"state_dim": 0, "prompt_template": "{instruction} {state}"}, "state_dim: got 0"),
        ({"prompt_template": "go"}, "prompt_template: got 'go'"),
        ({"num_denoising_steps": 0}, "num_denoising_steps: got 0"),
        ({"expert": GemmaConfig(12, 3, 20, 2, 1, 8)}, "expert.depth: got 3, expected 2, that of paligemma"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        flow_config(**changes)
