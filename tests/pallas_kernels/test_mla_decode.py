"""Decode over pages is attention to a sequence's tokens: whichever pages, however divided, whatever lies behind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_decode import Fp8Pages, Pages, chunked, contiguous, decode, fp8_cache, work

PAGE = work.PAGE
LENGTHS = [150, 0, 1, 64]
B, T, H, C, P, MOST = len(LENGTHS), 2, 3, 8, 4, 4
SCALE = 0.4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "PAGES", 2)


def inputs(dtype, t=T, widths=(C, P), gain=1.0) -> tuple:
    """Queries, a cache whose pages lie anywhere, its table; NaN in the null page and behind every sequence's end."""
    rng = np.random.default_rng(0)
    q, q_rope = (gain * rng.normal(size=(B, t, H, width)) for width in widths)
    pools = [rng.normal(size=(1 + B * MOST, PAGE, width)) for width in widths]
    table = rng.permutation(np.arange(1, 1 + B * MOST)).reshape(B, MOST)
    held = np.zeros(pools[0].shape[:2], bool)
    for pages, length in zip(table, LENGTHS, strict=True):
        held[pages] = np.arange(MOST * PAGE).reshape(MOST, PAGE) < length
        pages[-(-length // PAGE) :] = 0
    pools = [jax.device_put(np.asarray(np.where(held[..., None], pool, np.nan), dtype)) for pool in pools]
    return jnp.asarray(q, dtype), jnp.asarray(q_rope, dtype), Pages(*pools), jnp.asarray(table), jnp.asarray(LENGTHS)


@functools.partial(jax.jit, static_argnames=("implementation", "n_splits"))
def results(*arrays, implementation="chunked", n_splits=None):
    return decode(*arrays, implementation=implementation, scale=SCALE, n_splits=n_splits)


encode, decode_entries = jax.jit(fp8_cache.encode), jax.jit(fp8_cache.decode, static_argnums=1)


def attention(q, q_rope, pages, table, lengths) -> tuple:
    """Written out for each token of each sequence, in numpy."""
    o, lse = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for b, length in enumerate(lengths):
        c, rope = (np.asarray(pool)[table[b]].reshape(-1, pool.shape[-1]) for pool in pages)
        for t in range(q.shape[1]):
            n = max(length - q.shape[1] + 1 + t, 0)
            if n:
                scores = SCALE * (q[b, t] @ c[:n].T + q_rope[b, t] @ rope[:n].T)
                lse[b, t] = np.log(np.exp(scores).sum(axis=1))
                o[b, t] = np.exp(scores - lse[b, t][:, None]) @ c[:n]
    return o, lse


@pytest.mark.parametrize("options", [{"implementation": "reference"}, {}, {"n_splits": 3}])
def test_in_float64_it_is_attention(options):
    """Lengths 0 and 1 and the first of two tokens of a sequence of one included: o = 0 and lse = -inf."""
    with jax.enable_x64(True):
        arrays = inputs(jnp.float64)
        right = attention(*(np.asarray(x) if hasattr(x, "shape") else x for x in arrays))
        for found, expected in zip(results(*arrays, **options), right, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_bfloat16_is_as_exact_as_its_roundings():
    """Large logits too, of which one decides."""
    for gain in (1.0, 50.0):
        arrays = inputs(jnp.bfloat16, gain=gain)
        wide = jax.tree.map(lambda x: np.float32(x) if x.dtype == jnp.bfloat16 else x, arrays)
        (o, lse), (o_right, lse_right) = results(*arrays), results(*wide, implementation="reference")
        assert np.linalg.norm(np.float32(o) - o_right) <= 3e-3 * np.linalg.norm(o_right)
        np.testing.assert_allclose(lse, lse_right, rtol=1e-5, atol=1e-4)


def test_neither_neighbours_nor_the_place_of_pages_change_a_bit():
    q, q_rope, pages, table, lengths = jax.device_get(inputs(jnp.bfloat16))
    o, lse = map(np.asarray, results(q, q_rope, pages, table, lengths))
    order = np.random.default_rng(1).permutation(pages.c.shape[0])
    moved = Pages(*(pool[np.argsort(order)] for pool in pages))
    elsewhere = results(q, q_rope, moved, order[table].astype(table.dtype), lengths)
    others = (
        np.concatenate([q[:1], np.full_like(q[1:], 7)]),
        np.repeat(table[:1], B, axis=0),
        np.full_like(lengths, 150),
    )
    for found, expected in zip(elsewhere, (o, lse), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(results(others[0], q_rope, pages, *others[1:])[0][0], o[0])


def test_one_visible_key_is_copied():
    arrays = inputs(jnp.bfloat16, t=1)
    o, _ = results(*arrays)
    _, _, pages, table, _ = jax.device_get(arrays)
    np.testing.assert_array_equal(np.asarray(o)[2, 0], np.broadcast_to(pages.c[table[2, 0], 0], (H, C)))


def test_a_contiguous_cache_is_pages_in_order():
    c_BSC, rope_BSP = (np.arange(2 * 128 * width, dtype=np.float32).reshape(2, 128, width) for width in (C, P))
    pages, table = jax.device_get(jax.jit(contiguous)(c_BSC, rope_BSP))
    np.testing.assert_array_equal(pages.c[table].reshape(c_BSC.shape), c_BSC)
    np.testing.assert_array_equal(pages.rope[table].reshape(rope_BSP.shape), rope_BSP)
    assert jax.eval_shape(contiguous, c_BSC[:, :10], rope_BSP[:, :10])[1].shape == (2, 1)
    with pytest.raises(ValueError, match="100 slots per sequence: expected a multiple of 64"):
        contiguous(c_BSC[:, :100], rope_BSP[:, :100])


def test_parts_are_every_page_once_and_even():
    lengths, items = np.array([64 * 10, 1, 0, 64 * 7 + 1], np.int32), jax.jit(work.items, static_argnums=(1, 2))
    for longest_first in (False, True):
        rows = np.asarray(items(lengths, 3, longest_first))
        assert sorted(rows[:, 4]) == list(range(12)) and (rows[:, 4] % 4 == rows[:, 0]).all()
        for b, pages in enumerate((10, 1, 0, 8)):
            of_b = rows[rows[:, 0] == b]
            visited = sorted(i for row in of_b for i in range(row[1], row[2]))
            assert visited == list(range(pages)) and np.ptp(of_b[:, 2] - of_b[:, 1]) <= 1
    assert (np.diff(rows[:, 2] - rows[:, 1]) <= 0).all()


def test_few_sequences_are_divided_and_many_are_not():
    assert work.n_splits(256, 64, 132) == 1
    assert 8 <= work.n_splits(8, 512, 132) <= 16
    assert work.n_splits(1, 1, 132) == 1


def test_fp8_entries_are_those_published():
    """656 bytes: 512 codes, 4 scales in float32, 64 numbers in bfloat16; a block of zeros stays one."""
    rng = np.random.default_rng(0)
    c = rng.standard_t(3, size=(5, 512)).astype(jnp.bfloat16)
    c[0, :128] = 0
    rope = rng.normal(size=(5, 64)).astype(jnp.bfloat16)
    entries = encode(c, rope)
    assert entries.shape == (5, 656) and entries.dtype == jnp.uint8
    scale = np.asarray(entries)[:, 512:528].view(np.float32)
    tops = np.abs(np.asarray(c, np.float32)).reshape(5, 4, 128).max(axis=2)
    np.testing.assert_allclose(scale, np.where(tops > 0, tops / 448, 1), rtol=1e-6)
    found, rope_found = map(np.asarray, decode_entries(entries, 64))
    np.testing.assert_array_equal(rope_found, rope)
    bound = np.repeat(tops, 128, axis=1) * (2**-4 + 2**-8)  # half a step of E4M3, then of bfloat16
    assert (np.abs(np.asarray(found, np.float32) - np.asarray(c, np.float32)) <= bound).all()
    assert not found[0, :128].any()


def test_an_fp8_cache_is_read_as_the_numbers_it_holds():
    """Bytes behind a sequence's end may be anything, NaN as a scale too."""
    arrays = inputs(jnp.bfloat16, widths=(128, P))
    entries = encode(*arrays[2])
    held = Pages(*decode_entries(entries, P))
    entries = np.where(np.isnan(np.float32(arrays[2].c)[..., :1]), np.uint8(255), entries)
    for implementation in ("chunked", "reference"):
        found = results(*arrays[:2], Fp8Pages(entries), *arrays[3:], implementation=implementation)
        expected = results(*arrays[:2], held, *arrays[3:], implementation=implementation)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_no_array_has_the_whole_cache():
    def largest(jaxpr) -> int:
        inner = [getattr(x, "jaxpr", x) for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()))]
        own = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        return max([*own, *(largest(x) for x in inner if hasattr(x, "eqns"))], default=0)

    arrays = inputs(jnp.float32)
    whole, parts = (
        largest(jax.make_jaxpr(functools.partial(decode, implementation=name, scale=1.0))(*arrays).jaxpr)
        for name in ("reference", "chunked")
    )
    assert whole >= B * MOST * PAGE * C and parts <= B * chunked.PAGES * PAGE * C


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: jnp.zeros((B, T, H))}, "expected queries"),
        ({3: jnp.zeros((B + 1, MOST), jnp.int32)}, "expected a table"),
        ({4: jnp.zeros(B)}, "expected integers"),
        ({2: Pages(jnp.zeros((3, PAGE, C + 1)), jnp.zeros((3, PAGE, P)))}, r"widths \(8, 4\)"),
        ({2: Pages(jnp.zeros((3, 32, C)), jnp.zeros((3, 32, P)))}, r"\[pages, 64, width\]"),
        ({0: jnp.zeros((B, T, H, C), jnp.bfloat16)}, "one floating-point dtype"),
        ({"implementation": "fast"}, "Choose one of reference, chunked"),
        ({"n_splits": 0}, "expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    options = {"implementation": "chunked", "scale": 1.0} | {k: v for k, v in change.items() if isinstance(k, str)}
    with pytest.raises(ValueError, match=message):
        decode(*(change.get(i, x) for i, x in enumerate(inputs(jnp.float32))), **options)
