"""Weights that stay in FP8 or FP4: which a model has, what lies where in published matrices; those quantised here."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert import names
from deepseek_jax.errors import UserError
from deepseek_jax.precision.fp4_weight import Fp4Weight, fits_fp8, in_fp8
from deepseek_jax.precision.fp8_weight import Fp8Weight, Layout, block_rows, encoded
from deepseek_jax.tree import paths, size

CODES, SCALE = "codes", "scale"  # the parts of a weight in FP8, as ends of its path


def layouts(tensor: names.Tensor) -> tuple[Layout, ...]:
    """Returns how each of our weights lies in a published matrix (see `precision.fp8_weight`)."""
    dimensions = [text.strip("()").split() for text in re.findall(r"\(.*?\)|\S+", tensor.theirs)]
    sizes = {
        axes[0]: length for axes, length in zip(dimensions, tensor.shape, strict=True) if len(axes) == 1
    } | tensor.sizes
    (rows, columns), ours = dimensions, tensor.ours.split()
    order = tuple([*rows, *columns].index(axis) for axis in ours)
    outer = [sizes[axis] for axis in rows[:-1]]
    if not tensor.cut:
        return (Layout((*outer, sizes[rows[-1]]), tuple(sizes[axis] for axis in columns), order),)
    widths = [tensor.cut[1], sizes[rows[-1]] - tensor.cut[1]]
    found, start = [], 0
    for width in widths:
        block = block_rows(tuple(widths), math.prod(outer), start)
        found.append(Layout((*outer, width), tuple(sizes[axis] for axis in columns), order, block))
        start += width
    return tuple(found)


def of_model(shapes: dict) -> dict[tuple[names.Path, ...], tuple[Layout, ...]]:
    """Returns the weights that FP8 releases store in FP8 with their layouts, those of one published matrix together."""
    return {
        tuple(path for path, _ in tensor.places): layouts(tensor)
        for tensor in names.tensors(shapes)
        if names.QUANTIZED.search(tensor.name) and len(tensor.shape) == 2
    }


def quantized(weights: dict) -> dict:
    """Returns {"params", "router_bias"} with the weights of `of_model` in FP8 by V3's rule; those in FP8 stay.

    Those in FP4 become FP8 of the same numbers. The tree that is given loses what has been quantised, so that at most
    one weight exists twice. Raises UserError if the scales of one in FP4 differ too much for FP8.
    """
    for together, found in of_model(weights).items():
        wide = [_at(weights, path) for path in together]
        if isinstance(wide[0], Fp4Weight):
            _put(weights, together[0], _from_fp4(wide[0], ".".join(together[0])))
        if any(isinstance(w, Fp8Weight) for w in wide):
            continue
        for path, coded in zip(together, _encoded(tuple(wide), found), strict=True):
            _put(weights, path, coded)
    return weights


def _from_fp4(weight: Fp4Weight, name: str) -> Fp8Weight:
    if not bool(jnp.all(_fits(weight))):
        raise UserError(
            f"weights='fp8': {name} is in FP4, and scales within 128 x 128 of it differ by more than 2^6, which FP8 "
            "cannot hold exactly. Give weights='stored' to keep FP4, or 'wide'."
        )
    return _in_fp8(weight)


_fits, _in_fp8 = jax.jit(fits_fp8), jax.jit(in_fp8)
_encoded = jax.jit(encoded, static_argnums=1)


def joined(tree: dict, found: dict[names.Path, Layout]) -> dict:
    """Returns a tree that has "codes" and "scale" under the path of a weight with the weight in place of the two."""
    for path, layout in found.items():
        parts = _at(tree, path)
        kind = Fp4Weight if parts[CODES].dtype == np.uint8 else Fp8Weight
        _put(tree, path, kind(parts[CODES], parts[SCALE], layout))
    return tree


def _at(tree: Any, path: names.Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict, path: names.Path, value: object) -> None:
    _at(tree, path[:-1])[path[-1]] = value


def n_bytes(tree: dict) -> dict[str, int]:
    """Returns the bytes of a model's weights: those in "FP8", codes and scales, and the "others"."""
    leaves = paths(tree).values()
    in_fp8 = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Fp8Weight))
    return {"FP8": in_fp8, "others": sum(leaf.nbytes for leaf in leaves if not isinstance(leaf, Fp8Weight))}


def bytes_to_serve(shapes: dict) -> tuple[int, int]:
    """Returns the bytes of a model's weights in bfloat16, and those as FP8 releases store them."""
    flat = paths(shapes)
    wide = {path: 2 * size(leaf) for path, leaf in flat.items()}
    in_fp8 = dict(wide)
    for together, found in of_model(shapes).items():
        for path, layout in zip(together, found, strict=True):
            n_matrices = size(flat[path]) // math.prod(layout.shape)
            in_fp8[path] = n_matrices * (math.prod(layout.matrix) + 4 * math.prod(layout.blocks))
    return sum(wide.values()), sum(in_fp8.values())
