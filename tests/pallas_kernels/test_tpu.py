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
from pallas_kernels.grouped_matmul import (
    Groups,
    Scaled,
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    grouped_matmul,
    grouped_weight_gradient,
)
from pallas_kernels.grouped_matmul import tpu as grouped
from pallas_kernels.quantize import quantize, quantize_squares, quantize_swiglu
from pallas_kernels.quantize import tpu as quantiser
from pallas_kernels.quantize.reference import quantize_rows

pytestmark = pytest.mark.slow  # a kernel takes a second or more to interpret
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


COUNTS = [[70, 0, 3, 50], [0, 128, 0, 0], [0, 0, 0, 0], [64, 64, 32, 0]]
SMALL = {"most": (64, 128, 128), **INTERPRET}
REFERENCE = {"implementation": "reference"}


def poisoned(x, counts, align=1):
    """`x` with NaN in the rows of no group."""
    mine, first = np.zeros(len(x), bool), 0
    for n in counts:
        mine[first : first + n] = True
        first += -(-n // align) * align
    return jnp.where(mine[:, None], x, jnp.nan)


@pytest.mark.parametrize("counts, align", [(COUNTS[0], 1), (COUNTS[0], 8), (COUNTS[1], 1), (COUNTS[2], 1)])
def test_rows_are_multiplied_by_the_weights_of_their_group(counts, align):
    """Rows of no group hold NaN, and give 0."""
    x, w = (
        poisoned(normal(0, 200, 256), counts, align).astype(jnp.bfloat16),
        normal(1, 4, 256, 128).astype(jnp.bfloat16),
    )
    groups = Groups(jnp.array(counts, jnp.int32), align)
    expected = grouped_matmul(x, w, groups, **REFERENCE)
    assert_near(grouped.grouped_matmul(x, w, groups, **SMALL), expected, 1e-3)
    assert_near(grouped.grouped_matmul(x, w.mT, groups, transposed=True, **SMALL), expected, 1e-3)


@pytest.mark.parametrize("counts", [COUNTS[0], COUNTS[2]])
def test_weight_gradients_are_those_of_each_group(counts):
    groups = Groups(jnp.array(counts, jnp.int32))
    x, dy = (poisoned(normal(seed, 200, width), counts).astype(jnp.bfloat16) for seed, width in ((0, 128), (1, 256)))
    found = grouped.grouped_weight_gradient(x, dy, groups, **SMALL)
    assert_near(found, grouped_weight_gradient(x, dy, groups, **REFERENCE))


def test_the_same_in_fp8():
    counts, options = [70, 0, 3, 50], {"out_dtype": jnp.float32}
    groups = Groups(jnp.array(counts, jnp.int32))
    x = Scaled(*quantize_rows(normal(0, 200, 256)))
    w = Scaled(*jax.vmap(quantize_blocks)(normal(1, 4, 128, 256)))
    found = grouped.grouped_fp8_matmul(x, w, groups, native=True, **options, **SMALL)
    assert_near(found, grouped_fp8_matmul(x, w, groups, **options, **REFERENCE))
    mine = poisoned(jnp.ones((640, 1)), [70, 0, 3, 150], 128)
    rows = [jnp.nan_to_num(normal(seed, 640, width) * mine) for seed, width in ((2, 128), (3, 256))]
    operands = *(Scaled(*quantize_rows(one.T)) for one in rows), Groups(jnp.array([70, 0, 3, 150], jnp.int32), 128)
    found = grouped.grouped_fp8_weight_gradient(*operands, **{**SMALL, "most": (64, 128, 256)})
    assert_near(found, grouped_fp8_weight_gradient(*operands, **REFERENCE))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("align", [1, 8])
def test_visits_cover_every_row_once(counts, align):
    plan = grouped._visits_of_rows(Groups(jnp.array(counts, jnp.int32), align), 200, 64)
    seen = np.zeros(256, int)
    assert int(plan.n_visits) <= len(plan.range_V)
    for own, tile in np.stack([plan.range_V, plan.tile_V], 1)[: int(plan.n_visits)]:
        rows = np.arange(64 * tile, 64 * tile + 64)
        seen[rows] += (plan.low_Y[own] <= rows) & (rows < plan.high_Y[own])
    assert (seen[:200] == 1).all() and not seen[200:].any()
    tiles = np.asarray(plan.tile_V)[: int(plan.n_visits)]
    assert (np.diff(tiles) >= 0).all(), "visits of a tile follow one another"


def test_shapes_that_the_grouped_kernels_do_not_take_are_reported():
    x, groups = jnp.zeros((8, 256), jnp.bfloat16), Groups(jnp.array([8], jnp.int32))
    with pytest.raises(ValueError, match="D=256, F=100: the TPU kernel expects positive multiples of 128. Fill"):
        grouped.grouped_matmul(x, jnp.zeros((1, 256, 100), jnp.bfloat16), groups)
    with pytest.raises(ValueError, match="x is float32: the TPU kernel expects bfloat16"):
        grouped.grouped_weight_gradient(x.astype(jnp.float32), x, groups)
    with pytest.raises(ValueError, match="'mosaic_tpu' on cpu: needs a TPU"):
        grouped_matmul(x, jnp.zeros((1, 256, 128), jnp.bfloat16), groups, implementation="mosaic_tpu")


def assert_quantised(found, expected, scale):
    """Codes and scales of the reference; with float32 scales, which are off by an ulp, a few codes differ by a step."""
    for codes, scales, reference, reference_scales in ((*found[:2], *expected[:2]), (*found[2:], *expected[2:])):
        np.testing.assert_allclose(scales, reference_scales, rtol=0 if scale == "ue8m0" else 3e-7)
        values, right = (np.asarray(a.astype(jnp.float32)) for a in (codes, reference))
        np.testing.assert_allclose(values, right, rtol=0 if scale == "ue8m0" else 1 / 7.9, atol=2.0**-8)
        assert np.mean((values == right) | np.isnan(right)) > 0.998


@pytest.mark.parametrize("scale, dtype", [("fp32", jnp.bfloat16), ("ue8m0", jnp.float32)])
def test_a_matrix_is_quantised_in_both_directions(scale, dtype):
    """Sizes that must be filled up, several tiles and blocks; values that are not finite spoil their own blocks."""
    x = normal(0, 200, 500).at[3, 5].set(jnp.nan).at[199, 7].set(jnp.inf).astype(dtype)
    found = quantiser.quantize(x, scale=scale, most=(128, 256), **INTERPRET)
    assert_quantised(found, quantize(x, scale=scale, **REFERENCE), scale)


@pytest.mark.parametrize("scale, dtype", [("fp32", jnp.bfloat16), ("ue8m0", jnp.float32)])
def test_weights_are_quantised_in_squares(scale, dtype):
    """Two of them, with sizes that must be filled up, several tiles and blocks, and a value that is not finite."""
    w = normal(0, 2, 200, 500).at[1, 3, 5].set(jnp.inf).astype(dtype)
    found = quantiser.quantize_squares(w, scale=scale, most=(128, 256), **INTERPRET)
    both = (found, quantize_squares(w, scale=scale, **REFERENCE))
    assert_quantised(*((codes.q, codes.scale, codes.q_t, codes.scale) for codes in both), scale)


@pytest.mark.parametrize("joint, f", [(True, 256), (True, 140), (False, 256)])
def test_a_swiglu_is_quantised_in_both_directions(joint, f):
    gate, up, factor = 3 * normal(0, 130, f), normal(1, 130, f), jnp.abs(normal(2, 130))
    operands = (jnp.concatenate([gate, up], 1), None, factor) if joint else (gate, up)
    found = quantiser.quantize_swiglu(*operands, floor=1e-9, most=(128, 128), **INTERPRET)
    assert_quantised(found, quantize_swiglu(*operands, floor=1e-9, **REFERENCE), "fp32")
