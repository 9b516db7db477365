"""Building blocks against independent implementations: attention, linear layers, patches, rotary positions, norms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from stare_jax.models.attention import KeyValue, attend
from stare_jax.models.layers import Execution, Linear
from stare_jax.models.llama import Cache, Llama, LlamaConfig, RMSNorm, rotary_angles, rotate
from stare_jax.models.vit import ConvStem, ViT, ViTBlock, ViTConfig, patchify, strided_windows

FLOAT32 = Execution()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_attention_equals_jax_nn_with_grouped_heads_and_a_mask():
    query, key, value = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    np.testing.assert_allclose(attend(query, [KeyValue(key, value)], [mask]), expected, atol=1e-5)


def test_attention_over_two_segments_equals_attention_over_one():
    query, key, value = normal(0, 2, 3, 4, 8), normal(1, 2, 7, 4, 8), normal(2, 2, 7, 4, 8)
    mask = normal(3, 2, 3, 7) > -0.5
    whole = attend(query, [KeyValue(key, value)], [mask])
    parts = [KeyValue(key[:, :4], value[:, :4]), KeyValue(key[:, 4:], value[:, 4:])]
    np.testing.assert_allclose(attend(query, parts, [mask[..., :4], mask[..., 4:]]), whole, atol=1e-5)


def test_linear_equals_flax_dense_general():
    x = normal(0, 2, 3, 4, 5)
    for axes, features in ((1, (6,)), (2, (7, 2)), (3, (2,))):
        ours = Linear(features, FLOAT32, num_in_axes=axes)
        params = ours.init(jax.random.key(1), x)
        params = jax.tree.map(lambda p: p + 0.1, params)
        theirs = nn.DenseGeneral(features, axis=tuple(range(-axes, 0)))
        np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-5)


def test_patches_and_windows_equal_convolutions():
    image = normal(0, 2, 8, 8, 3)
    kernel = normal(1, 4, 4, 3, 5)
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=dimensions)
    ours = jnp.einsum("bnhwc,hwcd->bnd", patchify(image, 4), kernel)
    np.testing.assert_allclose(ours, expected.reshape(2, 4, 5), atol=1e-4)
    expected = jax.lax.conv_general_dilated(image, kernel[:3, :3], (2, 2), "SAME", dimension_numbers=dimensions)
    ours = jnp.einsum("bijhwc,hwcd->bijd", strided_windows(image), kernel[:3, :3])
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_stem_shrinks_by_its_stride():
    stem = ConvStem((4, 6, 8), FLOAT32)
    features, _ = stem.init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert features.shape == (2, 2, 2, 8)


def test_vit_block_in_numpy():
    """Pre-norm, eps 1e-6, one softmax per head, erf GELU (tanh GELU is off by 1e-3 here), LayerScale."""
    config = ViTConfig(width=6, depth=2, num_heads=2, mlp_dim=8, layer_scale=1.0)
    x = np.asarray(normal(0, 1, 4, 6)) * 3e-3  # small, so that the eps of the norm matters
    params = ViTBlock(config, FLOAT32).init(jax.random.key(1), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.7, p.shape).astype(np.float32), params)

    def norm(v, p):
        centred = v - v.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    qkv = np.einsum("td,dchk->tchk", norm(x[0], params["norm1"]), params["qkv"]["kernel"]) + params["qkv"]["bias"]
    attended = np.zeros((4, 2, 3))
    for head in range(2):
        query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        attended[:, head] = scipy.special.softmax(query @ key.T / np.sqrt(3), axis=-1) @ value
    out = x[0] + params["ls1"] * (np.einsum("thk,hkd->td", attended, params["proj"]["kernel"]) + params["proj"]["bias"])
    hidden = norm(out, params["norm2"]) @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    hidden = hidden * 0.5 * (1 + scipy.special.erf(hidden / np.sqrt(2)))
    out = out + params["ls2"] * (hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"])
    got, _ = ViTBlock(config, FLOAT32).apply({"params": params}, x)
    np.testing.assert_allclose(got[0], out, atol=1e-5)


def test_vit_runs_all_blocks_but_the_last_and_drops_the_prefix():
    config = ViTConfig(width=8, depth=4, num_heads=2, mlp_dim=16, patch_size=4, num_prefix=5, layer_scale=1.0)
    features, variables = ViT(config, FLOAT32).init_with_output(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
    params = variables["params"]
    assert features.shape == (2, 4, 8)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {3}
    assert (params["cls_token"].shape, params["reg_token"].shape) == ((1, 1, 8), (1, 4, 8))
    assert params["pos_embed"].shape == (1, 4, 8)  # of the patches alone
    assert set(params) == {"patch_embed", "pos_embed", "cls_token", "reg_token", "blocks"}


def test_rotary_positions_are_hugging_faces():
    """Dimension i turns with i + D/2 by the angle position / theta^(2i/D)."""
    x = np.asarray(normal(0, 1, 3, 2, 4))
    cos, sin = rotary_angles(jnp.array([[0, 1, 5]]), 4, 10_000.0)
    got = np.asarray(rotate(x, cos, sin))
    for t, position in enumerate((0, 1, 5)):
        for i, frequency in enumerate((1.0, 0.01)):
            angle = position * frequency
            a, b = x[0, t, :, i], x[0, t, :, i + 2]
            np.testing.assert_allclose(got[0, t, :, i], a * np.cos(angle) - b * np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(got[0, t, :, i + 2], b * np.cos(angle) + a * np.sin(angle), atol=1e-5)


def test_rms_norm_reduces_in_float32():
    x = jnp.asarray([[1e-3, 2e-3]], jnp.bfloat16)
    got = RMSNorm(1e-6, "float32").apply({"params": {"scale": jnp.array([1.0, 3.0])}}, x)
    exact = np.asarray(x, np.float32)
    expected = exact / np.sqrt((exact**2).mean() + 1e-6) * [1.0, 3.0]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=1e-2)


LLAMA = LlamaConfig(vocab_size=50, width=16, depth=3, num_heads=4, num_kv_heads=2, mlp_dim=24)


@pytest.fixture(scope="module")
def llama_params():
    shapes = jax.eval_shape(
        lambda key: Llama(LLAMA, FLOAT32).init(key, jnp.zeros((1, 2, 16)), jnp.ones((1, 2), bool)), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def test_decoding_one_by_one_equals_the_whole_sequence(llama_params):
    llama, x = Llama(LLAMA, FLOAT32), normal(1, 2, 9, 16)
    mask = jnp.ones((2, 6), bool).at[0, 1:3].set(False)
    whole, _ = llama.apply(llama_params, x, jnp.concatenate([mask, jnp.ones((2, 3), bool)], axis=1))
    hidden, prefix = llama.apply(llama_params, x[:, :6], mask)
    np.testing.assert_allclose(hidden[mask], whole[:, :6][mask], atol=1e-5)
    cache = Cache(prefix, jax.tree.map(lambda a: jnp.zeros((*a.shape[:2], 3, *a.shape[3:])), prefix))
    for i in range(3):
        hidden, cache = llama.apply(llama_params, x[:, 6 + i : 7 + i], cache, mask, i, method="decode")
        np.testing.assert_allclose(hidden[:, 0], whole[:, 6 + i], atol=1e-5)


def test_padding_is_invisible(llama_params):
    llama, x = Llama(LLAMA, FLOAT32), normal(1, 1, 5, 16)
    plain, _ = llama.apply(llama_params, x, jnp.ones((1, 5), bool))
    padded = jnp.concatenate([x[:, :1], 99 * jnp.ones((1, 3, 16)), x[:, 1:]], axis=1)
    mask = jnp.array([[True, False, False, False, True, True, True, True]])
    got, _ = llama.apply(llama_params, padded, mask)
    np.testing.assert_allclose(got[:, mask[0]], plain, atol=1e-5)


@pytest.mark.parametrize("execution", [Execution(unroll=3), Execution(remat="full"), Execution(remat="dots")])
def test_how_layers_are_run_changes_no_number(llama_params, execution):
    x, mask = normal(1, 2, 4, 16), jnp.ones((2, 4), bool)

    def loss(params, how):
        return jnp.sum(jnp.square(Llama(LLAMA, how).apply(params, x, mask)[0]))

    expected = jax.value_and_grad(loss)(llama_params, FLOAT32)
    got = jax.value_and_grad(loss)(llama_params, execution)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, expected)


def test_computation_in_bfloat16_keeps_float32_logits(llama_params):
    llama = Llama(LLAMA, Execution(dtype="bfloat16", param_dtype="bfloat16"))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), llama_params)
    hidden, _ = llama.apply(params, normal(1, 2, 4, 16).astype(jnp.bfloat16), jnp.ones((2, 4), bool))
    logits = llama.apply(params, hidden, 10, 20, method="logits")
    assert (hidden.dtype, logits.dtype, logits.shape) == (jnp.bfloat16, jnp.float32, (2, 4, 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Execution(remat="some"), "remat: got 'some', expected one of"),
        (lambda: Execution(unroll=0), "unroll: got 0, expected at least 1"),
        (
            lambda: ViTConfig(width=10, depth=3, num_heads=4, mlp_dim=8),
            "num_heads: got 4, expected a divisor of width 10",
        ),
        (lambda: ViTConfig(width=8, depth=1, num_heads=4, mlp_dim=8), "depth: got 1, expected at least 2"),
        (lambda: LlamaConfig(9, 12, 1, 4, 4, 8), "num_heads: got 4, expected an even share of width 12"),
        (lambda: LlamaConfig(9, 16, 1, 4, 3, 8), "num_kv_heads: got 3, expected a divisor of 4"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
