import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill import appearance, placement
from stare_jax.envs.maniskill.built import Built
from stare_jax.envs.maniskill.perturbations import (
    AXES,
    PERTURBATIONS,
    episode_instruction,
    episode_rng,
    instructions_of,
)
from stare_jax.models.tokenizer import word_tokenizer
from stare_jax.stages import TASKS, get_task

CARROT, EGGPLANT = "PutCarrotOnPlateInScene-v1", "PutEggplantInBasketScene-v1"
STILL = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
SEEN = [name for name, one in PERTURBATIONS.items() if one.seen_in == "images"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning"),
]


def begin(simulator, perturbation, seed):
    """The first frame of an episode; the simulator keeps the perturbation for the steps that follow."""
    simulator.config = dataclasses.replace(simulator.config, perturbation=perturbation)
    return simulator.reset(seed, reproducible=True)


@pytest.fixture
def undisturbed_again():
    """Takes a shared simulator and leaves it without a perturbation."""
    used = []
    yield lambda simulator: used.append(simulator) or simulator
    for simulator in used:
        simulator.config = dataclasses.replace(simulator.config, perturbation="")
        simulator.reset(0)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_names_say_their_axis_and_the_documentation_has_each_of_them():
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    for name, perturbation in PERTURBATIONS.items():
        assert name.partition("/")[0] in AXES and perturbation.changes
        assert f"`{name}`" in page
    assert {name.partition("/")[0] for name in PERTURBATIONS} == set(AXES)


def test_what_is_seen_changes_and_the_state_does_not(rendering_simulator, undisturbed_again):
    simulator = undisturbed_again(rendering_simulator)
    usual, images = begin(simulator, "", 3), {}
    for name in SEEN:
        first = begin(simulator, name, 3)
        assert_same(first.signals, usual.signals)
        changed = (first.image != usual.image).any(axis=-1)
        images[name] = first.image, changed
        assert changed.mean() > 0.0005, name
    # The cube alone is painted; the sheet on the table leaves the robot; the texture on robot and cube the table.
    assert images["semantics/colour"][1].mean() < 0.01
    assert 0.3 < images["vision/table"][1].mean() < 0.9
    assert 0.02 < images["vision/texture_strong"][1].mean() < 0.5
    assert images["vision/noise_strong"][1].mean() > 0.9
    off = {name: np.abs(image.astype(int) - usual.image).mean() for name, (image, _) in images.items()}
    assert off["vision/noise_weak"] < off["vision/noise_strong"] or off["vision/texture_weak"] < off["vision/light"]
    # Seeds have their own textures, and an episode has its own whatever was played before.
    assert (begin(simulator, "vision/table", 4).image != images["vision/table"][0]).any()
    np.testing.assert_array_equal(begin(simulator, "vision/table", 3).image, images["vision/table"][0])
    assert_same(begin(simulator, "semantics/words", 3), usual)
    assert_same(begin(simulator, "", 3), usual)


def test_the_object_begins_outside_of_all_starts_of_training(simulators, undisturbed_again):
    simulator = undisturbed_again(simulators("PushCube-v1"))
    starts = []
    for seed in range(4):
        usual, moved = begin(simulator, "", seed).signals, begin(simulator, "execution/start_pose", seed).signals
        starts.append(moved.obj_pos)
        beyond = np.abs(moved.obj_pos[:2]).max() - 0.1
        assert 0.03 <= beyond <= 0.06 + 1e-6 and moved.obj_pos[2] == usual.obj_pos[2]
        # The region is where it always is beside the cube, and the robot where it was.
        np.testing.assert_allclose(moved.goal_pos - moved.obj_pos, [0.2, 0, 0], atol=1e-6)
        assert_same((moved.tcp_pos, moved.tcp_quat, moved.obj_quat), (usual.tcp_pos, usual.tcp_quat, usual.obj_quat))
    assert len(np.unique(np.stack(starts), axis=0)) == 4
    before = simulator.env.obj.pose.p[0].numpy()
    for _ in range(3):
        simulator.step(STILL)
    np.testing.assert_allclose(simulator.env.obj.pose.p[0].numpy(), before, atol=1e-4)  # It lies on the table.


def test_the_robot_begins_elsewhere_and_the_object_does_not(simulators, undisturbed_again):
    simulator = undisturbed_again(simulators("StackCube-v1"))
    usual = begin(simulator, "", 1).signals
    qpos = simulator.env.agent.robot.get_qpos()[0].numpy()
    moved = begin(simulator, "execution/robot_pose", 1).signals
    turned = np.abs(simulator.env.agent.robot.get_qpos()[0].numpy() - qpos)
    assert ((turned[:6] >= 0.08 - 1e-6) & (turned[:6] <= 0.15 + 1e-6)).all() and 0.3 <= turned[6] <= 0.6
    assert (turned[7:] == 0).all()
    away = moved.tcp_pos - usual.tcp_pos
    assert 0 < np.linalg.norm(away) <= 0.1 and away[2] >= -0.05
    assert_same(moved.obj_pos, usual.obj_pos)
    assert_same(moved.goal_pos, usual.goal_pos)
    after = simulator.step(STILL).signals  # The controller starts from where the arm is.
    np.testing.assert_allclose(after.tcp_pos, moved.tcp_pos, atol=5e-3)


@pytest.mark.parametrize("env_id", ["PullCube-v1", "LiftPegUpright-v1"])
def test_the_object_is_moved_after_five_actions_and_not_before(env_id, simulators, undisturbed_again):
    simulator = undisturbed_again(simulators(env_id))
    frames = {}
    for name in ("", "execution/object_moved"):
        frames[name] = [begin(simulator, name, 2).signals] + [simulator.step(STILL).signals for _ in range(7)]
    usual, moved = frames.values()
    for t in range(6):
        assert_same(moved[t], usual[t])
    shift = moved[6].obj_pos - usual[6].obj_pos
    assert 0.08 <= np.linalg.norm(shift) <= 0.12 and abs(shift[2]) < 1e-3
    assert np.abs(moved[6].obj_pos[:2]).max() <= 0.1 + 1e-3  # where training begins
    np.testing.assert_allclose(moved[7].obj_pos, moved[6].obj_pos, atol=1e-3)
    # The region stays, and success is judged there; the peg is to be stood up where it lies.
    goal = moved[6].goal_pos - usual[6].goal_pos
    np.testing.assert_allclose(goal, shift if env_id == "LiftPegUpright-v1" else 0 * shift, atol=1e-3)
    assert_same(moved[6].tcp_pos, usual[6].tcp_pos)


@pytest.mark.usefixtures("widowx_assets")
@pytest.mark.parametrize("env_id", [CARROT, EGGPLANT])
def test_widowx_objects_begin_away_from_all_official_starts(env_id, simulators, undisturbed_again):
    simulator = undisturbed_again(simulators(env_id))
    usual, moved = begin(simulator, "", 1).signals, begin(simulator, "execution/start_pose", 1).signals
    official = simulator._starts.places
    gap = (np.abs(moved.obj_pos[:2] - official) - 0.015).max(axis=1).min()
    assert 0.03 - 1e-6 <= gap <= 0.06 + 1e-6 and moved.obj_pos[2] == usual.obj_pos[2]
    angle = 2 * np.rad2deg(np.arccos(min(1.0, abs(float(usual.obj_quat @ moved.obj_quat)))))
    assert 30 - 0.1 <= angle <= 60 + 0.1
    np.testing.assert_allclose(moved.goal_pos[:2], usual.goal_pos[:2], atol=1e-6)
    assert env_id == EGGPLANT or np.linalg.norm(moved.obj_pos[:2] - moved.goal_pos[:2]) >= 0.11
    assert_same(moved.tcp_pos, usual.tcp_pos)


def test_a_texture_lies_on_what_is_in_front_and_noise_on_everything():
    """Share 1/2 of a texture over an image of 100, in the box around three pixels of ids 1 and 2."""
    backdrop = SimpleNamespace(is_shown=np.array([False, True, True]))
    built = Built(None, "", None, None, None, backdrop, (8, 8))
    image, segmentation = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), int)
    segmentation[2, 3], segmentation[3, 3], segmentation[3, 4], segmentation[0, 0] = 1, 2, 2, 7
    see = appearance.texture_on_foreground(0.5)(built, np.random.default_rng(0)).see
    texture = appearance.random_texture(np.random.default_rng(0), 8, 8)
    seen = see(image, segmentation)
    expected = image.copy()
    for place, part in (((2, 3), (0, 0)), ((3, 3), (4, 0)), ((3, 4), (4, 4))):  # the box is 2 x 2
        expected[place] = np.rint(50 + texture[part] / 2)
    np.testing.assert_array_equal(seen, expected)
    assert (image == 100).all()
    np.testing.assert_array_equal(see(image, np.zeros_like(segmentation)), image)

    see = appearance.noise_on_image(0.5)(built, np.random.default_rng(0)).see
    texture = appearance.random_texture(np.random.default_rng(0), 16, 16)
    np.testing.assert_array_equal(see(image, segmentation), np.rint(50 + texture[3:11, 4:12] / 2))  # middle of the box
    segmentation[5, 3] = 1
    np.testing.assert_array_equal(see(image, segmentation), np.rint(50 + texture[4:12, 4:12] / 2))


def test_instructions_follow_from_the_seed():
    for env_id in TASKS:
        spec, words = get_task(env_id), set()
        for seed in range(20):
            text = episode_instruction("semantics/words", spec, seed)
            assert text == episode_instruction("semantics/words", spec, seed) != spec.instruction
            words.add(text)
        assert words == set(instructions_of("semantics/words", spec)) and len(words) == 4
        assert episode_instruction("execution/robot_pose", spec, 0) == episode_instruction("", spec, 0)
        assert episode_instruction("", spec, 0) == spec.instruction
        # A prompt of the small models has room for ten tokens: all of them are words that they know.
        encode = word_tokenizer().encode
        assert all(len(encode(text)) == len(text.split()) <= 10 for text in words)
    stack = get_task("StackCube-v1")
    text = episode_instruction("semantics/colour", stack, 5)
    first, second = appearance.colours_of("StackCube-v1", episode_rng("semantics/colour", 5))
    assert text == f"stack the {first} cube on the {second} cube" in instructions_of("semantics/colour", stack)
    assert all(len(encode(text)) == 8 for text in instructions_of("semantics/colour", stack))
    peg = get_task("LiftPegUpright-v1")
    assert instructions_of("semantics/colour", peg) == (peg.instruction,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"perturbation": "vision/fog"},
            "perturbation: got 'vision/fog' for PushCube-v1, expected one of vision/light,",
        ),
        ({"perturbation": "vision/light", "image_size": 0}, "for PushCube-v1, expected images"),
        (
            {"env_id": CARROT, "perturbation": "semantics/colour"},
            f"perturbation: got 'semantics/colour' for {CARROT}, expected one of PushCube-v1",
        ),
        (
            {"tasks": ("docs/examples/place_sphere.py",), "perturbation": "execution/start_pose"},
            "perturbation: got 'execution/start_pose' for PlaceSphere-v1, expected one of the eight tasks: where",
        ),
        (
            {"perturbation": "vision/light", "backend": "cuda", "num_workers": 1},
            "backend: got 'cuda' with perturbation 'vision/light', expected 'cpu'",
        ),
    ],
)
def test_a_perturbation_that_a_task_cannot_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        EnvConfig(**fields)
    assert "\n" not in str(error.value)


def test_data_name_their_perturbation_and_others_are_as_before():
    assert "perturbation" not in EnvConfig().data_settings
    assert EnvConfig(perturbation="execution/robot_pose").data_settings["perturbation"] == "execution/robot_pose"


def test_places_have_room_outside_of_training():
    """Every task of the table has some: 30 mm beyond at least one edge, and a way to move 80 mm."""
    assert set(placement.PLACES) == set(TASKS)
    for places in placement.PLACES.values():
        assert all(high - low >= 0.08 for low, high in places.moved_within)
        if places.trained is not None:
            spare = [
                (t_low - r_low, r_high - t_high)
                for (t_low, t_high), (r_low, r_high) in zip(places.trained, places.room, strict=True)
            ]
            assert max(max(pair) for pair in spare) >= placement.OUTSIDE[0]
