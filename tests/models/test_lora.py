"""Adapters inside the layers: where they are, what they compute, and that nothing else changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_policy import INSTRUCTIONS, jit, make_case, nano_config

from stare_jax.config import from_dict, to_dict
from stare_jax.models import LoRAConfig, make_policy, openvla_7b
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.lora import (
    ATTENTION,
    BASE_PATTERN,
    LoRAOverride,
    add_adapters,
    drop_adapters,
    init_adapters,
    keep_adapters,
    merge_adapters,
)
from stare_jax.models.normalize import identity_stats

LORA = LoRAConfig(rank=4, alpha=6.0)


def names(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def adapted():
    return make_case(nano_config(lora=LORA), INSTRUCTIONS)


@pytest.fixture(scope="module")
def abstract_7b():
    policy = make_policy(openvla_7b(lora=LoRAConfig()), identity_stats(7, 0))
    return names(jax.eval_shape(policy.init, jax.random.key(0)))


def test_as_many_adapters_as_the_published_recipe(abstract_7b):
    """Rank 32 on "all-linear": 110,828,288 numbers in PEFT, less those of the blocks that are never run."""
    adapters = {name: leaf for name, leaf in abstract_7b.items() if name.endswith(("lora_a", "lora_b"))}

    def count(prefix):
        return sum(leaf.size for name, leaf in adapters.items() if name.startswith(prefix))

    assert count("llm/layers/") == 79_953_920
    assert count("llm/lm_head/") == 1_157_120
    assert count("projector/") == 1_019_904
    assert count("dino/patch_embed") + count("siglip/patch_embed") == 107_264
    assert count("dino/blocks") == 12_582_912 // 24 * 23
    assert count("siglip/blocks") == 15_399_936 // 27 * 26
    assert {leaf.dtype for leaf in adapters.values()} == {jnp.dtype("float32")}
    frozen = {leaf.dtype for name, leaf in abstract_7b.items() if name not in adapters and "value_head" not in name}
    assert frozen == {jnp.dtype("bfloat16")}


def test_fresh_adapters_change_nothing(adapted):
    fresh = init_adapters(adapted.policy.init, jax.random.key(1))
    assert all(np.any(leaf) == name.endswith("lora_a") for name, leaf in names(fresh).items())
    standard = np.std(fresh["llm"]["layers"]["gate_proj"]["lora_a"])
    np.testing.assert_allclose(standard, 1 / LORA.rank, rtol=0.2)
    base = drop_adapters(adapted.params)
    trace = {"bins": np.zeros((3, 3), np.int32)}
    off = adapted.log_prob(base, adapted.observation, trace)
    on = adapted.log_prob(add_adapters(base, fresh), adapted.observation, trace)
    jax.tree.map(np.testing.assert_array_equal, on, off)
    # The base of a policy with adapters is the policy without.
    plain = make_policy(nano_config(), identity_stats(3, 2))
    assert set(names(base)) == set(names(jax.eval_shape(plain.init, jax.random.key(0))))


def test_merged_weights_compute_the_same(adapted):
    merged = merge_adapters(adapted.params, LORA)
    assert not names(keep_adapters(merged))
    trace = {"bins": np.arange(9, dtype=np.int32).reshape(3, 3)}
    beside = adapted.log_prob(adapted.params, adapted.observation, trace)
    inside = adapted.log_prob(merged, adapted.observation, trace)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), inside, beside)
    off = adapted.log_prob(drop_adapters(adapted.params), adapted.observation, trace)
    assert (np.abs((beside.logp - off.logp).sum(axis=1)) > 5e-3).all()
    # One adapter by hand: W + alpha / rank * A B.
    at = adapted.params["llm"]["layers"]["down_proj"]
    by_hand = at["kernel"] + 6.0 / 4 * np.einsum("lir,lro->lio", at["lora_a"], at["lora_b"])
    np.testing.assert_allclose(merged["llm"]["layers"]["down_proj"]["kernel"], by_hand, atol=1e-5)


def test_sampling_and_scoring_agree_with_adapters_on(adapted):
    decision = adapted.sample(adapted.params, adapted.observation, jax.random.key(0))
    score = adapted.log_prob(adapted.params, adapted.observation, decision.trace)
    np.testing.assert_allclose(score.logp, decision.logp, atol=1e-4)


def test_gradients_reach_every_adapter(adapted):
    """Also those of the output layer and of both patch embeddings."""
    action = np.random.default_rng(0).uniform(-0.8, 0.8, (3, 3)).astype(np.float32)
    _, grads = adapted.loss_and_grad(adapted.params, adapted.observation, action)
    adapters = names(keep_adapters(grads))
    assert {"llm/lm_head/lora_a", "dino/patch_embed/lora_b", "siglip/patch_embed/lora_a"} <= set(adapters)
    assert not [name for name, leaf in adapters.items() if not np.any(leaf)]


def test_targets_choose_by_path():
    policy = make_policy(nano_config(lora=dataclasses.replace(LORA, targets=ATTENTION)), identity_stats(3, 2))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    adapters = {name.rsplit("/", 1)[0] for name in names(keep_adapters(params))}
    assert adapters == {"llm/layers/q_proj", "llm/layers/v_proj"}
    assert policy.frozen_patterns == (BASE_PATTERN,)


def test_what_is_frozen_is_kept_in_the_type_it_is_computed_in():
    config = nano_config(
        execution=Execution(dtype="bfloat16", param_dtype="float32"), frozen_patterns=("^dino", "^siglip")
    )
    params = names(jax.eval_shape(make_policy(config, identity_stats(3, 2)).init, jax.random.key(0)))
    assert params["dino/blocks/fc1/kernel"].dtype == jnp.bfloat16
    assert params["llm/layers/q_proj/kernel"].dtype == jnp.float32


def test_adapters_without_a_config_are_not_passed_over(adapted, nano):
    with pytest.raises(ValueError, match="lora: got None, expected the LoRAConfig of the adapters at"):
        jit(nano.policy.log_prob)(adapted.params, nano.observation, {"bins": np.zeros((3, 3), np.int32)})


PATHS = ("llm/layers/q_proj", "llm/layers/up_proj", "siglip/blocks/fc1")
OVERRIDDEN = dataclasses.replace(
    LORA, overrides=(LoRAOverride(r"/[qv]_proj$", rank=2, alpha=8.0), LoRAOverride(r"llm/|dino/", rank=3, alpha=1.0))
)


def test_the_first_override_that_matches_gives_rank_and_scale():
    sizes = {path: (OVERRIDDEN.rank_of(path), OVERRIDDEN.scale_of(path)) for path in PATHS}
    assert sizes == {"llm/layers/q_proj": (2, 4.0), "llm/layers/up_proj": (3, 1 / 3), "siglip/blocks/fc1": (4, 1.5)}


@pytest.mark.parametrize("unstack_layers", [False, True])
def test_adapters_of_several_ranks_compute_what_their_merged_weights_do(nano, unstack_layers):
    """Sampling does so, too, where layers that are taken out of their stack have to know their path."""
    config = nano_config(lora=OVERRIDDEN, unstack_layers=unstack_layers)
    case = make_case(config, INSTRUCTIONS)
    adapters = names(keep_adapters(case.params))
    assert {path: adapters[f"{path}/lora_a"].shape[-1] for path in PATHS} == dict(zip(PATHS, (2, 3, 4), strict=True))
    merged = merge_adapters(case.params, OVERRIDDEN)
    key = jax.random.key(0)
    got = jit(case.policy.sample)(case.policy.prepare(case.params), case.observation, key, temperature=1.0)
    expected = jit(nano.policy.sample)(merged, case.observation, key, temperature=1.0)
    np.testing.assert_array_equal(got.action, expected.action)
    np.testing.assert_allclose(got.logp, expected.logp, atol=1e-4)
    plain = jit(nano.policy.sample)(drop_adapters(case.params), case.observation, key, temperature=1.0)
    assert np.abs((plain.logp - got.logp).sum(axis=1)).min() > 1e-3


def test_merging_with_another_rank_than_the_adapters_is_refused(adapted):
    with pytest.raises(ValueError, match="lora.rank: got 8 for .*, expected 4, that of its adapters"):
        merge_adapters(adapted.params, dataclasses.replace(LORA, rank=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("^llm/", "^lmm/")}, r"lora.targets: got '\^lmm/', expected a regex of one of llm/lm_head, llm/"),
        (
            {"targets": ATTENTION, "overrides": (LoRAOverride("k_proj", 1, 1.0),)},
            "lora.overrides: got 'k_proj', expected a regex of one of llm/layers/q_proj, llm/layers/v_proj",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_policy(nano_config(lora=dataclasses.replace(LORA, **changes)), identity_stats(3, 2))


def test_overrides_survive_a_configuration_file():
    assert from_dict(LoRAConfig, json.loads(json.dumps(to_dict(OVERRIDDEN)))) == OVERRIDDEN


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0)])
def test_bad_override(field, value):
    with pytest.raises(ValueError, match=f"{field}: got"):
        LoRAOverride(**{"pattern": "q_proj", "rank": 1, "alpha": 1.0, field: value})


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0), ("targets", ())])
def test_bad_config(field, value):
    with pytest.raises(ValueError, match=f"{field}: got"):
        LoRAConfig(**{field: value})
