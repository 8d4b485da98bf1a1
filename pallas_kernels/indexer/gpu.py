"""Logits of a lightning indexer for Hopper in Pallas Mosaic GPU: E4M3 codes at the tensor cores, heads summed.

    I_ts = scale_s sum_h w_th max(q_th . k_s, 0)

Keys are the rows that the tensor cores multiply, 64 at a time; heads of several queries are the 128 columns of a
product, so that a thread has 16 heads of each of them and adds them up by itself: a maximum and a multiply-add per
head, then two exchanges among the four threads of a row. A CTA keeps the heads of its queries in shared memory, their
weights in registers, and walks over the keys; one warp loads (TMA) tiles of keys into a ring that all warpgroups read.

What bounds it, a product of 64 keys by 128 columns, 128 wide: 256 cycles of the tensor cores; of the CUDA cores, 8,192
maxima and as many multiply-adds, 128 a cycle, 128 cycles at least and some 200 with exchanges and stores. They overlap:
a warpgroup sums one product while the tensor cores work on its next one. Logits in float32 are 4 bytes for
2 x 64 x 128 operations: 0.13 ms of 4,096 x 32,768 at 4 TB/s, beside 1.7 ms of products at 1,300 TFLOP/s.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.in_flight import one_after_another

ROWS = 64  # keys of a product
COLUMNS = 128  # of a product: heads of several queries
WIDTH = 128  # of heads and keys
REGISTERS = 65536  # of a processor
UNSEEN = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        warpgroups: that compute, each with 128 / H queries of its own.
        keys: of a tile, a multiple of 64.
        stages: tiles in shared memory.
        in_flight: products of a warpgroup at the tensor cores, 1 or 2.
        loader_registers: per thread of the loading warpgroup.
    """

    warpgroups: int = 4
    keys: int = 128
    stages: int = 5
    in_flight: int = 1
    loader_registers: int = 24

    @property
    def registers(self) -> int:
        """Of a thread that computes: what is left of those that the CTA starts with."""
        at_start = REGISTERS // (128 * (self.warpgroups + 1)) // 8 * 8 * (self.warpgroups + 1)
        return min((at_start - self.loader_registers) // self.warpgroups // 8 * 8, 240)


FEW = Tuning(warpgroups=1, stages=4, in_flight=2)  # for decode: two queries of a sequence


def choose(t: int, h: int) -> Tuning:
    """Returns the tuning for `t` queries of `h` heads."""
    return FEW if t <= COLUMNS // h else Tuning()


def check(codes: jax.Array) -> None:
    """Raises ValueError for numbers of heads that the kernel does not take."""
    h = codes.shape[2]
    if COLUMNS % h or h % 8:
        raise ValueError(
            f"implementation='mosaic_gpu' of indexer: {h} heads; expected a multiple of 8 that divides {COLUMNS}. Use "
            "implementation='reference'."
        )


class Refs(NamedTuple):
    """Global memory, a CTA's shared memory, and its barriers."""

    q: Any
    k: Any
    scale: Any
    weight: Any
    offset: Any
    q_ids: Any
    k_ids: Any
    out: Any
    q_tiles: Any
    k_stages: Any
    scale_stages: Any
    q_loaded: Any
    loaded: Any
    free: Any


def logits(
    q_BTHQ: jax.Array,
    k_BSQ: jax.Array,
    scale_BS: jax.Array,
    weight_BTH: jax.Array,
    q_offset: int | jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    tuning: Tuning | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> jax.Array:
    """Returns I_BTS, float32; arguments as in `pallas_kernels.indexer`, with the scales of q in its weights.

    `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    (b, t, h, width), s = q_BTHQ.shape, k_BSQ.shape[1]
    plan = Plan(b, t, s, h, segments is not None, tuning or choose(t, h), n_processors, not interpret)
    more = plan.n_tiles * plan.queries - t, plan.n_blocks * plan.tuning.keys - s

    def padded(x: jax.Array, extra: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)]) if extra else x

    q = padded(q_BTHQ, more[0]).reshape(b, -1, width)
    weight = padded(weight_BTH, more[0]).astype(jnp.float32).reshape(b, -1)
    ids = () if segments is None else (padded(segments[0], more[0]), padded(segments[1], more[1]))
    offset = jnp.full((1,), q_offset, jnp.int32)
    found = plan.call(interpret)(q, padded(k_BSQ, more[1]), padded(scale_BS, more[1]), weight, offset, *ids)
    return found[:, :t, :s] if any(more) else found


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    b: int
    t: int
    s: int
    h: int
    documents: bool
    tuning: Tuning
    n_processors: int
    on_chip: bool  # interpreted otherwise

    @property
    def per_product(self) -> int:
        """Queries whose heads are the columns of a product."""
        return COLUMNS // self.h

    @property
    def queries(self) -> int:
        """Of a CTA."""
        return self.tuning.warpgroups * self.per_product

    @property
    def n_tiles(self) -> int:
        """Of queries."""
        return -(-self.t // self.queries)

    @property
    def n_blocks(self) -> int:
        """Tiles of keys."""
        return -(-self.s // self.tuning.keys)

    @property
    def n_parts(self) -> int:
        """Parts of the keys, so that all processors work."""
        return max(1, min(self.n_blocks // 2, self.n_processors // (self.n_tiles * self.b)))

    def call(self, interpret: object) -> Callable:
        """The kernel, a function of q, k, scale, weight, offset and, with documents, their ids."""
        tuning = self.tuning
        shape = self.b, self.n_tiles * self.queries, self.n_blocks * tuning.keys
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
            scratch_types=self.scratch(),
            grid=(self.n_parts, self.n_tiles, self.b),
            grid_names=("part", "tile", "batch"),
            n_warpgroups=tuning.warpgroups + 1,
            interpret=interpret,
        )

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order of `Refs`."""
        tuning = self.tuning
        layout = plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(128)
        return [
            plgpu.SMEM((tuning.warpgroups, COLUMNS, WIDTH), jnp.float8_e4m3fn, transforms=layout),
            plgpu.SMEM((tuning.stages, tuning.keys, WIDTH), jnp.float8_e4m3fn, transforms=layout),
            plgpu.SMEM((tuning.stages, tuning.keys), jnp.float32),
            plgpu.Barrier(num_arrivals=tuning.warpgroups),
            plgpu.Barrier(num_arrivals=2, num_barriers=tuning.stages),
            plgpu.Barrier(num_arrivals=tuning.warpgroups, num_barriers=tuning.stages),
        ]


class Work(NamedTuple):
    """Queries of a CTA, and which tiles of keys it visits; no query sees any of those from `seen` to `end`."""

    batch: jax.Array
    query: jax.Array  # the first one
    begin: jax.Array
    seen: jax.Array
    end: jax.Array
    offset: jax.Array  # of the queries among the keys


def _kernel(plan: Plan, *refs: Any) -> None:
    n_inputs = 7 if plan.documents else 5
    ids = refs[5:n_inputs] or (None, None)
    named = Refs(*refs[:5], *ids, *refs[n_inputs:])
    part, keys = lax.axis_index("part"), plan.tuning.keys
    query = (plan.n_tiles - 1 - lax.axis_index("tile")) * plan.queries  # those that see the most keys first
    begin, end = (lax.div(i * plan.n_blocks, plan.n_parts) for i in (part, part + 1))
    offset = named.offset[0]
    last = query + plan.queries + offset  # the key after the last that is seen
    seen = jnp.clip(lax.div(jnp.maximum(last, 0) + keys - 1, keys), begin, end)
    work = Work(lax.axis_index("batch"), query, begin, seen, end, offset)
    lax.cond(
        lax.axis_index("warpgroup") < plan.tuning.warpgroups,
        functools.partial(_compute, plan, named, work),
        functools.partial(_load, plan, named, work),
    )


def _load(plan: Plan, refs: Refs, work: Work) -> None:
    """The loading warpgroup, of which one warp works."""
    if plan.tuning.warpgroups > 1:
        plgpu.set_max_registers(plan.tuning.loader_registers, action="decrease")
    mosaic_gpu.by_one_warp(functools.partial(_load_tiles, plan, refs, work))


def _load_tiles(plan: Plan, refs: Refs, work: Work) -> None:
    """The queries, then tile after tile of the keys, as soon as there is space."""
    stages, keys = plan.tuning.stages, plan.tuning.keys
    for n in range(refs.q_tiles.shape[0]):
        rows = pl.ds(work.query * plan.h + n * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(refs.q.at[work.batch, rows], refs.q_tiles.at[n], refs.q_loaded)

    def load_tile(i: jax.Array, _: None) -> None:
        n = i - work.begin
        stage, at = lax.rem(n, stages), pl.ds(i * keys, keys)
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
        plgpu.copy_gmem_to_smem(refs.k.at[work.batch, at], refs.k_stages.at[stage], refs.loaded.at[stage])
        plgpu.copy_gmem_to_smem(refs.scale.at[work.batch, at], refs.scale_stages.at[stage], refs.loaded.at[stage])

    lax.fori_loop(work.begin, work.seen, load_tile, None)


def _compute(plan: Plan, refs: Refs, work: Work) -> None:
    """A computing warpgroup: the logits of its queries."""
    tuning, w = plan.tuning, lax.axis_index("warpgroup")
    if tuning.warpgroups > 1:
        plgpu.set_max_registers(tuning.registers, action="increase")
    own = work.query + w * plan.per_product
    by_column = plgpu.Layout.WGMMA.reduce(0)
    weight = mosaic_gpu.load(refs.weight.at[work.batch, pl.ds(own * plan.h, COLUMNS)], by_column)
    plgpu.barrier_wait(refs.q_loaded)
    lax.fori_loop(work.begin, work.seen, functools.partial(_visit, plan, refs, work, own, weight), None)
    in_turn = plgpu.Layout.WG_STRIDED((tuning.keys,), 1)
    nothing = plgpu.layout_cast(jnp.full((tuning.keys,), UNSEEN, jnp.float32), in_turn)

    def hide(i: jax.Array, _: None) -> None:
        for n in range(plan.per_product):
            refs.out.at[work.batch, own + n, pl.ds(i * tuning.keys, tuning.keys)][...] = nothing

    lax.fori_loop(work.seen, work.end, hide, None)


def _visit(plan: Plan, refs: Refs, work: Work, own: jax.Array, weight: jax.Array, i: jax.Array, _: None) -> None:
    """The logits of a tile of keys."""
    tuning, w = plan.tuning, lax.axis_index("warpgroup")
    stage = lax.rem(i - work.begin, tuning.stages)
    n_products = tuning.keys // ROWS
    plgpu.barrier_wait(refs.loaded.at[stage])

    def begin(accumulator: Any, n: int) -> None:
        keys = refs.k_stages.at[stage, pl.ds(n * ROWS, ROWS)]
        plgpu.wgmma(accumulator, keys, mosaic_gpu.transpose(refs.q_tiles.at[w]))

    def finish(found: jax.Array, n: int, sums: dict) -> dict:
        r = n * ROWS
        scale = mosaic_gpu.load(refs.scale_stages.at[stage, pl.ds(r, ROWS)], plgpu.Layout.WGMMA.reduce(1))
        if n == n_products - 1:
            plgpu.barrier_arrive(refs.free.at[stage])
        _store(plan, refs, work, own, (i * tuning.keys, r), found, weight, scale)
        return sums

    one_after_another(n_products, tuning.in_flight, (ROWS, COLUMNS), begin, finish, lambda: None, {"": i})


def _store(
    plan: Plan, refs: Refs, work: Work, query: jax.Array, keys: tuple, found: jax.Array, weight: jax.Array,
    scale: jax.Array,
) -> None:  # fmt: skip
    """Sums the heads of a product's queries, each by itself; the first key is a sum, its second number known."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    key = sum(keys)
    at = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row) + key
    weighed = jnp.maximum(found, 0.0) * lax.broadcast_in_dim(weight, found.shape, [1])
    ids = mosaic_gpu.load(refs.k_ids.at[work.batch, pl.ds(key, ROWS)], by_row) if plan.documents else None
    for n in range(plan.per_product):
        row = jnp.sum(weighed[:, n * plan.h : (n + 1) * plan.h], axis=1) * scale
        seen = at <= query + n + work.offset
        if plan.documents:
            seen &= ids == refs.q_ids[work.batch, query + n]
        row = jnp.where(seen, row, UNSEEN)
        if plan.on_chip:
            _write(row, refs.out, work.batch, (query, n), keys)
        else:
            refs.out.at[work.batch, query + n, pl.ds(key, ROWS)][...] = row


def _write(row: jax.Array, out: Any, batch: jax.Array, queries: tuple, keys: tuple) -> None:
    """out[batch, query, key:] = row; the warps of a warpgroup do not wait for each other, as Pallas has them do.

    What is known of query and key is part of the instruction, so that all rows of a tile share an address.
    """
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA.reduce(1), plgpu.RefType(), splat, splat, splat))
    def emit(_: Any, row: Any, out: Any, *numbers: Any) -> None:
        arith, llvm, ir = mgpu.arith, mgpu.llvm, mgpu.ir
        i64, void = (ir.Type.parse(name) for name in ("i64", "!llvm.void"))
        _, n_queries, n_keys = ir.MemRefType(out.type).shape
        batch, query, key = (arith.extsi(i64, number.registers.item()) for number in numbers)
        line = arith.addi(arith.muli(batch, mgpu.c(n_queries, i64)), query)
        first = arith.addi(arith.muli(line, mgpu.c(n_keys, i64)), key)
        indices = [arith.index_cast(i64, index) for (index,) in row.layout.thread_idxs(row.shape)]
        place = arith.muli(arith.addi(first, indices[0]), mgpu.c(4, i64))
        address = arith.addi(llvm.ptrtoint(i64, mgpu.memref_ptr(out)), place)
        llvm.inline_asm(void, [], "bar.warp.sync 0xffffffff;", "", has_side_effects=True)
        for n, value in enumerate(row.registers.flat):  # a thread has every eighth number
            if isinstance(value.type, ir.VectorType):
                value = mgpu.vector.extract(value, dynamic_position=[], static_position=[0])
            known = 4 * (queries[1] * n_keys + keys[1] + 8 * n)
            llvm.inline_asm(void, [address, value], f"st.global.f32 [$0+{known}], $1;", "l,f", has_side_effects=True)

    emit(row, out, batch, queries[0], keys[0])
