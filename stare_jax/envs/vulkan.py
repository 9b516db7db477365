"""Which Vulkan driver draws the images: the GPU's where there is one, Mesa's software driver otherwise."""

import os
from collections.abc import Iterator
from pathlib import Path

DRIVER_VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
_MANIFEST_FOLDERS = tuple(
    Path(folder) / "vulkan/icd.d" for folder in ("/etc", "/usr/share", "/usr/local/share", "/usr/local/etc")
)


def manifests(pattern: str) -> Iterator[Path]:
    """Yields the installed Vulkan driver manifests whose file name matches a glob pattern."""
    for folder in _MANIFEST_FOLDERS:
        yield from sorted(folder.glob(pattern))


def has_gpu_driver() -> bool:
    """Says whether an NVIDIA GPU and its Vulkan driver are there, the only one that SAPIEN picks by itself."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and any(manifests("nvidia*.json"))


def software_driver() -> Path | None:
    """Returns the manifest of Mesa's software driver (lavapipe), None where it is not installed."""
    return next(manifests("lvp_icd*.json"), None)


def driver_environment() -> dict[str, str]:
    """Returns the environment variables that a rendering process needs on this machine, before SAPIEN is loaded.

    Empty where a GPU draws, and where the user has chosen a driver. One rendering thread a process: processes are what
    runs in parallel here.
    """
    environment = {} if "LP_NUM_THREADS" in os.environ else {"LP_NUM_THREADS": "1"}
    driver = software_driver()
    if has_gpu_driver() or driver is None or any(name in os.environ for name in DRIVER_VARIABLES):
        return {} if has_gpu_driver() else environment
    return environment | dict.fromkeys(DRIVER_VARIABLES, str(driver))


def select_driver() -> str:
    """Prepares this process for rendering and returns ManiSkill's name of the device to render on."""
    os.environ.update(driver_environment())
    return "gpu" if has_gpu_driver() else "cpu"
