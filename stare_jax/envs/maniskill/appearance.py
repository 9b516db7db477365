"""Perturbations of what the camera sees: light, table, texture, noise, colours. Physics stays as it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stare_jax.envs.maniskill.built import OVER, Built, Ongoing
from stare_jax.envs.maniskill.widowx import mask_of, names_shown

BRIGHTNESS = ((0.4, 0.6), (1.6, 2.2))
"""factors on the colour of every light: half of the episodes are darker, the others brighter"""
TINT = (0.7, 1.3)
"""factor on red, green and blue, each by itself"""
ELEVATION = (20.0, 50.0)
"""degrees above the horizon from which directional lights come"""
WEAK, STRONG = 0.3, 0.5
"""shares of a foreign texture in an image, those of RL4VLA"""
PATCH = (16, 4)
"""a patch of a texture is between 1/16 and 1/4 of the image's shorter side"""
NUM_COLOURS = 3
COVER = ((-0.74, 0.46), (-1.2, 1.2))
"""metres along x and y: the top of ManiSkill's table"""
COVER_HEIGHT = 5e-4
"""metres above the table: below the marked goals, which lie 1 mm above it"""

COLOURS = {
    "yellow": (1.0, 0.9, 0.0),
    "purple": (0.45, 0.0, 0.6),
    "orange": (1.0, 0.4, 0.0),
    "white": (1.0, 1.0, 1.0),
}
"""colours that no object of the tasks has -> red, green, blue in [0, 1]"""
COLOURED = {"PushCube-v1": ("blue",), "PullCube-v1": ("blue",), "StackCube-v1": ("red", "green")}
"""task -> colours by which its instruction names the objects, in the order of `Scene.objects`"""


def change_light(built: Built, rng: np.random.Generator) -> Ongoing:
    """Changes brightness, colour and direction of all lights; see the constants above."""
    import sapien

    factor = rng.uniform(*BRIGHTNESS[rng.integers(len(BRIGHTNESS))]) * rng.uniform(*TINT, 3)
    inner = built.env.scene.sub_scenes[0]
    system = inner.render_system
    system.ambient_light = np.asarray(system.ambient_light) * factor
    for entity in inner.entities:
        light = entity.find_component_by_type(sapien.render.RenderDirectionalLightComponent)
        if light is not None:
            light.color = np.asarray(light.color) * factor
            azimuth, elevation = rng.uniform(0.0, 2 * np.pi), np.deg2rad(rng.uniform(*ELEVATION))
            level = np.cos(elevation)
            direction = -np.array([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)])
            light.local_pose = sapien.Pose()
            entity.set_pose(sapien.Pose(q=_along(direction)))
    return OVER


def _along(direction: np.ndarray) -> list[float]:
    """Returns the quaternion of the shortest rotation from the x axis to a direction of length 1, not -x."""
    w, v = 1.0 + direction[0], np.cross([1.0, 0.0, 0.0], direction)
    return (np.array([w, *v]) / np.sqrt(2 * w)).tolist()


def change_table(built: Built, rng: np.random.Generator) -> Ongoing:
    """Covers the table with a random texture: the Panda's by a sheet, the WidowX's photograph by half its colour."""
    if built.backdrop is not None:
        built.backdrop.photograph = mix(built.backdrop.photograph, random_texture(rng, *built.image_shape), STRONG)
        return OVER
    import sapien

    texture = random_texture(rng, 256, 256)
    rgba = np.concatenate([texture, np.full((256, 256, 1), 255, np.uint8)], axis=-1)
    material = sapien.render.RenderMaterial(roughness=0.9)
    material.base_color_texture = sapien.render.RenderTexture2D(rgba, "R8G8B8A8Unorm", srgb=True)
    (low_x, high_x), (low_y, high_y) = COVER
    corners = [(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y)]
    sheet = sapien.render.RenderShapeTriangleMesh(
        vertices=np.array([(x, y, COVER_HEIGHT) for x, y in corners], np.float32),
        triangles=np.array([[0, 1, 2], [0, 2, 3]], np.uint32),
        normals=np.tile(np.array([0, 0, 1], np.float32), (4, 1)),
        uvs=np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32),
        material=material,
    )
    body, entity = sapien.render.RenderBodyComponent(), sapien.Entity()
    body.attach(sheet)
    entity.add_component(body)
    built.env.scene.sub_scenes[0].add_entity(entity)
    return OVER


def texture_on_foreground(share: float):
    """Returns the perturbation that lays a texture over robot and objects, stretched to the box around them.

    The box moves with the robot, and the texture with it.
    """

    def begin(built: Built, rng: np.random.Generator) -> Ongoing:
        texture, is_shown = random_texture(rng, *built.image_shape), _foreground(built)

        def see(image: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
            is_front = names_shown(is_shown, segmentation)
            if not is_front.any():
                return image
            top, bottom, left, right = _box(is_front)
            rows = np.arange(bottom - top) * len(texture) // (bottom - top)
            columns = np.arange(right - left) * texture.shape[1] // (right - left)
            result, inside = image.copy(), np.s_[top:bottom, left:right]
            mixed = mix(image[inside], texture[np.ix_(rows, columns)], share)
            result[inside] = np.where(is_front[inside][..., None], mixed, image[inside])
            return result

        return Ongoing(see=see)

    return begin


def noise_on_image(share: float):
    """Returns the perturbation that lays a texture over the whole image, which shifts as the robot moves.

    The texture is twice as large as the image; the middle of the box around robot and objects is where its part that
    is seen begins.
    """

    def begin(built: Built, rng: np.random.Generator) -> Ongoing:
        height, width = built.image_shape
        texture, is_shown = random_texture(rng, 2 * height, 2 * width), _foreground(built)

        def see(image: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
            is_front = names_shown(is_shown, segmentation)
            top, bottom, left, right = _box(is_front) if is_front.any() else (0, 0, 0, 0)
            row, column = (top + bottom) // 2, (left + right) // 2
            return mix(image, texture[row : row + height, column : column + width], share)

        return Ongoing(see=see)

    return begin


def colours_of(env_id: str, rng: np.random.Generator) -> list[str]:
    """Returns the names of the new colours of a task's objects, as many as its instruction names, at least two."""
    number = max(2, len(COLOURED.get(env_id, ())))
    return [str(name) for name in rng.permutation(list(COLOURS))[:number]]


def change_colours(built: Built, rng: np.random.Generator) -> Ongoing:
    """Paints the objects in other colours, the ends of the peg in two."""
    import sapien

    names = colours_of(built.env_id, rng)
    bodies = [
        actor._objs[0].find_component_by_type(sapien.render.RenderBodyComponent)
        for actor in dict.fromkeys(built.scene.objects(built.env))
    ]
    # A marked goal keeps its look: cubes have one part, the peg has one for each half.
    shapes = [shape for body in bodies for shape in body.render_shapes]
    number = len(COLOURED.get(built.env_id, names))
    for shape, name in zip(shapes[:number], names, strict=False):
        for material in _materials(shape):
            material.base_color = [*COLOURS[name], 1.0]
    return OVER


def _materials(shape: Any) -> Sequence[Any]:
    return [part.material for part in shape.parts] if hasattr(shape, "parts") else [shape.material]


def random_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a texture uint8 `[H, W, 3]` of square patches in three random colours."""
    shorter = min(height, width)
    side = int(rng.integers(max(1, shorter // PATCH[0]), max(2, shorter // PATCH[1])))
    colours = rng.integers(0, 256, (NUM_COLOURS, 3), dtype=np.uint8)
    patches = rng.integers(NUM_COLOURS, size=(-(-height // side), -(-width // side)))
    return colours[np.repeat(np.repeat(patches, side, axis=0), side, axis=1)[:height, :width]]


def mix(image: np.ndarray, texture: np.ndarray, share: float) -> np.ndarray:
    """Returns `(1 - share) image + share texture`, uint8, of the shape of both."""
    return np.rint((1 - share) * image + share * texture.astype(np.float32)).astype(np.uint8)


def _foreground(built: Built) -> np.ndarray:
    """Returns which ids of a segmentation are the robot's and the objects', see `mask_of`."""
    if built.backdrop is not None:
        return built.backdrop.is_shown
    return mask_of([*built.scene.objects(built.env), *built.env.agent.robot.get_links()])


def _box(is_front: np.ndarray) -> tuple[int, int, int, int]:
    """Returns (top, bottom, left, right) of the smallest box around a mask `[H, W]`, ends excluded."""
    rows, columns = np.flatnonzero(is_front.any(axis=1)), np.flatnonzero(is_front.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
