"""Causal softmax attention for training and prefill, and over the caches of generation.

    P = softmax(scale * q k^T + causal mask),    o = P v

with scores and softmax in float32. What computes the first kind is chosen by `config.kernels.attention`:

    xla         short sequences in blocks of queries that meet the keys up to their own end, weights P kept for the
                backward pass; long ones as `chunked`. Which is faster on CPUs decides (`RECOMPUTED_FROM`)
    chunked     blocks of queries and keys; memory grows with T, not with T * S: `pallas_kernels.mla_attention`
    mosaic_gpu  the same by kernels for Hopper GPUs, for 16 bits and widths that are multiples of 64
    mosaic_tpu  the same for TPUs, for bfloat16 and float32
    reference   the definition, all scores at once
    cudnn       `layers.cudnn_attention`

All take the arguments of `causal_attention`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import UserError
from pallas_kernels import mla_attention, mla_decode
from pallas_kernels.mla_decode import fp8_cache, work

RECOMPUTED_FROM = 1024  # tokens of a sequence above which weights are not kept for the backward pass
# in which a step of V2-Lite at batch 1 takes 0.1 to 0.2 ms less by XLA than by the kernel for many pages (one H200);
# several sequences were not measured
FEW_SLOTS = 2048
MASKED = -1e30  # a score that softmax turns into 0 without making a NaN of an all-masked row


@jax.named_scope("attention")
def causal_attention(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
) -> jax.Array:
    """Attention of each token to itself and the tokens before it.

    Args:
        q_BTHQ: queries, of the positions from `q_offset` on.
        k_BSZQ, v_BSZU: keys and values of the positions from 0 on; H is a multiple of Z, U may differ from Q.
        scale: factor of the scores.
        segments_BT: documents, if queries and keys are of the same tokens; a token sees only its own document.
        q_offset: how many keys come before the first query's.

    Returns o_BTHU in the dtype of `v_BSZU`.
    """
    (_, t, h, _), (_, s, z, _) = q_BTHQ.shape, k_BSZQ.shape
    if t > RECOMPUTED_FROM or s != t or not isinstance(q_offset, int) or q_offset:
        return chunked(q_BTHQ, k_BSZQ, v_BSZU, scale=scale, segments_BT=segments_BT, q_offset=q_offset)
    k_BTHQ, v_BTHU = (jnp.repeat(x, h // z, axis=2) if h > z else x for x in (k_BSZQ, v_BSZU))
    outputs, block = [], min(max(t // 8, 128), 512)
    for start in range(0, t, block):
        end = min(start + block, t)
        seen_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        if segments_BT is not None:
            seen_TS = seen_TS & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])
        outputs.append(_attend(q_BTHQ[:, start:end], k_BTHQ[:, :end], v_BTHU[:, :end], seen_TS, scale=scale))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@jax.named_scope("attention")
def _by_name(
    implementation: str,
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
) -> jax.Array:
    """As `causal_attention`, by an implementation of `pallas_kernels.mla_attention`; UserError if it does not run."""
    segments = None if segments_BT is None else (segments_BT, segments_BT)
    attend = functools.partial(mla_attention.attention, implementation=implementation, scale=scale)
    try:
        return attend(q_BTHQ, k_BSZQ, v_BSZU, segments=segments, q_offset=q_offset)[0]
    except ValueError as error:
        raise UserError(
            f"kernels.attention={implementation!r}: {error} In a run, config.kernels.attention=xla."
        ) from error


chunked = functools.partial(_by_name, "chunked")
on_hopper = functools.partial(_by_name, "mosaic_gpu")
on_tpu = functools.partial(_by_name, "mosaic_tpu")
reference = functools.partial(_by_name, "reference")


def computed_by(name: str, seq_len: int) -> str:
    """Returns what computes the attention of training, as text for the log."""
    if name != "xla":
        return name
    limit = f"{RECOMPUTED_FROM:,} tokens"
    return f"xla, chunked (above {limit})" if seq_len > RECOMPUTED_FROM else f"xla, weights kept (up to {limit})"


def _attend(q_BTHQ: jax.Array, k_BSHQ: jax.Array, v_BSHU: jax.Array, seen: jax.Array, *, scale: float) -> jax.Array:
    q_BHTQ, k_BHSQ, v_BHSU = (jnp.swapaxes(x, 1, 2) for x in (q_BTHQ, k_BSHQ, v_BSHU))
    scores_BHTS = jnp.einsum("BHTQ,BHSQ->BHTS", q_BHTQ, k_BHSQ, preferred_element_type=jnp.float32)
    weights_BHTS = masked_softmax(scores_BHTS * scale, seen if seen.ndim == 2 else seen[:, None])
    return jnp.swapaxes(jnp.einsum("BHTS,BHSU->BHTU", weights_BHTS.astype(v_BSHU.dtype), v_BHSU), 1, 2)


LatentCache = tuple[jax.Array, ...]  # c_BSC and k_rope_BSP; or in FP8 entry_BSY, their bytes (`mla_decode.fp8_cache`)


def latent_decode(
    q_latent_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: LatentCache,
    seen_BTS: jax.Array,
    *,
    scale: float,
    table_BN: jax.Array | None = None,
) -> jax.Array:
    """Attention of new tokens to a cache of latents, which all heads read: score = q~ . c + q^R . k^R, o = P c.

    Args:
        q_latent_BTHC, q_rope_BTHP: queries, moved into the latent space, and their rotary parts.
        cache: the latents and rotary keys of all slots; with `table_BN` a pool of pages, whose first axes are pages and
            the slots of a page: of latents and rotary keys, or of their entries in FP8.
        seen_BTS: which slots a token looks at; with `table_BN`, of its sequence's pages side by side.
        scale: factor of the scores.
        table_BN: pages of each sequence in the order of its tokens.

    Returns o_latent_BTHC in the dtype of the queries. `config.kernels.latent_decode` names this one (xla, which stores
    all scores), or one of `pallas_kernels.mla_decode`: `latent_decode_chunked`, any device, some slots at a time;
    `latent_decode_on_hopper`, 16 bits, or FP8 with latents of 512; `latent_decode_on_tpu`.
    """
    c_BSC, k_rope_BSP = _side_by_side(cache, q_rope_BTHP, table_BN)
    wide = {"preferred_element_type": jnp.float32}
    # in this order of axes nothing is transposed, and XLA on a CPU takes its fast products
    scores_BTHS = jnp.einsum("BTHC,BSC->BTHS", q_latent_BTHC, c_BSC, **wide)
    scores_BTHS += jnp.einsum("BTHP,BSP->BTHS", q_rope_BTHP, k_rope_BSP, **wide)
    weights_BTHS = masked_softmax(scores_BTHS * scale, seen_BTS[:, :, None]).astype(q_latent_BTHC.dtype)
    return jnp.einsum("BTHS,BSC->BTHC", weights_BTHS, c_BSC)


def _latent_decode_by_name(
    implementation: str,
    q_latent_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: LatentCache,
    seen_BTS: jax.Array,
    *,
    scale: float,
    table_BN: jax.Array | None = None,
) -> jax.Array:
    """As `latent_decode`, where each token sees the slots up to its own and has the one after the token before it.

    That is so in `cache.Full`. Raises UserError if the implementation does not run.
    """
    lengths_B = jnp.sum(seen_BTS[:, -1], axis=-1, dtype=jnp.int32)
    try:
        pages: mla_decode.Pages | mla_decode.Fp8Pages
        if table_BN is None:
            pages, table = mla_decode.contiguous(*cache)
        else:
            pages, table = (mla_decode.Pages if len(cache) == 2 else mla_decode.Fp8Pages)(*cache), table_BN
        arguments = q_latent_BTHC, q_rope_BTHP, pages, table, lengths_B
        return mla_decode.decode(*arguments, implementation=implementation, scale=scale)[0]
    except ValueError as error:
        raise UserError(
            f"kernels.latent_decode={implementation!r}: {error} In a run, config.kernels.latent_decode=xla."
        ) from error


latent_decode_chunked = functools.partial(_latent_decode_by_name, "chunked")
latent_decode_on_hopper = functools.partial(_latent_decode_by_name, "mosaic_gpu")


def latent_decode_by_size(*arrays: Any, scale: float, table_BN: jax.Array | None = None) -> jax.Array:
    """As `latent_decode`: by XLA where all sequences together have few slots, else by the kernel for Hopper.

    Pages in 16 bits that few heads read, as in V2-Lite, are the kernel's at any size: XLA would put them side by side
    first, in every layer. Entries in FP8 whose bytes are no multiple of 16, which the kernel does not read, are XLA's
    at any size.
    """
    q_latent_BTHC, _, cache, seen_BTS = arrays
    n_sequences, n_tokens, n_slots = seen_BTS.shape
    is_odd = len(cache) == 1 and cache[0].shape[-1] % 16 > 0
    is_in_pages = table_BN is not None and len(cache) == 2 and cache[0].dtype.itemsize == 2
    is_in_pages &= cache[0].shape[1] == work.PAGE
    is_small = n_sequences * n_slots <= FEW_SLOTS
    if is_in_pages and work.are_few(n_tokens, q_latent_BTHC.shape[2]):
        is_small = False
    decode = latent_decode if is_odd or is_small else latent_decode_on_hopper
    return decode(*arrays, scale=scale, table_BN=table_BN)


def latent_decode_on_tpu(
    q_latent_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: LatentCache,
    seen_BTS: jax.Array,
    *,
    scale: float,
    table_BN: jax.Array | None = None,
) -> jax.Array:
    """As `latent_decode`, by the kernel for TPUs, which takes no FP8: such a cache is read first, as XLA reads it."""
    if len(cache) == 1:
        cache, table_BN = _side_by_side(cache, q_rope_BTHP, table_BN), None
    arrays = q_latent_BTHC, q_rope_BTHP, cache, seen_BTS
    return _latent_decode_by_name("mosaic_tpu", *arrays, scale=scale, table_BN=table_BN)


def _side_by_side(cache: LatentCache, q_rope_BTHP: jax.Array, table_BN: jax.Array | None) -> LatentCache:
    """Returns (c_BSC, k_rope_BSP) of each sequence, in the dtype of the queries if they are in FP8."""
    if table_BN is not None:
        cache = tuple(a[table_BN].reshape(len(table_BN), -1, a.shape[-1]) for a in cache)
    if len(cache) == 2:
        return cache
    return tuple(part.astype(q_rope_BTHP.dtype) for part in fp8_cache.decode(cache[0], q_rope_BTHP.shape[-1]))


def grouped_decode(
    q_BTHQ: jax.Array, k_BSZQ: jax.Array, v_BSZU: jax.Array, seen_BTS: jax.Array, *, scale: float
) -> jax.Array:
    """Attention of new tokens to a cache of keys and values, each read by H / Z heads.

    Args:
        q_BTHQ: queries.
        k_BSZQ, v_BSZU: the cache.
        seen_BTS: which slots a token looks at.
        scale: factor of the scores.

    Returns o_BTHU in the dtype of the queries.
    """
    q_BTZJQ = q_BTHQ.reshape(*q_BTHQ.shape[:2], k_BSZQ.shape[2], -1, q_BTHQ.shape[-1])
    scores_BZJTS = jnp.einsum("BTZJQ,BSZQ->BZJTS", q_BTZJQ, k_BSZQ, preferred_element_type=jnp.float32)
    weights_BZJTS = masked_softmax(scores_BZJTS * scale, seen_BTS[:, None, None]).astype(q_BTHQ.dtype)
    o_BTZJU = jnp.einsum("BZJTS,BSZU->BTZJU", weights_BZJTS, v_BSZU)
    return o_BTZJU.reshape(*q_BTHQ.shape[:3], -1)


def masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis of float32 `scores` where `seen` (broadcast against it) holds; 0 elsewhere.

    A row where it holds nowhere comes out uniform: such rows mean nothing and are not to be used.
    """
    return jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
