"""Products of a warpgroup for Hopper, one or two of them at the tensor cores at a time.

With two in flight the tensor cores work on a product while the warpgroup promotes the one before. ptxas lets that be
only where no loop or branch lies between a product's beginning and its end; otherwise it has every product waited for.
"""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def one_after_another(
    n: int,
    in_flight: int,
    shape: tuple[int, int],
    begin: Callable[[Any, int], None],
    finish: Callable[[Any, int, dict], dict],
    meanwhile: Callable[[], None],
    sums: dict,
) -> dict:
    """Returns the sums after `n` products of `shape`.

    Args:
        n: how many products.
        in_flight: 1 or 2.
        shape: of a product.
        begin: starts product i on an accumulator, which holds zeros.
        finish: adds product i, which is done, to the sums and returns them.
        meanwhile: runs while a product is in flight.
        sums: those of the chunks so far.
    """

    def chain(i: int, before: Any, sums: dict) -> dict:
        """Product i and those after it, while product i - 1 may be in flight."""

        def multiply(accumulator: Any) -> dict:
            added, last = sums, i == n - 1
            begin(accumulator, i)
            if before is not None:
                added = finish(plgpu.wgmma_accumulator_load(before, wait_n=1), i - 1, added)
                added = added if last else lax.optimization_barrier(added)  # keeps the next product behind it
            meanwhile()
            if in_flight == 1 or last:
                added = finish(plgpu.wgmma_accumulator_load(accumulator, wait_n=0), i, added)
            return added if last else chain(i + 1, accumulator if in_flight > 1 else None, added)

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    return chain(0, None, sums)
