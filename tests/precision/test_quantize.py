"""Blocks of 8-bit floats: the definition written out in numpy, exact powers of two, nothing overflows."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.convert import safetensors
from deepseek_jax.precision import quantize
from deepseek_jax.precision.quantize import AMAX_FLOOR, E4M3, E8M0

quantize_blocks = jax.jit(quantize.quantize_blocks, static_argnames=("block", "scale"))
dequantize_blocks = jax.jit(quantize.dequantize_blocks, static_argnames=("dtype", "block"))

SHAPES = [((5, 7), (2, 3)), ((4, 6), (2, 3)), ((2, 3, 5, 4), (4, 4)), ((3, 9), (1, 4)), ((1, 1), (128, 128))]


def by_hand(w: np.ndarray, block: tuple[int, int], scale: str) -> tuple[np.ndarray, np.ndarray]:
    """The definition for one matrix, a block at a time."""
    rows, columns = (range(0, size, b) for size, b in zip(w.shape, block, strict=True))
    q, scales = np.zeros(w.shape, ml_dtypes.float8_e4m3fn), np.zeros((len(rows), len(columns)), np.float32)
    for i in rows:
        for j in columns:
            here = slice(i, i + block[0]), slice(j, j + block[1])
            amax = np.maximum(np.abs(w[here]).max(), np.float32(AMAX_FLOOR))
            s = amax / np.float32(448)
            if scale == "ue8m0":
                s = next(np.float32(2.0**e) for e in range(-60, 120) if 448 * 2.0**e >= float(amax))
            scales[i // block[0], j // block[1]] = s
            q[here] = np.clip(w[here] / s, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return q, scales


def bits(x: jax.Array | np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_equals_the_definition_to_the_last_bit(shape, block, scale):
    rng = np.random.default_rng(0)
    w = (rng.normal(size=shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(np.float32)
    q, scale_inv = quantize_blocks(w, block, scale)
    assert q.dtype == E4M3 and q.shape == w.shape
    assert scale_inv.dtype == (jnp.float32 if scale == "fp32" else E8M0)
    expected = [by_hand(matrix, block, scale) for matrix in w.reshape(-1, *shape[-2:])]
    np.testing.assert_array_equal(bits(q).reshape(-1, *shape[-2:]), bits([q for q, _ in expected]))
    found = np.float32(scale_inv)
    np.testing.assert_array_equal(found.reshape(-1, *found.shape[-2:]), [s for _, s in expected])
    if shape == (5, 7):
        for ours, uncompiled in zip((q, scale_inv), quantize.quantize_blocks(w, block, scale), strict=True):
            np.testing.assert_array_equal(bits(ours), bits(uncompiled))


@pytest.mark.parametrize(("scale", "dtype"), [("fp32", jnp.bfloat16), ("ue8m0", jnp.bfloat16), ("bf16", jnp.float32)])
@pytest.mark.parametrize(("shape", "block"), SHAPES[:3])
def test_dequantising_here_and_while_reading_a_file_is_the_same(tmp_path, shape, block, scale, dtype):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    q, scale_inv = quantize_blocks(w, block, "ue8m0" if scale == "ue8m0" else "fp32")
    scale_inv = scale_inv.astype(jnp.bfloat16) if scale == "bf16" else scale_inv
    arrays = {"w": np.asarray(q), "w_scale_inv": np.asarray(scale_inv)}
    safetensors.write_directory(tmp_path, [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()])
    read = safetensors.open_directory(tmp_path).read_dequantized("w", dtype, block)
    here = dequantize_blocks(q, scale_inv, dtype, block)
    assert read.dtype == here.dtype == dtype
    np.testing.assert_array_equal(bits(read), bits(here))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_close_to_the_weights(scale):
    w = np.random.default_rng(2).normal(size=(256, 130)).astype(np.float32)
    w_again = dequantize_blocks(*quantize_blocks(w, scale=scale), jnp.float32)
    amax = np.abs(w).max()
    tolerance = np.maximum(np.abs(w) * 2.0**-4, amax * 2.0**-16)  # three bits of mantissa; the smallest code's half
    assert (np.abs(w_again - w) <= tolerance).all()


def test_a_second_time_changes_nothing_with_power_of_two_scales():
    q, scale_inv = quantize_blocks(np.random.default_rng(3).normal(size=(40, 24)), (16, 16), "ue8m0")
    q_again, again = quantize_blocks(dequantize_blocks(q, scale_inv, block=(16, 16)), (16, 16), "ue8m0")
    np.testing.assert_array_equal(bits(again), bits(scale_inv))
    np.testing.assert_array_equal(bits(q_again), bits(q))


def test_powers_of_two_are_exact_on_both_sides_of_every_boundary():
    boundary = [np.float32(448 * 2.0**e) for e in range(-22, 119)]
    amax = np.array([np.nextafter(b, np.float32(d)) for b in boundary for d in (0, b, np.inf)], np.float32)
    _, scale_inv = quantize_blocks(amax[:, None], (1, 1), "ue8m0")
    expected = [2.0 ** (e + step) for e in range(-22, 119) for step in (0, 0, 1)]
    np.testing.assert_array_equal(np.float32(scale_inv)[:, 0], expected)
    assert [math.frexp(s)[0] for s in np.float32(scale_inv)[:, 0].tolist()] == [0.5] * len(amax)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_zeros_and_the_largest_floats_stay_finite(scale):
    for value in (0.0, 1e-30, 1e-4, 448.0, 3e38, float(np.finfo(np.float32).max)):
        q, scale_inv = quantize_blocks(np.full((3, 3), value, np.float32), (2, 2), scale)
        assert np.isfinite(np.float32(q)).all() and (np.float32(scale_inv) > 0).all()
        if 1e-4 <= value <= 3e38:  # the largest float of all is rounded up, out of range
            np.testing.assert_allclose(dequantize_blocks(q, scale_inv, jnp.float32, (2, 2)), value, rtol=2.0**-4)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad, scale):
    w = np.ones((4, 4), np.float32)
    w[0, 1] = bad
    again = np.float32(dequantize_blocks(*quantize_blocks(w, (2, 2), scale), jnp.float32, (2, 2)))
    assert np.isnan(again[:2, :2]).all()
    np.testing.assert_allclose(again[2:], 1, rtol=2.0**-4)
    np.testing.assert_allclose(again[:, 2:], 1, rtol=2.0**-4)


def test_a_case_by_hand():
    w = np.array([[896.0, 1.0, 0.5], [-448.0, 0.0, 0.25]], np.float32)
    q, scale_inv = quantize_blocks(w, (2, 2))
    np.testing.assert_array_equal(scale_inv, np.float32([[2.0, 0.5 / 448]]))
    np.testing.assert_array_equal(np.float32(q), [[448, 0.5, 448], [-224, 0, 224]])
