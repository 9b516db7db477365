"""A batch of PushCube environments without PhysX, for machines without CUDA: ManiSkill's own code over other physics.

ManiSkill's environment, scene, actors and camera run the branches that they have for a GPU: masked writes into shared
buffers, partial resets, cached contact queries. Below them, in place of PhysX and the renderer, a disc pushes a disc
over a plane. As there, whatever is handed out is the same memory in every step.
"""

from types import SimpleNamespace

import torch
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.render.shaders import ShaderConfig
from mani_skill.sensors.camera import Camera
from mani_skill.utils.structs import Actor, Pose
from mani_skill.utils.structs.render_camera import RenderCamera

NAMES = ("tool", "cube", "goal")
REACH, SPEED, SAG, OPENED = 0.04, 0.02, 1e-4, 0.08  # m between centres in touch, m a step, twice, m between fingers


SHADER = ShaderConfig("opaque", {"Color": ["rgb"]}, texture_transforms={"Color": lambda data: {"rgb": data}})
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
        assert [(tool.gpu_pose_index % 3, cube.gpu_pose_index % 3) for tool, cube in pairs] == [(0, 1)] * len(pairs)
        return SimpleNamespace(cuda_impulses=Buffer(len(pairs), 3, device=self._impulse.device))

    def gpu_query_contact_pair_impulses(self, query):
        query.cuda_impulses.torch().copy_(self._impulse)

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


class Arm:
    """A tool with a gripper, moved to where an action says."""

    controller = SimpleNamespace(reset=lambda: None, sets_target_qpos=True, sets_target_qvel=False)

    def __init__(self, scene, tcp):
        self._scene, self.tcp = scene, tcp
        self.robot = SimpleNamespace(links=[tcp], get_qpos=lambda: self._qpos)
        self._qpos = torch.zeros(scene.num_envs, 9, device=scene.device)
        self._is_grasping = torch.zeros(scene.num_envs, dtype=bool, device=scene.device)

    def reset(self):
        self._qpos[self._scene._reset_mask] = OPENED / 2

    def set_action(self, action):
        self._scene.px.target.copy_(self.tcp.pose.p + 2 * SPEED * action[:, :3].clamp(-1, 1))
        self._qpos[:] = (self._qpos + 0.01 * action[:, 6:].sign()).clamp(0, OPENED / 2)

    def before_simulation_step(self):
        pass

    def is_grasping(self, actor):
        is_near = (actor.pose.p - self.tcp.pose.p)[:, :2].norm(dim=-1) < 1.25 * REACH
        return self._is_grasping.copy_(is_near & (self._qpos[:, -1] < REACH / 2))


class Picture:
    """The camera group of a renderer: the colour of an image is where the cube is."""

    def __init__(self, scene, cube):
        self._cube, self._color = cube, Buffer(scene.num_envs, 4, 6, 3, dtype=torch.uint8, device=scene.device)

    def take_picture(self):
        self._color.torch()[:] = (255 * (self._cube.pose.p + 0.5).clamp(0, 1)).to(torch.uint8)[:, None, None]

    def get_picture_cuda(self, name):
        assert name == "Color"
        return self._color


class StandIn(PushCubeEnv):
    def __init__(self, num_envs, device):
        self.num_envs, self.device = num_envs, torch.device(device)
        self._sim_device = SimpleNamespace(is_cuda=lambda: True)
        self._obs_mode, self._reward_mode, self._main_seed = "none", "none", [0]
        self.obs_mode_struct = SimpleNamespace(state=False)
        self._reconfig_counter = self.reconfiguration_freq = 0
        self._sim_steps_per_control, self._orig_single_action_space = 2, SimpleNamespace(shape=(7,))
        self._elapsed_steps = torch.zeros(num_envs, dtype=torch.int32, device=self.device)
        self._success = torch.zeros(num_envs, dtype=bool, device=self.device)
        physics = Physics(num_envs, self.device)
        self.scene = ManiSkillScene([SimpleNamespace(physx_system=physics)] * num_envs, device=self.device)
        self.scene.gpu_sim_enabled = True
        tool, self.obj, self.goal_region = self.scene.non_static_actors = [self._actor(k) for k in range(len(NAMES))]
        self.scene.actors = {actor.name: actor for actor in self.scene.non_static_actors}
        self.agent = Arm(self.scene, tool)
        self.table_scene = SimpleNamespace(initialize=self._place_tool)
        camera = Camera.__new__(Camera)
        camera.config = SimpleNamespace(shader_config=SHADER)
        camera.camera = RenderCamera([], "base_camera", self.scene, Picture(self.scene, self.obj))
        self.scene.sensors = {"base_camera": camera}
        self.scene.render_system_group, self.scene._sensors_initialized = SimpleNamespace(update_render=int), True

    def _actor(self, k):
        indices = [len(NAMES) * i + k for i in range(self.num_envs)]
        return Actor(
            _objs=[f"{NAMES[k]} {i}" for i in range(self.num_envs)],
            _scene_idxs=torch.arange(self.num_envs),
            scene=self.scene,
            _bodies=[SimpleNamespace(gpu_pose_index=index, collision_shapes=[NAMES[k]]) for index in indices],
            _body_data_name="cuda_rigid_body_data",
            px_body_type="dynamic" if NAMES[k] == "cube" else "kinematic",
            name=NAMES[k],
        )

    def _place_tool(self, env_idx):
        noise = torch.tensor(self._episode_rng.normal(0, 0.02, (len(env_idx), 2)), dtype=torch.float32)
        place = torch.tensor([-0.2, 0.0, 0.02]).expand(len(env_idx), 3).clone()
        place[:, :2] += noise
        self.agent.tcp.set_pose(Pose.create_from_pq(place, [1, 0, 0, 0]))

    def evaluate(self):
        return {"success": self._success.copy_(super().evaluate()["success"])}

    def close(self):
        pass
