"""Processes of one run, on fake devices, and what they print."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = f"--config={HERE / 'pod_config.py'}"


def start(mode, folder, *flags, variant="", num_processes=2, num_devices=8):
    """Starts the processes of a run, each with its share of the devices."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for number in range(num_processes):
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={num_devices // num_processes}",
            "JAX_PLATFORMS": "cpu",
            # Two that write at once would read each other's half-written files.
            "JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled_{num_processes}_{number}"),
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        pod = [f"--coordinator={address}", f"--num_processes={num_processes}", f"--process_id={number}"]
        command = [
            sys.executable,
            str(HERE / "pod_process.py"),
            mode,
            str(folder),
            CONFIG + variant,
            "--config.mesh.data=-1",
        ]
        command += [*(pod if num_processes > 1 else ()), "--lost_after_s=20", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def finish(processes, timeout=400):
    """Returns (exit code, output, errors) of every process."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def reports(results):
    """Returns what every process printed last."""
    for code, _, errors in results:
        assert code == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for _, output, _ in results]
