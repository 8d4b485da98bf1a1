"""Kernels of sparse attention: of whole sequences in training; over a cache, which slots are chosen, and attention.

    attention_on_hopper   of whole sequences, to what is chosen, and its gradients: `sparse_mla.attend_expanded`
    learning_on_hopper    what the indexer learns by: `sparse_mla.mean_weights`
    choice_by_triton      the k best by `pallas_kernels.topk`, of scores by XLA: NVIDIA GPUs
    choice_on_hopper      scores by `pallas_kernels.indexer` as well, of E4M3 codes
    decode_on_hopper      attention by `pallas_kernels.sparse_mla`

Each takes the arguments of the function in plain JAX beside which `kernels.TABLE` names it, and raises UserError where
its kernel does not run. Queries and keys of a cache in FP8 are numbers of E4M3 with a scale that is a power of two, so
that their codes are exact. Those of another cache are not turned by a Hadamard matrix: rounded, they would choose other
positions, and `choice_on_hopper` refuses them (`check_choice`).

The last three act in programs that attend over a cache with the kernels of a run: answers of reinforcement learning
that one program draws (`rl.rollout=batch`), whose cache is not in FP8. The engine computes sparse attention by XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution
from deepseek_jax.layers.indexed_attention import AT_ONCE, Learning, Places, by_blocks, chosen_words
from deepseek_jax.layers.indexer import Index, divergence, scores
from pallas_kernels import indexer, sparse_mla
from pallas_kernels.indexer.api import WIDTH
from pallas_kernels.mla_attention import bits
from pallas_kernels.mla_decode import fp8_cache
from pallas_kernels.topk import top_k as best


def choose(
    scoring: str | None, sorting: str, index: Index, seen_BTS: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """As `indexer.choice`, with slots in ascending order.

    Args:
        scoring: implementation of `pallas_kernels.indexer`, by which the scores of all heads do not exist in between;
            None: scores by XLA.
        sorting: implementation of `pallas_kernels.topk`.
        index, seen_BTS, top_k: as there.
    """
    n_slots = seen_BTS.shape[-1]
    try:
        if scoring is None:
            scores_BTS = scores(index)
        else:
            codes = indexer.encode(index.q_BTHQ), indexer.encode(index.k_BSQ)
            weight_BTH = index.weight_BTH.astype(jnp.float32)
            scores_BTS = indexer.logits(*codes, weight_BTH, implementation=scoring, q_offset=n_slots)
        seen_scores_BTS = jnp.where(seen_BTS, scores_BTS, -jnp.inf)
        slot_BTK = best(seen_scores_BTS, min(top_k, n_slots), implementation=sorting)
    except ValueError as error:
        raise _does_not_run("indexed_choice", scoring or sorting, error) from error
    return jnp.maximum(slot_BTK, 0), slot_BTK >= 0


def check_choice(run: Execution, width: int) -> None:
    """Raises UserError for a run whose keys, of `width` numbers, `choice_on_hopper` would not take as they are."""
    if run.kernels.chosen["indexed_choice"] == "mosaic_gpu" and (run.cache != "fp8" or width != WIDTH):
        raise UserError(
            f"config.kernels.indexed_choice='mosaic_gpu' with keys of {width} numbers (config.model.index_width) in a "
            f"cache of the kind {run.cache!r}: expected {WIDTH}, in a cache in FP8, which only engines have. "
            "Set config.kernels.indexed_choice to triton or xla."
        )


choice_by_triton = functools.partial(choose, None, "triton")
choice_on_hopper = functools.partial(choose, "mosaic_gpu", "triton")


def decode(
    implementation: str,
    q_latent_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: tuple[jax.Array, ...],
    row_BTK: jax.Array,
    is_chosen_BTK: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """As `indexed_attention.indexed_decode`, where the rows that count come first, as `choose` and `choice` give them.

    The kernel reads the first rows of each token, as many as are chosen: `is_chosen_BTK` is only counted.

    Chosen entries in FP8 are gathered and decoded by XLA before the kernel reads them.
    """
    if len(cache) == 1:
        entries_RY = cache[0][row_BTK].reshape(-1, cache[0].shape[-1])
        cache = fp8_cache.decode(entries_RY, q_rope_BTHP.shape[-1])
        row_BTK = jnp.arange(len(entries_RY), dtype=jnp.int32).reshape(row_BTK.shape)
    c_RC, k_rope_RP = (part.astype(q_rope_BTHP.dtype) for part in cache)
    queries = q_latent_BTHC.astype(q_rope_BTHP.dtype), q_rope_BTHP
    count_BT = jnp.sum(is_chosen_BTK, axis=-1, dtype=jnp.int32)
    try:
        o_BTHC, _ = sparse_mla.attend(
            *queries, (c_RC, k_rope_RP), row_BTK, count_BT, implementation=implementation, scale=scale
        )
    except ValueError as error:
        raise _does_not_run("indexed_decode", implementation, error) from error
    return o_BTHC.astype(q_latent_BTHC.dtype)


decode_on_hopper = functools.partial(decode, "mosaic_gpu")


@jax.named_scope("attention")
def attention(
    implementation: str,
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHU: jax.Array,
    index: Index,
    places: Places,
    *,
    top_k: int,
    scale: float,
) -> jax.Array:
    """As `indexed_attention.indexed_attention`: scores of the index by XLA in blocks, what they choose as bits."""
    words_BWT = chosen_words(index, places, k_BSHQ.shape[1], top_k=top_k)
    try:
        o_BTHU, _ = sparse_mla.attend_expanded(
            q_BTHQ, k_BSHQ, v_BSHU, words_BWT, implementation=implementation, scale=scale
        )
    except ValueError as error:
        raise _does_not_run("indexed_attention", implementation, error) from error
    return o_BTHU


attention_on_hopper = functools.partial(attention, "mosaic_gpu")


@jax.named_scope("indexer")
def learning(
    implementation: str,
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    index: Index,
    places: Places,
    *,
    top_k: int,
    is_dense: bool,
    scale: float,
    at_once: int = AT_ONCE,
) -> Learning:
    """As `indexed_attention.learning`, of keys of each head; weights of the attention, mean over heads, are [B, T, S].

    Two passes over all scores give the logarithms of their sums, over what is seen and over what is chosen: a head's
    recall is the quotient of the sums. A third one gives the weights. Blocks of the index's scores follow.
    """
    q_BTHQ, k_BSHQ = lax.stop_gradient((q_BTHQ, k_BSHQ))
    n_keys, keys_BSQ = k_BSHQ.shape[1], index.k_BSQ
    seen_BWT = bits.packed(places.seen(n_keys))
    chosen_BWT = chosen_words(index, places, n_keys, top_k=top_k, at_once=at_once)
    attended_BWT = seen_BWT if is_dense else chosen_BWT
    options: dict[str, Any] = {"implementation": implementation, "scale": scale}
    try:
        some_BSHV = k_BSHQ[..., :64]  # its sums are not used
        lse_BHT, chosen_lse_BHT = (
            sparse_mla.attend_expanded(q_BTHQ, k_BSHQ, some_BSHV, words, **options)[1]
            for words in (seen_BWT, chosen_BWT)
        )
        attended_lse_BHT = lse_BHT if is_dense else chosen_lse_BHT
        p_BTS = sparse_mla.mean_weights(q_BTHQ, k_BSHQ, attended_lse_BHT, attended_BWT, **options)
    except ValueError as error:
        raise _does_not_run("indexed_learning", implementation, error) from error

    def block(queries: tuple) -> jax.Array:
        index_q_BTHQ, weight_BTH, p_BTS, attended_BTW = queries
        attended_BTS = bits.unpacked(jnp.swapaxes(attended_BTW, 1, 2), n_keys)
        return divergence(p_BTS, scores(Index(index_q_BTHQ, weight_BTH, keys_BSQ)), attended_BTS)

    queries = index.q_BTHQ, index.weight_BTH, p_BTS, jnp.swapaxes(attended_BWT, 1, 2)
    size = max(at_once // (len(keys_BSQ) * n_keys * index.q_BTHQ.shape[2]), 1)
    divergence_BT = by_blocks(block, queries, min(size, q_BTHQ.shape[1]))
    recall_BT = jnp.mean(jnp.exp(chosen_lse_BHT - lse_BHT), axis=1)  # each query sees itself: both sums are positive
    return Learning(divergence_BT, recall_BT, jnp.sum(lax.population_count(seen_BWT), axis=1) > top_k)


learning_on_hopper = functools.partial(learning, "mosaic_gpu")


def _does_not_run(operation: str, name: str, error: ValueError) -> UserError:
    return UserError(f"kernels.{operation}={name!r}: {error} In a run, config.kernels.{operation}=xla.")
