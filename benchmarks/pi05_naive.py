"""A peer for `pi05.py` without a cache: every denoising step runs images, text and chunk together.

python benchmarks/pi05.py --peer=pi05_naive:make_sampler
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stare_jax.models import Pi05Config
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.models.pi05.network import Pi05
from stare_jax.state.storage import nest


def make_sampler(sizes: dict[str, Any], params: dict[str, jax.Array]) -> Callable:
    """Returns the sampler, see `pi05_cases.Peer`."""
    config = Pi05Config(
        siglip=SigLIPConfig(**sizes["siglip"]),
        paligemma=GemmaConfig(**sizes["paligemma"]),
        expert=GemmaConfig(**sizes["expert"]),
        vocab_size=sizes["vocab_size"],
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=sizes["prompt_length"],
        model_action_dim=sizes["action_dim"],
        window=sizes["window"],
        chunk=sizes["window"],
        cameras=tuple(f"camera_{i}" for i in range(sizes["num_cameras"])),
        image_size=sizes["image_size"],
        execution=Execution(dtype=sizes["dtype"], param_dtype=sizes["dtype"]),
    )
    network = Pi05(config)
    tree = nest(params)

    @jax.jit
    def step(params, scene, x, time, delta):
        velocity, _, _ = network.apply({"params": params}, *scene, x, jnp.full(len(x), time))
        return x - delta * velocity

    def sample(images, image_masks, tokens, token_mask, noise, num_steps):
        x = noise
        for i in range(num_steps):
            x = step(tree, (images, image_masks, tokens, token_mask), x, 1 - i / num_steps, 1 / num_steps)
        return x

    return sample
