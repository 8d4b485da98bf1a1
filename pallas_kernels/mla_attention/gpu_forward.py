"""Forward pass of causal attention for Hopper in Pallas Mosaic GPU.

    o_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij)        s_ij = scale q_i . k_j

A CTA stays on its processor and walks over tiles of queries. Each of its computing warpgroups owns 64 queries of a
tile; one more warpgroup loads (TMA) keys and values, block after block, into two rings of stages. Per block a
warpgroup has the tensor cores work on two products at once,

    S = Q K_i^T        and        O = O + P_(i-1) V_(i-1)

and computes P_i = exp2(scale log2(e) S - m) on the CUDA cores as soon as S is there, while O is still in flight
(Dao et al., FlashAttention-3, section 3.2). `turns` lets the warpgroups start their products in turn, so that one
computes exponentials while the tensor cores work for the other (section 3.1 there).

Registers of a thread, of 240: O 64 (U = 128), S 64 (128 keys), P_(i-1) 32. Shared memory: Q 48 KB (192 wide), two
stages of K and V 160 KB, 16 KB by way of which the output leaves, 64 columns at a time; so the next tile's Q is loaded
as soon as the last scores are there.

What bounds it: Q + U multiply-adds per visible pair, 2,048 per cycle and processor. For 128 x 128 pairs and 192/128
these are 2,560 cycles, beside 1,024 for the exponentials (16 per cycle) and 600 for the other arithmetic.
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
from pallas_kernels.mla_attention import bits, visits
from pallas_kernels.mla_attention.reference import Segments

ROWS = 64  # queries of a warpgroup
CHUNK = 64  # columns that TMA can swizzle, of 16 bits
REGISTERS = 65536  # of a processor
LOG2_E = math.log2(math.e)
CLUSTERED_FROM = 4096  # queries per head
NOTHING = -1e30  # the largest score so far of a query that has seen no key; finite: the exponential of -inf is then 0


class Warpgroups:
    """What follows from the numbers of a tuning: warpgroups that compute, and one that loads."""

    warpgroups: int
    stages: int
    loader_registers: int

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: expected at least 2: a block is read while the next is loaded.")

    @property
    def rows(self) -> int:
        """Rows of a CTA's tile."""
        return self.warpgroups * ROWS

    @property
    def registers(self) -> int:
        """Of a thread that computes: what is left of those that the CTA starts with."""
        at_start = REGISTERS // (128 * (self.warpgroups + 1)) // 8 * 8 * (self.warpgroups + 1)
        return min((at_start - self.loader_registers) // self.warpgroups // 8 * 8, 240)


@dataclasses.dataclass(frozen=True)
class Tuning(Warpgroups):
    """How the work is divided.

    Attributes:
        warpgroups: that compute, each 64 queries.
        keys: of a block, a multiple of 64.
        stages: blocks of keys, and of values, in shared memory.
        cluster: CTAs with neighbouring queries that load keys and values together.
        turns: the warpgroups start their products in turn.
        loader_registers: per thread of the loading warpgroup.
    """

    warpgroups: int = 2
    keys: int = 128
    stages: int = 2
    cluster: int = 1
    turns: bool = True
    loader_registers: int = 24


def choose(t: int, documents: bool) -> Tuning:
    """Returns the tuning for `t` queries per head: clusters share what they load, but wait for each other at a mask."""
    return Tuning(cluster=2 if t >= CLUSTERED_FROM and not documents else 1)


def forward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    *,
    scale: float,
    chosen_BWT: jax.Array | None = None,
    tuning: Tuning | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHU, lse_BHT); arguments as in `pallas_kernels.mla_attention`.

    `chosen_BWT`: bits that say which pairs are visible, in place of segments and positions (`mla_attention.bits`).
    `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    (b, t, h, width), (s, z) = q_BTHQ.shape, k_BSZQ.shape[1:3]
    tuning = tuning or choose(t, segments is not None)
    plan = Plan(
        b, t, s, h, z, width, v_BSZU.shape[3], q_BTHQ.dtype, scale, segments is not None, tuning, n_processors,
        not interpret, chosen_BWT is not None,
    )  # fmt: skip
    ids: tuple = () if segments is None else (padded(segments[0], tuning.rows), padded(segments[1], tuning.keys))
    some = None
    if chosen_BWT is not None:
        words = bits.in_tiles(chosen_BWT, tuning.keys, tuning.rows * tuning.cluster)
        some, ids = bits.some(words, tuning.keys, tuning.rows), (words,)
    ranges = plan.ranges(segments, q_offset, some)
    offset = jnp.full((1,), q_offset, jnp.int32)
    jobs = plan.jobs(q_offset if isinstance(q_offset, int) else s - t)
    matrices = (whole_tiles(x) for x in (q_BTHQ, k_BSZQ, v_BSZU))
    o_BTHU, lse_BHT = plan.call(interpret)(*matrices, jobs, ranges, offset, *ids)
    return o_BTHU[:, :t], lse_BHT[:, :, :t]


def whole_tiles(x: jax.Array) -> jax.Array:
    """`x` with zeros appended along axis 1, where copies to swizzled shared memory would end within 8 rows.

    Beyond a matrix they fill in zeros, but only whole tiles of 8 rows, or one that is not whole and no other.
    """
    extra = tokens(x.shape[1]) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, extra), (0, 0), (0, 0)]) if extra else x


def tokens(n: int) -> int:
    """Returns how many tokens a matrix with `n` of them has for the kernels."""
    return n if n < 8 else -(-n // 8) * 8


def padded(ids: jax.Array, tile: int, value: int | float | None = None) -> jax.Array:
    """`ids` [..., length] with its last entry repeated, or `value`, until the length is a multiple of `tile`."""
    widths = [(0, 0)] * (ids.ndim - 1) + [(0, -ids.shape[-1] % tile)]
    return jnp.pad(ids, widths, mode="edge") if value is None else jnp.pad(ids, widths, constant_values=value)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    b: int
    t: int
    s: int
    h: int
    z: int
    width: int  # of queries and keys
    v_width: int
    dtype: DTypeLike
    scale: float
    documents: bool
    tuning: Tuning
    n_processors: int
    on_chip: bool  # interpreted otherwise: operands of a product are not in registers
    chosen: bool  # bits say which pairs are visible

    @property
    def n_tiles(self) -> int:
        """Tiles of queries of a head, per cluster."""
        return -(-self.t // (self.tuning.rows * self.tuning.cluster))

    @property
    def chunks(self) -> int:
        """Of the columns of a query."""
        return self.width // CHUNK

    def ranges(self, segments: Segments | None, q_offset: int | jax.Array, some: jax.Array | None) -> jax.Array:
        """The blocks that each tile visits, those of `some` pairs if given; CTAs of a cluster visit the same."""
        tuning = self.tuning
        if some is None:
            found = visits.visits_of_queries((self.t, self.s), (tuning.rows, tuning.keys), segments, q_offset)
        else:
            found = visits.visits_of(some)
        pairs = jnp.pad(found, ((0, 0), (0, -found.shape[1] % tuning.cluster), (0, 0)), mode="edge")
        pairs = pairs.reshape(found.shape[0], -1, tuning.cluster, 4)
        first, end = pairs[..., 0].min(axis=2, keepdims=True), pairs[..., 3].max(axis=2, keepdims=True)
        together = jnp.stack(jnp.broadcast_arrays(first, pairs[..., 1], pairs[..., 2], end), axis=-1)
        return together.reshape(found.shape[0], -1, 4)

    def jobs(self, q_offset: int) -> jax.Array:
        """Which cluster computes which tiles."""
        rows, keys = self.tuning.rows * self.tuning.cluster, self.tuning.keys
        ends = [min(max(rows * (i + 1) + q_offset, 1), self.s) for i in range(self.n_tiles)]
        return visits.jobs([end / keys + 1 for end in ends], self.b * self.h, self.n_processors // self.tuning.cluster)

    def call(self, interpret: object) -> Callable:
        """The kernel, a function of q, k, v, jobs, ranges, offset and, with documents, their ids."""
        tuning = self.tuning
        n_clusters = min(self.n_processors // tuning.cluster, self.b * self.h * self.n_tiles)
        rows = self.n_tiles * tuning.rows * tuning.cluster
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=[
                jax.ShapeDtypeStruct((self.b, tokens(self.t), self.h, self.v_width), self.dtype),
                jax.ShapeDtypeStruct((self.b, self.h, rows), jnp.float32),
            ],
            scratch_types=self.scratch(),
            grid=(n_clusters,),
            grid_names=("clusters",),
            cluster=(tuning.cluster,),
            cluster_names=("cta",),
            n_warpgroups=tuning.warpgroups + 1,
            interpret=interpret,
        )

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order of `Refs`."""
        tuning, n = self.tuning, self.tuning.warpgroups
        layout = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
        free = plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=n, num_barriers=tuning.stages)
        return [
            plgpu.SMEM((n, self.chunks, ROWS, CHUNK), self.dtype, transforms=layout),
            plgpu.SMEM((tuning.stages, tuning.keys, self.width), self.dtype, transforms=layout),
            plgpu.SMEM((tuning.stages, tuning.keys, self.v_width), self.dtype, transforms=layout),
            plgpu.SMEM((n, ROWS, CHUNK), self.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=self.chunks, num_barriers=n),
            plgpu.Barrier(num_arrivals=1, num_barriers=n),
            plgpu.Barrier(num_barriers=tuning.stages),
            plgpu.Barrier(num_barriers=tuning.stages),
            free,
            free,
            plgpu.Barrier(num_arrivals=1, num_barriers=n),
        ]


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    q: Any
    k: Any
    v: Any
    jobs: Any
    ranges: Any
    offset: Any
    q_ids: Any
    k_ids: Any
    chosen: Any
    o: Any
    lse: Any
    q_chunks: Any  # per warpgroup
    k_stages: Any
    v_stages: Any
    o_staging: Any  # per warpgroup: columns of the output on their way out
    q_loaded: Any  # per warpgroup
    q_free: Any  # per warpgroup: its last product of scores is done
    k_loaded: Any  # per stage
    v_loaded: Any
    k_free: Any  # per stage: all warpgroups that read it, of all CTAs of the cluster, are done
    v_free: Any
    turn: Any  # per warpgroup: it may start its products


@dataclasses.dataclass(frozen=True)
class Job:
    """A tile of queries of a head, and the blocks of keys that it visits."""

    batch: jax.Array
    head: jax.Array
    row: jax.Array  # first query of this CTA
    ranges: tuple  # first, whole_from, whole_to, end

    @property
    def first(self) -> jax.Array:
        """Block of keys."""
        return self.ranges[0]

    @property
    def end(self) -> jax.Array:
        """Block of keys after the last."""
        return self.ranges[3]


def _kernel(plan: Plan, *refs: Any) -> None:
    n_inputs = 6 + 2 * plan.documents + plan.chosen
    ids = refs[6:8] if plan.documents else (None, None)
    chosen = refs[n_inputs - 1] if plan.chosen else None
    named = Refs(*(*refs[:6], *ids, chosen, *refs[n_inputs:]))
    lax.cond(
        lax.axis_index("warpgroup") < plan.tuning.warpgroups,
        functools.partial(_compute, plan, named),
        functools.partial(_load, plan, named),
    )


def _job(plan: Plan, refs: Refs, i: jax.Array) -> Job:
    """This cluster's i-th job."""
    number = refs.jobs[lax.axis_index("clusters"), 1 + i]
    group, tile = lax.div(number, plan.n_tiles), lax.rem(number, plan.n_tiles)
    batch, head = lax.div(group, plan.h), lax.rem(group, plan.h)
    if plan.tuning.cluster > 1:
        tile = tile * plan.tuning.cluster + lax.axis_index("cta")
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
    tuning = plan.tuning
    shared = "cta" if tuning.cluster > 1 else None

    def load_queries(i: jax.Array, job: Job) -> None:
        for w in range(tuning.warpgroups):
            pl.when(i > 0)(functools.partial(plgpu.barrier_wait, refs.q_free.at[w]))
            for c in range(plan.chunks):
                rows, columns = pl.ds(job.row + w * ROWS, ROWS), pl.ds(c * CHUNK, CHUNK)
                part = refs.q.at[job.batch, rows, job.head, columns]
                plgpu.copy_gmem_to_smem(part, refs.q_chunks.at[w, c], refs.q_loaded.at[w])

    def load_job(i: jax.Array, state: tuple) -> tuple:
        job = _job(plan, refs, i)
        z = lax.div(job.head, plan.h // plan.z)

        def load_block(block: jax.Array, state: tuple) -> tuple:
            stage, n_loaded = state
            keys = pl.ds(block * tuning.keys, tuning.keys)
            pl.when(n_loaded >= tuning.stages)(lambda: plgpu.barrier_wait(refs.k_free.at[stage]))
            k_part, v_part = refs.k.at[job.batch, keys, z], refs.v.at[job.batch, keys, z]
            plgpu.copy_gmem_to_smem(k_part, refs.k_stages.at[stage], refs.k_loaded.at[stage], collective_axes=shared)
            pl.when(block == job.first)(lambda: load_queries(i, job))
            pl.when(n_loaded >= tuning.stages)(lambda: plgpu.barrier_wait(refs.v_free.at[stage]))
            plgpu.copy_gmem_to_smem(v_part, refs.v_stages.at[stage], refs.v_loaded.at[stage], collective_axes=shared)
            return _next(plan, stage), n_loaded + 1

        return lax.fori_loop(job.first, job.end, load_block, state)

    n_mine = refs.jobs[lax.axis_index("clusters"), 0]
    stage, n_loaded = lax.fori_loop(0, n_mine, load_job, (jnp.int32(0), jnp.int32(0)))

    # The other CTA of the cluster may still read or signal: leave only when every stage has come back.
    def wait(_, stage: jax.Array) -> jax.Array:
        plgpu.barrier_wait(refs.k_free.at[stage])
        plgpu.barrier_wait(refs.v_free.at[stage])
        return _next(plan, stage)

    oldest = jnp.where(n_loaded >= tuning.stages, stage, 0)
    lax.fori_loop(0, jnp.minimum(n_loaded, tuning.stages), wait, oldest)
    for w in range(tuning.warpgroups):
        plgpu.barrier_wait(refs.q_free.at[w])


def _compute(plan: Plan, refs: Refs) -> None:
    """A computing warpgroup: its queries of each tile."""
    tuning, w = plan.tuning, lax.axis_index("warpgroup")
    plgpu.set_max_registers(tuning.registers, action="increase")
    if tuning.turns:
        pl.when(w == tuning.warpgroups - 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))
    n_mine = refs.jobs[lax.axis_index("clusters"), 0]
    lax.fori_loop(0, n_mine, functools.partial(_compute_tile, plan, refs), jnp.int32(0))
    if tuning.turns:
        pl.when(w == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What a warpgroup knows of its queries so far."""

    o: jax.Array  # without the last block: [64, U]
    largest: jax.Array  # score, times log2(e)
    total: jax.Array  # of exponentials
    weights: jax.Array  # exponentials of the last block, in 16 bits

    def tree(self) -> tuple:
        """As a loop carries it."""
        return self.o, self.largest, self.total, self.weights


def _compute_tile(plan: Plan, refs: Refs, i: jax.Array, stage: jax.Array) -> jax.Array:
    """This warpgroup's queries of the i-th tile; returns the stage after the tile's last."""
    job, w = _job(plan, refs, i), lax.axis_index("warpgroup")
    mask = _Mask(plan, refs, job, job.row + w * ROWS)
    plgpu.barrier_wait(refs.q_loaded.at[w])
    sums = _first_block(plan, refs, stage, mask.of(job.first))

    def step(masked: bool, block: jax.Array, state: tuple) -> tuple:
        stage, sums = state[0], Sums(*state[1])
        hide = mask.of(block) if masked else lambda scores: scores
        return _next(plan, stage), _block(plan, refs, stage, hide, sums).tree()

    first, whole_from, whole_to, end = job.ranges
    whole_from, whole_to = jnp.maximum(whole_from, first + 1), jnp.maximum(whole_to, first + 1)
    state = stage, sums.tree()
    if plan.documents:
        state = lax.fori_loop(first + 1, whole_from, functools.partial(step, True), state)
        state = lax.fori_loop(whole_from, whole_to, functools.partial(step, False), state)
    else:
        state = lax.fori_loop(first + 1, whole_to, functools.partial(step, False), state)
    stage, found = lax.fori_loop(whole_to, end, functools.partial(step, True), state)
    _store(plan, refs, job, stage, Sums(*found))
    return _next(plan, stage)


@dataclasses.dataclass(frozen=True)
class _Mask:
    """Hides the scores of keys that a query does not see."""

    plan: Plan
    refs: Refs
    job: Job
    row: jax.Array

    def of(self, block: jax.Array) -> Callable:
        """A function of a block's scores: -inf where hidden. Bits are read now: they take their time."""
        n = self.plan.tuning.keys // bits.WORD
        if not self.plan.chosen:
            return functools.partial(self._apply, block)
        words = [
            mosaic_gpu.load(
                self.refs.chosen.at[self.job.batch, block * n + i, pl.ds(self.row, ROWS)], plgpu.Layout.WGMMA.reduce(1)
            )
            for i in range(n)
        ]
        return lambda scores: mosaic_gpu.where_bits(words, scores, -math.inf, self.plan.on_chip)

    def _apply(self, block: jax.Array, scores: jax.Array) -> jax.Array:
        plan, keys = self.plan, self.plan.tuning.keys
        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, keys), layout=plgpu.Layout.WGMMA)
        last = jnp.minimum(iota(dimension=0) + (self.row + self.refs.offset[0]), plan.s - 1)
        seen = iota(dimension=1) + block * keys <= last
        if plan.documents:
            q_ids = self.refs.q_ids.at[self.job.batch, pl.ds(self.row, ROWS)]
            k_ids = self.refs.k_ids.at[self.job.batch, pl.ds(block * keys, keys)]
            of_query = mosaic_gpu.load(q_ids, plgpu.Layout.WGMMA.reduce(1))
            of_key = mosaic_gpu.load(k_ids, plgpu.Layout.WGMMA.reduce(0))
            shape = scores.shape
            seen &= lax.broadcast_in_dim(of_query, shape, [0]) == lax.broadcast_in_dim(of_key, shape, [1])
        return jnp.where(seen, scores, -jnp.inf)


def _multiply_scores(plan: Plan, refs: Refs, scores: Any, stage: jax.Array) -> None:
    """Starts S = Q K^T."""
    for c in range(plan.chunks):
        keys = refs.k_stages.at[stage, :, pl.ds(c * CHUNK, CHUNK)]
        plgpu.wgmma(scores, refs.q_chunks.at[lax.axis_index("warpgroup"), c], mosaic_gpu.transpose(keys))


def _first_block(plan: Plan, refs: Refs, stage: jax.Array, hide: Callable) -> Sums:
    """The sums after the first block, whose values are still to be added."""
    plgpu.barrier_wait(refs.k_loaded.at[stage])

    def multiply(scores: Any) -> jax.Array:
        _multiply_scores(plan, refs, scores, stage)
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, plan.tuning.keys), jnp.float32))
    plgpu.barrier_arrive(refs.k_free.at[stage])
    rows = plgpu.Layout.WGMMA.reduce(1)
    nothing = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), rows)
    none = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), rows)
    o = plgpu.layout_cast(jnp.zeros((ROWS, plan.v_width), jnp.float32), plgpu.Layout.WGMMA)
    largest, total, _, weights = _exponentials(plan, hide(scores), nothing, none)
    return Sums(o, largest, total, weights.astype(plan.dtype))


def _exponentials(plan: Plan, scores: jax.Array, largest: jax.Array, total: jax.Array) -> tuple:
    """(largest, total, factor of earlier exponentials, this block's exponentials) after a block."""
    factor = plan.scale * LOG2_E
    new = jnp.maximum(largest, jnp.max(scores, axis=1) * factor)
    shrink = jnp.exp2(largest - new)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
    return new, total * shrink + jnp.sum(weights, axis=1), shrink, weights


def _block(plan: Plan, refs: Refs, before: jax.Array, hide: Callable, sums: Sums) -> Sums:
    """Scores of a block, in the stage after `before`, while the values of the one before are added."""
    tuning, w, stage = plan.tuning, lax.axis_index("warpgroup"), _next(plan, before)
    plgpu.barrier_wait(refs.k_loaded.at[stage])
    plgpu.barrier_wait(refs.v_loaded.at[before])
    if tuning.turns:
        plgpu.barrier_wait(refs.turn.at[w])

    def multiply(scores: Any, o: Any) -> tuple:
        before_o, before_weights = lax.optimization_barrier((sums.o, sums.weights))
        begin_sum(plan.on_chip, o, before_o)
        _multiply_scores(plan, refs, scores, stage)
        add_product(plan.on_chip, o, before_weights, refs.v_stages.at[before])
        if tuning.turns:
            plgpu.barrier_arrive(refs.turn.at[jnp.where(w == tuning.warpgroups - 1, 0, w + 1)])
        found = plgpu.wgmma_accumulator_load(scores, wait_n=1 if plan.on_chip else 0)
        plgpu.barrier_arrive(refs.k_free.at[stage])
        results = _exponentials(plan, hide(found), sums.largest, sums.total)
        largest, total, shrink, weights = lax.optimization_barrier(results)
        added = end_sum(plan.on_chip, o, sums.o, sums.weights, refs.v_stages.at[before])
        plgpu.barrier_arrive(refs.v_free.at[before])
        added *= lax.broadcast_in_dim(shrink, added.shape, [0])
        # Rounded no earlier: the product before read its operand from the same registers.
        return Sums(added, largest, total, weights.astype(plan.dtype)).tree()

    shapes = (ROWS, tuning.keys), (ROWS, plan.v_width)
    return Sums(*pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def begin_sum(on_chip: bool, accumulator: Any, total: jax.Array) -> None:
    """Makes `total` what the accumulator holds."""
    if on_chip:
        accumulator[...] = total


def add_product(on_chip: bool, accumulator: Any, weights: jax.Array, ref: Any) -> None:
    """Starts accumulator += weights @ ref, with weights in registers."""
    if on_chip:
        plgpu.wgmma(accumulator, weights, ref)


def end_sum(on_chip: bool, accumulator: Any, total: jax.Array, weights: jax.Array, ref: Any) -> jax.Array:
    """What the accumulator holds when all products are done.

    The interpreter knows neither operands in registers nor a store to an accumulator: there it is a plain product.
    """
    if on_chip:
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=0)
    return total + jnp.dot(weights.astype(jnp.float32), ref[...].astype(jnp.float32), precision="highest")


def _store(plan: Plan, refs: Refs, job: Job, stage: jax.Array, sums: Sums) -> None:
    """Adds the values of the last block and writes the output and the log of the sum of exponentials."""
    w = lax.axis_index("warpgroup")
    plgpu.barrier_arrive(refs.q_free.at[w])  # those of the next tile are loaded meanwhile
    plgpu.barrier_wait(refs.v_loaded.at[stage])

    def multiply(o: Any) -> jax.Array:
        begin_sum(plan.on_chip, o, sums.o)
        add_product(plan.on_chip, o, sums.weights, refs.v_stages.at[stage])
        return end_sum(plan.on_chip, o, sums.o, sums.weights, refs.v_stages.at[stage])

    o = pl.run_scoped(multiply, plgpu.ACC((ROWS, plan.v_width), jnp.float32))
    plgpu.barrier_arrive(refs.v_free.at[stage])
    o *= lax.broadcast_in_dim(jnp.where(sums.total > 0, 1 / sums.total, 0.0), o.shape, [0])
    rows = pl.ds(job.row + w * ROWS, ROWS)
    for c in range(plan.v_width // CHUNK):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.o_staging.at[w][...] = o[:, c * CHUNK : (c + 1) * CHUNK].astype(plan.dtype)
        plgpu.commit_smem()
        target = refs.o.at[job.batch, rows, job.head, pl.ds(c * CHUNK, CHUNK)]
        plgpu.copy_smem_to_gmem(refs.o_staging.at[w], target)
    refs.lse.at[job.batch, job.head, rows][...] = sums.largest / LOG2_E + jnp.log(sums.total)
