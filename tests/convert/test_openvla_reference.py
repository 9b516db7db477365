"""Parity with timm and transformers at random small sizes, through a checkpoint folder in the public format."""

import dataclasses
import json
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import openvla_torch
import pytest
import torch
from safetensors.numpy import save_file

from stare_jax.convert.openvla import TIMM_IDS, load_openvla, read_config
from stare_jax.models import make_policy, openvla_7b
from stare_jax.models import openvla as openvla_policy
from stare_jax.models.llama import Llama, LlamaConfig
from stare_jax.models.normalize import identity_stats
from stare_jax.models.openvla_network import OpenVLA
from stare_jax.types import Observation

try:
    openvla_torch.import_peers()
except openvla_torch.MissingPackage as error:
    pytest.skip(f"no reference: {error}", allow_module_level=True)

TOLERANCE = 1e-4
PAD, LENGTH, BATCH = 290, 9, 3
# Tests compile much and run little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SIZES = {
    "narrow": {
        "dino": {"width": 24, "depth": 3, "num_heads": 2, "mlp_dim": 97, "num_prefix": 5},
        "siglip": {"width": 40, "depth": 2, "num_heads": 5, "mlp_dim": 149},
        "llm": {"width": 32, "depth": 3, "num_heads": 2, "mlp_dim": 84},
        "image_size": 28,
    },
    "deep": {
        "dino": {"width": 16, "depth": 2, "num_heads": 4, "mlp_dim": 64, "num_prefix": 3},
        "siglip": {"width": 18, "depth": 4, "num_heads": 2, "mlp_dim": 41},
        "llm": {"width": 48, "depth": 2, "num_heads": 6, "mlp_dim": 70, "norm_eps": 1e-5},
        "image_size": 42,
    },
}


def make_config(folder, dino, siglip, llm, image_size):
    """A model like OpenVLA-7B with these sizes, without the projector's usual width."""
    base, heads = openvla_7b(tokenizer=str(folder)), llm["num_heads"]
    return dataclasses.replace(
        base,
        dino=dataclasses.replace(base.dino, **dino),
        siglip=dataclasses.replace(base.siglip, **siglip),
        projector_dim=3 * llm["width"] + 1,
        llm=LlamaConfig(vocab_size=384, num_kv_heads=heads, **llm),
        action_vocab_end=320,
        image_size=image_size,
        prompt_length=LENGTH,
        execution=dataclasses.replace(base.execution, dtype="float32", param_dtype="float32"),
    )


def describe(config):
    """What a checkpoint's config.json says of the model; the towers' widths go without saying."""
    llm = config.llm
    text = {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.width,
        "num_hidden_layers": llm.depth,
        "num_attention_heads": llm.num_heads,
        "intermediate_size": llm.mlp_dim,
        "rms_norm_eps": llm.norm_eps,
    }
    quantiles = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    return {
        "timm_model_ids": TIMM_IDS,
        "image_sizes": [config.image_size] * 2,
        "pad_to_multiple_of": 64,
        "text_config": text,
        "torch_dtype": "float32",
        "norm_stats": {"robot": {"action": quantiles}},
    }


def fill(model, seed):
    """Fills every weight with random numbers of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            normal = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * normal + (0.0 if name.endswith("bias") else 1.0))
            else:
                weight.copy_(normal / weight[0].numel() ** 0.5)


class Case(NamedTuple):
    model: Any
    config: Any
    params: Any
    pixels: tuple
    ids: np.ndarray
    mask: np.ndarray
    bins: np.ndarray


@pytest.fixture(scope="module", params=SIZES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = make_config(folder, **SIZES[request.param])
    model = openvla_torch.build(config)
    fill(model, seed=len(request.param))
    save_file({name: weight.numpy() for name, weight in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(describe(config)))
    loaded = load_openvla(folder, jax.random.key(0), config=config)
    rng = np.random.default_rng(1)
    size = config.image_size
    pixels = tuple(rng.normal(size=(BATCH, size, size, 3)).astype(np.float32) for _ in range(2))
    ids = rng.integers(3, PAD, (BATCH, LENGTH)).astype(np.int32)
    ids[:, 0] = 1
    for row in range(BATCH):  # row 0 is full, the last has two tokens of text
        ids[row, 1 : 1 + row * (LENGTH - 3) // (BATCH - 1)] = PAD
    return Case(model, config, loaded.params, pixels, ids, ids != PAD, rng.integers(0, 256, (BATCH, 7)))


def as_torch(case):
    """The prompt as the PyTorch model reads it."""
    pixels = tuple(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in case.pixels)
    return pixels, torch.from_numpy(case.ids).long(), torch.from_numpy(case.mask)


def row_of(prompt, row):
    """One row of a batch, without its padding."""
    pixels, ids, mask = prompt
    return tuple(x[row : row + 1] for x in pixels), ids[row : row + 1, mask[row]], mask[row : row + 1, mask[row]]


def close(got, want):
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_configuration_is_read(case):
    config = read_config(case.config.tokenizer)
    towers = {name: getattr(case.config, name) for name in ("dino", "siglip", "projector_dim")}
    assert dataclasses.replace(config, **towers, prompt_length=LENGTH) == case.config


def test_towers_and_projector(case):
    network = OpenVLA(case.config)

    @jit
    def run(params, pixels, ids, mask):
        features = network.apply({"params": params}, pixels, method="vision")
        embeds, _ = network.apply({"params": params}, pixels, ids, mask, method="embed_prompt")
        return features, embeds

    features, embeds = run(case.params, case.pixels, case.ids, case.mask)
    prompt, backbone = as_torch(case), case.model.vision_backbone
    width = case.config.dino.width
    close(features[..., :width], openvla_torch.tower_features(backbone.featurizer, prompt[0][0]))
    close(features[..., width:], openvla_torch.tower_features(backbone.fused_featurizer, prompt[0][1]))
    expected, mask = case.model.embed_prompt(*prompt)
    close(embeds, expected)
    assert mask.sum() == case.mask.sum() + BATCH * (case.config.image_size // 14) ** 2


def test_llama_at_every_position(case):
    llama = Llama(case.config.llm, case.config.execution)
    embeds, mask = case.model.embed_prompt(*as_torch(case))

    @jit
    def run(params, embeds, mask):
        hidden, _ = llama.apply({"params": params}, embeds, mask)
        return hidden, llama.apply({"params": params}, hidden, 0, case.config.llm.vocab_size, method="logits")

    hidden, logits = run(case.params["llm"], embeds.numpy(), mask.numpy())
    peer = case.model.language_model
    expected = peer.model(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=mask.long().cumsum(1) - 1
    ).last_hidden_state
    close(np.asarray(hidden)[mask], expected[mask])
    close(np.asarray(logits)[mask], peer.lm_head(expected)[mask])


@pytest.fixture(scope="module")
def functions(case):
    """Greedy choice and score of our policy, for pixels that are normalised already."""
    policy = make_policy(case.config, identity_stats(7, 0))
    patch = pytest.MonkeyPatch()
    patch.setattr(openvla_policy, "preprocess", lambda image, config: (image[..., :3], image[..., 3:]))
    observation = Observation(
        {case.config.camera: np.concatenate(case.pixels, axis=-1)}, np.zeros((BATCH, 0)), case.ids, case.mask
    )
    sample, log_prob = jit(policy.sample), jit(policy.log_prob)
    yield (
        lambda: sample(case.params, observation, jax.random.key(0), temperature=0.0),
        lambda bins: log_prob(case.params, observation, bins),
    )
    patch.undo()


def token_ids(case, bins):
    return torch.from_numpy(case.config.action_vocab_end - 1 - np.asarray(bins)).long()


def test_greedy_tokens_exactly(case, functions):
    """Ours of the padded batch, and theirs of it, and of each row alone and unpadded."""
    greedy, score = functions
    decision, prompt = greedy(), as_torch(case)
    expected = openvla_torch.generate(case.model, *prompt)
    tokens = token_ids(case, decision.action_tokens)
    np.testing.assert_array_equal(tokens, expected.tokens)
    for row in range(BATCH):
        alone = openvla_torch.generate(case.model, *row_of(prompt, row), padded=False)
        np.testing.assert_array_equal(tokens[row], alone.tokens[0])
        close(alone.logits[0], expected.logits[row])
    # What was decided with a cache is what a pass over everything makes of it, here and there.
    close(decision.logp, score(decision.action_tokens).logp)
    logp, _, _ = case.model.log_prob(*prompt, tokens)
    close(decision.logp, logp)


def test_log_probabilities_and_entropies_of_given_actions(case, functions):
    _, score = functions
    ours, prompt = score(case.bins.astype(np.int32)), as_torch(case)
    logp, entropy, _ = case.model.log_prob(*prompt, token_ids(case, case.bins))
    close(ours.logp, logp)
    close(ours.entropy, entropy)
    for row in range(BATCH):
        tokens = token_ids(case, case.bins[row : row + 1])
        alone, _, _ = case.model.log_prob(*row_of(prompt, row), tokens, padded=False)
        close(ours.logp[row], alone[0])
