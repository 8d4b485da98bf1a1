"""Expert parallelism: send each token to the devices that hold its experts, and bring the results back.

Nothing is dropped. Every device sends every other a buffer of the same size: of a few sizes the smallest that holds the
fullest buffer of this exchange, on which all devices agree, so that the padding follows the load. The largest of them
holds any load; a step of a pipeline always uses it. A token goes once to each device that it needs, however many of its
experts are there.

Paper: V3 section 3.2.2 describes the same exchange with NVSHMEM kernels; here it is XLA's padded all_to_all.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import REPLICAS
from deepseek_jax.precision.wire import AS_IS, Wire, carried

HEADROOM = (1.25, 2.0)  # buffer sizes tried first, in multiples of the size that perfect balance needs


class Buffers(NamedTuple):
    """Which token stands in which row of the buffers that this device sends, W devices x `capacity` rows."""

    token_A: jax.Array  # token of each row; M (one past the last) where the row is empty
    row_MW: jax.Array  # row of each token's copy for each device; W * capacity where the token does not go there


def fill_buffers(goes_MW: jax.Array, capacity: int) -> Buffers:
    """Assigns buffer rows to the tokens that go to each device (`goes_MW`, bool), in the tokens' order."""
    n_tokens, n_devices = goes_MW.shape
    place_MW = jnp.cumsum(goes_MW, axis=0) - 1
    row_MW = jnp.where(goes_MW, jnp.arange(n_devices) * capacity + place_MW, n_devices * capacity)
    tokens_MW = jnp.broadcast_to(jnp.arange(n_tokens)[:, None], row_MW.shape)
    token_A = jnp.full((n_devices * capacity,), n_tokens, jnp.int32).at[row_MW].set(tokens_MW, mode="drop")
    return Buffers(token_A, row_MW)


class Arrived(NamedTuple):
    """The tokens that have come to the experts of this device, W x `capacity` rows, and the way back."""

    x_AD: jax.Array  # the tokens; empty rows are 0
    # experts_AK, weights_AK: their experts here, as indices of this device (`n_local` means none), and factors
    experts_AK: jax.Array
    weights_AK: jax.Array
    row_MW: jax.Array  # row of each of this device's own tokens, for each device, in what comes back


def dispatch(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    n_local: int,
    axis: str,
    capacity: int,
    wire: Wire = AS_IS,
) -> Arrived:
    """Sends each token to the devices of its experts: the first half of the exchange.

    `experts_MK` are indices of all experts, which are split over the mesh axis `axis`, `n_local` per device. The
    buffer for each device has `capacity` rows; it must hold the tokens that go there (`choose`). Tokens travel in the
    format of `wire`, and their gradients come back as they are.
    """
    n_devices = jax.lax.axis_size(axis)
    token_A, row_MW = fill_buffers(_destinations(experts_MK, n_local, n_devices), capacity)

    def buffered(of_tokens: jax.Array, empty: float) -> jax.Array:
        return jnp.take(of_tokens, token_A, axis=0, mode="fill", fill_value=empty)

    def sent(of_tokens: jax.Array, empty: float) -> jax.Array:
        return _send(axis, buffered(of_tokens, empty))

    # Each device turns the global indices that reach it into its own; what belongs to others becomes "none".
    theirs_AK = sent(experts_MK, n_local * n_devices) - jax.lax.axis_index(axis) * n_local
    local_AK = jnp.where((theirs_AK >= 0) & (theirs_AK < n_local), theirs_AK, n_local)
    # At most `n_local` of a token's K experts are here: keep those places and drop the others.
    places_AK = jnp.argsort(local_AK, axis=1)[:, :n_local]
    local_AK, weights_AK = (jnp.take_along_axis(part, places_AK, axis=1) for part in (local_AK, sent(weights_MK, 0)))
    x_AD = carried(buffered(x_MD, 0), wire, AS_IS, functools.partial(_send, axis))
    return Arrived(x_AD, local_AK, weights_AK, row_MW)


def combine(y_AD: jax.Array, arrived: Arrived, *, axis: str, wire: Wire = AS_IS) -> jax.Array:
    """Sends the results back and sums those of each token, y_MD: the second half of the exchange.

    Results travel as they are, their gradients in the format of `wire`.
    """
    back_AD = carried(y_AD, AS_IS, wire, functools.partial(_send, axis))
    return jnp.sum(jnp.take(back_AD, arrived.row_MW, axis=0, mode="fill", fill_value=0), axis=1)


def capacities(n_tokens: int, top_k: int, n_devices: int) -> list[int]:
    """The sizes that a buffer may have, in ascending order; the last one holds any load."""
    balanced = -(-n_tokens * min(top_k, n_devices) // n_devices)
    return sorted({min(int(balanced * room), n_tokens) for room in HEADROOM} | {n_tokens})


def choose(experts_MK: jax.Array, sizes: list[int], *, n_local: int, axis: str) -> jax.Array:
    """Index of the smallest of `sizes` that holds the fullest buffer; the same on all devices.

    So all devices take the same branch, and meet in the same collectives.
    """
    goes_MW = _destinations(experts_MK, n_local, jax.lax.axis_size(axis))
    fullest = jax.lax.pmax(jnp.max(jnp.sum(goes_MW, axis=0)), REPLICAS)
    return jnp.sum(fullest > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)


def on_expert_devices(
    compute: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    n_local: int,
    axis: str,
    wire: Wire = AS_IS,
) -> jax.Array:
    """Weighted sum of each token's experts: `dispatch`, `compute`, `combine`, with buffers of the size that is needed.

    `compute(x_MD, experts_MK, weights_MK)` gives y_MD of this device's experts, where index `n_local` means none; other
    arguments as for `dispatch`.
    """
    n_tokens, top_k = experts_MK.shape
    sizes = capacities(n_tokens, top_k, jax.lax.axis_size(axis))

    def exchange(capacity: int) -> Callable:
        def run(*of_tokens: jax.Array) -> jax.Array:
            arrived = dispatch(*of_tokens, n_local=n_local, axis=axis, capacity=capacity, wire=wire)
            return combine(compute(*arrived[:3]), arrived, axis=axis, wire=wire)

        return jax.checkpoint(run)  # else the backward pass would keep the buffers of every branch, taken or not

    choice = choose(experts_MK, sizes, n_local=n_local, axis=axis)
    return jax.lax.switch(choice, [exchange(capacity) for capacity in sizes], x_MD, experts_MK, weights_MK)


def on_this_device(
    compute: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    wire: Wire = AS_IS,
) -> jax.Array:
    """As `on_expert_devices` where all experts are here: nothing is sent, but rounded as if it were."""
    y_MD = compute(carried(x_MD, wire, AS_IS, _stay), experts_MK, weights_MK)
    return carried(y_MD, AS_IS, wire, _stay)


def _stay(rows_AD: jax.Array) -> jax.Array:
    return rows_AD


def _destinations(experts_MK: jax.Array, n_local: int, n_devices: int) -> jax.Array:
    """goes_MW: whether a token goes to a device."""
    return jax.nn.one_hot(experts_MK // n_local, n_devices, dtype=jnp.bool_).any(axis=1)


def _send(axis: str, rows_AD: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(rows_AD, axis, split_axis=0, concat_axis=0, tiled=True)
