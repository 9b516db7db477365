"""Batches of environments without PhysX, for machines without CUDA: ManiSkill's own code over other physics.

ManiSkill's environments (PushCube, and the WidowX's carrot and plate), scene, actors, controller and camera run the
branches that they have for a GPU: masked writes into shared buffers, partial resets, cached contact queries. Below
them, in place of PhysX, the inverse kinematics and the renderer, a disc pushes a disc over a plane. As there, whatever
is handed out is the same memory in every step.
"""

from types import SimpleNamespace

import numpy as np
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController, PDEEPoseControllerConfig
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.put_on_in_scene import PutCarrotOnPlateInScene
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.render.shaders import ShaderConfig
from mani_skill.sensors.camera import Camera
from mani_skill.utils.structs import Actor, Pose
from mani_skill.utils.structs.render_camera import RenderCamera

from stare_jax.envs.maniskill.rests import Rests

NAMES = ("tool", "cube", "goal")
REACH, SPEED, SAG, OPENED = 0.04, 0.02, 1e-4, 0.08  # m between centres in touch, m a step, twice, m between fingers


SIZES = {"cube": (0.04, 0.04, 0.04), "goal": (0.12, 0.08, 0.02)}  # m, of the boxes by which a WidowX is judged
NEAR, PRESSING = 0.1, 1e-3  # m between cube and goal within which they press on each other, N s in a sub-step


SHADER = ShaderConfig(
    "opaque",
    {"Color": ["rgb"], "Segmentation": ["segmentation"]},
    texture_transforms={"Color": lambda data: {"rgb": data}, "Segmentation": lambda data: {"segmentation": data}},
)
"""ManiSkill's own give a view without a fourth channel, which an import cannot but copy; this one gives the buffer."""


class Buffer:
    """Memory of the simulator, as SAPIEN hands it out."""

    def __init__(self, *shape, dtype=torch.float32, device):
        self._tensor = torch.zeros(shape, dtype=dtype, device=device)

    def torch(self):
        return self._tensor


class Physics:
    """The solver has a state of its own; ManiSkill reads and writes buffers, fetches to them and applies them."""

    timestep = 0.01

    def __init__(self, num_envs, device):
        self.cuda_rigid_body_data = Buffer(3 * num_envs, 13, device=device)
        self._state = torch.zeros(num_envs, 3, 13, device=device)
        self._impulse = torch.zeros(num_envs, 3, device=device)
        self._pressing = torch.zeros(num_envs, 3, device=device)
        self.target = torch.zeros(num_envs, 3, device=device)

    def __getattr__(self, name):
        if name.startswith("gpu_"):  # Nothing here has joints.
            return lambda: None
        raise AttributeError(name)

    def gpu_apply_rigid_dynamic_data(self):
        self._state.copy_(self.cuda_rigid_body_data.torch().view_as(self._state))

    def gpu_fetch_rigid_dynamic_data(self):
        self.cuda_rigid_body_data.torch().view_as(self._state).copy_(self._state)

    def gpu_create_contact_pair_impulse_query(self, pairs):
        (kind,) = {(first.gpu_pose_index % 3, second.gpu_pose_index % 3) for first, second in pairs}
        between = {(0, 1): self._impulse, (1, 2): self._pressing}[kind]
        return SimpleNamespace(cuda_impulses=Buffer(len(pairs), 3, device=between.device), between=between)

    def gpu_query_contact_pair_impulses(self, query):
        query.cuda_impulses.torch().copy_(query.between)

    def step(self):
        tool, cube = self._state[:, 0], self._state[:, 1]
        tool[:, :3] += (self.target - tool[:, :3]).clamp(-SPEED, SPEED)
        tool[:, 2] -= SAG
        offset = cube[:, :2] - tool[:, :2]
        distance = offset.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
        shift = (REACH - distance).clamp(min=0) * offset / distance
        cube[:, :2] += shift
        cube[:, 7:9] = shift / self.timestep
        self._impulse[:, :2] = shift
        self._pressing[:, 2] = PRESSING * ((cube - self._state[:, 2])[:, :2].norm(dim=-1) < NEAR)


def make_controller(scene, tcp, use_target):
    """Returns ManiSkill's controller of a tool, which goes wherever a drive is told to."""
    controller = PDEEPoseController.__new__(PDEEPoseController)
    bounds = {"pos_lower": -1.0, "pos_upper": 1.0, "rot_lower": -1.0, "rot_upper": 1.0}
    controller.config = PDEEPoseControllerConfig([], **bounds, stiffness=1.0, damping=1.0, use_target=use_target)
    controller._normalize_action, controller.scene, controller.joints = False, scene, []
    controller.action_space = SimpleNamespace(shape=(scene.num_envs, 6) if scene.num_envs > 1 else (6,))
    controller.ee_link, controller.active_joint_indices = tcp, slice(None)
    controller.root_link = SimpleNamespace(
        pose=Pose.create(torch.tensor([[0.0, 0, 0, 1, 0, 0, 0]], device=scene.device))
    )
    controller.articulation = SimpleNamespace(
        device=scene.device,
        get_qpos=lambda: tcp.pose.p,
        set_joint_drive_targets=lambda targets, joints, indices: scene.px.target.copy_(targets),
    )
    controller.kinematics = SimpleNamespace(
        compute_ik=lambda pose, is_delta_pose, current_pose, **_: (
            current_pose.p + pose[:, :3] if is_delta_pose else pose.p
        )
    )
    return controller


class Arm:
    """A tool with a gripper, moved by what an action says, from where it is or from where it was told to go."""

    def __init__(self, scene, tcp, use_target):
        self._scene, self.tcp = scene, tcp
        self.controller = make_controller(scene, tcp, use_target)
        self.robot = SimpleNamespace(
            links=[tcp], links_map={"ee_gripper_link": tcp}, get_links=lambda: [tcp], get_qpos=lambda: self._qpos
        )
        self._qpos = torch.zeros(scene.num_envs, 9, device=scene.device)
        self._is_grasping = torch.zeros(scene.num_envs, dtype=bool, device=scene.device)

    def reset(self):
        self._qpos[self._scene._reset_mask] = OPENED / 2

    def set_action(self, action):
        self.controller.set_action(2 * SPEED * torch.nn.functional.pad(action[:, :3].clamp(-1, 1), (0, 3)))
        self._qpos[:] = (self._qpos + 0.01 * action[:, 6:].sign()).clamp(0, OPENED / 2)

    def before_simulation_step(self):
        pass

    def is_grasping(self, actor):
        is_near = (actor.pose.p - self.tcp.pose.p)[:, :2].norm(dim=-1) < 1.25 * REACH
        return self._is_grasping.copy_(is_near & (self._qpos[:, -1] < REACH / 2))


class Entity:
    """An actor in one of the environments, each of which numbers its own."""

    def __init__(self, number):
        self.per_scene_id = number


class Picture:
    """The camera group of a renderer: the colour of an image is where the cube is.

    The left half shows the cube, and the right half things that have numbers of other environments' actors.
    """

    def __init__(self, scene, cube):
        self._cube, self._color = cube, Buffer(scene.num_envs, 4, 6, 3, dtype=torch.uint8, device=scene.device)
        self._segmentation = Buffer(scene.num_envs, 4, 6, 1, dtype=torch.int16, device=scene.device)
        own = cube.per_scene_id.short()[:, None, None]
        self._segmentation.torch()[:, :, :3, 0] = own
        self._segmentation.torch()[:, :, 3:, 0] = own.roll(1, 0) if scene.num_envs > 1 else 0

    def take_picture(self):
        self._color.torch()[:] = (255 * (self._cube.pose.p + 0.5).clamp(0, 1)).to(torch.uint8)[:, None, None]

    def get_picture_cuda(self, name):
        return {"Color": self._color, "Segmentation": self._segmentation}[name]


def set_up(env, num_envs, device, camera_name, use_target):
    """Gives an environment of ManiSkill all that its constructor would have; returns tool, cube and goal."""
    env.num_envs, env.device = num_envs, torch.device(device)
    env._sim_device = SimpleNamespace(is_cuda=lambda: True)
    env._obs_mode, env._reward_mode, env._main_seed = "none", "none", [0]
    env.obs_mode_struct = SimpleNamespace(state=False)
    env._reconfig_counter = env.reconfiguration_freq = 0
    env._sim_steps_per_control, env._orig_single_action_space = 2, SimpleNamespace(shape=(7,))
    env._elapsed_steps = torch.zeros(num_envs, dtype=torch.int32, device=env.device)
    physics = Physics(num_envs, env.device)
    env.scene = ManiSkillScene([SimpleNamespace(physx_system=physics)] * num_envs, device=env.device)
    env.scene.gpu_sim_enabled = True
    actors = env.scene.non_static_actors = [_actor(env, k) for k in range(len(NAMES))]
    env.scene.actors = {actor.name: actor for actor in actors}
    for actor in actors:
        env.scene.add_to_state_dict_registry(actor)
    env.agent = Arm(env.scene, actors[0], use_target)
    camera = Camera.__new__(Camera)
    camera.config = SimpleNamespace(shader_config=SHADER)
    camera.camera = RenderCamera([], camera_name, env.scene, Picture(env.scene, actors[1]))
    env.scene.sensors = {camera_name: camera}
    env.scene.render_system_group, env.scene._sensors_initialized = SimpleNamespace(update_render=int), True
    return actors


def _actor(env, k):
    indices = [len(NAMES) * i + k for i in range(env.num_envs)]
    return Actor(
        _objs=[Entity(1 + index) for index in indices],
        _scene_idxs=torch.arange(env.num_envs),
        scene=env.scene,
        _bodies=[SimpleNamespace(gpu_pose_index=index, collision_shapes=[NAMES[k]]) for index in indices],
        _body_data_name="cuda_rigid_body_data",
        px_body_type="dynamic" if NAMES[k] == "cube" else "kinematic",
        name=NAMES[k],
    )


class StandIn(PushCubeEnv):
    def __init__(self, num_envs, device, use_target=False):
        _, self.obj, self.goal_region = set_up(self, num_envs, device, "base_camera", use_target)
        self._success = torch.zeros(num_envs, dtype=bool, device=self.device)
        self.table_scene = SimpleNamespace(initialize=self._place_tool)

    def _place_tool(self, env_idx):
        noise = torch.tensor(self._episode_rng.normal(0, 0.02, (len(env_idx), 2)), dtype=torch.float32)
        place = torch.tensor([-0.2, 0.0, 0.02]).expand(len(env_idx), 3).clone()
        place[:, :2] += noise
        self.agent.tcp.set_pose(Pose.create_from_pq(place, [1, 0, 0, 0]))

    def evaluate(self):
        return {"success": self._success.copy_(super().evaluate()["success"])}

    def close(self):
        pass


class WidowXStandIn(PutCarrotOnPlateInScene):
    """The cube is the carrot, and the goal, which lies askew, is the plate."""

    def __init__(self, num_envs, device, photograph):
        _, cube, goal = set_up(self, num_envs, device, "3rd_view_camera", use_target=True)
        self.objs = {"cube": cube, "goal": goal}
        self.source_obj_name, self.target_obj_name = self.objs
        self.objects_excluded_from_greenscreening = list(self.objs)
        self.rgb_overlay_paths = {"3rd_view_camera": str(photograph)}
        self.episode_model_bbox_sizes = {
            name: torch.tensor(size, dtype=torch.float64, device=self.device) for name, size in SIZES.items()
        }

    def close(self):
        pass


def widowx_rests(starts, num_official):
    """Returns first states of `WidowXStandIn`: the cube is pushed along x, to a goal that is tilted about y."""
    rng, number = np.random.default_rng(0), len(starts)
    states = {name: np.zeros((number, 13), np.float32) for name in NAMES}
    for state in states.values():
        state[:, 3] = 1.0
        state[:, 2] = 0.02
    states["tool"][:, :2] = rng.normal((-0.2, 0.0), 0.02, (number, 2))
    states["cube"][:, :2] = rng.uniform(-0.05, 0.05, (number, 2))
    states["goal"][:, :3] = states["cube"][:, :3] + (0.2, 0.0, -0.01)
    pitch = rng.uniform(-1.2, 0.0, number)
    states["goal"][:, 3], states["goal"][:, 5] = np.cos(pitch / 2), np.sin(pitch / 2)
    return Rests(starts, {"actors": states}, num_official)
