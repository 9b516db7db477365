"""Arrays across the border between PyTorch and JAX, by DLPack.

The copy rule: a simulator reuses its buffers, and an array imported by DLPack is a view of them, so an import that did
not copy would change with the next step. Both directions therefore copy, and return only when the copy is complete.
"""

from typing import Any

import jax
import jax.numpy as jnp


def torch_to_jax(tensor: Any) -> jax.Array:
    """Returns a JAX array with the tensor's values at this moment, on the same device.

    64-bit numbers become 32-bit ones unless JAX has been told otherwise (`jax_enable_x64`).

    Args:
        tensor: a `torch.Tensor` of any layout; gradients are left behind.
    """
    _wait(tensor)
    tensor = tensor.detach().contiguous()
    _wait(tensor)
    return jnp.array(jnp.from_dlpack(tensor), copy=True).block_until_ready()


def jax_to_torch(array: jax.Array) -> Any:
    """Returns a `torch.Tensor` of its own memory with the array's values, on the same device."""
    import torch

    tensor = torch.from_dlpack(array.block_until_ready()).clone()
    _wait(tensor)  # Afterwards JAX may use the array's memory for something else.
    return tensor


def _wait(tensor: Any) -> None:
    """Waits until all work on the tensor's device is done: simulators write from streams of their own."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)
