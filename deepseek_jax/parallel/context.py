"""Sequences divided over the devices of a mesh axis, in zig-zag order.

A sequence is cut into 2 n equal chunks. Device i of n holds two of them, numbers i and 2 n - 1 - i:

    n = 4:    0 7 | 1 6 | 2 5 | 3 4

Causal attention gives a chunk as many other chunks to look at as its number says. Those of both chunks together are
2 n - 1 on every device, so all do the same work, and none visits a chunk that comes later. The batch is divided where
it is placed (`mesh.global_batch`). Positions, documents, targets and weights go with their tokens, and layers know
nothing of it but for attention (`layers.divided_attention`), what is counted per sequence, and the next token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError

CONTEXT = "context"  # the mesh axis


def zigzag(n_tokens: int, n_devices: int) -> np.ndarray:
    """Returns which token of a sequence is in which column of a divided batch, int [n_tokens].

    Raises UserError if the tokens do not divide into two chunks per device.
    """
    check_chunks(n_tokens, n_devices)
    if n_devices == 1:  # of which any number of tokens is one chunk
        return np.arange(n_tokens)
    chunks = np.arange(n_tokens).reshape(2 * n_devices, -1)
    return np.stack([chunks[:n_devices], chunks[::-1][:n_devices]], axis=1).reshape(-1)


def check_chunks(n_tokens: int, n_devices: int) -> None:
    """Raises UserError if a sequence does not divide into two equal chunks for each device along the axis."""
    n_chunks = 2 * n_devices
    if n_devices > 1 and n_tokens % n_chunks:
        raise UserError(
            f"config.data.seq_len={n_tokens} does not divide into 2 x config.mesh.context={n_devices} = {n_chunks} "
            f"chunks. Choose a multiple of {n_chunks}."
        )


class Visit(NamedTuple):
    """A chunk of queries, and an earlier chunk of keys that it looks at; int32 scalars."""

    mine: jax.Array  # which of this device's two chunks: 0 or 1
    # device, half: the device that holds the keys, and which of its two chunks they are
    device: jax.Array
    half: jax.Array


@dataclass(frozen=True)
class Context:
    """The devices over which each sequence is divided; its methods work inside `mesh.per_device`.

    Of one device they return what they are given, and no axis need exist.
    """

    n: int  # devices

    @property
    def n_visits(self) -> int:
        """Earlier chunks that the two chunks of a device look at together."""
        return 2 * self.n - 1

    def visit(self, number: jax.Array) -> Visit:
        """Returns the pair of chunks of a visit, 0 <= number < n_visits: first those of this device's earlier chunk."""
        rank = jax.lax.axis_index(CONTEXT)
        is_first = number < rank
        chunk = jnp.where(is_first, number, number - rank)
        device = jnp.minimum(chunk, 2 * self.n - 1 - chunk)
        return Visit(jnp.where(is_first, 0, 1), device, jnp.where(chunk < self.n, 0, 1))

    def places(self, n_here: int) -> jax.Array:
        """Returns where in their sequence the `n_here` tokens of each sequence on this device stand, int32."""
        order = jnp.asarray(zigzag(n_here * self.n, self.n), jnp.int32)
        return order.reshape(self.n, n_here)[jax.lax.axis_index(CONTEXT) if self.n > 1 else 0]

    def whole(self, x_BT: jax.Array) -> jax.Array:
        """Returns [B, n T] from the T tokens on each device, in the order of the sequence."""
        if self.n == 1:
            return x_BT
        divided = jax.lax.all_gather(x_BT, CONTEXT, axis=1, tiled=True)
        return divided[:, np.argsort(zigzag(divided.shape[1], self.n))]

    def own(self, x_BS: jax.Array) -> jax.Array:
        """Returns this device's tokens: the inverse of `whole`."""
        return x_BS if self.n == 1 else x_BS[:, self.places(x_BS.shape[1] // self.n)]

    def total(self, x: Any) -> Any:
        """Returns the sum over the devices of every array in `x`."""
        return x if self.n == 1 else jax.lax.psum(x, CONTEXT)

    def gathered(self, x: Any) -> Any:
        """Returns the arrays of all devices, stacked on a new leading axis."""
        return jax.tree.map(lambda a: jax.lax.all_gather(a, CONTEXT), x)

    def scattered(self, x: Any) -> Any:
        """Returns the sums over the devices of what each has for this one: the transpose of `gathered`."""
        return jax.tree.map(lambda a: jax.lax.psum_scatter(a, CONTEXT), x)


WHOLE = Context(1)  # every sequence is on one device
