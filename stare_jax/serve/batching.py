"""Decisions for requests that arrive one by one: those that wait together are one batch, of a size that is compiled."""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.logging import say
from stare_jax.models.observation import ObservationError
from stare_jax.models.policy import Policy, with_prompt
from stare_jax.rollout.acting import acting_sharding, jit_sample, place_rows
from stare_jax.rollout.prepared import prepare_params
from stare_jax.serve.messages import MessageError
from stare_jax.serve.requests import Row, join_rows
from stare_jax.types import PyTree


class Answer(NamedTuple):
    """The decision for one request."""

    action: np.ndarray
    """float32 `[C, A]` in the robot's units, C of a policy of single actions being 1."""
    value: float
    infer_ms: float
    """milliseconds that the batch took."""
    batch_size: int
    """requests of the batch."""


class Batcher:
    """One thread that decides: it takes the requests that wait, up to the largest size, and answers them together.

    While a batch is computed the next requests gather. A thread that finds fewer requests than clients waits for the
    others for a moment, `window_ms`.
    """

    def __init__(
        self,
        policy: Policy,
        params: PyTree,
        *,
        sizes: Sequence[int] = (1, 2, 4, 8),
        window_ms: float = 2.0,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        """
        Args:
            policy: that decides.
            params: its parameters.
            sizes: of batches, increasing; a batch is filled up to the next of them.
            window_ms: milliseconds for which a batch waits for further requests.
            temperature: of the actions; 0 is greedy.
            seed: of what is random; decision n of the server uses `fold_in(key, n)`.
        """
        self.policy, self.sizes, self.window_s = policy, tuple(sizes), window_ms / 1000
        self.num_clients = 1
        """clients that are connected, whoever knows them sets it."""
        self._params = prepare_params(policy, params)
        self._sample, self._sharding = jit_sample(policy.sample), acting_sharding(params)
        self._key, self._temperature, self._tick = jax.random.key(seed), np.float32(temperature), 0
        self._waiting: queue.SimpleQueue[tuple[Row, Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)

    def start(self, row: Row) -> None:
        """Compiles all sizes on copies of a row, and begins to answer."""
        for size in self.sizes:
            started = time.monotonic()
            self._decide([row] * size)
            say(f"serve: a batch of {size} is compiled, {time.monotonic() - started:.1f} s")
        self._thread.start()

    def submit(self, row: Row) -> "Future[Answer]":
        """Returns the answer to come: a `MessageError`, of this request alone, where a prompt cannot be read."""
        future: Future[Answer] = Future()
        self._waiting.put((row, future))
        return future

    def stop(self) -> None:
        """Ends the thread after the batch that it computes; requests that still wait are cancelled."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._gather()) is not None:
            if not (batch := [(row, future) for row, future in batch if future.set_running_or_notify_cancel()]):
                continue
            try:
                answers = self._decide([row for row, _ in batch])
            except Exception as error:
                # Every request by itself, so that what is wrong with one is not the others' error.
                self._answer_one_by_one(batch, error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _answer_one_by_one(self, batch: list[tuple[Row, Future]], error: Exception) -> None:
        for row, future in batch:
            if len(batch) > 1:
                try:
                    future.set_result(self._decide([row])[0])
                    continue
                except Exception as own:
                    error = own
            is_request = isinstance(error, ObservationError | ValueError)
            future.set_exception(MessageError(str(error)) if is_request else error)

    def _gather(self) -> list[tuple[Row, Future]] | None:
        """Returns the requests of the next batch, None where the thread is to end."""
        batch, deadline = [], None
        while len(batch) < self.sizes[-1]:
            has_all = len(batch) >= self.num_clients
            left = None if deadline is None else 0.0 if has_all else max(0.0, deadline - time.monotonic())
            try:
                item = self._waiting.get(timeout=left) if left != 0.0 else self._waiting.get_nowait()
            except queue.Empty:
                break
            if item is None:
                for _, future in batch:
                    future.cancel()
                return None
            batch.append(item)
            deadline = deadline or time.monotonic() + self.window_s
        return batch

    def _decide(self, rows: Sequence[Row]) -> list[Answer]:
        started = time.monotonic()
        size = next(size for size in self.sizes if size >= len(rows))
        observation, instructions = join_rows(rows, size)
        seen = place_rows(with_prompt(self.policy, observation, instructions), self._sharding)
        decision = self._sample(self._params, seen, self._key, np.uint32(self._tick), self._temperature)
        self._tick = (self._tick + 1) % 2**32
        action, value = jax.device_get((decision.action, decision.value))
        action = action.reshape(size, -1, action.shape[-1])
        infer_ms = 1000 * (time.monotonic() - started)
        return [Answer(action[i], float(value[i]), infer_ms, len(rows)) for i in range(len(rows))]
