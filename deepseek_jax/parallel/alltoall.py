"""Expert parallelism: send each token to the devices that hold its experts, and bring the results back.

Nothing is dropped.  Every device sends every other a buffer of the same size; that size is the smallest of a few that
holds the fullest buffer of the step, agreed on by all devices (the last one holds the worst case), so the padding
follows the real load.  A token goes once to each device that it needs, however many of its experts live there.

Paper: V3 section 3.2.2 describes the same exchange with NVSHMEM kernels; here it is XLA's padded all_to_all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import REPLICAS

HEADROOM = (1.25, 2.0)  # buffer sizes tried first, in multiples of the size that perfect balance needs


class Buffers(NamedTuple):
    """Which token stands in which row of the buffers that this device sends, W devices x `capacity` rows.

    Attributes:
        token_A: token of each row; M (one past the last) where the row is empty.
        row_MW: row of each token's copy for each device; W * capacity where the token does not go there.
    """

    token_A: jax.Array
    row_MW: jax.Array


def fill_buffers(goes_MW: jax.Array, capacity: int) -> Buffers:
    """Assigns buffer rows to the tokens that go to each device (`goes_MW`, bool), in the tokens' order."""
    n_tokens, n_devices = goes_MW.shape
    place_MW = jnp.cumsum(goes_MW, axis=0) - 1
    row_MW = jnp.where(goes_MW, jnp.arange(n_devices) * capacity + place_MW, n_devices * capacity)
    tokens_MW = jnp.broadcast_to(jnp.arange(n_tokens)[:, None], row_MW.shape)
    token_A = jnp.full((n_devices * capacity,), n_tokens, jnp.int32).at[row_MW].set(tokens_MW, mode="drop")
    return Buffers(token_A, row_MW)


def on_expert_devices(
    compute: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    n_local: int,
    axis: str,
) -> jax.Array:
    """Weighted sum of each token's experts, where the experts are shared out over mesh axis `axis`.

    Args:
        compute: `compute(x_MD, experts_MK, weights_MK) -> y_MD` with this device's experts; index `n_local` means none.
        x_MD: this device's tokens.
        experts_MK, weights_MK: their experts (global indices) and factors.
        n_local: experts per device.
        axis: the mesh axis.

    Returns:
        y_MD.
    """
    n_devices = jax.lax.axis_size(axis)
    n_tokens, top_k = experts_MK.shape
    goes_MW = jax.nn.one_hot(experts_MK // n_local, n_devices, dtype=jnp.bool_).any(axis=1)
    # All devices take the same branch, and so meet in the same collectives.
    fullest = jax.lax.pmax(jnp.max(jnp.sum(goes_MW, axis=0)), REPLICAS)
    balanced = -(-n_tokens * min(top_k, n_devices) // n_devices)
    capacities = sorted({min(int(balanced * room), n_tokens) for room in HEADROOM} | {n_tokens})

    def exchange(capacity: int) -> Callable:
        def run(operands: tuple) -> jax.Array:
            return _exchange(compute, *operands, n_local=n_local, axis=axis, capacity=capacity)

        return jax.checkpoint(run)  # else the backward pass would keep the buffers of every branch, taken or not

    choice = sum((fullest > capacity).astype(jnp.int32) for capacity in capacities[:-1]) if len(capacities) > 1 else 0
    operands = (x_MD, experts_MK, weights_MK, goes_MW)
    return jax.lax.switch(choice, [exchange(capacity) for capacity in capacities], operands)


def _exchange(compute, x_MD, experts_MK, weights_MK, goes_MW, *, n_local: int, axis: str, capacity: int) -> jax.Array:
    n_devices = goes_MW.shape[1]
    token_A, row_MW = fill_buffers(goes_MW, capacity)

    def send(rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)

    def copies(of_tokens: jax.Array, empty: float) -> jax.Array:
        return jnp.take(of_tokens, token_A, axis=0, mode="fill", fill_value=empty)

    # Each device turns the global indices that reach it into its own; what belongs to others becomes "none".
    theirs_AK = send(copies(experts_MK, n_local * n_devices)) - jax.lax.axis_index(axis) * n_local
    local_AK = jnp.where((theirs_AK >= 0) & (theirs_AK < n_local), theirs_AK, n_local)
    # At most `n_local` of a token's K experts live here: keep those places and drop the others.
    places_AK = jnp.argsort(local_AK, axis=1)[:, :n_local]
    local_AK, weights_AK = (
        jnp.take_along_axis(part, places_AK, axis=1) for part in (local_AK, send(copies(weights_MK, 0)))
    )
    y_AD = compute(send(copies(x_MD, 0)), local_AK, weights_AK)
    back_AD = send(y_AD)
    return jnp.sum(jnp.take(back_AD, row_MW, axis=0, mode="fill", fill_value=0), axis=1)
