"""The TPU kernels, interpreted on a CPU, against the references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.precision.quantize import quantize_blocks
from pallas_kernels import mosaic_tpu
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul import tpu as matmul
from pallas_kernels.quantize.reference import quantize_rows

INTERPRET = {"interpret": pltpu.InterpretParams()}


def assert_near(found, expected, tolerance=1e-6):
    found, expected = (np.asarray(a.astype(jnp.float32), np.float64) for a in (found, expected))
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("native, out_dtype, tolerance", [(False, jnp.float32, 1e-6), (True, jnp.bfloat16, 4e-3)])
def test_a_product_is_the_reference(native, out_dtype, tolerance):
    """Tiles that reach beyond the matrix, several steps of several blocks; memory not yet written holds NaN."""
    operands = *quantize_rows(normal(0, 40, 512)), *quantize_blocks(normal(1, 136, 512))
    found = matmul.fp8_matmul(*operands, native=native, out_dtype=out_dtype, most=(32, 128, 256), **INTERPRET)
    assert_near(found, fp8_matmul(*operands, out_dtype=out_dtype, implementation="reference"), tolerance)


def test_a_weight_gradient_is_added_to_a_sum():
    operands = *quantize_rows(normal(0, 64, 256)), *quantize_rows(normal(1, 128, 256))
    options = {"w_block": (1, 128), "out_dtype": jnp.float32, "add_to": normal(2, 64, 128)}
    found = matmul.fp8_matmul(*operands, **options, most=(32, 128, 128), **INTERPRET)
    assert_near(found, fp8_matmul(*operands, **options, implementation="reference"))


def test_a_contraction_that_is_not_a_multiple_of_128_is_reported():
    operands = *quantize_rows(normal(0, 4, 200)), *quantize_blocks(normal(1, 16, 200))
    with pytest.raises(ValueError, match=r"K=200: .* multiple of 128. Fill up both operands with zeros to 256, or use"):
        matmul.fp8_matmul(*operands)


def test_a_device_that_is_not_a_tpu_is_reported():
    operands = *quantize_rows(normal(0, 4, 128)), *quantize_blocks(normal(1, 16, 128))
    with pytest.raises(ValueError, match="'mosaic_tpu' on cpu: needs a TPU. Use implementation='reference'"):
        fp8_matmul(*operands, implementation="mosaic_tpu")


@pytest.mark.parametrize("size, most, expected", [(7168, 1024, 1024), (1536, 1024, 768), (1408, 1024, 128)])
def test_a_step_divides_the_contraction_into_whole_blocks(size, most, expected):
    assert mosaic_tpu.step(size, most) == expected


@pytest.mark.parametrize("size, most, expected", [(5, 512, 5), (4096, 512, 512), (576, 512, 256), (2112, 512, 256)])
def test_a_tile_wastes_little_of_its_last_one(size, most, expected):
    assert mosaic_tpu.tile(size, most) == expected
