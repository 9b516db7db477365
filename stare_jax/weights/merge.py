"""Adapters put into the weights that they are beside, one leaf in memory at a time."""

from collections.abc import Collection

import jax
import numpy as np

from stare_jax.models.nn.lora import LoRAConfig, merge_adapters
from stare_jax.weights.tensor_table import Leaves, adapted_module, adapter_names


def merged_leaves(leaves: Leaves, adapted: Collection[str], lora: LoRAConfig) -> Leaves:
    """Returns parameters of the base model that compute the same as `leaves` with adapters at the paths `adapted`."""

    def merged(path: str) -> np.ndarray:
        names = adapter_names(path)
        if names[0] not in adapted:
            return leaves(path)
        kernel, a, b = leaves(path), leaves(names[0]), leaves(names[1])
        own = LoRAConfig(rank=a.shape[-1], alpha=lora.scale_of(adapted_module(path)) * a.shape[-1])
        if path.endswith("/kernel") and a.ndim + b.ndim == kernel.ndim + 2:
            return _merge(kernel, a, b, own)
        kernel = np.require(kernel, requirements="W")
        for i in range(len(kernel)):  # layer by layer, because the sum is taken in float32
            kernel[i] = _merge(kernel[i], a[i], b[i], own, name="kernel" if path.endswith("/kernel") else "w")
        return kernel

    return merged


def merge_tensor(weight: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig) -> np.ndarray:
    """Returns a linear layer's weight `[out, in]` with its adapters `[rank, in]` and `[out, rank]` in it."""
    return _merge(weight.T, a.T, b.T, lora).T


def _merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig, *, name: str = "kernel") -> np.ndarray:
    params = {"module": {name: kernel, "lora_a": a, "lora_b": b}}
    return jax.device_get(_merge_adapters(params, config=lora)["module"][name])


_merge_adapters = jax.jit(merge_adapters, static_argnames="config")
