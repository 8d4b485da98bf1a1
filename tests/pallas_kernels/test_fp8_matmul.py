"""The block-scaled FP8 matmul: the reference against float64, the kernel against the reference where JAX can run it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision.quantize import quantize_blocks
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.quantize.reference import quantize_rows


def operands(m, n, k, w_block=(128, 128), draw="normal"):
    """Codes and scales of a random problem."""
    draws = {
        "normal": lambda key, shape: jax.random.normal(key, shape),
        "heavy": lambda key, shape: jax.random.cauchy(key, shape),
        "one hot": lambda key, shape: jax.random.normal(key, shape).at[:, 5].mul(1e6),
        "zero blocks": lambda key, shape: jax.random.normal(key, shape).at[:, :128].set(0.0),
    }
    keys = jax.random.split(jax.random.key(m + n + k))
    x, w = draws[draw](keys[0], (m, k)), draws[draw](keys[1], (n, k))
    quantised_w = quantize_rows(w) if w_block == (1, 128) else quantize_blocks(w)
    return *quantize_rows(x), *quantised_w


def in_float64(x, x_scale, w, w_scale, w_block=(128, 128)):
    """The product of what the codes and scales stand for."""
    x, x_scale, w, w_scale = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, x_scale, w, w_scale))
    k = x.shape[1]
    columns = w_scale if w_block == (1, 128) else np.repeat(w_scale.T, 128, axis=1)[:, : w.shape[0]]
    return (x * np.repeat(x_scale.T, 128, 1)[:, :k]) @ (w * np.repeat(columns.T, 128, 1)[:, :k]).T


def relative_error(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("draw", ["normal", "heavy", "one hot", "zero blocks"])
@pytest.mark.parametrize("w_block", [(128, 128), (1, 128)])
def test_the_reference_is_the_product_of_what_the_codes_stand_for(draw, w_block):
    problem = operands(9, 136, 256, w_block, draw)
    expected = in_float64(*problem, w_block)
    y = fp8_matmul(*problem, w_block=w_block, out_dtype=jnp.float32, implementation="reference")
    assert relative_error(y, expected) < 1e-6
    y = fp8_matmul(*problem, w_block=w_block, implementation="reference")
    assert y.dtype == jnp.bfloat16
    assert relative_error(y.astype(jnp.float32), expected) < 2e-3


def test_a_contraction_that_is_no_multiple_of_a_block_counts_as_filled_up_with_zeros():
    problem = operands(4, 16, 200)
    y = fp8_matmul(*problem, out_dtype=jnp.float32, implementation="reference")
    assert relative_error(y, in_float64(*problem)) < 1e-6


def test_by_hand():
    """Two blocks of 128 ones: 128 * 2 * 3 from the first, 128 * 5 * 7 from the second."""
    ones = jnp.ones((1, 256), jnp.float8_e4m3fn)
    x_scale, w_scale = jnp.array([[2.0], [5.0]]), jnp.array([[3.0, 7.0]])
    y = fp8_matmul(ones, x_scale, ones, w_scale, out_dtype=jnp.float32, implementation="reference")
    assert y.tolist() == [[128.0 * 6 + 128.0 * 35]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, sx, w, sw: (x[:, :128], sx, w, sw), "with the same K"),
        (lambda x, sx, w, sw: (x.astype(jnp.bfloat16), sx, w, sw), "x is bfloat16: expected float8_e4m3fn"),
        (lambda x, sx, w, sw: (x, sx.T, w, sw), r"expected float32 \(2, 9\).*Transpose it"),
        (lambda x, sx, w, sw: (x, sx, w, sw.astype(jnp.bfloat16)), r"w_scale is bfloat16 \(2, 2\): expected float32"),
    ],
)
def test_operands_that_do_not_fit_are_reported(change, message):
    with pytest.raises(ValueError, match=message):
        fp8_matmul(*change(*operands(9, 136, 256)), implementation="reference")


def test_an_unknown_implementation_is_reported():
    with pytest.raises(ValueError, match="implementation='cuda': unknown. Choose one of reference, mosaic_gpu"):
        fp8_matmul(*operands(9, 136, 256), implementation="cuda")
