"""Block-scaled FP8 products: how DeepSeek-V3 trains.

A product y = x W with weights is three matmuls, and all three run on 8-bit tensor cores:

    y  = x W        forward           x  in 1 x 128 blocks along K       W   in 128 x 128 blocks
    dx = dy W^T     input gradient    dy in 1 x 128 blocks along N       W^T: the same codes and scales, transposed
    dW = x^T dy     weight gradient   x and dy in 128 x 1 blocks, along tokens: what is contracted

Every format is E4M3. E5M2 is not needed for gradients: a scale per block of 128 covers their range, and the mantissa
bit counts for more. Scales are computed online, amax / 448 of the block at hand, not from earlier steps. Partial sums
are promoted to float32 every 128 products, because the tensor cores keep too few bits. y and dx are bfloat16. dW has
the dtype of W: float32 in V3; bfloat16 (config.fp8.weights) halves what is read and written between product and
optimizer.

An activation is quantised along channels and along tokens, both in one pass (`operand`), once for all products that
read it. The backward pass keeps the codes along tokens, one byte per number, and not x; of the weights it keeps the
codes. Tensor cores take 8-bit operands only with the contraction last, so a weight is quantised once as stored and once
transposed, in one pass with the same scales. A weight that ZeRO-1 keeps in parts is quantised before it is gathered
(`precision.coded`).

SwiGLU is computed again in the backward pass, from its two inputs in E4M3; its output is not kept.

| what | here | V3 |
| --- | --- | --- |
| embedding, head, router, norms, attention scores | bfloat16 or float32, no `Matmul` | the same |
| W^UK, W^UV in V3.2's absorbed attention (`config.mesh.context` > 1) | bfloat16 | E4M3: in the expanded form |
| input of the projection after attention | E4M3, both directions quantised from bfloat16 | E5M6, transposed later |
| smallest amax | 1e-24 (weights: 1e-4) | not said; 1e-4 in released kernels |
| rows sent to experts, and gradients of their results | E4M3, power-of-two scales (`precision.wire`) | the same |
| operands of experts | power-of-two scales, so that nothing is rounded twice | the same for what is sent |

There is no 12-bit format in XLA, so E5M6 would take 16 bits here. V3 needs it because attention's own backward pass
reads the same stored array, and because requantising it from blocks along channels to blocks along tokens must not
round twice; here attention keeps what it needs in bfloat16, and both sets of codes are made from bfloat16 at the same
time.

The smallest amax: a mean over n tokens has gradients of the size 1 / n, and with 1e-4 those of a large batch would
become zeros.

`gradient_block="128x128"` gives activation gradients one scale per block of 128 x 128. V3 reports that a 16B model
diverges with it (appendix B.2); it is here to show the effect.
Paper: V3 section 3.3 and appendix B.
"""

import functools
from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.kernels import XLA, Kernels
from deepseek_jax.precision.coded import CodedWeight
from deepseek_jax.precision.matmul import PLAIN, Operand, letters, swiglu
from deepseek_jax.precision.quantize import E4M3, dequantize_blocks, quantize_blocks
from deepseek_jax.precision.wire import SMALLEST_AMAX, Codes, Wire
from pallas_kernels.grouped_matmul import Groups, Scaled
from pallas_kernels.quantize import Quantized, Squares

BLOCK = 128
ROW = (1, BLOCK)
POWERS_OF_TWO = "ue8m0"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """Activations with their codes."""

    x: jax.Array  # as they are, [..., K]: the gradient goes here, no product reads them
    codes: Quantized  # of x as a matrix [M, K]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the activations."""
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the activations."""
        return self.x.shape

    def matrix(self, width: int) -> "Coded":
        """As rows of K = `width`."""
        return Coded(self.x.reshape(-1, width), self.codes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gated:
    """The inputs of a SwiGLU, whose output is an operand: silu(gate) * up * factor, one factor per row."""

    gate: jax.Array  # both, side by side, if `up` is None
    up: jax.Array | None
    factor: jax.Array | None

    @property
    def dtype(self) -> jnp.dtype:
        """Of the activations."""
        return self.gate.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        *leading, width = self.gate.shape
        return (*leading, width // 2 if self.up is None else width)

    def matrix(self, width: int) -> "Gated":
        """As rows of K = `width`."""
        if self.up is None:
            return Gated(self.gate.reshape(-1, 2 * width), None, self.factor)
        return Gated(self.gate.reshape(-1, width), self.up.reshape(-1, width), self.factor)


class Kept(NamedTuple):
    """What the backward pass needs of an operand: its codes along tokens [K, M] and their scales."""

    q_t: jax.Array
    scale_t: jax.Array


class KeptInputs(NamedTuple):
    """What it needs of a SwiGLU: codes and scales of both inputs, row by row, from which the output is made again."""

    gate: tuple[jax.Array, jax.Array]
    up: tuple[jax.Array, jax.Array] | None
    factor: jax.Array | None

    @classmethod
    def of(cls, x: Gated) -> "KeptInputs":
        """Quantises the inputs; scales of one byte."""
        up = None if x.up is None else quantize_blocks(x.up, ROW, POWERS_OF_TWO, SMALLEST_AMAX)
        return cls(quantize_blocks(x.gate, ROW, POWERS_OF_TWO, SMALLEST_AMAX), up, x.factor)

    def inputs(self, dtype: DTypeLike) -> Gated:
        """What the codes hold of the inputs."""
        up = None if self.up is None else dequantize_blocks(*self.up, dtype, ROW)
        return Gated(dequantize_blocks(*self.gate, dtype, ROW), up, self.factor)


class Axes(NamedTuple):
    """How many axes of an einsum are what: of x those before the contracted ones, and the contracted ones."""

    leading: int
    contracted: int


def _axes(equation: str) -> Axes | None:
    """The axes of a product that is one matmul, like "BTHU,HUD->BTD"; None for one with a matrix per head."""
    of_x, of_w, of_y = letters(equation)
    for n in range(1, len(of_w) + 1):
        leading = of_x.removesuffix(of_w[:n])
        if leading != of_x and leading + of_w[n:] == of_y:
            return Axes(len(leading), n)
    return None


def _by_row(found: Squares) -> Quantized:
    """Codes with one scale per 128 x 128 block as `quantize` gives them: the scale of each row in each block."""
    (m, k), scales = found.q.shape, found.scale
    by_row, by_column = (jnp.repeat(s, BLOCK, axis=1) for s in (scales.T, scales))
    return Quantized(found.q, by_row[:, :m], found.q_t, by_column[:, :k])


@dataclass(frozen=True)
class BlockMatmul:
    """A `Matmul` in block-scaled FP8."""

    kernels: Kernels = XLA  # of the operations from `quantize` to `grouped_fp8_weight_gradient`
    scale: str = "fp32"  # amax / 448; or "ue8m0", the next power of two (V3.1)
    gradient_block: str = "1x128"  # that shares a scale in activation gradients; or "128x128", which V3 rejects

    align: ClassVar[int] = BLOCK  # a block along tokens has one scale, so it holds rows of one expert
    finds_layer: ClassVar[bool] = False  # it quantises the weights of a layer
    wire: ClassVar[Wire] = Codes()
    index_in_fp4: ClassVar[bool] = False

    @property
    def codes(self) -> str | None:
        """See `Matmul`."""
        return self.scale

    def operand(self, x: jax.Array | Coded | Gated) -> Coded | Gated:
        """See `Matmul`; x [..., K] is quantised along K and along tokens, unless it has been."""
        return x if isinstance(x, (Coded, Gated)) else self._coded(x, self.scale)

    def swiglu(self, gate: jax.Array, up: jax.Array | None, factor: jax.Array | None = None) -> Gated:
        """See `Matmul`."""
        return Gated(gate, up, factor)

    def einsum(self, equation: str, x: Operand, w: jax.Array | CodedWeight) -> jax.Array:
        """See `Matmul`; products with one matrix per head (absorbed attention) are those of `PLAIN`."""
        if not (axes := _axes(equation)):
            return PLAIN.einsum(equation, x, w)  # type: ignore[arg-type]  # never in codes: `layers.base.in_codes`
        k = prod(w.shape[: axes.contracted])
        y = _product(self, w.dtype, self._rows(x, k), *_like_and_codes(w.reshape(k, prod(w.shape) // k)), None)
        return y.reshape(*x.shape[: axes.leading], *w.shape[axes.contracted :])

    def grouped(self, x_AD: Operand, w_XDF: jax.Array | CodedWeight, count_X: jax.Array) -> jax.Array:
        """See `Matmul`."""
        rows = self._coded(x_AD, POWERS_OF_TWO) if isinstance(x_AD, jax.Array) else x_AD
        return _product(self, w_XDF.dtype, rows, *_like_and_codes(w_XDF), count_X)

    def forward(self, equation: str, x: Operand, w: jax.Array) -> jax.Array:
        """See `Matmul`."""
        return self.einsum(equation, x, w)

    def vjp_input(self, equation: str, g: jax.Array, w: jax.Array) -> jax.Array:
        """See `Matmul`."""
        if not (axes := _axes(equation)):
            return PLAIN.vjp_input(equation, g, w.astype(g.dtype))
        matrix = w.reshape(prod(w.shape[: axes.contracted]), -1)
        codes = self._gradient(g.reshape(-1, matrix.shape[1]), self.scale)
        weight = self._weight(matrix)
        d_x = self._times(codes.q, codes.scale, Scaled(weight.q, weight.scale), None, g.dtype)
        return d_x.reshape(*g.shape[: axes.leading], *w.shape[: axes.contracted])

    def vjp_weight(self, equation: str, x: Operand, g: jax.Array) -> jax.Array:
        """See `Matmul`."""
        if not (axes := _axes(equation)):
            return PLAIN.vjp_weight(equation, x, g)
        n, k = (prod(a.shape[axes.leading :]) for a in (g, x))
        codes = self._codes(self._rows(x, k), self.scale)
        d_w = self._over_tokens(Kept(codes.q_t, codes.scale_t), self._gradient(g.reshape(-1, n), self.scale), None)
        return d_w.reshape(*x.shape[axes.leading :], *g.shape[axes.leading :])

    def _rows(self, x: Operand, k: int) -> Coded | Gated:
        """x as rows of width k, ready for a product."""
        return self.operand(x.reshape(-1, k)) if isinstance(x, jax.Array) else x.matrix(k)

    def _coded(self, x: jax.Array, scale: str) -> Coded:
        """x with its codes, through which no gradient flows."""
        constant = lax.stop_gradient(x)
        return Coded(x, self.kernels["quantize"](constant.reshape(-1, x.shape[-1]), scale=scale, floor=SMALLEST_AMAX))

    def _codes(self, x: Coded | Gated, scale: str) -> Quantized:
        """The codes of an operand; a SwiGLU is computed on the way."""
        if isinstance(x, Coded):
            return x.codes
        return self.kernels["quantize_swiglu"](x.gate, x.up, x.factor, scale=scale, floor=SMALLEST_AMAX)

    def _weight(self, w: jax.Array) -> Squares:
        """The codes of a weight [K, N], or of one per expert [X, K, N], and of the transpose."""
        return self.kernels["quantize_squares"](w, scale=self.scale)

    def _gradient(self, g: jax.Array, scale: str) -> Quantized:
        """The codes of an activation gradient [M, N]."""
        if self.gradient_block == "1x128":
            return self.kernels["quantize"](g, scale=scale, floor=SMALLEST_AMAX)
        return _by_row(self.kernels["quantize_squares"](g, scale=scale, floor=SMALLEST_AMAX))

    def _times(
        self, q: jax.Array, scale: jax.Array, w: Scaled, count_X: jax.Array | None, dtype: DTypeLike
    ) -> jax.Array:
        """Rows times weights that have the contraction last: those of their expert where there are counts."""
        if count_X is None:
            return self.kernels["fp8_matmul"](q, scale, *w, out_dtype=dtype)
        operands = Scaled(q, scale), w, Groups(count_X, self.align)
        return self.kernels["grouped_fp8_matmul"](*operands, out_dtype=dtype)

    def _over_tokens(
        self, x: Kept, g: Quantized, count_X: jax.Array | None, dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """dW: x^T dy, of each expert's rows where there are counts."""
        operands = (Scaled(*x), Scaled(g.q_t, g.scale_t))
        if count_X is None:
            return self.kernels["fp8_matmul"](*operands[0], *operands[1], w_block=ROW, out_dtype=dtype)
        groups = Groups(count_X, self.align)
        return self.kernels["grouped_fp8_weight_gradient"](*operands, groups, out_dtype=dtype)


def _like_and_codes(w: jax.Array | CodedWeight) -> tuple[jax.Array, Squares | None]:
    """(what the gradient of a weight goes to, its codes and those of its transpose if it has been quantised)."""
    if not isinstance(w, CodedWeight):
        return w, None
    q = lax.bitcast_convert_type(w.bits, E4M3)
    return w.like, Squares(q, q.mT, w.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    matmul: BlockMatmul,
    of_w: DTypeLike,
    x: Coded | Gated,
    w: jax.Array,
    of_codes: Squares | None,
    count_X: jax.Array | None,
) -> jax.Array:
    """y [M, N] of rows and a weight [K, N] of dtype `of_w`, or of rows by expert and weights [X, K, N].

    With the codes of the weight, w itself is not read.
    """
    return _forward(matmul, of_w, x, w, of_codes, count_X)[0]


def _forward(
    matmul: BlockMatmul,
    of_w: DTypeLike,
    x: Coded | Gated,
    w: jax.Array,
    of_codes: Squares | None,
    count_X: jax.Array | None,
) -> tuple:
    codes = matmul._codes(x, _scale(matmul, count_X))
    weight = matmul._weight(w) if of_codes is None else of_codes
    y = matmul._times(codes.q, codes.scale, Scaled(weight.q_t, weight.scale.mT), count_X, x.dtype)
    kept = Kept(codes.q_t, codes.scale_t) if isinstance(x, Coded) else KeptInputs.of(x)
    return y, (kept, Scaled(weight.q, weight.scale), count_X)


def _backward(matmul: BlockMatmul, of_w: DTypeLike, saved: tuple, dy: jax.Array) -> tuple:
    kept, weight, count_X = saved
    scale = _scale(matmul, count_X)
    g = matmul._gradient(dy, scale)
    d_rows = matmul._times(g.q, g.scale, weight, count_X, dy.dtype)
    if isinstance(kept, Kept):
        d_x: Coded | Gated = Coded(d_rows, None)  # type: ignore[arg-type]  # None is a zero cotangent
    else:
        inputs = kept.inputs(dy.dtype)
        _, pull = jax.vjp(swiglu, inputs.gate, inputs.up, inputs.factor)
        d_x = Gated(*pull(d_rows))
        codes = matmul._codes(inputs, scale)
        kept = Kept(codes.q_t, codes.scale_t)
    return d_x, matmul._over_tokens(kept, g, count_X, of_w), None, None


_product.defvjp(_forward, _backward)


def _scale(matmul: BlockMatmul, count_X: jax.Array | None) -> str:
    """Of the operands of a product: what experts are sent has powers of two, and stays as it is with them."""
    return matmul.scale if count_X is None else POWERS_OF_TWO
