"""Backward pass of causal attention for TPUs in Pallas Mosaic TPU: two kernels, each of which owns what it sums.

    P_ij = exp(s_ij - lse_i)        ds_ij = P_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i P_ij do_i

The first kernel owns a tile of queries and visits blocks of keys; the second owns a tile of keys and values and visits
blocks of queries of every head that reads them. It computes scores transposed, keys along rows, so that no product
needs a transposed matrix of weights. Sums are in float32 and in one order, so results have the same bits on every run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import tpu_pairs
from pallas_kernels.mla_attention.reference import MASKED, Segments
from pallas_kernels.mla_attention.tpu_pairs import LOG2_E, N_LISTS, Pair, Plan, column, product


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
    most: tuple[int, int] = tpu_pairs.MOST,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq_BTHQ, dk_BSZQ, dv_BSZU); see `pallas_kernels.mla_attention.api`.

    `most`: queries and keys of a tile, at most; multiples of 128. `interpret` runs the kernels on a CPU.
    """
    (b, t, h, _), (s, z) = q_BTHQ.shape, k_BSZQ.shape[1:3]
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, 0, lse_BHT)  # all scores of such a query are masked
    arrays = q_BTHQ, k_BSZQ, v_BSZU, lse_BHT, do_BTHU.astype(q_BTHQ.dtype), delta_BHT

    def gradients(of_keys: bool) -> Any:
        plan = Plan(b, t, s, h, z, scale, segments is not None, of_keys, most)
        call = functools.partial(_of_keys if of_keys else _of_queries, q_offset, interpret)
        return tpu_pairs.by_sequences(call, plan, segments, q_offset, *arrays)

    return gradients(False), *gradients(True)


def _of_queries(
    q_offset: int | jax.Array, interpret: Any, plan: Plan, segments: Segments | None, *arrays: jax.Array
) -> jax.Array:
    """dq_BTHQ."""
    width, v_width, group = arrays[0].shape[3], arrays[2].shape[3], plan.h // plan.z
    lists = plan.lists(segments, q_offset)
    ids, id_specs = plan.ids(segments)

    def of_group(head: Any) -> Any:
        return lax.div(head, group)

    operand_specs = _specs(plan, width, v_width, lambda head: head, of_group)
    dq_BHTQ = pl.pallas_call(
        functools.partial(_queries_kernel, plan),
        out_shape=jax.ShapeDtypeStruct((plan.b, plan.h, plan.counts[0] * plan.tiles[0], width), arrays[0].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=N_LISTS,
            grid=(plan.sequences, plan.h, lists.n_pairs),
            in_specs=[*operand_specs, *id_specs],
            out_specs=plan.matrix(True, width),
            scratch_shapes=[pltpu.VMEM((plan.tiles[0], width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*lists[:N_LISTS], *_operands(plan, *arrays), *ids)
    return dq_BHTQ[:, :, : plan.t].swapaxes(1, 2)


def _of_keys(
    q_offset: int | jax.Array, interpret: Any, plan: Plan, segments: Segments | None, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(dk_BSZQ, dv_BSZU)."""
    widths, group = (arrays[0].shape[3], arrays[2].shape[3]), plan.h // plan.z
    lists = plan.lists(segments, q_offset)
    ids, id_specs = plan.ids(segments)
    operand_specs = _specs(plan, *widths, lambda z, j: z * group + j, lambda z, j: z)
    found = pl.pallas_call(
        functools.partial(_keys_kernel, plan),
        out_shape=[
            jax.ShapeDtypeStruct((plan.b, plan.z, plan.counts[0] * plan.tiles[1], width), arrays[0].dtype)
            for width in widths
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=N_LISTS,
            grid=(plan.sequences, plan.z, lists.n_pairs, group),
            in_specs=[*operand_specs, *id_specs],
            out_specs=[plan.matrix(False, width) for width in widths],
            scratch_shapes=[pltpu.VMEM((plan.tiles[1], width), jnp.float32) for width in widths],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(*lists[:N_LISTS], *_operands(plan, *arrays), *ids)
    dk_BSZQ, dv_BSZU = (x[:, :, : plan.s].swapaxes(1, 2) for x in found)
    return dk_BSZQ, dv_BSZU


def _operands(
    plan: Plan,
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    lse_BHT: jax.Array,
    do_BTHU: jax.Array,
    delta_BHT: jax.Array,
) -> list[jax.Array]:
    """As the kernels read them: q, k, v, do, then lse in powers of 2 and delta."""
    matrices = (q_BTHQ, True), (k_BSZQ, False), (v_BSZU, False), (do_BTHU, True)
    rows = lse_BHT * LOG2_E, delta_BHT
    return [*(plan.filled(*x) for x in matrices), *(plan.filled_rows(x.astype(jnp.float32), True) for x in rows)]


def _specs(plan: Plan, width: int, v_width: int, head: Any, group: Any) -> list[pl.BlockSpec]:
    """The blocks of `_operands`; `head` and `group` say whose from the place in the grid."""
    q, k, v = plan.matrix(True, width, head), plan.matrix(False, width, group), plan.matrix(False, v_width, group)
    return [q, k, v, plan.matrix(True, v_width, head), plan.row(True, head), plan.row(True, head)]


def _queries_kernel(plan: Plan, *refs: Any) -> None:
    lists, (q, k, v, do, lse, delta, *ids, dq, total) = refs[:N_LISTS], refs[N_LISTS:]
    pair = plan.pair(pl.program_id(2), lists)

    @pl.when(pair.is_first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(masked: bool) -> None:
        scores = product(q[...], k[...], (1, 1))
        dweights = product(do[...], v[...], (1, 1))
        weights = _weights(plan, scores, column(lse), pair, ids, masked)
        dscores = weights * (dweights - column(delta))
        total[...] += product(dscores.astype(k.dtype), k[...], (1, 0))

    _masked_or_not(pair, add)

    @pl.when(pair.is_last)
    def _() -> None:
        dq[...] = (plan.scale * total[...]).astype(dq.dtype)


def _keys_kernel(plan: Plan, *refs: Any) -> None:
    lists, (q, k, v, do, lse, delta, *ids, dk, dv, k_total, v_total) = refs[:N_LISTS], refs[N_LISTS:]
    pair, head = plan.pair(pl.program_id(2), lists), pl.program_id(3)

    @pl.when(pair.is_first & (head == 0))
    def _() -> None:
        k_total[...], v_total[...] = jnp.zeros_like(k_total), jnp.zeros_like(v_total)

    def add(masked: bool) -> None:
        scores = product(k[...], q[...], (1, 1))
        dweights = product(v[...], do[...], (1, 1))
        weights = _weights(plan, scores, lse[...], pair, ids, masked)
        dscores = weights * (dweights - delta[...])
        v_total[...] += product(weights.astype(do.dtype), do[...], (1, 0))
        k_total[...] += product(dscores.astype(q.dtype), q[...], (1, 0))

    _masked_or_not(pair, add)

    @pl.when(pair.is_last & (head == pl.num_programs(3) - 1))
    def _() -> None:
        dk[...] = (plan.scale * k_total[...]).astype(dk.dtype)
        dv[...] = v_total[...].astype(dv.dtype)


def _weights(plan: Plan, products: jax.Array, lse: jax.Array, pair: Pair, ids: list, masked: bool) -> jax.Array:
    """P of a pair, from products of queries and keys; lse in powers of 2."""
    scores = products * (plan.scale * LOG2_E)
    if masked:
        scores = jnp.where(plan.seen(pair, ids), scores, MASKED)
    return jnp.exp2(scores - lse)


def _masked_or_not(pair: Pair, add: Any) -> None:
    pl.when(pair.is_whole)(functools.partial(add, False))
    pl.when(~pair.is_whole)(functools.partial(add, True))
