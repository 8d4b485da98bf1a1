"""Attention to the positions that an indexer chooses, for training and prefill, and over caches.

    P_t = softmax over s in S_t of (scale * q_t . k_s),    o_t = P_t v

`indexed_attention` and `indexed_decode` are operations of `kernels.TABLE`, here in plain JAX. The first takes blocks of
queries: their scores with all keys exist at a time, masked by S_t, so that memory grows with T and S, not with T S
heads; the backward pass computes each block again. The second gathers the entries of S_t, and reads nothing else of a
cache but the indexer's keys. `gathered_attention` is the second for blocks of queries of a whole sequence, whose keys
and values need not exist. `learning` says how well an indexer predicts the attention.
Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.layers.attention import masked_softmax
from deepseek_jax.layers.indexer import Index, among_top, choice, divergence, scores
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.context import Context
from pallas_kernels.mla_attention import bits
from pallas_kernels.mla_decode import fp8_cache

AT_ONCE = 2**26  # scores of all heads that exist at a time, 256 MiB in float32


class Places(NamedTuple):
    """Which keys a query may look at: those of its document that are not behind it."""

    place_BT: jax.Array  # of each query among the keys, int32
    # segments_BT, segments_BS: documents of queries and keys; None: all are of one
    segments_BT: jax.Array | None = None
    segments_BS: jax.Array | None = None

    def seen(self, n_keys: int) -> jax.Array:
        """seen_BTS."""
        seen_BTS = jnp.arange(n_keys) <= self.place_BT[..., None]
        if self.segments_BT is None or self.segments_BS is None:
            return seen_BTS
        return seen_BTS & (self.segments_BT[..., None] == self.segments_BS[:, None])


class Learning(NamedTuple):
    """How well an indexer predicts the attention, of each query; float32 [B, T]."""

    divergence_BT: jax.Array  # KL(p || softmax(I)), nats
    recall_BT: jax.Array  # share of the dense attention's weights, mean over the heads, that the chosen positions have
    has_choice_BT: jax.Array  # bool: whether more positions are seen than may be chosen


@jax.named_scope("attention")
def indexed_attention(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHU: jax.Array,
    index: Index,
    places: Places,
    *,
    top_k: int,
    scale: float,
    at_once: int = AT_ONCE,
) -> jax.Array:
    """Attention of each token to the `top_k` positions that its index scores highest.

    Args:
        q_BTHQ: queries.
        k_BSHQ, v_BSHU: keys and values, more than `top_k`; U may differ from Q.
        index: of the same queries and keys.
        places: which of the keys a query may look at.
        top_k: positions that are chosen of those.
        scale: factor of the attention's scores.
        at_once: scores that exist at a time, at least those of one query.

    Returns o_BTHU in the dtype of `v_BSHU`. Gradients reach q, k and v, none the index.
    """

    def of(q_BTHQ: jax.Array, index: Index, places: Places) -> jax.Array:
        seen_BTS = places.seen(k_BSHQ.shape[1])
        chosen_BTS = among_top(scores(index._replace(k_BSQ=keys_BSQ)), seen_BTS, top_k)
        weights_BHTS = masked_softmax(_attention_scores(q_BTHQ, k_BSHQ, scale), chosen_BTS[:, None])
        return jnp.einsum("BHTS,BSHU->BTHU", weights_BHTS.astype(v_BSHU.dtype), v_BSHU)

    keys_BSQ = index.k_BSQ
    return _by_blocks(of, places, q_BTHQ, index, _scores_per_query(q_BTHQ, index), at_once)


@jax.named_scope("indexer")
def chosen_words(index: Index, places: Places, n_keys: int, *, top_k: int, at_once: int = AT_ONCE) -> jax.Array:
    """S_t as bits, words_BWT of `pallas_kernels.mla_attention.bits`; without gradients.

    Args:
        index, places, top_k: as for `indexed_attention`.
        n_keys: S.
        at_once: scores of the index that exist at a time.
    """
    index = lax.stop_gradient(index)
    keys_BSQ = index.k_BSQ

    def of(_: jax.Array, index: Index, places: Places) -> jax.Array:
        seen_BTS = places.seen(n_keys)
        chosen_BTS = among_top(scores(index._replace(k_BSQ=keys_BSQ)), seen_BTS, top_k)
        return jnp.swapaxes(bits.packed(chosen_BTS), 1, 2)

    per_query = len(keys_BSQ) * n_keys * index.q_BTHQ.shape[2]
    return jnp.swapaxes(_by_blocks(of, places, index.q_BTHQ, index, per_query, at_once), 1, 2)


@jax.named_scope("attention")
def gathered_attention(
    q_BTHQ: jax.Array,
    c_BSC: jax.Array,
    k_rope_BSP: jax.Array,
    index: Index,
    places: Places,
    *,
    top_k: int,
    scale: float,
    at_once: int = AT_ONCE,
) -> jax.Array:
    """`indexed_attention` in the absorbed form, which gathers the entries of S_t: top_k of them per query.

    Args:
        q_BTHQ: queries that were moved into the latent space, with their rotary parts; Q = C + P.
        c_BSC, k_rope_BSP: latents and rotary keys of the whole sequence, more than `top_k`.
        index, places, top_k, scale, at_once: as there, numbers of gathered entries included in the last.

    Returns o_latent_BTHC. Gradients reach queries, latents and rotary keys, none the index.
    """
    n_batch, n_keys, width = c_BSC.shape
    flat = tuple(x.reshape(-1, x.shape[-1]) for x in (c_BSC, k_rope_BSP))
    keys_BSQ = index.k_BSQ

    def of(q_BTHQ: jax.Array, index: Index, places: Places) -> jax.Array:
        slot_BTK, is_chosen_BTK = choice(index._replace(k_BSQ=keys_BSQ), places.seen(n_keys), top_k)
        row_BTK = slot_BTK + n_keys * jnp.arange(n_batch)[:, None, None]
        return indexed_decode(q_BTHQ[..., :width], q_BTHQ[..., width:], flat, row_BTK, is_chosen_BTK, scale=scale)

    gathered = n_batch * top_k * (q_BTHQ.shape[2] + q_BTHQ.shape[3])
    per_query = max(n_batch * n_keys * index.q_BTHQ.shape[2], gathered)
    return _by_blocks(of, places, q_BTHQ, index, per_query, at_once)


@jax.named_scope("indexer")
def learning(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    index: Index,
    places: Places,
    *,
    top_k: int,
    is_dense: bool,
    scale: float,
    at_once: int = AT_ONCE,
) -> Learning:
    """What an indexer learns by; arguments as for `indexed_attention`, and only the index gets gradients.

    Keys are those of each head, or one for all heads (Z = 1), as the absorbed form has it. Queries attend to all
    positions that they see if `is_dense` (eq. 3), else to those that are chosen (eq. 4).
    """
    q_BTHQ, k_BSZQ = lax.stop_gradient((q_BTHQ, k_BSZQ))
    keys_BSQ = index.k_BSQ

    def of(q_BTHQ: jax.Array, index: Index, places: Places) -> Learning:
        scores_BTS, pairs_BHTS = scores(index._replace(k_BSQ=keys_BSQ)), _attention_scores(q_BTHQ, k_BSZQ, scale)
        return learnt(pairs_BHTS, scores_BTS, places.seen(k_BSZQ.shape[1]), top_k=top_k, is_dense=is_dense)

    return _by_blocks(of, places, q_BTHQ, index, _scores_per_query(q_BTHQ, index), at_once)


def learnt(
    pairs_BHTS: jax.Array, scores_BTS: jax.Array, seen_BTS: jax.Array, *, top_k: int, is_dense: bool
) -> Learning:
    """What an indexer with these scores learns of the attention's scores; see `learning`."""
    chosen_BTS = among_top(scores_BTS, seen_BTS, top_k)
    dense_BTS = jnp.mean(masked_softmax(pairs_BHTS, seen_BTS[:, None]), axis=1)
    recall_BT = jnp.sum(jnp.where(chosen_BTS, dense_BTS, 0.0), axis=-1)
    has_choice_BT = jnp.sum(seen_BTS, axis=-1) > top_k
    if is_dense:
        return Learning(divergence(dense_BTS, scores_BTS, seen_BTS), recall_BT, has_choice_BT)
    p_BTS = jnp.mean(masked_softmax(pairs_BHTS, chosen_BTS[:, None]), axis=1)
    return Learning(divergence(p_BTS, scores_BTS, chosen_BTS), recall_BT, has_choice_BT)


def losses_of(
    found: Learning, tokens: Tokens, context: Context, *, share: float, has_choice: bool
) -> dict[str, jax.Array]:
    """`index_kl` and `index_recall` of a layer, each summed over the sequences of a batch.

    Args:
        found: of each token.
        tokens: of which those that are text count.
        context: the devices over which sequences are divided.
        share: of the layer in the recall.
        has_choice: whether sequences are long enough for a choice; else no recall is reported.
    """
    real_BT = jnp.ones_like(found.has_choice_BT) if tokens.real_BT is None else tokens.real_BT

    def mean(x_BT: jax.Array, of_BT: jax.Array) -> jax.Array:
        """This device's share of the mean over a sequence's tokens `of_BT`, [B]; 0 without any."""
        n_B = context.total(jnp.sum(of_BT, axis=1).astype(jnp.float32))
        return jnp.sum(jnp.where(of_BT, x_BT, 0.0), axis=1) / jnp.maximum(n_B, 1.0)

    has_choice_BT = found.has_choice_BT & real_BT
    any_B = context.total(jnp.sum(has_choice_BT, axis=1)) > 0
    everything = mean(jnp.ones_like(found.recall_BT), real_BT)  # is recalled where there is no choice
    recall_B = jnp.where(any_B, mean(found.recall_BT, has_choice_BT), everything)
    losses = {"index_kl": jnp.sum(mean(found.divergence_BT, real_BT))}
    return losses | ({"index_recall": jnp.sum(lax.stop_gradient(recall_B)) * share} if has_choice else {})


def _attention_scores(q_BTHQ: jax.Array, k_BSZQ: jax.Array, scale: float) -> jax.Array:
    wide = {"preferred_element_type": jnp.float32}
    if k_BSZQ.shape[2] == 1:
        return jnp.einsum("BTHQ,BSQ->BHTS", q_BTHQ, k_BSZQ[:, :, 0], **wide) * scale
    k_BSHQ = k_BSZQ  # a key-value head for each
    return jnp.einsum("BTHQ,BSHQ->BHTS", q_BTHQ, k_BSHQ, **wide) * scale


def _scores_per_query(q_BTHQ: jax.Array, index: Index) -> int:
    """Scores of a query with all keys, by the heads of the attention or of the index, whichever has more."""
    return len(q_BTHQ) * index.k_BSQ.shape[1] * max(q_BTHQ.shape[2], index.q_BTHQ.shape[2])


def _by_blocks(
    of: Callable[..., Any], places: Places, q_BTHQ: jax.Array, index: Index, per_query: int, at_once: int
) -> Any:
    """`of(q_BTHQ, index, places)` of blocks of queries.

    The index that `of` is given has no keys, which are the same for all blocks. `per_query`: numbers that exist for a
    query. All at once if they are few enough.
    """
    queries = q_BTHQ, index.q_BTHQ, index.weight_BTH, places.place_BT, places.segments_BT

    def block(queries: tuple) -> Any:
        q_BTHQ, index_q_BTHQ, weight_BTH, place_BT, segments_BT = queries
        own = Index(index_q_BTHQ, weight_BTH, None)  # type: ignore[arg-type]  # `of` puts the keys in
        return of(q_BTHQ, own, Places(place_BT, segments_BT, places.segments_BS))

    return by_blocks(block, queries, min(max(at_once // per_query, 1), q_BTHQ.shape[1]))


def by_blocks(block: Callable[[Any], Any], queries: Any, size: int) -> Any:
    """`block` of `size` queries, one block after the other; each is computed again backwards.

    `queries` and what `block` gives are trees of arrays [B, T, ...]. The last block is filled up with zeros.
    """
    n_batch, n_tokens = jax.tree.leaves(queries)[0].shape[:2]
    n_blocks = -(-n_tokens // size)
    if n_blocks == 1:
        return block(queries)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, n_blocks * size - n_tokens), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(n_batch, n_blocks, size, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(n_batch, n_blocks * size, *x.shape[3:])[:, :n_tokens]

    return jax.tree.map(joined, lax.map(jax.checkpoint(block), jax.tree.map(cut, queries)))


@jax.named_scope("attention")
def indexed_decode(
    q_latent_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: tuple[jax.Array, ...],
    row_BTK: jax.Array,
    is_chosen_BTK: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Absorbed attention of new tokens to chosen rows of a cache: score = q~ . c + q^R . k^R, o = P c.

    Args:
        q_latent_BTHC, q_rope_BTHP: queries, moved into the latent space, and their rotary parts.
        cache: latents and rotary keys, or their entries in FP8 (`mla_decode.fp8_cache`); the first axis counts the
            slots of all sequences, or of all pages.
        row_BTK: the rows that each token attends to.
        is_chosen_BTK: which of these count.
        scale: factor of the scores.

    Returns o_latent_BTHC in the dtype of the queries.
    """
    gathered = tuple(array[row_BTK] for array in cache)
    if len(gathered) == 1:
        gathered = fp8_cache.decode(gathered[0], q_rope_BTHP.shape[-1])
    c_BTKC, k_rope_BTKP = (part.astype(q_rope_BTHP.dtype) for part in gathered)
    wide = {"preferred_element_type": jnp.float32}
    scores_BTHK = jnp.einsum("BTHC,BTKC->BTHK", q_latent_BTHC, c_BTKC, **wide)
    scores_BTHK += jnp.einsum("BTHP,BTKP->BTHK", q_rope_BTHP, k_rope_BTKP, **wide)
    weights_BTHK = masked_softmax(scores_BTHK * scale, is_chosen_BTK[:, :, None]).astype(q_latent_BTHC.dtype)
    return jnp.einsum("BTHK,BTKC->BTHC", weights_BTHK, c_BTKC)
