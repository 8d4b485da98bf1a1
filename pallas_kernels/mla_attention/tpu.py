"""Causal attention for TPUs in Pallas Mosaic TPU: what the kernels take, and the two functions of an implementation.

The kernels are in `tpu_forward.py` and `tpu_backward.py`. They are compiled ahead of time for v5p, v6e and TPU7x and
interpreted on a CPU; they have not yet run on a TPU.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_tpu
from pallas_kernels.mla_attention import tpu_backward, tpu_forward
from pallas_kernels.mla_attention.reference import Segments

NAME = "mosaic_tpu"
CHUNK = 64  # columns
MOST = 256  # columns of a query or a value: what fits into vector memory with the scores


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
    check(q_BTHQ, v_BSZU)
    mosaic_tpu.check_tpu(NAME)
    return tpu_forward.forward(q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, scale=scale)


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
    mosaic_tpu.check_tpu(NAME)
    arguments = q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, lse_BHT, do_BTHU, delta_BHT
    return tpu_backward.backward(*arguments, scale=scale)


def check(q_BTHQ: jax.Array, v_BSZU: jax.Array) -> None:
    """Raises ValueError for what the kernels do not take: other dtypes than bfloat16 and float32, odd widths."""
    width, v_width = q_BTHQ.shape[3], v_BSZU.shape[3]
    instead = "Use implementation='chunked'."
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"implementation={NAME!r}: q, k, v are {q_BTHQ.dtype}, expected bfloat16 or float32. Cast them. {instead}"
        )
    if width % CHUNK or v_width % CHUNK or max(width, v_width) > MOST:
        raise ValueError(
            f"implementation={NAME!r}: queries and keys are {width} wide, values {v_width}; expected multiples of "
            f"{CHUNK} up to {MOST}. {instead}"
        )
