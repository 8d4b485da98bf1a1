"""Causal attention by blocks of queries and keys, in plain jax: on any device, in memory linear in T and S.

The visible pairs (block of queries, block of keys) are listed when the program is traced, and one loop goes through the
list: a block above the diagonal costs nothing. Forward, each pair updates its queries' running maximum m, sum l and
output o (online softmax):

    m' = max(m, max_j s_ij),    l' = e^(m - m') l + sum_j e^(s_ij - m'),    o' = e^(m - m') o + sum_j e^(s_ij - m') v_j

lse = m + log l, and o / l is the result. Backward, each pair computes its weights from lse again, adds to dq, dk, dv.
Paper: Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_attention.reference import MASKED, Segments, same_document, visible

BLOCK = 256  # queries, and keys, of a block
Mask = Callable[[Any, Any], jax.Array]  # (block of queries, block of keys) -> seen, which broadcasts to BZJTS


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
    t, s, z = q_BTHQ.shape[1], *k_BSZQ.shape[1:3]
    wide = jnp.promote_types(q_BTHQ.dtype, jnp.float32)
    q_IBZJTQ, k_IBZSQ, v_IBZSU = _query_blocks(q_BTHQ, z), _key_blocks(k_BSZQ), _key_blocks(v_BSZU)
    mask = _mask(t, s, segments, q_offset)

    def add(sums: tuple, i: jax.Array, j: jax.Array) -> tuple:
        o_BZJTU, top_BZJT, sum_BZJT = (a[i] for a in sums)
        scores_BZJTS = _scores(q_IBZJTQ[i], k_IBZSQ[j], scale, mask(i, j), wide)
        new_BZJT = jnp.maximum(top_BZJT, scores_BZJTS.max(axis=-1))
        weights_BZJTS = jnp.exp(scores_BZJTS - new_BZJT[..., None])
        fade_BZJT = jnp.exp(top_BZJT - new_BZJT)
        sum_BZJT = fade_BZJT * sum_BZJT + weights_BZJTS.sum(axis=-1)
        added_BZJTU = _product("BZJTS,BZSU->BZJTU", weights_BZJTS.astype(v_BSZU.dtype), v_IBZSU[j], wide)
        found = fade_BZJT[..., None] * o_BZJTU + added_BZJTU, new_BZJT, sum_BZJT
        return tuple(a.at[i].set(b) for a, b in zip(sums, found, strict=True))

    rows = q_IBZJTQ.shape[:-1]
    o = jnp.zeros_like(q_IBZJTQ, wide, shape=(*rows, v_BSZU.shape[-1]))
    nothing = jnp.zeros_like(q_IBZJTQ, wide, shape=rows)
    o, top, total = _over_pairs(add, (o, nothing + MASKED, nothing), t, s, q_offset)
    sees = top > MASKED / 2  # what a query that sees nothing has summed means nothing
    o = jnp.where(sees[..., None], o / total[..., None], 0).astype(v_BSZU.dtype)
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)
    return _joined(o, t), jnp.swapaxes(_joined(lse[..., None], t)[..., 0], 1, 2)


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
    (t, s, z), dtype = (q_BTHQ.shape[1], *k_BSZQ.shape[1:3]), q_BTHQ.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, 0, lse_BHT)  # all scores of such a query are masked
    q_IBZJTQ, do_IBZJTU = _query_blocks(q_BTHQ, z), _query_blocks(do_BTHU, z)
    k_IBZSQ, v_IBZSU = _key_blocks(k_BSZQ), _key_blocks(v_BSZU)
    lse_IBZJT, delta_IBZJT = (_query_blocks(jnp.swapaxes(x, 1, 2)[..., None], z)[..., 0] for x in (lse_BHT, delta_BHT))
    mask = _mask(t, s, segments, q_offset)

    def add(sums: tuple, i: jax.Array, j: jax.Array) -> tuple:
        dq, dk, dv = sums
        scores_BZJTS = _scores(q_IBZJTQ[i], k_IBZSQ[j], scale, mask(i, j), wide)
        weights_BZJTS = jnp.exp(scores_BZJTS - lse_IBZJT[i][..., None])
        dweights_BZJTS = _product("BZJTU,BZSU->BZJTS", do_IBZJTU[i], v_IBZSU[j], wide)
        dscores_BZJTS = (scale * weights_BZJTS * (dweights_BZJTS - delta_IBZJT[i][..., None])).astype(dtype)
        dq = dq.at[i].add(_product("BZJTS,BZSQ->BZJTQ", dscores_BZJTS, k_IBZSQ[j], wide))
        dk = dk.at[j].add(_product("BZJTS,BZJTQ->BZSQ", dscores_BZJTS, q_IBZJTQ[i], wide))
        dv = dv.at[j].add(_product("BZJTS,BZJTU->BZSU", weights_BZJTS.astype(dtype), do_IBZJTU[i], wide))
        return dq, dk, dv

    zeros = tuple(jnp.zeros_like(x, wide) for x in (q_IBZJTQ, k_IBZSQ, v_IBZSU))
    dq, dk, dv = _over_pairs(add, zeros, t, s, q_offset)
    dk, dv = (_joined(x[:, :, :, None], s).astype(dtype) for x in (dk, dv))
    return _joined(dq, t).astype(dtype), dk, dv


def _over_pairs(add: Callable, sums: tuple, t: int, s: int, q_offset: int | jax.Array) -> tuple:
    """Returns the sums after `add(sums, i, j)` for every pair of blocks that has a visible key."""
    n_queries, n_keys = -(-t // BLOCK), -(-s // BLOCK)
    last = q_offset if isinstance(q_offset, int) else s  # of an offset known only later: no pair is left out
    pairs = [(i, j) for i in range(n_queries) for j in range(n_keys) if j * BLOCK < min((i + 1) * BLOCK, t) + last]
    if not pairs:
        return sums
    if len(pairs) == 1:
        return add(sums, *pairs[0])

    def step(sums: tuple, pair: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        i, j = pair
        if isinstance(q_offset, int):
            return add(sums, i, j), None
        seen = j * BLOCK < jnp.minimum((i + 1) * BLOCK, t) + q_offset
        return lax.cond(seen, lambda sums: add(sums, i, j), lambda sums: sums, sums), None

    return lax.scan(step, sums, tuple(jnp.array(pairs, jnp.int32).T))[0]


def _mask(t: int, s: int, segments: Segments | None, q_offset: int | jax.Array) -> Mask:
    """Returns which keys of a block its queries see; never the zeros that fill up the last block of keys."""
    rows = jnp.arange(BLOCK)
    documents = segments and (_blocks(segments[0]), _blocks(segments[1]))

    def mask(i: Any, j: Any) -> jax.Array:
        seen = visible(i * BLOCK + rows + q_offset, j * BLOCK + rows)
        seen = seen & (j * BLOCK + rows < s) if s % BLOCK else seen
        return seen & same_document(documents[0][i], documents[1][j])[:, None, None] if documents else seen

    return mask


def _scores(q_BZJTQ: jax.Array, k_BZSQ: jax.Array, scale: float, seen: jax.Array, wide: Any) -> jax.Array:
    return jnp.where(seen, scale * _product("BZJTQ,BZSQ->BZJTS", q_BZJTQ, k_BZSQ, wide), MASKED)


def _product(equation: str, x: jax.Array, y: jax.Array, wide: Any) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=wide)


def _blocks(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [blocks, B, BLOCK, ...], filled up with zeros."""
    b, t = x.shape[:2]
    n = -(-t // BLOCK)
    x = jnp.pad(x, [(0, 0), (0, n * BLOCK - t), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(b, n, BLOCK, *x.shape[2:]), 1, 0)


def _key_blocks(x_BSZQ: jax.Array) -> jax.Array:
    """[B, S, Z, Q] -> [blocks, B, Z, BLOCK, Q]."""
    return jnp.swapaxes(_blocks(x_BSZQ), 2, 3)


def _query_blocks(x_BTHQ: jax.Array, z: int) -> jax.Array:
    """[B, T, Z * J, Q] -> [blocks, B, Z, J, BLOCK, Q]."""
    x_IBHTQ = jnp.swapaxes(_blocks(x_BTHQ), 2, 3)
    i, b, h, t, q = x_IBHTQ.shape
    return x_IBHTQ.reshape(i, b, z, h // z, t, q)


def _joined(x_IBZJTQ: jax.Array, t: int) -> jax.Array:
    """The inverse of `_query_blocks`: [B, t, Z * J, Q]."""
    i, b, z, j, n, q = x_IBZJTQ.shape
    return jnp.transpose(x_IBZJTQ, (1, 0, 4, 2, 3, 5)).reshape(b, i * n, z * j, q)[:, :t]
