"""The arrays of a rank in which the weights of its stages lie, and the sums of their gradients.

One program allocates the same on every rank, but stages differ: only the first has V3's dense layers, only the last
multi-token prediction. So stages share arrays: of each shape and dtype, a rank has as many as the rank whose stages
read most of it. What a stage does not need of its own stacks is where other stages have what it has not: attention of a
dense layer lies where other ranks have that of a layer with experts.

A leaf for which no array of its shape is left lies in pieces, one after another, in smaller arrays that its rank does
not read; only what does not fit there either has arrays of its own. So most of V3's dense feed-forwards lie where other
ranks have experts.

    rank 0   A A A A - -  E E - dense~~~~~~~  dense    A: attention, E: experts, -: not read, ~: in pieces
    rank 1   A A A A A A  E E E E E E E E E E -

A stage puts pieces together where it reads them, in each pass: a copy, and the memory of a whole leaf while it is read.
Of two stages of a rank, the first fills the arrays of a shape from the front and the second from the back.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.mesh import PIPE

Tree = Any
Arrays = list[jax.Array]
Key = tuple[int, int]  # a stage, as programs tell them apart: (its chunk of a rank, its kind)
Rank = tuple[Key, ...]  # its stages
Lie = tuple[int, ...]  # numbers of the arrays in which a leaf lies: one of its shape, or several that hold its pieces


@dataclass(frozen=True)
class Homes:
    """Which array is for which leaf of the weights of a stage; methods of arrays run inside `per_device` only."""

    kinds: np.ndarray  # kind of the stage of each chunk, [ranks, chunks]
    forms: tuple[jax.ShapeDtypeStruct, ...]  # of the arrays
    places: Mapping[Key, Mapping[int, Lie]]  # number of each leaf that is read -> where it lies
    leaves: tuple[jax.ShapeDtypeStruct, ...]  # of the weights of a stage, whether it reads them or not
    structure: Any  # of these weights

    def filled(self, chunks: Sequence[Tree]) -> Arrays:
        """The arrays, from the weights of this rank's stage of each chunk; what its stages do not read may be any."""
        leaves = [jax.tree.leaves(tree) for tree in chunks]
        filled: list[Any] = [None] * len(self.forms)
        for (chunk, leaf, lie), keys in self._holders().items():
            for place, piece in zip(lie, self._apart(leaves[chunk][leaf], lie), strict=True):
                filled[place] = piece if filled[place] is None else jnp.where(self._has(keys), piece, filled[place])
        return filled

    def tree(self, arrays: Arrays, key: Key) -> Tree:
        """The weights of a stage; zeros for what it does not read."""
        places = self.places[key]
        found = [
            _together(arrays, places[n], a) if n in places else jnp.zeros(a.shape, a.dtype)
            for n, a in enumerate(self.leaves)
        ]
        return jax.tree.unflatten(self.structure, found)

    def placed(self, key: Key, tree: Tree) -> dict[int, jax.Array]:
        """What belongs to the weights of a stage by the number of their array; zeros where a last piece ends sooner."""
        leaves = jax.tree.leaves(tree)
        found: dict[int, jax.Array] = {}
        for n, lie in self.places[key].items():
            found.update(zip(lie, self._apart(leaves[n], lie), strict=True))
        return found

    def of_chunk(self, arrays: Arrays, chunk: int) -> Tree:
        """What the arrays hold for this rank's stage of a chunk, in a tree like its weights; zeros elsewhere."""
        found: list[Any] = [None] * len(self.leaves)
        for (holder, leaf, lie), keys in self._holders().items():
            if holder == chunk:
                mine, before = _together(arrays, lie, self.leaves[leaf]), found[leaf]
                is_all = len(self._ranks(keys)) == len(self.kinds)
                none = jnp.zeros_like(mine) if before is None else before
                found[leaf] = mine if is_all else jnp.where(self._has(keys), mine, none)
        zeros = [jnp.zeros(a.shape, a.dtype) for a in self.leaves]
        found = [zero if a is None else a for a, zero in zip(found, zeros, strict=True)]
        return jax.tree.unflatten(self.structure, found)

    def _apart(self, leaf: jax.Array, lie: Lie) -> list[jax.Array]:
        """A leaf as the arrays hold it in which it lies; zeros after its end."""
        forms = [self.forms[place] for place in lie]
        if forms[0].shape == leaf.shape:
            return [leaf]
        parts = jnp.split(leaf.ravel(), np.cumsum([form.size for form in forms])[:-1])
        parts[-1] = jnp.pad(parts[-1], (0, forms[-1].size - parts[-1].size))
        return [part.reshape(form.shape) for part, form in zip(parts, forms, strict=True)]

    def _holders(self) -> dict[tuple[int, int, Lie], list[Key]]:
        """(chunk, number of the leaf, where it lies) -> the stages of which it does."""
        found: dict[tuple[int, int, Lie], list[Key]] = {}
        for key, places in self.places.items():
            for leaf, lie in places.items():
                found.setdefault((key[0], leaf, lie), []).append(key)
        return found

    def _ranks(self, keys: Sequence[Key]) -> list[int]:
        return [rank for rank, row in enumerate(self.kinds) if any(row[chunk] == kind for chunk, kind in keys)]

    def _has(self, keys: Sequence[Key]) -> jax.Array:
        """Whether this rank has one of these stages."""
        return jnp.isin(jax.lax.axis_index(PIPE), np.array(self._ranks(keys)))


def make_homes(kinds: np.ndarray, weights: Tree, is_read: Sequence[Sequence[bool]]) -> Homes:
    """Returns the arrays for the stages of a pipeline.

    Args:
        kinds: kind of the stage that lies at each place, [ranks, chunks]; of one chunk or two.
        weights: `jax.ShapeDtypeStruct`s, alike for all stages.
        is_read: by kind, whether each leaf of the weights is read (or has a gradient).
    """
    leaves, structure = jax.tree.flatten(weights)
    of_ranks: list[Rank] = sorted({tuple(enumerate(row)) for row in kinds.tolist()})
    keys = sorted({key for rank in of_ranks for key in rank})
    by_form: dict[tuple, list[int]] = {}
    for number, leaf in enumerate(leaves):
        by_form.setdefault((leaf.shape, leaf.dtype), []).append(number)
    reads = {form: {key: [n for n in ns if is_read[key[1]][n]] for key in keys} for form, ns in by_form.items()}

    def rare_and_small_last(form: tuple) -> tuple[int, int]:
        n_readers = sum(any(reads[form][key] for key in enumerate(row)) for row in kinds.tolist())
        return -n_readers, -math.prod(form[0])

    forms: list[jax.ShapeDtypeStruct] = []
    places: dict[Key, dict[int, Lie]] = {key: {} for key in keys}
    used: dict[Rank, set[int]] = {rank: set() for rank in of_ranks}
    for shape, dtype in sorted(reads, key=rare_and_small_last):
        form, read = jax.ShapeDtypeStruct(shape, dtype), reads[shape, dtype]
        n_arrays, lies = _in_pieces(form, {key: len(mine) for key, mine in read.items()}, forms, used)
        for (chunk, kind), mine in read.items():
            pieces = lies[chunk, kind]
            n_whole = len(mine) - len(pieces)
            first = len(forms) + (n_arrays - n_whole if chunk else 0)
            places[chunk, kind] |= dict(zip(mine, [*((first + k,) for k in range(n_whole)), *pieces], strict=True))
        for rank, places_used in used.items():
            places_used.update(place for key in rank for lie in places[key].values() for place in lie)
        forms += [form] * n_arrays
    return Homes(kinds, tuple(forms), places, tuple(leaves), structure)


def _in_pieces(
    form: jax.ShapeDtypeStruct,
    needs: Mapping[Key, int],
    forms: Sequence[jax.ShapeDtypeStruct],
    used: Mapping[Rank, set[int]],
) -> tuple[int, dict[Key, list[Lie]]]:
    """Returns (arrays to add for leaves of a form, where those of each stage lie that have none of these).

    Args:
        form: of the leaves.
        needs: how many of them each stage reads.
        forms: of the arrays that there are.
        used: which of these each rank reads.
    """
    found: dict[Key, list[Lie]] = {}
    taken: dict[Rank, set[int]] = {rank: set(places) for rank, places in used.items()}
    for key, n in needs.items():
        ranks = [rank for rank in used if key in rank]
        spare = {
            place: of.size
            for place, of in enumerate(forms)
            if of.dtype == form.dtype and of.size <= form.size and not any(place in taken[rank] for rank in ranks)
        }
        found[key] = [lie for _ in range(n) if (lie := _lie(form.size, spare))]
        for rank in ranks:
            taken[rank].update(itertools.chain.from_iterable(found[key]))
    n_arrays = max(sum(needs[key] - len(found[key]) for key in rank) for rank in used)
    whole = dict(needs)
    for key, lies in found.items():
        excess = max(sum(whole[of] for of in rank) - n_arrays for rank in used if key in rank)
        found[key] = lies[: max(excess, 0)]
        whole[key] -= len(found[key])
    return n_arrays, found


def _lie(size: int, spare: dict[int, int]) -> Lie:
    """Takes from spare arrays (number -> size) what holds so many numbers; returns none of them if they do not."""
    found: list[int] = []
    left = size
    while left > 0 and sum(spare.values()) >= left:
        enough = [place for place in spare if spare[place] >= left]
        found.append(min(enough, key=spare.__getitem__) if enough else max(spare, key=spare.__getitem__))
        left -= spare.pop(found[-1])
    return tuple(found)


def _together(arrays: Arrays, lie: Lie, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf from the arrays in which it lies."""
    if arrays[lie[0]].shape == leaf.shape:
        return arrays[lie[0]]
    return jnp.concatenate([arrays[place].ravel() for place in lie])[: math.prod(leaf.shape)].reshape(leaf.shape)
