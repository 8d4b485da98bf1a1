"""Decode over a paged latent cache for Hopper where there is little of it: few heads and tokens, few pages.

    S = K Q^T        P = exp2(scale log2(e) S - m)        O = C^T P

A CTA computes all rows, heads times tokens, of one page: keys are the 64 rows that the tensor cores multiply at a
time, so that nothing is filled up, and no CTA waits for another page. A second kernel puts the pages together, a CTA
for each 64 columns of the latents. It is taken for what it was measured with on an H200, 16 rows and up to 32 pages,
and for two tokens of 16 rows each (`work.are_few`); the kernel of `gpu.py`, which reads many pages per CTA, for all
else.
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
IN_REGISTERS = 512  # pages times rows that are read at once when pages are put together


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
    loaded: Any


def decode(
    q_c: jax.Array,
    q_rope: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    lengths: jax.Array,
    *,
    n_heads: int,
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
        scale: of the scores.
        interpret: runs the kernel on a CPU (JAX 0.11 and later).
    """
    parts = pages(q_c, q_rope, cache, table, lengths, n_heads=n_heads, scale=scale, interpret=interpret)
    return combined(*parts, dtype=q_c.dtype, interpret=interpret)


def pages(
    q_c: jax.Array,
    q_rope: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    lengths: jax.Array,
    *,
    n_heads: int,
    scale: float,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns of each page o [B, N, C, R], the largest score and the sum of exponentials [B, N, R]; see `combined`."""
    (b, rows, width), rope, n_pages = q_c.shape, q_rope.shape[2], table.shape[1]
    n_chunks = (width + rope) // CHUNK
    layout = plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)
    call = mosaic_gpu.kernel(
        lambda *refs: _kernel(Refs(*refs), n_heads, scale * LOG2_E),
        out_type=[
            jax.ShapeDtypeStruct((b, n_pages, width, rows), jnp.float32),
            *[jax.ShapeDtypeStruct((b, n_pages, rows), jnp.float32)] * 2,
        ],
        scratch_types=[
            plgpu.SMEM((n_chunks, rows, CHUNK), q_c.dtype, transforms=layout),
            plgpu.SMEM((n_chunks, PAGE, CHUNK), q_c.dtype, transforms=layout),
            plgpu.SMEM((rows, PAGE), q_c.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=2 * n_chunks),
        ],
        grid=(n_pages, b),
        grid_names=("page", "sequence"),
        n_warpgroups=1,
        reduction_scratch_bytes=2048,
        interpret=interpret,
    )
    return call(q_c, q_rope, *cache, table, lengths)


def _kernel(refs: Refs, n_heads: int, factor: float) -> None:
    begin = lax.axis_index("page") * PAGE
    length = refs.lengths[lax.axis_index("sequence")]
    pl.when(begin < length)(functools.partial(_visit, refs, n_heads, factor, begin, length))
    pl.when(begin >= length)(functools.partial(_nothing, refs))


def _nothing(refs: Refs) -> None:
    """What a page without tokens gives; it is not read."""
    at = lax.axis_index("sequence"), lax.axis_index("page")
    refs.o.at[at][...] = jnp.zeros(refs.o.shape[2:], jnp.float32)
    for target, value in ((refs.top, NOTHING), (refs.total, 0)):
        values = jnp.full(target.shape[2:], value, jnp.float32)
        target.at[at][...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(0))


def _visit(refs: Refs, n_heads: int, factor: float, begin: jax.Array, length: jax.Array) -> None:
    """Scores, their exponentials and the sums of the values of a page that has tokens."""
    _load(refs)
    n_here, n_rows = length - begin, refs.weights.shape[0]
    scores = pl.run_scoped(functools.partial(_scores, refs), plgpu.ACC((PAGE, n_rows), jnp.float32))
    scores = _hide(scores, n_here, n_heads, n_rows)
    top = jnp.max(scores, axis=0) * factor
    finite = jnp.maximum(top, NOTHING)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(finite, scores.shape, [1]))
    mosaic_gpu.transpose(refs.weights)[...] = weights.astype(refs.weights.dtype)
    at = lax.axis_index("sequence"), lax.axis_index("page")
    refs.top.at[at][...] = finite
    refs.total.at[at][...] = jnp.sum(weights, axis=0)
    pl.when(n_here < PAGE)(functools.partial(_clear, refs, n_here))
    plgpu.commit_smem()
    _sum_values(refs, at)


def _load(refs: Refs) -> None:
    """Queries and the page, chunks of the latent first."""
    sequence = lax.axis_index("sequence")
    page = refs.table[sequence, lax.axis_index("page")]
    for first, *pairs in (
        (0, (refs.c.at[page], refs.keys), (refs.q_c.at[sequence], refs.queries)),
        (refs.c.shape[2] // CHUNK, (refs.rope.at[page], refs.keys), (refs.q_rope.at[sequence], refs.queries)),
    ):
        for source, target in pairs:
            for n in range(source.shape[1] // CHUNK):
                chunk = source.at[:, pl.ds(n * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(chunk, target.at[first + n], refs.loaded)
    plgpu.barrier_wait(refs.loaded)


def _scores(refs: Refs, accumulator: Any) -> jax.Array:
    for n in range(refs.keys.shape[0]):
        plgpu.wgmma(accumulator, refs.keys.at[n], mosaic_gpu.transpose(refs.queries.at[n]))
    return accumulator[...]


def _hide(scores: jax.Array, n_here: jax.Array, n_heads: int, n_rows: int) -> jax.Array:
    """-inf where a row's token does not see a key: of the T last tokens each sees one more than the one before."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    n_tokens = n_rows // n_heads
    seen = iota(dimension=0) < n_here - n_tokens + 1
    for token in range(1, n_tokens):
        seen |= (iota(dimension=0) < n_here - n_tokens + 1 + token) & (iota(dimension=1) >= token * n_heads)
    return jnp.where(seen, scores, -jnp.inf)


def _clear(refs: Refs, n_here: jax.Array) -> None:
    """Zeroes the tokens of the page from `n_here` on, which anything may be: 0 times NaN would not be 0."""
    for n in range(refs.c.shape[2] // CHUNK):
        values = mosaic_gpu.load(refs.keys.at[n], plgpu.Layout.WGMMA)
        kept = plgpu.broadcasted_iota(jnp.int32, (PAGE, CHUNK), 0, layout=plgpu.Layout.WGMMA) < n_here
        refs.keys.at[n][...] = jnp.where(kept, values, jnp.zeros_like(values))


def _sum_values(refs: Refs, at: tuple) -> None:
    """O = C^T P, a chunk of the latents at a time."""
    n_chunks = refs.c.shape[2] // CHUNK

    def multiply(*sums: Any) -> None:
        for n, total in enumerate(sums):
            plgpu.wgmma(total, mosaic_gpu.transpose(refs.keys.at[n]), mosaic_gpu.transpose(refs.weights))
        plgpu.wgmma_wait(0)
        for n, total in enumerate(sums):
            refs.o.at[(*at, pl.ds(n * CHUNK, CHUNK))][...] = total[...]

    pl.run_scoped(multiply, *[plgpu.ACC((CHUNK, refs.weights.shape[0]), jnp.float32)] * n_chunks)


def combined(
    o: jax.Array, top: jax.Array, total: jax.Array, *, dtype: DTypeLike, interpret: object = None
) -> tuple[jax.Array, jax.Array]:
    """Puts pages [B, N, C, R] together; returns as `decode`.

    `top` is the largest score of each row in a page, times log2(e), and `total` the sum of its exponentials.
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
    """A chunk of the latents of all pages, some of which are read at once."""
    at, (n_pages, _, n_rows) = lax.axis_index("sequence"), o.shape[1:]
    columns = pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)
    at_once = math.gcd(n_pages, IN_REGISTERS // n_rows)
    load_row = functools.partial(mosaic_gpu.load, layout=plgpu.Layout.WGMMA.reduce(0))

    def larger(i: jax.Array, largest: jax.Array) -> jax.Array:
        tops = [load_row(top.at[at, i * at_once + n]) for n in range(at_once)]
        return functools.reduce(jnp.maximum, tops, largest)

    def add(i: jax.Array, sums: tuple) -> tuple:
        summed, values = sums
        for page in (i * at_once + n for n in range(at_once)):
            factor = jnp.exp2(load_row(top.at[at, page]) - largest)
            part = mosaic_gpu.load(o.at[at, page, columns], plgpu.Layout.WGMMA)
            summed += factor * load_row(total.at[at, page])
            values += part * lax.broadcast_in_dim(factor, part.shape, [1])
        return summed, values

    nothing = plgpu.layout_cast(jnp.full((n_rows,), NOTHING, jnp.float32), plgpu.Layout.WGMMA.reduce(0))
    largest = lax.fori_loop(0, n_pages // at_once, larger, nothing)
    zeros = plgpu.layout_cast(jnp.zeros((CHUNK, n_rows), jnp.float32), plgpu.Layout.WGMMA)
    summed, values = lax.fori_loop(0, n_pages // at_once, add, (jnp.zeros_like(largest), zeros))
    some = jnp.where(summed > 0, summed, 1.0)
    values = values * lax.broadcast_in_dim(1 / some, values.shape, [1])
    mosaic_gpu.transpose(turned)[...] = values.astype(turned.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(turned, together.at[at, :, columns])
    lse.at[at][...] = jnp.where(summed > 0, largest / LOG2_E + jnp.log(some), -jnp.inf)
    plgpu.wait_smem_to_gmem(0)
