"""Requests of clients: keys of several robots, and whatever a policy does not read."""

import jax
import numpy as np
import pytest

from stare_jax.models import openvla_tiny, pi05_tiny
from stare_jax.models.blank import blank_policy
from stare_jax.serve.messages import MessageError
from stare_jax.serve.requests import CONVENTIONS, Keys, RequestReader, join_rows

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


KEYS = Keys()


def reader(state_dim=3, *, keys=KEYS, prompt="", **changes):
    return RequestReader(blank_policy(openvla_tiny(state_dim)), (4, 6), keys, prompt=prompt, **changes)


def request(**changes):
    full = {"observation/image": IMAGE, "observation/state": np.zeros(3, np.float32), "prompt": "push"}
    return {name: value for name, value in (full | changes).items() if value is not None}


def test_a_request_is_a_row_and_rows_are_filled_up_to_a_batch():
    row = reader().read(request(**{"observation/state": [1.0, 2.0, 3.0], "extra": "ignored"}))
    assert row.images.keys() == {"base_camera"} and row.prompt == "push"
    np.testing.assert_array_equal(row.state, np.array([1, 2, 3], np.float32))
    batch, instructions = join_rows([row, row._replace(prompt="pull")], 4)
    assert instructions == ["push", "pull", "pull", "pull"]
    assert jax.tree.map(np.shape, batch.images) == {"base_camera": (4, 4, 6, 3)} and batch.state.shape == (4, 3)


def test_channels_may_come_first_and_parts_may_be_nested():
    keys = CONVENTIONS["aloha"]
    nested = {"images": {"cam_high": np.moveaxis(IMAGE, -1, 0)}, "state": np.zeros(3), "prompt": np.str_("push")}
    row = reader(keys=keys).read(nested)
    np.testing.assert_array_equal(row.images["base_camera"], IMAGE)
    assert row.prompt == "push" and type(row.prompt) is str


def test_states_of_several_keys_are_joined():
    droid = {
        "observation/exterior_image_1_left": IMAGE,
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.float32(0.5),
        "prompt": "push",
    }
    row = reader(8, keys=CONVENTIONS["droid"]).read(droid)
    np.testing.assert_array_equal(row.state, np.array([*range(7), 0.5], np.float32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observation/image": None}, r"observation/image: got nothing, expected an image, uint8 \[4, 6, 3\]"),
        ({"observation/image": "x"}, "observation/image: got a str"),
        ({"observation/image": IMAGE[:2]}, r"observation/image: got uint8 \[2, 6, 3\], expected uint8 \[4, 6, 3\]"),
        ({"observation/image": IMAGE / 255.0}, r"observation/image: got float64 \[4, 6, 3\]"),
        ({"observation/state": None}, "observation/state: got nothing, expected numbers, 3 in all"),
        ({"observation/state": np.zeros(4)}, "observation/state: got 4 numbers, expected 3"),
        ({"observation/state": ["a", "b", "c"]}, "observation/state: got a list, expected numbers"),
        ({"observation/state": np.array([0, np.nan, 0])}, "observation/state: got nan"),
        ({"prompt": None}, "prompt: got a NoneType|prompt: got 0 characters"),
        ({"prompt": "  "}, "prompt: got 2 characters, expected text of 1 to 2000"),
        ({"prompt": "x" * 2001}, "prompt: got 2001 characters"),
        ({"prompt": 7}, "prompt: got a int"),
    ],
)
def test_what_a_policy_does_not_read_is_named(changes, said):
    with pytest.raises(MessageError, match=said):
        reader().read(request(**changes))


def test_a_request_that_is_no_map_is_refused():
    with pytest.raises(MessageError, match="request: got a list, expected a map of"):
        reader().read([IMAGE])


def test_the_prompt_of_the_run_stands_in_and_a_critics_state_may_be_missing():
    assert reader(prompt="lift").read(request(prompt=None)).prompt == "lift"
    row = reader(needs_state=False).read(request(**{"observation/state": None}))
    np.testing.assert_array_equal(row.state, np.zeros(3))
    with pytest.raises(MessageError, match="got 2 numbers, expected 3"):  # but not be another one
        reader(needs_state=False).read(request(**{"observation/state": np.zeros(2)}))


def test_a_convention_names_all_cameras():
    policy = blank_policy(pi05_tiny(3, cameras=("one", "two", "three")))
    with pytest.raises(MessageError, match="images: got .*, expected keys of all cameras .* one, two, three"):
        RequestReader(policy, (4, 6), Keys())
