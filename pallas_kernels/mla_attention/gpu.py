"""Causal attention for Hopper in Pallas Mosaic GPU: what the kernels take, and the two functions of an implementation.

The kernels are in `gpu_forward.py` and `gpu_backward.py`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_attention import gpu_backward, gpu_forward
from pallas_kernels.mla_attention.reference import Segments

NAME = "mosaic_gpu"
CHUNK = 64  # columns
MOST = 320  # columns of a query and a value together: what fits into a thread's registers


def forward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHU, lse_BHT); see `pallas_kernels.mla_attention.api`. Raises ValueError as `check` does."""
    check(q_BTHQ, v_BSZU, scale)
    processors = mosaic_gpu.check_hopper(NAME)
    return gpu_forward.forward(q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, scale=scale, n_processors=processors)


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
    """Returns (dq_BTHQ, dk_BSZQ, dv_BSZU); see `pallas_kernels.mla_attention.api`. The same bits on every run."""
    processors = mosaic_gpu.check_hopper(NAME)
    arguments = q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, lse_BHT, do_BTHU, delta_BHT
    (dq,) = gpu_backward.backward(*arguments, scale=scale, of_keys=False, n_processors=processors)
    dk, dv = gpu_backward.backward(*arguments, scale=scale, of_keys=True, n_processors=processors)
    return dq, dk, dv


def check(q_BTHQ: jax.Array, v_BSZU: jax.Array, scale: float) -> None:
    """Raises ValueError for what the kernels do not take: other dtypes than of 16 bits, odd widths, a scale below 0."""
    width, v_width = q_BTHQ.shape[3], v_BSZU.shape[3]
    instead = "Use implementation='chunked'."
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"implementation={NAME!r}: q, k, v are {q_BTHQ.dtype}, expected bfloat16 or float16. Cast them. {instead}"
        )
    if width % CHUNK or v_width % CHUNK or width + v_width > MOST:
        raise ValueError(
            f"implementation={NAME!r}: queries and keys are {width} wide, values {v_width}; expected multiples of "
            f"{CHUNK} that sum to at most {MOST}. {instead}"
        )
    if not scale > 0:
        raise ValueError(f"implementation={NAME!r}: scale={scale}, expected a positive number. {instead}")
