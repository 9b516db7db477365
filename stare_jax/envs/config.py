"""Which simulators to run, and what they should show."""

from dataclasses import dataclass
from typing import Any

from stare_jax.envs.maniskill.scenes import SCENES, Scene
from stare_jax.envs.maniskill.widowx import JITTERS
from stare_jax.stages import TASKS

STATE_DIMS = {"none": 0, "tcp": 3, "low_dim": 29}
BACKENDS = ("cpu", "cuda", "auto")


@dataclass(frozen=True)
class EnvConfig:
    """A batch of simulators of one task; see `make_vec_env`."""

    env_id: str = "PushCube-v1"
    backend: str = "cpu"
    """where physics runs: "cpu", in processes that have some environments each; "cuda", on this process's GPU, all
    environments at once, see `BatchedSimulator`; "auto", the second where it can be had, else the first: what a seed
    begins with then depends on the machine."""
    num_workers: int = 2
    """processes: as many as CPU cores, or more where few environments share one."""
    envs_per_worker: int = 8
    """environments of a process, one after another: a further one costs megabytes and milliseconds, a further process
    half a gigabyte and seconds, and the policy decides for all of them at once. With "cuda" it is the whole batch, and
    `num_workers` is 1; with "auto" the batch is as large as all processes together."""
    horizon: int | None = None
    """actions an episode may take; None for the task's own: 30 for the Panda, 60 for the WidowX (B.5)."""
    image_size: int | None = 64
    """height of the images in pixels; 0 or None renders nothing and needs no graphics driver."""
    image_width: int | None = None
    """None for square images. The WidowX camera's own are 480 x 640; other shapes show the same view, squeezed."""
    use_state: str = "none"
    """`Observation.state`: "none" `[0]`; "tcp", the tool centre point's position `[3]`; "low_dim", all that matters of
    robot, object and goal `[29]`, see `low_dim_state`."""
    control_mode: str = ""
    """a control mode of the robot; empty for the task's default."""
    gripper_threshold: float | None = None
    """what of an action's last number opens the gripper: more does, all else closes it. None gives the number to the
    controller as it is, from -1, closed, to +1, open. 0.5 is for policies that learnt from Bridge V2, OpenVLA-7B among
    them, where closed is 0; for those that learnt from the experts here, closed is -1, it is right, too."""
    lite_robot: bool = True
    """low-polygon visuals of the Panda; physics is the same."""
    jitter: str = "15mm-15deg"
    """of the WidowX tasks' few official starts, where an episode is not one of the evaluation; see `widowx.JITTERS`."""
    worker_timeout_s: float = 60.0
    """a worker that has not answered a step or a reset by then is restarted."""
    start_timeout_s: float = 300.0
    max_restarts: int = 100
    """of all workers together, before the pool gives up."""

    def __post_init__(self):
        if self.env_id not in TASKS:
            raise ValueError(f"env_id: got {self.env_id!r}, expected one of {sorted(TASKS)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: got {self.backend!r}, expected one of {sorted(BACKENDS)}")
        if self.horizon is None:
            object.__setattr__(self, "horizon", self.scene.horizon)
        for name in ("num_workers", "envs_per_worker", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if (self.image_size or 0) < 0:
            raise ValueError(f"image_size: got {self.image_size}, expected pixels, or 0 for no images")
        if self.image_width is not None and self.image_width < 1:
            raise ValueError(f"image_width: got {self.image_width}, expected at least 1 pixel, or None for a square")
        if self.jitter not in JITTERS:
            raise ValueError(f"jitter: got {self.jitter!r}, expected one of {sorted(JITTERS)}")
        if self.use_state not in STATE_DIMS:
            raise ValueError(f"use_state: got {self.use_state!r}, expected one of {sorted(STATE_DIMS)}")
        if self.control_mode and self.control_mode not in self.scene.action_dims:
            modes = sorted(self.scene.action_dims)
            raise ValueError(f"control_mode: got {self.control_mode!r}, expected one of {modes}")
        for name in ("worker_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected seconds > 0")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: got {self.max_restarts}, expected at least 0")
        if self.backend == "cuda":
            if self.refused_by_cuda:
                raise ValueError(self.refused_by_cuda)
            if self.num_workers != 1:
                raise ValueError(
                    f"num_workers: got {self.num_workers}, expected 1 with backend 'cuda', where envs_per_worker is "
                    "the whole batch"
                )

    @property
    def refused_by_cuda(self) -> str | None:
        """What of this ManiSkill cannot do for a part of a batch; None if it can do all."""
        if self.scene.num_starts:
            return (
                f"backend: got 'cuda' for {self.env_id}, expected 'cpu': ManiSkill lets its objects settle in a reset, "
                "for which the physics of all other environments runs on, too, and judges success in every "
                "environment by how the objects lie in the first"
            )
        if "target" in self.resolved_control_mode:
            return (
                f"control_mode: got {self.resolved_control_mode!r}, expected one without targets with backend 'cuda', "
                "where ManiSkill forgets the targets of all environments when one is reset"
            )
        return None

    @property
    def num_envs(self) -> int:
        return self.num_workers * self.envs_per_worker

    @property
    def scene(self) -> Scene:
        """The task's row of the table."""
        return SCENES[self.env_id]

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the images, zeros without rendering."""
        height = self.image_size or 0
        return height, (self.image_width or height) if height else 0

    @property
    def resolved_control_mode(self) -> str:
        return self.control_mode or next(iter(self.scene.action_dims))

    @property
    def action_dim(self) -> int:
        return self.scene.action_dims[self.resolved_control_mode]

    @property
    def takes_metres(self) -> bool:
        """Whether actions are metres and radians, and not fractions of the largest command."""
        return self.scene.robot != "panda"

    @property
    def state_dim(self) -> int:
        return STATE_DIMS[self.use_state]

    @property
    def has_reproducible_resets(self) -> bool:
        """Whether there are resets after which equal actions lead to equal states, bit for bit."""
        return self.backend == "cpu"

    @property
    def data_settings(self) -> dict[str, Any]:
        """What data from these simulators depend on besides task, control mode and horizon, as manifests have it."""
        is_panda_drawn = self.scene.robot == "panda" and bool(self.image_size)
        return {
            "backend": self.backend,
            "camera": self.scene.camera.name if self.image_size else None,
            "image_shape": list(self.image_shape),
            "lite_robot": self.lite_robot if is_panda_drawn else None,
            "use_state": self.use_state,
            "jitter": self.jitter if self.scene.num_starts else "none",
            "gripper_threshold": self.gripper_threshold,
        }
