"""The definition in plain jax.numpy; each chosen expert's weights are copied first.

Paper: V3 section 2.1.2, eq. 12.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.layout import Scaled

BLOCK = 128  # rows and columns of codes with one scale


def experts(
    x_MD: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    chosen_MK: jax.Array,
    weight_MK: jax.Array,
) -> jax.Array:
    """Returns y_MD, summed in float32."""
    of_each = zip(x_MD, chosen_MK, weight_MK, strict=True)
    weights = gate_XDF, up_XDF, down_XFD
    return jnp.stack([_of_one(x_D, *weights, chosen_K, weight_K) for x_D, chosen_K, weight_K in of_each])


def _of_one(
    x_D: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    chosen_K: jax.Array,
    weight_K: jax.Array,
) -> jax.Array:
    x_D, gate_KDF, up_KDF, down_KFD = (
        array.astype(jnp.float32) for array in (x_D, gate_XDF[chosen_K], up_XDF[chosen_K], down_XFD[chosen_K])
    )
    gate_KF, up_KF = (jnp.einsum("D,KDF->KF", x_D, w_KDF, precision="highest") for w_KDF in (gate_KDF, up_KDF))
    hidden_KF = weight_K[:, None] * jax.nn.silu(gate_KF) * up_KF
    return jnp.einsum("KF,KFD->D", hidden_KF, down_KFD, precision="highest")


def experts_in_codes(
    x_D: jax.Array, gate: Scaled, up: Scaled, down: Scaled, chosen_K: jax.Array, weight_K: jax.Array
) -> jax.Array:
    """Returns y_D, summed in float32, in the dtype of x, from float32 weights."""
    gate_KDF, up_KDF, down_KFD = (jnp.swapaxes(_values(w, chosen_K), 1, 2) for w in (gate, up, down))
    return _of_one(x_D, gate_KDF, up_KDF, down_KFD, jnp.arange(chosen_K.size), weight_K)


def _values(w: Scaled, chosen_K: jax.Array) -> jax.Array:
    """The numbers of the chosen matrices, [K, rows, columns], float32."""
    codes, scale = w.codes[chosen_K], w.scale[chosen_K]
    scale = jnp.repeat(jnp.repeat(scale, BLOCK, axis=1), BLOCK, axis=2)
    return codes.astype(jnp.float32) * scale[:, : codes.shape[1], : codes.shape[2]]
