"""The command in a process of its own: openpi's protocol over a real socket, and clients that misbehave."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import venv
from pathlib import Path

import jax
import numpy as np
import pytest
from serving_toy import request, toy_policy, write_checkpoint
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync import client

from stare_jax.models.policy import with_prompt
from stare_jax.serve.messages import pack, unpack
from stare_jax.serve.requests import Keys, RequestReader, join_rows

ROOT = Path(__file__).resolve().parents[2]
# By its path: a file of benchmarks/ has the same name.
_command = importlib.util.spec_from_file_location("launch_serve", ROOT / "launch" / "serve.py")
serve = importlib.util.module_from_spec(_command)
_command.loader.exec_module(serve)
KEY = "Api-Key secret"


class Served:
    """A server at work."""

    def __init__(self, process, port, log):
        self.process, self.port, self.log = process, port, log

    @contextlib.contextmanager
    def connect(self, **options):
        """Yields (a connection, the metadata)."""
        uri, headers = f"ws://127.0.0.1:{self.port}", {"Authorization": KEY}
        with client.connect(uri, compression=None, max_size=None, additional_headers=headers, **options) as connection:
            yield connection, unpack(connection.recv(timeout=60))

    def ask(self, message):
        """Returns the reply to one message of a new client, text for an error."""
        with self.connect() as (connection, _):
            connection.send(message)
            return connection.recv(timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    write_checkpoint(folder / "run", *toy_policy())
    command = [sys.executable, "launch/serve.py", f"--checkpoint={folder / 'run/ppo'}", "--port=0", "--max-batch=2"]
    options = ["--api-key=secret", "--max-clients=4", "--max-message-mb=0.01"]
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        while "ws://" not in log.read_text("utf-8"):
            assert process.poll() is None, log.read_text("utf-8")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        port = int(log.read_text("utf-8").split("ws://127.0.0.1:")[1].split()[0])
        yield Served(process, port, log)
    finally:
        process.kill()
        process.wait()


def test_a_client_gets_the_metadata_then_the_policys_own_decisions(served):
    policy, params = toy_policy()
    reader = RequestReader(policy, (0, 0), Keys())
    observation, instructions = join_rows([reader.read(request(i)) for i in range(5)], 5)
    seen = with_prompt(policy, observation, instructions)
    expected = jax.jit(policy.sample)(params, seen, jax.random.key(0), temperature=0.0)
    with served.connect() as (connection, metadata):
        assert (metadata["action_dim"], metadata["action_horizon"]) == (2, 1)
        assert metadata["checkpoint"].startswith("ppo/1/")
        assert metadata["request"]["observation/state"] == "6 numbers"
        for i in range(5):
            connection.send(pack(request(i)))
            reply = unpack(connection.recv(timeout=60))
            np.testing.assert_allclose(reply["actions"], expected.action[i : i + 1], atol=1e-6)
            assert reply["policy_timing"]["infer_ms"] > 0 and reply["server_timing"]["infer_ms"] > 0
            # openpi's clients index every array by time.
            assert [name for name, part in reply.items() if isinstance(part, np.ndarray)] == ["actions"]
        assert reply["server_timing"]["prev_total_ms"] > 0


def test_what_is_wrong_is_told_and_hurts_nobody_else(served):
    with served.connect() as (other, _):
        for message, said in (
            (b"\xc1", "no msgpack"),
            ("text", "message: got text, expected msgpack"),
            (pack({}), "observation/state: got nothing"),
            (pack(request(0) | {"observation/state": np.zeros(5)}), "got 5 numbers, expected 6"),
        ):
            assert said in served.ask(message)
        with pytest.raises(ConnectionClosed, match="1009"):
            served.ask(bytes(20_000))
        with socket.create_connection(("127.0.0.1", served.port)) as rude:
            rude.sendall(b"\x00" * 100)
        other.send(pack(request(0)))
        assert unpack(other.recv(timeout=60))["actions"].shape == (1, 2)


def test_health_keys_and_the_number_of_clients(served):
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/healthz", timeout=60) as page:
        assert (page.status, page.read()) == (200, b"OK\n")
    with pytest.raises(InvalidStatus, match="401"), client.connect(f"ws://127.0.0.1:{served.port}"):
        pass
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(served.connect())[0] for _ in range(4)]
        with pytest.raises(ConnectionClosed, match="4 clients are connected"), served.connect():
            pass
        connections[0].send(pack(request(0)))
        assert unpack(connections[0].recv(timeout=60))["actions"].shape == (1, 2)


def test_clients_at_once_get_each_their_own_answers(served):
    alone = [unpack(served.ask(pack(request(i))))["actions"] for i in range(4)]
    found = {}

    def drive(i):
        with served.connect() as (connection, _):
            for _ in range(10):
                connection.send(pack(request(i)))
                found.setdefault(i, []).append(unpack(connection.recv(timeout=60)))

    threads = [threading.Thread(target=drive, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for reply in found[i]:
            np.testing.assert_allclose(reply["actions"], alone[i], atol=1e-6)
    assert max(reply["policy_timing"]["batch_size"] for replies in found.values() for reply in replies) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--checkpoint"),
        (["--checkpoint=/nowhere"], 1, "error: /nowhere"),
        (["--checkpoint=/nowhere", "--port=65536"], 2, "--port: got 65536, expected at most 65535"),
        (["--checkpoint=/nowhere", "--max-batch=0"], 2, "--max-batch"),
        (["--checkpoint=/nowhere", "--max-batch=257"], 2, "--max-batch: got 257, expected at most 256"),
        (["--checkpoint=/nowhere", "--temperature=-1"], 2, "--temperature: got -1.0, expected >= 0"),
        (["--checkpoint=/nowhere", "--window-ms=nan"], 2, "--window-ms: got nan, expected 0 to 1000"),
        (["--checkpoint=/nowhere", "--convention=other"], 2, "--convention"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, code, said):
    try:
        found = serve.main(arguments)
    except SystemExit as ended:
        found = ended.code
    shown = capsys.readouterr().err
    assert (found, "Traceback" in shown) == (code, False)
    assert said in shown


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_batches_are_powers_of_two_up_to_the_largest(most, sizes):
    assert serve.batch_sizes(most) == sizes


OPENPI_CLIENT = """
import sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="secret")
assert policy.get_server_metadata()["action_horizon"] == 1, policy.get_server_metadata()
broker = ActionChunkBroker(policy, action_horizon=1)
for i in range(3):
    action = broker.infer({"observation/state": np.full(6, 0.01 * i, np.float32), "prompt": "push"})["actions"]
    assert action.shape == (2,) and action.dtype == np.float32, action
try:
    policy.infer({"prompt": "push"})
except RuntimeError as error:
    assert "observation/state: got nothing" in str(error)
    print("driven by NumPy", np.__version__)
"""


@pytest.mark.slow
def test_openpis_published_client_drives_it(served, tmp_path):
    venv.create(tmp_path / "client", with_pip=True)
    python = tmp_path / "client/bin/python"
    install = [python, "-m", "pip", "install", "-q", "openpi-client", "typing_extensions"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"openpi-client cannot be installed: {installed.stderr.splitlines()[-1]}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    driven = subprocess.run(
        [python, "-c", OPENPI_CLIENT, str(served.port)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert "driven by NumPy 1." in driven.stdout, driven.stderr


def test_a_signal_stops_it_and_it_says_what_it_did(served):
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 130
    text = served.log.read_text("utf-8")
    assert "stopped after" in text and "Traceback" not in text
