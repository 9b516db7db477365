import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from stare_jax.envs.maniskill.dlpack import jax_to_torch, torch_to_jax


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool, torch.int32, torch.bfloat16])
def test_import_survives_the_next_write(dtype):
    tensor = torch.ones((64, 3), dtype=dtype)
    array = torch_to_jax(tensor)
    tensor.zero_()
    assert isinstance(array, jax.Array)
    np.testing.assert_array_equal(np.asarray(array, np.float32), np.ones((64, 3)))


def test_a_whole_tree_is_imported_at_once():
    tensors = {"a": torch.ones(3), "b": (torch.zeros(2, 2), torch.arange(4)[::2])}
    arrays = torch_to_jax(tensors)
    for tensor in jax.tree.leaves(tensors):
        tensor.fill_(7)
    jax.tree.map(np.testing.assert_array_equal, arrays, {"a": np.ones(3), "b": (np.zeros((2, 2)), np.array([0, 2]))})


def test_the_rule_is_needed():
    tensor = torch.ones(64)
    view = jnp.from_dlpack(tensor)
    tensor.zero_()
    assert not np.asarray(view).any()


def test_views_and_gradients():
    tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    np.testing.assert_array_equal(torch_to_jax(tensor.T), [[0, 3], [1, 4], [2, 5]])


def test_export_is_a_copy():
    array = jnp.arange(4.0)
    tensor = jax_to_torch(array)
    tensor += 1
    np.testing.assert_array_equal(array, [0, 1, 2, 3])
    assert tensor.tolist() == [1, 2, 3, 4]
