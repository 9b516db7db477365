"""A rollout as ManiSkill itself tells it: its own calls at every state, the contacts of every sub-step, and distances
between the poses of its actors. None of it comes from `Signals`, so that stage labels can be checked against it.
"""

from typing import NamedTuple

import numpy as np
import torch


class Testimony(NamedTuple):
    """One state. Metres, newtons, radians."""

    obj_pos: np.ndarray
    """`[3]`."""
    base_pos: np.ndarray
    """`[3]` of what the goal hangs on."""
    reach_distance: float
    """distance from the tool to the object's centre; for the peg, to its axis."""
    goal_distance: float
    """horizontal, from the object to what the goal hangs on."""
    height: float
    """height of the object above its start."""
    tilt: float
    """angle between the object's x axis and the vertical line."""
    is_grasping: bool
    end_force: float
    """force of the object on either finger, at the end of the control step."""
    num_touching: int
    """longest run of sub-steps of the control step, one after the other, in which the object presses on any link of the
    robot: at its end most pushes are over."""
    moved: float
    """distance that the object has moved in the control step."""
    success: bool

    @property
    def is_touched(self):
        return self.num_touching > 0


class WatchedPhysics:
    """Stands before the physics engine of a scene and looks at the contacts after each of its steps."""

    def __init__(self, env, actor):
        self._px = env.scene.px
        self._links = {link._objs[0] for link in env.agent.robot.links}
        self._actor = actor._bodies[0]
        self.begin()

    def begin(self):
        """Forgets the control step before."""
        self.num_touching = self._run = 0

    def __getattr__(self, name):
        return getattr(self._px, name)

    def step(self):
        self._px.step()
        impulses = {}
        for contact in self._px.get_contacts():
            first, second = contact.bodies
            sign, link = (1, second) if first == self._actor else (-1, first)
            if self._actor in (first, second) and link in self._links:
                impulses[link] = impulses.get(link, 0) + sign * sum(point.impulse for point in contact.points)
        is_touched = any(np.linalg.norm(impulse) / self._px.timestep > 1e-2 for impulse in impulses.values())
        self._run = self._run + 1 if is_touched else 0
        self.num_touching = max(self.num_touching, self._run)


def watch(simulator, seed, act):
    """Runs an episode.

    Args:
        act: (signals, number of the step) -> action, or None to end the episode.

    Returns:
        Lists of the `Signals` and of the `Testimony` of every state.
    """
    signals = [simulator.reset(seed, reproducible=True).signals]
    env = simulator.env
    actor, base, tool = cast_of(env)
    scene, px = env.scene, env.scene.px
    physics = scene.px = WatchedPhysics(env, actor)
    testimonies = [testify(env, actor, base, tool, [], physics)]
    try:
        while (action := act(signals[-1], len(signals) - 1)) is not None:
            physics.begin()
            signals.append(simulator.step(action).signals)
            testimonies.append(testify(env, actor, base, tool, testimonies, physics))
    finally:
        scene.px = px
    return signals, testimonies


def cast_of(env):
    """Returns the manipulated actor, the actor that the goal hangs on and the link of the tool."""
    if hasattr(env, "source_obj_name"):
        tool = env.agent.robot.links_map["ee_gripper_link"]
        return env.objs[env.source_obj_name], env.objs[env.target_obj_name], tool
    by_task = {
        "PushCube-v1": ("obj", "goal_region"),
        "PullCube-v1": ("obj", "goal_region"),
        "StackCube-v1": ("cubeA", "cubeB"),
        "LiftPegUpright-v1": ("peg", "peg"),
    }
    actor, base = (getattr(env, name) for name in by_task[env.spec.id])
    return actor, base, env.agent.tcp


def testify(env, actor, base, tool, before, physics):
    """Asks the simulator about its present state; `before` are the testimonies so far."""
    obj_pos, base_pos, tool_pos = (part.pose.p[0].numpy().astype(np.float64) for part in (actor, base, tool))
    axis = actor.pose.to_transformation_matrix()[0, :3, 0].numpy().astype(np.float64)
    half_length = getattr(env, "peg_half_length", 0.0)
    along = np.linspace(-half_length, half_length, 2401) if half_length else np.zeros(1)
    forces = [env.scene.get_pairwise_contact_forces(f, actor) for f in (env.agent.finger1_link, env.agent.finger2_link)]
    start, last = (before[0].obj_pos, before[-1].obj_pos) if before else (obj_pos, obj_pos)
    return Testimony(
        obj_pos=obj_pos,
        base_pos=base_pos,
        reach_distance=np.linalg.norm(obj_pos + along[:, None] * axis - tool_pos, axis=1).min(),
        goal_distance=np.hypot(*(obj_pos - base_pos)[:2]),
        height=obj_pos[2] - start[2],
        tilt=np.arccos(min(abs(axis[2]), 1.0)),
        is_grasping=bool(before and env.agent.is_grasping(actor)[0]),
        end_force=max(float(torch.linalg.norm(force)) for force in forces) if before else 0.0,
        num_touching=physics.num_touching,
        moved=np.linalg.norm(obj_pos - last),
        success=bool(env.evaluate()["success"][0]),
    )
