"""Images that are drawn large: their shape, and resizers that give the numbers of those before the vision towers."""

import numpy as np
import pytest

from stare_jax.envs import EnvConfig
from stare_jax.envs.maniskill.shrinking import shrink
from stare_jax.models.preprocess import kernel_weights, lanczos3_kernel, resize_image, resize_with_pad

CUBES = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"


@pytest.fixture
def image():
    """Smooth, with edges at which Lanczos overshoots, and without the alpha channel that a camera gives."""
    y, x = np.mgrid[:48, :64]
    waves = 120 + 100 * np.sin(x / 5)[..., None] * np.cos(y[..., None] / np.array([3, 4, 7, 9]))
    waves[10:30, 20:40] = 255
    waves[20:40, 30:50] = 0
    return waves.astype(np.uint8)[..., :3]


def test_lanczos_is_that_of_imported_data(image):
    rows, columns = (kernel_weights(old, 20, lanczos3_kernel) for old in (48, 64))
    expected = np.einsum("hwc,vh,uw->vuc", image.astype(float), rows, columns)
    assert expected.min() < -1 and expected.max() > 256
    found = shrink(image, (20, 20), "lanczos3")
    assert found.dtype == np.uint8 and np.abs(found - expected.clip(0, 255)).max() < 0.5 + 1e-3


def test_the_others_are_those_of_the_policies(image):
    squashed = resize_image(image[None], 20, "bicubic")[0]
    np.testing.assert_array_equal(shrink(image, (20, 20), "bicubic"), squashed)
    padded = resize_with_pad(image[None], 32)[0]
    np.testing.assert_array_equal(shrink(image, (24, 32), "bilinear"), padded[4:28])
    assert shrink(image, (48, 64), "bilinear") is image


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({}, ((64, 64), (64, 64))),
        ({"render_size": 128}, ((64, 64), (128, 128))),
        ({"render_size": 128, "image_width": 96}, ((64, 96), (128, 192))),  # this camera sees more to its sides
        ({"env_id": CUBES, "image_size": 224, "render_size": 480}, ((224, 224), (480, 640))),
        ({"env_id": CUBES, "image_size": 168, "image_width": 224, "render_size": 168}, ((168, 224), (168, 224))),
    ],
)
def test_images_are_drawn_in_the_cameras_proportions(settings, shapes):
    config = EnvConfig(**settings)
    assert (config.image_shape, config.drawn_shape) == shapes
    # Data of images that are not drawn larger are as they were before that could be.
    told = {name: config.data_settings.get(name) for name in ("drawn_shape", "resize")}
    is_larger = "render_size" in settings
    assert told == {"drawn_shape": list(shapes[1]) if is_larger else None, "resize": "lanczos3" if is_larger else None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"render_size": 48}, "render_size: got 48, 48 x 48 pixels, expected 0, or no less than 64 x 64, the"),
        (
            {"render_size": 64, "image_size": 0},
            "render_size: got 64 with image_size 0, expected 0, as noth",
        ),
        (
            {"env_id": CUBES, "image_width": 96, "render_size": 64},
            "got 64, 64 x 85 pixels, expected 0, or no les",
        ),
        ({"backend": "cuda", "num_workers": 1, "render_size": 99}, "backend: got 'cuda' with render_size 99, expected"),
        ({"render_size": -1}, "render_size: got -1"),
        ({"resize": "area"}, "resize: got 'area', expected one of"),
    ],
)
def test_images_that_cannot_be_made_smaller_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(**settings)
