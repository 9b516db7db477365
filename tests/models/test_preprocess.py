"""Resizers against the libraries whose numbers they promise, the crop against NumPy and TensorFlow, normalisation."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from nano_policy import jit, nano_config
from PIL import Image

from stare_jax.models.openvla.network import preprocess
from stare_jax.models.preprocess import Resize, crop_center, resize_image

resize = jit(resize_image, static_argnums=(1, 2))
crop = jit(crop_center, static_argnums=1)
LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC

RESIZERS = get_args(Resize)


def picture(height, width):
    """Noise, a smooth half, and the hardest of edges: uint8 `[H, W, 3]`."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width // 2)[None, :, None]
    image[height // 3 :, : width // 2] = ramp
    image[2 * height // 3 :, width // 2 :] = 255 * (np.arange(width - width // 2) // 5 % 2)[None, :, None]
    return image.astype(np.uint8)


def pil(image, size):
    return np.asarray(Image.fromarray(image).resize((size, size), BICUBIC))


def pil_in_floats(image, size):
    """Lanczos in one piece, as TensorFlow's: of bytes, PIL would make bytes between its passes."""
    planes = [Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), LANCZOS) for c in range(3)]
    return np.clip(np.round(np.stack(planes, axis=-1)), 0, 255)


def torch_bicubic(image, size):
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    out = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return out[0].permute(1, 2, 0).numpy()


def opencv_area(image, size):
    cv2 = pytest.importorskip("cv2")
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


LIBRARY = {"bicubic": pil, "bicubic_float": torch_bicubic, "lanczos3": pil_in_floats, "area": opencv_area}


def assert_same(got, expected, name):
    """PIL's bytes exactly, floats to a hundredth of a grey level, other bytes up to the rounding of halves."""
    difference = np.abs(np.asarray(got, np.float64) - expected)
    if name == "bicubic":
        assert difference.max() == 0
    elif name == "bicubic_float":
        assert difference.max() < 0.01
    else:
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


# 480/224 and 640/224 are no whole numbers, nor is a quotient of two primes; 2 and 3 are.
@pytest.mark.parametrize(("height", "width", "size"), [(480, 640, 224), (131, 173, 64), (128, 192, 64)])
@pytest.mark.parametrize("name", RESIZERS)
def test_numbers_are_those_of_the_library(name, height, width, size):
    image = picture(height, width)
    got = resize(image[None], size, name)
    assert got.dtype == np.float32 and got.shape == (1, size, size, 3)
    assert_same(got[0], LIBRARY[name](image, size), name)


@pytest.mark.parametrize("name", ["bicubic", "bicubic_float", "lanczos3"])
def test_images_are_enlarged_as_by_the_library(name):
    image = picture(31, 40)
    assert_same(resize(image[None], 56, name)[0], LIBRARY[name](image, 56), name)


def test_resizers_differ_and_only_floats_overshoot():
    image = picture(131, 173)[None]
    results = {name: np.asarray(resize(image, 64, name)) for name in RESIZERS}
    for i, name in enumerate(RESIZERS):
        for other in RESIZERS[i + 1 :]:
            assert np.abs(results[name] - results[other]).max() > 5, (name, other)
        if name != "bicubic_float":
            np.testing.assert_array_equal(results[name], np.clip(np.round(results[name]), 0, 255))
    assert results["bicubic_float"].min() < -5 and results["bicubic_float"].max() > 260


@pytest.mark.parametrize("name", RESIZERS)
def test_images_of_the_right_size_stay_as_they_are(name):
    image = picture(16, 16)[None]
    np.testing.assert_array_equal(resize(image, 16, name), image)


def test_area_does_not_enlarge():
    with pytest.raises(ValueError, match="resize: got 'area' from 16 to 28 pixels, expected a larger image"):
        resize_image(np.zeros((1, 32, 16, 3), np.uint8), 28, "area")


def sampled(image, side):
    """The middle of a square image, one new pixel after another, by the weights of the four around it."""
    last, start = len(image) - 1, (1 - side) / 2 * (len(image) - 1)
    out = np.zeros(image.shape)
    for i in range(len(image)):
        for j in range(len(image)):
            y, x = start + i * side, start + j * side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, last), min(left + 1, last)
            upper = image[top, left] + (x - left) * (image[top, right] - image[top, left])
            lower = image[bottom, left] + (x - left) * (image[bottom, right] - image[bottom, left])
            out[i, j] = upper + (y - top) * (lower - upper)
    return np.floor(out / 255 * 255.5)


def test_the_middle_is_cropped_as_computed_pixel_by_pixel():
    image = picture(40, 40).astype(np.float32)
    assert_same(crop(image[None], 0.9)[0], sampled(image, np.sqrt(0.9)), "bytes")
    # Of 41 pixels, the corners of the middle quarter are at 10 and at 30.
    quarter = crop(picture(41, 41)[None].astype(np.float32), 0.25)[0]
    np.testing.assert_array_equal(
        quarter[[0, 0, -1, -1], [0, -1, 0, -1]], picture(41, 41)[[10, 10, 30, 30], [10, 30, 10, 30]]
    )


def test_the_policy_resizes_then_crops_then_normalises_for_each_tower():
    config = nano_config(stem=(), image_size=16)
    dino = dataclasses.replace(config.dino, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    config = dataclasses.replace(config, dino=dino)
    image = picture(48, 64)
    for crops in (False, True):
        changed = dataclasses.replace(config, resize="lanczos3", center_crop=0.9) if crops else config
        for_dino, for_siglip = jit(preprocess, static_argnums=1)(image[None], changed)
        grey = sampled(pil_in_floats(image, 16), np.sqrt(0.9)) if crops else pil(image, 16)
        assert_same((for_siglip[0] + 1) * 127.5, grey, "bicubic_float")
        np.testing.assert_allclose(for_dino[0], (grey / 255 - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3], atol=1e-4)


@pytest.mark.slow
def test_lanczos_and_crop_are_tensorflows():
    tf = pytest.importorskip("tensorflow")
    for height, width, size in ((480, 640, 224), (131, 173, 64), (31, 40, 56)):
        image = picture(height, width)[None]
        expected = tf.round(tf.image.resize(image, (size, size), method="lanczos3", antialias=True))
        expected = tf.cast(tf.clip_by_value(expected, 0, 255), tf.uint8)
        assert_same(resize(image, size, "lanczos3"), expected.numpy(), "lanczos3")
        start = (1 - np.sqrt(0.9)) / 2
        unit = tf.image.convert_image_dtype(expected, tf.float32)
        box = [[start, start, 1 - start, 1 - start]]
        unit = tf.clip_by_value(tf.image.crop_and_resize(unit, box, [0], (size, size)), 0, 1)
        cropped = tf.image.convert_image_dtype(unit, tf.uint8, saturate=True)
        assert_same(crop(expected.numpy().astype(np.float32), 0.9), cropped.numpy(), "bytes")
