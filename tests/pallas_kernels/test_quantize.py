"""Quantisation along both axes: the reference against precision/quantize.py and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision.quantize import quantize_blocks
from pallas_kernels import mosaic_gpu
from pallas_kernels.quantize import gpu, quantize


def bits(codes):
    return np.asarray(jax.lax.bitcast_convert_type(codes, jnp.uint8))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(128, 256), (5, 200)])
def test_both_quantisations_are_those_of_the_blocks(scale, shape):
    x = jax.random.normal(jax.random.key(0), shape) * jnp.exp(jax.random.normal(jax.random.key(1), shape) * 3)
    found = quantize(x, scale=scale, implementation="reference")
    for codes, scales, matrix in ((found.q, found.scale, x), (found.q_t, found.scale_t, x.T)):
        expected, expected_scales = quantize_blocks(matrix, (1, 128), scale)
        np.testing.assert_array_equal(scales.T, np.asarray(expected_scales, np.float32))
        np.testing.assert_array_equal(bits(codes), bits(expected))


def test_by_hand():
    """The largest of a block becomes 448; a block of zeros keeps a scale that is not zero; blocks are independent."""
    x = jnp.zeros((1, 384)).at[0, 0].set(896.0).at[0, 1].set(-2.0).at[0, 128].set(1.75)
    found = quantize(x, implementation="reference")
    assert found.scale[:2, 0].tolist() == [2.0, 2.0**-8]
    assert found.q[0, [0, 1, 128]].astype(jnp.float32).tolist() == [448.0, -1.0, 448.0]
    assert float(found.scale[2, 0]) == pytest.approx(1e-4 / 448)
    assert found.q_t.shape == (384, 1) and found.scale_t.shape == (1, 384)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_blocks_and_no_other(value):
    x = jnp.ones((2, 256)).at[1, 200].set(value)
    found = quantize(x, implementation="reference")
    assert np.isnan(found.q.astype(jnp.float32)).tolist() == [[False] * 256, [False] * 128 + [True] * 128]


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize("scale, dtype", [("fp32", jnp.bfloat16), ("ue8m0", jnp.float32)])
def test_the_kernel_is_the_reference(scale, dtype):
    """Sizes that must be filled up, tiles that one CTA takes after another, values that are not finite.

    Interpreted here, where no operation is fused: a scale may be off by an ulp and a code in a thousand by a step. On a
    GPU `bench kernels` compares every bit.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    x = jax.random.normal(jax.random.key(0), (130, 140)).at[3, 5].set(jnp.nan).at[129, 7].set(jnp.inf).astype(dtype)
    found = gpu.quantize(x, scale=scale, n_processors=1, interpret=plgpu.InterpretGPUParams())
    expected = quantize(x, scale=scale, implementation="reference")
    for codes, scales, reference, reference_scales in ((*found[:2], *expected[:2]), (*found[2:], *expected[2:])):
        np.testing.assert_allclose(scales, reference_scales, rtol=0 if scale == "ue8m0" else 1.2e-7)
        assert np.isnan(scales).sum() == 2
        good = ~np.isnan(np.repeat(scales.T, 128, axis=1)[:, : codes.shape[1]])
        assert np.isnan(codes.astype(jnp.float32))[~good].all()
        steps = np.abs(bits(codes).astype(int) - bits(reference))[good]
        assert steps.max() <= 1 and (steps == 0).mean() > 0.999


def test_a_device_that_is_no_hopper_gpu_is_reported():
    with pytest.raises(ValueError, match="'mosaic_gpu' on cpu: needs a Hopper GPU.*implementation='reference'"):
        quantize(jnp.zeros((2, 3)), implementation="mosaic_gpu")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="expected a matrix of bfloat16 or float32"):
        quantize(jnp.zeros((2, 3, 4)), implementation="reference")
    with pytest.raises(ValueError, match="scale='e5m2': unknown. Choose one of fp32, ue8m0"):
        quantize(jnp.zeros((2, 3)), scale="e5m2", implementation="reference")
