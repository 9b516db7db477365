"""The loader on checkpoints written here, name by name as the reference lists them, and on damaged ones."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from stare_jax.convert.openvla import load_openvla, read_config, read_norm_stats
from stare_jax.models import openvla_7b
from stare_jax.models.llama import LlamaConfig

DIM, MLP, PATCHES = 8, 12, 4


def small_config():
    """Two layers of everything, 28x28 images."""
    base = openvla_7b()
    sizes = {"width": DIM, "depth": 3, "num_heads": 2, "mlp_dim": MLP}
    return dataclasses.replace(
        base,
        dino=dataclasses.replace(base.dino, **sizes),
        siglip=dataclasses.replace(base.siglip, **sizes),
        projector_dim=64,
        llm=LlamaConfig(vocab_size=320, width=16, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=24),
        action_vocab_end=300,
        image_size=28,
        execution=dataclasses.replace(base.execution, dtype="float32", param_dtype="float32"),
    )


def tower_shapes(prefix, is_dino):
    shapes = {"pos_embed": (1, PATCHES, DIM), "patch_embed.proj.weight": (DIM, 3, 14, 14)}
    shapes |= {"patch_embed.proj.bias": (DIM,), "norm.weight": (DIM,), "norm.bias": (DIM,)}
    if is_dino:
        shapes |= {"cls_token": (1, 1, DIM), "reg_token": (1, 4, DIM)}
    else:
        shapes |= {"attn_pool.latent": (1, 1, DIM), "attn_pool.q.weight": (DIM, DIM)}
    for i in range(3):
        linear = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "mlp.fc1": (MLP, DIM), "mlp.fc2": (DIM, MLP)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (DIM,), f"blocks.{i}.{name}.bias": (DIM,)}
        if is_dino:
            shapes |= {f"blocks.{i}.ls{j}.scale_factor": (DIM,) for j in (1, 2)}
    return {prefix + name: shape for name, shape in shapes.items()}


def checkpoint_shapes():
    shapes = tower_shapes("vision_backbone.featurizer.", True)
    shapes |= tower_shapes("vision_backbone.fused_featurizer.", False)
    for name, shape in (("fc1", (64, 2 * DIM)), ("fc2", (16, 64)), ("fc3", (16, 16))):
        shapes |= {f"projector.{name}.weight": shape, f"projector.{name}.bias": shape[:1]}
    for i in range(2):
        layer = f"language_model.model.layers.{i}."
        attention = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()}
        mlp = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
        shapes |= {f"{layer}mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{layer}{name}.weight": (16,) for name in ("input_layernorm", "post_attention_layernorm")}
    head = {"model.embed_tokens": (320, 16), "lm_head": (320, 16), "model.norm": (16,)}
    return shapes | {f"language_model.{name}.weight": shape for name, shape in head.items()}


STATS = {"action": {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "mask": [True, False]}}
PROPRIO = {"action": {"q01": [0.0], "q99": [3.0]}, "proprio": {"q01": [-1.0], "q99": [4.0]}}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in checkpoint_shapes().items()}


def write(folder, tensors, norm_stats=None, **fields):
    """Writes the folder in two shards."""
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")
    description = {
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_sizes": [224, 224],
        "pad_to_multiple_of": 64,
        "text_config": {"vocab_size": 32064},
        "torch_dtype": "bfloat16",
        "norm_stats": norm_stats or {"robot": STATS},
    }
    (folder / "config.json").write_text(json.dumps(description | fields))


def load(folder):
    return load_openvla(folder, jax.random.key(0), config=small_config())


def test_every_tensor_lands_where_it_belongs(tmp_path, tensors):
    write(tmp_path, tensors)
    params = load(tmp_path).params
    qkv = tensors["vision_backbone.featurizer.blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(params["dino"]["blocks"]["qkv"]["kernel"][1].reshape(DIM, -1), qkv.T)
    # Head 1 of the keys: rows [D + 4, D + 8) of the fused weight.
    np.testing.assert_array_equal(params["dino"]["blocks"]["qkv"]["kernel"][1, :, 1, 1], qkv[DIM + 4 : DIM + 8].T)
    out = tensors["language_model.model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["llm"]["layers"]["o_proj"]["kernel"][1, 1], out[:, 8:].T)
    conv = tensors["vision_backbone.fused_featurizer.patch_embed.proj.weight"]
    np.testing.assert_array_equal(params["siglip"]["patch_embed"]["kernel"][2, 5, 1], conv[:, 1, 2, 5])
    np.testing.assert_array_equal(params["llm"]["lm_head"]["kernel"], tensors["language_model.lm_head.weight"].T)
    assert params["dino"]["blocks"]["ls1"].shape == (2, DIM)
    assert params["value_head"]["layer_0"]["kernel"].shape == (16, 512)


def test_what_never_runs_is_kept_aside(tmp_path, tensors):
    write(tmp_path, tensors)
    unused = load(tmp_path).unused
    np.testing.assert_array_equal(
        unused["vision_backbone.fused_featurizer.attn_pool.latent"],
        tensors["vision_backbone.fused_featurizer.attn_pool.latent"],
    )
    assert "vision_backbone.featurizer.blocks.2.attn.qkv.weight" in unused
    assert "vision_backbone.featurizer.blocks.1.attn.qkv.weight" not in unused


def test_bfloat16_checkpoints_keep_their_bits(tmp_path, tensors):
    dtype = jax.numpy.dtype("bfloat16")
    write(tmp_path, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    base = small_config()
    config = dataclasses.replace(base, execution=dataclasses.replace(base.execution, param_dtype="bfloat16"))
    params = load_openvla(tmp_path, jax.random.key(0), config=config).params
    expected = tensors["projector.fc1.weight"].astype(dtype).T
    assert params["projector"]["fc1"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(params["projector"]["fc1"]["kernel"], expected)


def test_one_error_lists_everything_that_does_not_fit(tmp_path, tensors):
    del tensors["projector.fc2.bias"], tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    tensors["projector.fc4.weight"] = np.zeros((2, 2), np.float32)
    tensors["language_model.lm_head.weight"] = np.zeros((320, 17), np.float32)
    write(tmp_path, tensors)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    for part in (
        "4 tensor(s) do not fit",
        "missing projector.fc2.bias (16,)",
        "missing language_model.model.layers.1.mlp.up_proj.weight (24, 16)",
        "unknown projector.fc4.weight",
        "language_model.lm_head.weight: got shape (320, 17), expected (320, 16)",
    ):
        assert part in message


def test_config_of_the_published_model(tmp_path, tensors):
    write(tmp_path, tensors)
    config = read_config(tmp_path)
    assert config == openvla_7b(tokenizer=str(tmp_path))
    write(tmp_path, tensors, timm_model_ids=["a", "b"])
    with pytest.raises(ValueError, match=re.escape("timm_model_ids: got ['a', 'b'], expected")):
        read_config(tmp_path)


def test_statistics_of_one_data_set(tmp_path, tensors):
    write(tmp_path, tensors)
    stats = read_norm_stats(tmp_path)
    np.testing.assert_array_equal(stats.action_q99, [1.0, 2.0])
    np.testing.assert_array_equal(stats.action_mask, [True, False])
    assert stats.state_q01.shape == (0,)
    # A side file adds to config.json, and several data sets ask for a name.
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"mine": PROPRIO}))
    with pytest.raises(ValueError, match=re.escape("unnorm_key: got None, expected one of ['mine', 'robot']")):
        read_norm_stats(tmp_path)
    mine = read_norm_stats(tmp_path, unnorm_key="mine", state_dim=1)
    np.testing.assert_array_equal(mine.state_q99, [4.0])
    np.testing.assert_array_equal(mine.action_mask, [True])
