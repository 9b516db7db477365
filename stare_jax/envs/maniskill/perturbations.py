"""Perturbations of a task's episodes by name, on the three axes of RL4VLA: vision, semantics, execution.

A perturbation changes something that no training has seen, and changes nothing else: the same seed begins with the same
state as without it, but for what it changes. All that it draws follows from its name and the episode's seed, whatever
process plays the episode and whatever was played before.

Reference: Liu et al., What can RL bring to VLA generalization?, 2025 (RL4VLA, arXiv:2505.19789). Its numbers are those
of its environments `PutOnPlateInScene25*`.
"""

import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from stare_jax.envs.maniskill import appearance, placement
from stare_jax.envs.maniskill.built import OVER, Built, Ongoing
from stare_jax.stages import TaskSpec

AXES = ("vision", "semantics", "execution")

PARAPHRASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "PushCube-v1": (
            "slide the blue cube to the target",
            "move the blue cube forward onto the target",
            "push the blue block to the goal",
            "press the blue cube toward the target region",
        ),
        "PullCube-v1": (
            "slide the blue cube back to the target",
            "move the blue cube back onto the target",
            "pull the blue block to the goal",
            "pull the blue object toward the target region",
        ),
        "LiftPegUpright-v1": (
            "stand the peg up",
            "put the peg upright on its end",
            "set the peg upright on the table",
            "lift and turn the peg until upright",
        ),
        "StackCube-v1": (
            "put the red cube on the green cube",
            "place the red cube onto the green cube",
            "set the red block down on the green block",
            "lift the red cube up onto the green cube",
        ),
        "PutSpoonOnTableClothInScene-v1": (
            "place the spoon onto the towel",
            "set the spoon down on the cloth",
            "lift the spoon up onto the towel",
            "move the spoon from the table to the towel",
        ),
        "PutCarrotOnPlateInScene-v1": (
            "place the carrot onto the plate",
            "set the carrot down on the plate",
            "lift the carrot up onto the plate",
            "move the carrot from the table to the plate",
        ),
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": (
            "put the green cube on the yellow cube",
            "place the green block onto the yellow block",
            "set the green block down on the yellow block",
            "lift the green cube up onto the yellow cube",
        ),
        "PutEggplantInBasketScene-v1": (
            "place the eggplant in the yellow basket",
            "drop the eggplant into the basket",
            "set the eggplant down in the basket",
            "move the eggplant into the yellow basket",
        ),
    }
)
"""task -> other words for its instruction, all of them words that the small tokenizer without files knows, too"""
_PLAIN = (*appearance.COLOURED, "LiftPegUpright-v1")


class Perturbation(NamedTuple):
    """One way in which episodes differ from those of training."""

    changes: str
    """The change, its size, and the source of the number."""
    begin: Callable[[Built, np.random.Generator], Ongoing]
    """(the scene in the first state of an episode, rebuilt; random numbers of the episode) -> what goes on."""
    seen_in: str = "images"
    """Part of the observation that shows it: "images" or "words". A policy that does not read it is not perturbed.
    "" where it changes the state itself, which every policy meets."""
    tasks: tuple[str, ...] | None = None
    """Tasks that can have it; None for all, also a user's own."""
    because: str = ""
    """Reason why other tasks cannot."""


def _nothing(built: Built, rng: np.random.Generator) -> Ongoing:
    """Changes nothing in the scene: the words alone are others."""
    return OVER


_NO_RANGE = "expected one of the eight tasks: where training begins in another task is not known"

PERTURBATIONS: Mapping[str, Perturbation] = MappingProxyType(
    {
        "vision/light": Perturbation(
            "Brightness of all lights times 0.4 to 0.6 or 1.6 to 2.2, their red, green and blue each times 0.7 to 1.3; "
            "directional lights come from a random side, 20 to 50 degrees above the horizon. Numbers are our own.",
            appearance.change_light,
        ),
        "vision/table": Perturbation(
            "Panda: the table is covered by patches of three random colours, 7 to 60 cm in size. WidowX: such a "
            "texture is mixed, half and half, into the photograph behind robot and objects. In the place of RL4VLA's "
            "unseen tables, which are other photographs.",
            appearance.change_table,
            tasks=tuple(placement.PLACES),
            because="expected one of the eight tasks: where another task has its table is not known",
        ),
        "vision/texture_weak": Perturbation(
            "A random texture over robot and objects, stretched to the box around them, with which it moves; its share "
            "in their colour is 0.3, as in RL4VLA's dynamic textures (weak).",
            appearance.texture_on_foreground(appearance.WEAK),
        ),
        "vision/texture_strong": Perturbation(
            "As vision/texture_weak, with a share of 0.5, as in RL4VLA's dynamic textures (strong).",
            appearance.texture_on_foreground(appearance.STRONG),
        ),
        "vision/noise_weak": Perturbation(
            "A random texture over the whole image, which shifts as the robot moves; its share in the colours is 0.3, "
            "as in RL4VLA's dynamic noise (weak).",
            appearance.noise_on_image(appearance.WEAK),
        ),
        "vision/noise_strong": Perturbation(
            "As vision/noise_weak, with a share of 0.5, as in RL4VLA's dynamic noise (strong).",
            appearance.noise_on_image(appearance.STRONG),
        ),
        "semantics/words": Perturbation(
            "The instruction in other words: one of four for each task, `PARAPHRASES`. As RL4VLA's unseen instruction "
            "phrasings, which are 16 templates.",
            _nothing,
            seen_in="words",
            tasks=tuple(PARAPHRASES),
            because="expected one of the eight tasks: there are no other words for another task's instruction",
        ),
        "semantics/colour": Perturbation(
            "The objects have other colours (yellow, purple, orange, white), and the instruction names them where "
            "it names the old ones. In the place of RL4VLA's unseen objects.",
            appearance.change_colours,
            tasks=_PLAIN,
            because=f"expected one of {', '.join(_PLAIN)}: objects of other tasks are not of plain colours",
        ),
        "execution/start_pose": Perturbation(
            "The object begins 30 to 60 mm outside of all places where training begins (along x or y), and on the "
            "WidowX turned by 30 to 60 degrees against its official start (training: up to 15 mm and 15 degrees from "
            "one). A marked goal moves with a cube that is pushed or pulled. RL4VLA: 30 mm, unseen angles.",
            placement.change_start,
            seen_in="",
            tasks=tuple(placement.PLACES),
            because=_NO_RANGE,
        ),
        "execution/robot_pose": Perturbation(
            "The arm's joints begin 0.08 to 0.15 rad from their usual angles, the last one 0.3 to 0.6 rad, each to "
            "either side, with the tool within 10 cm of its usual place and at most 5 cm lower. Angles as in RL4VLA.",
            placement.change_robot,
            seen_in="",
        ),
        "execution/object_moved": Perturbation(
            "After 5 actions, as in RL4VLA, the object is moved by 80 to 120 mm to another place in the range where "
            "training begins, at rest and as high as at first; RL4VLA: by more than 150 mm.",
            placement.move_object,
            seen_in="",
            tasks=tuple(placement.PLACES),
            because=_NO_RANGE,
        ),
    }
)
"""Name, "axis/what" -> perturbation."""


def obstacle(name: str, env_id: str, *, has_images: bool) -> str:
    """Returns the reason why a task's episodes cannot have a perturbation, as an expectation; "" where they can.

    Args:
        name: of the perturbation.
        env_id: the simulator's name of the task.
        has_images: whether the simulator draws.
    """
    if name not in PERTURBATIONS:
        return f"expected one of {', '.join(PERTURBATIONS)}"
    perturbation = PERTURBATIONS[name]
    if perturbation.tasks is not None and env_id not in perturbation.tasks:
        return perturbation.because
    if perturbation.seen_in == "images" and not has_images:
        return "expected images (image_size above 0), in which alone it is seen"
    return ""


def episode_rng(name: str, seed: int) -> np.random.Generator:
    """Returns the random numbers of an episode that no other perturbation and no other seed has."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def episode_instruction(name: str, spec: TaskSpec, seed: int) -> str:
    """Returns the instruction of the episode of a seed.

    Args:
        name: of the perturbation, "" for none.
        spec: the task.
        seed: of the episode.
    """
    if name == "semantics/words":
        return str(episode_rng(name, seed).choice(PARAPHRASES[spec.env_id]))
    if name == "semantics/colour":
        return _recoloured(spec, appearance.colours_of(spec.env_id, episode_rng(name, seed)))
    return spec.instruction


def instructions_of(name: str, spec: TaskSpec) -> tuple[str, ...]:
    """Returns all instructions that the episodes of a task may have with a perturbation."""
    if name == "semantics/words":
        return PARAPHRASES[spec.env_id]
    if name == "semantics/colour":
        pairs = [(first, second) for first in appearance.COLOURS for second in appearance.COLOURS if first != second]
        return tuple(dict.fromkeys(_recoloured(spec, pair) for pair in pairs))
    return (spec.instruction,)


def _recoloured(spec: TaskSpec, names: list[str] | tuple[str, ...]) -> str:
    words = spec.instruction
    for old, new in zip(appearance.COLOURED.get(spec.env_id, ()), names, strict=False):
        words = words.replace(old, new)
    return words
