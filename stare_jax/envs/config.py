"""The configuration of simulators: their task or tasks, their number, and the observations."""

import typing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stare_jax.config import Count, Finite, Natural, Positive, check_fields
from stare_jax.envs.base import SimulatorInfo
from stare_jax.envs.maniskill.perturbations import obstacle
from stare_jax.envs.maniskill.scenes import Scene
from stare_jax.envs.maniskill.shrinking import ShrinkName
from stare_jax.envs.maniskill.widowx import JitterName
from stare_jax.envs.state import STATE_DIMS, StateName
from stare_jax.envs.tasks import TASK_NAMES, ToyScene, load_task
from stare_jax.stages import TaskSpec

Backend = Literal["cpu", "cuda", "auto"]
BACKENDS = typing.get_args(Backend)


@dataclass(frozen=True)
class EnvConfig:
    """A batch of simulators of one task, or of several; see `make_vec_env`."""

    env_id: str = ""
    """the simulator's name of the task: one of `tasks.TASK_NAMES`, PushCube-v1 if nothing names a task. With `task` it
    is that of the task's `TaskSpec`, whatever is given here."""
    backend: Backend = "cpu"
    """device of the physics. "cpu": processes that have some environments each. "cuda": this process's GPU, with all
    environments at once, see `BatchedSimulator`. "auto": the second if this machine and the task allow it, else the
    first; the first state that a seed gives then depends on the machine."""
    num_workers: Count = 2
    """processes: as many as CPU cores, or more where few environments share one."""
    envs_per_worker: Count = 8
    """environments of a process, one after another: a further one costs megabytes and milliseconds, a further process
    half a gigabyte and seconds, and the policy decides for all of them at once. With "cuda" it is the whole batch, and
    `num_workers` is 1; with "auto" the batch is as large as all processes together."""
    num_groups: Count = 1
    """groups into which the processes are divided, and with them the environments: while the simulators of one group
    work, the policy decides for the next. 2 pays where a policy takes as long as the simulators, and each group has as
    many processes as there are cores. Policies decide for one group at a time, so that sampled actions depend on the
    number of groups. For simulators on the CPU."""
    has_spares: bool = False
    """one simulator more in every process: while the policy decides, it begins the episode that one of the process's
    environments takes next, so that nobody waits for a reset where policies take longer than that. A policy's episodes
    begin in another order then. For simulators on the CPU."""
    horizon: Count | None = None
    """actions that an episode may take; None for the task's own: 30 for the Panda, 60 for the WidowX (B.5)."""
    image_size: Natural | None = 64
    """height of the images in pixels; 0 or None renders nothing and needs no graphics driver."""
    image_width: Count | None = None
    """width of the images in pixels; None for square ones. The WidowX camera's own images are 480 x 640; another shape
    shows the same view, squeezed, so 168 x 224 keeps its proportions and 224 x 224 does not."""
    render_size: Natural = 0
    """height of the images as they are drawn, in the camera's own proportions; the process makes them as small as
    `image_size` and `image_width` say before anybody sees them. 0 draws them of that size, which is cheaper, and leaves
    edges that are not smooth. For policies that learnt from resized images. For simulators on the CPU."""
    resize: ShrinkName = "lanczos3"
    """resizer of images that are drawn larger: "lanczos3", TensorFlow's, of OpenVLA's training data and of data that
    `launch/import_rlds.py` imports; "bilinear", PIL's, of openpi; "bicubic", PIL's, of Hugging Face's processor."""
    use_state: StateName = "none"
    """`Observation.state`: "none" `[0]`; "tcp", the tool centre point's position `[3]`; "low_dim", the poses of tool,
    object and goal, and the gripper `[29]`, see `low_dim_state`."""
    control_mode: str = ""
    """a control mode of the robot; empty for the task's default."""
    gripper_threshold: Finite | None = None
    """value of an action's last number above which the gripper opens; it closes at all others. None gives the number to
    the controller as it is, from -1, closed, to +1, open. 0.5 is for policies that learnt from Bridge V2, such as
    OpenVLA-7B, where closed is 0. It also suits policies that learnt from the experts here, where closed is -1."""
    lite_robot: bool = True
    """low-polygon visuals of the Panda; physics is the same."""
    jitter: JitterName = "15mm-15deg"
    """distance from the WidowX tasks' few official starts at which episodes begin that are not of the evaluation; see
    `widowx.JITTERS`."""
    worker_timeout_s: Positive = 60.0
    """seconds; a process that has not answered a step or a reset by then is restarted."""
    start_timeout_s: Positive = 300.0
    """seconds; a process that has not started by then counts as lost."""
    max_restarts: Natural = 100
    """losses that the simulators of a group survive together: processes that died or hung, and environments that raised
    an error. One more ends the run."""
    task: str = ""
    """a task of one's own: the path of a Python file (`path/to/task.py`), or a module (`package.module`), that defines
    `TASK`; see `envs.tasks` and docs/tasks.md. The name of one of the eight is the same as `env_id`."""
    tasks: tuple[str, ...] = ()
    """several tasks for one policy, each named as in `task`; empty for the one task that `env_id` or `task` names.
    Processes are dealt out to the tasks in turn, so that each has as many, to within one. `env_id` is that of all
    together, theirs joined by "+". The tasks have the same robot, camera and number of stages, and different
    instructions."""

    perturbation: str = ""
    """a change of all episodes that training has not seen, as "vision/light"; a name of `PERTURBATIONS`, see
    docs/evaluation.md. Empty for none. For simulators on the CPU."""

    def __post_init__(self):
        check_fields(self)
        if self.tasks and self.task:
            raise ValueError(f"task: got {self.task!r} beside tasks {self.tasks}, expected one of the two")
        if len(self.tasks) == 1:
            object.__setattr__(self, "task", self.tasks[0])
            object.__setattr__(self, "tasks", ())
        if not (self.env_id or self.task or self.tasks):
            object.__setattr__(self, "env_id", "PushCube-v1")
        if self.tasks:
            self._join_tasks()
        elif self.task in TASK_NAMES:
            object.__setattr__(self, "env_id", self.task)
            object.__setattr__(self, "task", "")
        elif self.task:
            object.__setattr__(self, "env_id", self.spec.env_id)
        elif self.env_id not in TASK_NAMES:
            raise ValueError(
                f"env_id: got {self.env_id!r}, expected one of {sorted(TASK_NAMES)}; `task` names a task of one's own"
            )
        if self.horizon is None:
            object.__setattr__(self, "horizon", self.scene.horizon)
        if self.control_mode and self.control_mode not in self.scene.action_dims:
            modes = sorted(self.scene.action_dims)
            raise ValueError(f"control_mode: got {self.control_mode!r}, expected one of {modes}")
        if self.backend == "cuda":
            if self.refused_by_cuda:
                raise ValueError(self.refused_by_cuda)
            if self.num_workers != 1:
                raise ValueError(
                    f"num_workers: got {self.num_workers}, expected 1 with backend 'cuda', where envs_per_worker is "
                    "the whole batch"
                )
        if self.num_workers < len(self.tasks):
            expected = f"at least {len(self.tasks)}, one process for each of {self.env_id}"
            raise ValueError(f"num_workers: got {self.num_workers}, expected {expected}")
        if self.num_groups > 1 and self.num_workers % (self.num_groups * len(self.task_names)):
            each = "one process of each task" if self.tasks else "one process"
            expected = f"a divisor of num_workers = {self.num_workers}, with {each} or more in every group"
            raise ValueError(f"num_groups: got {self.num_groups}, expected {expected}")
        if self.is_toy and self.refused_by_toys:
            raise ValueError(self.refused_by_toys)
        self._check_drawn_shape()
        for spec in self.specs if self.perturbation else ():
            if reason := obstacle(self.perturbation, spec.env_id, has_images=bool(self.image_size)):
                raise ValueError(f"perturbation: got {self.perturbation!r} for {spec.env_id}, {reason}")

    def _check_drawn_shape(self) -> None:
        """Makes sure that images are drawn at least as large as they are seen."""
        (height, width), (_, drawn_width) = self.image_shape, self.drawn_shape
        if self.render_size and not height:
            raise ValueError(f"render_size: got {self.render_size} with image_size 0, expected 0, as nothing is drawn")
        if self.render_size and (self.render_size < height or drawn_width < width):
            got = f"{self.render_size}, {self.render_size} x {drawn_width} pixels"
            raise ValueError(f"render_size: got {got}, expected 0, or no less than {height} x {width}, the images'")

    def _join_tasks(self) -> None:
        """Checks that several tasks fit one policy, and sets `env_id`."""
        if self.env_id and "+" not in self.env_id:  # Other tasks, joined, are those before a change of `tasks`.
            raise ValueError(f"env_id: got {self.env_id!r} beside tasks {self.tasks}, expected '' or no tasks")
        object.__setattr__(self, "env_id", "+".join(spec.env_id for spec in self.specs))
        scenes = [load_task(name).scene for name in self.task_names]
        same = {
            "robot": [scene.robot for scene in scenes],
            "camera": [scene.camera.name for scene in scenes],
            "actions": [(tuple(scene.action_dims.items()), tuple(scene.action_scale)) for scene in scenes],
            "number of stages": [spec.num_stages for spec in self.specs],
        }
        if self.horizon is None:
            same["horizon (env.horizon gives one to all)"] = [scene.horizon for scene in scenes]
        for name, values in same.items():
            if len(set(values)) > 1:
                got = ", ".join(f"{value} of {task}" for task, value in zip(self.tasks, values, strict=True))
                raise ValueError(f"tasks: {name}: got {got}, expected the same of all tasks of one policy")
        if len({spec.instruction for spec in self.specs}) < len(self.tasks):
            raise ValueError(f"tasks: got {self.tasks}, expected tasks with different instructions, each once")

    @property
    def refused_by_cuda(self) -> str | None:
        """The field that ManiSkill does not support for a part of a batch, as a message; None if there is none."""
        if self.is_toy:
            return f"backend: got 'cuda' for {self.env_id}, expected 'cpu': toys are one program of JAX"
        if self.tasks:
            return f"backend: got 'cuda' for {self.env_id}, expected 'cpu': a batch on a GPU is of one task"
        if self.perturbation:
            return f"backend: got 'cuda' with perturbation {self.perturbation!r}, expected 'cpu', which alone has them"
        if self.num_groups > 1:
            return f"backend: got 'cuda' with num_groups {self.num_groups}, expected 'cpu': a GPU has one batch"
        if self.has_spares:
            return "backend: got 'cuda' with has_spares, expected 'cpu': a GPU has one batch"
        if self.render_size:
            got = f"got 'cuda' with render_size {self.render_size}"
            return f"backend: {got}, expected 'cpu', whose processes make images smaller"
        return None

    @property
    def is_toy(self) -> bool:
        """True for a toy, which JAX computes in this process, wherever it computes."""
        return isinstance(self.scene, ToyScene)

    @property
    def refused_by_toys(self) -> str | None:
        """The field that toys do not have, as a message; None if there is none."""
        for name, expected in (("backend", "cpu"), ("num_groups", 1), ("has_spares", False), ("render_size", 0)):
            if (got := getattr(self, name)) != expected and (name, got) != ("backend", "auto"):
                return f"{name}: got {got!r} for {self.env_id}, expected {expected!r}: toys are one program of JAX"
        if self.perturbation:
            return f"perturbation: got {self.perturbation!r} for {self.env_id}, expected '': toys have none"
        return None

    @property
    def info(self) -> SimulatorInfo:
        """The properties that collected episodes depend on."""
        return SimulatorInfo(self.env_id, self.horizon, self.num_envs, self.resolved_control_mode, self.data_settings)

    @property
    def num_envs(self) -> int:
        return self.num_workers * self.envs_per_worker

    @property
    def task_name(self) -> str:
        """The name by which `load_task` and `make_expert` find the task; of several the first's."""
        return self.task_names[0]

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of all tasks, one or several."""
        return self.tasks or (self.task or self.env_id,)

    @property
    def specs(self) -> tuple[TaskSpec, ...]:
        """The tasks' stages, with their own parameters."""
        return tuple(load_task(name).spec for name in self.task_names)

    @property
    def task_index(self) -> np.ndarray:
        """The task of each environment, an index of `task_names`, int `[B]`."""
        return np.repeat(np.arange(self.num_workers) % len(self.task_names), self.envs_per_worker)

    def of_task(self, index: int) -> "EnvConfig":
        """Returns the same with one of its tasks alone."""
        return replace(self, tasks=(), task=self.task_names[index])

    @property
    def of_group(self) -> "EnvConfig":
        """The same with the processes of one group."""
        return replace(self, num_workers=self.num_workers // self.num_groups, num_groups=1)

    @property
    def spec(self) -> TaskSpec:
        """The stages of the task, of several the first."""
        return self.specs[0]

    @property
    def scene(self) -> Scene | ToyScene:
        """The robot, camera, objects and goal of the task; of several the first's, whose robot and camera all have."""
        return load_task(self.task_name).scene

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the images, zeros without rendering."""
        height = self.image_size or 0
        return height, (self.image_width or height) if height else 0

    @property
    def drawn_shape(self) -> tuple[int, int]:
        """(height, width) of the images as they are drawn, before they are made smaller; zeros without rendering."""
        height, width = self.image_shape
        if not self.render_size or not height:
            return height, width
        if self.scene.camera.intrinsics is not None:  # Images of other proportions are this one's view, squeezed.
            height, width = self.scene.camera.size
        return self.render_size, round(self.render_size * width / height)

    @property
    def resolved_control_mode(self) -> str:
        return self.control_mode or next(iter(self.scene.action_dims))

    @property
    def action_dim(self) -> int:
        return self.scene.action_dims[self.resolved_control_mode]

    @property
    def takes_metres(self) -> bool:
        """True if actions are metres and radians, and not fractions of the largest command."""
        return self.scene.robot not in ("panda", "toy")

    @property
    def action_units(self) -> tuple[float, float]:
        """Metres and radians of a command of 1, where an action is a pose; ManiSkill turns the Panda the other way."""
        return (1.0, 1.0) if self.takes_metres else (0.1, -0.1)

    @property
    def state_dim(self) -> int:
        return STATE_DIMS[self.use_state]

    @property
    def has_reproducible_resets(self) -> bool:
        """True if there are resets after which equal actions lead to equal states, bit for bit."""
        return self.backend == "cpu"

    @property
    def data_settings(self) -> dict[str, Any]:
        """Settings that data from these simulators depend on, besides task, control mode and horizon; for manifests."""
        is_panda_drawn = self.scene.robot == "panda" and bool(self.image_size)
        # Data from before there were perturbations, or images drawn larger, say nothing of them.
        changes = {"perturbation": self.perturbation} if self.perturbation else {}
        if self.render_size:
            changes |= {"drawn_shape": list(self.drawn_shape), "resize": self.resize}
        return changes | {
            "backend": self.backend,
            "camera": self.scene.camera.name if self.image_size else None,
            "image_shape": list(self.image_shape),
            "lite_robot": self.lite_robot if is_panda_drawn else None,
            "use_state": self.use_state,
            "jitter": self.jitter if self.scene.num_starts else "none",
            "gripper_threshold": self.gripper_threshold,
        }
