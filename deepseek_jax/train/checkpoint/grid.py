"""How the arrays of a state are divided into pieces, and which process writes each. Plain numbers, no JAX.

    pieces = assigned(held, itemsizes)     # held: name -> region -> the processes that hold it
    mine = packed([piece for piece in pieces if piece.process == 3])

A region is a block of an array, (start, stop) per dimension. What several processes hold is written by one of them:
the one with the fewest bytes so far, so that copies are spread over all that have them. Every process comes to the same
result by itself. A piece has `PIECE_BYTES` at most; small ones share an object (`packed`).
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

PIECE_BYTES = 64 * 2**20  # of a piece, at most: what a writer holds in memory beside the state, times its threads
ALONE_BYTES = 2**20  # a piece of so many bytes has an object of its own
PACK_BYTES = 8 * 2**20  # of small pieces in one object, about

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """A block of an array, and who writes it."""

    name: str
    region: Region
    n_bytes: int
    process: int
    is_common: bool  # whether other processes hold it as well, and so will read it


def shape_of(region: Region) -> tuple[int, ...]:
    """Returns the shape of a block."""
    return tuple(stop - start for start, stop in region)


def count(region: Region) -> int:
    """Returns the number of elements of a block."""
    return math.prod(shape_of(region))


def overlap(a: Region, b: Region) -> Region | None:
    """Returns what two blocks of an array have in common; None if nothing."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(part: Region, whole: Region) -> tuple[slice, ...]:
    """Returns where a block lies inside another one, as an index."""
    return tuple(slice(p[0] - w[0], p[1] - w[0]) for p, w in zip(part, whole, strict=True))


def blocks(region: Region, itemsize: int, limit: int) -> Iterator[Region]:
    """Yields blocks of at most `limit` bytes that make up a region, in C order; rows stay whole where they can."""
    shape = shape_of(region)
    dim = next((dim for dim, n in enumerate(shape) if n > 1), None)
    if dim is None or math.prod(shape) * itemsize <= limit:
        yield region
        return
    rows = max(limit // (math.prod(shape[dim + 1 :]) * itemsize), 1)
    start, stop = region[dim]
    for first in range(start, stop, rows):
        part = (*region[:dim], (first, min(first + rows, stop)), *region[dim + 1 :])
        yield from blocks(part, itemsize, limit) if rows == 1 else (part,)


def assigned(
    held: Mapping[str, Mapping[Region, Collection[int]]], itemsizes: Mapping[str, int], limit: int | None = None
) -> list[Piece]:
    """Returns all pieces of all arrays with something in them, each with the process that writes it.

    Args:
        held: name -> region -> the processes that hold it; the regions of an array do not overlap.
        itemsizes: name -> bytes of an element.
        limit: bytes of a piece, `PIECE_BYTES` by default.
    """
    load: Counter[int] = Counter()
    found = []
    entries = [(name, region, sorted(held[name][region])) for name in held for region in sorted(held[name])]
    for name, region, holders in sorted(
        entries, key=lambda entry: len(entry[2]) > 1
    ):  # stable: what has no choice first
        for block in blocks(region, itemsizes[name], limit or PIECE_BYTES):
            n_bytes = count(block) * itemsizes[name]
            if n_bytes:
                process = min(holders, key=lambda holder: (load[holder], holder))
                load[process] += n_bytes
                found.append(Piece(name, block, n_bytes, process, len(holders) > 1))
    return found


def packed(pieces: list[Piece]) -> list[list[Piece]]:
    """Returns the pieces of each object; those that others read as well are apart from those that they do not."""
    objects = [[piece] for piece in pieces if piece.n_bytes >= ALONE_BYTES]
    for is_common in (True, False):
        small = [piece for piece in pieces if piece.n_bytes < ALONE_BYTES and piece.is_common is is_common]
        ends = itertools.accumulate(piece.n_bytes for piece in small)
        placed = zip(small, ends, strict=True)
        objects += [
            [piece for piece, _ in group] for _, group in itertools.groupby(placed, lambda one: one[1] // PACK_BYTES)
        ]
    return objects
