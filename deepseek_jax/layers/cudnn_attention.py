"""Causal softmax attention by cuDNN's fused kernels, which JAX calls on NVIDIA GPUs.

The same function as `layers.attention.causal_attention`: scores stay on the chip in both directions, and the backward
pass computes them again from the log-sum-exp of each row. Gradients are sums in no fixed order, so two runs may differ
in the last bit.
"""

import jax
import jax.numpy as jnp

from deepseek_jax import compat
from deepseek_jax.errors import UserError

ADVICE = "In a run, set config.kernels.attention=xla."


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
    """Attention of each token to itself and the tokens before it; arguments and result as those of the XLA version.

    Values that are narrower than queries need a Hopper GPU or later, and cuDNN 9.10 or later.

    Raises:
        UserError: another device, a dtype other than bfloat16 and float16, documents that must not see one another, a
            prompt read in parts, or sizes that cuDNN does not support.
    """
    if segments_BT is not None:
        raise UserError(
            "kernels.attention='cudnn' does not keep documents apart. Set config.data.mask_documents=False, or "
            "config.kernels.attention=xla."
        )
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"kernels.attention='cudnn': {q_BTHQ.dtype} activations, expected bfloat16. {ADVICE}")
    if jax.default_backend() != "gpu":
        raise UserError(f"kernels.attention='cudnn' on {jax.default_backend()}: needs an NVIDIA GPU. {ADVICE}")
    if k_BSZQ.shape[1] != q_BTHQ.shape[1] or not isinstance(q_offset, int) or q_offset:
        raise UserError(
            f"kernels.attention='cudnn': {q_BTHQ.shape[1]} queries over {k_BSZQ.shape[1]} keys, expected as many, from "
            f"position 0 on. {ADVICE}"
        )
    n_shared = q_BTHQ.shape[2] // k_BSZQ.shape[2]
    k_BTHQ, v_BTHU = (jnp.repeat(x, n_shared, axis=2) if n_shared > 1 else x for x in (k_BSZQ, v_BSZU))
    try:
        return compat.cudnn_causal_attention(q_BTHQ, k_BTHQ, v_BTHU, scale)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"kernels.attention='cudnn': {error} {ADVICE}") from error
