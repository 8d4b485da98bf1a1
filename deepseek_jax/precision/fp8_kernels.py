"""Quantiser and products of E4M3 codes, by name: XLA on any device, or the kernels for Hopper GPUs and TPUs.

The definitions, and what the arguments mean, are in `pallas_kernels` (`quantize`, `fp8_matmul`, `grouped_matmul`).
With XLA codes times scales are float32 matrices and their product is one float32 matmul: the same numbers as the
definition but for the order in which float32 sums are made, at a fraction of its time on a CPU. Nothing is gained in
speed over bfloat16: this is the recipe for tests and small machines.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.precision import grouped
from pallas_kernels import fp8_matmul as fp8_matmul_kernel
from pallas_kernels import grouped_matmul as grouped_kernels
from pallas_kernels import quantize as quantize_kernel
from pallas_kernels.grouped_matmul import Groups, Scaled

BLOCK = 128


quantize = functools.partial(quantize_kernel.quantize, implementation="reference")
quantize_swiglu = functools.partial(quantize_kernel.quantize_swiglu, implementation="reference")
quantize_squares = functools.partial(quantize_kernel.quantize_squares, implementation="reference")


def fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] = (BLOCK, BLOCK),
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Returns y [M, N] of codes x [M, K] and w [N, K]."""
    wide_w = _wide(w, w_scale.T) if w_block[0] == 1 else _wide(w, jnp.repeat(w_scale, BLOCK, axis=0)[: len(w)])
    product = lax.dot_general(_wide(x, x_scale.T), wide_w, (((1,), (1,)), ((), ())), precision="highest")
    return product.astype(out_dtype)


def grouped_fp8_matmul(x: Scaled, w: Scaled, groups: Groups, *, out_dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Returns y [A, N] of codes x [A, K], rows by group, and w [X, N, K]; the rows that fill groups up are codes 0."""
    wide_w = _wide(w.codes, jnp.repeat(w.scale, BLOCK, axis=1)[:, : w.codes.shape[1]])
    with jax.default_matmul_precision("highest"):
        return grouped.vjp_input(_wide(x.codes, x.scale.T), wide_w, groups.room_X).astype(out_dtype)


def grouped_fp8_weight_gradient(
    x_t: Scaled, dy_t: Scaled, groups: Groups, *, out_dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns dw [X, D, F] of codes x_t [D, A] and dy_t [F, A]; the rows that fill groups up are codes 0."""
    x, dy = (_wide(a.codes, a.scale.T).T for a in (x_t, dy_t))
    with jax.default_matmul_precision("highest"):
        return grouped.vjp_weight(x, dy, groups.room_X).astype(out_dtype)


def _wide(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Codes [..., rows, K] times scales [..., rows, ceil(K / 128)], float32."""
    return codes.astype(jnp.float32) * jnp.repeat(scale, BLOCK, axis=-1)[..., : codes.shape[-1]]


PART_BLOCKS = 8  # of 128 tokens, which a part of a weight gradient has at least
OUTPUTS = 256  # rows and columns of an output tile of two processors, of which a chip has about
PAIRS = 66


def product_in_parts(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] = (BLOCK, BLOCK),
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str,
) -> jax.Array:
    """Returns `fp8_matmul`, of which a small weight gradient is the sum of several, each over some of the tokens.

    The output of a narrow layer is a few tiles, and a processor that sums one over all tokens works while the others
    wait: 0.23 ms for 512 x 512 outputs and 32,768 tokens on an H200. The parts are groups of a grouped matmul.
    """
    (m, k), n = x.shape, len(w)
    n_parts = _parts(m, n, k) if w_block[0] == 1 else 1
    if n_parts == 1:
        product = fp8_matmul_kernel.fp8_matmul
        return product(x, x_scale, w, w_scale, w_block=w_block, out_dtype=out_dtype, implementation=implementation)
    last_blocks = np.arange(1, n_parts + 1) * (k // BLOCK) // n_parts
    parts = Groups(jnp.asarray(np.diff(last_blocks, prepend=0) * BLOCK, jnp.int32), align=BLOCK)
    gradient = functools.partial(grouped_kernels.grouped_fp8_weight_gradient, implementation=implementation)
    sums_XDF = gradient(_filled(x, x_scale), _filled(w, w_scale), parts, out_dtype=jnp.float32)
    return jnp.sum(sums_XDF, axis=0)[:m, :n].astype(out_dtype)


def _parts(m: int, n: int, k: int) -> int:
    """Parts of the tokens k whose m x n outputs occupy all processors; 1 if those of a single part do."""
    tiles = -(-m // OUTPUTS) * -(-n // OUTPUTS)
    return 1 if k % BLOCK else max(min(PAIRS // tiles, k // BLOCK // PART_BLOCKS), 1)


def _filled(codes: jax.Array, scale: jax.Array) -> Scaled:
    """Codes [rows, K] and scales [blocks, rows] with zeros appended until the rows are a multiple of 128."""
    extra = -len(codes) % BLOCK
    return Scaled(jnp.pad(codes, ((0, extra), (0, 0))), jnp.pad(scale, ((0, 0), (0, extra))))


OPTIONS = ("scale", "floor", "w_block", "out_dtype")


def _by(implementation: str, operation: str, kernel: Callable) -> Callable:
    """`kernel` by this implementation; what it does not support is an error of the user's.

    A function of its own to the compiler, so that the many calls of a model with the same shapes are lowered once.
    """
    static = [name for name in OPTIONS if name in inspect.signature(kernel).parameters]
    kernel_here = jax.jit(functools.partial(kernel, implementation=implementation), static_argnames=static)

    @functools.wraps(kernel)
    def call(*operands: Any, **options: Any) -> Any:
        try:
            return kernel_here(*operands, **options)
        except ValueError as error:
            raise UserError(
                f"kernels.{operation}={implementation!r}: {error} In a run, config.kernels.{operation}=xla."
            ) from error

    return call


_hopper, _tpu = (functools.partial(_by, implementation) for implementation in ("mosaic_gpu", "mosaic_tpu"))
quantize_on_hopper = _hopper("quantize", quantize_kernel.quantize)
quantize_swiglu_on_hopper = _hopper("quantize_swiglu", quantize_kernel.quantize_swiglu)
quantize_squares_on_hopper = _hopper("quantize_squares", quantize_kernel.quantize_squares)
fp8_matmul_on_hopper = _hopper("fp8_matmul", product_in_parts)
grouped_fp8_matmul_on_hopper = _hopper("grouped_fp8_matmul", grouped_kernels.grouped_fp8_matmul)
grouped_fp8_weight_gradient_on_hopper = _hopper(
    "grouped_fp8_weight_gradient", grouped_kernels.grouped_fp8_weight_gradient
)
quantize_on_tpu = _tpu("quantize", quantize_kernel.quantize)
quantize_swiglu_on_tpu = _tpu("quantize_swiglu", quantize_kernel.quantize_swiglu)
quantize_squares_on_tpu = _tpu("quantize_squares", quantize_kernel.quantize_squares)
fp8_matmul_on_tpu = _tpu("fp8_matmul", fp8_matmul_kernel.fp8_matmul)
grouped_fp8_matmul_on_tpu = _tpu("grouped_fp8_matmul", grouped_kernels.grouped_fp8_matmul)
grouped_fp8_weight_gradient_on_tpu = _tpu("grouped_fp8_weight_gradient", grouped_kernels.grouped_fp8_weight_gradient)
