import pytest

from stare_jax.envs import vulkan


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without drivers, and without a choice in its environment."""
    for name in (*vulkan.DRIVER_VARIABLES, "LP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vulkan, "_MANIFEST_FOLDERS", (tmp_path,))
    return tmp_path


def test_software_driver_is_selected(machine):
    manifest = machine / "lvp_icd.x86_64.json"
    manifest.touch()
    (machine / "intel_icd.json").touch()
    assert vulkan.software_driver() == manifest
    assert vulkan.driver_environment() == {
        "LP_NUM_THREADS": "1",
        "VK_DRIVER_FILES": str(manifest),
        "VK_ICD_FILENAMES": str(manifest),
    }


def test_the_users_choice_is_kept(machine, monkeypatch):
    (machine / "lvp_icd.json").touch()
    monkeypatch.setenv("VK_ICD_FILENAMES", "/somewhere/mine.json")
    monkeypatch.setenv("LP_NUM_THREADS", "4")
    assert vulkan.driver_environment() == {}
    assert vulkan.select_driver() == "cpu"


def test_no_driver_is_an_error_with_a_remedy(machine):
    with pytest.raises(RuntimeError, match="no Vulkan driver.*doctor.py"):
        vulkan.select_driver()
