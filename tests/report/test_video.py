import subprocess
import tracemalloc

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from stare_jax.report.timeline import Timeline
from stare_jax.report.video import MAX_SIDE, MIN_SIDE, annotate_frames, telling_steps, write_filmstrip, write_video

NAMES = ("reach", "grasp", "place")


def make_timeline(num_states=12):
    return Timeline(
        stage_t=np.repeat([0, 1, 2], [4, 3, num_states - 7]),
        potential_t=np.linspace(0, 1, num_states),
        success_t=np.arange(num_states) >= num_states - 2,
        reward_t=np.zeros(num_states - 1),
        shaped_reward_t=np.zeros(num_states - 1),
    )


@pytest.fixture
def frames():
    """Half red, half grey that brightens from frame to frame."""
    frames = np.zeros((12, 64, 64, 3), np.uint8)
    frames[:, :, :32] = (200, 30, 30)
    frames[:, :, 32:] = 20 * np.arange(12, dtype=np.uint8)[:, None, None, None]
    return frames


def decode(path, width, height):
    """Returns a film's frames and what ffmpeg says about it."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    result = subprocess.run(command, capture_output=True, check=True)
    return np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3), result.stderr.decode()


def test_video_can_be_decoded_again(tmp_path, frames):
    path = tmp_path / "videos/ppo_1.mp4"
    write_video(path, frames, make_timeline(), NAMES, fps=5, caption="seed 3")
    expected = list(annotate_frames(frames, make_timeline(), NAMES, caption="seed 3"))
    height, width, _ = expected[0].shape
    decoded, description = decode(path, width, height)
    for part in ("Video: h264", "yuv420p", f"{width}x{height}", "5 fps"):
        assert part in description
    assert len(decoded) == 12 + 5  # the last is held for a second
    # H.264 is lossy: compare patches well inside of plain areas.
    for got, drawn in zip(decoded, expected, strict=False):
        for x in (100, 300):
            np.testing.assert_allclose(got[300:320, x : x + 20].mean((0, 1)), drawn[310, x + 10], atol=6)


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1), (1, 1), (3, 700), (3000, 4000)])
def test_frames_of_odd_shapes_are_bounded_and_filmed(tmp_path, shape):
    frames = np.broadcast_to(np.uint8(99), (12, *shape, 3))
    picture = next(annotate_frames(frames, make_timeline(), NAMES))
    height, width, _ = picture.shape
    assert MIN_SIDE <= width <= MAX_SIDE and height <= MAX_SIDE + 100 and height % 2 == width % 2 == 0
    assert (picture == 99).all(axis=-1).any()  # The frame is in it.
    if shape[0] < 3:
        write_video(tmp_path / "a.mp4", frames, make_timeline(), NAMES, fps=1)
        write_filmstrip(tmp_path / "a.png", frames, make_timeline(), NAMES, num_frames=2)
        assert len(decode(tmp_path / "a.mp4", width, height)[0]) == 13


def test_a_film_is_made_a_picture_at_a_time(tmp_path, frames):
    """All 60 pictures at once are 30 MB."""
    long = np.broadcast_to(frames[:1], (60, 64, 64, 3))
    tracemalloc.start()
    write_video(tmp_path / "long.mp4", long, make_timeline(60), NAMES)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_frames_without_pixels_are_refused():
    with pytest.raises(ValueError, match="frames: got uint8"):
        next(annotate_frames(np.zeros((12, 0, 5, 3), np.uint8), make_timeline(), NAMES))


def test_frames_are_enlarged_without_smoothing(frames):
    picture = next(annotate_frames(frames, make_timeline(), NAMES))
    height, width, _ = picture.shape
    assert width == MIN_SIDE == 6 * 64 and height % 2 == 0
    np.testing.assert_array_equal(picture[height - MIN_SIDE :], frames[0].repeat(6, axis=0).repeat(6, axis=1))


def test_odd_frames_become_even():
    frames = np.zeros((12, 301, 401, 3), np.uint8)
    height, width, _ = next(annotate_frames(frames, make_timeline(), NAMES)).shape
    assert height % 2 == 0 and width % 2 == 0 and width >= 401


def test_header_changes_with_stage_potential_and_success(frames):
    pictures = list(annotate_frames(np.zeros_like(frames), make_timeline(), NAMES))
    header = [picture[:-MIN_SIDE].astype(int) for picture in pictures]
    # The bar of the potential grows: count its bright pixels below the stage's name.
    brightness = [(h[40:54] > 200).all(axis=-1).sum() for h in header]
    assert (np.diff(brightness) > 0).all()
    # The middle of the line with the stage's name is empty until success is written there.
    middle = [h[16:38, 140:250].max() for h in header]
    assert max(middle[:10]) < 60 and min(middle[10:]) > 120


def test_filmstrip_shows_the_telling_steps(tmp_path, frames):
    assert telling_steps(make_timeline(), 6) == [0, 2, 4, 7, 10, 11]  # ends, entries at 4 and 7, success at 10, a gap
    assert telling_steps(make_timeline(), 2) == [0, 11]
    path = tmp_path / "strip.png"
    write_filmstrip(path, frames, make_timeline(), NAMES, num_frames=4)
    one = next(annotate_frames(frames, make_timeline(), NAMES))
    with Image.open(path) as image:
        width, height = image.size
    assert width == 3 * one.shape[1] + 12 and height == 2 * one.shape[0] + 6


def test_frames_that_do_not_fit_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames: got uint8 \(5, 64, 64, 3\), expected uint8 \[>=12, H, W, 3\]"):
        list(annotate_frames(frames[:5], make_timeline(), NAMES))


def test_ffmpeg_says_why_it_failed(tmp_path, frames):
    with pytest.raises(RuntimeError, match="ffmpeg failed: .*"):
        write_video(tmp_path / "film.unknown", frames, make_timeline(), NAMES)
