"""Backward pass of causal attention for Hopper in Pallas Mosaic GPU: two kernels, each of which owns what it sums.

    P_ij = exp(s_ij - lse_i)        dP_ij = do_i . v_j        dS_ij = P_ij (dP_ij - delta_i)
    dv_j = sum_i P_ij do_i          dk_j = scale sum_i dS_ij q_i          dq_i = scale sum_j dS_ij k_j

One kernel keeps a tile of keys and values and streams queries and do past it: dk and dv, summed over the query heads
that share a key. The other keeps queries and do and streams keys and values: dq. P and dS are computed in both, so
seven products instead of five, but every sum has one owner and one order: results are the same bits on every run.

A computing warpgroup owns 64 rows of a tile; a warpgroup loads (TMA). The CUDA cores compute beside the tensor cores.
Of keys, where queries are columns and "'" marks the block before:

    start  S = K Q^T - lse / scale,      dk += dS'^T Q'        then P = exp(scale S) as soon as S is there
    start  dP = V dO^T - delta,          dv += P^T dO          then dS = P dP as soon as dP is there

and of queries S, dP and dq += dS' K' together. lse and delta are what the accumulators start from, or a large negative
number where a query does not see a key; so a mask costs nothing while tensor cores work, and no registers.

Registers of a thread, of 240, for 192/128 and blocks of 64: dk 96, dv 64, S or dP 32, the operand in 16 bits 16, and
some 24 for addresses; of queries dq 96, S 32, dP 32, dS 16. Shared memory: 80 KB for what is owned, 40 KB per stage.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_attention import bits, visits
from pallas_kernels.mla_attention.gpu_forward import (
    CHUNK,
    LOG2_E,
    ROWS,
    Warpgroups,
    add_product,
    begin_sum,
    end_sum,
    padded,
    tokens,
    whole_tiles,
)
from pallas_kernels.mla_attention.reference import Segments

UNSEEN = 1e30  # lse of a query that sees no key: its exponentials are 0 then


@dataclasses.dataclass(frozen=True)
class Tuning(Warpgroups):
    """How the work of one of the two kernels is divided.

    Attributes:
        warpgroups: that compute, each 64 rows of what the kernel owns.
        block: rows that are streamed at a time, a multiple of 64.
        stages: blocks in shared memory.
        loader_registers: per thread of the loading warpgroup.
    """

    warpgroups: int = 2
    block: int = 64
    stages: int = 3
    loader_registers: int = 24


def backward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    lse_BHT: jax.Array,
    do_BTHU: jax.Array,
    delta_BHT: jax.Array,
    *,
    scale: float,
    of_keys: bool,
    chosen: jax.Array | None = None,
    tuning: Tuning | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> list[jax.Array]:
    """Returns [dk, dv] if `of_keys`, else [dq]; arguments as in `pallas_kernels.mla_attention.api`.

    `chosen`: bits that say which pairs are visible (`mla_attention.bits`): words of queries for each key [B, W, S] if
    `of_keys`, else words of keys for each query [B, W, T].
    `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    (b, t, h, width), (s, z) = q_BTHQ.shape, k_BSZQ.shape[1:3]
    plan = Plan(
        b, t, s, h, z, width, v_BSZU.shape[3], q_BTHQ.dtype, scale, segments is not None, of_keys, tuning or Tuning(),
        n_processors, not interpret, chosen is not None,
    )  # fmt: skip
    matrices = (whole_tiles(x) for x in (q_BTHQ, do_BTHU.astype(v_BSZU.dtype), k_BSZQ, v_BSZU))
    starts = jnp.where(lse_BHT == -jnp.inf, UNSEEN, lse_BHT / scale)
    numbers = padded(starts, plan.q_tile, UNSEEN), padded(delta_BHT, plan.q_tile, 0.0)
    jobs = plan.jobs(q_offset if isinstance(q_offset, int) else s - t)
    offset = jnp.full((1,), q_offset, jnp.int32)
    ids: tuple = () if segments is None else (padded(segments[0], plan.q_tile), padded(segments[1], plan.k_tile))
    some = None
    if chosen is not None:
        words = bits.in_tiles(chosen, plan.tuning.block, plan.tuning.rows)
        some, ids = bits.some(words, plan.tuning.block, plan.tuning.rows), (words,)
    ranges = plan.ranges(segments, q_offset, some)
    sums = plan.call(interpret)(*matrices, *numbers, jobs, ranges, offset, *ids)
    return [x[:, : s if of_keys else t] for x in sums]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs.

    Attributes:
        t, s: queries and keys.
        h, z: heads of queries and of keys.
        width, v_width: of queries and keys, of values.
        documents: there are several.
        of_keys: keys and values are owned and queries stream past; else the other way round.
        chosen: bits say which pairs are visible.
    """

    b: int
    t: int
    s: int
    h: int
    z: int
    width: int
    v_width: int
    dtype: DTypeLike
    scale: float
    documents: bool
    of_keys: bool
    tuning: Tuning
    n_processors: int
    on_chip: bool  # interpreted otherwise: operands of a product are not in registers
    chosen: bool = False

    @property
    def q_tile(self) -> int:
        """Queries of a tile or of a block."""
        return self.tuning.block if self.of_keys else self.tuning.rows

    @property
    def k_tile(self) -> int:
        """Keys likewise."""
        return self.tuning.rows if self.of_keys else self.tuning.block

    @property
    def groups(self) -> int:
        """Sequences that are divided into tiles: per head."""
        return self.b * (self.z if self.of_keys else self.h)

    @property
    def n_tiles(self) -> int:
        """Of a group."""
        return -(-(self.s if self.of_keys else self.t) // self.tuning.rows)

    @property
    def passes(self) -> int:
        """Heads whose blocks stream past a tile, one after another."""
        return self.h // self.z if self.of_keys else 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the sums."""
        return (self.width, self.v_width) if self.of_keys else (self.width,)

    def ranges(self, segments: Segments | None, q_offset: int | jax.Array, some: jax.Array | None) -> jax.Array:
        """The blocks that stream past each tile, those of `some` pairs if given."""
        if some is not None:
            return visits.visits_of(some)
        find = visits.visits_of_keys if self.of_keys else visits.visits_of_queries
        return find((self.t, self.s), (self.q_tile, self.k_tile), segments, q_offset)

    def jobs(self, q_offset: int) -> jax.Array:
        """Which CTA computes which tiles."""
        begins = range(0, self.n_tiles * self.tuning.rows, self.tuning.rows)
        if self.of_keys:
            rows = [self.passes * min(max(self.t + q_offset - begin, 1), self.t) for begin in begins]
        else:
            rows = [min(max(begin + self.tuning.rows + q_offset, 1), self.s) for begin in begins]
        return visits.jobs([n / self.tuning.block + 2 for n in rows], self.groups, self.n_processors)

    def call(self, interpret: object) -> Callable:
        """The kernel, a function of q, do, k, v, lse, delta, jobs, ranges, offset and, with documents, their ids."""
        rows, heads = (self.s, self.z) if self.of_keys else (self.t, self.h)
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=[jax.ShapeDtypeStruct((self.b, tokens(rows), heads, width), self.dtype) for width in self.widths],
            scratch_types=self.scratch(),
            grid=(min(self.n_processors, self.groups * self.n_tiles),),
            grid_names=("ctas",),
            n_warpgroups=self.tuning.warpgroups + 1,
            interpret=interpret,
        )

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order of `Refs`."""
        tuning, n = self.tuning, self.tuning.warpgroups
        layout = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
        matrix = functools.partial(plgpu.SMEM, dtype=self.dtype, transforms=layout)
        numbers = plgpu.SMEM((tuning.stages, tuning.block), jnp.float32) if self.of_keys else None
        loaded = plgpu.Barrier(num_arrivals=1 + self.of_keys, num_barriers=tuning.stages)
        wide_loaded = plgpu.Barrier(num_arrivals=1 + self.of_keys + self.chosen, num_barriers=tuning.stages)
        words = plgpu.SMEM((tuning.stages, tuning.block // bits.WORD, tuning.rows), jnp.int32)
        free = plgpu.Barrier(num_arrivals=n, num_barriers=tuning.stages)
        return [
            matrix((n, ROWS, self.width)),
            matrix((n, ROWS, self.v_width)),
            matrix((tuning.stages, tuning.block, self.width)),
            matrix((tuning.stages, tuning.block, self.v_width)),
            numbers,
            numbers,
            words if self.chosen else None,
            plgpu.Barrier(num_arrivals=2, num_barriers=n),
            plgpu.Barrier(num_arrivals=1, num_barriers=n),
            wide_loaded,
            loaded,
            free,
            free,
        ]


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers.

    Of what is owned and of what streams there are two matrices: "wide" are queries or keys, "values" are do or v.
    """

    q: Any
    do: Any
    k: Any
    v: Any
    lse: Any
    delta: Any
    jobs: Any
    ranges: Any
    offset: Any
    q_ids: Any
    k_ids: Any
    chosen: Any
    sums: tuple  # what is computed
    own_wide: Any  # per warpgroup
    own_values: Any
    wide: Any  # per stage
    values: Any
    lse_stages: Any  # of queries that stream
    delta_stages: Any
    chosen_stages: Any
    own_loaded: Any  # per warpgroup
    own_free: Any
    wide_loaded: Any  # per stage
    values_loaded: Any
    wide_free: Any  # per stage: all warpgroups are done
    values_free: Any


@dataclasses.dataclass(frozen=True)
class Job:
    """A tile of what is owned, and the blocks that stream past it."""

    batch: jax.Array
    head: jax.Array
    row: jax.Array
    ranges: tuple  # first, whole_from, whole_to, end


def _kernel(plan: Plan, *refs: Any) -> None:
    n_inputs, n_sums = 9 + 2 * plan.documents + plan.chosen, len(plan.widths)
    ids = refs[9:11] if plan.documents else (None, None)
    chosen = refs[n_inputs - 1] if plan.chosen else None
    sums, scratch = refs[n_inputs : n_inputs + n_sums], refs[n_inputs + n_sums :]
    named = Refs(*(*refs[:9], *ids, chosen, sums, *scratch))
    lax.cond(
        lax.axis_index("warpgroup") < plan.tuning.warpgroups,
        functools.partial(_compute, plan, named),
        functools.partial(_load, plan, named),
    )


def _job(plan: Plan, refs: Refs, i: jax.Array) -> Job:
    """This CTA's i-th job."""
    number, heads = refs.jobs[lax.axis_index("ctas"), 1 + i], plan.groups // plan.b
    group, tile = lax.div(number, plan.n_tiles), lax.rem(number, plan.n_tiles)
    batch, head = lax.div(group, heads), lax.rem(group, heads)
    own = batch if plan.documents or plan.chosen else 0
    return Job(batch, head, tile * plan.tuning.rows, tuple(refs.ranges[own, tile, i] for i in range(4)))


def _next(plan: Plan, stage: jax.Array) -> jax.Array:
    return jnp.where(stage == plan.tuning.stages - 1, 0, stage + 1)


def _load(plan: Plan, refs: Refs) -> None:
    """The loading warpgroup, of which one warp works: the others would take issue slots from those that compute."""
    plgpu.set_max_registers(plan.tuning.loader_registers, action="decrease")
    plgpu.warp_map(lambda warp: pl.when(warp == 0)(functools.partial(_load_jobs, plan, refs)))


def _load_jobs(plan: Plan, refs: Refs) -> None:
    """Fills stage after stage, each as soon as it is free."""
    tuning, stages = plan.tuning, plan.tuning.stages
    own = (refs.k, refs.v) if plan.of_keys else (refs.q, refs.do)
    streams = (refs.q, refs.do) if plan.of_keys else (refs.k, refs.v)
    rings = (
        (streams[0], refs.lse, refs.wide, refs.lse_stages, refs.wide_loaded, refs.wide_free),
        (streams[1], refs.delta, refs.values, refs.delta_stages, refs.values_loaded, refs.values_free),
    )

    def load_own(i: jax.Array, job: Job) -> None:
        for w in range(tuning.warpgroups):
            pl.when(i > 0)(functools.partial(plgpu.barrier_wait, refs.own_free.at[w]))
            for source, target in zip(own, (refs.own_wide, refs.own_values), strict=True):
                part = source.at[job.batch, pl.ds(job.row + w * ROWS, ROWS), job.head]
                plgpu.copy_gmem_to_smem(part, target.at[w], refs.own_loaded.at[w])

    def load_job(i: jax.Array, state: tuple) -> tuple:
        job = _job(plan, refs, i)
        load_own(i, job)

        def load_block(head: jax.Array, block: jax.Array, state: tuple) -> tuple:
            stage, n_loaded = state
            rows = pl.ds(block * tuning.block, tuning.block)
            for matrix, numbers, matrix_stages, number_stages, loaded, free in rings:
                pl.when(n_loaded >= stages)(functools.partial(plgpu.barrier_wait, free.at[stage]))
                part = matrix.at[job.batch, rows, head]
                plgpu.copy_gmem_to_smem(part, matrix_stages.at[stage], loaded.at[stage])
                if plan.of_keys:
                    part = numbers.at[job.batch, head, rows]
                    plgpu.copy_gmem_to_smem(part, number_stages.at[stage], loaded.at[stage])
                if plan.chosen and loaded is refs.wide_loaded:
                    n = tuning.block // bits.WORD
                    part = refs.chosen.at[job.batch, pl.ds(block * n, n), pl.ds(job.row, tuning.rows)]
                    plgpu.copy_gmem_to_smem(part, refs.chosen_stages.at[stage], loaded.at[stage])
            return _next(plan, stage), n_loaded + 1

        def load_pass(j: jax.Array, state: tuple) -> tuple:
            head = job.head * plan.passes + j if plan.of_keys else lax.div(job.head, plan.h // plan.z)
            return lax.fori_loop(job.ranges[0], job.ranges[3], functools.partial(load_block, head), state)

        return lax.fori_loop(0, plan.passes, load_pass, state)

    n_mine = refs.jobs[lax.axis_index("ctas"), 0]
    stage, n_loaded = lax.fori_loop(0, n_mine, load_job, (jnp.int32(0), jnp.int32(0)))

    def wait(_, stage: jax.Array) -> jax.Array:  # a barrier is waited for as often as it completes
        plgpu.barrier_wait(refs.wide_free.at[stage])
        plgpu.barrier_wait(refs.values_free.at[stage])
        return _next(plan, stage)

    oldest = jnp.where(n_loaded >= stages, stage, 0)
    lax.fori_loop(0, jnp.minimum(n_loaded, stages), wait, oldest)
    for w in range(tuning.warpgroups):
        plgpu.barrier_wait(refs.own_free.at[w])


def _compute(plan: Plan, refs: Refs) -> None:
    """A computing warpgroup: its rows of each tile."""
    plgpu.set_max_registers(plan.tuning.registers, action="increase")
    n_mine = refs.jobs[lax.axis_index("ctas"), 0]
    lax.fori_loop(0, n_mine, functools.partial(_compute_tile, plan, refs), jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _compute_tile(plan: Plan, refs: Refs, i: jax.Array, stage: jax.Array) -> jax.Array:
    """This warpgroup's rows of the i-th tile; returns the stage after the tile's last."""
    job, w = _job(plan, refs, i), lax.axis_index("warpgroup")
    own = _Own(plan, refs, job, job.row + w * ROWS)
    zeros = [
        plgpu.layout_cast(jnp.zeros((ROWS, n), jnp.float32), plgpu.Layout.WGMMA)
        for n in (*plan.widths, plan.tuning.block)
    ]
    plgpu.barrier_wait(refs.own_loaded.at[w])
    first, whole_from, whole_to, end = job.ranges
    numbers, add = own.numbers(), _of_keys if plan.of_keys else _of_queries

    def step(block: jax.Array, state: tuple) -> tuple:
        before, stage, n_done, sums, slopes = state

        def hide(start: jax.Array) -> jax.Array:
            if plan.chosen:
                return own.keep_chosen(stage, start)
            whole = (block >= whole_from) & (block < whole_to)
            return lax.cond(whole, lambda start: start, functools.partial(own.hide, block), start)

        found = add(plan, refs, (before, stage, n_done), hide, numbers, sums, slopes)
        return stage, _next(plan, stage), n_done + 1, *found

    def stream(_: jax.Array, state: tuple) -> tuple:
        return lax.fori_loop(first, end, step, state)

    # The first product of "before" adds zeros: its operand is the first block itself.
    state = stage, stage, jnp.int32(0), tuple(zeros[:-1]), zeros[-1].astype(plan.dtype)
    state = lax.fori_loop(0, plan.passes, stream, state) if plan.passes > 1 else stream(jnp.int32(0), state)
    before, stage, _, sums, slopes = state
    _store(plan, refs, job, before, sums, slopes)
    return stage


@dataclasses.dataclass(frozen=True)
class _Own:
    """Rows of a warpgroup."""

    plan: Plan
    refs: Refs
    job: Job
    row: jax.Array

    def numbers(self) -> tuple:
        """lse and delta of the rows if they are queries."""
        if self.plan.of_keys:
            return ()
        rows = self.job.batch, self.job.head, pl.ds(self.row, ROWS)
        layout = plgpu.Layout.WGMMA.reduce(1)
        return mosaic_gpu.load(self.refs.lse.at[rows], layout), mosaic_gpu.load(self.refs.delta.at[rows], layout)

    def keep_chosen(self, stage: jax.Array, start: jax.Array) -> jax.Array:
        """-UNSEEN where the bits of a stage are not set."""
        rows, layout = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS), plgpu.Layout.WGMMA.reduce(1)
        n = self.plan.tuning.block // bits.WORD
        words = [mosaic_gpu.load(self.refs.chosen_stages.at[stage, i, rows], layout) for i in range(n)]
        return mosaic_gpu.where_bits(words, start, -UNSEEN, self.plan.on_chip)

    def hide(self, block: jax.Array, start: jax.Array) -> jax.Array:
        """-UNSEEN for keys that a query does not see: where their scores start."""
        plan, refs, batch, shape = self.plan, self.refs, self.job.batch, start.shape
        q_axis, k_axis = (1, 0) if plan.of_keys else (0, 1)
        streamed = block * plan.tuning.block
        q_first, k_first = (streamed, self.row) if plan.of_keys else (self.row, streamed)
        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
        last = iota(dimension=q_axis) + (q_first + refs.offset[0] - k_first)
        if not plan.of_keys:  # sums of keys that do not exist are not written
            last = jnp.minimum(last, plan.s - 1 - k_first)
        seen = iota(dimension=k_axis) <= last
        if plan.documents:
            of_query = refs.q_ids.at[batch, pl.ds(q_first, shape[q_axis])]
            of_key = refs.k_ids.at[batch, pl.ds(k_first, shape[k_axis])]
            of_query = mosaic_gpu.load(of_query, plgpu.Layout.WGMMA.reduce(k_axis))
            of_key = mosaic_gpu.load(of_key, plgpu.Layout.WGMMA.reduce(q_axis))
            of_query, of_key = (
                lax.broadcast_in_dim(*x) for x in ((of_query, shape, [q_axis]), (of_key, shape, [k_axis]))
            )
            seen &= of_query == of_key
        return jnp.where(seen, start, -UNSEEN)


def _of_keys(
    plan: Plan, refs: Refs, at: tuple, hide: Callable, numbers: tuple, sums: tuple, slopes: jax.Array
) -> tuple:
    """Adds a block of queries: (dk without this block, dv), dS of this block."""
    before, stage, n_done = at
    w, shape = lax.axis_index("warpgroup"), (ROWS, plan.tuning.block)
    columns = plgpu.Layout.WGMMA.reduce(0)
    plgpu.barrier_wait(refs.wide_loaded.at[stage])

    def weigh(scores: Any, dk: Any) -> tuple:
        # Hidden before the product, not after: then no registers are short.
        start = hide(-lax.broadcast_in_dim(mosaic_gpu.load(refs.lse_stages.at[stage], columns), shape, [1]))
        begin = lax.optimization_barrier((sums[0], slopes))
        begin_sum(plan.on_chip, scores, start)
        begin_sum(plan.on_chip, dk, begin[0])
        plgpu.wgmma(scores, refs.own_wide.at[w], mosaic_gpu.transpose(refs.wide.at[stage]))
        add_product(plan.on_chip, dk, begin[1], refs.wide.at[before])
        weights = jnp.exp2(product(plan.on_chip, scores, start, 1) * (plan.scale * LOG2_E))
        weights = lax.optimization_barrier(weights)
        return end_sum(plan.on_chip, dk, begin[0], begin[1], refs.wide.at[before]), weights.astype(plan.dtype)

    dk, weights = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32), plgpu.ACC((ROWS, plan.width), jnp.float32))
    pl.when(n_done > 0)(lambda: plgpu.barrier_arrive(refs.wide_free.at[before]))
    plgpu.barrier_wait(refs.values_loaded.at[stage])

    def differ(slopes: Any, dv: Any) -> tuple:
        start = -lax.broadcast_in_dim(mosaic_gpu.load(refs.delta_stages.at[stage], columns), shape, [1])
        begin = lax.optimization_barrier((sums[1], weights))
        begin_sum(plan.on_chip, slopes, start)
        begin_sum(plan.on_chip, dv, begin[0])
        plgpu.wgmma(slopes, refs.own_values.at[w], mosaic_gpu.transpose(refs.values.at[stage]))
        add_product(plan.on_chip, dv, begin[1], refs.values.at[stage])
        # In 16 bits: weights that are unpacked would be in the way of the sums, in 32 more registers.
        found = begin[1] * product(plan.on_chip, slopes, start, 1).astype(plan.dtype)
        found = lax.optimization_barrier(found)
        return end_sum(plan.on_chip, dv, begin[0], begin[1], refs.values.at[stage]), found

    dv, slopes = pl.run_scoped(differ, plgpu.ACC(shape, jnp.float32), plgpu.ACC((ROWS, plan.v_width), jnp.float32))
    plgpu.barrier_arrive(refs.values_free.at[stage])
    return (dk, dv), slopes


def product(on_chip: bool, accumulator: Any, start: jax.Array, in_flight: int) -> jax.Array:
    """A product that began at `start`, while others are in flight."""
    found = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight if on_chip else 0)
    return found if on_chip else start + found


def _of_queries(
    plan: Plan, refs: Refs, at: tuple, hide: Callable, numbers: tuple, sums: tuple, slopes: jax.Array
) -> tuple:
    """Adds a block of keys: (dq without this block,), dS of this block."""
    before, stage, n_done = at
    w, shape = lax.axis_index("warpgroup"), (ROWS, plan.tuning.block)
    lse, delta = (-lax.broadcast_in_dim(x, shape, [0]) for x in numbers)
    plgpu.barrier_wait(refs.wide_loaded.at[stage])
    plgpu.barrier_wait(refs.values_loaded.at[stage])

    def multiply(scores: Any, differences: Any, dq: Any) -> tuple:
        start, begin = hide(lse), lax.optimization_barrier((sums[0], slopes))
        begin_sum(plan.on_chip, scores, start)
        begin_sum(plan.on_chip, differences, delta)
        begin_sum(plan.on_chip, dq, begin[0])
        plgpu.wgmma(scores, refs.own_wide.at[w], mosaic_gpu.transpose(refs.wide.at[stage]))
        plgpu.wgmma(differences, refs.own_values.at[w], mosaic_gpu.transpose(refs.values.at[stage]))
        add_product(plan.on_chip, dq, begin[1], refs.wide.at[before])
        weights = jnp.exp2(product(plan.on_chip, scores, start, 2) * (plan.scale * LOG2_E))
        weights = lax.optimization_barrier(weights)
        found = lax.optimization_barrier(weights * product(plan.on_chip, differences, delta, 1))
        return end_sum(plan.on_chip, dq, begin[0], begin[1], refs.wide.at[before]), found.astype(plan.dtype)

    scratch = (shape, shape, (ROWS, plan.width))
    dq, slopes = pl.run_scoped(multiply, *(plgpu.ACC(size, jnp.float32) for size in scratch))
    pl.when(n_done > 0)(lambda: plgpu.barrier_arrive(refs.wide_free.at[before]))
    plgpu.barrier_arrive(refs.values_free.at[stage])
    return (dq,), slopes


def _store(plan: Plan, refs: Refs, job: Job, stage: jax.Array, sums: tuple, slopes: jax.Array) -> None:
    """Adds what the last block contributes and writes the sums by way of the owned operands, which are done with."""
    w = lax.axis_index("warpgroup")

    def multiply(total: Any) -> jax.Array:
        begin = lax.optimization_barrier((sums[0], slopes))
        begin_sum(plan.on_chip, total, begin[0])
        add_product(plan.on_chip, total, begin[1], refs.wide.at[stage])
        return end_sum(plan.on_chip, total, begin[0], begin[1], refs.wide.at[stage])

    last = pl.run_scoped(multiply, plgpu.ACC((ROWS, plan.width), jnp.float32))
    plgpu.barrier_arrive(refs.wide_free.at[stage])
    staging = refs.own_wide.at[w], refs.own_values.at[w]
    results = last * plan.scale, *sums[1:]
    for result, buffer in zip(results, staging, strict=False):
        buffer[...] = result.astype(plan.dtype)
    plgpu.commit_smem()
    for buffer, target in zip(staging, refs.sums, strict=False):
        part = target.at[job.batch, pl.ds(job.row + w * ROWS, ROWS), job.head]
        plgpu.copy_smem_to_gmem(buffer, part)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.own_free.at[w])
