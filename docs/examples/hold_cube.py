"""HoldCube-v0, a task with an environment and stages of its own: a cube is lifted and held 15 cm above where it lay."""

import jax.numpy as jnp
import numpy as np
from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose

from stare_jax.envs import Task
from stare_jax.envs.experts.panda import CLOSED, OPEN, TOOL_DOWN, command
from stare_jax.envs.maniskill.scenes import goal_on_top, panda_scene
from stare_jax.stages import StageParams, TaskSpec
from stare_jax.types import Signals


@register_env("HoldCube-v0", max_episode_steps=50)
class HoldCube(PickCubeEnv):
    """PickCube with its goal above the cube; a success is the cube within 2.5 cm of it, and the arm at rest."""

    def _initialize_episode(self, env_idx, options):
        super()._initialize_episode(env_idx, options)
        above = self.cube.pose.p[env_idx]
        above[:, 2] += 0.15
        self.goal_site.set_pose(Pose.create_from_pq(above))


# Stages: of each the event that ends it, its cost, its potential, and the distance that remains.
def to_cube(params, signals):
    return jnp.linalg.norm(signals.tcp_pos - signals.obj_pos + 1e-9, axis=-1)


def to_goal(params, signals):
    return jnp.linalg.norm(signals.obj_pos - signals.goal_pos + 1e-9, axis=-1)


def mean_of(distance):
    return lambda params, signals, mask: (distance(params, signals) * mask).sum() / jnp.maximum(mask.sum(), 1)


def falling_with(distance):
    return lambda params, signals: jnp.exp(-distance(params, signals) / params.d_reach)


DISTANCES = to_cube, to_cube, to_goal
SPEC = TaskSpec(
    env_id="HoldCube-v0",
    family="lift and hold",
    instruction="lift the cube",
    stage_names=("reach", "grasp", "lift"),
    params=StageParams(delta_reach=0.03),
    event_fns=(
        lambda params, signals: to_cube(params, signals) < params.delta_reach,
        lambda params, signals: signals.is_grasped,
        lambda params, signals: signals.success,
    ),
    cost_fns=tuple(map(mean_of, DISTANCES)),
    potential_fns=tuple(map(falling_with, DISTANCES)),
    distance_fns=DISTANCES,
    limits=(),
)

# Scene: the goal is at PickCube's marker itself. Beyond 2.5 cm of it, there is no success.
SCENE = panda_scene(objects=lambda env: (env.cube, env.goal_site), goal=goal_on_top, success_reach=(0.025, 0.025))


def hold_cube(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
    """Comes down on the cube, grasps it, and rises; without a memory."""
    tcp, cube = signals.tcp_pos, signals.obj_pos
    aside = np.hypot(*(cube - tcp)[:2])
    if signals.is_grasped:
        action = command(signals, signals.goal_pos + (tcp - cube), TOOL_DOWN, gripper=CLOSED)
    elif aside < 0.008 and abs(tcp[2] - cube[2]) < 0.008:
        action = command(signals, cube, TOOL_DOWN, gripper=CLOSED)
    else:
        above = 0.0 if aside < 0.015 else 0.05
        action = command(signals, cube + (0, 0, above), TOOL_DOWN, gripper=OPEN, gain=14.0)
    return action, memory


TASK = Task(SPEC, SCENE, hold_cube)
