"""Policies behind a socket as actors: whatever speaks openpi's protocol is judged in our simulators, ours or not."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from stare_jax.config import Count, Natural, Positive, UserError, check_fields, from_dict, user_input
from stare_jax.models.policy import Decision
from stare_jax.models.preprocess import resize_with_pad
from stare_jax.rollout.decisions import Act
from stare_jax.serve.messages import MessageError, pack, unpack
from stare_jax.types import Observation

Gripper = Literal["same", "open_is_one", "closed_is_one"]


class RemoteError(UserError, RuntimeError):
    """A server that cannot be reached, refuses a request, or answers with what is no action of the robot."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The convention of a server: keys of its requests, and the meaning of its actions."""

    images: tuple[str, ...] = ("observation/image",)
    """keys of the images, in the order of the simulator's cameras; there may be more than it has."""
    image_size: Natural = 0
    """pixels of a side, to which images are resized as openpi does it, with black bars; 0 sends them as they are."""
    is_turned: bool = False
    """True sends images turned by 180 degrees, as openpi's LIBERO does."""
    state: str = "observation/state"
    """key of the state that `env.use_state` shows; "" sends none."""
    prompt: str = "prompt"
    """key of the instruction."""
    actions: str = "actions"
    """key of the reply's actions, `[H, A]` or `[A]`."""
    chunk: Count = 1
    """C, actions of a reply that are executed before the next request."""
    gripper: Gripper = "same"
    """an action's last number: "same" is the simulator's own, -1 closed and 1 open; of the others one end is 0."""

    def __post_init__(self):
        check_fields(self)
        if not self.images and not self.state:
            raise ValueError("images: got none, expected a key, or one of the state")


def read_adapter(file: Path) -> Adapter:
    """Returns the adapter of a YAML file.

    Raises:
        ConfigError: it is no YAML, has a field that adapters do not have, or a value that a field does not take.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        with user_input(str(file)):
            raise ValueError(" ".join(str(error).split())) from error
    with user_input(str(file)):
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}, expected fields of an adapter and their values")
        lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return from_dict(Adapter, lists, path=str(file))


class RemotePolicy:
    """Clients of one server, one for each environment, so that it may answer all of them together."""

    def __init__(self, address: str, adapter: Adapter, action_dim: int, *, api_key: str = "", timeout_s: Positive = 60):
        """
        Args:
            address: as `ws://host:port`.
            adapter: the server's convention.
            action_dim: numbers of the robot's action.
            api_key: that the server asks for; "" for none.
            timeout_s: seconds that an answer may take.

        Raises:
            RemoteError: the server cannot be reached, or does not send its metadata.
        """
        if importlib.util.find_spec("websockets") is None:
            raise RemoteError(f"{address}: websockets is not installed; pip install websockets, or stare_jax[serve]")
        self.address, self.adapter, self.action_dim = address, adapter, action_dim
        self._timeout_s, self._api_key = timeout_s, api_key
        self._connections: list[Any] = []
        self._open = contextlib.ExitStack()
        self.metadata: dict[str, Any] = self._connect(1)

    @property
    def name(self) -> str:
        """The name of the weights, as far as the server tells one."""
        return str(self.metadata.get("checkpoint", self.address)) if isinstance(self.metadata, dict) else self.address

    def act_of(self, part: int) -> Act:
        """Returns the actor; it is the same for all parts of an evaluation."""
        del part
        return self._act

    def close(self) -> None:
        """Ends all connections."""
        self._connections.clear()
        self._open.close()

    def _act(
        self, observation: Observation, signals: Any, instructions: Sequence[str], is_first: np.ndarray
    ) -> tuple[Decision, Observation]:
        """Asks for the decisions of all environments at once."""
        del signals, is_first
        seen = jax.device_get(observation)
        self._connect(len(instructions))
        requests = [self._request(seen, row, instructions[row]) for row in range(len(instructions))]
        for connection, request in zip(self._connections, requests, strict=False):
            with self._told():
                connection.send(pack(request))
        replies = [self._reply(connection) for connection in self._connections[: len(requests)]]
        return Decision(np.stack(replies)), observation

    def _request(self, seen: Observation, row: int, instruction: str) -> dict[str, Any]:
        adapter, request = self.adapter, {self.adapter.prompt: instruction}
        for key, image in zip(adapter.images, seen.images.values(), strict=False):
            shown = image[row]
            if adapter.image_size:
                shown = np.asarray(resize_with_pad(shown[None], adapter.image_size)[0]).astype(np.uint8)
            request[key] = np.ascontiguousarray(shown[::-1, ::-1] if adapter.is_turned else shown)
        if adapter.state and seen.state.shape[1]:
            request[adapter.state] = np.asarray(seen.state[row], np.float32)
        return request

    def _reply(self, connection: Any) -> np.ndarray:
        """Returns the actions float32 `[C, A]`, or `[A]` where C is 1, in the simulator's convention."""
        with self._told():
            message = connection.recv(timeout=self._timeout_s)
        if isinstance(message, str):
            raise RemoteError(
                f"{self.address}: refused a request: {message.strip().splitlines()[-1] if message else ''}"
            )
        with self._told():
            reply = unpack(message)
        action = reply.get(self.adapter.actions) if isinstance(reply, dict) else None
        if not isinstance(action, np.ndarray | list):
            got = sorted(map(str, reply)) if isinstance(reply, dict) else type(reply).__name__
            raise RemoteError(f"{self.address}: a reply: got {got}, expected {self.adapter.actions!r} among its keys")
        action = np.asarray(action, np.float32)
        action = action[None] if action.ndim == 1 else action
        chunk = self.adapter.chunk
        if action.ndim != 2 or action.shape[1] != self.action_dim or len(action) < chunk:
            expected = f"at least {chunk} of {self.action_dim} numbers"
            raise RemoteError(f"{self.address}: actions: got shape {list(action.shape)}, expected {expected}")
        if not np.isfinite(action[:chunk]).all():
            raise RemoteError(f"{self.address}: actions: got {action[~np.isfinite(action)][0]}, expected numbers")
        action = action[:chunk].copy()
        if self.adapter.gripper != "same":
            sign = 1.0 if self.adapter.gripper == "open_is_one" else -1.0
            action[:, -1] = sign * (2.0 * action[:, -1] - 1.0)
        return action if chunk > 1 else action[0]

    def _connect(self, number: int) -> Any:
        """Opens connections until there are as many; returns the metadata of the last one."""
        from websockets.sync.client import connect

        headers = {"Authorization": f"Api-Key {self._api_key}"} if self._api_key else None
        metadata = None
        while len(self._connections) < number:
            with self._told():
                opened = connect(
                    self.address,
                    compression=None,
                    max_size=None,
                    additional_headers=headers,
                    ping_timeout=None,
                    open_timeout=self._timeout_s,
                )
                connection = self._open.enter_context(opened)
                self._connections.append(connection)
                metadata = connection.recv(timeout=self._timeout_s)
            if isinstance(metadata, str):
                raise RemoteError(f"{self.address}: got text, expected metadata: {metadata[:200]}")
            with self._told():
                metadata = unpack(metadata)
        return metadata

    @contextlib.contextmanager
    def _told(self):
        """Turns whatever a connection raises into one error with the address."""
        from websockets.exceptions import WebSocketException

        try:
            yield
        except TimeoutError:
            raise RemoteError(f"{self.address}: silent for {self._timeout_s:g} s") from None
        except (OSError, WebSocketException, MessageError) as error:
            raise RemoteError(f"{self.address}: {type(error).__name__}: {error}") from error
