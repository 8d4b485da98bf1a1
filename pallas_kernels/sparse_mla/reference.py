"""Latent attention over chosen rows, as defined, in plain jax.numpy."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def attend(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    c_NC: jax.Array,
    rope_NP: jax.Array,
    row_BTO: jax.Array,
    count_BT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHC, lse_BTH), computed in float32, or in float64 for float64 inputs."""
    wide = jnp.promote_types(jnp.float32, q_c_BTHC.dtype)
    exact: dict[str, Any] = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    counts_BTO = jnp.arange(row_BTO.shape[2]) < count_BT[..., None]
    row_BTO = jnp.where(counts_BTO, row_BTO, 0)
    c_BTOC, rope_BTOP = (jnp.where(counts_BTO[..., None], x[row_BTO], 0).astype(wide) for x in (c_NC, rope_NP))
    scores = jnp.einsum("BTHC,BTOC->BTHO", q_c_BTHC.astype(wide), c_BTOC, **exact)
    scores += jnp.einsum("BTHP,BTOP->BTHO", q_rope_BTHP.astype(wide), rope_BTOP, **exact)
    scores = jnp.where(counts_BTO[:, :, None], scores * scale, -jnp.inf)
    lse_BTH = jax.nn.logsumexp(scores, axis=-1)
    some = jnp.where(lse_BTH == -jnp.inf, 0, lse_BTH)
    weights = jnp.exp(scores - some[..., None])
    return jnp.einsum("BTHO,BTOC->BTHC", weights, c_BTOC, **exact).astype(q_c_BTHC.dtype), lse_BTH
