"""The arrays of a rank in which the weights of its stages lie, and the sums of their gradients.

One program allocates the same on every rank, but stages differ: only the first has V3's dense layers, only the last
multi-token prediction. So stages share arrays: of each shape and dtype, a rank has as many as the rank whose stages
read most of it. What a stage does not need of its own stacks is where other stages have what it has not: attention of a
dense layer lies where other ranks have that of a layer with experts.

    rank 0   A A A A - -  dense dense dense  E - - -      A: attention, E: experts, -: not read
    rank 1   A A A A A A  - - -              E E E E

Of two stages of a rank, the first fills the arrays from the front and the second from the back.
"""

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


@dataclass(frozen=True)
class Homes:
    """Which array is for which leaf of the weights of a stage; methods of arrays run inside `per_device` only."""

    kinds: np.ndarray  # kind of the stage of each chunk, [ranks, chunks]
    forms: tuple[jax.ShapeDtypeStruct, ...]  # of the arrays
    places: Mapping[Key, Mapping[int, int]]  # number of each leaf that is read -> number of its array
    leaves: tuple[jax.ShapeDtypeStruct, ...]  # of the weights of a stage, whether it reads them or not
    structure: Any  # of these weights

    def filled(self, chunks: Sequence[Tree]) -> Arrays:
        """The arrays, from the weights of this rank's stage of each chunk; what its stages do not read may be any."""
        leaves = [jax.tree.leaves(tree) for tree in chunks]
        sources: list[dict] = [{} for _ in self.forms]  # of each array: (chunk, number of the leaf) -> whose it is
        for key, places in self.places.items():
            for leaf, place in places.items():
                sources[place].setdefault((key[0], leaf), []).append(key)

        def array(of: dict) -> jax.Array:
            (first, _), *others = [(leaves[chunk][leaf], keys) for (chunk, leaf), keys in of.items()]
            for other, keys in others:
                first = jnp.where(self._has(keys), other, first)
            return first

        return [array(of) for of in sources]

    def tree(self, arrays: Arrays, key: Key) -> Tree:
        """The weights of a stage; zeros for what it does not read."""
        places = self.places[key]
        found = [arrays[places[n]] if n in places else jnp.zeros(a.shape, a.dtype) for n, a in enumerate(self.leaves)]
        return jax.tree.unflatten(self.structure, found)

    def placed(self, key: Key, tree: Tree) -> dict[int, jax.Array]:
        """What belongs to the weights of a stage by the number of their array."""
        leaves = jax.tree.leaves(tree)
        return {place: leaves[n] for n, place in self.places[key].items()}

    def of_chunk(self, arrays: Arrays, chunk: int) -> Tree:
        """What the arrays hold for this rank's stage of a chunk, in a tree like its weights; zeros elsewhere."""

        def leaf(number: int, form: jax.ShapeDtypeStruct) -> jax.Array:
            holders: dict[int, list[Key]] = {}
            for key, places in self.places.items():
                if key[0] == chunk and number in places:
                    holders.setdefault(places[number], []).append(key)
            found = jnp.zeros(form.shape, arrays[next(iter(holders))].dtype if holders else form.dtype)
            for place, keys in holders.items():
                is_all = len(self._ranks(keys)) == len(self.kinds)
                found = arrays[place] if is_all else jnp.where(self._has(keys), arrays[place], found)
            return found

        return jax.tree.unflatten(self.structure, [leaf(*each) for each in enumerate(self.leaves)])

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
    by_form: dict[tuple, list[int]] = {}
    for number, leaf in enumerate(leaves):
        by_form.setdefault((leaf.shape, leaf.dtype), []).append(number)
    forms: list[jax.ShapeDtypeStruct] = []
    keys = sorted({(chunk, int(kind)) for row in kinds for chunk, kind in enumerate(row)})
    places: dict[Key, dict[int, int]] = {key: {} for key in keys}
    for (shape, dtype), numbers in by_form.items():
        read = {key: [n for n in numbers if is_read[key[1]][n]] for key in keys}
        n_arrays = max(sum(len(read[key]) for key in enumerate(row)) for row in kinds.tolist())
        for key, mine in read.items():
            first = len(forms) + (n_arrays - len(mine) if key[0] else 0)
            places[key] |= {leaf: first + k for k, leaf in enumerate(mine)}
        forms += [jax.ShapeDtypeStruct(shape, dtype)] * n_arrays
    return Homes(kinds, tuple(forms), places, tuple(leaves), structure)
