"""Toy tasks in pure JAX, one of each family of stages: learning tests and algorithm studies in seconds."""

from stare_jax.envs.toys import lift, place, push
from stare_jax.envs.toys.vec_env import Toy, ToyEnv

TOYS: dict[str, Toy] = {"push": push.TOY, "place": place.TOY, "lift": lift.TOY}
"""The toys by name."""

__all__ = ["TOYS", "Toy", "ToyEnv", "lift", "place", "push"]
