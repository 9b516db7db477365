"""Many environments of one ManiSkill task on one GPU, in this process: a `VecEnv` with all its arrays on the device."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.base import EnvStep, VecEnv
from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill.batched_signals import BatchedSignalReader
from stare_jax.envs.maniskill.building import make_scene
from stare_jax.envs.maniskill.dlpack import jax_to_torch, torch_to_jax
from stare_jax.envs.maniskill.panda_lite import report_to_stderr
from stare_jax.envs.maniskill.rests import Rests, load_rests
from stare_jax.envs.maniskill.simulator import executed_action
from stare_jax.envs.maniskill.vulkan import MissingDeviceError, has_gpu_driver
from stare_jax.envs.state import observed_state
from stare_jax.types import Observation

SEEDS = "episode_seeds"  # our own among the options of a reset


def resolve_backend(config: EnvConfig, report: Callable[[str], None] = report_to_stderr) -> EnvConfig:
    """Returns a configuration with the backend "auto" replaced by "cuda", or by "cpu" where that cannot be.

    Args:
        report: is told which, and why.
    """
    if config.backend != "auto":
        return config
    obstacle = config.refused_by_cuda or missing_for_cuda(config)
    if obstacle:
        report(f"backend: 'auto' is 'cpu': {obstacle}")
        return dataclasses.replace(config, backend="cpu")
    report(f"backend: 'auto' is 'cuda', one batch of {config.num_envs} environments")
    return dataclasses.replace(config, backend="cuda", num_workers=1, envs_per_worker=config.num_envs)


def missing_for_cuda(config: EnvConfig) -> str | None:
    """Returns a message about the part that this machine lacks for the backend "cuda", None if it has all."""
    if jax.default_backend() != "gpu":
        return (
            f"got 'cuda', and JAX computes on {jax.default_backend()!r}; expected 'gpu', with jax[cuda12] installed, "
            "or backend 'cpu' (docs/simulators.md)"
        )
    import torch

    if not torch.cuda.is_available():
        return (
            f"got 'cuda', and PyTorch {torch.__version__} sees no CUDA device; expected one, or backend 'cpu' "
            "(docs/simulators.md)"
        )
    if config.image_size and not has_gpu_driver():
        return (
            "got 'cuda' with images, and found no Vulkan driver of the GPU to draw them; expected one, or image_size 0 "
            "(docs/simulators.md)"
        )
    return None


def start_batch(config: EnvConfig) -> "BatchedSimulator":
    """Builds the batch of a configuration with the backend "cuda".

    Raises:
        MissingDeviceError: JAX or PyTorch sees no CUDA device, or images are asked for and the GPU cannot draw them.
        MissingAssetsError: the task's assets are missing.
        SimulatorError: the first states of a WidowX task cannot be computed.
    """
    if missing := missing_for_cuda(config):
        raise MissingDeviceError(f"backend: {missing}")
    rests = load_rests(config) if config.scene.num_starts else None
    return BatchedSimulator(make_scene(config)[0], config, rests)


class BatchedSimulator(VecEnv):
    """`VecEnv` of one batched `mani_skill` environment; see `envs.base`.

    Observations, signals and actions are JAX arrays on the simulator's device, copied there (`dlpack`). In a call all
    environments step together, and those that are to be reset are reset afterwards: their states before it are not
    returned, and no physics runs between a reset and the return.

    An episode's first state depends on its seed alone, and not on its environment or on the others that are reset with
    it. The Panda's is another state than on the CPU: ManiSkill draws it from the device's own random numbers. The
    WidowX's is one that the CPU comes to, see `rests.start_of`. Equal actions need not lead to equal states: PhysX does
    not promise it on a GPU, and the scene, with the contacts that it remembers, is never rebuilt. `reproducible`
    therefore has no effect. No environment can hang or die alone, so all are always alive.
    """

    def __init__(self, env: Any, config: EnvConfig, rests: Rests | None = None):
        """
        Args:
            env: the unwrapped `mani_skill` environment; `close` closes it.
            config: the configuration that it was built from.
            rests: first states of a WidowX task's episodes; None for tasks that draw them.
        """
        import torch

        self.config = config
        self.env_id, self.num_envs, self.horizon = config.env_id, config.num_envs, config.horizon
        self.action_dim = config.action_dim
        self.task_index = config.task_index
        self.instructions = (config.spec.instruction,) * config.num_envs
        self._env, self._device = env, torch_to_jax(torch.zeros(1, device=env.device)).device
        self._rests, self._backdrop = rests, None
        if rests is None:
            env._initialize_episode = functools.partial(_initialize_each, env, env._initialize_episode)
        else:
            self._separate(env)
        self._is_reset = torch.ones(self.num_envs, dtype=torch.bool, device=env.device)
        controller = env.agent.controller
        controller.reset = functools.partial(self._reset_controllers, controller.reset)
        self._reader = BatchedSignalReader(env, config.scene)
        self._num_sub_steps = 0
        env._after_simulation_step = self._look  # ManiSkill's hook at every sub-step.
        self._images: dict[str, jax.Array] = {}
        self._observed_state = jax.jit(jax.vmap(functools.partial(observed_state, config.use_state)))

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        """Resets all environments.

        Raises:
            ValueError: not one seed for each environment.
        """
        del reproducible
        if len(seeds) != self.num_envs:
            raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {self.num_envs} environments")
        return self._observe(self._reset(dict(enumerate(seeds))), np.ones(self.num_envs, bool))

    def send(
        self,
        action: Any,
        reset_seeds: Mapping[int, int] | None = None,
        *,
        reproducible: bool = False,
        is_idle: np.ndarray | None = None,
        is_drawn: np.ndarray | None = None,
        next_seeds: Mapping[int, int] | None = None,
    ) -> None:
        """Takes float32 `[B, A]` actions, of JAX or NumPy. `receive` steps all environments with them, and then resets
        those in `reset_seeds`: this process is the simulator's own, and works when its answer is waited for.

        Idle ones are stepped with the others: a batch has one physics. It is drawn if one of its images is looked at.

        Raises:
            ValueError: an action of another shape or not finite, or an index out of range.
        """
        del reproducible, is_idle, next_seeds
        reset_seeds = reset_seeds or {}
        if not all(0 <= i < self.num_envs for i in reset_seeds):
            raise ValueError(f"reset_seeds: got {sorted(reset_seeds)}, expected indices below {self.num_envs}")
        if action.shape != (self.num_envs, self.action_dim):
            raise ValueError(f"action: got shape {action.shape}, expected {(self.num_envs, self.action_dim)}")
        is_reset = np.isin(np.arange(self.num_envs), list(reset_seeds))
        action, is_finite = _executable(jax.device_put(action, self._device), is_reset, self.config.gripper_threshold)
        if not is_finite:  # Waits for the policy, as handing its action over does anyway.
            raise ValueError(f"action: got {action.tolist()}, expected finite numbers")
        draws = is_drawn is None or bool(is_drawn.any() or is_reset.any())
        self._sent = action, dict(reset_seeds), is_reset, draws

    def receive(self) -> EnvStep:
        """Steps and resets as `send` was told to."""
        action, reset_seeds, is_reset, draws = self._sent
        info = self._env.step(jax_to_torch(action))[-1]
        return self._observe(self._reset(reset_seeds) if reset_seeds else info, is_reset, draws=draws)

    def close(self) -> None:
        self._reader = None
        self._env.close()

    def _reset(self, seeds: Mapping[int, int]) -> Mapping[str, Any]:
        import torch

        rows = sorted(seeds)  # States are written in the order of the environments.
        ordered = [int(seeds[row]) for row in rows]
        options = {SEEDS: ordered}
        if self._rests is not None:
            options = {"reset_to_env_states": {"env_states": self._rests.of(ordered)}}
        env_idx = torch.tensor(rows, device=self._env.device)
        self._is_reset = torch.zeros_like(self._is_reset).index_fill(0, env_idx, True)
        return self._env.reset(options={"env_idx": env_idx, **options})[1]

    def _reset_controllers(self, reset: Callable[[], None]) -> None:
        """Resets the controllers of the environments whose episodes begin; the targets of the others stay.

        ManiSkill's partial reset comes to its controllers when it has unmasked all environments again.
        """
        scene = self._env.scene
        unmasked, scene._reset_mask = scene._reset_mask, self._is_reset
        reset()
        scene._reset_mask = unmasked

    def _look(self) -> None:
        """Has contacts read after the sub-steps after which the CPU's simulator reads them."""
        number = self._env._sim_steps_per_control
        left = number - self._num_sub_steps % number  # of the control step, this one included
        self._num_sub_steps += 1
        if left == 1 or left % self.config.scene.contact_every == 0:
            self._reader.look()

    def _separate(self, env: Any) -> None:
        """Prepares a WidowX task, whose environments ManiSkill does not tell apart."""
        from stare_jax.envs.maniskill.batched_widowx import BatchedBackdrop, separate_environments

        separate_environments(env)
        if self.config.image_size:
            self._backdrop = BatchedBackdrop(env, self.config.scene.camera.name, self.config.image_shape)

    def _observe(self, info: Mapping[str, Any], is_first: np.ndarray, *, draws: bool = True) -> EnvStep:
        """Copies everything: the next call overwrites the simulator's buffers."""
        drawn = {self.config.scene.camera.name: self._render()} if self.config.image_size and draws else {}
        reading, drawn = torch_to_jax((self._reader.ask(info["success"]), drawn))
        self._images = self._images | drawn
        signals = self._reader.read(reading, is_first)
        no_tokens = np.zeros((self.num_envs, 0), np.int32)
        state = self._observed_state(signals, reading.gripper_opening)
        observation = Observation(self._images, state, no_tokens, no_tokens.astype(bool))
        return EnvStep(observation, signals, np.ones(self.num_envs, bool))

    def _render(self) -> Any:
        """Returns the images as the simulator has them, a tensor uint8 `[B, H, W, 3]`."""
        scene, camera = self._env.scene, self._env.scene.sensors[self.config.scene.camera.name]
        scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera.capture()
        pictures = camera.get_obs(rgb=True, depth=False, position=False, segmentation=self._backdrop is not None)
        return pictures["rgb"] if self._backdrop is None else self._backdrop.behind(**pictures)


@functools.partial(jax.jit, static_argnums=2)
def _executable(action: jax.Array, is_reset: jax.Array, gripper_threshold: float | None) -> tuple[jax.Array, jax.Array]:
    """Returns the actions to execute, float32 `[B, A]`, zero in rows that are reset, and whether all were finite."""
    action = jnp.where(is_reset[:, None], 0.0, action).astype(jnp.float32)
    return executed_action(action, gripper_threshold), jnp.isfinite(action).all()


def _initialize_each(env: Any, initialize: Callable, env_idx: Any, options: Mapping[str, Any]) -> None:
    """Begins the episodes of some environments one by one, each from a seed of its own.

    ManiSkill itself draws the first states of all environments in a reset from the first one's seed.

    Args:
        env: the environment.
        initialize: its own `_initialize_episode`.
        env_idx: int tensor `[K]`.
        options: of the reset, with the K seeds.
    """
    import torch

    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        for k, seed in enumerate(options[SEEDS]):
            torch.manual_seed(seed)
            env._episode_rng = np.random.RandomState(seed)
            # What is written to the simulator's buffers goes to these environments alone.
            env.scene._reset_mask.zero_()
            env.scene._reset_mask[env_idx[k]] = True
            initialize(env_idx[k : k + 1], options)
