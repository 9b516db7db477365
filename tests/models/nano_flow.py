"""pi0.5 small enough to compile in seconds."""

import dataclasses

import jax
import numpy as np

from stare_jax.models import pi05_tiny
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.siglip import SigLIPConfig

INSTRUCTIONS = ("push the blue cube to the target", "lift the peg upright")


def flow_config(**changes):
    """The tiny preset with two layers everywhere, scanned, one action dimension of padding and two cameras."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = pi05_tiny(
        state_dim=2,
        siglip=SigLIPConfig(width=16, depth=2, num_heads=2, mlp_dim=24, patch_size=4),
        paligemma=GemmaConfig(width=16, depth=2, mlp_dim=24, **heads),
        expert=GemmaConfig(width=12, depth=2, mlp_dim=20, **heads),
        action_dim=3,
        model_action_dim=4,
        window=4,
        chunk=2,
        num_denoising_steps=3,
        image_size=32,
        stem=(8,),
        cameras=("base_camera", "hand_camera"),
        value_dims=(8,),
        execution=Execution(),
    )
    return dataclasses.replace(config, **changes)


def random_params(policy, seed=0, scale=0.2):
    """Fills every leaf with normal numbers: fresh adaptive norms would hide the whole expert."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree.map(lambda s: rng.normal(0, scale, s.shape).astype(s.dtype), shapes)
