"""Latent attention over chosen rows for Hopper: `mla_decode`'s kernel with a warpgroup that gathers.

The loading warpgroup reads which rows come next, 64 at a time, and copies them piece by piece (`cp.async`, 16 bytes a
thread; TMA on Hopper gathers nothing) to where the others expect a page: of a latent 128 columns at a time, of 4 rows
per instruction of a warp. It runs at most one page ahead of what is freed: after the parts of page i that had no space
before and the first parts of page i + 1 are on their way, it waits for all of them in their order and passes each on.

What bounds it, V3.2's sizes and 64 heads: 2,176 cycles of the tensor cores per 64 rows, beside 72 KB out of the L2
cache; the two CTAs of a query read the same rows, so that at 567 TFLOP/s L2 gives 4.7 TB/s.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode import gpu_load
from pallas_kernels.mla_decode.gpu_load import CODES
from pallas_kernels.mla_decode.gpu_plan import AT_START, CHUNK, PAGE, Item, Plan, Refs, Ring, Tuning

TUNING = Tuning(cluster=1, ahead=0, score_registers=160)  # the one that loads needs them
ROW_OF = CODES.reduce(1)  # of 64 numbers a thread has those of the rows that it copies


def load(plan: Plan, refs: Refs, item: Item) -> None:
    """The loading warpgroup; all of it works."""
    mosaic_gpu.set_registers(plan.tuning.loader_registers, AT_START)
    for c in range(refs.q_chunks.shape[0]):
        plgpu.copy_gmem_to_smem(gpu_load.queries(plan, refs, item, plan.n_held + c), refs.q_chunks.at[c], refs.q_loaded)
    n_early = plan.tuning.early
    early, late = plan.parts[:n_early], plan.parts[n_early:]
    last = item.n_pages - 1

    def rows_of(i: jax.Array) -> jax.Array:
        page = item.begin + jnp.clip(i, 0, jnp.maximum(last, 0))
        return mosaic_gpu.load(refs.table.at[item.batch, pl.ds(page * PAGE, PAGE)], ROW_OF)

    def turn(i: jax.Array, rows: jax.Array) -> jax.Array:
        following = rows_of(i + 1)
        _gather(plan, refs, late, i, rows)

        def with_next() -> None:
            _gather(plan, refs, early, i + 1, following)
            _pass_on(plan, refs, [(i, late), (i + 1, early)])

        lax.cond(i < last, with_next, lambda: _pass_on(plan, refs, [(i, late)]))
        return following

    rows = rows_of(jnp.int32(0))

    def first() -> None:
        _gather(plan, refs, early, jnp.int32(0), rows)
        _pass_on(plan, refs, [(jnp.int32(0), early)])

    if early:
        pl.when(item.n_pages > 0)(first)
    lax.fori_loop(0, item.n_pages, turn, rows)
    if not plan.on_chip:  # the interpreter complains of barriers that were signalled and not waited for
        gpu_load.wait_for_all(refs, item)


def _gather(plan: Plan, refs: Refs, parts: list, i: jax.Array, rows: jax.Array) -> None:
    """Starts to copy parts of the i-th page, each as soon as there is space."""
    for r, lane, column in parts:
        ring = refs.rings[r]
        place = ring.place(i, lane)
        pl.when(i >= ring.copies)(functools.partial(plgpu.barrier_wait, ring.free.at[place]))
        source, first, width = (refs.cache[1], 0, plan.rope) if column is None else (refs.cache[0], column, plan.group)
        for c in range(0, width, CHUNK):
            _copy_rows(plan, rows, source, first + c, ring, place, c)
        if plan.on_chip:
            _end_of_part()


def _copy_rows(plan: Plan, rows: jax.Array, source: Any, column: int, ring: Ring, place: jax.Array, c: int) -> None:
    target = ring.data.at[place, :, pl.ds(c, CHUNK)]
    if plan.on_chip:
        _copy_on_chip(rows, source, target, column)
        return
    target[...] = source[:, pl.ds(column, CHUNK)][rows]


def _copy_on_chip(rows: jax.Array, source: Any, target: Any, column: int) -> None:
    """64 columns of the rows, 2 bytes each, to a tile in shared memory that is swizzled by 128 bytes."""
    layout = plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)

    @plgpu.inline_mgpu(arg_types=(ROW_OF, plgpu.RefType(), plgpu.RefType(layout)))
    def emit(_: Any, rows: Any, source: Any, target: Any) -> None:
        arith, llvm, ir = mgpu.arith, mgpu.llvm, mgpu.ir
        i32, i64, void = (ir.Type.parse(name) for name in ("i32", "i64", "!llvm.void"))
        n_columns = ir.MemRefType(source.type).shape[1]
        strides, _ = ir.MemRefType(target.type).get_strides_and_offset()

        def const(n: int) -> Any:
            return mgpu.c(n, i32)

        thread = arith.remui(mgpu.thread_idx(), const(128))
        warp, lane = arith.divui(thread, const(32)), arith.remui(thread, const(32))
        row, piece = arith.divui(lane, const(8)), arith.remui(lane, const(8))
        shared = llvm.ptrtoint(i32, mgpu.memref_ptr(target))
        shared = arith.addi(shared, arith.muli(warp, const(4 * strides[0])))
        swizzled = [arith.muli(arith.xori(piece, arith.addi(row, const(n))), const(16)) for n in (0, 4)]
        halves = [arith.addi(shared, arith.addi(arith.muli(row, const(128)), swizzle)) for swizzle in swizzled]
        base = llvm.ptrtoint(i64, mgpu.memref_ptr(source))
        base = arith.addi(base, arith.extui(i64, arith.muli(piece, const(16))))
        for n, number in enumerate(rows.registers.flat):
            number = mgpu.bitcast(number, i32)
            address = arith.addi(base, arith.muli(arith.extui(i64, number), mgpu.c(2 * n_columns, i64)))
            known = n // 2 * strides[0] * 2 + n % 2 * 512
            text = f"cp.async.cg.shared.global.L2::256B [$0+{known}], [$1+{2 * column}], 16;"
            llvm.inline_asm(void, [halves[n % 2], address], text, "r,l", has_side_effects=True)

    emit(rows, source, target)


def _end_of_part() -> None:
    _instruction("cp.async.commit_group;")


def _instruction(text: str) -> None:
    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        mgpu.llvm.inline_asm(mgpu.ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)

    emit()


def _pass_on(plan: Plan, refs: Refs, pages: list) -> None:
    """Waits for the parts that are on their way, in their order, and says of each that it is there."""
    parts = [(i, r, lane) for i, of_page in pages for r, lane, _ in of_page]
    for n, (i, r, lane) in enumerate(parts):
        if plan.on_chip:
            _instruction(f"cp.async.wait_group {len(parts) - 1 - n};")
        plgpu.commit_smem()
        ring = refs.rings[r]
        plgpu.barrier_arrive(ring.loaded.at[ring.place(i, lane)])
