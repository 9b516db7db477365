"""Requests that wait together are one batch, filled up to a size that is compiled; answers are those of each alone."""

import threading

import jax
import numpy as np
import pytest
from serving_toy import request, toy_policy

from stare_jax.models.policy import with_prompt
from stare_jax.serve.batching import Batcher
from stare_jax.serve.messages import MessageError
from stare_jax.serve.requests import Keys, RequestReader, Row, join_rows


@pytest.fixture(scope="module")
def toy():
    return toy_policy()


@pytest.fixture
def make(toy):
    """make(policy, **options) -> a batcher that has started, stopped when the test is over."""
    made = []

    def make(policy=toy[0], **options):
        batcher = Batcher(policy, toy[1], **{"sizes": (1, 4), "window_ms": 500.0} | options)
        made.append(batcher)
        batcher.start(rows(1)[0])
        return batcher

    yield make
    for batcher in made:
        batcher.stop()


def rows(number):
    reader = RequestReader(toy_policy()[0], (0, 0), Keys())
    return [reader.read(request(i)) for i in range(number)]


def test_requests_that_wait_together_are_one_batch_and_its_size_was_compiled(toy, make):
    policy, params = toy
    traced = []

    def sample(params, observation, key, **options):
        traced.append(len(observation.state))
        return policy.sample(params, observation, key, **options)

    batcher = make(policy._replace(sample=sample))
    assert traced == [1, 4]
    batcher.num_clients = 3
    answers = [future.result(60) for future in [batcher.submit(row) for row in rows(3)]]
    assert [answer.batch_size for answer in answers] == [3, 3, 3] and traced == [1, 4]
    observation, instructions = join_rows(rows(3), 3)
    seen = with_prompt(policy, observation, instructions)
    expected = jax.jit(policy.sample)(params, seen, jax.random.key(0), temperature=0.0)
    for answer, action, value in zip(answers, expected.action, expected.value, strict=True):
        np.testing.assert_allclose(answer.action, action[None], atol=1e-6)
        np.testing.assert_allclose(answer.value, value, rtol=1e-5)
    assert len({answer.action.tobytes() for answer in answers}) == 3


def test_one_client_does_not_wait_for_others(make):
    batcher = make(window_ms=3_600_000.0)
    assert batcher.submit(rows(1)[0]).result(60).batch_size == 1
    batcher.num_clients = 2
    late, started = [], threading.Event()

    def ask():
        started.set()
        late.append(batcher.submit(rows(2)[1]).result(60))

    first, thread = batcher.submit(rows(1)[0]), threading.Thread(target=ask)
    assert not first.done()  # It waits for the second client.
    thread.start()
    assert first.result(60).batch_size == 2
    thread.join()
    assert late[0].batch_size == 2


def test_what_is_wrong_with_one_request_is_its_own_error(toy, make):
    policy = toy[0]

    def tokenize(instructions, state):
        if "long" in instructions:
            raise ValueError("prompt: got 99 tokens, expected at most 12")
        return policy.tokenize(instructions, state)

    batcher = make(policy._replace(tokenize=tokenize))
    batcher.num_clients = 3
    good, other = rows(2)
    futures = [batcher.submit(row) for row in (good, Row({}, good.state, "long"), other)]
    assert futures[0].result(60).action.shape == futures[2].result(60).action.shape == (1, 2)
    with pytest.raises(MessageError, match="prompt: got 99 tokens"):
        futures[1].result(60)


def test_more_requests_than_a_batch_holds_are_several_and_a_stop_cancels_what_waits(make):
    batcher = make(window_ms=0.0)
    batcher.num_clients = 9
    sizes = [future.result(60).batch_size for future in [batcher.submit(row) for row in rows(9)]]
    assert max(sizes) <= 4


def test_decisions_at_a_temperature_follow_from_the_seed(make):
    actions = []
    for seed in (0, 0, 1):
        batcher = make(temperature=1.0, seed=seed)
        actions.append(np.array([batcher.submit(rows(1)[0]).result(60).action for _ in range(8)]))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert (actions[0] != actions[2]).any()
    assert len(np.unique(actions[0].reshape(8, -1), axis=0)) > 1
