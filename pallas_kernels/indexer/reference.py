"""Logits of a lightning indexer, as defined, in plain jax.numpy."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Segments = tuple[jax.Array, jax.Array]


def logits(
    q_BTHQ: jax.Array,
    k_BSQ: jax.Array,
    scale_BS: jax.Array,
    weight_BTH: jax.Array,
    q_offset: int | jax.Array,
    segments: Segments | None,
) -> jax.Array:
    """Returns I_BTS, float32 (float64 of float64 weights); -inf where a query does not see a key.

    Arguments as in `pallas_kernels.indexer`, with the scales of q in its weights. [B, H, T, S] exists in between.
    """
    wide = jnp.promote_types(jnp.float32, weight_BTH.dtype)
    exact: dict[str, Any] = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    pairs_BHTS = jnp.einsum("BTHQ,BSQ->BHTS", q_BTHQ.astype(wide), k_BSQ.astype(wide), **exact)
    found_BTS = jnp.einsum("BHTS,BTH->BTS", jnp.maximum(pairs_BHTS, 0), weight_BTH.astype(wide), **exact)
    return jnp.where(seen(q_BTHQ.shape[1], k_BSQ.shape[1], q_offset, segments), found_BTS * scale_BS[:, None], -jnp.inf)


def seen(t: int, s: int, q_offset: int | jax.Array, segments: Segments | None) -> jax.Array:
    """Which keys each query sees, bool [B or 1, T, S]: those of its segment that are not behind it."""
    found = (jnp.arange(s) <= jnp.arange(t)[:, None] + q_offset)[None]
    if segments is None:
        return found
    return found & (segments[0][:, :, None] == segments[1][:, None])
