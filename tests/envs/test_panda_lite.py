import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trimesh

from stare_jax.envs.maniskill import panda_lite

MESHES = Path("franka_description/meshes")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """URDF files that two threads asked for at once in an empty cache, and what they reported."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(panda_lite.ensure_panda_lite, lines.append) for _ in range(2)]
            urdfs = [job.result() for job in jobs]
        num_lines = len(lines)
        urdfs.append(panda_lite.ensure_panda_lite(lines.append))
        assert len(lines) == num_lines  # A second call finds it and says nothing.
    return urdfs, lines


def test_made_once_in_the_users_cache(made):
    urdfs, lines = made
    assert len(set(urdfs)) == 1
    assert urdfs[0].is_file()
    assert "low-polygon Panda" in lines[0]
    assert [path.name for path in urdfs[0].parent.parent.iterdir()] == [urdfs[0].parent.name]  # nothing left over


def test_physics_is_a_copy_and_visuals_are_small(made):
    stock, lite = panda_lite._panda_folder(), made[0][0].parent
    same = ["panda_v2.urdf", "panda_v2.srdf"]
    same += [str(MESHES / "collision" / path.name) for path in (stock / MESHES / "collision").iterdir()]
    assert len(same) > 10
    for name in same:
        assert (lite / name).read_bytes() == (stock / name).read_bytes(), name

    visuals = sorted(path.name for path in (stock / MESHES / "visual").glob("*.glb"))
    assert sorted(path.name for path in (lite / MESHES / "visual").iterdir()) == visuals
    num_faces = 0
    for name in visuals:
        before, after = (trimesh.load(folder / MESHES / "visual" / name) for folder in (stock, lite))
        np.testing.assert_allclose(after.bounds, before.bounds, atol=5e-3)
        num_faces += sum(len(mesh.faces) for mesh in after.geometry.values())
    assert 5_000 < num_faces < 15_000


@pytest.mark.slow
def test_two_processes_at_once(monkeypatch, tmp_path, made):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        urdfs = list(pool.map(panda_lite.ensure_panda_lite, [str, str]))
    assert urdfs[0] == urdfs[1]
    assert [path.name for path in urdfs[0].parent.parent.iterdir()] == [urdfs[0].parent.name]
    for path in (urdfs[0].parent / MESHES / "visual").iterdir():
        assert path.read_bytes() == (made[0][0].parent / MESHES / "visual" / path.name).read_bytes()


def test_missing_robot(monkeypatch):
    monkeypatch.setattr(panda_lite, "URDF_NAME", "panda_v9.urdf")
    with pytest.raises(FileNotFoundError, match="panda_v9.urdf: missing"):
        panda_lite._panda_folder()
