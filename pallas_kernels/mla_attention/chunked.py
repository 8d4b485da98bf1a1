"""Causal attention by blocks of queries and keys, in plain jax: on any device, in memory linear in T and S.

Forward, a block of queries meets one block of keys after the other; each updates the running maximum m, sum l and
output o of the queries (online softmax):

    m' = max(m, max_j s_ij),    l' = e^(m - m') l + sum_j e^(s_ij - m'),    o' = e^(m - m') o + sum_j e^(s_ij - m') v_j

lse = m + log l, and o / l is the result. Backward, each pair of blocks computes its weights from lse again, and adds to
dq, dk and dv. One loop visits the pairs; those above the diagonal are left out when the program is traced.
Paper: Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.mla_attention.reference import MASKED, Segments, same_document, visible

BLOCK = 512  # tokens of a block, at most
Span = tuple[int | jax.Array, int]  # a block: its first token and the number of its tokens
Add = Callable[[tuple, Span, Span], tuple]  # (sums, queries, keys) -> sums


def forward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHU, lse_BHT); see `pallas_kernels.mla_attention.api`."""
    pairs = _Pairs(q_BTHQ.shape[1], k_BSZQ.shape[1], segments, q_offset)
    wide = jnp.promote_types(q_BTHQ.dtype, jnp.float32)
    q_BZJTQ, k_BZSQ, v_BZSU = pairs.queries(q_BTHQ, k_BSZQ.shape[2]), pairs.keys(k_BSZQ), pairs.keys(v_BSZU)

    def add(sums: tuple, i: Span, j: Span) -> tuple:
        o_BZJTU, top_BZJT, sum_BZJT = (_part(x, i) for x in sums)
        scores_BZJTS = scale * _product("BZJTQ,BZSQ->BZJTS", _part(q_BZJTQ, i), _part(k_BZSQ, j, 2), wide)
        scores_BZJTS = jnp.where(pairs.seen(i, j), scores_BZJTS, MASKED)
        new_BZJT = jnp.maximum(top_BZJT, scores_BZJTS.max(axis=-1))
        weights_BZJTS = jnp.exp(scores_BZJTS - new_BZJT[..., None])
        fade_BZJT = jnp.exp(top_BZJT - new_BZJT)
        sum_BZJT = fade_BZJT * sum_BZJT + weights_BZJTS.sum(axis=-1)
        added_BZJTU = _product("BZJTS,BZSU->BZJTU", weights_BZJTS.astype(v_BSZU.dtype), _part(v_BZSU, j, 2), wide)
        found = fade_BZJT[..., None] * o_BZJTU + added_BZJTU, new_BZJT, sum_BZJT
        return tuple(_put(x, y, i) for x, y in zip(sums, found, strict=True))

    rows = q_BZJTQ.shape[:-1]
    nothing_BZJT = jnp.zeros_like(q_BZJTQ, wide, shape=rows)
    o_BZJTU = jnp.zeros_like(q_BZJTQ, wide, shape=(*rows, v_BSZU.shape[-1]))
    o_BZJTU, top_BZJT, sum_BZJT = pairs.visit(add, (o_BZJTU, nothing_BZJT + MASKED, nothing_BZJT), q_BTHQ)
    sees_BZJT = top_BZJT > MASKED / 2  # what a query that sees nothing has summed means nothing
    o_BZJTU = jnp.where(sees_BZJT[..., None], o_BZJTU / sum_BZJT[..., None], 0).astype(v_BSZU.dtype)
    lse_BZJT = jnp.where(sees_BZJT, top_BZJT + jnp.log(sum_BZJT), -jnp.inf)
    return _joined(o_BZJTU, pairs.t), _joined(lse_BZJT[..., None], pairs.t)[..., 0].swapaxes(1, 2)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq_BTHQ, dk_BSZQ, dv_BSZU); see `pallas_kernels.mla_attention.api`."""
    pairs, z = _Pairs(q_BTHQ.shape[1], k_BSZQ.shape[1], segments, q_offset), k_BSZQ.shape[2]
    dtype, wide = q_BTHQ.dtype, jnp.promote_types(q_BTHQ.dtype, jnp.float32)
    q_BZJTQ, do_BZJTU = pairs.queries(q_BTHQ, z), pairs.queries(do_BTHU, z)
    k_BZSQ, v_BZSU = pairs.keys(k_BSZQ), pairs.keys(v_BSZU)
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, 0, lse_BHT)  # all scores of such a query are masked
    lse_BZJT, delta_BZJT = (pairs.queries(x.swapaxes(1, 2)[..., None], z)[..., 0] for x in (lse_BHT, delta_BHT))

    def add(sums: tuple, i: Span, j: Span) -> tuple:
        dq_BZJTQ, dk_BZQS, dv_BZUS = sums
        q, do, k, v = _part(q_BZJTQ, i), _part(do_BZJTU, i), _part(k_BZSQ, j, 2), _part(v_BZSU, j, 2)
        scores_BZJTS = scale * _product("BZJTQ,BZSQ->BZJTS", q, k, wide)
        scores_BZJTS = jnp.where(pairs.seen(i, j), scores_BZJTS, MASKED)
        weights_BZJTS = jnp.exp(scores_BZJTS - _part(lse_BZJT, i)[..., None])
        dweights_BZJTS = _product("BZJTU,BZSU->BZJTS", do, v, wide)
        dscores = scale * weights_BZJTS * (dweights_BZJTS - _part(delta_BZJT, i)[..., None])
        dscores_BZJTS, weights_BZJTS = dscores.astype(dtype), weights_BZJTS.astype(dtype)
        dq = _part(dq_BZJTQ, i) + _product("BZJTS,BZSQ->BZJTQ", dscores_BZJTS, k, wide)
        dk = _part(dk_BZQS, j) + _product("BZJTQ,BZJTS->BZQS", q, dscores_BZJTS, wide)
        dv = _part(dv_BZUS, j) + _product("BZJTU,BZJTS->BZUS", do, weights_BZJTS, wide)
        return _put(dq_BZJTQ, dq, i), _put(dk_BZQS, dk, j), _put(dv_BZUS, dv, j)

    # Tokens last in dk and dv: so no product needs the weights, which are the largest array, transposed.
    zeros = (jnp.zeros_like(x, wide) for x in (q_BZJTQ, k_BZSQ.swapaxes(2, 3), v_BZSU.swapaxes(2, 3)))
    dq_BZJTQ, dk_BZQS, dv_BZUS = pairs.visit(add, tuple(zeros), q_BTHQ)
    dk_BSZQ, dv_BSZU = (_joined(x.astype(dtype).swapaxes(2, 3)[:, :, None], pairs.s) for x in (dk_BZQS, dv_BZUS))
    return _joined(dq_BZJTQ.astype(dtype), pairs.t), dk_BSZQ, dv_BSZU


@dataclass(frozen=True)
class _Pairs:
    """The pairs of blocks that have something to do with each other, for T queries and S keys."""

    t: int
    s: int
    segments: Segments | None
    q_offset: int | jax.Array

    def visit(self, add: Add, sums: tuple, q: jax.Array) -> tuple:
        """Returns the sums after `add(sums, queries, keys)` for all pairs.

        The list of pairs is tied to `q`: inside a loop over layers, jax would otherwise compute the masks of all pairs,
        which follow from the list alone, before that loop, and keep them.
        """
        n_queries, n_keys = _block(self.t), _block(self.s)
        known = isinstance(self.q_offset, int)
        seen = self.q_offset if known else self.s  # of an offset known only later: no pair is left out
        starts = itertools.product(range(0, self.t, n_queries), range(0, self.s, n_keys))
        pairs = [(i, j) for i, j in starts if j < min(i + n_queries, self.t) + seen]

        def step(sums: tuple, pair: Any) -> tuple[tuple, None]:
            i, j = pair
            if known:
                return add(sums, (i, n_queries), (j, n_keys)), None
            meet = j < jnp.minimum(i + n_queries, self.t) + self.q_offset
            return lax.cond(meet, lambda sums: add(sums, (i, n_queries), (j, n_keys)), lambda sums: sums, sums), None

        if len(pairs) < 2:
            return step(sums, pairs[0])[0] if pairs else sums
        order, _ = lax.optimization_barrier((jnp.array(pairs, jnp.int32), q))
        return lax.scan(step, sums, order)[0]

    def seen(self, i: Span, j: Span) -> jax.Array:
        """Returns which keys of a block its queries see, broadcastable to BZJTS; no key that only fills up a block."""
        (q_start, n_queries), (k_start, n_keys) = i, j
        k_position = k_start + jnp.arange(n_keys)
        seen = visible(q_start + jnp.arange(n_queries) + self.q_offset, k_position) & (k_position < self.s)
        if self.segments is None:
            return seen
        of_queries, of_keys = (self._filled(x) for x in self.segments)
        return seen & same_document(_part(of_queries, i, 1), _part(of_keys, j, 1))[:, None, None]

    def queries(self, x_BTHQ: jax.Array, z: int) -> jax.Array:
        """[B, T, Z * J, Q] -> [B, Z, J, T, Q], filled up to whole blocks."""
        x_BHTQ = self._filled(x_BTHQ).swapaxes(1, 2)
        b, h, t, q = x_BHTQ.shape
        return x_BHTQ.reshape(b, z, h // z, t, q)

    def keys(self, x_BSZQ: jax.Array) -> jax.Array:
        """[B, S, Z, Q] -> [B, Z, S, Q], filled up to whole blocks."""
        return self._filled(x_BSZQ).swapaxes(1, 2)

    def _filled(self, x: jax.Array) -> jax.Array:
        n = x.shape[1]
        return jnp.pad(x, [(0, 0), (0, -n % _block(n)), *[(0, 0)] * (x.ndim - 2)])


def _block(n: int) -> int:
    """Returns how many tokens the blocks of n tokens have: the same number each, so that little is filled up."""
    return math.ceil(n / math.ceil(n / BLOCK))


def _joined(x_BZJTQ: jax.Array, t: int) -> jax.Array:
    """[B, Z, J, T or more, Q] -> [B, T, Z * J, Q]."""
    b, z, j, n, q = x_BZJTQ.shape
    return x_BZJTQ.reshape(b, z * j, n, q)[:, :, :t].swapaxes(1, 2)


def _part(x: jax.Array, span: Span, axis: int = 3) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, *span, axis)


def _put(x: jax.Array, part: jax.Array, span: Span) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, span[0], 3)


def _product(equation: str, x: jax.Array, y: jax.Array, wide: DTypeLike) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=wide)
