"""Forward pass of causal attention for TPUs in Pallas Mosaic TPU.

    o_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij)        s_ij = scale q_i . k_j

A step of the grid is a tile of queries and a block of keys (`tpu_pairs.py`). Maximum, sum and output of the queries
stay in vector memory from block to block (online softmax, as in `chunked.py`). Scores are multiplied by log2(e) too, so
that exponentials are those of 2. Blocks in which every query sees every key are not masked.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import tpu_pairs
from pallas_kernels.mla_attention.reference import MASKED, Segments
from pallas_kernels.mla_attention.tpu_pairs import LOG2_E, N_LISTS, Plan, product


def forward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    *,
    scale: float,
    most: tuple[int, int] = tpu_pairs.MOST,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHU, lse_BHT); arguments as in `pallas_kernels.mla_attention`.

    `most`: queries and keys of a tile, at most; multiples of 128. `interpret` runs the kernel on a CPU.
    """
    (b, t, h, _), (s, z) = q_BTHQ.shape, k_BSZQ.shape[1:3]
    plan = Plan(b, t, s, h, z, scale, segments is not None, False, most)
    call = functools.partial(_call, q_offset, interpret)
    return tpu_pairs.by_sequences(call, plan, segments, q_offset, q_BTHQ, k_BSZQ, v_BSZU)


def _call(
    q_offset: int | jax.Array,
    interpret: Any,
    plan: Plan,
    segments: Segments | None,
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    width, v_width, group = q_BTHQ.shape[3], v_BSZU.shape[3], plan.h // plan.z
    lists = plan.lists(segments, q_offset)
    ids, id_specs = plan.ids(segments)
    rows, n_queries = plan.tiles[0], plan.counts[0] * plan.tiles[0]

    def of_group(head: Any) -> Any:
        return lax.div(head, group)

    o_BHTU, lse_BHNT = pl.pallas_call(
        functools.partial(_kernel, plan),
        out_shape=[
            jax.ShapeDtypeStruct((plan.b, plan.h, n_queries, v_width), v_BSZU.dtype),
            jax.ShapeDtypeStruct((plan.b, plan.h, 1, n_queries), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=N_LISTS,
            grid=(plan.sequences, plan.h, lists.n_pairs),
            in_specs=[
                plan.matrix(True, width),
                plan.matrix(False, width, of_group),
                plan.matrix(False, v_width, of_group),
                *id_specs,
            ],
            out_specs=[plan.matrix(True, v_width), plan.row(True)],
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (v_width, 1, 1)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*lists[:N_LISTS], plan.filled(q_BTHQ, True), plan.filled(k_BSZQ, False), plan.filled(v_BSZU, False), *ids)
    return o_BHTU[:, :, : plan.t].swapaxes(1, 2), lse_BHNT[:, :, 0, : plan.t]


def _kernel(plan: Plan, *refs: Any) -> None:
    lists, (q, k, v, *ids, o, lse, total, top, sums) = refs[:N_LISTS], refs[N_LISTS:]
    pair = plan.pair(pl.program_id(2), lists)

    @pl.when(pair.is_first)
    def _() -> None:
        total[...], sums[...] = jnp.zeros_like(total), jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, MASKED)

    def add(masked: bool) -> None:
        scores = product(q[...], k[...], (1, 1)) * (plan.scale * LOG2_E)
        if masked:
            scores = jnp.where(plan.seen(pair, ids), scores, MASKED)
        new = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        weights, fade = jnp.exp2(scores - new), jnp.exp2(top[...] - new)
        sums[...] = fade * sums[...] + jnp.sum(weights, axis=1, keepdims=True)
        total[...] = fade * total[...] + product(weights.astype(v.dtype), v[...], (1, 0))
        top[...] = new

    pl.when(pair.is_whole)(functools.partial(add, False))
    pl.when(~pair.is_whole)(functools.partial(add, True))

    @pl.when(pair.is_last)
    def _() -> None:
        sees = top[...] > MASKED / 2  # what a query that sees nothing has summed means nothing
        o[...] = jnp.where(sees, total[...] / sums[...], 0.0).astype(o.dtype)
        lse[0] = jnp.where(sees, top[...] * math.log(2) + jnp.log(sums[...]), -jnp.inf)[:, 0]
