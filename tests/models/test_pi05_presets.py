"""The presets of pi0.5 against the settings of the projects that they are named after."""

import jax
import numpy as np
import pytest
from nano_flow import flow_config
from nano_policy import random_observation, some_stats

from stare_jax.models import PI05_LORA, make_policy, pi05_base, pi05_droid, pi05_libero, pi05_maniskill
from stare_jax.models.normalize import identity_stats
from stare_jax.models.pi05.prompt import STATE_TEMPLATE, STATELESS_TEMPLATE

BASE, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"
NUM_PARAMS = 3_353_433_872
"""parameters of openpi's checkpoint, without the heads that it does not have."""
SETTINGS = {
    pi05_base: {
        "window": 50,
        "num_denoising_steps": 10,
        "prompt_template": STATE_TEMPLATE,
        "prompt_length": 200,
        "cameras": (BASE, LEFT, RIGHT),
        "noise": "sde",
    },
    pi05_droid: {
        "window": 15,
        "chunk": 8,
        "num_denoising_steps": 10,
        "prompt_template": STATE_TEMPLATE,
        "prompt_length": 200,
        "cameras": (BASE, LEFT),
        "action_dim": 8,
        "state_dim": 8,
    },
    pi05_libero: {
        "window": 10,
        "chunk": 5,
        "num_denoising_steps": 10,
        "prompt_template": STATELESS_TEMPLATE,
        "prompt_length": 200,
        "cameras": (BASE, LEFT),
        "action_dim": 7,
        "state_dim": 0,
    },
    pi05_maniskill: {
        "window": 8,
        "chunk": 5,
        "num_denoising_steps": 4,
        "prompt_template": STATELESS_TEMPLATE,
        "prompt_length": 48,
        "cameras": ("3rd_view_camera",),
        "noise": "learned",
        "action_dim": 7,
        "state_dim": 0,
    },
}


@pytest.mark.parametrize("preset", SETTINGS, ids=lambda preset: preset.__name__)
def test_a_preset_has_the_numbers_of_its_project(preset):
    config = preset()
    assert {name: getattr(config, name) for name in SETTINGS[preset]} == SETTINGS[preset]
    assert config.model_action_dim == 32 and config.image_size == 224 and config.vocab_size == 257_152
    assert preset(chunk=1, window=3).window == 3


@pytest.mark.parametrize("preset", SETTINGS, ids=lambda preset: preset.__name__)
def test_every_preset_has_the_published_parameters_and_decides_on_its_chunk(preset):
    config = preset(tokenizer="words")
    policy = make_policy(config, identity_stats(config.action_dim, config.state_dim))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    published = {name: tree for name, tree in params.items() if name not in ("value_head", "noise_head")}
    assert sum(leaf.size for leaf in jax.tree.leaves(published)) == NUM_PARAMS
    decision = jax.eval_shape(policy.sample, params, policy.observation_shape(2), jax.random.key(0))
    assert decision.action.shape == (2, config.chunk, config.action_dim)


def test_openpis_adapters_have_rank_16_in_paligemma_and_32_in_the_expert():
    policy = make_policy(flow_config(lora=PI05_LORA), some_stats(3, 2))
    leaves = jax.tree.leaves_with_path(jax.eval_shape(policy.init, jax.random.key(0)))
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    ranks = {name: shape[-1] for name, shape in shapes.items() if name.endswith("lora_a")}
    assert len(ranks) == 10
    assert {name: 32 if "_1/" in name else 16 for name in ranks} == ranks
    scales = {PI05_LORA.scale_of(name.removesuffix("lora_a").rstrip("/_")) for name in ranks}
    assert scales == {1.0}


def test_the_state_is_in_the_prompt_of_base_and_droid_alone():
    for preset in SETTINGS:
        config = preset(tokenizer="words")
        policy = make_policy(config, identity_stats(config.action_dim, config.state_dim))
        states = np.stack([np.full(config.state_dim, x, np.float32) for x in (-0.5, 0.5)])
        tokens, _ = policy.tokenize(["push the cube"] * 2, states)
        assert (tokens[0] != tokens[1]).any() == (preset in (pi05_base, pi05_droid)), preset.__name__


def test_a_camera_that_the_robot_lacks_is_left_out_and_one_that_is_asked_for_has_to_be_there():
    config = pi05_base(tokenizer="words", cameras=(BASE,))
    policy = make_policy(config, identity_stats(config.action_dim, config.state_dim))
    assert set(policy.observation_shape(1).images) == {BASE}
    observation = random_observation(policy, ["push the cube"])
    params = jax.eval_shape(policy.init, jax.random.key(0))
    without = observation._replace(images={"another": observation.images[BASE]})
    with pytest.raises(ValueError, match="images: got the cameras \\['another'\\], expected \\['base_0_rgb'\\]"):
        jax.eval_shape(policy.value, params, without)
