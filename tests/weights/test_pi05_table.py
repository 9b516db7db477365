"""The table of pi0.5's tensors: at full size against the published names and shapes, and there and back, bit by bit."""

import math

import jax
import numpy as np
import pi05_files
import pytest
from flax.traverse_util import flatten_dict
from openvla_files import random_bits
from pi05_files import FULL, SMALL, bits

from stare_jax.models.blank import leaf_shapes
from stare_jax.models.pi05.presets import pi05_base
from stare_jax.weights.files import list_file
from stare_jax.weights.heads import OUR_OWN
from stare_jax.weights.pi05_formats import PORT
from stare_jax.weights.pi05_port import EMBEDDINGS, UNUSED, tensor_table
from stare_jax.weights.tensor_table import (
    checkpoint_shape,
    read_leaf,
    read_tree,
    table_specs,
    table_values,
    to_ours,
)

NUM_PARAMS = 3_353_433_872


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_full_size_has_the_published_names_shapes_and_count():
    config = pi05_base()
    specs = table_specs(tensor_table(config), config, "float32") | PORT.unused(config, "float32")
    ours = {path: leaf.shape for path, leaf in leaf_shapes(config).items() if not path.startswith(OUR_OWN)}
    assert ours == pi05_files.tree_shapes(FULL) and len(ours) == pi05_files.NUM_LEAVES
    assert sum(map(math.prod, ours.values())) == NUM_PARAMS
    # Arrays without memory, of which the converter of the tests makes tensors at small depths.
    shallow = FULL._replace(tower=(1152, 2, 4304, 16), depth=2, vocab=8)
    tree = {name: np.broadcast_to(np.float16(0), shape) for name, shape in pi05_files.tree_shapes(shallow).items()}
    expected = shapes_of(pi05_files.to_port(tree))
    got = {name: spec.shape for name, spec in specs.items()}
    assert len(got) == pi05_files.NUM_TENSORS + 1 and got.pop(UNUSED) == (257152, 1024)
    assert got.pop(EMBEDDINGS[0]) == (257152, 2048) and expected.pop(EMBEDDINGS[0]) == (8, 2048)
    assert expected.items() <= got.items()
    deeper = {name for name in got if any(f".layers.{i}." in name for i in range(2, 27))}
    assert got.keys() - deeper == expected.keys() and len(deeper) == 25 * 16 + 16 * 9 + 16 * 11


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_every_bit_is_the_same(tmp_path, dtype):
    shapes = pi05_files.tree_shapes(SMALL)
    config = pi05_files.model_config()
    table, leaves = tensor_table(config), random_bits(shapes, dtype)
    specs = table_specs(table, config, dtype)
    tensors = dict(table_values(table, leaves.__getitem__, specs))
    assert bits(tensors) == bits(pi05_files.to_port(leaves))
    pi05_files.write_port(tmp_path, {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    stored = list_file(tmp_path / "model.safetensors")
    wanted = {path: jax.ShapeDtypeStruct(shape, leaves[path].dtype) for path, shape in shapes.items()}
    back = {"/".join(path): leaf for path, leaf in flatten_dict(read_tree(table, stored, wanted)).items()}
    assert bits(back) == bits(leaves)
    assert bits(dict(table_values(table, back.__getitem__, specs))) == bits(tensors)
    # Parts of a leaf, as devices hold them.
    path = "PaliGemma/llm/layers/attn/kv_einsum/w"
    part = (slice(1, 3), slice(0, 1), slice(None), slice(3, 9), slice(None))
    np.testing.assert_array_equal(
        read_leaf(table[path], wanted[path], stored, part).view(np.uint8), leaves[path][part].copy().view(np.uint8)
    )


def test_rearranging_is_a_view():
    for shape, kind in (((2, 6, 4), "per_head"), ((1, 5, 4), "leading")):
        tensor = np.arange(math.prod(shape)).reshape(checkpoint_shape(shape, kind))
        assert to_ours(tensor, shape, kind).shape == shape
        assert np.shares_memory(to_ours(tensor, shape, kind), tensor)
