"""Attention of each query to keys of its own, where every head has keys and values: the expanded form, for training.

    P_ij = exp(scale q_i . k_j - lse_i)  for j in S_i, else 0        o_i = sum_j P_ij v_j

The sets S_i come as bits. On Hopper the kernels of `mla_attention` visit the blocks of keys in which some query of a
tile has one, forward and backward, and hide by the bits: dense products, of which those outside the sets are lost. Over
2,048 keys of a query that costs less than gathering latents until a sequence has some 14,000 tokens: a pair takes
2 (192 + 128) operations here and 2 (576 + 512) there, and sums over the queries of a key have one owner and one order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mla_attention import SAVED, bits

IMPLEMENTATIONS = ("reference", "mosaic_gpu")


def attend_expanded(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHU: jax.Array,
    words_BWT: jax.Array,
    *,
    implementation: str,
    scale: float,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to keys that bits choose: (o_BTHU in the dtype of v, lse_BHT float32). Differentiable in q, k and v.

    A query without keys gives o = 0 and lse = -inf, and adds nothing to any gradient; lse itself passes none on.

    Args:
        q_BTHQ: queries.
        k_BSHQ, v_BSHU: keys and values of each head, in the dtype of q; those of no query must be finite as well.
        words_BWT: which keys each query attends to, by `mla_attention.bits.packed`, W = ceil(S / 32).
        implementation: "reference" (any device, stores all scores) or "mosaic_gpu" (Hopper, 16 bits, widths that are
            multiples of 64 and sum to at most 320). There is no fallback from one to another.
        scale: factor of the scores.
        interpret: runs the kernels on a CPU (JAX 0.11 and later).

    Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1, eq. 2.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    shapes = f"q {q_BTHQ.shape}, k {k_BSHQ.shape}, v {v_BSHU.shape}, words {words_BWT.shape} {words_BWT.dtype}"
    (b, t), s = q_BTHQ.shape[:2], k_BSHQ.shape[1]
    if k_BSHQ.shape != (b, s, *q_BTHQ.shape[2:]) or v_BSHU.shape[:3] != k_BSHQ.shape[:3]:
        raise ValueError(f"{shapes}: expected [B, T, H, Q], [B, S, H, Q] and [B, S, H, U].")
    if words_BWT.shape != (b, -(-s // bits.WORD), t) or words_BWT.dtype != jnp.int32:
        raise ValueError(f"{shapes}: expected words [B, ceil(S / 32), T], int32.")
    if implementation == "reference":
        return _reference(q_BTHQ, k_BSHQ, v_BSHU, words_BWT, scale)
    if interpret is None:
        from pallas_kernels.mla_attention import gpu  # Mosaic GPU is not part of every JAX build

        gpu.check(q_BTHQ, v_BSHU, scale)
    return _attend(q_BTHQ, k_BSHQ, v_BSHU, words_BWT, scale, interpret)


def _reference(
    q_BTHQ: jax.Array, k_BSHQ: jax.Array, v_BSHU: jax.Array, words_BWT: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The definition, in float32, or in float64 for float64 inputs."""
    wide = jnp.promote_types(jnp.float32, q_BTHQ.dtype)
    q, k, v = (x.astype(wide) for x in (q_BTHQ, k_BSHQ, v_BSHU))
    seen_BHTS = bits.unpacked(words_BWT, k.shape[1])[:, None]
    scores_BHTS = jnp.einsum("BTHQ,BSHQ->BHTS", q, k, precision=lax.Precision.HIGHEST) * scale
    some_BHT = jnp.any(seen_BHTS, axis=-1)
    lse_BHT = jax.nn.logsumexp(jnp.where(seen_BHTS, scores_BHTS, -1e30), axis=-1)
    weights_BHTS = jnp.exp(jnp.where(seen_BHTS, scores_BHTS - lse_BHT[..., None], -jnp.inf))
    o_BTHU = jnp.einsum("BHTS,BSHU->BTHU", weights_BHTS, v, precision=lax.Precision.HIGHEST)
    return o_BTHU.astype(v_BSHU.dtype), lax.stop_gradient(jnp.where(some_BHT, lse_BHT, -jnp.inf))


def _processors(interpret: object) -> int:
    from pallas_kernels import mosaic_gpu

    return 2 if interpret else mosaic_gpu.check_hopper("mosaic_gpu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array, scale: float, interpret: object) -> tuple:
    from pallas_kernels.mla_attention import gpu_forward

    return gpu_forward.forward(
        q, k, v, None, k.shape[1] - q.shape[1],
        scale=scale, chosen_BWT=words, n_processors=_processors(interpret), interpret=interpret,
    )  # fmt: skip


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array, scale: float, interpret: object) -> tuple:
    results = _attend(q, k, v, words, scale, interpret)
    o, lse = (checkpoint_name(x, name) for x, name in zip(results, SAVED, strict=True))
    return (o, lse), (q, k, v, words, o, lse)


def _backward(scale: float, interpret: object, saved: tuple, gradients: tuple) -> tuple:
    from pallas_kernels.mla_attention import gpu_backward

    q, k, v, words, o, lse = saved
    do = gradients[0]
    delta_BHT = jnp.einsum("BTHU,BTHU->BHT", do.astype(jnp.float32), o.astype(jnp.float32))
    delta_BHT = jnp.where(lse == -jnp.inf, 0.0, delta_BHT)
    by_key = bits.transposed(words, k.shape[1])
    arguments = q, k, v, None, k.shape[1] - q.shape[1], lse, do, delta_BHT
    options: dict[str, Any] = {"scale": scale, "n_processors": _processors(interpret), "interpret": interpret}
    (dq,) = gpu_backward.backward(*arguments, of_keys=False, chosen=words, **options)
    dk, dv = gpu_backward.backward(*arguments, of_keys=True, chosen=by_key, **options)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)
