"""Trees of arrays, nested dicts with plain names: paths, names, sizes."""

import math
from typing import Any

import jax

Path = tuple[str, ...]


def paths(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """Returns path -> leaf of nested dicts; whatever is not a dict is a leaf."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {end: leaf for key, sub in tree.items() for end, leaf in paths(sub, (*path, key)).items()}


def dotted(path: tuple) -> str:
    """Returns a path of jax's, as `jax.tree_util.tree_map_with_path` gives it, as a name: "head.weight_DV"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def size(tree: Any) -> int:
    """Returns the number of elements of all leaves; anything with a shape will do."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: hasattr(leaf, "shape")))
