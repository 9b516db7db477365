"""Parts that the simulator's tests share: scenes built once a session, and the reason to skip what renders."""

import gc

import pytest

from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill import vulkan
from stare_jax.envs.maniskill.simulator import Simulator


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Leaves what is in memory to itself, as workers do: ManiSkill collects garbage with every scene that it builds or
    closes, and the process of a suite has a second's worth of objects."""
    gc.freeze()


@pytest.fixture(scope="session")
def vulkan_driver():
    """Skips where nothing can be rendered."""
    if not vulkan.has_gpu_driver() and vulkan.software_driver() is None:
        pytest.skip("needs a Vulkan driver: no GPU's and no lvp_icd*.json of mesa-vulkan-drivers found")


@pytest.fixture(scope="session")
def simulators():
    """Returns a function env_id -> Simulator without images; each is built once."""
    built = {}

    def get(env_id):
        if env_id not in built:
            built[env_id] = Simulator(EnvConfig(env_id=env_id, image_size=None, use_state="tcp"))
            gc.freeze()  # ManiSkill has been imported
        return built[env_id]

    yield get
    gc.freeze()
    for simulator in built.values():
        simulator.close()


@pytest.fixture(scope="session")
def rendering_simulator(vulkan_driver):
    """PushCube with 64-pixel images of the low-polygon scene."""
    simulator = Simulator(EnvConfig(image_size=64))
    yield simulator
    gc.freeze()
    simulator.close()
