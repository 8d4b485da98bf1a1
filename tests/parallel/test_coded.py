"""Weights gathered in codes: what quantising the whole weight gives, to the bit, wherever it is cut."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.layers.base import matrix_axes
from deepseek_jax.parallel.coded import gather_codes
from deepseek_jax.parallel.mesh import make_mesh, per_device
from deepseek_jax.parallel.mesh import place as place_on
from deepseek_jax.parallel.sharding import Placement
from pallas_kernels.quantize.reference import quantize_squares

COPIES = ("data", "expert")
CUTS = {  # logical axes, shape, the axis that is cut over four devices
    "stack": (("layers", "embed", "mlp"), (4, 130, 200), 0),
    "rows": (("layers", "embed", "mlp"), (2, 264, 130), 1),
    "columns": (("embed", "mlp"), (130, 264), 1),
    "heads, in rows": (("heads", None, "embed"), (4, 72, 130), 0),
    "values, in rows": (("heads", None, "embed"), (3, 100, 130), 1),
    "queries, in columns": (("q_latent", "heads", None), (130, 3, 60), 2),
    "experts' rows": (("layers", "experts", "mlp", "embed"), (1, 2, 264, 130), 2),
}


def gathered(name: str, scale: str, dtype=jnp.float32) -> tuple:
    """(the weight, codes and scales as gathered, text of the compiled program)."""
    axes, shape, dim = CUTS[name]
    mesh = make_mesh(2, 2, jax.devices()[:4])
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight *= np.exp(np.random.default_rng(1).normal(size=shape, scale=3))  # blocks differ
    spec = P(*[COPIES if n == dim else None for n in range(len(shape))])
    place = Placement(P(), COPIES, dim, spec, is_sharded=False)

    def on_device(part: jax.Array) -> tuple:
        return gather_codes(part.astype(dtype), place, matrix_axes(axes), scale)

    run = jax.jit(per_device(on_device, mesh, spec, P())).lower(place_on(weight, mesh, spec)).compile()
    return weight, *run(place_on(weight, mesh, spec)), run.as_text()


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_codes_are_those_of_the_whole_weight(name, scale):
    weight, bits, scales, _ = gathered(name, scale)
    axes = CUTS[name][0]
    n_stacked, n_contracted = matrix_axes(axes)
    *stack, k = (*weight.shape[:n_stacked], int(np.prod(weight.shape[n_stacked:][:n_contracted])))
    known = jax.jit(quantize_squares, static_argnames="scale")(weight.reshape(*stack, k, -1), scale=scale)
    np.testing.assert_array_equal(scales, known.scale)
    np.testing.assert_array_equal(bits, np.asarray(known.q).view(np.uint8).reshape(weight.shape))


def test_one_byte_per_number_is_gathered_and_four_per_block_are_agreed_on():
    weight, _, scales, text = gathered("rows", "fp32", jnp.bfloat16)
    (of_codes,) = re.findall(r"= (\w+)\[([\d,]+)\][^=]* all-gather\(", text)
    (of_scales,) = re.findall(r"= (\w+)\[([\d,]+)\][^=]* all-reduce\(", text)
    assert of_codes[0] == "u8" and np.prod(list(map(int, of_codes[1].split(",")))) == weight.size
    assert of_scales[0] == "s32" and np.prod(list(map(int, of_scales[1].split(",")))) == scales.size
