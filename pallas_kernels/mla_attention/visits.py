"""Which blocks of keys a tile of queries has to visit, or which blocks of queries a tile of keys.

A block is skipped if no pair of it is visible, and needs no mask if all of them are. Of the blocks along a tile these
are runs:

    first ...... whole_from ......... whole_to ...... end
          masked            unmasked          masked

Causality alone gives them exactly. Documents are compared by the smallest and the largest id of a tile, which is exact
for packed documents, whose ids ascend, and visits too many blocks otherwise, never too few.
"""

import heapq
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.mla_attention.reference import Segments


def visits_of_queries(
    sizes: tuple[int, int], tiles: tuple[int, int], segments: Segments | None, q_offset: int | jax.Array
) -> jax.Array:
    """Returns int32 [B or 1, tiles of queries, 4]: the blocks of keys (first, whole_from, whole_to, end) of each.

    There is always at least one block, so that a kernel needs no case for none. `sizes` and `tiles` are lengths and
    tile lengths along (queries, keys).
    """
    some, whole = _visible(sizes, tiles, segments, q_offset)
    return _runs(some, whole)


def visits_of_keys(
    sizes: tuple[int, int], tiles: tuple[int, int], segments: Segments | None, q_offset: int | jax.Array
) -> jax.Array:
    """Returns int32 [B or 1, tiles of keys, 4]: the blocks of queries of each; else as `visits_of_queries`."""
    some, whole = _visible(sizes, tiles, segments, q_offset)
    return _runs(some.swapaxes(1, 2), whole.swapaxes(1, 2))


def visits_of(some: jax.Array) -> jax.Array:
    """Returns the blocks from the first to the last in which `some` [B, tiles, blocks] pair is visible, all masked.

    The run without a mask is empty and lies at 0, before any first block: a CTA of a cluster may begin before its own.
    """
    return _runs(some, jnp.zeros_like(some)).at[..., 1:3].set(0)


def _visible(sizes: tuple, tiles: tuple, segments: Segments | None, q_offset: int | jax.Array) -> tuple:
    """Whether some pair, and whether every pair of a tile of queries and one of keys is visible: [B or 1, .., ..]."""
    (t, s), (rows, keys) = sizes, tiles
    row = jnp.arange(-(-t // rows))[:, None] * rows
    key = jnp.arange(-(-s // keys))[None, :] * keys
    some = key <= jnp.minimum(row + rows, t) - 1 + q_offset
    whole = (key + keys - 1 <= row + q_offset) & (key + keys <= s)
    if segments is None:
        return some[None], whole[None]
    (q_low, q_high), (k_low, k_high) = (_extremes(ids, tile) for ids, tile in zip(segments, tiles, strict=True))
    near = (k_low[:, None] <= q_high[:, :, None]) & (k_high[:, None] >= q_low[:, :, None])
    alike = (q_low == q_high)[:, :, None] & (k_low == k_high)[:, None] & (q_low[:, :, None] == k_low[:, None])
    return some & near, whole & alike


def _extremes(ids: jax.Array, tile: int) -> tuple:
    """Smallest and largest id of each tile, [B, tiles]."""
    filled = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % tile)), mode="edge").reshape(ids.shape[0], -1, tile)
    return filled.min(axis=2), filled.max(axis=2)


def _runs(some: jax.Array, whole: jax.Array) -> jax.Array:
    """The runs along the last axis."""
    n = some.shape[-1]
    block = jnp.arange(n)
    first = jnp.min(jnp.where(some, block, n - 1), axis=-1)
    end = jnp.maximum(jnp.max(jnp.where(some, block + 1, 0), axis=-1), first + 1)
    whole_from = jnp.min(jnp.where(whole, block, n), axis=-1)
    whole_from = jnp.where(whole_from < n, whole_from, first)
    broken = ~whole & (block >= whole_from[..., None])
    whole_to = jnp.min(jnp.where(broken, block, n), axis=-1)
    return jnp.stack([first, whole_from, whole_to, end], axis=-1).astype(jnp.int32)


def jobs(costs: Sequence[float], n_groups: int, n_workers: int) -> jax.Array:
    """Divides jobs among workers ahead of time, as if each took the next one when done: int32 [workers, 1 + most].

    Job j of group g is number g * len(costs) + j. Those of a group follow one another, because they find their operands
    in the cache, the longest first. The last groups are mixed, the longest of all first, so that no long job begins
    when others are nearly done. A worker's row is how many jobs it has, then their numbers.

    Args:
        costs: of the jobs of a group.
        n_groups: how many times these jobs are there.
        n_workers: how many work at the same time.
    """
    n = len(costs)
    mixed = min(n_groups, math.ceil(3 * n_workers * max(costs) / sum(costs)))  # three times what the longest takes
    in_group = sorted(range(n), key=lambda j: -costs[j])
    numbers = [g * n + j for g in range(n_groups - mixed) for j in in_group]
    numbers += [g * n + j for j in in_group for g in range(n_groups - mixed, n_groups)]
    mine: list[list[int]] = [[] for _ in range(min(n_workers, len(numbers)))]
    free = [(0.0, worker) for worker in range(len(mine))]
    for number in numbers:
        busy, worker = free[0]
        heapq.heapreplace(free, (busy + costs[number % n], worker))
        mine[worker].append(number)
    most = max(map(len, mine))
    return jnp.array([[len(own), *own, *[0] * (most - len(own))] for own in mine], jnp.int32)
