"""Toy tasks in pure JAX, one of each family of stages: learning tests and algorithm studies in seconds."""

from stare_jax.envs.toys import lift, place, push
from stare_jax.envs.toys.vec_env import CAMERA, Toy, ToyEnv

TOYS: dict[str, Toy] = {"push": push.TOY, "place": place.TOY, "lift": lift.TOY}
"""The toys by name."""
TOY_TASKS: dict[str, Toy] = {toy.env_id: toy for toy in TOYS.values()}
"""The toys by the name of their task, as `ToyPush-v0`."""

__all__ = ["CAMERA", "TOYS", "TOY_TASKS", "Toy", "ToyEnv", "lift", "place", "push"]
