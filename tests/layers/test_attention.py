"""Causal attention: the formula in float64, documents apart, prompts read whole or in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers import attention, cache
from deepseek_jax.layers.attention import masked_softmax
from deepseek_jax.layers.base import bind
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.mla import MLA, MLAConfig
from deepseek_jax.layers.tokens import Tokens
from pallas_kernels.mla_decode import fp8_cache

SCALE = 0.4
LENGTH = 150  # two blocks of queries
encode = jax.jit(fp8_cache.encode)
SEGMENTS = np.array([[1] * 61 + [2] * 89, [1] * LENGTH])


@pytest.fixture(scope="module")
def qkv() -> tuple:
    rng = np.random.default_rng(0)
    sizes = (4, 6), (2, 6), (2, 4)  # heads, width
    return tuple(rng.normal(size=(2, LENGTH, *size)).astype(np.float32) for size in sizes)


def formula(q, k, v, segments) -> np.ndarray:
    q, k, v = np.float64(q), *(np.float64(x).repeat(2, axis=2) for x in (k, v))
    scores = np.einsum("bthq,bshq->bhts", q, k) * SCALE
    seen = np.tril(np.ones(scores.shape[-2:], bool)) & (segments[:, None, :, None] == segments[:, None, None, :])
    p = np.exp(np.where(seen, scores, -np.inf))
    return np.einsum("bhts,bshu->bthu", p / p.sum(-1, keepdims=True), v)


@functools.cache
def both(name: str, masked: bool):
    """Compiled (output, gradients) of an implementation."""

    def loss(q, k, v):
        segments = jnp.asarray(SEGMENTS) if masked else None
        o = Kernels(attention=name)["attention"](q, k, v, scale=SCALE, segments_BT=segments)
        return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("masked", [False, True])
def test_all_implementations_are_the_formula(qkv, masked):
    expected_gradients, expected = both("reference", masked)(*qkv)
    np.testing.assert_allclose(expected, formula(*qkv, SEGMENTS if masked else np.ones_like(SEGMENTS)), atol=1e-5)
    for name in ("xla", "chunked"):
        gradients, o = both(name, masked)(*qkv)
        np.testing.assert_allclose(o, expected, atol=1e-5)
        for got, right in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, right, atol=2e-5)


def test_a_masked_document_is_as_if_alone(qkv):
    _, together = both("xla", True)(*qkv)
    alone = formula(*(x[:1, 61:] for x in qkv), np.ones((1, 89)))
    np.testing.assert_allclose(together[:1, 61:], alone, atol=1e-5)


@pytest.mark.parametrize("change", [{"RECOMPUTED_FROM": LENGTH - 1}, {}])
def test_the_length_chooses_whether_weights_are_kept(qkv, monkeypatch, change):
    for name, value in change.items():
        monkeypatch.setattr(attention, name, value)
    traced = str(jax.make_jaxpr(functools.partial(attention.causal_attention, scale=SCALE))(*qkv))
    said = attention.computed_by("xla", LENGTH)
    assert ("custom_vjp" in traced, "chunked" in said) == (bool(change), bool(change))
    assert attention.computed_by("cudnn", LENGTH) == "cudnn"


def test_what_does_not_fit_is_a_user_error(qkv):
    q, k, v = qkv
    with pytest.raises(UserError, match=r"kernels.attention='chunked': q .*expected .* config.kernels.attention=xla"):
        attention.chunked(q[:, :, :3], k, v, scale=SCALE)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (jnp.bfloat16, 64, "needs a Hopper GPU"),
        (jnp.float32, 64, "expected bfloat16"),
        (jnp.bfloat16, 8, "multiples of 64"),
    ],
)
def test_the_kernel_for_hopper_says_what_it_needs(dtype, width, message):
    x = np.zeros((1, 4, 2, width), dtype)
    with pytest.raises(UserError, match=f"kernels.attention='mosaic_gpu': .*{message}.*config.kernels.attention=xla"):
        Kernels(attention="mosaic_gpu")["attention"](x, x, x, scale=1.0)


def test_latent_decode_by_chunks_is_latent_decode():
    """Over a cache of fewer slots than a page too; two tokens per sequence, of different positions."""
    rng = np.random.default_rng(0)
    for n_slots in (10, 192):
        shapes = (2, 2, 3, 8), (2, 2, 3, 4), (2, n_slots, 8), (2, n_slots, 4)
        q, rope, *cache = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        positions_BT = np.array([[n_slots - 2, n_slots - 1], [4, 5]])
        seen_BTS = np.arange(n_slots) <= positions_BT[..., None]
        found, expected = (
            jax.jit(functools.partial(Kernels(latent_decode=name)["latent_decode"], scale=SCALE))(
                q, rope, tuple(cache), seen_BTS
            )
            for name in ("chunked", "xla")
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_latent_decode_of_few_slots_is_xlas_and_of_more_the_kernels():
    q, rope = (np.ones((1, 1, 2, width), np.float32) for width in (8, 4))
    few, more = (
        (q, rope, tuple(np.ones((1, n, width), np.float32) for width in (8, 4)), np.ones((1, 1, n), bool))
        for n in (2048, 2112)
    )
    by_size, by_xla = (
        jax.jit(functools.partial(Kernels(latent_decode=name)["latent_decode"], scale=1.0))
        for name in ("by_size", "xla")
    )
    np.testing.assert_array_equal(by_size(*few), by_xla(*few))
    with pytest.raises(UserError, match="latent_decode='mosaic_gpu'"):
        by_size(*more)


@pytest.mark.parametrize(("page", "n_heads", "is_kernels"), [(64, 16, True), (64, 8, False), (32, 16, False)])
def test_pages_that_a_kernel_reads_where_they_lie_are_not_put_side_by_side(page, n_heads, is_kernels):
    by_size = functools.partial(Kernels(latent_decode="by_size")["latent_decode"], scale=1.0)
    q, rope = (jnp.ones((1, 1, n_heads, width), jnp.bfloat16) for width in (256, 64))
    pools = tuple(jnp.ones((3, page, width), jnp.bfloat16) for width in (256, 64))
    given = q, rope, pools, jnp.ones((1, 1, 2 * page), bool)
    if not is_kernels:
        np.testing.assert_array_equal(by_size(*given, table_BN=jnp.asarray([[2, 1]])), jnp.ones_like(q))
        return
    with pytest.raises(UserError, match="latent_decode='mosaic_gpu'"):
        by_size(*given, table_BN=jnp.asarray([[2, 1]]))


def test_entries_in_fp8_that_the_kernel_does_not_read_are_xlas_at_any_size():
    """Latents of 256 numbers: 392 bytes, no multiple of 16; of 512: 656."""
    by_size = jax.jit(functools.partial(Kernels(latent_decode="by_size")["latent_decode"], scale=1.0))
    table_BN, seen_BTS = np.zeros((1, 33), np.int32), np.ones((1, 1, 2112), bool)
    for width in (256, 512):
        shapes = (1, 1, 2, width), (1, 1, 2, 64), (1, 64, width), (1, 64, 64)
        q, rope, c, k_rope = (np.ones(shape, jnp.bfloat16) for shape in shapes)
        given = q, rope, (encode(c, k_rope),), seen_BTS
        if width == 256:
            np.testing.assert_array_equal(by_size(*given, table_BN=table_BN), q)
            continue
        with pytest.raises(UserError, match="latent_decode='mosaic_gpu'"):
            by_size(*given, table_BN=table_BN)


@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_latent_decode_reads_pages_where_they_lie(name):
    rng = np.random.default_rng(0)
    q, rope, *pools = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 1, 3, 8), (2, 1, 3, 4), (5, 64, 8), (5, 64, 4))
    )
    table_BN = np.array([[4, 1], [3, 0]])
    seen_BTS = np.arange(128) <= np.array([[[100]], [[63]]])
    side_by_side = tuple(pool[table_BN].reshape(2, 128, -1) for pool in pools)
    decode = jax.jit(functools.partial(Kernels(latent_decode=name)["latent_decode"], scale=SCALE))
    found = decode(q, rope, tuple(pools), seen_BTS, table_BN=table_BN)
    expected = decode(q, rope, side_by_side, seen_BTS)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_latent_decode_reads_pages_in_fp8_where_they_lie(name):
    """As if the numbers that the entries stand for lay there, in bfloat16."""
    rng = np.random.default_rng(0)
    q, rope, c, k_rope = (
        rng.normal(size=s).astype(jnp.bfloat16) for s in ((2, 1, 3, 128), (2, 1, 3, 4), (5, 64, 128), (5, 64, 4))
    )
    entries = encode(c, k_rope)
    table_BN, seen_BTS = np.array([[4, 1], [3, 0]]), np.arange(128) <= np.array([[[100]], [[63]]])
    decode = jax.jit(functools.partial(Kernels(latent_decode=name)["latent_decode"], scale=SCALE))
    numbers = jax.jit(fp8_cache.decode, static_argnums=1)(entries, 4)
    found, expected = (decode(q, rope, kept, seen_BTS, table_BN=table_BN) for kept in ((entries,), numbers))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "n_slots", "message"),
    [("chunked", 100, "100 slots per sequence"), ("mosaic_gpu", 64, "float32, cache .*expected bfloat16")],
)
def test_latent_decode_says_what_it_needs(name, n_slots, message):
    shapes = (1, 1, 2, 8), (1, 1, 2, 4), (1, n_slots, 8), (1, n_slots, 4)
    q, rope, c, k_rope = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(UserError, match=f"kernels.latent_decode='{name}': .*{message}.*config.kernels.latent_decode=x"):
        decode = Kernels(latent_decode=name)["latent_decode"]
        decode(q, rope, (c, k_rope), np.ones((1, 1, n_slots), bool), scale=1.0)


def test_a_row_that_sees_nothing_is_finite():
    assert np.isfinite(jax.jit(masked_softmax)(np.ones((2, 3)), np.zeros((2, 3), bool))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments_BT": np.zeros((1, 4), np.int32)}, "does not keep documents apart"),
        ({"dtype": jnp.float32}, "float32 activations, expected bfloat16"),
        ({}, "on cpu: needs an NVIDIA GPU"),
    ],
)
def test_cudnn_says_what_it_needs(options, message):
    x = np.zeros((1, 4, 2, 8), options.pop("dtype", jnp.bfloat16))
    with pytest.raises(UserError, match=message):
        Kernels(attention="cudnn")["attention"](x, x, x, scale=1.0, **options)


LATENT = MLAConfig(n_heads=2, q_rank=6, kv_rank=5, nope_width=4, rope_width=4, value_width=3, init_std=0.5)
LAYERS = {
    "latent": lambda: MLA(LATENT, 8, rngs=nnx.Rngs(0)),
    "grouped": lambda: GQA(GQAConfig(n_heads=4, n_kv_heads=2, head_width=4, init_std=0.5), 8, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_prompt_read_in_parts_is_read_whole(name, filled):
    parts = filled(LAYERS[name], std=0.5)
    x = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)
    positions = np.broadcast_to(np.arange(9), (2, 9))

    @jax.jit
    def whole(x):
        return cache.first_pass(11)(bind(*parts), x, Tokens.of(x[..., 0]), None)[:2]

    @jax.jit
    def part(x, start, kept):
        at = jax.lax.dynamic_slice_in_dim(positions, start, 3, axis=1)
        return cache.next_chunk(start)(bind(*parts), x, Tokens(x[..., 0], at), kept)[:2]

    expected, read = jax.device_get(whole(x))
    kept, found = jax.tree.map(np.zeros_like, read), []
    for start in (0, 3, 6):
        u, kept = part(x[:, start : start + 3], start, kept)
        found.append(u)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), kept, read)
