"""A run whose disk is full says so in one line, and goes on to the same end when there is room."""

import contextlib
import subprocess

import killed_toy
import pytest
import toy_run

from stare_jax.config import UserError
from stare_jax.runs.ipi import run_ipi


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """Yields a function that makes the disk larger."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [40, 150, 400])
def test_a_run_goes_on_when_the_disk_has_room_again(on_toy, finished_run, tmp_path, kilobytes):
    config = toy_run.make_config()
    with small_disk(tmp_path / "disk", kilobytes) as enlarge:
        directory = tmp_path / "disk" / "run"
        with pytest.raises((UserError, OSError)) as error:
            run_ipi(config, directory)
        assert "\n" not in str(error.value).strip() and str(error.value).strip()
        enlarge()
        run_ipi(config, directory)
        contents = killed_toy.kill.contents_of(directory)
    assert killed_toy.kill.differing(killed_toy.kill.contents_of(finished_run), contents) == []
