"""The warpgroup of the decode kernel for Hopper that loads pages: by TMA, or out of an FP8 cache by way of registers.

An FP8 cache comes as three views of the same bytes, each entry its last axis: codes, numbers of 4 bytes, of which the
scales are some, and numbers of 2 bytes, of which the rotary key is the last. A thread reads 8 codes in a row at a time;
they are multiplied by their scales and written to shared memory in 16 bits.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode.fp8_cache import BLOCK
from pallas_kernels.mla_decode.gpu_plan import AT_START, CHUNK, ROWS, Item, Plan, Refs, Ring

# Of a chunk of codes: a thread has 8 in a row, a warp 4 rows of 64.
CODES = plgpu.Layout.TILED(
    fragmented_array.Tiling(((64, 64), (16, 64), (4, 64), (8,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
PREFETCHED = 128  # bytes of entries that are brought into the L2 cache at once


def load(plan: Plan, refs: Refs, item: Item) -> None:
    """The loading warpgroup, of which one warp works unless it converts numbers."""
    mosaic_gpu.set_registers(plan.tuning.loader_registers, AT_START)
    if plan.in_fp8:
        _load_pages(plan, refs, item)
    else:
        mosaic_gpu.by_one_warp(functools.partial(_load_pages, plan, refs, item))


def queries(plan: Plan, refs: Refs, item: Item, n: int) -> Any:
    """The n-th chunk of queries in global memory, in the order in which they are multiplied."""
    columns = [
        (plan.width if first is None else first) + column
        for _, _, first in plan.parts
        for column in range(0, plan.rope if first is None else plan.group, CHUNK)
    ]
    source, column = (refs.q_c, columns[n]) if columns[n] < plan.width else (refs.q_rope, columns[n] - plan.width)
    return source.at[item.batch, pl.ds(item.row, ROWS), pl.ds(column, CHUNK)]


def _load_pages(plan: Plan, refs: Refs, item: Item) -> None:
    """Queries first, then part after part of each page, as soon as it is free."""
    for c in range(refs.q_chunks.shape[0]):
        plgpu.copy_gmem_to_smem(queries(plan, refs, item, plan.n_held + c), refs.q_chunks.at[c], refs.q_loaded)

    def page_of(i: jax.Array) -> jax.Array:
        return refs.table[item.batch, jnp.minimum(item.begin + i, jnp.maximum(item.end - 1, 0))]

    def load_page(i: jax.Array, pages: tuple) -> tuple:
        following = page_of(i + plan.tuning.ahead + 1)  # read before it is needed: this takes its time
        if plan.in_fp8:
            _prefetch_entries(refs, pages[-1])
        if plan.in_fp8:
            _convert_page(plan, refs, i, pages[0])
        else:
            for r, lane, column in plan.parts:
                _copy(plan, refs, refs.rings[r], i, lane, column, pages)
        return *pages[1:], following

    lax.fori_loop(0, item.n_pages, load_page, tuple(page_of(jnp.int32(i)) for i in range(plan.tuning.ahead + 1)))

    wait_for_all(refs, item)  # the other CTA of the cluster may still read or signal


def wait_for_all(refs: Refs, item: Item) -> None:
    """Waits until every part has come back."""

    def wait(ring: Ring, i: jax.Array, _: None) -> None:
        for lane in range(ring.lanes):
            plgpu.barrier_wait(ring.free.at[ring.place(i, lane)])

    for ring in refs.rings:
        first = jnp.maximum(item.n_pages - ring.copies, 0)
        lax.fori_loop(first, item.n_pages, functools.partial(wait, ring), None)


def _copy(
    plan: Plan, refs: Refs, ring: Ring, i: jax.Array, lane: int, column: int | None, pages: tuple
) -> None:  # fmt: skip
    """A part of a page, to where the page lies; the same part of a later page, to the L2 cache."""
    place, shared = ring.place(i, lane), "cta" if plan.tuning.cluster > 1 else None

    def part(page: jax.Array) -> Any:
        c_pool, rope_pool = refs.cache
        return rope_pool.at[page] if column is None else c_pool.at[page, :, pl.ds(column, plan.group)]

    pl.when(i >= ring.copies)(lambda: plgpu.barrier_wait(ring.free.at[place]))
    plgpu.copy_gmem_to_smem(part(pages[0]), ring.data.at[place], ring.loaded.at[place], collective_axes=shared)
    if plan.tuning.ahead and column is not None:
        plgpu.async_prefetch(part(pages[-1]), collective_axes=shared)


def _convert_page(plan: Plan, refs: Refs, i: jax.Array, page: jax.Array) -> None:
    """A page of entries, in 16 bits to where it lies, part after part; each is read while the one before is written."""

    def read(column: int | None) -> list:
        columns = range(0, plan.rope, CHUNK) if column is None else range(column, column + plan.group, CHUNK)
        return [(_rope if column is None else _codes)(plan, refs, page, c) for c in columns]

    found = read(plan.parts[0][2])
    for n, (r, lane, _) in enumerate(plan.parts):
        following = read(plan.parts[n + 1][2]) if n + 1 < len(plan.parts) else []
        _write(plan, refs.rings[r], i, lane, found)
        found = following


def _write(plan: Plan, ring: Ring, i: jax.Array, lane: int, chunks: list) -> None:
    """Chunks of a part, multiplied by their scales, as soon as there is space."""
    place = ring.place(i, lane)
    pl.when(i >= ring.copies)(lambda: plgpu.barrier_wait(ring.free.at[place]))
    for n, (values, scale) in enumerate(chunks):
        if scale is not None:
            wide = values.astype(jnp.float32) * lax.broadcast_in_dim(scale, values.shape, [0])
            values = wide.astype(plan.dtype)
        ring.data.at[place, :, pl.ds(n * CHUNK, CHUNK)][...] = values
    plgpu.commit_smem()
    plgpu.barrier_arrive(ring.loaded.at[place])


def _codes(plan: Plan, refs: Refs, page: jax.Array, column: int) -> tuple[jax.Array, jax.Array]:
    """A chunk of codes and the scales of its tokens."""
    codes, numbers, _ = refs.cache
    scale = numbers.at[page, :, plan.width // 4 + column // BLOCK]
    chunk = mosaic_gpu.load(codes.at[page, :, pl.ds(column, CHUNK)], CODES)
    return chunk, mosaic_gpu.load(scale, CODES.reduce(1))


def _rope(plan: Plan, refs: Refs, page: jax.Array, column: int) -> tuple[jax.Array, None]:
    """A chunk of rotary keys, which have no scales."""
    keys = refs.cache[2]
    first = keys.shape[-1] - plan.rope + column
    return mosaic_gpu.load(keys.at[page, :, pl.ds(first, CHUNK)], CODES), None


def _prefetch_entries(refs: Refs, page: jax.Array) -> None:
    """Brings a page into the L2 cache."""
    codes = refs.cache[0]
    for first in range(0, codes.shape[-1], PREFETCHED):
        plgpu.async_prefetch(codes.at[page, :, pl.ds(first, min(PREFETCHED, codes.shape[-1] - first))])


def views(entries: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the three views of an FP8 cache; copies nothing."""

    def numbers(dtype: DTypeLike) -> jax.Array:
        parts = entries.reshape(*entries.shape[:-1], -1, jnp.dtype(dtype).itemsize)
        return lax.bitcast_convert_type(parts, dtype)

    codes = lax.bitcast_convert_type(entries, jnp.float8_e4m3fn)
    return codes, numbers(jnp.float32), numbers(jnp.bfloat16)
