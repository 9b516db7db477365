"""PEFT adapters: in and out without a bit lost, merged as by hand, and what is not supported says so."""

import dataclasses
import json
import re

import convert as command
import jax.numpy as jnp
import numpy as np
import openvla_files
import pytest
from openvla_files import ALL_LINEAR, OTHER, SMALL, read_folder

from stare_jax.documents import DocumentError
from stare_jax.models.blank import leaf_shapes
from stare_jax.models.nn.lora import ALL_LINEAR as ALL
from stare_jax.models.nn.lora import ATTENTION, LoRAConfig
from stare_jax.state.checkpoint import load_model, param_shapes
from stare_jax.state.storage import flatten
from stare_jax.weights.files import WeightsError
from stare_jax.weights.formats import open_weights
from stare_jax.weights.peft import open_adapter, read_lora
from stare_jax.weights.tensor_table import read_tree

RANK, ALPHA = 3, 6
COPY = "base_model.model.language_model.lm_head.base_layer.weight"
LAYER = "base_model.model.language_model.model.layers."


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tensors():
    return openvla_files.random_normal(openvla_files.checkpoint_shapes(SMALL))


@pytest.fixture(scope="module")
def base(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "hf"
    return openvla_files.write(folder, tensors, openvla_files.config_json(SMALL, "float32"))


@pytest.fixture(scope="module")
def adapters(tensors):
    shapes = openvla_files.adapter_shapes(SMALL, RANK, ALL_LINEAR)
    return openvla_files.random_normal(shapes, seed=1) | {COPY: tensors["language_model.lm_head.weight"]}


def write(folder, adapters, targets=ALL_LINEAR, **fields):
    return openvla_files.write_adapter(folder, adapters, openvla_files.adapter_json(RANK, ALPHA, targets, **fields))


@pytest.fixture(scope="module")
def converted(base, adapters, tmp_path_factory):
    """All of them, in bfloat16 beside a float32 model, with statistics of their own."""
    folder = tmp_path_factory.mktemp("adapter")
    half = {name: value if name == COPY else value.astype(jnp.bfloat16) for name, value in adapters.items()}
    write(folder / "peft", half)
    (folder / "peft" / "dataset_statistics.json").write_text(json.dumps({"other": OTHER}))
    arguments = [f"--from={base}", f"--adapter={folder / 'peft'}", f"--to={folder / 'ours'}", "--unnorm-key=other"]
    assert run(*arguments) == 0
    return folder


def test_back_and_forth_every_bit_is_the_same(converted, tmp_path):
    """Those of modules that are never run among them, and the copy of the output layer."""
    lora = load_model(converted / "ours" / "checkpoints")["lora"]
    assert lora == {"rank": RANK, "alpha": float(ALPHA), "targets": list(ALL), "overrides": []}
    assert run(f"--from={converted / 'ours'}", f"--to={tmp_path / 'back'}") == 0
    file = "adapter_model.safetensors"
    assert read_folder(tmp_path / "back", file) == read_folder(converted / "peft", file)
    assert len(read_folder(tmp_path / "back", file)) == 2 * (2 + 3 * 4 * 2 + 5 + 3 + 7 * 2 + 1) + 1
    for name in ("adapter_config.json", "dataset_statistics.json"):
        assert (tmp_path / "back" / name).read_bytes() == (converted / "peft" / name).read_bytes()


def test_merged_weights_are_those_computed_by_hand(converted, tensors, adapters, tmp_path):
    assert run(f"--from={converted / 'ours'}", f"--to={tmp_path / 'merged'}", "--merge") == 0
    merged = read_folder(tmp_path / "merged")
    assert set(merged) == set(tensors)
    num_adapted = 0
    for name, weight in tensors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapters:
            a, b = (adapters[f"{module}.lora_{x}.weight"].astype(jnp.bfloat16).astype(np.float32) for x in "AB")
            delta = (b.reshape(len(b), RANK) @ a.reshape(RANK, -1)).reshape(weight.shape)
            weight = weight + ALPHA / RANK * delta
            num_adapted += 1
        np.testing.assert_allclose(np.frombuffer(merged[name][2], np.float32), weight.ravel(), atol=1e-6, err_msg=name)
    assert num_adapted == 2 + 3 * 4 * 2 + 5 + 3 + 7 * 2 + 1
    assert set(json.loads((tmp_path / "merged" / "dataset_statistics.json").read_text())) == {"other"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "v_proj"), ATTENTION),
        (("qkv", "lm_head"), ("^dino/blocks/qkv$", "^llm/lm_head$", "^siglip/blocks/qkv$")),
    ],
)
def test_adapters_of_some_modules(base, adapters, tmp_path, targets, expected):
    some = openvla_files.adapter_shapes(SMALL, RANK, targets)
    adapter = open_adapter(write(tmp_path, {name: adapters[name] for name in some}, targets), open_weights(base))
    assert adapter.config.lora == LoRAConfig(RANK, ALPHA, expected)
    assert len(adapter.tensors) + len(adapter.unused) == len(some)
    config = dataclasses.replace(open_weights(base).config, lora=adapter.config.lora)
    wanted = {path: leaf for path, leaf in leaf_shapes(config).items() if path in adapter.table}
    assert set(adapter.table) == {path for path in leaf_shapes(config) if path.endswith(("/lora_a", "/lora_b"))}
    leaves = flatten(read_tree(adapter.table, adapter.tensors, wanted))
    if "q_proj" in targets:
        a, b = (adapters[f"{LAYER}1.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        np.testing.assert_array_equal(leaves["llm/layers/q_proj/lora_a"][1], a.T)
        # Head 1 of two: outputs [8, 16).
        np.testing.assert_array_equal(leaves["llm/layers/q_proj/lora_b"][1, :, 1], b[8:].T)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["embed_tokens"]),
        ("layers_to_transform", [0]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("something_new", True),
        ("task_type", "SEQ_CLS"),
        ("lora_bias", True),
        ("use_qalora", True),
        ("target_parameters", ["experts"]),
        ("trainable_token_indices", [1]),
        ("layers_to_transform", 0),
        ("r", 0),
        ("r", "8"),
        ("r", 8.0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", -1),
        ("lora_alpha", [16]),
    ],
)
def test_what_is_not_supported_says_so(tmp_path, field, value):
    (tmp_path / "adapter_config.json").write_text(json.dumps(openvla_files.adapter_json(2, 4, ["q"], **{field: value})))
    with pytest.raises(DocumentError, match=rf"adapter_config.json: {field}: got {re.escape(repr(value))}, expected "):
        read_lora(tmp_path)


def test_tensors_that_do_not_fit_are_listed(base, adapters, tmp_path):
    broken = dict(adapters)
    del broken[f"{LAYER}1.mlp.up_proj.lora_B.weight"], broken[f"{LAYER}0.self_attn.k_proj.lora_A.weight"]
    del broken[f"{LAYER}0.self_attn.k_proj.lora_B.weight"]
    broken[f"{LAYER}1.mlp.down_proj.lora_A.weight"] = np.zeros((RANK, 25), np.float32)
    broken["base_model.model.language_model.model.embed_tokens.lora_embedding_A"] = np.zeros((2, 2), np.float32)
    with pytest.raises(WeightsError) as error:
        open_adapter(write(tmp_path, broken), open_weights(base))
    for part in (
        "5 tensor(s) do not fit",
        "missing language_model.model.layers.1.mlp.up_proj.lora_B.weight float32[24, 3]",
        "missing language_model.model.layers.0.self_attn.k_proj.lora_A.weight float32[3, 16]",
        "down_proj.lora_A.weight: got float32[3, 25], expected float32[3, 24]",
        "unknown language_model.model.embed_tokens.lora_embedding_A",
    ):
        assert part in str(error.value)


def test_an_adapter_of_another_model_is_refused(base, adapters, tmp_path):
    other = adapters[COPY].copy()
    other[-1, -1] += 1
    with pytest.raises(WeightsError, match="lm_head.base_layer.weight: got other values than the base model's"):
        open_adapter(write(tmp_path / "a", adapters | {COPY: other}), open_weights(base))
    with pytest.raises(WeightsError, match="attn_pool.kv.lora_A.weight, .* expected adapters of OpenVLA"):
        only = {name: value for name, value in adapters.items() if ".attn_pool.kv." in name}
        open_adapter(write(tmp_path / "b", only), open_weights(base))
    with pytest.raises(WeightsError, match=r"got adapters of \['bfloat16', 'float32'\], expected one floating type"):
        name = f"{LAYER}1.mlp.up_proj.lora_B.weight"
        mixed = adapters | {name: adapters[name].astype(jnp.bfloat16)}
        open_adapter(write(tmp_path / "c", mixed), open_weights(base))
    (tmp_path / "c" / "adapter_model.safetensors").rename(tmp_path / "c" / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"\['adapter_model.bin'\], expected adapter_model.safetensors; pickles"):
        open_adapter(tmp_path / "c", open_weights(base))


def test_a_converted_folder_with_adapters_keeps_types(converted):
    shapes = param_shapes(converted / "ours" / "checkpoints")
    assert shapes["llm/lm_head/lora_b"].dtype == np.float32 and shapes["llm/lm_head/kernel"].dtype == np.float32
    assert shapes["dino/patch_embed/lora_a"].shape == (14, 14, 3, RANK)
