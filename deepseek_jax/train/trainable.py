"""Which weights are trained: a predicate over their paths divides the tree of weights in two.

Frozen weights take part in the forward pass; they get no gradient, no optimizer state and no update.
"""

from collections.abc import Callable

from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from deepseek_jax.layers.base import Tree

Path = tuple[str, ...]  # ("moe_blocks", "experts", "gate_XDF")
Trainable = Callable[[Path], bool]


def everything(path: Path) -> bool:
    """Every weight is trained."""
    return True


def named(name: str) -> Trainable:
    """Those that have `name` in their path are trained; every one if it is ""."""
    return (lambda path: name in path) if name else everything


def divide(tree: Tree, trainable: Trainable) -> tuple[Tree, Tree]:
    """(trained, frozen): the weights, or one value for each, by whether `trainable` holds for their path."""
    trained: dict[Path, object] = {}
    frozen: dict[Path, object] = {}
    for path, leaf in flatten_dict(tree, keep_empty_nodes=True).items():
        (trained if leaf is empty_node or trainable(path) else frozen)[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def join(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `divide`."""
    parts = (flatten_dict(part, keep_empty_nodes=True) for part in (frozen, trained))
    return unflatten_dict({path: leaf for part in parts for path, leaf in part.items()})
