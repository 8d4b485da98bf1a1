"""The products of activations with weights, as an object that layers are given.

    y = x W            forward
    dx = g W^T         vjp_input: the first half of the backward pass, for which the layer before waits
    dW = x^T g         vjp_weight: the second half, for which only the optimizer waits

`product` composes the three. A pipeline may run the second half later than the first (`parallel.split_backward`). A
low-precision format is another `Matmul`, and nothing else. Attention scores, the router, the embedding, the head and
the norms do not use one: they stay in high precision (V3 section 3.3.1).
"""

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import XLA, Kernels
from deepseek_jax.precision import fp8_weight_kernels
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.precision.grouped import Matrices
from deepseek_jax.precision.wire import AS_IS, Wire

Operand = Any  # activations as a `Matmul` takes them; they have a dtype and a shape


class Matmul(Protocol):
    """How a run multiplies activations with weights; static and hashable.

    Weights come in float32 or in the dtype that `precision.policy` casts them to. Results have the dtype of the
    activations.
    """

    align: ClassVar[int]  # rows to a multiple of which each expert's begin in `grouped`
    finds_layer: ClassVar[bool]  # whether `grouped` takes weights as `precision.grouped.OfLayer`
    wire: ClassVar[Wire]  # how rows travel to the experts of other devices
    index_in_fp4: ClassVar[bool]  # whether an indexer's queries and keys of V4 are rounded to FP4 (training for it)

    @property
    def kernels(self) -> Kernels:
        """The implementations of the operations that it is made of."""

    @property
    def codes(self) -> str | None:
        """The scales of its weights' codes, if it can read weights in codes (`precision.coded`)."""

    def operand(self, x: jax.Array) -> Operand:
        """Returns activations ready for several products: what a format computes of them is computed once."""

    def einsum(self, equation: str, x: Operand, w: jax.Array) -> jax.Array:
        """Returns y of an einsum such as "BTD,DF->BTF"; no letter may occur in `w` alone."""

    def swiglu(self, gate: jax.Array, up: jax.Array | None, factor: jax.Array | None = None) -> Operand:
        """Returns silu(gate) * up, each row times its factor if there are any, ready for one product.

        `up` None: `gate` holds both, side by side in its last axis.
        """

    def grouped(self, x_AD: Operand, w_XDF: Matrices, count_X: jax.Array) -> jax.Array:
        """Returns y_AF: rows sorted by expert, `count_X` of each, times the weights of their expert.

        Each expert's rows begin at a multiple of `align`; the rows that fill up those before are zeros.
        """

    def forward(self, equation: str, x: Operand, w: jax.Array) -> jax.Array:
        """Returns y."""

    def vjp_input(self, equation: str, g: jax.Array, w: jax.Array) -> jax.Array:
        """Returns dx, where g = dy."""

    def vjp_weight(self, equation: str, x: Operand, g: jax.Array) -> jax.Array:
        """Returns dW, where g = dy."""


@dataclass(frozen=True)
class PlainMatmul:
    """Products in the dtype of the activations, to which the weights are cast; every backend sums them in float32."""

    kernels: Kernels = XLA  # of `grouped`, of products with weights in FP8, and of the experts of one token

    align: ClassVar[int] = 1
    finds_layer: ClassVar[bool] = True
    wire: ClassVar[Wire] = AS_IS
    index_in_fp4: ClassVar[bool] = False
    codes: ClassVar[str | None] = None

    def operand(self, x: jax.Array) -> jax.Array:
        """See `Matmul`; here x itself."""
        return x

    def swiglu(self, gate: jax.Array, up: jax.Array | None, factor: jax.Array | None = None) -> jax.Array:
        """See `Matmul`."""
        return swiglu(gate, up, factor)

    def einsum(self, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Matmul`; w may be in FP8 (`precision.fp8_weight`)."""
        if isinstance(w, Fp8Weight):
            return fp8_weight_kernels.einsum(self.kernels["coded_matmul"], equation, x, w)
        return product(self, equation, x, w.astype(x.dtype))

    def grouped(self, x_AD: jax.Array, w_XDF: Matrices, count_X: jax.Array) -> jax.Array:
        """See `Matmul`; the weights may be in FP8."""
        if fp8_weight_kernels.is_fp8(w_XDF):
            return self.kernels["coded_matmul"](x_AD, w_XDF, count_X)
        return self.kernels["grouped_matmul"](x_AD, w_XDF.astype(x_AD.dtype), count_X)

    def forward(self, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Matmul`; w in the dtype of x."""
        return jnp.einsum(equation, x, w)

    def vjp_input(self, equation: str, g: jax.Array, w: jax.Array) -> jax.Array:
        """See `Matmul`."""
        of_x, of_w, of_y = letters(equation)
        x = jax.ShapeDtypeStruct(_shape(of_x, {of_y: g, of_w: w}), g.dtype)
        return jax.linear_transpose(lambda x: self.forward(equation, x, w), x)(g)[0]

    def vjp_weight(self, equation: str, x: jax.Array, g: jax.Array) -> jax.Array:
        """See `Matmul`."""
        of_x, of_w, of_y = letters(equation)
        w = jax.ShapeDtypeStruct(_shape(of_w, {of_y: g, of_x: x}), x.dtype)
        return jax.linear_transpose(lambda w: self.forward(equation, x, w), w)(g)[0]


PLAIN = PlainMatmul()


def swiglu(gate: jax.Array, up: jax.Array | None, factor: jax.Array | None = None) -> jax.Array:
    """Returns silu(gate) * up, each row times its factor if there are any; in their dtype. See `Matmul.swiglu`."""
    gate, up = jnp.split(gate, 2, axis=-1) if up is None else (gate, up)
    hidden = jax.nn.silu(gate) * up
    return hidden if factor is None else hidden * factor[:, None].astype(hidden.dtype)


def clamped(gate: jax.Array, up: jax.Array | None, limit: float) -> tuple[jax.Array, jax.Array | None]:
    """Returns what `Matmul.swiglu` takes, bounded: the gate to `limit` at most, up to +-limit; as it is if that is 0.

    A very negative gate closes by itself, so it has no lower bound. `up` None: both lie side by side.
    """
    if not limit:
        return gate, up
    if up is not None:
        return jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    half = jnp.arange(gate.shape[-1]) < gate.shape[-1] // 2
    return jnp.clip(gate, jnp.where(half, -jnp.inf, -limit).astype(gate.dtype), limit), None


def letters(equation: str) -> list[str]:
    """Returns the axes of x, w and y of an einsum "x,w->y"."""
    return re.split(",|->", equation)


def _shape(axes: str, known: dict[str, jax.Array]) -> list[int]:
    """Returns the sizes of `axes`, found in arrays with known axes."""
    sizes = {axis: n for letters, x in known.items() for axis, n in zip(letters, x.shape, strict=True)}
    return [sizes[axis] for axis in axes]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(matmul: Matmul, equation: str, x: Operand, w: jax.Array) -> jax.Array:
    """Returns `matmul.forward(equation, x, w)`, whose derivatives are the two halves of `matmul`."""
    return matmul.forward(equation, x, w)


def _forward(matmul: Matmul, equation: str, x: Operand, w: jax.Array) -> tuple[jax.Array, tuple]:
    return matmul.forward(equation, x, w), (x, w)


def _backward(matmul: Matmul, equation: str, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return matmul.vjp_input(equation, g, w), matmul.vjp_weight(equation, x, g)


product.defvjp(_forward, _backward)
