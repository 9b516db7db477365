"""Parity with openpi's own JAX implementation of pi0.5 on tiny random parameters."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pi05_files
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.models.pi05.network import Pi05, Pi05Config
from stare_jax.state.leaves import leaf_loader
from stare_jax.weights.importing import import_weights

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "pi05_tiny"
TOLERANCE = 1e-4
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture(scope="module")
def description():
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def config(description):
    tower = {name: value for name, value in description["siglip"].items() if name != "patch_size"}
    return Pi05Config(
        siglip=SigLIPConfig(**tower, patch_size=description["siglip"]["patch_size"][0]),
        paligemma=GemmaConfig(**description["paligemma"]),
        expert=GemmaConfig(**description["action_expert"]),
        vocab_size=description["vocab_size"],
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=description["max_token_len"],
        model_action_dim=description["action_dim"],
        window=description["action_horizon"],
        chunk=description["action_horizon"],
        image_size=28,
    )


@pytest.fixture(scope="module")
def network(config):
    return Pi05(config)


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def inputs(expected):
    """Images, their masks, tokens and mask; the noisy chunk and its times."""
    images = tuple(expected[f"image/{camera}"] for camera in CAMERAS)
    image_masks = np.stack([expected[f"image_mask/{camera}"] for camera in CAMERAS], axis=1)
    t = expected["time"][:, None, None]
    noisy = t * expected["noise"] + (1 - t) * expected["actions"]
    prompt = (expected["tokenized_prompt"], expected["tokenized_prompt_mask"])
    return (images, image_masks, *prompt), noisy, expected["time"]


@pytest.fixture(scope="module")
def params():
    flat = load_file(FOLDER / "params.safetensors")
    return unflatten_dict({tuple(name.split("/")): array for name, array in flat.items()})


@pytest.fixture(scope="module")
def apply(network):
    @partial(jax.jit, static_argnames="method", compiler_options={"xla_backend_optimization_level": 0})
    def apply(params, *args, method="__call__"):
        return network.apply({"params": params}, *args, method=method)

    return apply


def close(got, want, where=...):
    np.testing.assert_allclose(np.asarray(got)[where], want[where], atol=TOLERANCE, rtol=0)


def test_parameters_have_the_reference_names_and_shapes(network, inputs, description):
    prompt, noisy, time = inputs
    shapes = jax.eval_shape(network.init, jax.random.key(0), *prompt, noisy, time)["params"]
    ours = {"/".join(path): list(leaf.shape) for path, leaf in flatten_dict(shapes).items()}
    assert ours == description["param_shapes"]


@pytest.mark.parametrize("form", ["openpi", "safetensors", "lerobot"])
def test_weights_in_every_format(tmp_path, form, config):
    """openpi's tree, and the tensors of its port."""
    flat = load_file(FOLDER / "params.safetensors")
    if form == "openpi":
        pi05_files.write_openpi(tmp_path / "theirs", flat)
    else:
        tensors = pi05_files.to_port(flat)
        pi05_files.write_port(tmp_path / "theirs", tensors, prefix="model." if form == "lerobot" else "")
    imported = import_weights(tmp_path / "theirs", tmp_path / "ours", config=config)
    assert (imported.form, imported.config.siglip, imported.config.paligemma) == (form, config.siglip, config.paligemma)
    load = leaf_loader(tmp_path / "ours" / "checkpoints", list(flat))
    assert pi05_files.bits({name: load(name) for name in flat}) == pi05_files.bits(flat)


def test_prefix_and_chunk_together(apply, params, inputs, expected):
    prompt, noisy, time = inputs
    embeds, valid = apply(params, *prompt, method="embed_prefix")
    valid = np.asarray(valid)
    assert 0 < valid.sum() < valid.size  # The third camera is off and the prompt is padded.
    close(embeds, expected["prefix_tokens"], valid)
    close(apply(params, time, method="condition"), expected["adarms_cond"])
    velocity, prefix, suffix = apply(params, *prompt, noisy, time)
    close(prefix, expected["prefix_out"], valid)
    close(suffix, expected["suffix_out"])
    close(velocity, expected["velocity"])
    target = expected["noise"] - expected["actions"]
    close(jnp.mean((velocity - target) ** 2, axis=-1), expected["flow_loss"])


def test_chunk_after_prefix_is_the_same_and_samples_follow(apply, params, inputs, expected):
    prompt, noisy, time = inputs
    hidden, cache, valid = apply(params, *prompt, method="prefix")
    close(hidden, expected["prefix_out"], np.asarray(valid))

    def velocity(noisy, time):
        hidden = apply(params, cache, valid, noisy[:, None], time[:, None], method="suffix")
        return apply(params, hidden, method="velocity")[:, 0]

    close(velocity(noisy, time), expected["velocity"])
    for num_steps in (10, 3):
        x = expected["noise"]
        for i in range(num_steps):
            x = x - velocity(x, np.full(2, 1 - i / num_steps, np.float32)) / num_steps
        close(x, expected[f"sampled_actions_{num_steps}"])


def test_what_is_masked_changes_nothing(apply, params, inputs):
    """Another image of the missing camera, other ids on the padding."""
    (images, image_masks, tokens, token_mask), noisy, time = inputs
    velocity, *_ = apply(params, images, image_masks, tokens, token_mask, noisy, time)
    masked = [-image if not mask.any() else image for image, mask in zip(images, image_masks.T, strict=True)]
    assert not np.array_equal(masked[2], images[2])
    other = (tuple(masked), image_masks, np.where(token_mask, tokens, 7), token_mask)
    np.testing.assert_allclose(apply(params, *other, noisy, time)[0], velocity, atol=1e-6)
