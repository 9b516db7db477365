"""Camera images before the vision towers: resized, cropped on request, normalised.

Four resizers are in use for OpenVLA, which differ by some grey levels at edges. `OpenVLAConfig.resize` selects one by
name; all of them squash the image to a square, whatever its aspect ratio:

| name            | is                                                                       | of                      |
|-----------------|--------------------------------------------------------------------------|-------------------------|
| "bicubic"       | PIL's bicubic: bytes after each of its two passes                        | Hugging Face processor  |
| "bicubic_float" | torch's bicubic with antialias: neither rounded nor clipped              | RL4VLA, RLinf           |
| "lanczos3"      | TensorFlow's Lanczos-3 with antialias: rounded and clipped at the end    | training data           |
| "area"          | OpenCV's INTER_AREA: means of areas, rounded; shrinks only               | GRAPE                   |

"bicubic" is PIL to the last bit; the others are their libraries up to the rounding of halves. RL4VLA keeps the result
of "bicubic_float" in bfloat16, whose steps above 128 are whole grey levels; here it is float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Resize = Literal["bicubic", "bicubic_float", "lanczos3", "area"]

_PIL_BITS = 22
_OPENCV_LEAST_OVERLAP = 1e-3


def resize_image(image: jax.Array, size: int, resize: Resize) -> jax.Array:
    """Resizes images to a square; images of that size stay as they are.

    Args:
        image: uint8 `[B, H, W, 3]`.
        size: pixels of a side.
        resize: name of the resizer, see above.

    Returns:
        float32 `[B, size, size, 3]` in grey levels: whole numbers in [0, 255], but for "bicubic_float".

    Raises:
        ValueError: "area" would have to enlarge an image.
    """
    pixels = image.astype(jnp.float32)
    height, width = image.shape[1:3]
    if (height, width) == (size, size):
        return pixels
    if resize == "area":
        return _round_half_to_even(_apply(pixels, area_weights(height, size), area_weights(width, size)))
    if resize == "lanczos3":
        weights = (kernel_weights(length, size, lanczos3_kernel) for length in (height, width))
        return _round_half_to_even(_apply(pixels, *weights))
    rows, columns = (kernel_weights(length, size, cubic_kernel) for length in (height, width))
    if resize == "bicubic_float":
        return _apply(pixels, rows, columns)
    return _pass_of_pil(_pass_of_pil(pixels, columns, _apply_columns), rows, _apply_rows)


def resize_with_pad(image: jax.Array, size: int) -> jax.Array:
    """Resizes images to fit into a square, their aspect ratio kept, and pads with black, as openpi does.

    PIL's bilinear filter, bytes after each of its two passes; the odd pixel of padding is below or right.

    Args:
        image: uint8 `[B, H, W, 3]`.
        size: pixels of a side.

    Returns:
        float32 `[B, size, size, 3]`, whole numbers in [0, 255].
    """
    pixels = image.astype(jnp.float32)
    height, width = image.shape[1:3]
    ratio = max(height, width) / size
    new_height, new_width = int(height / ratio), int(width / ratio)
    if (new_height, new_width) != (height, width):
        rows, columns = (
            kernel_weights(old, new, triangle_kernel) for old, new in ((height, new_height), (width, new_width))
        )
        pixels = _pass_of_pil(_pass_of_pil(pixels, columns, _apply_columns), rows, _apply_rows)
    (top, bottom), (left, right) = (((size - n) // 2, (size - n + 1) // 2) for n in (new_height, new_width))
    return jnp.pad(pixels, ((0, 0), (top, bottom), (left, right), (0, 0)))


def crop_center(pixels: jax.Array, area: float) -> jax.Array:
    """Cuts out the middle and enlarges it to the image's size, bilinearly, as OpenVLA's evaluations do.

    Checkpoints trained on random crops of 0.9 of the image are evaluated on the middle 0.9.

    Args:
        pixels: float32 `[B, S, S, 3]` in grey levels.
        area: share of the image's area that is kept, in (0, 1]; 1 crops nothing.

    Returns:
        float32 `[B, S, S, 3]`, whole numbers in [0, 255]: cut off to bytes the way TensorFlow converts floats.
    """
    if area == 1.0:
        return pixels
    weights = crop_weights(pixels.shape[1], math.sqrt(area))
    unit = jnp.clip(_apply(pixels, weights, weights) / 255.0, 0.0, 1.0)
    return jnp.floor(unit * 255.5)


def normalize_image(pixels: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns `(x / 255 - mean) / std` by channel, float32, of grey levels `[..., 3]`."""
    return (pixels / 255.0 - np.float32(mean)) / np.float32(std)


def cubic_kernel(x: np.ndarray) -> np.ndarray:
    """Returns Keys' cubic with a = -1/2, which PIL uses, and torch where it antialiases; zero beyond 2."""
    x = np.abs(x)
    inner, outer = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def triangle_kernel(x: np.ndarray) -> np.ndarray:
    """Returns 1 - |x|, zero beyond 1: bilinear interpolation."""
    return np.maximum(1.0 - np.abs(x), 0.0)


def lanczos3_kernel(x: np.ndarray) -> np.ndarray:
    """Returns sinc(x) sinc(x / 3), zero beyond 3."""
    return np.where(np.abs(x) < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


def kernel_weights(num_in: int, num_out: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns float64 `[num_out, num_in]`: the share of each pixel in each new one, rows summing to 1.

    Where the image shrinks, the kernel is as much wider (antialias); at the border it is cut off.

    Args:
        num_in: pixels along an axis.
        num_out: new pixels along it.
        kernel: weight by distance in pixels.
    """
    scale = num_in / num_out
    center = (np.arange(num_out) + 0.5) * scale
    weights = kernel((np.arange(num_in) + 0.5 - center[:, None]) / max(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def area_weights(num_in: int, num_out: int) -> np.ndarray:
    """Returns float64 `[num_out, num_in]`: the share of each pixel in the area that each new one covers.

    Raises:
        ValueError: there are fewer pixels than new ones, where OpenCV does something else under the same name.
    """
    if num_in < num_out:
        raise ValueError(f"resize: got 'area' from {num_in} to {num_out} pixels, expected a larger image")
    scale = num_in / num_out
    edges = np.arange(num_out + 1) * scale
    start, stop = edges[:-1, None], edges[1:, None]
    overlap = np.minimum(np.arange(1, num_in + 1), stop) - np.maximum(np.arange(num_in), start)
    return np.where(overlap > _OPENCV_LEAST_OVERLAP, overlap, 0.0) / scale


def crop_weights(size: int, side: float) -> np.ndarray:
    """Returns float64 `[size, size]`: bilinear samples, evenly spaced over the middle `side` of an axis, ends included.

    Args:
        size: pixels along the axis.
        side: share of the axis that is kept, in (0, 1].
    """
    position = (size - 1) * (1.0 - side) / 2.0 + np.arange(size) * side
    return np.maximum(1.0 - np.abs(position[:, None] - np.arange(size)), 0.0)


def _apply(pixels: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    return _apply_rows(_apply_columns(pixels, columns), rows)


# In full float32: accelerators' default precision is a grey level off.
def _apply_columns(pixels: jax.Array, weights: np.ndarray) -> jax.Array:
    return jnp.einsum("bhwc,vw->bhvc", pixels, np.float32(weights), precision=jax.lax.Precision.HIGHEST)


def _apply_rows(pixels: jax.Array, weights: np.ndarray) -> jax.Array:
    return jnp.einsum("bhwc,vh->bvwc", pixels, np.float32(weights), precision=jax.lax.Precision.HIGHEST)


def _pass_of_pil(pixels: jax.Array, weights: np.ndarray, apply: Callable) -> jax.Array:
    """Sums bytes times weights of 22 bits and rounds to bytes, all of it exactly.

    The sums have 30 bits: float32 products hold them in two pieces.
    """
    fixed = np.round(weights * 2**_PIL_BITS)
    half = 2 ** (_PIL_BITS // 2)
    high = np.round(fixed / half)
    total = apply(pixels, high).astype(jnp.int32) * half + apply(pixels, fixed - high * half).astype(jnp.int32)
    return jnp.clip((total + 2 ** (_PIL_BITS - 1)) >> _PIL_BITS, 0, 255).astype(jnp.float32)


def _round_half_to_even(pixels: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(pixels), 0.0, 255.0)
