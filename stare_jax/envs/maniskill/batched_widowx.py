"""WidowX environments in a batch, each apart from the others: its success by its own objects, its own photograph.

This module imports ManiSkill; it is imported where a WidowX batch has been built.
"""

from collections.abc import Mapping
from typing import Any

import torch
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import BaseBridgeEnv
from mani_skill.utils.geometry.rotation_conversions import quaternion_to_matrix

from stare_jax.envs.maniskill.widowx import load_photograph, shown_parts


def separate_environments(env: Any) -> None:
    """Changes the class of a batch's environment so that a task's rule of success is asked of each of them.

    Episodes then begin by ManiSkill's reset to given states: `options["reset_to_env_states"]`.

    Args:
        env: the unwrapped `mani_skill` environment of a subclass of `BaseBridgeEnv`.
    """
    task = type(env)
    # The task's own `evaluate` calls that of its superclass, which is now the one below.
    env.__class__ = type(task.__name__, (task, SeparateBridgeEnv), {})
    env.episode_source_obj_bbox_world = torch.zeros(env.num_envs, 3, device=env.device)
    env.episode_target_obj_bbox_world = torch.zeros(env.num_envs, 3, device=env.device)
    env.consecutive_grasp = torch.zeros(env.num_envs, dtype=torch.int32, device=env.device)
    names = ("moved_correct_obj", "moved_wrong_obj", "is_src_obj_grasped", "consecutive_grasp")
    env.episode_stats = {name: torch.zeros(env.num_envs, dtype=torch.bool, device=env.device) for name in names}


class SeparateBridgeEnv(BaseBridgeEnv):
    """ManiSkill's WidowX environments, where success does not depend on how the objects of the first one lie."""

    def set_state_dict(self, state: Mapping[str, Any], env_idx: torch.Tensor | None = None) -> None:
        """Sets the states of some environments and begins their episodes.

        Args:
            state: "actors" or "articulations" -> name -> `[K, N]`, in the order of the environments.
            env_idx: int `[K]`, None for all.
        """
        super().set_state_dict(state, env_idx)
        rows = slice(None) if env_idx is None else env_idx
        self.episode_source_obj_bbox_world[rows] = self._extents(self.source_obj_name)[rows]
        self.episode_target_obj_bbox_world[rows] = self._extents(self.target_obj_name)[rows]
        self.consecutive_grasp[rows] = 0
        self.episode_stats = {name: values.clone() for name, values in self.episode_stats.items()}
        for values in self.episode_stats.values():
            values[rows] = False

    def _extents(self, name: str) -> torch.Tensor:
        """Returns the sizes of an object's box `[B, 3]` as ManiSkill turns them, with signs, in metres."""
        size = self.episode_model_bbox_sizes[name].float()
        return (quaternion_to_matrix(self.objs[name].pose.q) @ size[:, None])[..., 0]

    def _evaluate(
        self,
        success_require_src_completely_on_target: bool = True,
        z_flag_required_offset: float = 0.02,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Judges all environments as ManiSkill judges one; returns bool `[B]` each, by ManiSkill's names."""
        source, target = self.objs[self.source_obj_name], self.objs[self.target_obj_name]
        is_grasped = self.agent.is_grasping(source)
        self.consecutive_grasp = torch.where(is_grasped, self.consecutive_grasp + 1, 0)
        half_source, half_target = self.episode_source_obj_bbox_world / 2, self.episode_target_obj_bbox_world / 2
        offset = source.pose.p - target.pose.p
        reach = torch.linalg.norm(half_target[:, :2], dim=1) + 0.003
        gap = offset[:, 2] - half_target[:, 2] - half_source[:, 2]
        success = (torch.linalg.norm(offset[:, :2], dim=1) <= reach) & (offset[:, 2] > 0)
        success &= gap <= z_flag_required_offset
        if success_require_src_completely_on_target:
            success &= torch.linalg.norm(self.scene.get_pairwise_contact_forces(source, target), dim=1) > 0.05
        stats = self.episode_stats
        self.episode_stats = stats | {
            "src_on_target": success,
            "is_src_obj_grasped": stats["is_src_obj_grasped"] | is_grasped,
            "consecutive_grasp": stats["consecutive_grasp"] | (self.consecutive_grasp >= 5),
        }
        return self.episode_stats | {"success": success.clone()}


class BatchedBackdrop:
    """Puts robot and objects of all environments in front of a photograph, as `Backdrop` does for one."""

    def __init__(self, env: Any, camera: str, size: tuple[int, int]):
        """
        Args:
            env: the unwrapped `mani_skill` environment.
            camera: the simulator's name of the camera.
            size: (height, width) of its images.
        """
        self._photograph = torch.tensor(load_photograph(env, camera, size), device=env.device)
        ids = torch.stack([part.per_scene_id for part in shown_parts(env)], dim=1).long()
        # The last column is that of all larger ids, which are of something else.
        self._is_shown = torch.zeros(env.num_envs, int(ids.max()) + 2, dtype=torch.bool, device=env.device)
        self._is_shown.scatter_(1, ids, True)

    def behind(self, rgb: torch.Tensor, segmentation: torch.Tensor) -> torch.Tensor:
        """Returns images uint8 `[B, H, W, 3]` with the photograph where segmentation `[B, H, W, 1]` names others."""
        named = segmentation.long().clamp(0, self._is_shown.shape[1] - 1)
        is_shown = self._is_shown.gather(1, named.flatten(1)).view(named.shape)
        return torch.where(is_shown, rgb, self._photograph)
