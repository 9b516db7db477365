"""Building blocks against independent implementations: attention, linear layers, patches, rotary positions, norms."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from nano_policy import jit

from stare_jax.models.nn.attention import KeyValue, attend, self_attend
from stare_jax.models.nn.gemma import FeedForward, GemmaConfig
from stare_jax.models.nn.linear import Execution, Linear
from stare_jax.models.nn.llama import Cache, Llama, LlamaConfig
from stare_jax.models.nn.norms import RMSNorm
from stare_jax.models.nn.placement import FEW_TOKENS, MANY_TOKENS, place_token
from stare_jax.models.nn.rotary import rotary_angles, rotate
from stare_jax.models.nn.vit import ConvStem, ViT, ViTBlock, ViTConfig, patchify, strided_windows
from stare_jax.plan.text import Program

FLOAT32 = Execution()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_attention_equals_jax_nn_with_grouped_heads_and_a_mask():
    query, key, value = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    mask = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 5, 5))
    expected = jit(jax.nn.dot_product_attention)(query, key, value, mask=mask[:, None])
    got = jit(attend)(query, [KeyValue(key, value)], [mask])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attention_over_two_segments_equals_attention_over_one():
    query, key, value = normal(0, 2, 3, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    mask = normal(3, 2, 3, 7) > -0.5
    whole = jit(attend)(query, [KeyValue(key, value)], [mask])
    parts = [KeyValue(key[:, :4], value[:, :4]), KeyValue(key[:, 4:], value[:, 4:])]
    got = jit(attend)(query, parts, [mask[..., :4], mask[..., 4:]])
    np.testing.assert_allclose(got, whole, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_scores_of_a_whole_sequence_are_not_transposed(num_kv_heads):
    query, key, mask = normal(0, 2, 24, 4, 8), normal(1, 2, 24, num_kv_heads, 8), np.ones((2, 24, 24), bool)
    compiled = jit(attend).lower(query, [KeyValue(key, key)], [mask]).compile()
    transposes = [one for one, _, _ in Program(compiled.as_text()).walk() if one.opcode == "transpose"]
    sizes = {math.prod(one.results[0].shape) for one in transposes}
    assert query.size in sizes and 2 * 4 * 24 * 24 not in sizes


def test_scores_are_scaled_in_float32():
    """1 / sqrt(72) is no power of two: a query of 16 bits that is scaled before the product is rounded once more."""
    query, key, value = (np.asarray(normal(i, 2, 5, 3, 72) * 3, jnp.bfloat16) for i in range(3))
    exact = [np.asarray(x, np.float64) for x in (query, key, value)]
    scores = np.einsum("bthd,bshd->bhts", *exact[:2]) / np.sqrt(72.0)
    expected = np.einsum("bhts,bshd->bthd", scipy.special.softmax(scores, axis=-1), exact[2])
    got = jit(attend)(query, [KeyValue(key, np.asarray(value, np.float32))], [None])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    rounded = np.asarray(query * jnp.bfloat16(72**-0.5), np.float64)
    scores = np.einsum("bthd,bshd->bhts", rounded, exact[1])
    early = np.einsum("bhts,bshd->bthd", scipy.special.softmax(scores, axis=-1), exact[2])
    assert np.abs(early - expected).max() > 1e-2  # so the bound above tells them apart


def test_a_row_that_may_attend_to_nothing_takes_the_mean_of_all_values():
    """Rows of padding: their numbers are finite, and so are the gradients that pass them by."""
    query, key, value = normal(0, 1, 3, 2, 4), normal(1, 1, 5, 2, 4), normal(2, 1, 5, 2, 4)
    mask = np.ones((1, 3, 5), bool)
    mask[0, 1] = False
    parts = [KeyValue(key[:, :2], value[:, :2]), KeyValue(key[:, 2:], value[:, 2:])]
    attended = lambda query: attend(query, parts, [mask[..., :2], mask[..., 2:]])  # noqa: E731
    np.testing.assert_allclose(jit(attended)(query)[0, 1], value[0].mean(axis=0), atol=1e-5)
    gradient = jit(jax.grad(lambda query: attended(query).sum()))(query)
    assert np.isfinite(gradient).all() and not gradient[0, 1].any() and gradient[0, 0].any()


def by_lengths_and_by_masks(num_tokens, num_heads, head_dim, lengths):
    """The attention of padded rows, and its gradient, by each implementation, as float32; padding is zero."""
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    query, *new = (jnp.asarray(normal(i, 2, num_tokens, k, head_dim), dtype) for i, k in enumerate((num_heads, 1, 1)))
    is_valid = np.arange(num_tokens) < np.asarray(lengths)[:, None]
    mask = is_valid[:, :, None] & is_valid[:, None]

    def attended(query, new, implementation):
        out = self_attend(
            query, KeyValue(*new), mask, is_causal=False, implementation=implementation, lengths=jnp.asarray(lengths)
        )
        return jnp.where(is_valid[..., None, None], out.astype(jnp.float32), 0.0)

    def found(implementation):
        gradient = jax.grad(lambda *arrays: (attended(*arrays, implementation) ** 2).sum(), argnums=(0, 1))
        return attended(query, new, implementation), gradient(query, new)

    return [jit(partial(found, implementation))() for implementation in ("cudnn", "xla")]


@pytest.mark.parametrize("num_tokens", [6, 7])
def test_attention_by_lengths_is_that_of_masks(num_tokens):
    """Also of an odd number of tokens, to which one of padding is added, and where there is no GPU for cuDNN."""
    ours, expected = by_lengths_and_by_masks(num_tokens, 2, 8, [num_tokens, 4])
    atol = 2e-2 if jax.default_backend() == "gpu" else 1e-5
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol), ours, expected)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no CUDA device")
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(256, 16, 72), (273, 8, 256)])
def test_cudnn_has_the_sizes_of_pi05(num_tokens, num_heads, head_dim):
    """Heads of the tower and of PaliGemma; those of 256 numbers need the Hopper generation."""
    ours, expected = by_lengths_and_by_masks(num_tokens, num_heads, head_dim, [num_tokens, num_tokens - 20])
    jax.tree.map(partial(np.testing.assert_allclose, atol=5e-2), ours, expected)


def fill(shapes, seed=0, scale=0.5):
    """Random numbers for every leaf of abstract parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(("num_in_axes", "features"), [(1, (6,)), (2, (7, 2)), (3, (2,))])
def test_linear_equals_flax_dense_general(num_in_axes, features):
    x = normal(0, 2, 3, 4, 5)
    ours = Linear(features, FLOAT32, num_in_axes=num_in_axes)
    theirs = nn.DenseGeneral(features, axis=tuple(range(-num_in_axes, 0)))
    params = fill(jax.eval_shape(ours.init, jax.random.key(1), x))
    np.testing.assert_allclose(jit(ours.apply)(params, x), jit(theirs.apply)(params, x), atol=1e-5)


def test_patches_and_windows_equal_convolutions():
    image = normal(0, 2, 8, 8, 3)
    kernel = normal(1, 4, 4, 3, 5)
    dimensions = ("NHWC", "HWIO", "NHWC")
    convolve = jit(partial(jax.lax.conv_general_dilated, dimension_numbers=dimensions), static_argnums=(2, 3))
    expected = convolve(image, kernel, (4, 4), "VALID")
    ours = np.einsum("bnhwc,hwcd->bnd", patchify(image, 4), kernel)
    np.testing.assert_allclose(ours, expected.reshape(2, 4, 5), atol=1e-4)
    expected = convolve(image, kernel[:3, :3], (2, 2), "SAME")
    ours = np.einsum("bijhwc,hwcd->bijd", jit(strided_windows)(image), kernel[:3, :3])
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_stem_shrinks_by_its_stride():
    stem = ConvStem((4, 6, 8), FLOAT32)
    features, _ = jax.eval_shape(stem.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert features.shape == (2, 2, 2, 8)


def test_vit_block_in_numpy():
    """Pre-norm, eps 1e-6, one softmax per head, erf GELU (tanh GELU is off by 1e-3 here), LayerScale."""
    config = ViTConfig(width=6, depth=2, num_heads=2, mlp_dim=8, layer_scale=1.0)
    x = normal(0, 1, 4, 6) * 3e-3  # small, so that the eps of the norm matters
    block = ViTBlock(config, FLOAT32)
    params = fill(jax.eval_shape(block.init, jax.random.key(1), x), scale=0.7)["params"]

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
    got, _ = jit(block.apply)({"params": params}, x)
    np.testing.assert_allclose(got[0], out, atol=1e-5)


def test_vit_runs_all_blocks_but_the_last_and_drops_the_prefix():
    config = ViTConfig(width=8, depth=4, num_heads=2, mlp_dim=16, patch_size=4, num_prefix=5, layer_scale=1.0)
    image = jnp.zeros((2, 8, 8, 3))
    features, variables = jax.eval_shape(ViT(config, FLOAT32).init_with_output, jax.random.key(0), image)
    params = variables["params"]
    assert features.shape == (2, 4, 8)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {3}
    assert (params["cls_token"].shape, params["reg_token"].shape) == ((1, 1, 8), (1, 4, 8))
    assert params["pos_embed"].shape == (1, 4, 8)  # of the patches alone
    assert set(params) == {"patch_embed", "pos_embed", "cls_token", "reg_token", "blocks"}


def test_rotary_positions_are_hugging_faces():
    """Dimension i turns with i + D/2 by the angle position / theta^(2i/D)."""
    x = normal(0, 1, 3, 2, 4)
    turn = jit(lambda x, positions: rotate(x, *rotary_angles(positions, 4, 10_000.0)))
    got = np.asarray(turn(x, np.array([[0, 1, 5]])))
    for t, position in enumerate((0, 1, 5)):
        for i, frequency in enumerate((1.0, 0.01)):
            angle = position * frequency
            a, b = x[0, t, :, i], x[0, t, :, i + 2]
            np.testing.assert_allclose(got[0, t, :, i], a * np.cos(angle) - b * np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(got[0, t, :, i + 2], b * np.cos(angle) + a * np.sin(angle), atol=1e-5)


def test_rotary_positions_turn_halves():
    """No array of whole heads is float32, which would be written and read beside those of 16 bits."""
    angles = rotary_angles(np.zeros((1, 3), np.int32), 6, 10_000.0)
    assert [angle.shape for angle in angles] == [(1, 3, 1, 3)] * 2
    turn = jax.make_jaxpr(rotate)(jnp.zeros((1, 3, 2, 6), jnp.bfloat16), *angles)
    made = [x.aval for eqn in turn.eqns for x in eqn.outvars]
    assert made[-1].shape == (1, 3, 2, 6) and made[-1].dtype == jnp.bfloat16
    assert not [x for x in made if x.dtype == jnp.float32 and x.shape[-1] == 6]


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
    def whole(llama, x, mask):
        return llama.logits(llama(x, mask)[0], 0, 1)

    init = partial(Llama(LLAMA, FLOAT32).init, method=whole)
    return fill(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2, 16)), jnp.ones((1, 2), bool)), scale=0.3)


def test_decoding_one_by_one_equals_the_whole_sequence(llama_params):
    run = jit(partial(Llama(LLAMA, FLOAT32).apply, llama_params))
    decode = jit(partial(Llama(LLAMA, FLOAT32).apply, llama_params, method="decode"))
    x, mask = normal(1, 2, 9, 16), np.ones((2, 6), bool)
    mask[0, 1:3] = False
    whole, _ = run(x, np.concatenate([mask, np.ones((2, 3), bool)], axis=1))
    hidden, prefix = run(x[:, :6], mask)
    np.testing.assert_allclose(np.asarray(hidden)[mask], np.asarray(whole)[:, :6][mask], atol=1e-5)
    cache = Cache(prefix, jax.tree.map(lambda a: np.zeros((*a.shape[:2], 3, *a.shape[3:]), a.dtype), prefix))
    for i in range(3):
        hidden, cache = decode(x[:, 6 + i : 7 + i], cache, mask, i)
        np.testing.assert_allclose(hidden[:, 0], whole[:, 6 + i], atol=1e-5)


def test_weights_stay_where_they_are_for_fewer_rows_than_the_width():
    assert place_token(jnp.zeros((7, 1, 8))) is FEW_TOKENS and place_token(jnp.zeros((8, 1, 8))) is MANY_TOKENS


def test_padding_is_invisible(llama_params):
    run, x = jit(partial(Llama(LLAMA, FLOAT32).apply, llama_params)), normal(1, 1, 5, 16)
    plain, _ = run(x, np.ones((1, 5), bool))
    padded = np.concatenate([x[:, :1], 99 * np.ones((1, 3, 16), np.float32), x[:, 1:]], axis=1)
    mask = np.array([[True, False, False, False, True, True, True, True]])
    got, _ = run(padded, mask)
    np.testing.assert_allclose(np.asarray(got)[:, mask[0]], plain, atol=1e-5)


def test_without_jit_the_numbers_are_the_same(llama_params):
    llama, x, mask = Llama(LLAMA, FLOAT32), normal(1, 2, 4, 16), np.ones((2, 4), bool)
    expected, _ = jit(llama.apply)(llama_params, x, mask)
    with jax.disable_jit():
        got, _ = llama.apply(llama_params, x, mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def loss_and_gradient(params, execution):
    x, mask = normal(1, 2, 4, 16), np.ones((2, 4), bool)
    loss = lambda params: jnp.sum(jnp.square(Llama(LLAMA, execution).apply(params, x, mask)[0]))  # noqa: E731
    return jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain_gradient(llama_params):
    return loss_and_gradient(llama_params, FLOAT32)


@pytest.mark.parametrize("execution", [Execution(unroll=3), Execution(remat="full"), Execution(remat="dots")])
def test_how_layers_are_run_changes_no_number(llama_params, plain_gradient, execution):
    got = loss_and_gradient(llama_params, execution)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, plain_gradient)


def test_computation_in_bfloat16_keeps_float32_logits(llama_params):
    llama = Llama(LLAMA, Execution(dtype="bfloat16", param_dtype="bfloat16"))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), llama_params)
    x, mask = normal(1, 2, 4, 16).astype(jnp.bfloat16), np.ones((2, 4), bool)
    hidden, _ = jax.eval_shape(llama.apply, params, x, mask)
    logits = jax.eval_shape(lambda h: llama.apply(params, h, 10, 20, method="logits"), hidden)
    assert (hidden.dtype, logits.dtype, logits.shape) == (jnp.bfloat16, jnp.float32, (2, 4, 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Execution(remat="some"), "remat: got 'some', expected one of"),
        (lambda: Execution(unroll=0), "unroll: got 0, expected >= 1"),
        (
            lambda: ViTConfig(width=10, depth=3, num_heads=4, mlp_dim=8),
            "num_heads: got 4, expected a divisor of width 10",
        ),
        (lambda: ViTConfig(width=8, depth=1, num_heads=4, mlp_dim=8), "depth: got 1, expected >= 2"),
        (lambda: LlamaConfig(9, 12, 1, 4, 4, 8), "num_heads: got 4, expected an even share of width 12"),
        (lambda: LlamaConfig(9, 16, 1, 4, 3, 8), "num_kv_heads: got 3, expected a divisor of 4"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gates_and_the_numbers_beside_them_have_a_product_each_that_moves_nothing():
    """One product with both weights, whose axes are [2, in, out], would bring one of its arrays into another order."""
    layer = FeedForward(GemmaConfig(width=8, depth=1, mlp_dim=6, num_heads=1, num_kv_heads=1, head_dim=2), FLOAT32)
    x = normal(0, 2, 3, 8)
    params = layer.init(jax.random.key(0), x)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(layer.apply)(params, x).eqns]
    assert names.count("dot_general") == 3 and "transpose" not in names
    (gate, up), out = (x.reshape(-1, 8) @ w for w in params["params"]["gating_einsum"]), params["params"]["linear"]
    expected = (jax.nn.gelu(gate, approximate=True) * up) @ out
    np.testing.assert_allclose(layer.apply(params, x).reshape(-1, 8), expected, atol=1e-5)
