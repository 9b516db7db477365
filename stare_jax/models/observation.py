"""The door of every policy: a batch of observations is what the policy reads, or one clear error.

Types and shapes are checked where a policy reads its observation. Under `jax.jit` that is while the function is traced,
once for each shape, so that acting and training pay nothing. Values are checked on the host: those of states where
prompts are made of them, in every decision of a rollout, and in every call with NumPy arrays outside of `jax.jit`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.config import UserError
from stare_jax.types import Array, Observation


class ObservationError(UserError, ValueError):
    """An observation that a policy does not read; the message names the field or the camera, got and expected."""


def check_observation(observation: Observation, expected: Observation) -> None:
    """Checks a batch of observations.

    Args:
        observation: leaves `[B, ...]`, NumPy or JAX, or tracers of these. Images uint8 `[B, H, W, 3]` of any height and
            width, states floating `[B, S]`, tokens integers `[B, L]` and their mask bool `[B, L]`. Cameras that the
            policy does not see are ignored.
        expected: the policy's own cameras and sizes, `Policy.observation_shape(1)`.

    Raises:
        ObservationError: a camera is not there, a leaf has another type or shape, the leaves have different numbers of
            rows, there is no prompt where one is read, or a NumPy state is not finite.
    """
    if missing := [name for name in expected.images if name not in observation.images]:
        raise _error("images", f"the cameras {sorted(observation.images)}", f"{missing} as well")
    for camera in expected.images:
        _check_image(f"images[{camera!r}]", observation.images[camera])
    state, tokens, token_mask = observation.state, observation.tokens, observation.token_mask
    (size,), (length,) = expected.state.shape[1:], expected.tokens.shape[1:]
    _check_array("state", state, jnp.floating, 2, f"float32 [B, {size}]")
    if state.shape[1:] != (size,):
        raise _error("state", f"shape {state.shape}", f"[B, {size}]")
    check_finite(state)
    _check_array("tokens", tokens, jnp.integer, 2, f"int32 [B, {length}]")
    _check_array("token_mask", token_mask, jnp.bool_, 2, f"bool [B, {length}]")
    if length and tokens.shape[-1] < 2:
        raise _error("tokens", f"shape {tokens.shape}", f"a prompt [B, {length}]; see models.with_prompt")
    if token_mask.shape != tokens.shape:
        raise _error("token_mask", f"shape {token_mask.shape}", f"{tokens.shape}, that of the tokens")
    leaves = {f"images[{name!r}]": observation.images[name] for name in expected.images} | {"tokens": tokens}
    for name, leaf in leaves.items():
        if len(leaf) != len(state):
            raise _error(name, f"{len(leaf)} rows", f"{len(state)}, as the state has")


def without_scene(observation: Observation) -> Observation:
    """Returns an observation without images and with prompts of no tokens: all that is read beside a context."""
    tokens, token_mask = observation.tokens[..., :0], observation.token_mask[..., :0]
    return observation._replace(images={}, tokens=tokens, token_mask=token_mask)


def check_finite(state: Array) -> None:
    """Raises ObservationError where states `[B, S]` are NumPy and not finite; names the first such number."""
    if isinstance(state, np.ndarray) and not np.isfinite(state).all():
        row, number = np.argwhere(~np.isfinite(state))[0]
        raise _error("state", f"{state[row, number]} in row {row}, number {number}", "finite numbers")


def _check_image(name: str, image: Any) -> None:
    _check_array(name, image, jnp.uint8, 4, "uint8 [B, H, W, 3], grey levels 0 to 255")
    if image.shape[-1] == 4:
        raise _error(name, f"shape {image.shape}", "[B, H, W, 3], without an alpha channel")
    if image.shape[-1] != 3 or 0 in image.shape[1:]:
        advice = "; channels come last" if image.shape[1] == 3 else ""
        raise _error(name, f"shape {image.shape}", f"[B, H, W, 3]{advice}")


def _check_array(name: str, array: Any, kind: Any, ndim: int, expected: str) -> None:
    """Checks the type and the number of axes of a leaf; `kind` is a type of NumPy's or the class of some."""
    if not isinstance(array, np.ndarray | jax.Array):
        raise _error(name, f"a {type(array).__name__}", f"{expected}, of NumPy or JAX")
    if not jnp.issubdtype(array.dtype, kind):
        raise _error(name, f"{array.dtype} {list(array.shape)}", expected)
    if array.ndim != ndim:
        raise _error(name, f"shape {array.shape}", f"{expected}; B rows of a batch come first")


def _error(field: str, got: str, expected: str) -> ObservationError:
    return ObservationError(f"observation.{field}: got {got}, expected {expected}")
