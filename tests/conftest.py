"""What the tests of several rooms share."""

import pytest


@pytest.fixture(scope="session")
def widowx_assets():
    """Skips where the files of the WidowX tasks are not on this machine."""
    from stare_jax.envs.building import import_mani_skill, require_assets
    from stare_jax.envs.scenes import SCENES

    try:
        import_mani_skill()
        require_assets(SCENES["PutCarrotOnPlateInScene-v1"].assets)
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
