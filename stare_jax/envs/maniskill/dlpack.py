"""Arrays across the border between PyTorch and JAX, by DLPack.

The copy rule: a simulator reuses its buffers, and an array imported by DLPack is a view of them, so an import that did
not copy would change with the next step. Both directions therefore copy, and return only when the copy is complete.
"""

from typing import Any

import jax
import jax.numpy as jnp

from stare_jax.types import PyTree


def torch_to_jax(tensors: PyTree) -> PyTree:
    """Returns JAX arrays with the tensors' values at this moment, on the same device.

    64-bit numbers become 32-bit ones unless JAX has been told otherwise (`jax_enable_x64`). A call waits twice, however
    many tensors there are: give it all of a state at once.

    Args:
        tensors: a pytree of `torch.Tensor`, of any layout and of one device; gradients are left behind.
    """
    # Simulators write from streams of their own, so all work on the device has to be over. What PyTorch does from here
    # on needs no waiting for: DLPack has the importing stream wait for the exporting one.
    _wait(jax.tree.leaves(tensors)[0])
    return jax.block_until_ready(jax.tree.map(_copied, tensors))


def jax_to_torch(array: jax.Array) -> Any:
    """Returns a `torch.Tensor` of its own memory with the array's values, on the same device."""
    import torch

    tensor = torch.from_dlpack(array.block_until_ready()).clone()
    _wait(tensor)  # Afterwards JAX may use the array's memory for something else.
    return tensor


def _copied(tensor: Any) -> jax.Array:
    return jnp.array(jnp.from_dlpack(tensor.detach().contiguous()), copy=True)


def _wait(tensor: Any) -> None:
    """Waits until all work on the tensor's device is done."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)
