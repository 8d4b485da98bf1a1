"""Weights in codes: what a step in FP8 gathers and keeps of those that its products quantise.

A block of 128 x 128 has one scale, so a weight takes 1 + 4 / 16,384 bytes per number. A step quantises its float32
weights once, where they are kept, and products read the codes; the numbers are those of quantising the whole weight.
Codes have no derivative. The gradient of a weight goes to zeros of its shape that nothing reads, and that therefore
exist in no compiled program.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodedWeight:
    """A weight in codes; the axes before those of the matrix are a stack's."""

    like: jax.Array  # zeros of its shape and dtype: the gradient goes here, no product reads them
    bits: jax.Array  # E4M3 codes as uint8, of its shape
    scale: jax.Array  # float32 [..., ceil(K / 128), ceil(N / 128)] of the matrix [K, N]

    @property
    def dtype(self) -> jnp.dtype:
        """Of its gradient."""
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.like.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.like.ndim

    def __getitem__(self, index: Any) -> "CodedWeight":  # modules read weights as weight[...]
        assert index is ..., index
        return self

    def reshape(self, k: int, n: int) -> "CodedWeight":
        """As a matrix [K, N]."""
        return CodedWeight(self.like.reshape(k, n), self.bits.reshape(k, n), self.scale)


Codes = tuple[jax.Array, jax.Array]  # bits and scale of a weight


def apart(tree: Tree) -> tuple[Tree, Tree]:
    """(the weights with `like` in place of those in codes, the `Codes` of these by their paths)."""
    flat = flatten_dict(tree, keep_empty_nodes=True)
    coded = {path: leaf for path, leaf in flat.items() if isinstance(leaf, CodedWeight)}
    arrays = flat | {path: weight.like for path, weight in coded.items()}
    return unflatten_dict(arrays), unflatten_dict({path: (w.bits, w.scale) for path, w in coded.items()})


def together(arrays: Tree, codes: Tree) -> Tree:
    """The inverse of `apart`."""
    flat = flatten_dict(arrays, keep_empty_nodes=True)
    coded = {path: CodedWeight(flat[path], *pair) for path, pair in flatten_dict(codes).items()}
    return unflatten_dict({**flat, **coded})


def without(weights: Tree, codes: Tree) -> Tree:
    """The weights that are not in codes."""
    coded = flatten_dict(codes)
    flat = flatten_dict(weights, keep_empty_nodes=True)
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in coded})


def with_zeros(plain: Tree, weights: Tree, codes: Tree) -> Tree:
    """The inverse of `without`: zeros for those of `weights` that are in codes, in their dtype and the codes' shape."""
    flat, coded = flatten_dict(weights, keep_empty_nodes=True), flatten_dict(codes)
    zeros = {path: jnp.zeros(coded[path][0].shape, flat[path].dtype) for path in flat if path in coded}
    return unflatten_dict(flatten_dict(plain, keep_empty_nodes=True) | zeros)
