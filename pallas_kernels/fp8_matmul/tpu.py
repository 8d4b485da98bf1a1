"""Block-scaled FP8 matmul for TPUs in Pallas Mosaic TPU.

    y[m, n] = sum_b  sx[b, m] * sw[b, n] * ( sum_{k in block b}  x[m, k] w[n, k] )

The grid walks over tiles of y and, innermost, over steps of K of up to 8 blocks. The matrix unit sums the 128 products
of a block in float32; the vector unit multiplies by the scales and adds to the tile's float32 sum in VMEM.

TPU7x multiplies E4M3 itself. For v5p and v6e the kernel turns codes into bfloat16, which is exact: FP8 saves memory
and traffic there, no arithmetic. (Given the codes, the compiler emits an instruction for 8-bit floats of bias 11, not
7, on these two.) The kernel is compiled ahead of time for all three and interpreted on a CPU; it has not yet run on a
TPU.

Scales reach the kernel with the blocks of a step together, [K / step, blocks per step, rows]: rows lie along lanes, and
nothing is padded in memory. Scales of 128 x 128 blocks are repeated per row of w first, 1/32 of the bytes of w.
Paper: V3 section 3.3.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels import mosaic_tpu

BLOCK = 128
MOST = (512, 512, 1024)  # of a tile along M, N and K


def fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] = (BLOCK, BLOCK),
    out_dtype: DTypeLike = jnp.bfloat16,
    add_to: jax.Array | None = None,
    native: bool = False,
    most: tuple[int, int, int] = MOST,
    interpret: Any = False,
) -> jax.Array:
    """Returns y [M, N]; arguments as in `pallas_kernels.fp8_matmul`.

    `native`: the chip multiplies E4M3. `most`: the sizes of a tile along M, N and K, at most. `interpret` runs the
    kernel on a CPU. Raises ValueError for a K that is not a multiple of 128; M and N may be any.
    """
    (m, k), n = x.shape, w.shape[0]
    check_contraction(k)
    tile_m, tile_n, step = mosaic_tpu.tile(m, most[0]), mosaic_tpu.tile(n, most[1]), mosaic_tpu.step(k, most[2])
    columns = w_scale if w_block == (1, BLOCK) else repeated(w_scale, n)
    operands = [x, by_step(x_scale, step), w, by_step(columns, step)]
    blocks = step // BLOCK
    y_spec = pl.BlockSpec((tile_m, tile_n), lambda i, j, s: (i, j))
    specs = [
        pl.BlockSpec((tile_m, step), lambda i, j, s: (i, s)),
        pl.BlockSpec((1, blocks, tile_m), lambda i, j, s: (s, 0, i)),
        pl.BlockSpec((tile_n, step), lambda i, j, s: (j, s)),
        pl.BlockSpec((1, blocks, tile_n), lambda i, j, s: (s, 0, j)),
    ]
    if add_to is not None:
        operands, specs = [*operands, add_to], [*specs, y_spec]
    return pl.pallas_call(
        functools.partial(_kernel, add_to is not None, native),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), k // step),
        in_specs=specs,
        out_specs=y_spec,
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
        input_output_aliases={4: 0} if add_to is not None else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*operands)


def check_contraction(k: int) -> None:
    """Raises ValueError unless K is a positive multiple of 128."""
    if k % BLOCK or not k:
        raise ValueError(
            f"K={k}: the TPU kernel expects a positive multiple of {BLOCK}. Fill up both operands with zeros to "
            f"{-(-max(k, 1) // BLOCK) * BLOCK}, or use implementation='reference'."
        )


def repeated(w_scale: jax.Array, n: int) -> jax.Array:
    """Scales of 128 x 128 blocks [..., ceil(N / 128), K / 128] -> per row of w, blocks first: [..., K / 128, N]."""
    return jnp.repeat(w_scale.swapaxes(-1, -2), BLOCK, axis=-1)[..., :n]


def by_step(scale: jax.Array, step: int) -> jax.Array:
    """Scales [..., K / 128, rows] -> [..., K / step, blocks per step, rows]."""
    blocks = step // BLOCK
    return scale.reshape(*scale.shape[:-2], scale.shape[-2] // blocks, blocks, scale.shape[-1])


def _kernel(adds: bool, native: bool, x: Any, x_scale: Any, w: Any, w_scale: Any, *rest: Any) -> None:
    add_to, y, total = rest if adds else (None, *rest)
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = add_to[...] if adds else jnp.zeros_like(total)

    for b in range(x_scale.shape[1]):
        total[...] += scaled_products(x, x_scale.at[0], w, w_scale.at[0], b, native)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y[...] = total[...].astype(y.dtype)


def scaled_products(x: Any, x_scale: Any, w: Any, w_scale: Any, b: int, native: bool) -> jax.Array:
    """The products of block b of a step, times their scales: float32 [rows of x, rows of w]."""
    ks = pl.ds(b * BLOCK, BLOCK)
    operands = (x[:, ks], w[:, ks]) if native else (x[:, ks].astype(jnp.bfloat16), w[:, ks].astype(jnp.bfloat16))
    products = lax.dot_general(*operands, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return products * x_scale[b][:, None] * w_scale[b][None, :]
