"""A weight that stays in FP8, as it was published: E4M3 codes and one float32 scale per block of 128 x 128.

    w[r, c] = codes[r, c] * scale[r // 128, c // 128]        rows are outputs, columns what a product sums over

A product dequantises what it needs (`precision.fp8_weight_kernels`); all weights never exist in more bits. Modules
read such a weight like any other, weight[...], with its axes in their own order.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.precision.quantize import dequantize_blocks, quantize_blocks

BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """How a weight's numbers lie in a published matrix, apart from the axes of layers and experts."""

    rows: tuple[int, ...]  # sizes of the axes that the rows run over: (H, Q)
    columns: tuple[int, ...]  # of those that the columns run over: (D,)
    order: tuple[int, ...]  # which of them, rows first, each of the weight's own axes is: D, H, Q is (2, 0, 1)
    block_rows: int = BLOCK  # rows with one scale: fewer where blocks of a larger matrix begin between this weight's

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, in its own order."""
        sizes = self.rows + self.columns
        return tuple(sizes[axis] for axis in self.order)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.rows), math.prod(self.columns)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks along rows and columns."""
        rows, columns = self.matrix
        return -(-rows // self.block_rows), -(-columns // BLOCK)

    def as_matrix(self, w: jax.Array) -> jax.Array:
        """Returns a weight [..., *shape] as [..., rows, columns]."""
        n = w.ndim - len(self.order)
        places = [n + self.order.index(axis) for axis in range(len(self.order))]
        return jnp.transpose(w, (*range(n), *places)).reshape(*w.shape[:n], *self.matrix)

    def as_weight(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `as_matrix`."""
        leading = matrix.shape[:-2]
        axes = (*range(len(leading)), *(len(leading) + axis for axis in self.order))
        return jnp.transpose(matrix.reshape(*leading, *self.rows, *self.columns), axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["layout"])
@dataclass(frozen=True)
class Fp8Weight:
    """A weight in FP8.

    Attributes:
        codes: E4M3, [..., rows, columns]; before these the axes of layers and experts, if there are any.
        scale: float32, [..., blocks of rows, blocks of columns].
        layout: what rows and columns are.
    """

    codes: Any
    scale: Any
    layout: Layout

    bits: ClassVar[int] = 8  # of a code

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that modules see."""
        return (*self.codes.shape[:-2], *self.layout.shape)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the codes."""
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.size * part.dtype.itemsize for part in (self.codes, self.scale))

    def __getitem__(self, index: Any) -> "Fp8Weight":
        assert index is ..., index
        return self

    def filled(self, zeros: tuple[int, ...]) -> "Fp8Weight":
        """Returns it with so many zeros after the numbers of each of its axes; rows and columns are one axis each."""
        layout, n_zeros = self.layout, dict(zip(self.layout.order, zeros, strict=True))
        assert len(layout.order) == 2, layout
        rows, columns = (size + n_zeros[axis] for axis, size in enumerate(layout.matrix))
        wide = dataclasses.replace(layout, rows=(rows,), columns=(columns,))
        of_codes, of_scale = (
            [(0, new - old) for new, old in zip(*sizes, strict=True)]
            for sizes in ((wide.matrix, layout.matrix), (wide.blocks, layout.blocks))
        )
        before = [(0, 0)] * (self.codes.ndim - 2)
        bits = jnp.pad(lax.bitcast_convert_type(self.codes, jnp.uint8), before + of_codes)
        scale = jnp.pad(self.scale, before + of_scale, constant_values=1)
        return Fp8Weight(lax.bitcast_convert_type(bits, self.codes.dtype), scale, wide)

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """Returns the weight as an array: codes times scales in float32, rounded once."""
        return self.layout.as_weight(self.numbers(self.codes, self.scale, dtype))

    def numbers(self, codes: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns matrices [..., rows, columns] of some of the codes and their scales."""
        return dequantize_blocks(codes, scale, dtype, (self.layout.block_rows, BLOCK))


def encoded(weights: tuple[jax.Array, ...], layouts: tuple[Layout, ...]) -> tuple[Fp8Weight, ...]:
    """Returns weights [..., *layout.shape] in FP8 by V3's rule; those published as one matrix are quantised as one."""
    pairs = list(zip(weights, layouts, strict=True))
    n = weights[0].ndim - len(layouts[0].order)  # axes of layers and experts
    apart = [layout.as_matrix(w).reshape(*w.shape[:n], *layout.rows, -1) for w, layout in pairs]
    whole = jnp.concatenate(apart, axis=-2) if len(apart) > 1 else apart[0]
    codes, scale = quantize_blocks(whole.reshape(*whole.shape[:n], -1, whole.shape[-1]), (BLOCK, BLOCK))
    return divided(codes, scale, layouts)


def divided(codes: Any, scale: Any, layouts: tuple[Layout, ...]) -> tuple[Fp8Weight, ...]:
    """Returns the weights of a published matrix; two are side by side along the last axis of its rows.

    Codes [..., rows, columns] and the scales of blocks of 128 x 128, of jax or of numpy, whose views they are.
    """
    if len(layouts) == 1:
        return (Fp8Weight(codes, scale, layouts[0]),)
    outer, total = math.prod(layouts[0].rows[:-1]), sum(layout.rows[-1] for layout in layouts)
    apart, parts, start = codes.reshape(*codes.shape[:-2], outer, total, -1), [], 0
    for layout in layouts:
        width = layout.rows[-1]
        own = apart[..., start : start + width, :].reshape(*codes.shape[:-2], outer * width, -1)
        first_rows = np.arange(outer)[:, None] * total + start + np.arange(0, width, layout.block_rows)
        parts.append(Fp8Weight(own, scale[..., first_rows.reshape(-1) // BLOCK, :], layout))
        start += width
    return tuple(parts)


def block_rows(widths: tuple[int, ...], outer: int, start: int) -> int:
    """Returns how many rows have one scale in a weight that lies beside another in a published matrix.

    That is 128 where the blocks of the matrix begin with the weight, else a divisor of it.

    Args:
        widths: of both weights, along the last axis of the rows.
        outer: product of the axes of the rows before it.
        start: where the weight begins along it.
    """
    return math.gcd(BLOCK, start) if outer == 1 else math.gcd(BLOCK, *widths)
