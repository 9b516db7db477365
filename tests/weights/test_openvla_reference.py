"""Parity with timm and transformers at random small sizes, through a checkpoint folder in the public format."""

import copy
import dataclasses
import functools
import json
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import openvla_torch
import openvla_torch_ppo
import pytest
import torch
from flax import traverse_util
from openvla_files import load_openvla
from safetensors.numpy import save_file

from stare_jax.losses import ppo_loss
from stare_jax.models import make_policy, openvla_7b
from stare_jax.models.bins import score_bins
from stare_jax.models.blank import leaf_shapes
from stare_jax.models.nn.llama import Llama, LlamaConfig
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.normalize import identity_stats
from stare_jax.models.openvla import prompt as openvla_prompt
from stare_jax.models.openvla.network import OpenVLA
from stare_jax.types import Observation
from stare_jax.weights.heads import head_table
from stare_jax.weights.openvla import TIMM_IDS, adapter_table, read_config, tensor_table
from stare_jax.weights.tensor_table import layer_shape, to_ours

try:
    openvla_torch.import_peers()
except openvla_torch.MissingPackage as error:
    pytest.skip(f"no reference: {error}", allow_module_level=True)

TOLERANCE = 1e-4
PAD, LENGTH, BATCH = 290, 9, 3
# Tests compile much and run little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

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
    """The model's fields in a checkpoint's config.json."""
    llm, towers = config.llm, (config.dino, config.siglip)
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
        "tiny_timm_overrides": dict(zip(TIMM_IDS, map(describe_tower, towers), strict=True)),
        "image_sizes": [config.image_size] * 2,
        "pad_to_multiple_of": 64,
        "text_config": text,
        "torch_dtype": "float32",
        "norm_stats": {"robot": {"action": quantiles}},
    }


def describe_tower(tower):
    ratio = tower.mlp_dim / tower.width
    return {"embed_dim": tower.width, "depth": tower.depth, "num_heads": tower.num_heads, "mlp_ratio": ratio}


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


def make_case(name, folder):
    config = make_config(folder, **SIZES[name])
    model = openvla_torch.build(config)
    fill(model, seed=len(name))
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


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {name: make_case(name, tmp_path_factory.mktemp(name)) for name in SIZES}


@pytest.fixture(scope="module", params=SIZES)
def case(request, cases):
    return cases[request.param]


@pytest.fixture(scope="module")
def narrow(cases):
    return cases["narrow"]


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
    # How many registers there are and the projector's width follow from the towers elsewhere.
    dino = dataclasses.replace(config.dino, num_prefix=case.config.dino.num_prefix)
    rest = {"dino": dino, "projector_dim": case.config.projector_dim, "prompt_length": LENGTH}
    assert dataclasses.replace(config, **rest) == case.config


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
def functions(narrow):
    """Greedy choice and score of our policy, for pixels that are normalised already."""
    policy = make_policy(narrow.config, identity_stats(7, 0))
    observation = Observation(
        {narrow.config.camera: np.concatenate(narrow.pixels, axis=-1)}, np.zeros((BATCH, 0)), narrow.ids, narrow.mask
    )
    sample, log_prob = jit(policy.sample), jit(policy.log_prob)

    def call(function, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openvla_prompt, "preprocess", lambda image, config: (image[..., :3], image[..., 3:]))
            patch.setattr(openvla_prompt, "check_observation", lambda *args: None)  # which are no images then
            return function(narrow.params, observation, *args, **kwargs)

    return functools.partial(call, sample, jax.random.key(0), temperature=0.0), functools.partial(call, log_prob)


def token_ids(case, bins):
    return torch.from_numpy(case.config.action_vocab_end - 1 - np.asarray(bins)).long()


def test_greedy_tokens_exactly(narrow, functions):
    """Ours of the padded batch, and theirs of it, and of each row alone and unpadded."""
    greedy, score = functions
    decision, prompt = greedy(), as_torch(narrow)
    expected = openvla_torch.generate(narrow.model, *prompt)
    tokens = token_ids(narrow, decision.trace["bins"])
    np.testing.assert_array_equal(tokens, expected.tokens)
    for row in range(BATCH):
        alone = openvla_torch.generate(narrow.model, *row_of(prompt, row), padded=False)
        np.testing.assert_array_equal(tokens[row], alone.tokens[0])
        close(alone.logits[0], expected.logits[row])
    # What was decided with a cache is what a pass over everything makes of it, here and there.
    close(decision.logp, score(decision.trace).logp)
    logp, _, _ = narrow.model.log_prob(*prompt, tokens)
    close(decision.logp.sum(axis=1), logp)


def test_log_probabilities_and_entropies_of_given_actions(narrow, functions):
    _, score = functions
    ours, prompt = score({"bins": narrow.bins.astype(np.int32)}), as_torch(narrow)
    logp, entropy, _ = narrow.model.log_prob(*prompt, token_ids(narrow, narrow.bins))
    close(ours.logp.sum(axis=1), logp)
    close(ours.entropy, entropy)
    for row in range(BATCH):
        tokens = token_ids(narrow, narrow.bins[row : row + 1])
        alone, _, _ = narrow.model.log_prob(*row_of(prompt, row), tokens, padded=False)
        close(ours.logp[row].sum(), alone[0])


# ---- Adapters and the update -----------------------------------------------------------------------------------------

RANK, ALPHA = 3, 5.0


def gather(config, model, head, read):
    """Value that `read` makes of every trained parameter of the PyTorch model, in our arrangement, by path."""
    shapes, found = leaf_shapes(config), {}
    theirs = {re.sub(r"lora_(.)$", lambda m: f"lora_{m[1].upper()}.weight", n): p for n, p in model.named_parameters()}
    theirs |= {
        f"head_l{i + 1}.{name}": p for i, linear in enumerate(list(head)[::2]) for name, p in linear.named_parameters()
    }
    for path, entry in (adapter_table(tensor_table(config)) | head_table(config)).items():
        shape = layer_shape(shapes[path].shape, entry)
        layers = [to_ours(read(theirs[name]).numpy(), shape, entry.kind) for name in entry.names]
        found[path] = np.stack(layers) if entry.num_stacked else layers[0]
    return found


def test_the_gradient_of_a_ppo_update_of_adapters(narrow):
    """Gradients of every adapter and of the value head, through both towers, projector, decoder and output layer."""
    torch.manual_seed(0)
    model = copy.deepcopy(narrow.model)
    openvla_torch_ppo.add_lora(model, rank=RANK, alpha=ALPHA)
    head = openvla_torch_ppo.ValueHead(narrow.config.llm.width, narrow.config.value_dims)
    for parameter in openvla_torch_ppo.lora_parameters(model):
        torch.nn.init.normal_(parameter.requires_grad_(True), std=0.1)
    rng = np.random.default_rng(2)
    names = ("old_logp", "old_value", "advantage", "return_")
    scores = {name: rng.normal(size=BATCH).astype(np.float32) for name in names}
    tokens = token_ids(narrow, narrow.bins)
    openvla_torch_ppo.checkpoint_layers(model)  # recomputed layers must not change anything
    logp, _, hidden = model.log_prob(*as_torch(narrow), tokens)
    scores["old_logp"] += logp.detach().numpy()  # ratios near one, inside the clip and outside
    loss = {"clip_eps": 0.2, "value_clip_eps": 0.2, "huber": 0.5}
    expected = openvla_torch_ppo.ppo_loss(
        logp, head(hidden), {name: torch.from_numpy(value) for name, value in scores.items()}, **loss
    )
    expected.backward()

    config = dataclasses.replace(narrow.config, lora=LoRAConfig(rank=RANK, alpha=ALPHA))
    trained = gather(config, model, head, lambda parameter: parameter.detach())
    frozen = {path: leaf for path, leaf in flatten(narrow.params) if path not in trained}
    assert trained.keys() | frozen.keys() == leaf_shapes(config).keys()

    @jit
    def grad(trained, frozen, pixels, ids, mask, bins, scores):
        def objective(trained):
            params = unflatten(frozen | trained)
            apply = functools.partial(OpenVLA(config).apply, {"params": params})
            hidden = apply(pixels, ids, mask, bins, method="score")
            logp, entropy = score_bins(apply(hidden, method="action_logits"), bins, 1.0)
            value = apply(hidden[:, 0], pixels, None, method="value")
            data = (
                logp.sum(axis=1),
                scores["old_logp"],
                scores["advantage"],
                value,
                scores["old_value"],
                scores["return_"],
            )
            return ppo_loss(*data, entropy, clip_eps=0.2, value_clip_eps=0.2, huber_delta=0.5)[0]

        return jax.value_and_grad(objective)(trained)

    got, grads = grad(trained, frozen, narrow.pixels, narrow.ids, narrow.mask, narrow.bins, scores)
    close(got, expected.detach())
    for path, value in gather(config, model, head, lambda parameter: parameter.grad).items():
        assert np.abs(value).max() > 1e-6, path
        np.testing.assert_allclose(grads[path], value, atol=1e-4 * max(1.0, np.abs(value).max()), err_msg=path)


def flatten(tree):
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in jax.tree.leaves_with_path(tree)]


def unflatten(leaves):
    return traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})
