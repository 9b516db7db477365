"""The network of pi0.5 at full size, as shapes, and what fresh weights do."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.models.pi05.network import Pi05, Pi05Config


def full_size():
    heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
    return Pi05Config(
        siglip=SigLIPConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304),
        paligemma=GemmaConfig(width=2048, depth=18, mlp_dim=16384, **heads),
        expert=GemmaConfig(width=1024, depth=18, mlp_dim=4096, **heads),
        vocab_size=257_152,
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=200,
        window=50,
        chunk=50,
    )


def inputs(size, batch=1, window=50, action_dim=32):
    images = (jnp.zeros((batch, size, size, 3)),) * 3
    return (
        images,
        jnp.ones((batch, 3), bool),
        jnp.zeros((batch, 200), jnp.int32),
        jnp.ones((batch, 200), bool),
        jnp.ones((batch, window, action_dim)),
        jnp.ones(batch),
    )


def test_as_many_parameters_as_published():
    shapes = jax.eval_shape(Pi05(full_size()).init, jax.random.key(0), *inputs(224))["params"]
    count = {"/".join(path): leaf.size for path, leaf in flatten_dict(shapes).items()}

    def total(*prefixes, but=()):
        return sum(n for name, n in count.items() if name.startswith(prefixes) and not any(b in name for b in but))

    assert total("PaliGemma/img") == 414_803_696
    assert total("PaliGemma/llm", but=("_1/",)) == 2_508_531_712
    assert sum(n for name, n in count.items() if name.startswith("PaliGemma/llm") and "_1/" in name) == 427_932_672
    assert total("action", "time") == 2_165_792
    assert sum(count.values()) == 3_353_433_872


def test_fresh_adaptive_norms_make_the_expert_an_identity():
    """Their gates are zero, so what comes out is what went in, normalised once."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = Pi05Config(
        siglip=SigLIPConfig(width=16, depth=1, num_heads=2, mlp_dim=16),
        paligemma=GemmaConfig(width=16, depth=2, mlp_dim=16, **heads),
        expert=GemmaConfig(width=8, depth=2, mlp_dim=16, **heads),
        vocab_size=32,
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=200,
        model_action_dim=4,
        action_dim=4,
        window=3,
        chunk=3,
        image_size=28,
    )
    network = Pi05(config)
    *prompt, noisy, time = inputs(28, window=3, action_dim=4)
    noisy = jnp.asarray(np.random.default_rng(0).normal(size=noisy.shape), jnp.float32)
    variables = jax.jit(network.init)(jax.random.key(0), *prompt, noisy, time)
    _, _, suffix = jax.jit(network.apply)(variables, *prompt, noisy, time)
    projection = variables["params"]["action_in_proj"]
    x = noisy @ projection["kernel"] + projection["bias"]
    expected = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(suffix, expected, atol=1e-5)
