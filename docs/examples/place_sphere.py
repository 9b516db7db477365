"""PlaceSphere-v1, a task of ManiSkill that is not one of the eight: a sphere is put into a shallow bin."""

import dataclasses

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


def place_sphere(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
    """Grasps the ball from above, carries it over the bin, and lets go within 4 mm of its centre."""
    tcp, ball, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    aside, off_goal = np.hypot(*(ball - tcp)[:2]), np.hypot(*(ball - goal)[:2])
    # A ball that was let go of a little beside the goal is not taken up again.
    if ball[2] - goal[2] < 0.004 and off_goal < (0.004 if signals.is_grasped else 0.02):
        return command(signals, tcp, TOOL_DOWN, gripper=OPEN), memory
    if signals.is_grasped:
        target = goal + (tcp - ball)  # where the tool is when the ball is at its goal
        target[2] += np.clip(2.0 * (off_goal - 0.003), -0.002, 0.03)
        if off_goal > 0.03 and ball[2] < goal[2] + 0.015:
            target[:2] = tcp[:2]  # first up, over the edge of the bin
        return command(signals, target, TOOL_DOWN, gripper=CLOSED, gain=14.0), memory
    if aside < 0.01 and abs(ball[2] - tcp[2]) < 0.01:
        return command(signals, ball, TOOL_DOWN, gripper=CLOSED, gain=14.0), memory
    above = np.clip(2.5 * (aside - 0.005), 0.0, 0.05)
    return command(signals, ball + (0, 0, above), TOOL_DOWN, gripper=OPEN, gain=14.0), memory


TASK = Task(SPEC, SCENE, place_sphere)
