"""The lightning indexer: its formula written out, which positions it chooses, and what it learns by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.indexed_attention import (
    Places,
    gathered_attention,
    indexed_attention,
    indexed_decode,
    learning,
)
from deepseek_jax.layers.indexer import (
    Index,
    Indexer,
    IndexerConfig,
    IndexKeys,
    among_top,
    divergence,
    hadamard,
    scores,
    top_slots,
)
from deepseek_jax.layers.mla import MLAConfig
from deepseek_jax.layers.rope import Yarn, frequencies
from deepseek_jax.layers.sparse_mla import FirstHalves
from pallas_kernels.mla_decode import fp8_cache

SIZES = IndexerConfig(index_heads=3, index_width=8, index_top_k=4, q_rank=6)
ATTENTION = MLAConfig(2, 6, 5, 4, 4, 3, yarn=Yarn(40, 16))
B, T, D, K = 2, 11, 10, 4
DRAW = np.random.default_rng(0)


def build():
    def key(rngs):
        return IndexKeys(SIZES, D, rngs=rngs)

    return Indexer(SIZES, D, key, FirstHalves(ATTENTION), rngs=nnx.Rngs(0))


def normal(*shape):
    return DRAW.normal(size=shape).astype(np.float32)


def test_scores_are_the_papers_formula(filled):
    """eq. 1, with pairs (i, i + P/2) of the first P numbers rotated, and a LayerNorm with a bias over the keys."""
    definition, params, _ = filled(build, std=0.5)
    c_BTR, x_BTD = normal(B, T, 6), normal(B, T, D)
    at_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

    @jax.jit
    def run(params):
        indexer = bind(definition, params, {})
        return scores(indexer(c_BTR, x_BTD, at_BT, indexer.keys(x_BTD, at_BT)))

    w, x = jax.tree.map(np.float64, params), np.float64(x_BTD)
    theta = frequencies(4, 1e4, ATTENTION.yarn)

    def rope(z):  # (..., T, 8)
        turned = (z[..., :2] + 1j * z[..., 2:4]) * np.exp(1j * np.arange(T)[:, None] * theta)
        return np.concatenate([turned.real, turned.imag, z[..., 4:]], -1)

    k = x @ w["key"]["down_DQ"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = rope(k * w["key"]["norm"]["gain"] + w["key"]["norm"]["bias"])
    q = rope(np.einsum("btr,rhq->bhtq", c_BTR, w["q_up_RHQ"]))
    weights = x @ w["weight_DH"] / np.sqrt(3 * 8)
    expected = np.einsum("bhts,bth->bts", np.maximum(np.einsum("bhtq,bsq->bhts", q, k), 0), weights)
    np.testing.assert_allclose(run(params), expected, atol=1e-5)


def test_the_best_are_chosen_and_of_equal_ones_the_lowest():
    seen = np.tri(6, dtype=bool)[None]
    given = np.array([[5, 1, 1, 1, 1, 9], [-2, 0, -0.0, 0, -1, 3], [1, 1, 1, 1, 1, 1]], np.float32)
    rows = np.array([4, 5, 3])  # queries, each with its scores
    chosen = np.asarray(jax.jit(among_top, static_argnums=2)(given[None], seen[:, rows], 3))[0]
    assert [np.flatnonzero(row).tolist() for row in chosen] == [[0, 1, 2], [1, 2, 5], [0, 1, 2]]
    slots, is_chosen = jax.device_get(jax.jit(top_slots, static_argnums=2)(given[None], seen[:, [4, 5, 1]], 3))
    found = [sorted(row[kept]) for row, kept in zip(slots[0], is_chosen[0], strict=True)]
    assert found == [[0, 1, 2], [1, 2, 5], [0, 1]]


@pytest.mark.parametrize("top_k", [1, 4, 11, 20])
def test_the_mask_and_the_numbers_are_of_the_same_set(top_k):
    given = np.round(normal(B, T, T) * 2) / 2  # with many ties
    seen = np.broadcast_to(np.tri(T, dtype=bool), given.shape)
    mask = np.asarray(among_top(given, seen, top_k))
    slots, kept = jax.device_get(top_slots(given, seen, top_k))
    other = np.zeros((B, T, T + 1), bool)
    np.put_along_axis(other, np.where(kept, slots, T), True, axis=-1)
    np.testing.assert_array_equal(mask, other[..., :T])
    np.testing.assert_array_equal(mask.sum(-1), np.broadcast_to(np.minimum(np.arange(1, T + 1), top_k), (B, T)))


def given():
    index = Index(normal(B, T, 3, 8), normal(B, T, 3), normal(B, T, 8))
    segments = np.array([[1] * 6 + [2] * 5] * B, np.int32)
    places = Places(np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), segments, segments)
    return normal(B, T, 2, 8), normal(B, T, 2, 8), normal(B, T, 2, 3), index, places


def test_blocks_of_queries_are_the_whole_and_no_gradient_enters_the_index():
    q, k, v, index, places = given()

    def run(arrays, at_once):
        q, k, v, index = arrays
        o = indexed_attention(q, k, v, index, places, top_k=K, scale=0.3, at_once=at_once)
        return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    (d_whole, whole), (d_blocks, blocks) = (
        jax.jit(jax.grad(run, has_aux=True), static_argnums=1)((q, k, v, index), n) for n in (2**20, B * T * 3 * 4)
    )
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), d_blocks, d_whole)
    assert all(np.any(part) for part in d_whole[:3]) and not any(np.any(part) for part in d_whole[3])
    chosen = np.asarray(among_top(scores(index), places.seen(T), K))
    assert chosen.sum(-1).max() == K and not chosen[:, 6:, :6].any()
    weights = np.exp(0.3 * np.einsum("bthq,bshq->bhts", q, k)) * chosen[:, None]
    expected = np.einsum("bhts,bshu->bthu", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(whole, expected, atol=1e-5)


def test_gathering_what_is_chosen_is_masking_the_rest():
    """Where keys are latents and rotary keys, one for all heads, and values the latents; backwards as well."""
    q, _, _, index, places = given()
    c, k_rope = normal(B, T, 5), normal(B, T, 3)
    options = {"top_k": K, "scale": 0.3, "at_once": 3 * B * K * (2 + 8)}

    def masked(q, c, k_rope):
        k = jnp.broadcast_to(jnp.concatenate([c, k_rope], -1)[:, :, None], (B, T, 2, 8))
        return indexed_attention(q, k, jnp.broadcast_to(c[:, :, None], (B, T, 2, 5)), index, places, **options)

    def gathered(q, c, k_rope):
        return gathered_attention(q, c, k_rope, index, places, **options)

    def run(attend):
        def loss(*arrays):
            o = attend(*arrays)
            return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

        return jax.device_get(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, c, k_rope))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(gathered), run(masked))


@pytest.mark.parametrize("is_dense", [True, False])
def test_the_index_learns_the_attention_summed_over_heads(is_dense):
    q, k, _, index, places = given()
    options = {"top_k": K, "is_dense": is_dense, "scale": 0.3, "at_once": B * T * 3 * 4}

    def run(arrays):
        q, k, index = arrays
        found = learning(q, k, index, places, **options)
        return jnp.sum(found.divergence_BT), found

    gradients, found = jax.device_get(jax.jit(jax.grad(run, has_aux=True))((q, k, index)))
    assert not np.any(gradients[0]) and not np.any(gradients[1]) and all(np.any(part) for part in gradients[2])
    seen, scored = np.asarray(places.seen(T)), np.float64(scores(index))
    chosen = np.asarray(among_top(scored.astype(np.float32), seen, K))

    def softmax(x, mask):
        e = np.exp(x) * mask
        return e / e.sum(-1, keepdims=True)

    pairs, on = 0.3 * np.float64(np.einsum("bthq,bshq->bhts", q, k)), seen if is_dense else chosen
    p, q_ = softmax(pairs, on[:, None]).mean(1), softmax(scored, on)
    expected = (p * np.log(np.where(on, p, 1) / np.where(on, q_, 1))).sum(-1)
    np.testing.assert_allclose(found.divergence_BT, expected, atol=1e-5)
    np.testing.assert_allclose(found.recall_BT, (softmax(pairs, seen[:, None]).mean(1) * chosen).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(found.has_choice_BT, seen.sum(-1) > K)


def test_the_divergence_is_zero_where_the_index_is_the_attention():
    p = jax.nn.softmax(normal(1, 3, 5))
    np.testing.assert_allclose(divergence(p, jnp.log(p) + 7, jnp.ones((1, 3, 5), bool)), 0, atol=1e-6)


def test_gathered_entries_in_fp8_are_those_of_the_cache():
    c, rope, keys = normal(6, 128), normal(6, 4), normal(6, 128)
    row, kept = np.array([[[3, 0, 5]]]), np.array([[[True, True, False]]])
    q, q_rope = normal(1, 1, 2, 128) * 0.1, normal(1, 1, 2, 4)
    entry = fp8_cache.encode(c, rope)
    wide = tuple(np.float32(part) for part in fp8_cache.decode(entry, 4))
    got, expected = (indexed_decode(q, q_rope, cache, row, kept, scale=0.2) for cache in ((entry,), wide))
    np.testing.assert_array_equal(got, expected)
    coded = fp8_cache.encode_key(keys)
    assert coded.shape == (6, 132)  # bytes of the published cache
    back = np.asarray(fp8_cache.decode_key(coded))
    np.testing.assert_allclose(back, keys, atol=0.07 * np.abs(keys).max())
    scale = np.asarray(coded[:, 128:]).view(np.float32)
    assert (np.log2(scale) % 1 == 0).all() and (np.abs(back / scale).max(1) > 224).all()


def test_a_hadamard_matrix_keeps_dot_products():
    x, y = normal(3, 8), normal(5, 8)
    np.testing.assert_allclose(hadamard(x) @ hadamard(y).T, x @ y.T, atol=1e-5)
    np.testing.assert_allclose(hadamard(np.eye(2, dtype=np.float32)), np.array([[1, 1], [1, -1]]) / 2**0.5, atol=1e-6)
