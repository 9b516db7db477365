"""Cases of `pi05.py`: sizes and inputs, the same for every implementation, and our implementation.

A peer is `make_sampler(sizes, params) -> sample`, see `Peer`.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.config import ConfigError, home_path
from stare_jax.models import PI05_EXPERTS, PI05_PALIGEMMA, LoRAConfig, Pi05Config, Policy, pi05_base
from stare_jax.models.blank import blank_policy
from stare_jax.models.nn.attention import AttentionKernel
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.rollout.prepared import prepare_params
from stare_jax.sharding.mesh import path_name
from stare_jax.types import Observation, PyTree

CAMERAS = ("base_camera", "left_wrist_camera", "right_wrist_camera")
OPENPI_NAMES = ("PaliGemma/", "action_in_proj/", "action_out_proj/", "time_mlp_in/", "time_mlp_out/")
"""Beginnings of the names of the parameters that openpi's pi0.5 has; ours has a value head as well."""


class Inputs(NamedTuple):
    """Inputs of a chunk; no image is missing and no prompt is padded."""

    images: tuple[np.ndarray, ...]
    """uint8 `[B, S, S, 3]` of each camera."""
    tokens: np.ndarray
    """int32 `[B, L]`."""
    noise: np.ndarray
    """float32 `[B, H, A]`."""


class Peer(Protocol):
    """Another implementation: `make_sampler` in a file that the user names, or in a module on the path.

    Called once, it may compile and arrange what it likes; the first calls of what it returns are not timed.
    """

    def __call__(self, sizes: dict[str, Any], params: dict[str, jax.Array]) -> Callable:
        """Returns `sample(images, image_masks, tokens, token_mask, noise, num_steps) -> actions`.

        `images` are a tuple of float32 `[B, S, S, 3]` in [-1, 1], one for each camera; `image_masks` bool
        `[B, cameras]`; `tokens` int32 and `token_mask` bool `[B, L]`; `noise` float32 `[B, H, A]`, where Euler's method
        starts; `num_steps` an int. All are JAX arrays on the device. `actions` are `[B, H, A]`, normalised, anything
        that NumPy can read; what is timed ends when it has been read.

        Args:
            sizes: numbers and strings alone: `siglip` (width, depth, num_heads, mlp_dim, patch_size), `paligemma` and
                `expert` (width, depth, mlp_dim, num_heads, num_kv_heads, head_dim) as dicts, `vocab_size`, `action_dim`
                (A), `window` (H), `prompt_length` (L), `num_cameras`, `image_size` (S), `dtype` of the activations.
            params: openpi's names, with slashes, to JAX arrays in openpi's shapes, of type `dtype`; not to be changed.
        """


def make_config(
    size: str, dtype: str, *, num_cameras: int, window: int, attention: AttentionKernel = "xla", **changes
) -> Pi05Config:
    """Returns the model: "full", "reduced" for CPUs, or "tiny" for tests."""
    config = pi05_base(
        tokenizer="words",
        cameras=CAMERAS[:num_cameras],
        window=window,
        chunk=min(5, window),
        noise="ode",
        prompt_template="{instruction}",
        state_dim=0,
        execution=Execution(dtype=dtype, param_dtype=dtype, attention=attention),
    )
    if size != "full":
        divisor, depth, length = {"reduced": (4, 4, 48), "tiny": (32, 2, 8)}[size]
        heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256 // divisor}
        config = dataclasses.replace(
            config,
            siglip=SigLIPConfig(width=1152 // divisor, depth=depth, num_heads=4, mlp_dim=4304 // divisor),
            paligemma=GemmaConfig(width=2048 // divisor, depth=depth, mlp_dim=16384 // divisor, **heads),
            expert=GemmaConfig(width=1024 // divisor, depth=depth, mlp_dim=4096 // divisor, **heads),
            vocab_size=4096,
            prompt_length=length,
            image_size=112 if size == "reduced" else 28,
        )
    return dataclasses.replace(config, **changes)


def make_trained(config: Pi05Config, trained: str, remat: str) -> Pi05Config:
    """Returns the model of an imitation step: what is trained, "expert" or "full", is in float32."""
    execution = dataclasses.replace(config.execution, param_dtype="float32", remat=remat)
    return dataclasses.replace(
        config, frozen_patterns=(PI05_PALIGEMMA,) if trained == "expert" else (), execution=execution
    )


def with_adapters(config: Pi05Config) -> Pi05Config:
    """Returns the model with the recipes' adapters of both language models."""
    return dataclasses.replace(config, lora=LoRAConfig(rank=32, alpha=32.0, targets=PI05_EXPERTS))


def build(config: Pi05Config) -> Policy:
    return blank_policy(config)


def make_inputs(config: Pi05Config, batch: int, seed: int) -> Inputs:
    rng = np.random.default_rng([seed, batch])
    shape = (batch, config.image_size, config.image_size, 3)
    images = tuple(rng.integers(0, 256, shape, dtype=np.uint8) for _ in config.cameras)
    tokens = rng.integers(3, config.vocab_size, (batch, config.prompt_length), dtype=np.int32)
    noise = rng.normal(size=(batch, config.window, config.model_action_dim)).astype(np.float32)
    return Inputs(images, tokens, noise)


def observe(config: Pi05Config, inputs: Inputs) -> Observation:
    state = np.zeros((len(inputs.tokens), config.state_dim), np.float32)
    images = dict(zip(config.cameras, inputs.images, strict=True))
    return jax.device_put(Observation(images, state, inputs.tokens, np.ones(inputs.tokens.shape, bool)))


def our_sampler(config: Pi05Config, params: PyTree, inputs: Inputs) -> Callable[[], np.ndarray]:
    """Returns a function that samples by this library's policy, its value included; `[B, H, A]`, normalised.

    Parameters are prepared beforehand, as for a rollout.
    """
    policy, observation, noise = build(config), observe(config, inputs), jnp.asarray(inputs.noise)
    params = prepare_params(policy, params)

    @jax.jit
    def sample(params, observation, noise):
        decision = policy.sample(params, observation, jax.random.key(0), temperature=0.0, noise=noise)
        return decision.trace["chain"][:, -1], decision.value

    return lambda: np.asarray(jax.block_until_ready(sample(params, observation, noise))[0])


def peer_sampler(peer: Peer, config: Pi05Config, params: PyTree, inputs: Inputs) -> Callable[[], np.ndarray]:
    """Returns a function that samples by a peer from the same weights, images, prompts and noise."""
    flat = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    sample = peer(sizes_of(config), {name: leaf for name, leaf in flat.items() if name.startswith(OPENPI_NAMES)})
    images = tuple(jnp.asarray(image, jnp.float32) / 255.0 * 2.0 - 1.0 for image in inputs.images)
    tokens, noise = jnp.asarray(inputs.tokens), jnp.asarray(inputs.noise)
    masks = jnp.ones((len(tokens), len(images)), bool), jnp.ones(tokens.shape, bool)
    arguments = (images, masks[0], tokens, masks[1], noise, config.num_denoising_steps)
    return lambda: np.asarray(sample(*arguments), np.float32)


def sizes_of(config: Pi05Config) -> dict[str, Any]:
    """Returns what a peer is told, see `Peer`."""
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("siglip", "paligemma", "expert")}
    numbers = {name: getattr(config, name) for name in ("vocab_size", "window", "prompt_length", "image_size")}
    rest = {"action_dim": config.model_action_dim, "num_cameras": len(config.cameras)}
    return parts | numbers | rest | {"dtype": config.execution.dtype}


def load_peer(name: str) -> Peer:
    """Returns the function of `FILE.py:function`; or of `module:function`, a module on the path or beside this file.

    Raises:
        ConfigError: it has another form, or there is no such file, module or function.
    """
    place, _, function = name.rpartition(":")
    if not place:
        raise ConfigError(f"--peer: got {name!r}, expected FILE.py:function or module:function")
    try:
        return getattr(_load_file(place) if place.endswith(".py") else importlib.import_module(place), function)
    except (FileNotFoundError, ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"--peer: got {name!r}: {error}") from error


def _load_file(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer", home_path(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
