"""Mistakes of ports of OpenVLA, and the test that each has here; those of no other file are in this one.

`TRAPS` says where; a name in it that is no test's fails.
"""

import ast
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_policy import jit, nano_config

from stare_jax.losses import gae, ppo_loss
from stare_jax.models import LoRAConfig
from stare_jax.models.bins import decode_bins, encode_bins
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import Llama, LlamaConfig
from stare_jax.models.nn.lora import merge_adapters
from stare_jax.models.nn.vit import ViT, ViTBlock, ViTConfig, patchify
from stare_jax.models.openvla.network import OpenVLA, preprocess
from stare_jax.weights.openvla.config import TIMM_IDS, read_config

TESTS = Path(__file__).resolve().parents[1]
HERE = "models/test_openvla_traps.py"
NETWORK, GENERATION = "models/test_models_openvla.py", "models/test_openvla_generation.py"
TRAPS = {
    # The network.
    "the second-to-last block of the towers, without the final norm": [
        (HERE, "test_towers_end_before_the_last_block_and_have_no_final_norm"),
        ("weights/test_openvla_golden.py", "test_features_and_logits"),
    ],
    "exact GELU in both towers, SigLIP's too": [("models/test_models_layers.py", "test_vit_block_in_numpy")],
    "eps 1e-6 in Llama, though Llama 2 has 1e-5": [
        (HERE, "test_the_eps_of_llama_is_that_of_the_checkpoint"),
        ("models/test_models_layers.py", "test_rms_norm_reduces_in_float32"),
    ],
    "patches after BOS": [(HERE, "test_patches_come_right_after_bos")],
    "another image gives other logits": [
        (NETWORK, "test_image_prompt_and_state_change_the_distribution_and_capitals_do_not"),
        ("weights/test_openvla_golden.py", "test_another_image_gives_other_logits"),
    ],
    "lm_head and both patch convolutions have adapters": [
        ("models/test_lora.py", "test_as_many_adapters_as_the_published_recipe"),
        ("models/test_lora.py", "test_gradients_reach_every_adapter"),
    ],
    "alpha differs from project to project": [
        (HERE, "test_the_adapters_scale_is_alpha_over_rank_of_each_project"),
        ("models/test_lora.py", "test_merged_weights_compute_the_same"),
    ],
    # Images and prompts.
    "four resizers in circulation": [("models/test_preprocess.py", "test_numbers_are_those_of_the_library")],
    "DINO's statistics are rounded in the published processor": [
        ("weights/test_preprocessor.py", "test_the_statistics_are_those_that_the_processor_uses"),
    ],
    "id 29871 before the first action, once": [
        ("models/test_tokenizer.py", "test_openvlas_prompt_piece_by_piece"),
        ("models/test_tokenizer.py", "test_the_lone_space_is_there_once"),
    ],
    "padding on the left, in a batch": [
        (NETWORK, "test_a_batch_of_different_prompts_equals_one_by_one"),
        (NETWORK, "test_the_length_that_prompts_are_padded_to_does_not_matter"),
        ("models/test_models_layers.py", "test_padding_is_invisible"),
        ("weights/test_openvla_golden.py", "test_prompts_of_different_lengths_in_one_batch"),
    ],
    # Actions.
    "255 centres for 256 ids": [
        (HERE, "test_action_bins_are_openvlas_token_ids"),
        ("models/test_models_heads.py", "test_256_ids_decode_to_255_centres_that_encode_back"),
        ("models/test_models_heads.py", "test_bins_are_those_of_openvla"),
    ],
    "statistics in a side file, of several data sets": [
        ("weights/test_openvla_statistics.py", "test_the_side_file_goes_over_the_configuration"),
        ("weights/test_openvla_statistics.py", "test_the_data_set_is_named_where_there_are_several"),
        ("weights/test_openvla_statistics.py", "test_tokens_are_millimetres_and_milliradians_of_bridge"),
    ],
    "top-k off": [(GENERATION, "test_every_one_of_the_256_tokens_can_be_drawn")],
    "the same masks in rollout and update": [
        (GENERATION, "test_no_token_but_the_256_takes_part_in_rollout_or_update"),
        (GENERATION, "test_rollout_and_update_agree_to_rounding"),
        ("train/test_steps.py", "test_ppo_starts_at_ratio_one"),
    ],
    # Learning and judging.
    "log-probabilities, ratios, advantages and losses in float32": [
        (GENERATION, "test_log_probabilities_and_values_are_float32_in_bfloat16_networks"),
        (HERE, "test_ratios_and_advantages_are_float32_whatever_comes_in"),
        ("models/test_models_heads.py", "test_scores_are_float32_whatever_the_logits_are"),
    ],
    "the time limit bootstraps or does not": [
        ("train/test_ppo_batch.py", "test_the_time_limit_bootstraps_or_terminates"),
    ],
    "the terminal potential goes with it": [
        ("train/test_ppo_batch.py", "test_shaping_telescopes"),
        ("stages/test_stages_shaping.py", "test_shaping_leaves_the_optimal_policy_as_it_is"),
    ],
    "success at the end is not success at any step": [
        ("evaluate/test_protocol.py", "test_success_at_the_end_differs_from_success_at_any_step"),
    ],
}
"""Trap -> (file, test)."""


@functools.cache
def names_of_tests(file):
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_a_test(trap):
    assert TRAPS[trap]
    missing = [(file, test) for file, test in TRAPS[trap] if test not in names_of_tests(file)]
    assert not missing


def filled(shapes, scale=0.5):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), shapes)


def test_towers_end_before_the_last_block_and_have_no_final_norm():
    config = ViTConfig(width=8, depth=4, num_heads=2, mlp_dim=16, patch_size=4, num_prefix=5, layer_scale=1.0)
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    tower, block = ViT(config, Execution()), ViTBlock(config, Execution())
    params = filled(jax.eval_shape(tower.init, jax.random.key(0), image))["params"]
    kernel, bias = params["patch_embed"]["kernel"], params["patch_embed"]["bias"]
    patches = np.einsum("bnhwc,hwcd->bnd", patchify(image, 4), kernel) + bias + params["pos_embed"]
    prefix = np.concatenate([params["cls_token"], params["reg_token"]], axis=1)
    x = np.concatenate([np.repeat(prefix, 2, axis=0), patches], axis=1)
    run = jit(lambda p, x: block.apply({"params": p}, x)[0])
    for i in range(3):
        x = run(jax.tree.map(lambda leaf: leaf[i], params["blocks"]), x)  # noqa: B023
    np.testing.assert_allclose(jit(tower.apply)({"params": params}, image), x[:, 5:], rtol=1e-4, atol=1e-4)


def test_the_eps_of_llama_is_that_of_the_checkpoint(tmp_path):
    """1e-6 where its config.json is silent."""
    sizes = {"vocab_size": 512, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8}
    x, mask = np.full((1, 1, 8), 1e-3, np.float32), np.ones((1, 1), bool)
    for fields, eps in (({}, 1e-6), ({"rms_norm_eps": 1e-5}, 1e-5)):
        description = {"timm_model_ids": TIMM_IDS, "image_sizes": [224, 224], "pad_to_multiple_of": 64}
        (tmp_path / "config.json").write_text(json.dumps(description | {"text_config": sizes | fields}))
        llama = Llama(read_config(tmp_path).llm, Execution())
        params = jax.eval_shape(llama.init, jax.random.key(0), x, mask)["params"]
        # Layers that add nothing leave the last norm of x: 0.707 or 0.302.
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
        blank["norm"]["scale"] += 1
        hidden, _ = jit(llama.apply)({"params": blank}, x, mask)
        np.testing.assert_allclose(hidden, 1e-3 / np.sqrt(1e-6 + eps), rtol=1e-4)


def test_patches_come_right_after_bos(nano):
    """Between BOS and the text, and never padding, whatever the prompt is padded with."""
    config, network = nano_config(), OpenVLA(nano_config())
    scene = preprocess(nano.observation.images["base_camera"], config)
    tokens, mask = nano.observation.tokens, nano.observation.token_mask

    def run(params, scene):
        apply = functools.partial(network.apply, {"params": params})
        patches = apply(scene, method=lambda network, scene: network.projector(network.vision(scene)))
        return apply(scene, tokens, mask, method="embed_prompt"), patches

    (embeds, embed_mask), patches = jit(run)(nano.params, scene)
    table, num_patches = nano.params["llm"]["embed_tokens"], patches.shape[1]
    assert not mask.all()
    np.testing.assert_array_equal(embeds[:, 0], np.repeat(table[1][None], 3, axis=0))
    np.testing.assert_allclose(embeds[:, 1 : 1 + num_patches], patches, atol=1e-6)
    np.testing.assert_array_equal(embeds[:, 1 + num_patches :], table[tokens[:, 1:]])
    expected = np.concatenate([mask[:, :1], np.ones((3, num_patches), bool), mask[:, 1:]], axis=1)
    np.testing.assert_array_equal(embed_mask, expected)


def test_action_bins_are_openvlas_token_ids():
    """31999 for the lowest actions to 31744 for 1.0 alone, in the embedding and in the output layer."""
    config = nano_config(llm=LlamaConfig(32064, 4, 1, 2, 2, 4), action_vocab_end=32000)
    network = OpenVLA(config)
    values = np.float32([-1.0, 0.0, 0.5, 0.999, 1.0])
    bins = encode_bins(values)
    ids = network.apply({}, bins, method="token_ids")
    assert ids.tolist() == [31999, 31872, 31808, 31745, 31744]
    np.testing.assert_allclose(decode_bins(bins), [-0.99608, 0.0, 0.50196, 0.99608, 0.99608], atol=1e-5)
    # An output layer whose column i gives i.
    kernel = np.zeros((4, 32064), np.float32)
    kernel[0] = np.arange(32064)
    params = {"llm": {"embed_tokens": np.zeros((32064, 4), np.float32), "lm_head": {"kernel": kernel}}}
    logits = jit(network.apply, static_argnames="method")({"params": params}, np.eye(1, 4), method="action_logits")
    np.testing.assert_array_equal(logits[0], np.arange(31999, 31743, -1))
    np.testing.assert_array_equal(logits[0, bins], ids)


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"), [(32, 16, 0.5), (32, 32, 1.0), (64, 32, 0.5)], ids=["RL4VLA", "RLinf", "GRAPE"]
)
def test_the_adapters_scale_is_alpha_over_rank_of_each_project(rank, alpha, scale):
    config = LoRAConfig(rank=rank, alpha=alpha)
    assert config.scale_of("llm/lm_head") == scale
    a, b = np.eye(rank, dtype=np.float32)[:3], np.eye(rank, dtype=np.float32)[:, :2]
    merged = merge_adapters({"fc": {"kernel": np.ones((3, 2), np.float32), "lora_a": a, "lora_b": b}}, config)
    np.testing.assert_allclose(merged["fc"]["kernel"], 1 + scale * np.eye(3, 2), rtol=1e-6)


def test_ratios_and_advantages_are_float32_whatever_comes_in():
    """A bfloat16 log-probability of -10 is a thirtieth of a nat coarse: the ratio would be off by three per cent."""
    old, new = jnp.float32([-10.01, -9.99]), jnp.float32([-10.0, -10.0])
    ones = jnp.ones(2)
    loss_of = jit(functools.partial(ppo_loss, clip_eps=0.2))
    _, metrics = loss_of(new, old, ones, ones, ones, ones, ones)
    np.testing.assert_allclose(metrics["ppo/ratio_max"], np.exp(0.01), rtol=1e-5)
    coarse = [x.astype(jnp.bfloat16) for x in (new, old, ones, ones, ones, ones, ones)]
    loss, metrics = loss_of(*coarse)
    assert {loss.dtype, *(m.dtype for m in metrics.values())} == {jnp.dtype("float32")}
    advantage, return_ = jax.eval_shape(functools.partial(gae, gae_lambda=0.95), *coarse[2:6])
    assert (advantage.dtype, return_.dtype) == (jnp.float32, jnp.float32)
