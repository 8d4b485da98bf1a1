"""Mean attention weights for Hopper in Pallas Mosaic GPU.

A CTA owns 128 queries and 128 keys, and all heads stream past: two warpgroups have 64 of the queries each, their sums
64 registers of a thread; one more loads (TMA) queries and keys of a head into a ring of stages. The tensor cores
multiply the scores of the next head while exponentials of this one are added. Tiles without a pair that counts are
zeros.

What bounds it, 192 columns: 1,536 cycles of the tensor cores for a head's scores of a tile, 1,024 for exponentials, and
96 KB out of the L2 cache, which at 5 TB/s of all processors take 4,400.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_attention import bits
from pallas_kernels.mla_attention.gpu_forward import CHUNK, LOG2_E, ROWS, padded, whole_tiles

WARPGROUPS, KEYS, STAGES = 2, 128, 2
TILE = WARPGROUPS * ROWS  # queries
REGISTERS, LOADER_REGISTERS = 240, 24
WIDEST = 192


def mean_weights(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    lse_BHT: jax.Array,
    words_BWT: jax.Array,
    *,
    scale: float,
    interpret: object = None,
) -> jax.Array:
    """Returns p_BTS; see `pallas_kernels.sparse_mla.mean`. `interpret` runs the kernel on a CPU (JAX 0.11, later)."""
    (b, t, h, width), s = q_BTHQ.shape, k_BSHQ.shape[1]
    words = bits.in_tiles(words_BWT, KEYS, TILE)
    some = bits.some(words, KEYS, TILE).astype(jnp.int32)
    q_tiles, k_tiles = some.shape[1:]
    plan = Plan(b, q_tiles, k_tiles, h, width, q_BTHQ.dtype, scale, not interpret)
    starts = padded(lse_BHT.astype(jnp.float32) * LOG2_E, TILE, 0.0)
    found = plan.call(interpret)(whole_tiles(q_BTHQ), whole_tiles(k_BSHQ), starts, words, some)
    return found[:, :t, :s]


def check(q_BTHQ: jax.Array, scale: float) -> None:
    """Raises ValueError for what the kernel does not take."""
    width, instead = q_BTHQ.shape[3], "Use implementation='reference'."
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"queries are {q_BTHQ.dtype}, expected bfloat16 or float16. Cast them. {instead}")
    if width % CHUNK or width > WIDEST or not scale > 0:
        raise ValueError(
            f"queries are {width} wide, scale={scale}: expected a multiple of {CHUNK} up to {WIDEST}, and a positive "
            f"number. {instead}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    b: int
    q_tiles: int
    k_tiles: int
    h: int
    width: int
    dtype: DTypeLike
    scale: float
    on_chip: bool

    def call(self, interpret: object) -> Any:
        """The kernel, a function of q, k, lse times log2(e), words, and which tiles have a pair."""
        layout = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=jax.ShapeDtypeStruct((self.b, self.q_tiles * TILE, self.k_tiles * KEYS), jnp.float32),
            scratch_types=[
                plgpu.SMEM((STAGES, WARPGROUPS, ROWS, self.width), self.dtype, transforms=layout),
                plgpu.SMEM((STAGES, KEYS, self.width), self.dtype, transforms=layout),
                plgpu.Barrier(num_arrivals=WARPGROUPS + 1, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            ],
            grid=(self.b, self.q_tiles, self.k_tiles),
            grid_names=("batch", "queries", "keys"),
            n_warpgroups=WARPGROUPS + 1,
            interpret=interpret,
        )


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    q: Any
    k: Any
    lse: Any
    words: Any
    some: Any
    out: Any
    q_stages: Any
    k_stages: Any
    loaded: Any
    free: Any


def _kernel(plan: Plan, *refs: Any) -> None:
    named = Refs(*refs)
    batch, query, key = (lax.axis_index(name) for name in ("batch", "queries", "keys"))
    n_heads = jnp.where(named.some[batch, query, key] > 0, plan.h, 0)
    at = batch, query * TILE, key * KEYS
    roles = [functools.partial(role, plan, named, at, n_heads) for role in (_compute, _load)]
    lax.cond(lax.axis_index("warpgroup") < WARPGROUPS, *roles)


def _load(plan: Plan, refs: Refs, at: tuple, n_heads: jax.Array) -> None:
    """The loading warpgroup, of which one warp works."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    batch, row, key = at

    def load_head(h: jax.Array, _: None) -> None:
        stage = lax.rem(h, STAGES)
        pl.when(h >= STAGES)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
        plgpu.copy_gmem_to_smem(refs.k.at[batch, pl.ds(key, KEYS), h], refs.k_stages.at[stage], refs.loaded.at[stage])
        for w in range(WARPGROUPS):
            part = refs.q.at[batch, pl.ds(row + w * ROWS, ROWS), h]
            plgpu.copy_gmem_to_smem(part, refs.q_stages.at[stage, w], refs.loaded.at[stage])

    def work() -> None:
        lax.fori_loop(0, n_heads, load_head, None)
        first = jnp.maximum(n_heads - STAGES, 0)
        lax.fori_loop(first, n_heads, lambda h, _: plgpu.barrier_wait(refs.free.at[lax.rem(h, STAGES)]), None)

    mosaic_gpu.by_one_warp(work)


def _compute(plan: Plan, refs: Refs, at: tuple, n_heads: jax.Array) -> None:
    """A computing warpgroup: its 64 queries."""
    plgpu.set_max_registers(REGISTERS, action="increase")
    w = lax.axis_index("warpgroup")
    batch, row, key = at[0], at[1] + w * ROWS, at[2]
    accumulator, by_row = plgpu.ACC((ROWS, KEYS), jnp.float32), plgpu.Layout.WGMMA.reduce(1)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, KEYS), jnp.float32), plgpu.Layout.WGMMA)

    def lse_of(h: jax.Array) -> jax.Array:
        return mosaic_gpu.load(refs.lse.at[batch, jnp.minimum(h, plan.h - 1), pl.ds(row, ROWS)], by_row)

    def multiply(h: jax.Array, scores: Any) -> None:
        stage = lax.rem(h, STAGES)
        plgpu.barrier_wait(refs.loaded.at[stage])
        for c in range(0, plan.width, CHUNK):
            queries, keys = (x.at[..., pl.ds(c, CHUNK)] for x in (refs.q_stages.at[stage, w], refs.k_stages.at[stage]))
            plgpu.wgmma(scores, queries, mosaic_gpu.transpose(keys))

    def release(h: jax.Array) -> None:
        plgpu.barrier_arrive(refs.free.at[lax.rem(h, STAGES)])

    def first(scores: Any) -> jax.Array:
        multiply(jnp.int32(0), scores)
        return scores[...]

    def add(total: jax.Array, scores: jax.Array, lse: jax.Array) -> jax.Array:
        return total + jnp.exp2(scores * (plan.scale * LOG2_E) - lax.broadcast_in_dim(lse, scores.shape, [0]))

    def step(h: jax.Array, state: tuple) -> tuple:
        """Adds head h, while the scores of the next are multiplied."""

        def both(accumulator: Any) -> tuple:
            multiply(h + 1, accumulator)
            following, total = lse_of(h + 1), lax.optimization_barrier(add(*state))
            return total, accumulator[...], following

        found = pl.run_scoped(both, accumulator)
        release(h + 1)
        return found

    def visit(zeros: jax.Array) -> jax.Array:
        lse = lse_of(jnp.int32(0))
        scores = pl.run_scoped(first, accumulator)
        release(jnp.int32(0))
        return add(*lax.fori_loop(0, n_heads - 1, step, (zeros, scores, lse)))

    total = lax.cond(n_heads > 0, visit, lambda zeros: zeros, zeros) / plan.h
    n = KEYS // bits.WORD
    words = [
        mosaic_gpu.load(refs.words.at[batch, lax.div(key, bits.WORD) + i, pl.ds(row, ROWS)], by_row) for i in range(n)
    ]
    refs.out.at[batch, pl.ds(row, ROWS), pl.ds(key, KEYS)][...] = mosaic_gpu.where_bits(words, total, 0.0, plan.on_chip)
