"""The doctor's findings: run for real where that is cheap, its explanations on made-up machines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import doctor
import pytest
import system

ROOT = Path(__file__).resolve().parents[2]
CHEAP = ["python", "packages", "machine", "disk", "libraries", "vulkan", "ffmpeg", "assets", "extras"]


def test_runs_for_real():
    command = [sys.executable, str(ROOT / "launch/doctor.py"), "--json", "--only", *CHEAP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == CHEAP
    for check in report["checks"]:
        assert check.keys() == {"name", "status", "detail", "remedy", "seconds"}
        assert check["status"] in ("ok", "warn", "fail")
        assert check["detail"]
        assert bool(check["remedy"]) == (check["status"] != "ok"), check
    assert report["ok"] == all(check["status"] != "fail" for check in report["checks"])
    assert done.returncode == (0 if report["ok"] else 1)


def test_works_and_explains_without_any_package(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    # -S: no site-packages, which is what a machine looks like before the set-up.
    command = [sys.executable, "-S", "-E", str(tmp_path / "launch/doctor.py"), "--only", "python", "packages"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "\nFAIL  packages" in done.stdout
    assert "-> run `make setup`" in done.stdout
    assert done.stdout.rstrip().endswith("1 of 2 checks failed: packages")


def test_help_lists_the_checks():
    done = subprocess.run([sys.executable, str(ROOT / "launch/doctor.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in doctor.CHECKS)


def test_probe_returns_what_was_printed_and_what_was_wrong():
    assert doctor.probe("import sys; print(sys.argv[1])", "x", timeout_s=60) == (0, "x", "")
    status, output, complaint = doctor.probe("print('numpy', flush=True); import nonexistent", timeout_s=60)
    assert (status, output) == (1, "numpy")
    assert complaint == "ModuleNotFoundError: No module named 'nonexistent'"


def test_probe_survives_a_crash_and_a_hang():
    status, _, complaint = doctor.probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", timeout_s=60)
    assert status < 0
    assert complaint == "killed by signal 11"
    status, _, complaint = doctor.probe("import time; time.sleep(60)", timeout_s=1)
    assert status == 124
    assert "no answer within 1 s" in complaint


def test_probe_finds_the_error_between_traceback_and_advice():
    code = "raise RuntimeError('no device\\n\\n`python doctor.py` knows more')"
    assert doctor.probe(code, timeout_s=60)[2] == "RuntimeError: no device"


@pytest.fixture
def answer(monkeypatch):
    """Makes every probe answer with the given (status, output, complaint)."""

    def set_answer(*answer):
        monkeypatch.setattr(doctor, "probe", lambda *args, **kwargs: answer)

    return set_answer


def test_imports_name_the_package_that_failed(answer):
    answer(1, "numpy\njax\ntorch", "ImportError: libGL.so.1: cannot open shared object file")
    check = doctor.check_imports()
    assert (check.status, check.remedy) == ("fail", "see `libraries`")
    assert check.detail.startswith("torch: ImportError: libGL.so.1")


def test_devices_warn_where_a_gpu_is_left_unused(answer, monkeypatch):
    answer(0, "cpu, 1 x cpu", "")
    monkeypatch.setattr(system, "has_nvidia_gpu", lambda: True)
    check = doctor.check_devices()
    assert check.status == "warn"
    assert ".[gpu]" in check.remedy
    monkeypatch.setattr(system, "has_nvidia_gpu", lambda: False)
    assert doctor.check_devices() == ("ok", "JAX: cpu, 1 x cpu", "")


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ((0, "a line of the simulator\n64 64 48.8", ""), "ok", "64 x 64"),
        ((0, "64 64 0.0", ""), "fail", "one colour"),
        ((1, "", "RuntimeError: failed to find a rendering device"), "fail", "failed to find a rendering device"),
    ],
)
def test_frame(answer, output, status, said):
    answer(*output)
    check = doctor.check_frame()
    assert check.status == status
    assert said in check.detail


@pytest.mark.slow
def test_a_frame_for_real():
    vulkan = doctor.check_vulkan()
    if vulkan.status != "ok":
        pytest.skip(f"nothing can be rendered: {vulkan.detail}")
    assert doctor.check_frame() == ("ok", "PushCube-v1, 64 x 64", "")


def test_vulkan_failure_names_the_remedy(monkeypatch):
    monkeypatch.setattr(system, "vulkan_problem", lambda: "Mesa 22.3.6 is too old")
    check = doctor.check_vulkan()
    assert (check.status, check.detail) == ("fail", "Mesa 22.3.6 is too old")
    assert "administrator" in check.remedy


def test_vulkan_says_when_the_environment_names_a_driver_that_is_not_there(monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", "/nonexistent/icd.json")
    check = doctor.check_vulkan()
    assert check.status == "fail"
    assert check.detail == "/nonexistent/icd.json does not exist"
    assert "unset VK_DRIVER_FILES" in check.remedy


def test_assets_name_the_download(monkeypatch, tmp_path):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    (tmp_path / "data/tasks/bridge_v2_real2sim_dataset/custom").mkdir(parents=True)
    check = doctor.check_assets()
    assert check.status == "warn"
    assert "mani_skill.utils.download_asset widowx250s" in check.remedy
    assert "bridge_v2_real2sim" not in check.remedy
    (tmp_path / "data/robots/widowx").mkdir(parents=True)
    (tmp_path / "data/robots/widowx/wx250s.urdf").touch()
    assert doctor.check_assets().status == "ok"


@pytest.mark.parametrize(("free_gb", "status"), [(1, "fail"), (5, "warn"), (50, "ok")])
def test_disk(monkeypatch, free_gb, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 1e9))
    assert doctor.check_disk().status == status
