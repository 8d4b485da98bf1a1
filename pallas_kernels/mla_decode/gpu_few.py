"""Decode over a paged latent cache for Hopper where few heads read it: 16 rows, heads times tokens.

    S_j = K_j Q^T        P_j = exp2(scale log2(e) S_j - m_j)        O = O exp2(m_(j-1) - m_j) + C_j^T P_j

Keys are the 64 rows that the tensor cores multiply at a time, so that nothing is filled up: `gpu.py` would fill 16 rows
up to 64. A CTA of one warpgroup reads a part of a sequence's pages, one after the other. Where parts are short, two
CTAs share a processor, and while one waits for its page the other computes; where they are long, one CTA has the next
page loaded while it computes. A second kernel puts the parts together, a CTA for each 64 columns of the latents.

What bounds it: the memory. A page of V3's widths is 72 KB, which a processor's share of an H200's 4.3 TB/s brings in
2.3 us; its products and exponentials take about half of that.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode.gpu_plan import CHUNK, PAGE

LOG2_E = math.log2(math.e)
NOTHING = -1e30  # the largest score of a row that sees no key; finite: the exponential of -inf is then 0
IN_REGISTERS = 512  # parts times rows that are read at once when parts are put together


class Refs(NamedTuple):
    """Global memory, a CTA's shared memory, and its barrier."""

    q_c: Any
    q_rope: Any
    c: Any
    rope: Any
    table: Any
    lengths: Any
    o: Any
    top: Any
    total: Any
    queries: Any
    keys: Any
    weights: Any
    queries_loaded: Any
    loaded: Any  # per stage


class Part(NamedTuple):
    """A CTA's work: some pages of a sequence."""

    at: tuple  # sequence, number of the part
    begin: jax.Array  # page
    end: jax.Array  # page after the last
    length: jax.Array  # tokens of the sequence


def decode(
    q_c: jax.Array,
    q_rope: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    lengths: jax.Array,
    *,
    n_heads: int,
    n_parts: int,
    n_stages: int,
    scale: float,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, R, C] in the dtype of q, lse [B, R]).

    Args:
        q_c, q_rope: queries [B, R, C] and [B, R, P]; row t * H + h is head h of token t.
        cache: [pages, 64, C] and [pages, 64, P] in the dtype of q.
        table: pages of each sequence, int32 [B, most].
        lengths: tokens of each sequence, int32 [B].
        n_heads: H.
        n_parts: in which each sequence's pages are read.
        n_stages: pages that fit into a CTA's shared memory; with two of them a processor holds one CTA.
        scale: of the scores.
        interpret: runs the kernel on a CPU (JAX 0.11 and later).
    """
    sizes = {"n_heads": n_heads, "n_parts": n_parts, "n_stages": n_stages}
    found = parts(q_c, q_rope, cache, table, lengths, **sizes, scale=scale, interpret=interpret)
    return combined(*found, dtype=q_c.dtype, interpret=interpret)


def parts(
    q_c: jax.Array,
    q_rope: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    lengths: jax.Array,
    *,
    n_heads: int,
    n_parts: int,
    n_stages: int,
    scale: float,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns of each part o [B, N, C, R], the largest score and the sum of exponentials [B, N, R]; see `combined`.

    Arguments as for `decode`.
    """
    (b, rows, width), rope = q_c.shape, q_rope.shape[2]
    n_chunks = (width + rope) // CHUNK
    layout = plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)
    call = mosaic_gpu.kernel(
        lambda *refs: _kernel(Refs(*refs), n_heads, n_parts, scale * LOG2_E, not interpret),
        out_type=[
            jax.ShapeDtypeStruct((b, n_parts, width, rows), jnp.float32),
            *[jax.ShapeDtypeStruct((b, n_parts, rows), jnp.float32)] * 2,
        ],
        scratch_types=[
            plgpu.SMEM((n_chunks, rows, CHUNK), q_c.dtype, transforms=layout),
            plgpu.SMEM((n_stages, n_chunks, PAGE, CHUNK), q_c.dtype, transforms=layout),
            plgpu.SMEM((rows, PAGE), q_c.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=n_chunks),
            plgpu.Barrier(num_arrivals=n_chunks, num_barriers=n_stages),
        ],
        grid=(n_parts, b),
        grid_names=("part", "sequence"),
        n_warpgroups=1,
        reduction_scratch_bytes=2048,
        interpret=interpret,
    )
    return call(q_c, q_rope, *cache, table, lengths)


def _kernel(refs: Refs, n_heads: int, n_parts: int, factor: float, on_chip: bool) -> None:
    sequence, number = lax.axis_index("sequence"), lax.axis_index("part")
    length = refs.lengths[sequence]
    n_pages = jnp.minimum(lax.div(length + PAGE - 1, PAGE), refs.table.shape[1])
    begin, end = (lax.div(n_pages * n, n_parts) for n in (number, number + 1))
    part = Part((sequence, number), begin, end, length)
    pl.when(begin < end)(functools.partial(_visit, refs, n_heads, factor, on_chip, part))
    pl.when(begin >= end)(functools.partial(_nothing, refs, part))


def _nothing(refs: Refs, part: Part) -> None:
    """What a part without pages gives."""
    refs.o.at[part.at][...] = jnp.zeros(refs.o.shape[2:], jnp.float32)
    for target, value in ((refs.top, NOTHING), (refs.total, 0)):
        target.at[part.at][...] = _by_row(refs, value)


def _by_row(refs: Refs, value: float) -> jax.Array:
    """A number for each row."""
    return plgpu.layout_cast(jnp.full(refs.top.shape[2:], value, jnp.float32), plgpu.Layout.WGMMA.reduce(0))


def _visit(refs: Refs, n_heads: int, factor: float, on_chip: bool, part: Part) -> None:
    """Scores, their exponentials and the sums of the values of the pages of a part."""
    _load_queries(refs)
    n_stages = refs.keys.shape[0]
    for i in range(n_stages):
        pl.when(part.begin + i < part.end)(functools.partial(_load_page, refs, part, jnp.int32(i)))
    plgpu.barrier_wait(refs.queries_loaded)

    def add(i: jax.Array, state: tuple) -> tuple:
        found = _add_page(refs, n_heads, factor, on_chip, part, i, state)
        plgpu.commit_smem()  # all warps have read the page
        pl.when(part.begin + i + n_stages < part.end)(functools.partial(_load_page, refs, part, i + n_stages))
        return found

    shape = CHUNK, refs.weights.shape[0]
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    state = _by_row(refs, NOTHING), _by_row(refs, 0), (zeros,) * (refs.c.shape[2] // CHUNK)
    top, total, sums = lax.fori_loop(0, part.end - part.begin, add, state)
    refs.top.at[part.at][...] = top
    refs.total.at[part.at][...] = total
    for n, values in enumerate(sums):
        refs.o.at[(*part.at, pl.ds(n * CHUNK, CHUNK))][...] = values


def _add_page(refs: Refs, n_heads: int, factor: float, on_chip: bool, part: Part, i: jax.Array, state: tuple) -> tuple:
    """(largest score, sum of exponentials, sums of values) of the rows after the i-th page of a part."""
    largest, total, sums = state
    stage, n_here, n_rows = lax.rem(i, refs.keys.shape[0]), part.length - (part.begin + i) * PAGE, refs.weights.shape[0]
    keys = refs.keys.at[stage]
    plgpu.barrier_wait(refs.loaded.at[stage])
    scores = pl.run_scoped(functools.partial(_scores, refs, keys), plgpu.ACC((PAGE, n_rows), jnp.float32))
    scores = _hide(scores, n_here, n_heads, n_rows)
    top = jnp.maximum(largest, jnp.max(scores, axis=0) * factor)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(top, scores.shape, [1]))
    mosaic_gpu.transpose(refs.weights)[...] = weights.astype(refs.weights.dtype)
    pl.when(n_here < PAGE)(functools.partial(_clear, refs, keys, n_here))
    plgpu.commit_smem()
    shrink = jnp.exp2(largest - top)
    by_column = lax.broadcast_in_dim(shrink, sums[0].shape, [1])
    add = functools.partial(_add_values, refs, keys, on_chip, tuple(values * by_column for values in sums))
    sums = pl.run_scoped(add, *[plgpu.ACC(sums[0].shape, jnp.float32)] * len(sums))
    return top, total * shrink + jnp.sum(weights, axis=0), sums


def _load_queries(refs: Refs) -> None:
    sequence, first = lax.axis_index("sequence"), 0
    for source in (refs.q_c.at[sequence], refs.q_rope.at[sequence]):
        first = _load_chunks(source, refs.queries, first, refs.queries_loaded)


def _load_page(refs: Refs, part: Part, i: jax.Array) -> None:
    """The i-th page of a part to its stage."""
    page, stage, first = refs.table[part.at[0], part.begin + i], lax.rem(i, refs.keys.shape[0]), 0
    for source in (refs.c.at[page], refs.rope.at[page]):
        first = _load_chunks(source, refs.keys.at[stage], first, refs.loaded.at[stage])


def _load_chunks(source: Any, target: Any, first: int, loaded: Any) -> int:
    """Columns of `source`, chunk by chunk, to `target` from the chunk `first` on; returns the one after the last."""
    n_chunks = source.shape[1] // CHUNK
    for n in range(n_chunks):
        plgpu.copy_gmem_to_smem(source.at[:, pl.ds(n * CHUNK, CHUNK)], target.at[first + n], loaded)
    return first + n_chunks


def _scores(refs: Refs, keys: Any, accumulator: Any) -> jax.Array:
    for n in range(keys.shape[0]):
        plgpu.wgmma(accumulator, keys.at[n], mosaic_gpu.transpose(refs.queries.at[n]))
    return accumulator[...]


def _hide(scores: jax.Array, n_here: jax.Array, n_heads: int, n_rows: int) -> jax.Array:
    """-inf where a row's token does not see a key: of the T last tokens each sees one more than the one before."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    n_tokens = n_rows // n_heads
    seen = iota(dimension=0) < n_here - n_tokens + 1
    for token in range(1, n_tokens):
        seen |= (iota(dimension=0) < n_here - n_tokens + 1 + token) & (iota(dimension=1) >= token * n_heads)
    return jnp.where(seen, scores, -jnp.inf)


def _clear(refs: Refs, keys: Any, n_here: jax.Array) -> None:
    """Zeroes the tokens of the page from `n_here` on, which anything may be: 0 times NaN would not be 0."""

    def clear(n: jax.Array, _: None) -> None:
        values = mosaic_gpu.load(keys.at[n], plgpu.Layout.WGMMA)
        kept = plgpu.broadcasted_iota(jnp.int32, (PAGE, CHUNK), 0, layout=plgpu.Layout.WGMMA) < n_here
        keys.at[n][...] = jnp.where(kept, values, jnp.zeros_like(values))

    lax.fori_loop(0, refs.c.shape[2] // CHUNK, clear, None)  # not unrolled: it is seldom needed


def _add_values(refs: Refs, keys: Any, on_chip: bool, sums: tuple, *accumulators: Any) -> tuple[jax.Array, ...]:
    """O + C^T P of a page, a chunk of the latents at a time."""
    if on_chip:
        for accumulator, values in zip(accumulators, sums, strict=True):
            accumulator[...] = values
    for n, accumulator in enumerate(accumulators):
        plgpu.wgmma(accumulator, mosaic_gpu.transpose(keys.at[n]), mosaic_gpu.transpose(refs.weights))
    plgpu.wgmma_wait(0)
    found = tuple(accumulator[...] for accumulator in accumulators)
    return found if on_chip else tuple(a + b for a, b in zip(found, sums, strict=True))


def combined(
    o: jax.Array, top: jax.Array, total: jax.Array, *, dtype: DTypeLike, interpret: object = None
) -> tuple[jax.Array, jax.Array]:
    """Puts parts [B, N, C, R] together; returns as `decode`.

    `top` is the largest score of each row in a part, times log2(e), and `total` the sum of its exponentials.
    """
    b, _, width, rows = o.shape
    layout = plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)
    call = mosaic_gpu.kernel(
        _combine,
        out_type=[jax.ShapeDtypeStruct((b, rows, width), dtype), jax.ShapeDtypeStruct((b, rows), jnp.float32)],
        scratch_types=[plgpu.SMEM((rows, CHUNK), dtype, transforms=layout)],
        grid=(width // CHUNK, b),
        grid_names=("chunk", "sequence"),
        n_warpgroups=1,
        interpret=interpret,
    )
    return call(o, top, total)


def _combine(o: Any, top: Any, total: Any, together: Any, lse: Any, turned: Any) -> None:
    """A chunk of the latents of all parts, some of which are read at once."""
    at, (n_parts, _, n_rows) = lax.axis_index("sequence"), o.shape[1:]
    columns = pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)
    at_once = max(n for n in range(1, IN_REGISTERS // n_rows + 1) if n_parts % n == 0)
    load_row = functools.partial(mosaic_gpu.load, layout=plgpu.Layout.WGMMA.reduce(0))

    def larger(i: jax.Array, largest: jax.Array) -> jax.Array:
        tops = [load_row(top.at[at, i * at_once + n]) for n in range(at_once)]
        return functools.reduce(jnp.maximum, tops, largest)

    def add(i: jax.Array, sums: tuple) -> tuple:
        summed, values = sums
        for part in (i * at_once + n for n in range(at_once)):
            factor = jnp.exp2(load_row(top.at[at, part]) - largest)
            read = mosaic_gpu.load(o.at[at, part, columns], plgpu.Layout.WGMMA)
            summed += factor * load_row(total.at[at, part])
            values += read * lax.broadcast_in_dim(factor, read.shape, [1])
        return summed, values

    nothing = plgpu.layout_cast(jnp.full((n_rows,), NOTHING, jnp.float32), plgpu.Layout.WGMMA.reduce(0))
    largest = lax.fori_loop(0, n_parts // at_once, larger, nothing)
    zeros = plgpu.layout_cast(jnp.zeros((CHUNK, n_rows), jnp.float32), plgpu.Layout.WGMMA)
    summed, values = lax.fori_loop(0, n_parts // at_once, add, (jnp.zeros_like(largest), zeros))
    some = jnp.where(summed > 0, summed, 1.0)
    values = values * lax.broadcast_in_dim(1 / some, values.shape, [1])
    mosaic_gpu.transpose(turned)[...] = values.astype(turned.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(turned, together.at[at, :, columns])
    lse.at[at][...] = jnp.where(summed > 0, largest / LOG2_E + jnp.log(some), -jnp.inf)
    plgpu.wait_smem_to_gmem(0)
