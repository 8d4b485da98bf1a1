"""What the TPU kernels of attention have in common: tiles, the order in which pairs of them are computed, and masks.

A kernel owns a tile of one sequence, of queries or of keys, and visits blocks of the other; `visits.py` says which.
The grid walks over sequences, heads and, innermost, a list of these pairs, made on the device and read from scalar
memory: blocks that no pair is visible in are neither loaded nor stepped over. Pairs of one tile follow one another, so
that its sums stay in vector memory.

    tile_V, block_V    the pairs; tiles are counted through all sequences where documents make their lists differ
    runs_R             four numbers per tile, as `visits.py` has them
    offset             position of the first query

The kernels read matrices with heads first, [B, H, T, Q], filled up with zeros to whole tiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_tpu
from pallas_kernels.mla_attention import visits
from pallas_kernels.mla_attention.reference import Segments

MOST = (512, 512)  # queries and keys of a tile, at most
MOST_PAIRS = 2**16  # of a list in scalar memory, of which chips have 1 MiB
N_LISTS = 4
LOG2_E = math.log2(math.e)


class Lists(NamedTuple):
    """The pairs, for scalar memory; how many there are, for the grid."""

    tile_V: jax.Array
    block_V: jax.Array
    runs_R: jax.Array
    offset: jax.Array
    n_pairs: jax.Array


class Pair(NamedTuple):
    """A tile and a block, as a kernel meets them; scalars."""

    tile: jax.Array  # of its sequence
    block: jax.Array
    is_first: jax.Array  # of the tile's pairs
    is_last: jax.Array
    is_whole: jax.Array  # every query sees every key
    offset: jax.Array  # position of the first query


@dataclass(frozen=True)
class Plan:
    """What is known of a call when it is traced."""

    b: int
    t: int
    s: int
    h: int
    z: int
    scale: float
    documents: bool
    of_keys: bool  # a kernel owns a tile of keys, and visits blocks of queries
    most: tuple[int, int]

    @property
    def tiles(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return _tile(self.t, self.most[0]), _tile(self.s, self.most[1])

    @property
    def counts(self) -> tuple[int, int]:
        """Tiles of the sequence that a kernel owns, and of the other."""
        queries, keys = (-(-n // tile) for n, tile in zip((self.t, self.s), self.tiles, strict=True))
        return (keys, queries) if self.of_keys else (queries, keys)

    @property
    def sequences(self) -> int:
        """Of the grid; with documents all are in the list."""
        return 1 if self.documents else self.b

    def lists(self, segments: Segments | None, q_offset: int | jax.Array) -> Lists:
        """Returns the pairs of a call."""
        find = visits.visits_of_keys if self.of_keys else visits.visits_of_queries
        runs_R4 = find((self.t, self.s), self.tiles, segments, q_offset).reshape(-1, 4)
        count_R = runs_R4[:, 3] - runs_R4[:, 0]
        through_R = jnp.cumsum(count_R)
        most = self.most_pairs(q_offset)
        tile_V = jnp.repeat(jnp.arange(len(runs_R4), dtype=jnp.int32), count_R, total_repeat_length=most)
        block_V = jnp.arange(most, dtype=jnp.int32) - (through_R - count_R - runs_R4[:, 0])[tile_V]
        offset = jnp.full((1,), q_offset, jnp.int32)
        return Lists(tile_V, block_V.astype(jnp.int32), runs_R4.reshape(-1), offset, through_R[-1])

    def most_pairs(self, q_offset: int | jax.Array) -> int:
        """Returns an upper bound for the pairs in a list; of an offset known only later, all pairs there are."""
        (rows, keys), of_sequences = self.tiles, self.b if self.documents else 1
        if not isinstance(q_offset, int):
            return math.prod(self.counts) * of_sequences
        pairs = sum(
            max(0, min(-(-(min(row + rows, self.t) + q_offset) // keys), -(-self.s // keys)))
            for row in range(0, self.t, rows)
        )
        return (pairs + self.counts[0]) * of_sequences  # a tile that no block is visible to visits one

    def pair(self, v: Any, lists: Sequence) -> Pair:
        """Returns pair v of the lists in scalar memory."""
        tile_V, block_V, runs_R, offset = lists
        tile, block = tile_V[v], block_V[v]
        first, whole_from, whole_to, end = (runs_R[4 * tile + i] for i in range(4))
        is_whole = (whole_from <= block) & (block < whole_to)
        return Pair(lax.rem(tile, self.counts[0]), block, block == first, block == end - 1, is_whole, offset[0])

    def spec(self, shape: tuple, of_tile: bool, at: Callable) -> pl.BlockSpec:
        """A block of an operand: `at(sequence, i, *rest of the grid)`, i its place along the tokens.

        `of_tile`: i is the tile, not the block that it visits.
        """

        def index(sequence: Any, head: Any, v: Any, *rest: Any) -> tuple:
            *inner, tile_V, block_V, _, _ = rest
            tile = tile_V[v]
            i = lax.rem(tile, self.counts[0]) if of_tile else block_V[v]
            return at(sequence + lax.div(tile, self.counts[0]), i, head, *inner)

        return pl.BlockSpec(shape, index)

    def matrix(self, of_queries: bool, width: int, head: Callable = lambda head, *_: head) -> pl.BlockSpec:
        """A tile of a matrix with heads first; `head` says whose, from the place in the grid behind the sequence's."""
        shape = None, None, self.tiles[0 if of_queries else 1], width
        return self.spec(shape, of_queries != self.of_keys, lambda b, i, *place: (b, head(*place), i, 0))

    def row(self, of_queries: bool, head: Callable = lambda head, *_: head) -> pl.BlockSpec:
        """A tile of `filled_rows`, of numbers per head and token."""
        shape = None, None, 1, self.tiles[0 if of_queries else 1]
        return self.spec(shape, of_queries != self.of_keys, lambda b, i, *place: (b, head(*place), 0, i))

    def ids(self, segments: Segments | None) -> tuple[list, list]:
        """Documents of queries and keys as operands: (arrays, their blocks)."""
        if segments is None:
            return [], []
        arrays = [self.filled_rows(ids, of_queries) for ids, of_queries in zip(segments, (True, False), strict=True)]
        specs = [
            self.spec((None, 1, tile), of_queries != self.of_keys, lambda b, i, *_: (b, 0, i))
            for tile, of_queries in zip(self.tiles, (True, False), strict=True)
        ]
        return arrays, specs

    def filled(self, x_BTHQ: jax.Array, of_queries: bool) -> jax.Array:
        """[B, T, H, Q] -> [B, H, T, Q], filled up to whole tiles."""
        extra = -x_BTHQ.shape[1] % self.tiles[0 if of_queries else 1]
        return jnp.pad(x_BTHQ.swapaxes(1, 2), ((0, 0), (0, 0), (0, extra), (0, 0)))

    def filled_rows(self, x: jax.Array, of_queries: bool) -> jax.Array:
        """[..., T] -> [..., 1, T], filled up to whole tiles: numbers of queries or keys, side by side along lanes."""
        extra = -x.shape[-1] % self.tiles[0 if of_queries else 1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])[..., None, :]

    def seen(self, pair: Pair, ids: Sequence) -> jax.Array:
        """Which keys the queries of a pair see: bool, tile along rows, block along columns.

        `ids`: documents of queries and keys, each a row; () for one document.
        """
        rows, keys = self.tiles
        query_axis = 1 if self.of_keys else 0
        shape = (keys, rows) if self.of_keys else (rows, keys)
        i, j = (pair.block, pair.tile) if self.of_keys else (pair.tile, pair.block)
        query = i * rows + pair.offset + lax.broadcasted_iota(jnp.int32, shape, query_axis)
        key = j * keys + lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
        seen = (key <= query) & (key < self.s)
        if not ids:
            return seen
        of_queries, of_keys = (ref[0] for ref in ids)
        own, others = (of_keys, of_queries) if self.of_keys else (of_queries, of_keys)
        return seen & (own[:, None] == others[None, :])


def _tile(n: int, most: int) -> int:
    return mosaic_tpu.tile(-(-n // mosaic_tpu.BLOCK) * mosaic_tpu.BLOCK, most)


def check_pairs(plan: Plan, q_offset: int | jax.Array) -> None:
    """Raises ValueError if the list of one sequence's pairs does not fit into scalar memory."""
    n = plan.most_pairs(q_offset) // (plan.b if plan.documents else 1)
    if n > MOST_PAIRS:
        raise ValueError(
            f"{plan.t} queries and {plan.s} keys: up to {n} pairs of tiles, expected at most {MOST_PAIRS}. Divide the "
            "queries into parts (q_offset), or use implementation='chunked'."
        )


def product(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """x and y summed over an axis of each, in float32; float32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def by_sequences(call: Callable, plan: Plan, segments: Segments | None, q_offset: int | jax.Array, *arrays: Any) -> Any:
    """Returns `call(plan, segments, *arrays)`, of one sequence after the other if a list of all would be too long."""
    check_pairs(plan, q_offset)
    if segments is None or plan.most_pairs(q_offset) <= MOST_PAIRS:
        return call(plan, segments, *arrays)
    of_one = functools.partial(call, dataclasses.replace(plan, b=1))
    found = lax.map(lambda one: of_one(*one), jax.tree.map(lambda x: x[:, None], (segments, *arrays)))
    return jax.tree.map(lambda x: x[:, 0], found)


def column(row: Any) -> jax.Array:
    """A row of numbers in memory, [1, T], as a column [T, 1]."""
    return row[0][:, None]
