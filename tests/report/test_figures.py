import numpy as np
from PIL import Image

from stare_jax.evaluate.intervals import wilson_interval
from stare_jax.report.figures import PALETTE, dark_path, draw_curves, draw_rates, draw_timeline, metric_curves
from stare_jax.report.timeline import Timeline

TIMELINE = Timeline(
    stage_t=np.repeat([0, 1, 2], [10, 10, 20]),
    potential_t=np.linspace(0, 1, 40),
    success_t=np.arange(40) >= 30,
    reward_t=np.zeros(39),
    shaped_reward_t=np.where(np.arange(39) < 30, 0.02, np.nan),
)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_timeline_has_a_band_a_stage(tmp_path):
    path = tmp_path / "figures/timeline.png"
    draw_timeline(TIMELINE, ("reach", "grasp", "place"), path, title="seed 3")
    image = pixels(path)
    height, width, _ = image.shape
    row = image[int(0.55 * height)]  # through the potential's panel
    for k, share in ((0, 0.25), (1, 0.25), (2, 0.5)):
        colour = np.array([int(PALETTE[k][i : i + 2], 16) for i in (1, 3, 5)])
        band = 0.22 * colour + 0.78 * 255
        num_pixels = (np.abs(row - band).max(axis=1) <= 3).sum()
        # The axes span about nine tenths of the figure; grid lines and the curve take a little away.
        assert abs(num_pixels / (0.9 * width) - share) < 0.06


def test_figures_come_for_light_and_dark_pages(tmp_path):
    path = tmp_path / "rates.png"
    rates = {"sft": [wilson_interval(5, 10), wilson_interval(0, 0)], "ppo": [wilson_interval(9, 10)] * 2}
    draw_rates(["any step", "end"], rates, path, title="Success")
    assert pixels(path)[0, 0].min() > 250 and pixels(dark_path(path))[0, 0].max() < 50
    assert dark_path("a/b.png").as_posix() == "a/b_dark.png"


def test_curves_show_what_tells_most_and_leave_out_the_rest(tmp_path):
    lines = [
        {
            "step": s,
            "phase": "ppo",
            "ppo/loss": 1 / (s + 1),
            "env/success": s / 50,
            "time/env_s": s,
            "env/num_episodes": s,
        }
        for s in range(50)
    ]
    lines += [{"step": 1, "phase": "sft", "wall_time": 0.0, "sft/loss": 1.0}]
    names = draw_curves(lines, "ppo", tmp_path / "ppo.png")
    assert names == ["env/success", "ppo/loss"] and (tmp_path / "ppo.png").exists()
    assert draw_curves(lines, "sft", tmp_path / "sft.png") == []  # one point is no curve
    assert not (tmp_path / "sft.png").exists()


def test_curves_survive_values_that_are_not_finite(tmp_path):
    lines = [{"step": s, "phase": "sft", "wall_time": 0.0, "sft/loss": np.nan} for s in range(60)]
    assert draw_curves(lines, "sft", tmp_path / "sft.png") == ["sft/loss"]


def test_steps_that_were_repeated_after_a_resume_count_once():
    lines = [{"step": s, "phase": "sft", "wall_time": 0.0, "sft/loss": value} for s, value in ((1, 5.0), (2, 6.0))]
    lines += [{"step": 2, "phase": "sft", "wall_time": 1.0, "sft/loss": 7.0}]
    assert metric_curves(lines, "sft") == {"sft/loss": {1: 5.0, 2: 7.0}}


def test_frames_are_framed_in_the_colour_of_their_stage(tmp_path):
    path = tmp_path / "timeline.png"
    frames = {t: np.full((8, 12, 3), 40, np.uint8) for t in (0, 15, 39)}
    draw_timeline(TIMELINE, ("reach", "grasp", "place"), path, frames=frames)
    image = pixels(path)
    strip = image[: int(0.22 * len(image))]
    assert (np.abs(strip - 40).max(axis=-1) < 3).mean() > 0.3
    for k in range(3):
        colour = np.array([int(PALETTE[k][i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(strip - colour).max(axis=-1) <= 3).sum() > 100
