"""Spares SAPIEN twelve seconds before the first image: the table of how surfaces reflect their surroundings.

A process that renders on the CPU spends them on a texture, `BRDFLUT`, that its shaders multiply with the light of an
environment map. The scenes here have no such map, hence no such light, and images are the same to the bit whatever the
texture holds.
"""

import functools
import tempfile
from typing import Any

import numpy as np


def skip_reflections(render_system: Any, camera: Any) -> None:
    """Gives a camera an empty table, unless its scene has an environment map.

    Args:
        render_system: SAPIEN's, of the scene.
        camera: SAPIEN's component, that has not taken a picture yet.
    """
    if render_system.cubemap is None:
        camera._internal_renderer.set_custom_texture("BRDFLUT", _empty_table()[0])


@functools.cache
def _empty_table() -> tuple[Any, Any]:
    """Returns the texture, and the file that it is made from: SAPIEN reads it for the first picture, so both stay."""
    import sapien
    from PIL import Image

    file = tempfile.NamedTemporaryFile(suffix=".png")  # noqa: SIM115
    Image.fromarray(np.zeros((1, 1, 4), np.uint8)).save(file.name)
    context = sapien.render.SapienRenderer()._internal_context
    return context.create_texture_from_file(file.name, 1), file
