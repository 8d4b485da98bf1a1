"""Weights that stay in FP8: the numbers they stand for, in whichever axes, alone or beside another in a matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.precision import fp8_weight, fp8_weight_kernels
from deepseek_jax.precision.fp8_weight import Layout, block_rows
from deepseek_jax.precision.grouped import OfLayer
from deepseek_jax.precision.matmul import PLAIN, PlainMatmul
from deepseek_jax.precision.quantize import dequantize_blocks, quantize_blocks

encoded = jax.jit(fp8_weight.encoded, static_argnums=1)
widen = jax.jit(lambda weight: weight.astype(jnp.float32))
rounded = jax.jit(lambda matrix: dequantize_blocks(*quantize_blocks(matrix), jnp.float32))

DRAW = np.random.default_rng(0)
HEADS = Layout((3, 48), (200,), (2, 0, 1))  # q_DHQ


def coded(layout, *leading):
    (found,) = encoded((DRAW.normal(size=(*leading, *layout.shape)).astype(np.float32),), (layout,))
    return found


def test_codes_and_scales_are_those_of_the_published_matrix():
    w = DRAW.normal(size=(2, *HEADS.shape)).astype(np.float32)
    (found,) = encoded((w,), (HEADS,))
    matrix = w.transpose(0, 2, 3, 1).reshape(2, 144, 200)
    codes, scale = jax.jit(quantize_blocks)(matrix)
    np.testing.assert_array_equal(np.float32(found.codes), np.float32(codes))
    np.testing.assert_array_equal(found.scale, scale)
    assert found.shape == w.shape and found.nbytes == codes.size + 4 * scale.size
    wide = np.asarray(rounded(matrix)).reshape(2, 3, 48, 200)
    np.testing.assert_array_equal(widen(found), wide.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("outer", "widths"), [((), (256, 64)), ((), (32, 16)), ((3,), (128, 64)), ((2,), (24, 8))])
def test_weights_side_by_side_in_a_matrix_keep_its_scales(outer, widths):
    """Of latents and rotary keys, or of each head's keys and values; blocks need not begin where a weight does."""
    starts, n_heads = (0, widths[0]), int(np.prod(outer))
    order = tuple(range(len(outer) + 2))
    layouts = tuple(
        Layout((*outer, width), (130,), order, block_rows(widths, n_heads, start))
        for width, start in zip(widths, starts, strict=True)
    )
    ws = [DRAW.normal(size=(2, *layout.shape)).astype(np.float32) for layout in layouts]
    whole = np.concatenate(ws, axis=-2).reshape(2, -1, 130)
    expected = np.asarray(rounded(whole)).reshape(2, *outer, -1, 130)
    for found, width, start in zip(encoded(tuple(ws), layouts), widths, starts, strict=True):
        np.testing.assert_array_equal(widen(found), expected[..., start : start + width, :])
        assert found.scale.shape[1:] == found.layout.blocks


def test_a_product_is_that_of_the_dequantised_weight():
    w, x = coded(HEADS), jax.device_put(np.asarray(DRAW.normal(size=(2, 5, 200)), jnp.float32))
    multiply = jax.jit(functools.partial(PLAIN.einsum, "BTD,DHQ->BTHQ"))
    np.testing.assert_array_equal(multiply(x, w), multiply(x, widen(w)))


@pytest.mark.parametrize("chosen", [None, (3, 0, 3, 1)])
def test_rows_meet_the_codes_of_their_experts_in_a_stack_of_layers(chosen):
    stack = coded(Layout((48,), (130,), (1, 0)), 2, 4)  # of gates, [L, X, D, F]
    w_XDF = OfLayer(stack, jnp.int32(1), chosen and jnp.asarray(chosen))
    x_AD, count_X = jax.device_put(np.asarray(DRAW.normal(size=(9, 130)), jnp.float32)), jnp.asarray([2, 0, 4, 1])
    wide = w_XDF._replace(stack_LXDF=widen(stack))
    found, expected = (jax.jit(PLAIN.grouped)(x_AD, w, count_X) for w in (w_XDF, wide))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)  # sums in another order
    assert not found[7:].any()


def test_the_kernel_multiplies_where_the_form_allows_and_says_what_it_needs():
    """The absorbed form is XLA's; a product of all rows with one matrix goes to the kernel, and gets its axes back."""
    shapes = []

    def multiply(x_AK, w_XKN, count_X):
        shapes.append((x_AK.shape, w_XKN.codes.shape, count_X.tolist()))
        return fp8_weight_kernels.by_xla(x_AK, w_XKN, count_X)

    keys = coded(Layout((3, 128), (128,), (2, 0, 1)))  # k_up_CHN
    x = jax.device_put(np.asarray(DRAW.normal(size=(2, 5, 128)), jnp.float32))
    found = fp8_weight_kernels.einsum(multiply, "BSC,CHN->BSHN", x, keys)
    np.testing.assert_allclose(found, PLAIN.einsum("BSC,CHN->BSHN", x, keys), rtol=1e-5, atol=1e-4)
    out = coded(Layout((16,), (3, 128), (1, 2, 0)))  # out_HUD
    fp8_weight_kernels.einsum(multiply, "BTHU,HUD->BTD", found, out)
    fp8_weight_kernels.einsum(multiply, "BTHN,CHN->BTHC", found, keys)  # the absorbed form
    assert shapes == [((10, 128), (1, 384, 128), [10]), ((10, 384), (1, 16, 384), [10])]
    fp8_weight_kernels.einsum(multiply, "BTD,DF->BTF", x[..., :64], coded(Layout((16,), (64,), (1, 0))))
    assert len(shapes) == 2  # half a block of columns
    with pytest.raises(UserError, match="kernels.coded_matmul='mosaic_gpu': .* on cpu: needs a Hopper GPU"):
        PlainMatmul(Kernels(coded_matmul="mosaic_gpu")).einsum("BSC,CHN->BSHN", x, keys)
