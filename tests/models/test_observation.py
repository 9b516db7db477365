"""The door of every policy: what people hand to it in place of an observation is refused by name, traced or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_flow import flow_config
from nano_policy import nano_config, random_observation, some_stats

from stare_jax.config import UserError
from stare_jax.models import MLPConfig, ObservationError, make_policy, openvla_state, with_prompt

CONFIGS = {
    "openvla": nano_config(),
    "pi05": flow_config(cameras=("base_camera",)),
    "openvla_state": openvla_state(5),
    "mlp": MLPConfig(state_dim=5),
}
INSTRUCTIONS = ("push the cube", "lift the peg upright")


@functools.cache
def case(name):
    """A policy, the shapes of its parameters and an observation that is right."""
    config = CONFIGS[name]
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    return policy, jax.eval_shape(policy.init, jax.random.key(0)), random_observation(policy, INSTRUCTIONS)


def calls(policy, params, observation):
    """Every function that reads an observation, traced as `jax.jit` does; the door stands before all else."""
    trace = {"bins": np.zeros((2, policy.action_dim), np.int32)}
    yield lambda: jax.eval_shape(policy.sample, params, observation, jax.random.key(0))
    if policy.window is None:
        yield lambda: jax.eval_shape(policy.log_prob, params, observation, trace)
    yield lambda: jax.eval_shape(policy.value, params, observation)
    shown = (2, policy.action_dim) if policy.window is None else (2, policy.window, policy.action_dim)
    action, key = np.zeros(shown, np.float32), jax.random.split(jax.random.key(0), 2)
    yield lambda: jax.eval_shape(policy.imitation_loss, params, observation, action, key=key)
    if policy.preference_score is not None:
        seeds = np.zeros((2, 1), np.uint32)
        yield lambda: jax.eval_shape(policy.preference_score, params, observation, action, seeds)


def with_image(change):
    return lambda observation: observation._replace(images={"base_camera": change(observation.images["base_camera"])})


IMAGES = {
    "floats in 0..1": (with_image(lambda x: np.float32(x / 255)), r"got float32 \[2, 32, 32, 3\], expected uint8"),
    "floats in 0..255": (with_image(lambda x: x.astype(np.float64)), "got float.*, expected uint8 .*0 to 255"),
    "signed": (with_image(lambda x: x.astype(np.int32)), "got int32 .*, expected uint8"),
    "bools": (with_image(lambda x: x > 9), "got bool .*, expected uint8"),
    "channels first": (with_image(lambda x: x.transpose(0, 3, 1, 2)), r"\(2, 3, 32, 32\), .*; channels come last"),
    "with alpha": (with_image(lambda x: np.concatenate([x, x[..., :1]], -1)), r"\(2, 32, 32, 4\), .*without an alpha"),
    "grey": (with_image(lambda x: x[..., :1]), r"got shape \(2, 32, 32, 1\), expected \[B, H, W, 3\]"),
    "grey without an axis": (
        with_image(lambda x: x[..., 0]),
        r"got shape \(2, 32, 32\), expected uint8 \[B, H",
    ),
    "one image": (with_image(lambda x: x[0]), r"got shape \(32, 32, 3\), expected uint8 \[B, H, W, 3\], .* come first"),
    "several frames": (with_image(lambda x: x[:, None]), r"got shape \(2, 1, 32, 32, 3\)"),
    "nothing in it": (with_image(lambda x: x[:, :0]), r"got shape \(2, 0, 32, 3\)"),
    "too few": (with_image(lambda x: x[:1]), "got 1 rows, expected 2, as the state has"),
}
STATES = {
    "whole numbers": (lambda o: o._replace(state=o.state.astype(np.int32)), "state: got int32 .*, expected float32"),
    "another size": (lambda o: o._replace(state=o.state[:, 1:]), r"state: got shape \(2, \d\), expected \[B, \d\]"),
    "one state": (
        lambda o: o._replace(state=o.state[0]),
        r"state: got shape \(\d,\), .*\[B, \d\]; B rows",
    ),
    "floats as tokens": (lambda o: o._replace(tokens=np.float32(o.tokens)), "tokens: got float32 .* expected int32"),
    "numbers as a mask": (
        lambda o: o._replace(token_mask=np.int32(o.token_mask)),
        "token_mask: got int32 .* expected bool",
    ),
}


def assert_refused(call, message):
    with pytest.raises(ObservationError, match=message) as error:
        call()
    assert isinstance(error.value, UserError) and str(error.value).startswith("observation.")
    assert "got" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
@pytest.mark.parametrize(("change", "message"), IMAGES.values(), ids=IMAGES.keys())
def test_an_image_that_is_none_names_its_camera(name, change, message):
    policy, params, observation = case(name)
    for call in calls(policy, params, change(observation)):
        assert_refused(call, rf"^observation.images\['base_camera'\]: .*{message}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("change", "message"), STATES.values(), ids=STATES.keys())
def test_a_state_or_a_prompt_that_is_none_is_named(name, change, message):
    policy, params, observation = case(name)
    for call in calls(policy, params, change(observation)):
        assert_refused(call, f"^observation.{message}")


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_a_camera_that_is_missing_is_named(name):
    policy, params, observation = case(name)
    other = observation._replace(images={"wrist": observation.images["base_camera"]})
    for call in calls(policy, params, other):
        message = r"images: got the cameras \['wrist'\], expected \['base_camera'\] as well"
        assert_refused(call, message)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_refused_before_it_becomes_text_or_an_action(name, wrong):
    policy, params, observation = case(name)
    state = observation.state.copy()
    state[1, -1] = wrong
    message = rf"state: got {wrong} in row 1, number {state.shape[1] - 1}, expected finite numbers"
    assert_refused(lambda: with_prompt(policy, observation._replace(state=state), INSTRUCTIONS), message)
    for given in (state, jnp.asarray(state), state.tolist()):
        assert_refused(functools.partial(policy.tokenize, INSTRUCTIONS, given), message)
    assert_refused(lambda: policy.value(params, observation._replace(state=state)), message)


def test_what_is_no_array_is_named_by_its_type():
    policy, params, observation = case("openvla")
    image = observation.images["base_camera"]
    for change, kind in ((lambda x: x.tolist(), "list"), (lambda x: None, "NoneType"), (bytes, "bytes")):
        wrong = observation._replace(images={"base_camera": change(image)})
        assert_refused(functools.partial(policy.value, params, wrong), f"got a {kind}, expected uint8")


def test_one_instruction_for_several_rows_is_refused():
    policy, _, observation = case("openvla")
    with pytest.raises(ObservationError, match="instructions: got 1, expected 2, one for each row"):
        with_prompt(policy, observation, INSTRUCTIONS[:1])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_fits_passes(name):
    """Images of any size and from further cameras, states of a wider type, and arrays of JAX."""
    policy, params, observation = case(name)
    expected = jax.eval_shape(policy.value, params, observation)
    images = {camera: image[:, :30, :20] for camera, image in observation.images.items()} | {"more": None}
    for changed in (
        observation._replace(images=images, state=observation.state.astype(np.float64)),
        observation._replace(tokens=observation.tokens.astype(np.int64)),
        jax.tree.map(jnp.asarray, observation),
    ):
        assert jax.eval_shape(policy.value, params, changed) == expected
