"""Quantisation along both axes: the reference against precision/quantize.py and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import quantize as blocks
from pallas_kernels import mosaic_gpu
from pallas_kernels import quantize as kernels
from pallas_kernels.quantize import gpu


def compiled(function, *static):
    """One program per call instead of one per operation, and the result on the host."""
    function = jax.jit(function, static_argnames=static)
    return lambda *operands, **options: jax.device_get(function(*operands, **options))


quantize, quantize_squares, quantize_swiglu = (
    compiled(function, "implementation", "scale", "floor")
    for function in (kernels.quantize, kernels.quantize_squares, kernels.quantize_swiglu)
)
quantize_blocks = compiled(blocks.quantize_blocks, "block", "scale")
swiglu = compiled(lambda gate, up, factor: jax.nn.silu(gate) * up * factor[:, None])


def bits(codes):
    return np.asarray(codes).view(np.uint8)


def of_many_sizes(shape) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape)))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(128, 256), (5, 200)])
def test_both_quantisations_are_those_of_the_blocks(scale, shape):
    x = of_many_sizes(shape)
    found = quantize(x, scale=scale, implementation="reference")
    for codes, scales, matrix in ((found.q, found.scale, x), (found.q_t, found.scale_t, x.T)):
        expected, expected_scales = quantize_blocks(matrix, (1, 128), scale)
        np.testing.assert_array_equal(scales.T, np.asarray(expected_scales, np.float32))
        np.testing.assert_array_equal(bits(codes), bits(expected))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(128, 256), (3, 130, 200)])
def test_weights_are_quantised_in_squares_as_stored_and_transposed(scale, shape):
    w = of_many_sizes(shape)
    found = quantize_squares(w, scale=scale, implementation="reference")
    codes, scales = quantize_blocks(w, (128, 128), scale)
    np.testing.assert_array_equal(bits(found.q), bits(codes))
    np.testing.assert_array_equal(bits(found.q_t), bits(codes).swapaxes(-1, -2))
    np.testing.assert_array_equal(found.scale, np.asarray(scales, np.float32))


def test_by_hand():
    """The largest of a block becomes 448; a block of zeros keeps a scale that is not zero; blocks are independent."""
    x = np.zeros((1, 384), np.float32)
    x[0, [0, 1, 128]] = 896.0, -2.0, 1.75
    found = quantize(x, implementation="reference")
    assert found.scale[:2, 0].tolist() == [2.0, 2.0**-8]
    assert found.q[0, [0, 1, 128]].astype(jnp.float32).tolist() == [448.0, -1.0, 448.0]
    assert float(found.scale[2, 0]) == pytest.approx(1e-4 / 448)
    assert found.q_t.shape == (384, 1) and found.scale_t.shape == (1, 384)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_blocks_and_no_other(value):
    x = np.ones((2, 256), np.float32)
    x[1, 200] = value
    found = quantize(x, implementation="reference")
    assert np.isnan(found.q.astype(jnp.float32)).tolist() == [[False] * 256, [False] * 128 + [True] * 128]


def test_a_lower_floor_keeps_small_values():
    """Multiplied by a power of two, values keep their codes and their scales move along."""
    x = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    found = quantize(x * np.float32(2.0**-60), implementation="reference", floor=1e-25)
    expected = quantize(x, implementation="reference")
    np.testing.assert_array_equal(bits(found.q), bits(expected.q))
    np.testing.assert_array_equal(found.scale, expected.scale * 2.0**-60)
    assert not quantize(x * np.float32(2.0**-60), implementation="reference").q.astype(jnp.float32).any()


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_a_fused_swiglu_is_quantised_in_both_directions(scale):
    """In two steps, by jax.nn: a scale may be off by an ulp or two, a code in a thousand by a step."""
    gate, up, factor = swiglu_inputs(130, 140, jnp.float32)
    found = quantize_swiglu(gate, up, factor, scale=scale, implementation="reference")
    expected = quantize(swiglu(gate, up, factor), scale=scale, implementation="reference")
    assert_nearly(found, expected, scale)
    joint = quantize_swiglu(np.concatenate([gate, up], 1), None, factor, scale=scale, implementation="reference")
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found, joint, strict=True))


def swiglu_inputs(m, f, dtype):
    rng = np.random.default_rng(7)
    gate, up = (3 * rng.normal(size=(m, f)) for _ in range(2))
    return gate.astype(dtype), up.astype(dtype), rng.random(m, np.float32)


def assert_nearly(found, expected, scale):
    for codes, scales, reference, reference_scales in ((*found[:2], *expected[:2]), (*found[2:], *expected[2:])):
        np.testing.assert_allclose(scales, reference_scales, rtol=0 if scale == "ue8m0" else 1e-6)
        values, expected_values = (np.asarray(a.astype(jnp.float32)) for a in (codes, reference))
        np.testing.assert_allclose(values, expected_values, rtol=1 / 7.9, atol=2.0**-8)  # a step
        assert (values == expected_values).mean() > 0.998


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize(
    "shape, dtype, joint, tuning",
    [
        ((130, 140), jnp.float32, False, gpu.Tuning(1, 1, 1)),
        ((130, 140), jnp.bfloat16, True, gpu.Tuning(2, 2, 1)),
        ((256, 128), jnp.bfloat16, True, gpu.Tuning(2, 2, 1)),
    ],
)
def test_the_fused_kernel_is_the_reference(shape, dtype, joint, tuning):
    """Gate and up apart and side by side, also where F is not a multiple of 128; with factors and without."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    gate, up, factor = map(jnp.asarray, swiglu_inputs(*shape, dtype))
    operands = (jnp.concatenate([gate, up], 1), None, factor) if joint else (gate, up)
    options = {"n_processors": 1, "interpret": plgpu.InterpretGPUParams(), "tuning": tuning}
    found = gpu.quantize_swiglu(*operands, **options)
    assert_nearly(found, quantize_swiglu(*operands, implementation="reference"), "fp32")


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize("scale, dtype", [("fp32", jnp.bfloat16), ("ue8m0", jnp.float32)])
def test_the_kernel_is_the_reference(scale, dtype):
    """Sizes that must be filled up, tiles that one CTA takes after another, values that are not finite.

    Interpreted here, where no operation is fused: a scale may be off by an ulp and a code in five hundred by a step. On
    a GPU `bench kernels` compares every bit.
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
        assert steps.max() <= 1 and (steps == 0).mean() > 0.998


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize("scale, dtype", [("fp32", jnp.bfloat16), ("ue8m0", jnp.float32)])
def test_the_kernel_for_weights_is_the_reference(scale, dtype):
    """Several weights whose sizes must be filled up; a NaN spoils its own block and no other."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    w = jax.random.normal(jax.random.key(0), (2, 130, 140)).at[1, 3, 5].set(jnp.nan).astype(dtype)
    found = gpu.quantize_squares(w, scale=scale, n_processors=1, interpret=plgpu.InterpretGPUParams())
    expected = quantize_squares(w, scale=scale, implementation="reference")
    np.testing.assert_allclose(found.scale, expected.scale, rtol=0 if scale == "ue8m0" else 1.2e-7)
    assert np.isnan(found.scale).sum() == 1
    np.testing.assert_array_equal(bits(found.q_t), bits(found.q).swapaxes(1, 2))
    values, right = (np.asarray(a.q.astype(jnp.float32)) for a in (found, expected))
    assert ((values == right) | np.isnan(right)).mean() > 0.998


def test_a_device_that_is_no_hopper_gpu_is_reported():
    with pytest.raises(ValueError, match="'mosaic_gpu' on cpu: needs a Hopper GPU.*implementation='reference'"):
        quantize(jnp.zeros((2, 3)), implementation="mosaic_gpu")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="expected a matrix of bfloat16 or float32"):
        quantize(jnp.zeros((2, 3, 4)), implementation="reference")
    with pytest.raises(ValueError, match="w is float32 .3,.: expected a matrix or several of bfloat16 or float32"):
        quantize_squares(jnp.zeros(3), implementation="reference")
    with pytest.raises(ValueError, match="scale='e5m2': unknown. Choose one of fp32, ue8m0"):
        quantize(jnp.zeros((2, 3)), scale="e5m2", implementation="reference")
    with pytest.raises(ValueError, match="floor=0.0: expected a finite number of at least 1e-30"):
        quantize(jnp.zeros((2, 3)), floor=0.0, implementation="reference")
    with pytest.raises(ValueError, match="implementation='cuda': unknown. Choose one of reference, mosaic_gpu"):
        quantize(jnp.zeros((2, 3)), implementation="cuda")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda gate, up, factor: (gate[:, :5], None, factor), r"expected gate and up side by side, \[M, 2 F\]"),
        (lambda gate, up, factor: (gate, up[:3], factor), r"up is float32 \(3, 6\): expected float32 \(4, 6\)"),
        (lambda gate, up, factor: (gate, up, factor[:3]), r"factor is \(3,\): expected \(4,\), one number per row"),
        (lambda gate, up, factor: (gate[0], up, factor), "gate is float32 .6,.: expected a matrix"),
    ],
)
def test_operands_of_a_swiglu_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_swiglu(*change(*swiglu_inputs(4, 6, jnp.float32)), implementation="reference")
