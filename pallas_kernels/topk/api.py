"""The public function: arguments are checked once, then the named implementation runs."""

import jax
import jax.numpy as jnp

from pallas_kernels.topk import reference, threshold

IMPLEMENTATIONS = ("reference", "threshold", "triton")


def top_k(scores: jax.Array, k: int, *, implementation: str) -> jax.Array:
    """Positions of the k largest numbers of each row, exactly, in ascending order: int32 [..., k].

    Of equal numbers those at the lowest positions are chosen; both zeros are equal. Numbers that are -inf are never
    chosen: -1 stands behind the others where a row has fewer than k. NaN must not occur.

    Args:
        scores: float32 [..., S].
        k: how many.
        implementation: "reference" (any device, sorts), "threshold" (any device, counts 32 times) or "triton" (NVIDIA
            GPUs; of more than 32,768 numbers in over 32 rows the best 16,384 at most). There is no fallback from one
            to another.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if scores.ndim == 0 or 0 in scores.shape or scores.dtype != jnp.float32 or k < 1:
        raise ValueError(
            f"scores {scores.dtype} {scores.shape}, k={k}: expected float32 [..., S], no empty axis, k > 0."
        )
    rows = scores.reshape(-1, scores.shape[-1])
    if implementation == "triton":
        from pallas_kernels.topk import gpu  # not part of every JAX build

        if jax.default_backend() != "gpu":
            raise ValueError(f"implementation='triton' on {jax.default_backend()}: needs an NVIDIA GPU.")
        found = gpu.top_k(rows, k)
    else:
        found = {"reference": reference, "threshold": threshold}[implementation].top_k(rows, k)
    return found.reshape(*scores.shape[:-1], k)
