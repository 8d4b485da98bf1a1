"""V4's attention by laws: decode = prefill = whole sequences, ragged batches, packed documents, causality, blocks.

One program per kind of layer; each row of its batch is a length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.layers import compressed_attention
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, bind, split
from deepseek_jax.layers.cache import (
    first_pass,
    next_chunk,
    next_chunk_in_pages,
    next_tokens,
    next_tokens_in_pages,
)
from deepseek_jax.layers.compressed import CompressedAttention, CompressedConfig
from deepseek_jax.layers.entry_codes import Fp4, Fp8, TrainedFp4, from_e2m1, to_e2m1
from deepseek_jax.layers.indexer import IndexerConfig, hadamard
from deepseek_jax.layers.rope import Yarn
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.precision.matmul import PlainMatmul

D, T, CHUNK, STEPS = 8, 80, 13, 10
SIZES = CompressedConfig(4, 8, 4, 6, 2, 4, window=6, yarn=Yarn(4.0, 16), init_std=0.5)
INDEX = IndexerConfig(3, 4, 3, SIZES.q_rank, init_std=0.5)
KINDS = {"sliding": (0, None), "sparse": (4, INDEX), "heavy": (8, None), "published": (4, INDEX)}
RUNS = {"published": Execution(cache="fp8")}


@functools.cache
def made(kind):
    """(a function of weights that gives the layer, random weights, a text x_BTD)."""
    (ratio, index), run = KINDS[kind], RUNS.get(kind, SINGLE_DEVICE)
    abstract = nnx.eval_shape(lambda: CompressedAttention(SIZES, D, run, ratio=ratio, index=index, rngs=nnx.Rngs(0)))
    definition, params, none = split(abstract)
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda a: np.float32(0.5 * draw.normal(size=a.shape)), params)
    params = jax.tree_util.tree_map_with_path(lambda path, a: a + (path[-1].key == "gain"), params)
    return lambda params: bind(definition, params, none), params, np.float32(draw.normal(size=(1, T, D)))


@functools.cache
def whole(kind):
    """A compiled function of weights, x_BTD and documents."""
    module, _, _ = made(kind)

    @jax.jit
    def run(params, x_BTD, segments_BT, positions_BT):
        return module(params)(x_BTD, positions_BT, segments_BT)

    return run


@pytest.fixture(params=["sparse", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "sparse")])
def kind(request):
    return request.param


def text(kind):
    """(weights, x_BTD, u_BTD) of the text as one document."""
    _, params, x_BTD = made(kind)
    rows = np.repeat(x_BTD, T, axis=0)
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (T, T))
    u_BTD = whole(kind)(params, rows, np.zeros((T, T), np.int32), positions_BT)
    return params, rows, np.asarray(u_BTD)


def assert_same(kind, found, expected):
    """Equal to rounding; in the published cache but for numbers that float32's rounding moves to another code."""
    apart = np.abs(found - expected)
    assert np.quantile(apart, 0.99 if kind == "published" else 1.0) <= 2e-5


def test_prompts_of_all_lengths_then_a_chunk_then_single_tokens(kind):
    """Row b has a prompt of b + 1 tokens, then up to CHUNK more, then one at a time: as in the whole text."""
    module, _, _ = made(kind)
    params, x_BTD, u_BTD = text(kind)
    padded = T + CHUNK + STEPS

    @jax.jit
    def run(params, x_BTD, n_B, more_B):
        attention = module(params)
        n_batch = len(n_B)

        def call(attend, from_B, n_tokens, real_B, cached):
            positions_BT = from_B[:, None] + jnp.arange(n_tokens, dtype=jnp.int32)
            rows_BTD = jnp.take_along_axis(x_BTD, jnp.minimum(positions_BT, padded - 1)[..., None], axis=1)
            real_BT = None if real_B is None else jnp.arange(n_tokens) < real_B[:, None]
            if real_BT is not None:  # padding holds anything
                rows_BTD = jnp.where(real_BT[..., None], rows_BTD, 7.0)
            tokens = Tokens.of(positions_BT, positions_BT, real_BT=real_BT)
            return attend(attention, attention.operand(rows_BTD), tokens, cached)[:2]

        zero_B = jnp.zeros(n_batch, jnp.int32)
        prompt_BTD, cached = call(first_pass(padded), zero_B, T, n_B, None)
        chunk_BTD, cached = call(next_chunk(0), n_B, CHUNK, more_B, cached)

        def step(cached, number):
            u_BTD, cached = call(next_tokens, n_B + more_B + number, 1, None, cached)
            return cached, u_BTD[:, 0]

        _, single_TBD = jax.lax.scan(step, cached, jnp.arange(STEPS))
        return prompt_BTD, chunk_BTD, jnp.swapaxes(single_TBD, 0, 1)

    n_B = np.arange(1, T + 1, dtype=np.int32)
    more_B = np.int32(CHUNK - n_B % 5)
    tail = np.zeros((T, padded - T, D), np.float32)
    prompt_BTD, chunk_BTD, single_BTD = jax.device_get(run(params, np.concatenate([x_BTD, tail], axis=1), n_B, more_B))
    found = np.full((T, T, D), np.nan, np.float32)
    for b, (n, more) in enumerate(zip(n_B, more_B, strict=True)):
        pieces = np.concatenate([prompt_BTD[b, :n], chunk_BTD[b, :more], single_BTD[b]])[:T]
        found[b, : len(pieces)] = pieces
    is_there = ~np.isnan(found)
    assert is_there.sum() > 0.6 * found.size
    assert_same(kind, found[is_there], u_BTD[is_there])


def test_no_token_moves_an_earlier_output_and_each_moves_its_own(kind):
    params, x_BTD, u_BTD = text(kind)
    moved = x_BTD + np.eye(T, dtype=np.float32)[..., None]  # row b has another token b
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (T, T))
    other = np.asarray(whole(kind)(params, moved, np.zeros((T, T), np.int32), positions_BT))
    apart_BT = np.abs(other - u_BTD).max(-1)
    assert apart_BT[np.tri(T, k=-1, dtype=bool)].max() <= 1e-6  # row b, tokens before b
    assert np.diagonal(apart_BT).min() > 1e-3
    if kind != "sliding":  # an entry holds the first token, long after the window
        assert (apart_BT[0, SIZES.window + 2 :] > 1e-6).any()


def test_packed_documents_are_as_alone(kind):
    params, x_BTD, u_BTD = text(kind)
    rows, segments_BT, positions_BT = x_BTD.copy(), np.zeros((T, T), np.int32), np.zeros((T, T), np.int32)
    for b in range(T):
        start = 0
        for number, n in enumerate((b % 7 + 1, 23, 1, 30, T)):
            own = slice(start, start + n)
            positions_BT[b, own] = np.arange(T)[: T - start][:n]
            rows[b, own], segments_BT[b, own], start = x_BTD[0, positions_BT[b, own]], number + 1, start + n
    found = np.asarray(whole(kind)(params, rows, segments_BT, positions_BT))
    assert_same(kind, found, u_BTD[0][positions_BT])


@pytest.mark.slow
def test_blocks_of_queries_and_gathered_entries_change_nothing(monkeypatch):
    """Outputs and gradients of an indexer's layer: masked at once, and gathered in blocks, the last of them short."""
    module, params, x_BTD = made("sparse")

    def value(params, x_BTD):
        u_BTD = module(params)(x_BTD)
        return jnp.sum(jnp.sin(u_BTD)), u_BTD

    (_, u_BTD), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, x_BTD)
    monkeypatch.setattr(compressed_attention, "ROWS", 18)
    monkeypatch.setattr(compressed_attention, "GATHERED_FROM", 1)

    def in_blocks(params, x_BTD):
        return value(params, x_BTD)

    (_, other), others = jax.jit(jax.value_and_grad(in_blocks, argnums=(0, 1), has_aux=True))(params, x_BTD)
    np.testing.assert_allclose(u_BTD, other, atol=1e-5)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=2e-4), gradients, others)


def test_the_published_bytes():
    """584 bytes per entry, 68 per key of the indexer; what is read is stored again as it was."""
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32) * np.float32([[1e-3], [1], [300]])
    entries, keys = Fp8(512, 64, jnp.float32), Fp4(128, jnp.float32)

    @jax.jit
    def run(x):
        stored, stored_keys = entries.pack(x), keys.pack(x[:, :128])
        read = entries.unpack(stored)
        return stored, read, entries.pack(read), stored_keys, hadamard(keys.unpack(stored_keys))

    stored, read, again, stored_keys, read_keys = jax.device_get(run(x))
    assert stored.shape == (3, 584) and stored_keys.shape == (3, 68)
    np.testing.assert_array_equal(entries_of := entries.unpack(again), read)
    assert entries_of.dtype == np.float32
    largest = np.abs(x[:, :448]).reshape(3, 7, 64).max(-1).repeat(64, -1)
    assert (np.abs(read - x)[:, :448] <= largest / 14).all() and (
        np.abs(read - x) <= 2**-4 * np.abs(x).max(1)[:, None]
    ).all()
    apart = np.linalg.norm(read_keys - x[:, :128], axis=1) / np.linalg.norm(x[:, :128], axis=1)
    assert apart.max() < 0.2
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(to_e2m1(from_e2m1(codes)) % 8, codes % 8)


class ThroughFp4(PlainMatmul):
    """Plain products, so that an indexer's rounding is all that differs."""

    index_in_fp4 = True


def test_training_reads_what_an_indexers_cache_will_hold_and_gradients_pass_straight_through():
    """Forward is the dequantised value to the last bit; backward is that of the Hadamard matrix, its own inverse."""
    x = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32) * np.float32([[1e-3], [1], [300], [0], [7]])
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    @jax.jit
    def run(x, g):
        stored, pull = jax.vjp(TrainedFp4(jnp.float32).pack, x)
        published = Fp4(128, jnp.float32)
        return stored, published.unpack(published.pack(x)), pull(g)[0], hadamard(g)

    stored, published, gradient, turned = jax.device_get(run(x, g))
    np.testing.assert_array_equal(stored, published)
    np.testing.assert_allclose(gradient, turned, atol=1e-6)


def test_an_indexer_is_trained_through_fp4():
    """Its losses are those of rounded queries and keys; its weights get gradients, the attention's none of them."""
    _, params, x_BTD = made("sparse")
    run = Execution(matmul=ThroughFp4())

    def layer():
        return CompressedAttention(SIZES, D, run, ratio=4, index=INDEX, is_dense=True, rngs=nnx.Rngs(0))

    definition, _, _ = split(nnx.eval_shape(layer))

    def divergence(params):
        module, tokens = bind(definition, params, {}), Tokens.of(x_BTD[..., 0])
        assert isinstance(module.codes[1], TrainedFp4) and module.indexer.rounds == module.codes[1]
        x = module.operand(x_BTD)
        entries = module.entries(x, tokens)
        _, keys_BIQ = module._closed(entries, tokens.positions_BT, None)
        q_BTHQ = module._index(module.queries(x, tokens.positions_BT)[1], x, tokens, keys_BIQ).q_BTHQ
        return module.over_itself(x, tokens, entries)[1]["index_kl"], (keys_BIQ, q_BTHQ)

    (_, vectors), gradients = jax.device_get(jax.jit(jax.value_and_grad(divergence, has_aux=True))(params))
    for vector in vectors:  # each is a code times its block's scale: 4 numbers, so one block
        size = np.abs(vector)
        ratio = size / np.exp2(np.ceil(np.log2(size.max(-1, keepdims=True) / 6)))
        assert np.isin(ratio, [0, 0.5, 1, 1.5, 2, 3, 4, 6]).all()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(gradient != 0) == ("indexer" in jax.tree_util.keystr(path)), path


def test_an_indexer_of_another_width_is_refused():
    odd, run = IndexerConfig(3, 12, 3, SIZES.q_rank), Execution(matmul=ThroughFp4())
    with pytest.raises(UserError, match="config.precision=fp4 for an indexer's keys of 12"):
        nnx.eval_shape(lambda: CompressedAttention(SIZES, D, run, ratio=4, index=odd, rngs=nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["published", "heavy"])
def test_pages_hold_what_one_memory_holds(kind):
    """A chunk, then single tokens of two sequences; their pages lie in any order, their rows among those of others."""
    module, params, x_1TD = made(kind)
    page, n_pages = 8, T // 8
    x_BTD = np.concatenate([x_1TD, x_1TD[:, ::-1]])
    table_BN = np.int32(1 + np.random.default_rng(0).permutation(2 * n_pages).reshape(2, n_pages))
    slot_B = np.int32([2, 0])

    @jax.jit
    def run(params, x_BTD):
        a = module(params)

        def part(at, size):
            at_BT = jnp.broadcast_to(at + jnp.arange(size, dtype=jnp.int32), (2, size))
            return a.operand(jax.lax.dynamic_slice_in_dim(x_BTD, at, size, 1)), Tokens.of(at_BT, at_BT)

        entries = a.entries(*part(0, 1))
        flat = a.cache.empty(entries, T)
        one = jax.tree.map(lambda y: jnp.zeros((2 * n_pages + 1, *y.shape[1:]), y.dtype), entries)
        pool = jax.eval_shape(lambda: a.cache.empty(one, page)).with_rows(4)
        pool = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), pool)
        x, tokens = part(0, CHUNK)
        u_BTD, flat, _ = next_chunk(0)(a, x, tokens, flat)
        v_BTD, pool, _ = next_chunk_in_pages(0, table_BN, slot_B)(a, x, tokens, pool)

        def step(kept, at):
            x, tokens = part(at, 1)
            u_BTD, flat, _ = next_tokens(a, x, tokens, kept[0])
            v_BTD, pool, _ = next_tokens_in_pages(table_BN, slot_B)(a, x, tokens, kept[1])
            return (flat, pool), (u_BTD, v_BTD)

        return (u_BTD, v_BTD), jax.lax.scan(step, (flat, pool), jnp.arange(CHUNK, T))[1]

    for own, paged in jax.device_get(run(params, x_BTD)):
        assert np.any(own)
        assert_same(kind, paged, own)
