"""Attention to the last tokens and to compressed entries of all earlier ones, with a sink per head (DeepSeek-V4).

    s_t,j = scale * q_t . k_j            over the tokens of a window, k_j = v_j, and over entries, likewise; one softmax
    o_t = sum_j exp(s_t,j) v_j / (exp(z) + sum_j exp(s_t,j))              z, one number per head: a sink without a value

All heads read the same keys, which are the values. Of the entries a query sees those whose blocks are complete: all of
them, or the `top_k` that an indexer scores highest. Whole sequences take blocks of queries, whose scores with the
window and with all entries exist at a time, so that memory grows with T, not with T * S; the backward pass computes
each block again. Where entries are many times `top_k`, the chosen ones are gathered for each query instead of masked.
Paper: DeepSeek-V4, arXiv 2606.19348, section 2.3; released code, class Attention.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.layers.attention import MASKED
from deepseek_jax.layers.entry_codes import Codes
from deepseek_jax.layers.indexed_attention import AT_ONCE, Learning, by_blocks, learnt
from deepseek_jax.layers.indexer import Index, among_top, choice, scores

ROWS = 128  # queries of a block, unless the window is longer or scores are too many
Choose = Callable[[Index, jax.Array, int], tuple[jax.Array, jax.Array]]
GATHERED_FROM = 8  # times top_k, the number of entries from which chosen ones are gathered for each query


class Near(NamedTuple):
    """Keys of the tokens of a window: T queries have window + T rows, the last T of which are their own."""

    kv_BSQ: jax.Array
    segments_BS: jax.Array | None = None  # documents; None: all are of one


class Far(NamedTuple):
    """Compressed entries."""

    e_BIQ: jax.Array  # as they are, or as `codes` store them; with a table the entries of pages, [P, entries, Q]
    place_BI: jax.Array  # of the last token of each, int32
    segments_BI: jax.Array | None = None
    codes: Codes | None = None
    table_BN: jax.Array | None = None  # the pages of each sequence, in order

    @property
    def n(self) -> int:
        """I, entries of a sequence."""
        return self.place_BI.shape[1]

    def seen(self, place_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """seen_BTI: entries whose tokens are not behind a query."""
        seen_BTI = self.place_BI[:, None] <= place_BT[..., None]
        if segments_BT is None or self.segments_BI is None:
            return seen_BTI
        return seen_BTI & (self.segments_BI[:, None] == segments_BT[..., None])

    def unpacked(self) -> "Far":
        """The same as they are, side by side."""
        e_BIQ = self.e_BIQ
        if self.table_BN is not None:
            e_BIQ = e_BIQ[self.table_BN].reshape(*self.place_BI.shape, -1)
        return self._replace(e_BIQ=self.codes.unpack(e_BIQ) if self.codes else e_BIQ, codes=None, table_BN=None)

    def at(self, slot_BTK: jax.Array) -> jax.Array:
        """e_BTKQ: some entries of each query, as they are."""
        if self.table_BN is None:
            e_BTKQ = jax.vmap(lambda e_IQ, slot_TK: e_IQ[slot_TK])(self.e_BIQ, slot_BTK)
        else:
            per_page = self.e_BIQ.shape[1]
            page_BTK = jnp.take_along_axis(self.table_BN[:, None], slot_BTK // per_page, axis=2)
            e_BTKQ = self.e_BIQ[page_BTK, slot_BTK % per_page]
        return self.codes.unpack(e_BTKQ) if self.codes else e_BTKQ


class Part(NamedTuple):
    """Some of the keys, which are the values, of queries."""

    kv: jax.Array  # [B, S, Q], or [B, T, S, Q] where each query has its own
    seen_BTS: jax.Array


def attend(q_BTHQ: jax.Array, parts: Sequence[Part], sink_H: jax.Array, scale: float) -> jax.Array:
    """o_BTHQ in the dtype of the queries: one softmax over the keys of all parts and the sink."""
    wide, pairs = {"preferred_element_type": jnp.float32}, []
    for kv, seen_BTS in parts:
        equation = "BTHQ,BSQ->BTHS" if kv.ndim == 3 else "BTHQ,BTSQ->BTHS"
        pairs.append(jnp.where(seen_BTS[:, :, None], jnp.einsum(equation, q_BTHQ, kv, **wide) * scale, MASKED))
    largest = [jnp.max(pairs_BTHS, axis=-1) for pairs_BTHS in pairs]
    top_BTH = lax.stop_gradient(jnp.stack([jnp.broadcast_to(sink_H, largest[0].shape), *largest]).max(axis=0))
    total_BTH, o_BTHQ = jnp.exp(sink_H - top_BTH), jnp.zeros(q_BTHQ.shape, jnp.float32)
    for (kv, _), pairs_BTHS in zip(parts, pairs, strict=True):
        weights_BTHS = jnp.exp(pairs_BTHS - top_BTH[..., None])
        equation = "BTHS,BSQ->BTHQ" if kv.ndim == 3 else "BTHS,BTSQ->BTHQ"
        total_BTH += jnp.sum(weights_BTHS, axis=-1)
        o_BTHQ += jnp.einsum(equation, weights_BTHS.astype(kv.dtype), kv, **wide)
    return (o_BTHQ / total_BTH[..., None]).astype(q_BTHQ.dtype)


def part_of(
    far: Far, index: Index | None, seen_BTI: jax.Array, top_k: int, *, gathers: bool, choose: Choose = choice
) -> Part:
    """What queries read of the entries that they see: all, or those that an index chooses."""
    if index is None or far.n <= top_k:
        return Part(far.unpacked().e_BIQ, seen_BTI)
    if not gathers:
        return Part(far.unpacked().e_BIQ, among_top(scores(index), seen_BTI, top_k))
    slot_BTK, is_chosen_BTK = choose(index, seen_BTI, top_k)
    return Part(far.at(slot_BTK), is_chosen_BTK)


@jax.named_scope("attention")
def over_sequences(
    q_BTHQ: jax.Array,
    near: Near,
    far: Far | None,
    index: Index | None,
    place_BT: jax.Array,
    segments_BT: jax.Array | None,
    sink_H: jax.Array,
    *,
    window: int,
    top_k: int,
    scale: float,
    at_once: int = AT_ONCE,
) -> jax.Array:
    """Attention of tokens that follow one another.

    Args:
        q_BTHQ: queries.
        near: keys of the `window` tokens before the first query, and of the queries' own.
        far: entries; None where there are none.
        index: of the queries and the entries; None: all entries that are seen are read.
        place_BT: of the queries in their sequences, int32; no token is before place 0.
        segments_BT: documents of the queries; None: all are of one.
        sink_H: one number per head.
        window: tokens that a query sees, its own among them.
        top_k: entries that are chosen by the index.
        scale: factor of the scores.
        at_once: scores that exist at a time, at least those of one query.

    Returns o_BTHQ in the dtype of the queries. Gradients reach all but the index.
    """
    (n_batch, n_tokens, n_heads, width), n_far = q_BTHQ.shape, 0 if far is None else far.n
    gathers = index is not None and n_far > GATHERED_FROM * top_k
    read = top_k * width if gathers else n_heads * n_far
    per_query = n_batch * max(n_heads * 2 * window + read, index.q_BTHQ.shape[2] * n_far if index else 0)
    size = min(max(at_once // per_query, 1), max(window, ROWS), n_tokens)
    surplus = -n_tokens % size
    far = far if far is None or gathers else far.unpacked()
    near = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, surplus), *[(0, 0)] * (x.ndim - 2))), near)
    number_BT = jnp.broadcast_to(jnp.arange(n_tokens, dtype=jnp.int32), (n_batch, n_tokens))
    row, key = jnp.arange(size)[:, None], jnp.arange(window + size)
    is_near_TS = (key > row) & (key <= row + window)

    def block(queries: tuple) -> jax.Array:
        q_BTHQ, number_BT, place_BT, segments_BT, index_q_BTHQ, weight_BTH = queries
        own = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number_BT[0, 0], window + size, axis=1), near)
        seen_BTS = is_near_TS & (place_BT[:, :1, None] - window + key >= 0)
        if segments_BT is not None and own.segments_BS is not None:
            seen_BTS &= segments_BT[..., None] == own.segments_BS[:, None]
        parts = [Part(own.kv_BSQ, seen_BTS)]
        if far is not None:
            mine = None if index is None else Index(index_q_BTHQ, weight_BTH, index.k_BSQ)
            parts.append(part_of(far, mine, far.seen(place_BT, segments_BT), top_k, gathers=gathers))
        return attend(q_BTHQ, parts, sink_H, scale)

    chooses = (index.q_BTHQ, index.weight_BTH) if index else (None, None)
    return by_blocks(block, (q_BTHQ, number_BT, place_BT, segments_BT, *chooses), size)


@jax.named_scope("attention")
def over_memory(
    q_BTHQ: jax.Array,
    near: Part,
    far: Far | None,
    index: Index | None,
    place_BT: jax.Array,
    sink_H: jax.Array,
    *,
    top_k: int,
    scale: float,
    choose: Choose = choice,
) -> jax.Array:
    """Attention of one new token per sequence to a window that is in memory; the rest as for `over_sequences`.

    `choose` is an implementation of `kernels.indexed_choice`.
    """
    parts = [near]
    if far is not None:
        parts.append(part_of(far, index, far.seen(place_BT, None), top_k, gathers=True, choose=choose))
    return attend(q_BTHQ, parts, sink_H, scale)


@jax.named_scope("indexer")
def learning(
    q_BTHQ: jax.Array,
    far: Far,
    index: Index,
    place_BT: jax.Array,
    segments_BT: jax.Array | None,
    *,
    top_k: int,
    is_dense: bool,
    scale: float,
    at_once: int = AT_ONCE,
) -> Learning:
    """What an indexer of entries learns by, as `indexed_attention.learning`: p_t is of the entries alone."""
    (n_batch, n_tokens, n_heads, _), e_BIQ = q_BTHQ.shape, lax.stop_gradient(far.e_BIQ)
    per_query = n_batch * e_BIQ.shape[1] * max(n_heads, index.q_BTHQ.shape[2])

    def block(queries: tuple) -> Learning:
        q_BTHQ, index_q_BTHQ, weight_BTH, place_BT, segments_BT = queries
        own = scores(Index(index_q_BTHQ, weight_BTH, index.k_BSQ))
        pairs_BHTI = jnp.einsum("BTHQ,BIQ->BHTI", q_BTHQ, e_BIQ, preferred_element_type=jnp.float32) * scale
        return learnt(pairs_BHTI, own, far.seen(place_BT, segments_BT), top_k=top_k, is_dense=is_dense)

    queries = lax.stop_gradient(q_BTHQ), index.q_BTHQ, index.weight_BTH, place_BT, segments_BT
    return by_blocks(block, queries, min(max(at_once // per_query, 1), n_tokens))
