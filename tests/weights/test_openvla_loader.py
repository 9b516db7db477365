"""The loader on checkpoints written here, name by name as the reference lists them, and on damaged ones."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import openvla_files
import pytest
from openvla_files import SMALL, load_openvla, read_norm_stats
from safetensors.numpy import save_file

from stare_jax.config import ConfigError
from stare_jax.documents import DocumentError
from stare_jax.models import openvla_7b
from stare_jax.weights.files import WeightsError
from stare_jax.weights.formats import open_weights
from stare_jax.weights.heads import HEADS
from stare_jax.weights.openvla import OPENVLA, read_config
from stare_jax.weights.statistics import to_openvla_table

PROPRIO = {"action": {"q01": [0.0], "q99": [3.0]}, "proprio": {"q01": [-1.0], "q99": [4.0]}}
TWO = {"action": {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "mask": [True, False]}}


@pytest.fixture
def tensors():
    return openvla_files.random_normal(openvla_files.checkpoint_shapes(SMALL))


def write(folder, tensors, dtype="float32", **fields):
    return openvla_files.write(folder, tensors, openvla_files.config_json(SMALL, dtype, **fields))


def load(folder):
    return load_openvla(folder, jax.random.key(0))


def test_every_tensor_lands_where_it_belongs(tmp_path, tensors):
    params = load(write(tmp_path, tensors)).params
    qkv = tensors["vision_backbone.featurizer.blocks.1.attn.qkv.weight"]
    width = SMALL.dino.width
    np.testing.assert_array_equal(params["dino"]["blocks"]["qkv"]["kernel"][1].reshape(width, -1), qkv.T)
    # Head 1 of the keys: rows [D + 4, D + 8) of the fused weight.
    np.testing.assert_array_equal(params["dino"]["blocks"]["qkv"]["kernel"][1, :, 1, 1], qkv[width + 4 : width + 8].T)
    out = tensors["language_model.model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["llm"]["layers"]["o_proj"]["kernel"][1, 1], out[:, 8:].T)
    conv = tensors["vision_backbone.fused_featurizer.patch_embed.proj.weight"]
    np.testing.assert_array_equal(params["siglip"]["patch_embed"]["kernel"][2, 5, 1], conv[:, 1, 2, 5])
    np.testing.assert_array_equal(params["llm"]["lm_head"]["kernel"], tensors["language_model.lm_head.weight"].T)
    assert params["dino"]["blocks"]["ls1"].shape == (2, width)
    assert params["value_head"]["layer_0"]["kernel"].shape == (16, 512)


def test_what_never_runs_is_kept_aside(tmp_path, tensors):
    unused = load(write(tmp_path, tensors)).unused
    np.testing.assert_array_equal(
        unused["vision_backbone.fused_featurizer.attn_pool.latent"],
        tensors["vision_backbone.fused_featurizer.attn_pool.latent"],
    )
    assert "vision_backbone.featurizer.blocks.2.attn.qkv.weight" in unused
    assert "vision_backbone.featurizer.blocks.1.attn.qkv.weight" not in unused


def test_a_value_head_beside_the_checkpoint_is_read(tmp_path, tensors):
    write(tmp_path, tensors)
    shapes = {"head_l1.weight": (512, 16), "head_l1.bias": (512,), "head_l2.weight": (128, 512)}
    shapes |= {"head_l2.bias": (128,), "head_l3.weight": (1, 128)}
    head = openvla_files.random_normal(shapes)
    save_file(head, tmp_path / HEADS)
    params = load(tmp_path).params["value_head"]
    np.testing.assert_array_equal(params["layer_1"]["kernel"], head["head_l2.weight"].T)
    np.testing.assert_array_equal(params["layer_0"]["bias"], head["head_l1.bias"])
    np.testing.assert_array_equal(params["out"]["kernel"], head["head_l3.weight"].T)
    save_file(head | {"head_l1.bias": np.zeros(4, np.float32)}, tmp_path / HEADS)
    with pytest.raises(WeightsError, match=re.escape("head_l1.bias: got float32[4], expected float32[512]")):
        load(tmp_path)


def test_one_error_lists_everything_that_does_not_fit(tmp_path, tensors):
    del tensors["projector.fc2.bias"], tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    del tensors["vision_backbone.fused_featurizer.attn_pool.kv.weight"]
    tensors["projector.fc4.weight"] = np.zeros((2, 2), np.float32)
    tensors["language_model.lm_head.weight"] = np.zeros((384, 17), np.float32)
    tensors["projector.fc1.weight"] = tensors["projector.fc1.weight"].astype(jnp.bfloat16)
    tensors["vision_backbone.featurizer.norm.bias"] = np.zeros(8, np.int8)
    with pytest.raises(WeightsError) as error:
        load(write(tmp_path, tensors))
    message = str(error.value)
    for part in (
        "7 tensor(s) do not fit",
        "missing projector.fc2.bias float32[16]",
        "missing language_model.model.layers.1.mlp.up_proj.weight float32[24, 16]",
        "missing vision_backbone.fused_featurizer.attn_pool.kv.weight float32[24, 12]",
        "unknown projector.fc4.weight float32[2, 2]",
        "language_model.lm_head.weight: got float32[384, 17], expected float32[384, 16]",
        "projector.fc1.weight: got bfloat16[80, 20], expected float32[80, 20]",
        "vision_backbone.featurizer.norm.bias: got int8[8], expected float32[8]",
    ):
        assert part in message
    write(tmp_path, {name: np.zeros(tensor.shape, np.int16) for name, tensor in tensors.items()})
    with pytest.raises(WeightsError, match="got tensors of int16, expected one of"):
        load(tmp_path)


def test_tensors_of_one_type_are_that_type_whatever_the_configuration_says(tmp_path, tensors):
    """Also where they are to be another one for training."""
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    config = read_config(write(tmp_path, half))
    assert (config.execution.param_dtype, open_weights(tmp_path, config=config).dtype) == ("float32", "bfloat16")
    kernel = load(tmp_path).params["projector"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, half["projector.fc1.weight"].astype(np.float32).T)


def test_config_of_the_published_model(tmp_path):
    published = {
        "timm_model_ids": openvla_files.TIMM_IDS,
        "image_sizes": [224, 224],
        "pad_to_multiple_of": 64,
        "text_config": {"vocab_size": 32064},
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(tmp_path) == openvla_7b(tokenizer=str(tmp_path))
    for fields, message in (
        ({"timm_model_ids": ["a", "b"]}, "timm_model_ids[0]: got 'a', expected"),
        ({"image_sizes": None}, "config.json: image_sizes: got nothing, expected a list"),
        ({"text_config": {"vocab_size": 200}}, "config.json: action_vocab_end: got 136, expected more than 256"),
    ):
        changed = {name: value for name, value in (published | fields).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"torch_dtype"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype"}),
        ({"dtype": "bfloat16"}, {"dtype"}),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype", "torch_dtype"}),
    ],
)
def test_an_export_in_another_type_names_it_under_every_name_that_is_there(tmp_path, fields, expected):
    description = openvla_files.config_json(SMALL, None) | fields
    description["text_config"] |= fields
    if not fields:
        del description["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps({n: x for n, x in description.items() if x is not None}))
    OPENVLA.finish(tmp_path, openvla_7b(), "float16")
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: x for name, x in written.items() if "dtype" in name} == dict.fromkeys(expected, "float16")
    assert {name: x for name, x in written["text_config"].items() if "dtype" in name} == dict.fromkeys(
        fields, "float16"
    )
    assert read_config(tmp_path).execution.param_dtype == "float16"


def test_sizes_other_than_the_published_ones(tmp_path, tensors):
    config = read_config(write(tmp_path, tensors))
    assert dataclasses.astuple(config.dino)[:4] == (8, 3, 2, 32)
    assert dataclasses.astuple(config.siglip)[:4] == (12, 3, 2, 44)
    assert (config.projector_dim, config.llm.num_kv_heads, config.action_vocab_end) == (80, 1, 320)


def test_statistics_of_one_data_set(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"robot": TWO}}))
    stats = read_norm_stats(tmp_path)
    np.testing.assert_array_equal(stats.action_q99, [1.0, 2.0])
    np.testing.assert_array_equal(stats.action_mask, [True, False])
    assert stats.state_q01.shape == (0,)
    # A side file adds to config.json, and several data sets ask for a name.
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"mine": PROPRIO}))
    with pytest.raises(WeightsError, match=re.escape("unnorm_key: got None, expected one of ['mine', 'robot']")):
        read_norm_stats(tmp_path)
    mine = read_norm_stats(tmp_path, unnorm_key="mine", state_dim=1)
    np.testing.assert_array_equal(mine.state_q99, [4.0])
    np.testing.assert_array_equal(mine.action_mask, [True])
    with pytest.raises(DocumentError, match=r"config.json: norm_stats.robot.proprio: got nothing, expected an object"):
        read_norm_stats(tmp_path, unnorm_key="robot", state_dim=1)


def test_statistics_written_are_the_ones_read(tmp_path):
    """Also of a gripper, whose range is its minimum and maximum."""
    gripper = TWO["action"] | {"min": [-2.0, -0.5], "max": [2.0, 2.5]}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"a": {**PROPRIO, "action": gripper}}))
    stats = read_norm_stats(tmp_path, state_dim=1)
    np.testing.assert_array_equal(stats.action_q99, [1.0, 2.5])
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"a": to_openvla_table(stats)}))
    jax.tree.map(np.testing.assert_array_equal, read_norm_stats(tmp_path, state_dim=1), stats)
