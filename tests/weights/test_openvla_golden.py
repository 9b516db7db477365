"""Parity with OpenVLA's own implementation on a tiny random checkpoint in the public format."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from openvla_files import load_openvla, read_folder

from stare_jax.models import make_policy
from stare_jax.models.bins import decode_bins
from stare_jax.models.blank import leaf_shapes
from stare_jax.models.nn.lora import add_adapters
from stare_jax.models.normalize import identity_stats
from stare_jax.models.openvla import prompt as openvla_prompt
from stare_jax.models.openvla.network import OpenVLA
from stare_jax.state.storage import flatten
from stare_jax.types import Observation
from stare_jax.weights.formats import open_weights
from stare_jax.weights.openvla import read_config
from stare_jax.weights.peft import keep_adapter, open_adapter, write_adapter
from stare_jax.weights.side_files import ADAPTER_MODEL, keep_aside
from stare_jax.weights.tensor_table import read_tree

ROOT = Path(__file__).resolve().parents[2]
CASES = [path for path in (ROOT / "tests/golden/openvla_tiny", ROOT / "../shared/golden/openvla_tiny") if path.exists()]
"""the case that is shipped, with the tokens that it touches, and the whole one where that is at hand."""
TOLERANCE = 1e-4
# Tests compile much and run little.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module", params=CASES, ids=lambda path: "whole" if ".." in path.parts else "cut")
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_openvla(folder, jax.random.key(0), config=dataclasses.replace(read_config(folder), prompt_length=11))


@pytest.fixture(scope="module")
def end(loaded):
    """The token after the last action token."""
    return loaded.config.action_vocab_end


@pytest.fixture(scope="module")
def policy(loaded):
    """The policy with unit statistics, so that actions are normalised ones."""
    return make_policy(loaded.config, identity_stats(7, 0))


@pytest.fixture
def normalised_images(monkeypatch):
    """Lets the policy's images be the golden pixel values, normalised already, `[B, H, W, 6]`."""
    monkeypatch.setattr(openvla_prompt, "preprocess", lambda image, config: (image[..., :3], image[..., 3:]))
    monkeypatch.setattr(openvla_prompt, "check_observation", lambda *args: None)  # which are no images then


def observe(expected, config, padding=0):
    """The golden batch, with the text pushed to the right by `padding` tokens."""
    images = {config.camera: expected["pixel_values"].transpose(0, 2, 3, 1)}
    ids = expected["input_ids"].astype(np.int32)
    end = config.action_vocab_end  # in the vocabulary the token of padding
    pad = np.full((3, padding), end, np.int32)
    tokens = np.concatenate([ids[:, :1], pad, ids[:, 1:]], axis=1)
    return Observation(images, np.zeros((3, 0), np.float32), tokens, tokens != end)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_configuration_is_read(loaded, expected):
    config, vocabulary = loaded.config, expected["logits_last"].shape[-1]
    assert (config.action_vocab_end, config.image_size, config.llm.norm_eps) == (vocabulary - 64, 56, 1e-6)
    assert (config.llm.depth, config.llm.width, config.llm.mlp_dim) == (3, 64, 172)
    assert config.siglip.mlp_dim == 149
    np.testing.assert_allclose(loaded.norm_stats.action_q99, [0.03, 0.04, 0.05, 0.1, 0.11, 0.12, 1.0])
    np.testing.assert_array_equal(loaded.norm_stats.action_mask, [True] * 6 + [False])
    # Last block of each tower, both final norms, and the attention pool: 14 + 12 + 4 + 13 tensors.
    assert len(loaded.unused) == 43


def test_features_and_logits(loaded, expected, end):
    network, bins = OpenVLA(loaded.config), end - 1 - expected["action_tokens"]

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params, pixels, tokens, bins):
        def apply(*args, method):
            return network.apply({"params": params}, *args, method=method)

        features = apply(pixels, method="vision")
        projected, _ = apply(pixels, tokens, tokens >= 0, method="embed_prompt")
        hidden = apply(pixels, tokens, tokens >= 0, bins, method="score")
        return features, projected, hidden, apply(hidden, method="all_logits"), apply(hidden, method="action_logits")

    pixels = tuple(expected["pixel_values"][:, i : i + 3].transpose(0, 2, 3, 1) for i in (0, 3))
    features, projected, hidden, logits, action_logits = run(loaded.params, pixels, expected["input_ids"], bins)
    close(features, expected["vision_features"])
    close(projected[:, 1:17], expected["projector_features"])  # after BOS
    close(hidden[:, 0], expected["hidden_last"])
    close(logits[:, 0], expected["logits_last"])
    close(logits, expected["action_logits"])
    close(action_logits, expected["action_logits"][..., end - 1 : end - 257 : -1])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    close(np.take_along_axis(log_probs, expected["action_tokens"][..., None], -1)[..., 0], expected["action_logp"])


def test_imitation_loss(loaded, policy, expected, end, normalised_images):
    action = decode_bins(end - 1 - expected["action_tokens"])
    loss, _ = jax.jit(policy.imitation_loss, compiler_options=FAST_COMPILE)(
        loaded.params, observe(expected, loaded.config), action
    )
    close(loss.mean(), expected["lm_loss"])


@pytest.fixture(scope="module")
def greedy(policy):
    sample = jax.jit(policy.sample, compiler_options=FAST_COMPILE)
    return lambda params, observation: sample(params, observation, jax.random.key(0), temperature=0.0)


@pytest.fixture(scope="module")
def score(policy):
    return jax.jit(policy.log_prob, compiler_options=FAST_COMPILE)


def test_greedy_tokens_exactly(loaded, expected, end, normalised_images, greedy):
    decision = greedy(loaded.params, observe(expected, loaded.config))
    np.testing.assert_array_equal(end - 1 - decision.trace["bins"], expected["greedy_tokens"])
    close(decision.action, expected["greedy_normalized_actions"])


def test_prompts_of_different_lengths_in_one_batch(loaded, expected, end, normalised_images, greedy, score):
    """Row i of the padded batch, whose text is i tokens shorter, equals that prompt alone and unpadded."""
    batch = observe(expected, loaded.config, padding=2)
    for row in (1, 2):  # the first words go; the rest, being right-aligned, stays where it is
        batch.tokens[row, 3 : 3 + row] = end
    batch = batch._replace(token_mask=batch.tokens != end)
    together = greedy(loaded.params, batch)
    np.testing.assert_array_equal(end - 1 - together.trace["bins"][0], expected["greedy_tokens"][0])
    scores = score(loaded.params, batch, together.trace)
    for row in (0, 2):
        keep = np.flatnonzero(batch.token_mask[row])
        alone = jax.tree.map(lambda leaf: leaf[row : row + 1], batch)  # noqa: B023
        alone = alone._replace(tokens=alone.tokens[:, keep], token_mask=alone.token_mask[:, keep])
        single = score(loaded.params, alone, {"bins": together.trace["bins"][row : row + 1]})
        jax.tree.map(lambda a, b: close(a[row], b[0]), scores, single)  # noqa: B023
    decision = greedy(loaded.params, alone)
    np.testing.assert_array_equal(decision.trace["bins"][0], together.trace["bins"][row])


def test_another_image_gives_other_logits(loaded, expected, end, normalised_images, score):
    observation = observe(expected, loaded.config, padding=2)
    images = {name: image[:, ::-1] for name, image in observation.images.items()}
    bins = end - 1 - expected["action_tokens"].astype(np.int32)
    upright, turned = (
        score(loaded.params, o, {"bins": bins}) for o in (observation, observation._replace(images=images))
    )
    assert (np.abs((upright.logp - turned.logp).sum(axis=1)) > 1e-2).all()


@pytest.mark.parametrize("name", ["lora_all_linear", "lora_attention"])
def test_adapters_of_peft(folder, loaded, expected, end, tmp_path, name):
    """Logits with the adapter on, and the file as it was."""
    base = open_weights(folder)
    adapter = open_adapter(folder / name, base)
    config = dataclasses.replace(loaded.config, lora=adapter.config.lora)
    params = add_adapters(loaded.params, read_tree(adapter.table, adapter.tensors, leaf_shapes(config)))
    network, tokens = OpenVLA(config), expected["input_ids"]

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params, pixels):
        bins = end - 1 - expected["action_tokens"]
        hidden = network.apply({"params": params}, pixels, tokens, tokens >= 0, bins, method="score")
        return network.apply({"params": params}, hidden, method="all_logits")

    pixels = tuple(expected["pixel_values"][:, i : i + 3].transpose(0, 2, 3, 1) for i in (0, 3))
    logits = run(params, pixels)
    with np.load(folder / name / "expected.npz") as adapted:
        np.testing.assert_allclose(logits, adapted["action_logits"], atol=1e-3, rtol=0)
        logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), expected["action_tokens"][..., None], -1)
        np.testing.assert_allclose(logp[..., 0], adapted["action_logp"], atol=1e-3, rtol=0)
        assert np.abs(adapted["action_logits"] - expected["action_logits"]).max() > 0.1

    keep_aside(folder, base.unused, {}, tmp_path / "kept")
    keep_adapter(adapter, tmp_path / "kept")
    (tmp_path / "back").mkdir()
    kept = base._replace(folder=tmp_path / "kept")
    write_adapter(tmp_path / "back", kept, config, flatten(params).__getitem__, adapted=adapter.table)
    assert read_folder(tmp_path / "back", ADAPTER_MODEL) == read_folder(folder / name, ADAPTER_MODEL)
