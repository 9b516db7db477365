"""Toys as the simulators of a run: named as tasks are, seen as pictures, drawn without a graphics driver."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.envs import EnvConfig, ToyEnv, make_expert, make_vec_env, toy
from stare_jax.envs.state import low_dim_state
from stare_jax.envs.toys import CAMERA, TOY_TASKS
from stare_jax.envs.toys.drawing import View, box, disc, draw

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
SQUARE = View(left=0.0, bottom=0.0, side=1.0)


def covered(picture, colour=RED):
    """Returns the share of a picture that one shape covers, whose colour the background does not have."""
    background = np.asarray(draw([disc((9.0, 9.0), 0.1, colour)], SQUARE, 1, 1))[0, 0].astype(float)
    return ((picture - background) / (255 * np.array(colour) - background)).mean()


# ---- Drawing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        (disc((0.5, 0.5), 0.2, RED), np.pi * 0.2**2),
        (box((0.5, 0.5), 0.3, 0.1, RED), 0.12),
        (box((0.5, 0.5), 0.3, 0.1, RED, 0.7), 0.12),
        (disc((1.0, 0.5), 0.2, RED), np.pi * 0.2**2 / 2),
    ],
    ids=["disc", "box", "turned box", "half outside"],
)
def test_a_shape_covers_its_area(shape, area):
    assert covered(draw([shape], SQUARE, 96, 96).astype(float)) == pytest.approx(area, rel=0.02)


def test_the_first_row_is_the_top_and_later_shapes_are_in_front():
    picture = draw([disc((0.25, 0.75), 0.2, RED), disc((0.25, 0.75), 0.1, BLUE)], SQUARE, 40, 40)
    assert picture.dtype == jnp.uint8 and picture.shape == (40, 40, 3)
    np.testing.assert_array_equal(picture[10, 10], [0, 0, 255])
    np.testing.assert_array_equal(picture[10, 4], [255, 0, 0])
    np.testing.assert_array_equal(picture[30, 10], draw([disc((9, 9), 0.1, RED)], SQUARE, 1, 1)[0, 0])


def test_a_box_turns_counter_clockwise_and_less_than_a_pixel_is_seen():
    picture = draw([box((0.5, 0.5), 0.4, 0.05, RED, np.pi / 4)], SQUARE, 40, 40)
    np.testing.assert_array_equal(picture[10, 29], [255, 0, 0])
    assert picture[10, 10, 1] > 200
    first, second = (draw([disc((x, 0.5), 0.1, RED)], SQUARE, 40, 40) for x in (0.5, 0.505))
    assert (first != second).any()


# ---- Simulators -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", TOY_TASKS)
def test_a_run_finds_toys_by_name_and_their_experts_succeed_in_them(env_id):
    config = EnvConfig(env_id, num_workers=2, envs_per_worker=3, image_size=32, use_state="low_dim")
    expert, toy_task = make_expert(env_id), TOY_TASKS[env_id]
    with contextlib.closing(make_vec_env(config)) as env:
        assert (env.num_envs, env.horizon, env.action_dim) == (6, toy_task.horizon, toy_task.action_dim)
        now, has_succeeded = env.reset(range(6)), np.zeros(6, bool)
        pictures = [now.observation.images[CAMERA]]
        for _ in range(env.horizon):
            rows = [jax.tree.map(lambda leaf, row=row: leaf[row], now.signals) for row in range(6)]
            now = env.step(np.stack([expert.act(row, None)[0] for row in rows]))
            has_succeeded |= now.signals.success
            pictures.append(now.observation.images[CAMERA])
    assert has_succeeded.all()
    assert pictures[0].shape == (6, 32, 32, 3) and pictures[0].dtype == np.uint8
    first, second = np.array(pictures[:5]), np.array(pictures[1:6])
    assert (first != second).any(axis=(2, 3, 4)).all()
    row = jax.tree.map(lambda leaf: leaf[2], now.signals)
    np.testing.assert_allclose(now.observation.state[2][10:], low_dim_state(row, 0.0)[10:], atol=1e-6)
    assert now.observation.state.shape == (6, config.state_dim)


def test_pictures_follow_their_own_environment():
    env = ToyEnv(toy.TOY, 2, image_shape=(48, 64))
    before = env.reset([1, 2]).observation.images[CAMERA]
    after = env.step(np.ones((2, 2), np.float32), {1: 1}).observation.images[CAMERA]
    assert before.shape == (2, 48, 64, 3)
    np.testing.assert_array_equal(after[1], before[0])
    assert (after[0] != before[0]).any()
    assert env.reset([1, 2]).observation.state.shape == (2, toy.STATE_DIM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend: got 'cuda' for ToyPush-v0, expected 'cpu'"),
        ({"num_groups": 2, "num_workers": 2}, "num_groups: got 2 for ToyPush-v0, expected 1"),
        ({"has_spares": True}, "has_spares: got True for ToyPush-v0, expected False"),
        ({"render_size": 128}, "render_size: got 128 for ToyPush-v0, expected 0"),
        ({"perturbation": "vision/light"}, "perturbation: got 'vision/light' for ToyPush-v0, expected ''"),
        ({"control_mode": "pd_ee"}, r"control_mode: got 'pd_ee', expected one of \['toy'\]"),
    ],
)
def test_what_toys_do_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig("ToyPush-v0", **{"num_workers": 1} | change)


def test_toys_of_different_actions_are_no_tasks_of_one_policy():
    with pytest.raises(ValueError, match="tasks: actions: got"):
        EnvConfig(tasks=("ToyPush-v0", "ToyPlace-v0"), num_workers=2)
