"""Attention and latent decode for TPUs: the kernels interpreted on a CPU against the definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mla_attention, mosaic_tpu
from pallas_kernels.mla_attention import tpu_backward, tpu_forward, tpu_pairs
from pallas_kernels.mla_decode import Fp8Pages, Pages, decode
from pallas_kernels.mla_decode import tpu as decode_tpu

pytestmark = pytest.mark.slow  # a kernel takes a second or more to interpret
SCALE = 0.1
CASES = {  # (B, T, S, H, Z), first query, documents, dtype
    "packed documents, two heads per key": ((2, 200, 200, 2, 1), 0, True, jnp.bfloat16),
    "the end of a prompt, an offset known later": ((1, 130, 300, 1, 1), jnp.int32(170), False, jnp.float32),
    "queries that see nothing": ((1, 200, 150, 1, 1), -140, False, jnp.float32),
}


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as on a TPU, in tiles of 128."""
    monkeypatch.setattr(mosaic_tpu, "check_tpu", lambda name: False)
    for module, name in ((tpu_forward, "forward"), (tpu_backward, "backward")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), most=(128, 128)))
    with pltpu.force_tpu_interpret_mode():
        yield


def inputs(case) -> tuple:
    """[q, k, v], documents; those of the queries ascend, but for one query that sees nothing."""
    (b, t, s, h, z), offset, documents, dtype = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [
        jax.device_put(np.asarray(rng.normal(size=shape), dtype))
        for shape in ((b, t, h, 192), (b, s, z, 192), (b, s, z, 128))
    ]
    if not documents:
        return arrays, None, offset
    ids = np.sort(rng.integers(0, 4, (b, s)), axis=1)
    of_queries = ids.copy()
    of_queries[:, t // 2] = 7
    return arrays, (jnp.asarray(of_queries), jnp.asarray(ids)), offset


@functools.partial(jax.jit, static_argnames="implementation")
def results(arrays, segments, offset, implementation) -> list:
    """[o, lse, dq, dk, dv] of a sum over both results."""

    def loss(q, k, v):
        options = {"scale": SCALE, "segments": segments, "q_offset": offset, "implementation": implementation}
        o, lse = mla_attention.attention(q, k, v, **options)
        waves = (jnp.sin(jnp.arange(1, x.size + 1)).reshape(x.shape).astype(x.dtype) for x in (o, lse))
        parts = zip(waves, (o, jnp.where(lse > -jnp.inf, lse, 0)), strict=True)
        return sum(jnp.sum((wave * x).astype(lse.dtype)) for wave, x in parts), (o, lse)

    gradients, found = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return [*found, *gradients]


def relative(found, expected) -> float:
    found, expected = (np.where(np.isinf(x), -1e3, x).astype(np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@functools.cache
def expected(case) -> list:
    arrays, segments, offset = inputs(case)
    with jax.enable_x64(True):
        return results([x.astype(jnp.float64) for x in arrays], segments, offset, "reference")


def assert_expected(found, case) -> None:
    bounds = (3e-3, 1e-5, *(1e-2,) * 3) if CASES[case][3] == jnp.bfloat16 else (3e-6,) * 5
    for one, right, bound in zip(found, expected(case), bounds, strict=True):
        assert relative(one, right) <= bound


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_are_the_definition(case, interpreted):
    assert_expected(results(*inputs(case), "mosaic_tpu"), case)


def test_sequences_whose_lists_are_too_long_follow_one_another(interpreted, monkeypatch):
    case = "packed documents, two heads per key"
    monkeypatch.setattr(tpu_pairs, "MOST_PAIRS", 5)  # one has up to 3, and one for each of 2 tiles
    arrays, segments, offset = inputs(case)
    found = tpu_forward.forward(*arrays, segments, offset, scale=SCALE)
    assert_expected((*found, *expected(case)[2:]), case)
    monkeypatch.setattr(tpu_pairs, "MOST_PAIRS", 4)
    with pytest.raises(ValueError, match="200 queries and 200 keys: up to 5 pairs of tiles, expected at most 4"):
        tpu_forward.forward(*arrays, segments, offset, scale=SCALE)


@pytest.mark.parametrize(("t", "s", "offset"), [(300, 700, 350), (400, 300, -200), (100, 100, -500)])
def test_no_pair_is_left_out_or_visited_twice(t, s, offset):
    """Both ways round; with two sequences in the list where documents differ."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 5, (2, max(t, s))), axis=1)
    for segments in (None, (jnp.asarray(ids[:, :t]), jnp.asarray(ids[:, :s]))):
        seen = (np.arange(t)[:, None] + offset >= np.arange(s))[None]
        if segments is not None:
            seen = seen & (ids[:, :t, None] == ids[:, None, :s])
        for of_keys in (False, True):
            plan = tpu_pairs.Plan(2, t, s, 1, 1, SCALE, segments is not None, of_keys, (128, 256))
            lists = jax.jit(plan.lists, static_argnums=1)(segments, offset)
            n = int(lists.n_pairs)
            assert n <= len(lists.tile_V) == plan.most_pairs(offset)
            pairs = list(zip(*(np.asarray(x)[:n].tolist() for x in lists[:2]), strict=True))
            assert pairs == sorted(set(pairs)) and {i for i, _ in pairs} == set(range(len(seen) * plan.counts[0]))
            own, other = plan.tiles[::-1] if of_keys else plan.tiles
            b, i, j = np.nonzero(seen)
            mine, theirs = (j, i) if of_keys else (i, j)
            visible = np.unique(np.stack([b * plan.counts[0] + mine // own, theirs // other]), axis=1)
            assert set(map(tuple, visible.T.tolist())) <= set(pairs)


LENGTHS = [150, 0, 1, 129]


def paged(dtype, t, h, widths=(128, 64)) -> tuple:
    """Queries and a cache whose pages lie anywhere, with NaN behind the ends; the empty sequence has no page at all."""
    rng = np.random.default_rng(0)
    b, most = len(LENGTHS), 4
    queries = [jax.device_put(np.asarray(rng.normal(size=(b, t, h, width)), dtype)) for width in widths]
    table = rng.permutation(b * most).reshape(b, most)
    held = np.zeros((b * most, 64), bool)
    for pages, length in zip(table, LENGTHS, strict=True):
        held[pages] = np.arange(most * 64).reshape(most, 64) < length
        pages[-(-length // 64) :] = 10**6
    pools = [np.where(held[..., None], rng.normal(size=(b * most, 64, width)), np.nan) for width in widths]
    pages = Pages(*(jnp.asarray(pool, dtype) for pool in pools))
    return *queries, pages, jnp.asarray(table, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "t", "h", "options"),
    [
        (jnp.bfloat16, 1, 3, {"pages": 2}),
        (jnp.float32, 4, 4, {"pages": 1, "n_splits": 2}),
    ],
)
def test_decode_is_the_definition(dtype, t, h, options):
    """Lengths 0 and 1; the last tokens of a sequence in different steps; parts of unequal length."""
    arrays = paged(dtype, t, h)
    call = functools.partial(decode_tpu.decode, scale=SCALE, interpret=pltpu.InterpretParams(), **options)
    o, lse = jax.jit(call)(*arrays)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, arrays)
        right, lse_right = decode(*wide, implementation="reference", scale=SCALE)
    assert relative(o, right) <= (3e-3 if dtype == jnp.bfloat16 else 1e-6)
    np.testing.assert_allclose(lse, lse_right, rtol=1e-5, atol=1e-5)


def test_steps_of_parts_are_every_page_once():
    plan = decode_tpu.Plan(b=4, t=1, h=1, most=4, n_splits=2, pages=1, scale=1.0)
    items = decode_tpu.work.items(jnp.asarray(LENGTHS), 2, longest_first=False)
    item_V, page_V, n_steps = jax.jit(plan.steps)(items)
    for part in range(2):
        steps = slice(part * plan.most_steps, part * plan.most_steps + int(n_steps))
        visited = list(zip(item_V[steps].tolist(), page_V[steps].tolist(), strict=True))
        rows = np.asarray(items)[4 * part : 4 * part + 4]
        expected = [(n, page) for _, begin, end, _, n in rows for page in range(begin, max(end, begin + 1))]
        assert visited[: len(expected)] == expected
        assert all(n == rows[-1, 4] and page >= rows[-1, 2] for n, page in visited[len(expected) :])


def attention_of(dtype, *widths):
    q, k, v = (jnp.zeros((1, 8, 1, width), dtype) for width in (widths[0], *widths))
    return mla_attention.attention(q, k, v, implementation="mosaic_tpu", scale=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_of(jnp.float16, 64, 64), "float16, expected bfloat16 or float32"),
        (lambda: attention_of(jnp.bfloat16, 192, 96), "are 192 wide, values 96; expected multiples of 64 up to 256"),
        (lambda: attention_of(jnp.bfloat16, 64, 64), "needs a TPU"),
        (lambda: decode_of(paged(jnp.float16, 1, 1)), "queries float16, cache"),
        (lambda: decode_of(paged(jnp.bfloat16, 1, 1, (192, 64))), "latents of 192 numbers"),
        (lambda: decode_of(paged(jnp.bfloat16, 5, 1)), "5 tokens per sequence with 1 heads"),
        (lambda: decode_of(paged(jnp.bfloat16, 4, 129)), "4 tokens per sequence with 129 heads; expected up to 4"),
        (lambda: decode_of(paged(jnp.bfloat16, 1, 1), pages=10**5), "a table of 4 x 100000 pages makes"),
        (lambda: decode_of(paged(jnp.bfloat16, 1, 1), entries=396), r"cache \['uint8'\]; expected"),
        (lambda: decode_of(paged(jnp.bfloat16, 1, 1)), "needs a TPU"),
    ],
)
def test_what_the_kernels_do_not_take_is_reported(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def decode_of(arrays, pages=None, entries=None):
    q, rope, cache, table, lengths = arrays
    cache = cache if entries is None else Fp8Pages(jnp.zeros((4, 64, 128 + 4 + 2 * 64), jnp.uint8))
    table = table if pages is None else jnp.zeros((len(lengths), pages), jnp.int32)
    return decode(q, rope, cache, table, lengths, implementation="mosaic_tpu", scale=1.0)


def test_chips_of_two_cores_divide_sequences(monkeypatch):
    found = []
    monkeypatch.setattr(mosaic_tpu, "check_tpu", lambda name: False)
    monkeypatch.setattr(decode_tpu, "decode", lambda *_, n_splits, **__: found.append(n_splits))
    for kinds in ((), (jax.devices()[0].device_kind,)):
        monkeypatch.setattr(mosaic_tpu, "TWO_CORES", kinds)
        decode_of(paged(jnp.bfloat16, 1, 1))
    assert found == [1, 2]
