"""Images that are drawn large and made smaller, by the resizers that the images of other people's data went through."""

from typing import Literal

import numpy as np

ShrinkName = Literal["lanczos3", "bicubic", "bilinear"]
"""Names of resizers, all of them with antialias; those that `models/preprocess.py` has, too, mean the same there."""


def shrink(image: np.ndarray, size: tuple[int, int], resize: ShrinkName) -> np.ndarray:
    """Resizes an image to another height and width, squeezing it where the proportions differ.

    "bicubic" and "bilinear" are PIL's, bytes after each of the two passes, as Hugging Face's processor and openpi have
    them. "lanczos3" is rounded and clipped at the end alone, as TensorFlow's is.

    Args:
        image: uint8 `[H, W, 3]`.
        size: (height, width) of the result.
        resize: name of the resizer.

    Returns:
        uint8 `[height, width, 3]`; the image itself where it has that size.
    """
    from PIL import Image

    if image.shape[:2] == size:
        return image
    if resize != "lanczos3":
        kernel = Image.Resampling[resize.upper()]
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], kernel))
    # PIL keeps floating-point numbers between its passes, one channel at a time.
    channels = np.moveaxis(image, -1, 0).astype(np.float32)
    smaller = [Image.fromarray(channel).resize(size[::-1], Image.Resampling.LANCZOS) for channel in channels]
    return np.stack(smaller, axis=-1).round().clip(0, 255).astype(np.uint8)
