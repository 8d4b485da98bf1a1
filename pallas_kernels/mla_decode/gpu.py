"""Decode over a paged latent cache for Hopper in Pallas Mosaic GPU.

    S_j = Q K_j^T        P_j = exp2(scale log2(e) S_j - m_j)        O = O exp2(m_(j-1) - m_j) + P_j V_j

A CTA computes 64 rows, heads times tokens, of one sequence, over all of its pages or over one of `n_splits` parts. A
page lies in shared memory once: all of its columns are the keys K_j, those of the latent are the values V_j too. Four
warpgroups pass a page on:

    load     TMA, through the block table, into two slots, part after part, as soon as the values read it last
    score    S_j and P_j; P_j, in 16 bits, and the factor of the earlier sums go to the others by shared memory
    values   two warpgroups, each half of the columns of O: 64 x 256 numbers are 128 registers of a thread

so that the tensor cores multiply S_(j+1) or P_(j-1) V_(j-1) while P_j is computed. Slots are filled in parts, in the
order in which they become free, for there is no space for a third one: Q 72 KB, two slots 144 KB, P 8 KB. CTAs of a
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
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu

ROWS = 64  # of a CTA
PAGE = 64  # tokens
CHUNK = 64  # columns that TMA can swizzle, of 16 bits
SLOTS = 2  # pages in shared memory
AT_START = 128  # registers of a thread: a quarter of the processor's, over 128 threads of a warpgroup
LOG2_E = math.log2(math.e)
NOTHING = -1e30  # the largest score so far of a row that has seen no key; finite: the exponential of -inf is then 0
VALUES, SCORE = 2, 2  # warpgroups 0 and 1 sum values, 2 computes scores, 3 loads


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        cluster: CTAs that load pages together; divides the number of row tiles.
        groups: parts of each half of a latent's columns, loaded and released one by one.
        ahead: pages that are brought into the L2 cache before there is space for them.
        loader_registers: per thread; the warpgroup of the scores keeps its 128, those of the values have the rest.
    """

    cluster: int = 2
    groups: int = 2
    ahead: int = 1
    loader_registers: int = 32

    @property
    def value_registers(self) -> int:
        """Per thread of the two warpgroups that sum values."""
        return (3 * AT_START - self.loader_registers) // (8 * VALUES) * 8


def decode(
    q_c: jax.Array,
    q_rope: jax.Array,
    c_pool: jax.Array,
    rope_pool: jax.Array,
    table: jax.Array,
    items: jax.Array,
    *,
    n_heads: int,
    n_tokens: int,
    n_splits: int,
    scale: float,
    tuning: Tuning,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [n_splits * B, R, C], lse [n_splits * B, R]), each split by itself.

    Args:
        q_c, q_rope: queries [B, R, C] and [B, R, P]; row t * H + h is head h of token t, then rows that fill up a tile.
        c_pool, rope_pool: the cache, [pages, 64, C] and [pages, 64, P].
        table: pages of each sequence, int32 [B, most].
        items: work, int32 [n_splits * B, 5]: sequence, first page, page after the last, length, row of the result.
        n_heads, n_tokens: H and T.
        n_splits: parts of each sequence; o is float32 if there are several, else in the dtype of q.
        scale: of the scores.
        tuning: see `Tuning`.
        interpret: runs the kernel on a CPU (JAX 0.11 and later).
    """
    b, rows, width = q_c.shape
    plan = Plan(b, rows, width, q_rope.shape[2], q_c.dtype, n_heads, n_tokens, n_splits, scale, tuning, not interpret)
    return plan.call(interpret)(q_c, q_rope, c_pool, rope_pool, table, items)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    b: int
    rows: int
    width: int  # C
    rope: int  # P
    dtype: DTypeLike
    h: int
    t: int
    n_splits: int
    scale: float
    tuning: Tuning
    on_chip: bool  # interpreted otherwise: no store to an accumulator

    @property
    def group(self) -> int:
        """Columns of a part."""
        return self.width // (2 * self.tuning.groups)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(warpgroup, group) of the parts of a latent in the order of loading; part 0 of a page is its rotary key."""
        return [(w, g) for g in range(self.tuning.groups) for w in range(VALUES)]

    @property
    def n_parts(self) -> int:
        """Of a page."""
        return 1 + VALUES * self.tuning.groups

    def call(self, interpret: object) -> Callable:
        """The kernel, a function of the arrays of `decode`."""
        n_items, n_tiles = self.n_splits * self.b, self.rows // ROWS
        options: dict[str, Any] = {"interpret": interpret} if interpret else {}
        return plgpu.kernel(
            functools.partial(_kernel, self),
            out_type=[
                jax.ShapeDtypeStruct(
                    (n_items, self.rows, self.width), jnp.float32 if self.n_splits > 1 else self.dtype
                ),
                jax.ShapeDtypeStruct((n_items, self.rows), jnp.float32),
            ],
            scratch_types=self.scratch(),
            grid=(n_tiles // self.tuning.cluster, n_items),
            grid_names=("tiles", "items"),
            cluster=(self.tuning.cluster,),
            cluster_names=("cta",),
            num_threads=VALUES + 2,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=512
            ),
            **options,
        )

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order of `Refs`."""
        layout = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
        chunks, n = (self.width + self.rope) // CHUNK, SLOTS * self.n_parts
        return [
            plgpu.SMEM((chunks, ROWS, CHUNK), self.dtype, transforms=layout),
            plgpu.SMEM((SLOTS, VALUES * self.tuning.groups, PAGE, self.group), self.dtype, transforms=layout),
            plgpu.SMEM((SLOTS, PAGE, self.rope), self.dtype, transforms=layout),
            plgpu.SMEM((ROWS, PAGE), self.dtype, transforms=layout),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=chunks),
            plgpu.Barrier(num_barriers=n),
            plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=1, num_barriers=n),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=VALUES),
        ]


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    q_c: Any
    q_rope: Any
    c_pool: Any
    rope_pool: Any
    table: Any
    items: Any
    o: Any
    lse: Any
    q_chunks: Any
    latents: Any  # per slot and part, in the order of columns
    rope_keys: Any  # per slot
    weights: Any  # P_j
    factors: Any  # of the earlier sums, pages in turn
    q_loaded: Any
    loaded: Any  # per part of a slot
    free: Any  # per part of a slot, from all CTAs of the cluster
    factor_ready: Any  # pages in turn: a factor may be there before the one before it was waited for
    weights_ready: Any
    weights_free: Any


@dataclasses.dataclass(frozen=True)
class Item:
    """A CTA's work: rows of a sequence, and the pages that they look at."""

    row: jax.Array  # first one
    batch: jax.Array
    begin: jax.Array  # page
    end: jax.Array  # page after the last
    length: jax.Array  # tokens of the sequence
    target: jax.Array  # which of the results

    @property
    def n_pages(self) -> jax.Array:
        """To visit."""
        return self.end - self.begin


def _kernel(plan: Plan, *refs: Any) -> None:
    named = Refs(*refs)
    row = (lax.axis_index("tiles") * plan.tuning.cluster + lax.axis_index("cta")) * ROWS
    item = Item(row, *(named.items[lax.axis_index("items"), i] for i in range(5)))
    roles = [functools.partial(role, plan, named, item) for role in (_sum_values, _score, _load)]
    warpgroup = lax.axis_index("warpgroup")
    lax.cond(warpgroup < VALUES, roles[0], lambda: lax.cond(warpgroup == SCORE, *roles[1:]))


def _load(plan: Plan, refs: Refs, item: Item) -> None:
    """The loading warpgroup, of which one warp works."""
    plgpu.set_max_registers(plan.tuning.loader_registers, action="decrease")
    mosaic_gpu.by_one_warp(functools.partial(_load_pages, plan, refs, item))


def _load_pages(plan: Plan, refs: Refs, item: Item) -> None:
    """Queries first, then part after part of each page, as soon as it is free."""
    rows = pl.ds(item.row, ROWS)
    for c in range((plan.width + plan.rope) // CHUNK):
        source, column = (refs.q_c, c * CHUNK) if c < plan.width // CHUNK else (refs.q_rope, c * CHUNK - plan.width)
        part = source.at[item.batch, rows, pl.ds(column, CHUNK)]
        plgpu.copy_gmem_to_smem(part, refs.q_chunks.at[c], refs.q_loaded)
    shared = "cta" if plan.tuning.cluster > 1 else None

    def page_of(i: jax.Array) -> jax.Array:
        return refs.table[item.batch, jnp.minimum(item.begin + i, jnp.maximum(item.end - 1, 0))]

    def load_page(i: jax.Array, pages: tuple) -> tuple:
        slot = lax.rem(i, SLOTS)
        following = page_of(i + plan.tuning.ahead + 1)  # read before it is needed: this takes its time

        def load(part: int, source: Any, target: Any) -> None:
            barrier = slot * plan.n_parts + part
            pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(refs.free.at[barrier]))
            plgpu.copy_gmem_to_smem(source, target, refs.loaded.at[barrier], collective_axes=shared)

        load(0, refs.rope_pool.at[pages[0]], refs.rope_keys.at[slot])
        for n, (w, g) in enumerate(plan.parts):
            part = w * plan.tuning.groups + g
            columns = pl.ds(part * plan.group, plan.group)
            load(1 + n, refs.c_pool.at[pages[0], :, columns], refs.latents.at[slot, part])
            if plan.tuning.ahead:
                plgpu.async_prefetch(refs.c_pool.at[pages[-1], :, columns], collective_axes=shared)
        return *pages[1:], following

    lax.fori_loop(0, item.n_pages, load_page, tuple(page_of(jnp.int32(i)) for i in range(plan.tuning.ahead + 1)))

    # The other CTA of the cluster may still read or signal: leave only when every part has come back.
    def wait(i: jax.Array, _: None) -> None:
        for part in range(plan.n_parts):
            plgpu.barrier_wait(refs.free.at[lax.rem(i, SLOTS) * plan.n_parts + part])

    lax.fori_loop(jnp.maximum(item.n_pages - SLOTS, 0), item.n_pages, wait, None)


def _score(plan: Plan, refs: Refs, item: Item) -> None:
    """The warpgroup that computes scores and their exponentials."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    largest = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), by_row)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
    plgpu.barrier_wait(refs.q_loaded)
    unmasked = lax.div(jnp.maximum(item.length - plan.t + 1, 0), PAGE)  # pages that the first token sees whole
    n_whole = jnp.clip(unmasked - item.begin, 0, item.n_pages)
    step = functools.partial(_score_page, plan, refs, item)
    state = lax.fori_loop(0, n_whole, functools.partial(step, False), (largest, total))
    largest, total = lax.fori_loop(n_whole, item.n_pages, functools.partial(step, True), state)
    pl.when(item.n_pages > 0)(lambda: plgpu.barrier_wait(refs.weights_free))
    refs.factors.at[lax.rem(item.n_pages, 2)][...] = jnp.where(total > 0, 1 / total, 0.0)
    plgpu.barrier_arrive(refs.factor_ready.at[lax.rem(item.n_pages, 2)])
    refs.lse.at[item.target, pl.ds(item.row, ROWS)][...] = largest / LOG2_E + jnp.log(total)


def _score_page(plan: Plan, refs: Refs, item: Item, masked: bool, i: jax.Array, state: tuple) -> tuple:
    """Hands on a page's exponentials; returns (largest, total) of the rows after it."""
    largest, total = state
    slot = lax.rem(i, SLOTS)
    scores = _multiply_scores(plan, refs, slot)
    plgpu.barrier_arrive(refs.free.at[slot * plan.n_parts])
    if masked:
        scores = _hide(plan, item, i, scores)
        beyond = item.length - (item.begin + i) * PAGE
        pl.when(beyond < PAGE)(functools.partial(_clear, plan, refs, slot, beyond))
    factor = plan.scale * LOG2_E
    new = jnp.maximum(largest, jnp.max(scores, axis=1) * factor)
    shrink = jnp.exp2(largest - new)
    refs.factors.at[lax.rem(i, 2)][...] = shrink
    plgpu.barrier_arrive(refs.factor_ready.at[lax.rem(i, 2)])
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
    pl.when(i > 0)(lambda: plgpu.barrier_wait(refs.weights_free))
    refs.weights[...] = weights.astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.weights_ready)
    return new, total * shrink + jnp.sum(weights, axis=1)


def _multiply_scores(plan: Plan, refs: Refs, slot: jax.Array) -> jax.Array:
    """S = Q K^T, part after part."""

    def multiply(scores: Any) -> jax.Array:
        plgpu.barrier_wait(refs.loaded.at[slot * plan.n_parts])
        for c in range(plan.rope // CHUNK):
            keys = refs.rope_keys.at[slot, :, pl.ds(c * CHUNK, CHUNK)]
            plgpu.wgmma(scores, refs.q_chunks.at[plan.width // CHUNK + c], mosaic_gpu.transpose(keys))
        for n, (w, g) in enumerate(plan.parts):
            plgpu.barrier_wait(refs.loaded.at[slot * plan.n_parts + 1 + n])
            part = w * plan.tuning.groups + g
            for column in range(0, plan.group, CHUNK):
                keys = refs.latents.at[slot, part, :, pl.ds(column, CHUNK)]
                queries = refs.q_chunks.at[(part * plan.group + column) // CHUNK]
                plgpu.wgmma(scores, queries, mosaic_gpu.transpose(keys))
        return scores[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, PAGE), jnp.float32))


def _hide(plan: Plan, item: Item, i: jax.Array, scores: jax.Array) -> jax.Array:
    """-inf where a row's token does not see a key: of the T last tokens each sees one more than the one before."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, PAGE), layout=plgpu.Layout.WGMMA)
    key = iota(dimension=1) + (item.begin + i) * PAGE
    seen = key < item.length - plan.t + 1
    for token in range(1, plan.t):
        seen |= (key < item.length - plan.t + 1 + token) & (iota(dimension=0) + item.row >= token * plan.h)
    return jnp.where(seen, scores, -jnp.inf)


def _clear(plan: Plan, refs: Refs, slot: jax.Array, n_tokens: jax.Array) -> None:
    """Zeroes the tokens of a slot from `n_tokens` on, which anything may be: 0 times NaN would not be 0."""
    for column in range(0, plan.width, CHUNK):
        part, begin = divmod(column, plan.group)
        chunk = refs.latents.at[slot, part, :, pl.ds(begin, CHUNK)]
        values = mosaic_gpu.load(chunk, plgpu.Layout.WGMMA)
        kept = plgpu.broadcasted_iota(jnp.int32, (PAGE, CHUNK), 0, layout=plgpu.Layout.WGMMA) < n_tokens
        chunk[...] = jnp.where(kept, values, jnp.zeros_like(values))


def _sum_values(plan: Plan, refs: Refs, item: Item) -> None:
    """A warpgroup that sums values: its half of the columns."""
    plgpu.set_max_registers(plan.tuning.value_registers, action="increase")
    shape = ROWS, plan.group
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    sums = lax.fori_loop(0, item.n_pages, functools.partial(_add_page, plan, refs), (zeros,) * plan.tuning.groups)
    sums = _scaled(refs, sums, item.n_pages)
    first = lax.axis_index("warpgroup") * plan.tuning.groups
    for g, part in enumerate(sums):
        columns = pl.ds((first + g) * plan.group, plan.group)
        target = refs.o.at[item.target, pl.ds(item.row, ROWS), columns]
        target[...] = part.astype(refs.o.dtype)


def _scaled(refs: Refs, sums: tuple, i: jax.Array) -> tuple:
    """The sums times the i-th factor of their rows, as soon as it is known."""
    plgpu.barrier_wait(refs.factor_ready.at[lax.rem(i, 2)])
    factor = mosaic_gpu.load(refs.factors.at[lax.rem(i, 2)], plgpu.Layout.WGMMA.reduce(1))
    return tuple(part * lax.broadcast_in_dim(factor, part.shape, [0]) for part in sums)


def _add_page(plan: Plan, refs: Refs, i: jax.Array, sums: tuple) -> tuple:
    """O = O factor + P V."""
    w, groups, slot = lax.axis_index("warpgroup"), plan.tuning.groups, lax.rem(i, SLOTS)
    sums = _scaled(refs, sums, i)
    plgpu.barrier_wait(refs.weights_ready)
    barriers = [slot * plan.n_parts + 1 + g * VALUES + w for g in range(groups)]
    for barrier in barriers:
        plgpu.barrier_wait(refs.loaded.at[barrier])
    values = [refs.latents.at[slot, w * groups + g] for g in range(groups)]

    def multiply(*accumulators: Any) -> tuple:
        if plan.on_chip:
            for accumulator, part in zip(accumulators, sums, strict=True):
                accumulator[...] = part
        for accumulator, value in zip(accumulators, values, strict=True):
            plgpu.wgmma(accumulator, refs.weights, value)
        found = []
        for g, accumulator in enumerate(accumulators):
            found.append(plgpu.wgmma_accumulator_load(accumulator, wait_n=groups - 1 - g if plan.on_chip else 0))
            plgpu.barrier_arrive(refs.free.at[barriers[g]])
        plgpu.barrier_arrive(refs.weights_free)
        return tuple(found) if plan.on_chip else tuple(a + b for a, b in zip(found, sums, strict=True))

    return pl.run_scoped(multiply, *[plgpu.ACC((ROWS, plan.group), jnp.float32)] * groups)
