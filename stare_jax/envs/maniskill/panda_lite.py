"""Low-polygon visuals: the same physics, rendered several times faster where the CPU draws the triangles.

The visual meshes of ManiSkill's Panda have 135,000 triangles, which a software renderer draws in about 30 ms whatever
the image's size; decimated to 12,000 they cost 1.5 ms. The copy is made once, on the user's machine, from the installed
package. Joints, inertias and collision shapes are copied untouched. The floor, a grid of 20,000 triangles, is drawn as
two.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

URDF_NAME = "panda_v2.urdf"
KEPT_FRACTION = 0.08
MIN_FACES = 120
RECIPE = 1  # Raise it whenever the meshes come out different for the same settings.

_VISUALS = Path("franka_description/meshes/visual")
_GREY = (200, 200, 200, 255)
_DECIMATION = threading.Lock()  # The decimating library keeps its triangles in globals and releases the interpreter.


def cache_root() -> Path:
    """Returns the per-user cache folder of this library."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stare_jax"


def report_to_stderr(line: str) -> None:
    """Prints a line about progress, at once."""
    print(line, file=sys.stderr, flush=True)


def ensure_panda_lite(report: Callable[[str], None] = report_to_stderr) -> Path:
    """Returns the URDF file of the low-polygon Panda, made first if need be (a few seconds, once).

    Safe to call from several threads and processes at once: the folder appears under its final name only when it is
    complete.

    Args:
        report: is told in one line when the meshes are about to be made, and in another when they are.

    Raises:
        FileNotFoundError: mani_skill or its Panda is not installed.
    """
    source = _panda_folder()
    target = cache_root() / f"panda-lite-{_cache_key()}"
    with _DECIMATION:
        if not (target / URDF_NAME).exists():
            report(f"making low-polygon Panda meshes in {target} (a few seconds, once)")
            start = time.monotonic()
            _publish(source, target)
            report(f"made them in {time.monotonic() - start:.1f} s")
    return target / URDF_NAME


def _cache_key() -> str:
    settings = f"{importlib.metadata.version('mani_skill')} {KEPT_FRACTION} {MIN_FACES} {RECIPE}"
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def _panda_folder() -> Path:
    spec = importlib.util.find_spec("mani_skill")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("mani_skill: not installed, expected its Panda; run `python launch/doctor.py`")
    folder = Path(spec.origin).parent / "assets/robots/panda"
    if not (folder / URDF_NAME).exists():
        raise FileNotFoundError(f"{folder / URDF_NAME}: missing; run `python launch/doctor.py`")
    return folder


def _publish(source: Path, target: Path) -> None:
    """Builds the folder under another name and renames it, so that nobody sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        built = Path(scratch) / "panda"
        _copy_all_but_visuals(source, built)
        for mesh in sorted((source / _VISUALS).glob("*.glb")):
            (built / _VISUALS / mesh.name).write_bytes(_decimate(mesh))
        try:
            built.rename(target)
        except OSError:
            if not (target / URDF_NAME).exists():  # Another process was faster, or the folder really cannot be made.
                raise


def _copy_all_but_visuals(source: Path, target: Path) -> None:
    (target / _VISUALS).mkdir(parents=True)
    for description in source.glob(f"{Path(URDF_NAME).stem}.*"):  # The SRDF beside it says which links may collide.
        shutil.copy(description, target)
    collision = _VISUALS.with_name("collision")
    shutil.copytree(source / collision, target / collision)


def _decimate(path: Path) -> bytes:
    """Returns the scene of a glTF file with fewer triangles and one plain colour per mesh, as glTF bytes."""
    import trimesh

    scene, light = trimesh.load(path), trimesh.Scene()
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        original = scene.geometry[name]
        mesh = trimesh.Trimesh(original.vertices, original.faces, process=True)
        mesh.merge_vertices(merge_tex=True, merge_norm=True)
        if len(mesh.faces) > MIN_FACES:
            mesh = mesh.simplify_quadric_decimation(face_count=max(MIN_FACES, int(len(mesh.faces) * KEPT_FRACTION)))
        mesh.apply_transform(transform)
        colour = getattr(getattr(original.visual, "material", None), "baseColorFactor", None)
        material = trimesh.visual.material.PBRMaterial(
            baseColorFactor=np.asarray(_GREY if colour is None else colour, np.uint8),
            metallicFactor=0.0,
            roughnessFactor=0.6,
        )
        mesh.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(mesh.vertices), 2)), material=material)
        light.add_geometry(mesh)
    return trimesh.exchange.gltf.export_glb(light)


@contextlib.contextmanager
def lite_panda_agent(urdf_path: Path) -> Iterator[None]:
    """While active, scenes that ask for the robot "panda" are built with the description at `urdf_path`.

    Tasks place their robot by its name, so the variant has to answer to the same one.
    """
    from mani_skill.agents.registration import REGISTERED_AGENTS, AgentSpec
    from mani_skill.agents.robots.panda.panda import Panda

    variant = type("PandaLite", (Panda,), {"urdf_path": str(urdf_path)})
    original = REGISTERED_AGENTS["panda"]
    REGISTERED_AGENTS["panda"] = AgentSpec(variant, original.asset_download_ids)
    try:
        yield
    finally:
        REGISTERED_AGENTS["panda"] = original


def flatten_floor(scene: Any) -> None:
    """Draws the floor of a built `ManiSkillScene` as two triangles; it is one plane with one texture."""
    import sapien

    floor = scene.actors.get("ground")
    entity = floor._objs[0] if floor is not None else None
    body = entity.find_component_by_type(sapien.render.RenderBodyComponent) if entity is not None else None
    if body is None:
        return
    part = body.render_shapes[0].parts[0]
    xy = part.vertices[:, :2]
    low, high = xy.min(axis=0), xy.max(axis=0)
    corners = [low, (high[0], low[1]), high, (low[0], high[1])]
    chosen = [int(np.argmin(np.sum((xy - corner) ** 2, axis=1))) for corner in corners]
    quad = sapien.render.RenderShapeTriangleMesh(
        vertices=part.vertices[chosen],
        triangles=np.array([[0, 1, 2], [0, 2, 3]], np.uint32),
        normals=np.tile(np.array([0, 0, 1], np.float32), (4, 1)),
        uvs=part.get_vertex_uv()[chosen],
        material=part.material,
    )
    entity.remove_component(body)
    flat = sapien.render.RenderBodyComponent()
    flat.attach(quad)
    entity.add_component(flat)
