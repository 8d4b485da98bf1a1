"""FP4: every code by hand, rounding against ml_dtypes, exact conversion to FP8 or a refusal, training through it."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.precision.fp4 import Fp4Experts, dequantize, fits_fp8, quantize, rounded, to_fp8
from deepseek_jax.precision.policy import policy
from deepseek_jax.precision.quantize import dequantize_blocks

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
quantized, wide = jax.jit(quantize), jax.jit(dequantize, static_argnums=2)


def matrices(shape=(2, 130, 160), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 2.0 ** rng.integers(-2, 2, (*shape[:-1], 1))).astype(np.float32)


def test_bytes_by_hand():
    """The first number is in the low four bits; the scale of amax = 12 is 2, whose code is 127 + 1."""
    w = np.zeros((1, 32), np.float32)
    w[0, :8] = [1, -1, 3, 12, -12, 5, -0.0, 0.4]
    packed, scale = quantized(w)
    assert np.asarray(scale).view(np.uint8).tolist() == [[128]]
    assert np.asarray(packed)[0, :4].tolist() == [0x91, 0x73, 0x4F, 0x08]  # 5 / 2 and 0.4 / 2 are rounded
    np.testing.assert_array_equal(wide(packed, scale, "float32")[0, :8], [1, -1, 3, 12, -12, 4, -0.0, 0])


def test_numbers_are_those_of_ml_dtypes():
    """Every tie included: halves of each step between two codes."""
    w = matrices()
    w[0, 0, :32] = np.r_[6, np.arange(0, 6.2, 0.25), [-0.25, -0.75, -1.25, -2.5, -5, -6]][:32]
    packed, scale = quantized(w)
    scales = np.repeat(np.asarray(scale).astype(np.float32), 32, axis=-1)
    np.testing.assert_array_equal(wide(packed, scale, "float32"), (w / scales).astype(E2M1).astype(np.float32) * scales)
    amax = np.abs(w.reshape(2, 130, 5, 32)).max(-1)
    np.testing.assert_array_equal(np.asarray(scale).astype(np.float32), 2.0 ** np.ceil(np.log2(amax / 6)))


def test_bfloat16_holds_them_exactly():
    packed, scale = quantized(matrices())
    np.testing.assert_array_equal(
        np.asarray(wide(packed, scale, "bfloat16")).astype(np.float32), wide(packed, scale, "float32")
    )
    nan = quantized(np.full((1, 32), np.nan, np.float32))
    assert np.isnan(wide(*nan, "float32")).all() and not np.any(wide(*quantized(np.zeros((1, 32))), "float32"))


def test_fp8_takes_them_over_unchanged():
    packed, scale = quantized(matrices())
    assert np.asarray(jax.jit(fits_fp8)(packed, scale)).all()
    codes, scale_inv = jax.jit(to_fp8)(packed, scale)
    assert codes.shape == (2, 130, 160) and scale_inv.shape == (2, 2, 2) and scale_inv.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(dequantize_blocks(codes, scale_inv, jnp.float32), wide(packed, scale, "float32"))


@pytest.mark.parametrize(("factor", "fits"), [(2.0**-6, True), (2.0**-7, False), (0.0, True)])
def test_scales_of_a_tile_differ_by_64_at_most(factor, fits):
    """The published condition, at its border; zeros alone have no scale that counts. Other tiles do not matter."""
    w = np.tile(np.resize(np.float32([6, 0.5, -1.5, 3]), 32), (256, 4))
    w[3, 32:64] *= factor
    w[128:] *= 2.0**-30
    packed, scale = quantized(w)
    assert bool(jax.jit(fits_fp8)(packed, scale)) == fits
    same = np.array_equal(dequantize_blocks(*to_fp8(packed, scale), jnp.float32), wide(packed, scale, "float32"))
    assert same or not fits


def test_columns_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(ValueError, match="40 columns: FP4 has one scale per 32"):
        quantize(np.zeros((2, 40), np.float32))


def test_gradients_pass_as_if_nothing_were_rounded():
    w = matrices((3, 40))
    value, pull = jax.vjp(rounded, w)
    padded = np.pad(w, [(0, 0), (0, 24)])
    np.testing.assert_array_equal(value, wide(*quantized(padded), "float32")[:, :40])
    np.testing.assert_array_equal(pull(np.float32(w * 3))[0], w * 3)


def test_of_products_those_of_experts_alone_are_rounded():
    """Products of experts are those with rounded weights; other products, and gradients, those of FP8."""
    made = policy("fp4").matmul(policy("fp4").matmul().kernels)
    assert isinstance(made, Fp4Experts) and made.scale == "ue8m0" and made.codes is None
    plain = policy("fp8", {"weights": "float32", "scale": "ue8m0"}).matmul(made.kernels)
    assert made.index_in_fp4 and not plain.index_in_fp4
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 64)).astype(ml_dtypes.bfloat16)
    w, count = matrices((2, 64, 32)), np.int32([100, 120])
    x[100:128] = x[248:] = 0
    x = jax.device_put(x)

    @functools.partial(jax.jit, static_argnums=0)
    def products(matmul, x, w):
        def of(w):
            rows = matmul.operand(x)
            return matmul.grouped(rows, w, count).astype(jnp.float32), matmul.einsum("AD,DF->AF", rows, w[0])

        (y, other), pull = jax.vjp(of, w)
        return y, other, pull((jnp.ones_like(y), jnp.zeros_like(other)))[0]

    y, other, gradient = products(made, x, w)
    expected, _, _ = products(plain, x, np.asarray(rounded(np.swapaxes(w, 1, 2)).mT))
    unrounded, same, known = products(plain, x, w)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(other, same)
    np.testing.assert_array_equal(gradient, known)
    assert np.abs(np.asarray(y) - np.asarray(unrounded)).max() > 0.1
