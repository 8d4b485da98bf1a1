"""The weights of attention, mean over the heads: what an indexer learns by.

    p_ij = 1/H sum_h exp(scale q_hi . k_hj - lse_hi)  for j in S_i, else 0

Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1.1 (the target of the indexer's loss).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_attention import bits

IMPLEMENTATIONS = ("reference", "mosaic_gpu")


def mean_weights(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    lse_BHT: jax.Array,
    words_BWT: jax.Array,
    *,
    implementation: str,
    scale: float,
    interpret: object = None,
) -> jax.Array:
    """Returns p_BTS, float32 (float64 for float64 inputs); no gradients.

    Args:
        q_BTHQ, k_BSHQ: queries and keys.
        lse_BHT: logarithms of the sums of exponentiated scores, as `attend_expanded` gives them.
        words_BWT: the keys of each query, as there.
        implementation: "reference" (any device, stores the scores of all heads) or "mosaic_gpu" (Hopper, 16 bits, a
            width that is a multiple of 64, at most 192). There is no fallback from one to another.
        scale: factor of the scores.
        interpret: runs the kernel on a CPU (JAX 0.11 and later).

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    (b, t, h, width), s = q_BTHQ.shape, k_BSHQ.shape[1]
    words = (b, -(-s // bits.WORD), t), jnp.int32
    if k_BSHQ.shape != (b, s, h, width) or lse_BHT.shape != (b, h, t) or (words_BWT.shape, words_BWT.dtype) != words:
        raise ValueError(
            f"q {q_BTHQ.shape}, k {k_BSHQ.shape}, lse {lse_BHT.shape}, words {words_BWT.dtype} {words_BWT.shape}: "
            "expected [B, T, H, Q], [B, S, H, Q], [B, H, T] and int32 [B, ceil(S / 32), T]."
        )
    if implementation == "reference":
        wide = jnp.promote_types(jnp.float32, q_BTHQ.dtype)
        q, k = q_BTHQ.astype(wide), k_BSHQ.astype(wide)
        scores_BHTS = jnp.einsum("BTHQ,BSHQ->BHTS", q, k, precision=lax.Precision.HIGHEST) * scale
        seen_BHTS = bits.unpacked(words_BWT, s)[:, None]
        return jnp.mean(jnp.exp(jnp.where(seen_BHTS, scores_BHTS - lse_BHT[..., None], -jnp.inf)), axis=1)
    from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build
    from pallas_kernels.sparse_mla import gpu_mean

    gpu_mean.check(q_BTHQ, scale)
    if interpret is None:
        mosaic_gpu.check_hopper("mosaic_gpu")
    return gpu_mean.mean_weights(q_BTHQ, k_BSHQ, lse_BHT, words_BWT, scale=scale, interpret=interpret)
