"""OpenVLA as a policy: rollout and update agree, batches agree with single rows, images and prompts matter."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from nano_policy import INSTRUCTIONS, jit, nano_config, random_observation, random_params, some_stats

from stare_jax.models import make_policy, openvla_7b, openvla_state, openvla_tiny, with_prompt
from stare_jax.models.bins import ZERO_BIN, decode_bins, encode_bins
from stare_jax.models.nn.linear import Execution
from stare_jax.models.normalize import normalize_action, unnormalize_action
from stare_jax.models.openvla.network import OpenVLA, preprocess


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.fixture(scope="module")
def decision(nano):
    return nano.sample(nano.params, nano.observation, jax.random.key(1), temperature=1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_rollout_log_probability_equals_the_recomputed_one(nano, temperature):
    decision = nano.sample(nano.params, nano.observation, jax.random.key(1), temperature=temperature)
    score = nano.log_prob(nano.params, nano.observation, decision.trace, temperature=temperature)
    np.testing.assert_allclose(decision.logp, score.logp, atol=1e-4)
    np.testing.assert_allclose(decision.value, score.value, atol=1e-4)
    assert (score.entropy < np.log(256)).all()


def test_other_ways_to_run_the_decoder_change_nothing(nano, monkeypatch):
    """Layers taken out of their stack, and padding moved to the end, where cuDNN's attention needs no mask for it."""
    attention = partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **kwargs: attention(*args, **kwargs)
    )
    monkeypatch.setattr(Execution, "__post_init__", lambda self: None)  # XLA's attention takes float32
    config = nano_config(unstack_layers=True, execution=Execution(attention="cudnn"))
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    key = jax.random.key(1)
    expected = nano.sample(nano.params, nano.observation, key, temperature=1.0)
    decision = jit(policy.sample)(policy.prepare(nano.params), nano.observation, key, temperature=1.0)
    np.testing.assert_array_equal(decision.trace["bins"], expected.trace["bins"])
    np.testing.assert_allclose(decision.logp, expected.logp, atol=1e-4)
    score = jit(policy.log_prob)(nano.params, nano.observation, decision.trace)
    np.testing.assert_allclose(score.logp, expected.logp, atol=1e-4)
    np.testing.assert_allclose(score.value, expected.value, atol=1e-4)


def test_attention_by_cudnn_needs_16_bits():
    with pytest.raises(ValueError, match="dtype: got 'float32', expected 'bfloat16' or 'float16' for attention"):
        Execution(attention="cudnn")
    with pytest.raises(ValueError, match="attention: got 'flash', expected one of \\('xla', 'cudnn'\\)"):
        Execution(attention="flash")


def test_temperature_zero_takes_the_most_likely_bin_each_time(nano):
    decision = nano.sample(nano.params, nano.observation, jax.random.key(1), temperature=0.0)
    again = nano.sample(nano.params, nano.observation, jax.random.key(2), temperature=0.0)
    np.testing.assert_array_equal(decision.trace["bins"], again.trace["bins"])
    best = nano.log_prob(nano.params, nano.observation, decision.trace).logp.sum(axis=1)
    # Changing the last dimension's bin can only lower the log-probability.
    for other in (0, 100, 255):
        tokens = {"bins": decision.trace["bins"].at[:, -1].set(other)}
        assert (nano.log_prob(nano.params, nano.observation, tokens).logp.sum(axis=1) <= best + 1e-6).all()


def test_greedy_and_sampling_and_all_instructions_are_one_program(nano):
    other = random_observation(nano.policy, ("stack the red cube on the green cube",) * 3)
    # Not `nano.sample`, which other tests call with batches of other sizes.
    sample = jax.jit(lambda *arguments, **more: nano.policy.sample(*arguments, **more))
    for temperature in (0.0, 0.6, 1.0):
        sample(nano.params, nano.observation, jax.random.key(0), temperature=temperature)
        sample(nano.params, other, jax.random.key(0), temperature=temperature)
    assert sample._cache_size() == 1


def test_sampling_explores_and_actions_are_the_bins_centres(nano, decision):
    other = nano.sample(nano.params, nano.observation, jax.random.key(7), temperature=1.0)
    assert (other.trace["bins"] != decision.trace["bins"]).any()
    stats = some_stats(3, 2)
    expected = unnormalize_action(np.asarray(decode_bins(decision.trace["bins"])), stats)
    np.testing.assert_allclose(decision.action, expected, atol=1e-6)
    # The masked dimension passes through unnormalised.
    np.testing.assert_allclose(decision.action[:, -1], decode_bins(decision.trace["bins"])[:, -1], atol=1e-6)


def test_a_batch_of_different_prompts_equals_one_by_one(nano, decision):
    together = nano.log_prob(nano.params, nano.observation, decision.trace)
    for i in range(len(INSTRUCTIONS)):
        alone = nano.log_prob(
            nano.params, rows(nano.observation, slice(i, i + 1)), {"bins": decision.trace["bins"][i : i + 1]}
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i : i + 1], b, atol=1e-5), together, alone)  # noqa: B023


def test_the_length_that_prompts_are_padded_to_does_not_matter(nano, decision):
    longer = make_policy(nano_config(prompt_length=200), some_stats(3, 2))
    observation = with_prompt(longer, nano.observation, INSTRUCTIONS)
    assert observation.tokens.shape == (3, 200)

    @jit
    def both(params, observation, key):
        drawn = longer.sample(params, observation, key, temperature=1.0)
        return drawn, longer.log_prob(params, observation, drawn.trace)

    got, score = both(nano.params, observation, jax.random.key(1))
    expected = nano.log_prob(nano.params, nano.observation, decision.trace)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), (got, score), (decision, expected))


def test_image_prompt_and_state_change_the_distribution_and_capitals_do_not(nano, decision):
    def logp(observation):
        return np.asarray(nano.log_prob(nano.params, observation, decision.trace).logp.sum(axis=1))

    base = logp(nano.observation)
    images = {"base_camera": 255 - nano.observation.images["base_camera"]}
    assert (np.abs(logp(nano.observation._replace(images=images)) - base) > 1e-3).all()
    assert (np.abs(logp(with_prompt(nano.policy, nano.observation, ["pull"] * 3)) - base) > 1e-3).all()
    moved = nano.observation._replace(state=-nano.observation.state)
    assert (np.abs(logp(with_prompt(nano.policy, moved, INSTRUCTIONS)) - base) > 1e-3).all()
    shouted = with_prompt(nano.policy, nano.observation, [text.upper() for text in INSTRUCTIONS])
    np.testing.assert_array_equal(logp(shouted), base)


def test_value_alone_equals_the_value_of_scoring(nano, decision):
    value = jit(nano.policy.value)(nano.params, nano.observation)
    np.testing.assert_allclose(value, decision.value, atol=1e-5)


def test_unrolling_the_decoding_loop_changes_no_number(nano, decision):
    unrolled = make_policy(nano_config(decode_unroll=8), some_stats(3, 2))
    got = jit(unrolled.sample)(nano.params, nano.observation, jax.random.key(1), temperature=1.0)
    np.testing.assert_array_equal(got.trace["bins"], decision.trace["bins"])
    np.testing.assert_allclose(got.logp, decision.logp, atol=1e-4)


def test_one_hot_imitation_is_minus_the_mean_log_probability(nano):
    policy = make_policy(nano_config(label_width=0.0), some_stats(3, 2))
    action = np.random.default_rng(0).uniform(-0.8, 0.8, (3, 3)).astype(np.float32)
    loss, metrics = jit(policy.imitation_loss)(nano.params, nano.observation, action)
    bins = encode_bins(normalize_action(action, some_stats(3, 2)))
    score = nano.log_prob(nano.params, nano.observation, {"bins": bins})
    np.testing.assert_allclose(loss, -score.logp.mean(axis=1), rtol=1e-5)
    assert set(metrics) == {"token_accuracy", "l1"}


def test_metrics_are_perfect_where_the_greedy_action_is_the_given_one(nano):
    greedy = nano.sample(nano.params, nano.observation, jax.random.key(0), temperature=0.0)
    _, (_, metrics) = nano.loss_and_grad(nano.params, nano.observation, np.asarray(greedy.action))[0]
    np.testing.assert_array_equal(metrics["token_accuracy"], 1.0)
    np.testing.assert_allclose(metrics["l1"], 0.0, atol=1e-5)


def test_loss_over_the_whole_vocabulary_is_larger_by_the_mass_outside(nano):
    action = np.random.default_rng(0).uniform(-0.8, 0.8, (3, 3)).astype(np.float32)
    policy = make_policy(nano_config(restrict_logits=False), some_stats(3, 2))
    whole, _ = jit(policy.imitation_loss)(nano.params, nano.observation, action)
    (_, (restricted, _)), _ = nano.loss_and_grad(nano.params, nano.observation, action)
    assert (whole > restricted).all()
    # With all other tokens out of reach the two agree: their logits are hidden · column, and a column can be moved far.
    blocked = jax.tree.map(np.copy, nano.params)
    outside = np.r_[0 : 896 - 256, 896:960]
    blocked["llm"]["lm_head"]["kernel"][:, outside] = 0.0
    same, _ = jit(policy.imitation_loss)(blocked, nano.observation, action)
    assert (same < whole).all()


def test_imitation_reaches_every_parameter_but_the_value_head(nano):
    action = np.random.default_rng(0).uniform(-0.8, 0.8, (3, 3)).astype(np.float32)
    _, grads = nano.loss_and_grad(nano.params, nano.observation, action)
    still = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(grads) if not np.any(g)]
    assert still and all("value_head" in name for name in still), still


@pytest.mark.parametrize("critic", ["shared", "detached", "own", "state"])
def test_the_values_gradient_enters_the_decoder_only_where_it_is_shared(nano, critic):
    policy = make_policy(nano_config(critic=critic), some_stats(3, 2))
    params = random_params(policy)
    # Forward mode, along some parameters alone: how the value moves with them.
    derivative = lambda p, d: jax.jvp(lambda q: policy.value(q, nano.observation), (p,), (d,))  # noqa: E731
    moving = {"shared": {"llm", "value_head"}, "own": {"value_head", "value_stem"}}.get(critic, {"value_head"})
    for name in {"llm", "value_head", "value_stem"} & params.keys():
        along = jax.tree.map(np.zeros_like, params) | {name: params[name]}
        value, moved = jit(derivative)(params, along)
        assert np.isfinite(value).all()
        assert np.any(moved) == (name in moving), name


def test_a_critic_may_see_a_state_that_the_policy_does_not():
    config = nano_config(critic="state", prompt_template="{instruction}")
    policy = make_policy(config, some_stats(3, 2))
    params, observation = random_params(policy), random_observation(policy, INSTRUCTIONS)
    other = with_prompt(policy, observation._replace(state=observation.state + 0.3), INSTRUCTIONS)
    bins = np.zeros((3, 3), np.int32)
    first, second = (jit(policy.log_prob)(params, seen, {"bins": bins}) for seen in (observation, other))
    np.testing.assert_array_equal(first.logp, second.logp)
    assert (np.abs(first.value - second.value) > 1e-3).all()
    same = other._replace(images=jax.tree.map(np.zeros_like, other.images))
    np.testing.assert_array_equal(jit(policy.value)(params, same), second.value)
    with pytest.raises(ValueError, match="state_dim: got 0, expected > 0 for critic = 'state'"):
        openvla_tiny(critic="state")


def test_a_critic_of_its_own_needs_a_stem():
    with pytest.raises(
        ValueError, match="critic: got 'own', expected 'shared', 'detached' or 'state' where stem is empty"
    ):
        make_policy(dataclasses.replace(openvla_7b(), critic="own"), some_stats(7, 0))


def test_actions_that_the_data_never_moves_cost_nothing(nano):
    """The second of three action dimensions is constant in one case, the last in another."""
    for constant, decided in ((1, [0, 2]), (2, [0, 1])):
        stats = some_stats(3, 2)
        stats = stats._replace(action_q99=stats.action_q99.copy())
        stats.action_q99[constant] = stats.action_q01[constant]
        policy = make_policy(nano_config(), stats)
        decision = jit(policy.sample)(nano.params, nano.observation, jax.random.key(0))
        np.testing.assert_allclose(decision.action[:, constant], stats.action_q01[constant], atol=1e-6)
        np.testing.assert_array_equal(decision.trace["bins"][:, constant], ZERO_BIN)
        assert all(len(np.unique(decision.trace["bins"][:, d])) > 1 for d in decided)
        score = jit(policy.log_prob)(nano.params, nano.observation, decision.trace)
        np.testing.assert_allclose(score.logp, decision.logp, atol=1e-4)
        # What the whole policy makes of the same tokens, less the constant one's share.
        hidden = jit(OpenVLA(nano_config()).apply)(
            {"params": nano.params},
            preprocess(nano.observation.images["base_camera"], nano_config()),
            nano.observation.tokens,
            nano.observation.token_mask,
            decision.trace["bins"],
            nano.observation.state,
        )[0]
        logp = jax.nn.log_softmax(hidden)[np.arange(3)[:, None], np.arange(3), decision.trace["bins"]]
        np.testing.assert_allclose(decision.logp, logp[:, decided], atol=1e-4)
        if constant == 1:  # OpenVLA's own program generates it before the last one: it is taught to be ZERO_BIN
            teacher = make_policy(nano_config(label_width=0.0), stats)
            loss, _ = jit(teacher.imitation_loss)(nano.params, nano.observation, decision.action)
            np.testing.assert_allclose(loss, -logp.mean(axis=1), rtol=1e-4)
    still = stats._replace(action_q99=stats.action_q01)
    with pytest.raises(ValueError, match="norm_stats: got q01 equal to q99 in all action dimensions"):
        make_policy(nano_config(), still)


def test_state_tokens_stand_where_the_patches_do():
    config = openvla_state(state_dim=2, action_dim=3)
    policy = make_policy(config, some_stats(3, 2))
    params = random_params(policy)
    observation = random_observation(policy, INSTRUCTIONS)
    assert not observation.images and not params.keys() & {"dino", "siglip", "projector", "stem"}
    score = jit(policy.log_prob)
    trace = {"bins": np.zeros((3, 3), np.int32)}
    first = score(params, observation, trace)
    # Everything the policy says depends on the state, also where it is beyond the range of the data.
    for state in (observation.state + 0.3, observation.state + 1.5):
        moved = score(params, observation._replace(state=state), trace)
        assert (np.abs(moved.logp - first.logp).sum(axis=1) > 1e-3).all() and (
            np.abs(moved.value - first.value) > 1e-3
        ).all()
        first = moved


def test_a_policy_of_one_task_needs_no_instruction():
    policy = make_policy(openvla_state(2, action_dim=3, prompt_template="", prompt_length=3), some_stats(3, 2))
    params, trace = random_params(policy), {"bins": np.zeros((3, 3), np.int32)}
    one, other = (random_observation(policy, [words] * 3) for words in INSTRUCTIONS[:2])
    np.testing.assert_array_equal(one.tokens, other.tokens)
    score = jit(policy.log_prob)
    moved = score(params, one._replace(state=one.state + 0.3), trace)
    assert (np.abs(moved.logp - score(params, one, trace).logp).sum(axis=1) > 1e-3).all()
    with pytest.raises(ValueError, match="prompt_template: got '', expected {instruction} in it"):
        openvla_tiny(prompt_template="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dim": 0}, "state_dim: got 0, expected > 0 for state_tokens = 4"),
        ({"image_size": 64}, "image_size: got 64, expected 0, as state_tokens = 4 replace the towers"),
        ({"stem": (8,)}, r"stem: got \(8,\), expected \(\), as"),
        ({"dino": openvla_tiny().dino}, "dino: got ViTConfig.*, expected None, as"),
        ({"state_tokens": 0}, "dino: got None, expected a tower, as state_tokens is 0"),
        ({"critic": "none"}, "critic: got 'none', expected one of"),
        ({"prompt_template": "go"}, "prompt_template: got 'go', expected {instruction} in it"),
    ],
)
def test_impossible_policies_of_the_state_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        openvla_state(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "image_size: got 60, expected a multiple of 16"),
        ({"action_vocab_end": 256}, "action_vocab_end: got 256, expected more than 256, at most vocab_size 896"),
        ({"action_vocab_end": 897}, "action_vocab_end: got 897"),
        ({"prompt_template": "go"}, r"prompt_template: got 'go', expected \{instruction\}"),
        ({"prompt_template": "{instruction} {state}"}, "state_dim: got 0, expected > 0"),
        ({"label_width": -1.0}, "label_width: got -1.0, expected >= 0"),
        (
            {"resize": "cubic"},
            r"resize: got 'cubic', expected one of \('bicubic', 'bicubic_float', 'lanczos3', 'area'\)",
        ),
        ({"center_crop": 0.0}, r"center_crop: got 0.0, expected in \(0, 1\]"),
        ({"action_dim": 1}, "action_dim: got 1, expected >= 2"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        openvla_tiny(**changes)


def test_towers_must_agree():
    tiny = openvla_tiny()
    with pytest.raises(ValueError, match="siglip.patch_size: got 4, expected dino's 2"):
        openvla_tiny(siglip=dataclasses.replace(tiny.siglip, patch_size=4))
    with pytest.raises(ValueError, match="expected those of dino, as the stem is shared"):
        openvla_tiny(siglip=dataclasses.replace(tiny.siglip, mean=(0.1, 0.1, 0.1)))


def test_an_observation_without_prompt_or_camera_is_refused(nano):
    blank = nano.observation._replace(tokens=np.zeros((3, 0), np.int32), token_mask=np.zeros((3, 0), bool))
    with pytest.raises(ValueError, match=r"observation.tokens: got shape \(3, 0\), expected a prompt"):
        nano.policy.value(nano.params, blank)
    with pytest.raises(ValueError, match=r"images: got the cameras \['wrist'\], expected \['base_camera'\] as well"):
        nano.policy.value(nano.params, nano.observation._replace(images={"wrist": None}))


def test_statistics_of_another_robot_are_refused():
    with pytest.raises(ValueError, match=r"norm_stats.action_q01: got shape \(4,\), expected \(3,\)"):
        make_policy(nano_config(), some_stats(4, 2))
    with pytest.raises(ValueError, match=r"norm_stats.state_q01: got shape \(1,\), expected \(2,\)"):
        make_policy(nano_config(), some_stats(3, 1))


def test_a_vocabulary_without_room_for_the_words_is_refused():
    policy = make_policy(nano_config(action_vocab_end=600), some_stats(3, 2))
    with pytest.raises(ValueError, match="action_vocab_end: got 344 ids below the actions, expected >= "):
        policy.tokenize(["push"], np.zeros((1, 2)))
