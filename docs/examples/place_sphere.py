"""PlaceSphere-v1, a task of ManiSkill that is not one of the eight: a sphere is put into a shallow bin."""

import dataclasses
from typing import NamedTuple

import numpy as np

from stare_jax.envs import Task
from stare_jax.envs.experts.panda import CLOSED, OPEN, TOOL_DOWN, command
from stare_jax.envs.maniskill.scenes import fixed_height, goal_on_top, panda_scene
from stare_jax.stages import get_task
from stare_jax.types import Signals

RADIUS, BIN_HALF_THICKNESS = 0.02, 0.0025  # metres

# Stages: those of the pick-place family, reach, grasp, transport and place, with their thresholds and weights.
SPEC = dataclasses.replace(get_task("StackCube-v1"), env_id="PlaceSphere-v1", instruction="put the ball into the bin")

# Scene: which actors are the object and its target, where the goal is, and how near it success is possible at all.
SCENE = panda_scene(
    objects=lambda env: (env.obj, env.bin),
    goal=goal_on_top,
    on_top=fixed_height(RADIUS + BIN_HALF_THICKNESS),
    success_reach=(0.006, 0.006),
)


class Memory(NamedTuple):
    phase: str = "reach"
    steps: int = 0


def place_sphere(signals: Signals, memory: Memory) -> tuple[np.ndarray, Memory]:
    """Grasps the ball from above, carries it over the bin, and lets go within 5 mm of its centre."""
    tcp, ball, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    phase, steps = memory
    aside, off_goal = np.hypot(*(ball - tcp)[:2]), np.hypot(*(ball - goal)[:2])
    if phase == "reach" and aside < 0.008 and abs(tcp[2] - ball[2]) < 0.008:
        phase, steps = "grasp", 0
    elif phase == "grasp" and signals.is_grasped and steps > 0:
        phase, steps = "carry", 0
    elif phase == "grasp" and steps > 6 or phase == "carry" and np.linalg.norm(ball - tcp) > 0.04:
        phase, steps = "reach", 0
    elif phase == "carry" and off_goal < 0.003 and ball[2] - goal[2] < 0.004:
        phase, steps = "release", 0
    if phase == "reach":
        above = 0.0 if aside < 0.015 else 0.05
        action = command(signals, ball + (0, 0, above), TOOL_DOWN, gripper=OPEN, gain=14.0)
    elif phase == "grasp":
        action = command(signals, ball, TOOL_DOWN, gripper=CLOSED, gain=14.0)
    elif phase == "carry":
        target = goal + (tcp - ball)  # where the tool is when the ball is at its goal
        target[2] += 0.03 if off_goal > 0.01 else 0.0
        if off_goal > 0.03 and ball[2] < goal[2] + 0.015:
            target[:2] = tcp[:2]  # first up, over the edge of the bin
        action = command(signals, target, TOOL_DOWN, gripper=CLOSED, gain=14.0)
    else:
        action = command(signals, tcp, TOOL_DOWN, gripper=OPEN)
    return action, Memory(phase, steps + 1)


TASK = Task(SPEC, SCENE, place_sphere, Memory)
