"""Decode over a paged latent cache for Hopper in Pallas Mosaic GPU.

    S_j = Q K_j^T        P_j = exp2(scale log2(e) S_j - m_j)        O = O exp2(m_(j-1) - m_j) + P_j V_j

A CTA computes 64 rows, heads times tokens, of one sequence, over all of its pages or over one of `n_splits` parts. A
page lies in shared memory once: all of its columns are the keys K_j, those of the latent are the values V_j too. Four
warpgroups pass a page on:

    load     through the block table, part after part, as soon as the values read it last (`gpu_load`)
    score    S_(j+1), and meanwhile P_j, which go to the others by shared memory, in 16 bits, with the factors of O
    values   two warpgroups, each half of the columns of O: 64 x 256 numbers are 128 registers of a thread

so that the tensor cores multiply S_(j+1) and P_(j-1) V_(j-1) while P_j is computed. Part of the queries lies in
registers; in shared memory there is then space for three pages of those columns, and two of the others. CTAs of a
cluster have the same sequence and other heads, and load each page together.

What bounds it, V3's sizes: 1,152 cycles for S_j and 1,024 for P_j V_j, 64 tokens of 64 rows; for 128 rows, the two CTAs
that share a page, the memory takes about as long for its 72 KB.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode import gpu_load
from pallas_kernels.mla_decode.gpu_plan import (
    AT_START,
    CHUNK,
    PAGE,
    ROWS,
    SCORE,
    VALUES,
    Item,
    Plan,
    Refs,
    Ring,
    Tuning,
)

LOG2_E = math.log2(math.e)
NOTHING = -1e30  # the largest score so far of a row that has seen no key; finite: the exponential of -inf is then 0


def decode(
    q_c: jax.Array,
    q_rope: jax.Array,
    cache: tuple[jax.Array, ...],
    table: jax.Array,
    items: jax.Array,
    *,
    n_heads: int,
    n_tokens: int,
    n_splits: int,
    scale: float,
    tuning: Tuning,
    load: Callable[[Plan, Refs, Item], None] = gpu_load.load,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [n_splits * B, R, C], lse [n_splits * B, R]), each split by itself.

    Args:
        q_c, q_rope: queries [B, R, C] and [B, R, P]; row t * H + h is head h of token t, then rows that fill up a tile.
        cache: [pages, 64, C] and [pages, 64, P] in the dtype of q, or the three views of `gpu_load`.
        table: pages of each sequence, int32 [B, most].
        items: work, int32 [n_splits * B, 5]: sequence, first page, page after the last, length, row of the result.
        n_heads, n_tokens: H and T.
        n_splits: parts of each sequence; o is float32 if there are several, else in the dtype of q.
        scale: of the scores.
        tuning: see `Tuning`.
        load: the program of the warpgroup that loads, which knows what `cache` and `table` are.
        interpret: runs the kernel on a CPU (JAX 0.11 and later).
    """
    b, rows, width = q_c.shape
    sizes = b, rows, width, q_rope.shape[2]
    plan = Plan(
        *sizes, q_c.dtype, n_heads, n_tokens, n_splits, scale, tuning, on_chip=not interpret, in_fp8=len(cache) > 2
    )
    n_tiles = rows // ROWS
    call = mosaic_gpu.kernel(
        functools.partial(_kernel, plan, load),
        out_type=[
            jax.ShapeDtypeStruct((n_splits * b, rows, width), jnp.float32 if n_splits > 1 else q_c.dtype),
            jax.ShapeDtypeStruct((n_splits * b, rows), jnp.float32),
        ],
        scratch_types=plan.scratch(),
        grid=(n_tiles // tuning.cluster, n_splits * b),
        grid_names=("tiles", "items"),
        cluster=(tuning.cluster,),
        cluster_names=("cta",),
        n_warpgroups=VALUES + 2,
        reduction_scratch_bytes=512,
        interpret=interpret,
    )
    return call(q_c, q_rope, *cache, table, items)


def _kernel(plan: Plan, load: Callable[[Plan, Refs, Item], None], q_c: Any, q_rope: Any, *refs: Any) -> None:
    cache, others = refs[: plan.n_views], refs[plan.n_views :]
    n = len(dataclasses.fields(Refs)) - 4
    rings = []
    for first in range(n, len(others), 3):
        data, loaded, free = others[first : first + 3]
        rings.append(Ring(data, loaded, free, VALUES if first + 3 < len(others) else 1))
    fields: list[Any] = [q_c, q_rope, cache, *others[:n], tuple(rings)]
    named = Refs(*fields)
    row = (lax.axis_index("tiles") * plan.tuning.cluster + lax.axis_index("cta")) * ROWS
    item = Item(row, *(named.items[lax.axis_index("items"), i] for i in range(5)))
    roles = [functools.partial(role, plan, named, item) for role in (_sum_values, _score, load)]
    warpgroup = lax.axis_index("warpgroup")
    lax.cond(warpgroup < VALUES, roles[0], lambda: lax.cond(warpgroup == SCORE, *roles[1:]))


def _score(plan: Plan, refs: Refs, item: Item) -> None:
    """The warpgroup that computes scores and their exponentials."""
    mosaic_gpu.set_registers(plan.tuning.score_registers, AT_START)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    largest = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), by_row)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
    held = [mosaic_gpu.load(gpu_load.queries(plan, refs, item, c), plgpu.Layout.WGMMA) for c in range(plan.n_held)]
    plgpu.barrier_wait(refs.q_loaded)
    visit = functools.partial(_score_pages, plan, refs, item, held)
    largest, total = lax.cond(item.n_pages > 0, visit, lambda *state: state, largest, total)
    refs.factors.at[lax.rem(item.n_pages, 2)][...] = jnp.where(total > 0, 1 / total, 0.0)
    plgpu.barrier_arrive(refs.factor_ready.at[lax.rem(item.n_pages, 2)])
    refs.lse.at[item.target, pl.ds(item.row, ROWS)][...] = largest / LOG2_E + jnp.log(total)


def _score_pages(plan: Plan, refs: Refs, item: Item, held: list, largest: jax.Array, total: jax.Array) -> tuple:
    """Scores and exponentials of all pages, of which there is one at least: (largest, total) of the rows."""
    accumulator = plgpu.ACC((ROWS, PAGE), jnp.float32)

    def first(accumulator: Any) -> jax.Array:
        for early in (True, False):
            _multiply_scores(plan, refs, held, jnp.int32(0), accumulator, early)
        return accumulator[...]

    def step(masked: bool, i: jax.Array, state: tuple) -> tuple:
        """The exponentials of page i, while the tensor cores multiply the scores of the next."""

        def both(accumulator: Any) -> tuple:
            multiply = functools.partial(_multiply_scores, plan, refs, held, i + 1, accumulator)
            rows = _weigh(plan, refs, item, masked, i, state, lambda: multiply(early=True))
            multiply(early=False)
            plgpu.barrier_arrive(refs.weights_ready)  # now: the values would take the tensor cores from these products
            return accumulator[...], *rows

        found = pl.run_scoped(both, accumulator)
        release(i + 1)
        return found

    def release(i: jax.Array) -> None:
        plgpu.barrier_arrive(refs.rings[-1].free.at[refs.rings[-1].place(i, 0)])

    state = pl.run_scoped(first, accumulator), largest, total
    release(jnp.int32(0))
    unmasked = lax.div(jnp.maximum(item.length - plan.t + 1, 0), PAGE)  # pages that the first token sees whole
    last = item.n_pages - 1
    n_whole = jnp.clip(unmasked - item.begin, 0, last)
    state = lax.fori_loop(0, n_whole, functools.partial(step, False), state)
    state = lax.fori_loop(n_whole, last, functools.partial(step, True), state)
    beyond = item.length - (item.begin + last) * PAGE
    pl.when(beyond < PAGE)(functools.partial(_clear, plan, refs, last, beyond))
    rows = _weigh(plan, refs, item, True, last, state, lambda: None)
    plgpu.barrier_arrive(refs.weights_ready)
    plgpu.barrier_wait(refs.weights_free)
    return rows


def _weigh(
    plan: Plan, refs: Refs, item: Item, masked: bool, i: jax.Array, state: tuple, meanwhile: Callable[[], None]
) -> tuple:  # fmt: skip
    """The exponentials of page i into shared memory; returns (largest, total) of the rows after it.

    `state`: its scores, then (largest, total) before it. `meanwhile` begins products that run beside the exponentials.
    """
    scores, largest, total = state
    if masked:
        scores = _hide(plan, item, i, scores)
    factor = plan.scale * LOG2_E
    new = jnp.maximum(largest, jnp.max(scores, axis=1) * factor)
    shrink = jnp.exp2(largest - new)
    refs.factors.at[lax.rem(i, 2)][...] = shrink
    plgpu.barrier_arrive(refs.factor_ready.at[lax.rem(i, 2)])
    meanwhile()
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
    pl.when(i > 0)(lambda: plgpu.barrier_wait(refs.weights_free))
    refs.weights[...] = weights.astype(plan.dtype)
    plgpu.commit_smem()
    return new, total * shrink + jnp.sum(weights, axis=1)


def _multiply_scores(plan: Plan, refs: Refs, held: list, i: jax.Array, scores: Any, early: bool) -> None:
    """S = Q K^T of page i, of its early parts or of the others; does not wait for the products.

    All of these parts are waited for first: the compiler mixes products with other instructions only where no wait is
    between them.
    """
    keys, chunks = [], iter(range((plan.width + plan.rope) // CHUNK))
    for n, (r, lane, _) in enumerate(plan.parts):
        ring = refs.rings[r]
        place = ring.place(i, lane)
        columns = [(next(chunks), c) for c in range(0, ring.data.shape[2], CHUNK)]
        if (n < plan.tuning.early) == early:
            plgpu.barrier_wait(ring.loaded.at[place])
            keys += [(chunk, ring.data.at[place, :, pl.ds(c, CHUNK)]) for chunk, c in columns]
    for chunk, part in keys:
        queries = held[chunk] if chunk < plan.n_held else refs.q_chunks.at[chunk - plan.n_held]
        plgpu.wgmma(scores, queries, mosaic_gpu.transpose(part))


def _hide(plan: Plan, item: Item, i: jax.Array, scores: jax.Array) -> jax.Array:
    """-inf where a row's token does not see a key: of the T last tokens each sees one more than the one before."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, PAGE), layout=plgpu.Layout.WGMMA)
    key = iota(dimension=1) + (item.begin + i) * PAGE
    seen = key < item.length - plan.t + 1
    for token in range(1, plan.t):
        seen |= (key < item.length - plan.t + 1 + token) & (iota(dimension=0) + item.row >= token * plan.h)
    return jnp.where(seen, scores, -jnp.inf)


def _clear(plan: Plan, refs: Refs, i: jax.Array, n_tokens: jax.Array) -> None:
    """Zeroes the tokens of page i from `n_tokens` on, which anything may be: 0 times NaN would not be 0."""
    for r, lane, first in plan.parts:
        for column in range(0, 0 if first is None else plan.group, CHUNK):
            ring = refs.rings[r]
            chunk = ring.data.at[ring.place(i, lane), :, pl.ds(column, CHUNK)]
            values = mosaic_gpu.load(chunk, plgpu.Layout.WGMMA)
            kept = plgpu.broadcasted_iota(jnp.int32, (PAGE, CHUNK), 0, layout=plgpu.Layout.WGMMA) < n_tokens
            chunk[...] = jnp.where(kept, values, jnp.zeros_like(values))


def _sum_values(plan: Plan, refs: Refs, item: Item) -> None:
    """A warpgroup that sums values: its half of the columns."""
    mosaic_gpu.set_registers(plan.tuning.value_registers, AT_START)
    groups, half = len(plan.tuning.copies), lax.axis_index("warpgroup")
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, plan.group), jnp.float32), plgpu.Layout.WGMMA)
    add = functools.partial(_add_page, plan, refs, half)
    sums = lax.fori_loop(0, item.n_pages, add, (zeros,) * groups)
    sums = _scaled(_factor(refs, item.n_pages), sums)
    for g, part in enumerate(sums):
        columns = pl.ds((half * groups + g) * plan.group, plan.group)
        target = refs.o.at[item.target, pl.ds(item.row, ROWS), columns]
        target[...] = part.astype(refs.o.dtype)


def _factor(refs: Refs, i: jax.Array) -> jax.Array:
    """The i-th factor of the rows of the sums, as soon as it is known."""
    plgpu.barrier_wait(refs.factor_ready.at[lax.rem(i, 2)])
    return mosaic_gpu.load(refs.factors.at[lax.rem(i, 2)], plgpu.Layout.WGMMA.reduce(1))


def _scaled(factor: jax.Array, sums: tuple) -> tuple:
    return tuple(part * lax.broadcast_in_dim(factor, part.shape, [0]) for part in sums)


def _add_page(plan: Plan, refs: Refs, half: jax.Array, i: jax.Array, sums: tuple) -> tuple:
    """O = O factor + P V, the part first of which the fewest pages fit into shared memory."""
    rings = refs.rings[:-1]
    places = [ring.place(i, half) for ring in rings]
    order = list(reversed(range(len(rings))))
    # A branch, though the first sums are zeros: else the compiler multiplies when products could run already.
    factor = _factor(refs, i)
    sums = lax.cond(i > 0, lambda: _scaled(factor, sums), lambda: sums)
    for g in order:
        plgpu.barrier_wait(rings[g].loaded.at[places[g]])
    plgpu.barrier_wait(refs.weights_ready)

    def multiply(*accumulators: Any) -> tuple:
        if plan.on_chip:
            for accumulator, part in zip(accumulators, sums, strict=True):
                accumulator[...] = part
        for g in order:
            plgpu.wgmma(accumulators[g], refs.weights, rings[g].data.at[places[g]])
        found = {}
        for n, g in enumerate(order):
            found[g] = plgpu.wgmma_accumulator_load(accumulators[g], wait_n=len(rings) - 1 - n if plan.on_chip else 0)
            plgpu.barrier_arrive(rings[g].free.at[places[g]])
        plgpu.barrier_arrive(refs.weights_free)
        after = tuple(found[g] for g in range(len(rings)))
        return after if plan.on_chip else tuple(a + b for a, b in zip(after, sums, strict=True))

    return pl.run_scoped(multiply, *[plgpu.ACC((ROWS, plan.group), jnp.float32)] * len(rings))
