"""The experts of one token: the definition against a loop over experts, the interpreted kernel against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul import Scaled
from pallas_kernels.token_experts import experts, experts_in_codes


def inputs(d: int, f: int, n_experts: int, chosen: list[list[int]], dtype=jnp.float32) -> tuple:
    """Tokens, weights with NaN in all experts that they do not visit, their choices."""
    rng = np.random.default_rng(0)
    there = np.where(np.isin(np.arange(n_experts), chosen), 1, np.nan)[:, None, None]
    x_MD = rng.normal(size=(len(chosen), d))
    weights = [there * rng.normal(size=(n_experts, *size)) / np.sqrt(size[0]) for size in ((d, f), (d, f), (f, d))]
    arrays = [jnp.asarray(array, dtype) for array in (x_MD, *weights)]
    return *arrays, jnp.array(chosen, jnp.int32), jax.device_put(np.asarray(rng.random(np.shape(chosen)), jnp.float32))


def test_the_definition_is_the_weighted_sum_of_the_chosen_experts():
    *arrays, chosen, weight = inputs(6, 4, 5, [[3, 0, 3], [4, 3, 1]])
    y_MD = experts(*arrays, chosen, weight, implementation="reference")
    x_MD, gate, up, down = arrays
    for m, x in enumerate(x_MD):
        of_each = zip(chosen[m], weight[m], strict=True)
        y_D = sum(w * (jax.nn.silu(x @ gate[i]) * (x @ up[i])) @ down[i] for i, w in of_each)
        np.testing.assert_allclose(y_MD[m], y_D, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")
def test_the_kernel_is_the_definition():
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels.token_experts import gpu

    # An expert of both tokens is read once; tokens that are padding choose one expert several times.
    arrays = inputs(512, 128, 4, [[3, 1, 3], [2, 3, 3]], jnp.bfloat16)
    right = experts(
        *(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in arrays), implementation="reference"
    )
    y_MD = gpu.experts(*arrays, interpret=plgpu.InterpretGPUParams())
    assert np.linalg.norm(y_MD.astype(jnp.float32) - right) <= 3e-3 * np.linalg.norm(right)


@pytest.mark.parametrize(
    ("d", "f", "dtype", "name", "message"),
    [
        (256, 64, jnp.float32, "mosaic_gpu", "float32, D=256, F=64; expected bfloat16"),
        (
            128,
            64,
            jnp.bfloat16,
            "mosaic_gpu",
            "bfloat16, D=128, F=64; expected bfloat16 and multiples of 256, up to 8192, and 64",
        ),
        (256, 64, jnp.bfloat16, "mosaic_gpu", "needs a Hopper GPU"),
        (4, 4, jnp.float32, "cuda", "implementation='cuda': unknown. Choose one of reference, mosaic_gpu"),
    ],
)
def test_what_it_does_not_take(d, f, dtype, name, message):
    with pytest.raises(ValueError, match=message):
        experts(*inputs(d, f, 2, [[0]], dtype), implementation=name)


def test_arguments_that_do_not_fit_together():
    x_MD, gate, up, down, chosen, weight = inputs(6, 4, 2, [[1]])
    with pytest.raises(ValueError, match=r"expected \[M, D\], \[X, D, F\] twice"):
        experts(x_MD, gate, up, gate, chosen, weight, implementation="reference")
    with pytest.raises(ValueError, match="expected one dtype"):
        experts(x_MD, gate, up, down.astype(jnp.bfloat16), chosen, weight, implementation="reference")


def coded_inputs(d: int, f: int, n_experts: int, chosen: list[int], dtype=jnp.float32) -> tuple:
    """A token, weights in FP8, NaN in the scales of all experts that it does not visit, its choice."""
    rng = np.random.default_rng(0)
    there = np.where(np.isin(np.arange(n_experts), chosen), 1, np.nan)[:, None, None]

    def weights(n: int, k: int) -> Scaled:
        scale = there * rng.uniform(0.5, 1, (n_experts, -(-n // 128), -(-k // 128))) / 50 / np.sqrt(k)
        codes = jax.device_put(np.asarray(50 * rng.normal(size=(n_experts, n, k)), jnp.float8_e4m3fn))
        return Scaled(codes, jnp.asarray(scale, jnp.float32))

    x_D, matrices = (
        jax.device_put(np.asarray(rng.normal(size=d), dtype)),
        [weights(*size) for size in ((f, d), (f, d), (d, f))],
    )
    return (
        x_D,
        *matrices,
        jnp.array(chosen, jnp.int32),
        jax.device_put(np.asarray(rng.random(len(chosen)), jnp.float32)),
    )


def test_codes_stand_for_weights_with_outputs_first():
    """Blocks of 128 x 128 codes have a scale; the last ones of a matrix may be smaller."""
    x_D, *codes, chosen, weight = arrays = coded_inputs(130, 257, 3, [2, 0])
    blocks = [np.kron(w.scale, np.ones((128, 128)))[:, : w.codes.shape[1], : w.codes.shape[2]] for w in codes]
    wide = [(w.codes.astype(jnp.float32) * block).swapaxes(1, 2) for w, block in zip(codes, blocks, strict=True)]
    (right,) = experts(x_D[None], *wide, chosen[None], weight[None], implementation="reference")
    np.testing.assert_allclose(experts_in_codes(*arrays, implementation="reference"), right, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")
def test_the_kernel_of_codes_is_the_definition():
    """More blocks than stages; the second part of the hidden layer begins in the middle of a block of codes."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels.token_experts import gpu_codes

    x_D, *rest = coded_inputs(1536, 128, 4, [3], jnp.bfloat16)
    right = experts_in_codes(x_D.astype(jnp.float32), *rest, implementation="reference")
    y_D = gpu_codes.experts(x_D, *rest, interpret=plgpu.InterpretGPUParams())
    assert np.linalg.norm(y_D.astype(jnp.float32) - right) <= 3e-3 * np.linalg.norm(right)


@pytest.mark.parametrize(
    ("d", "f", "dtype", "name", "message"),
    [
        (256, 96, jnp.bfloat16, "mosaic_gpu", "in codes: bfloat16, D=256, F=96; expected bfloat16 and multiples of"),
        (256, 64, jnp.bfloat16, "mosaic_gpu", "needs a Hopper GPU"),
        (4, 4, jnp.float32, "cuda", "implementation='cuda': unknown. Choose one of reference, mosaic_gpu"),
    ],
)
def test_what_it_does_not_take_of_codes(d, f, dtype, name, message):
    with pytest.raises(ValueError, match=message):
        experts_in_codes(*coded_inputs(d, f, 2, [0], dtype), implementation=name)


def test_codes_and_scales_that_do_not_fit_together():
    x_D, gate, up, down, chosen, weight = coded_inputs(6, 4, 2, [1])
    with pytest.raises(ValueError, match=r"down: .*expected float8_e4m3fn and float32 \(\(2, 6, 4\), \(2, 1, 1\)\)"):
        experts_in_codes(x_D, gate, up, gate, chosen, weight, implementation="reference")
    with pytest.raises(ValueError, match="gate: float32 and float32"):
        wide = gate._replace(codes=gate.codes.astype(jnp.float32))
        experts_in_codes(x_D, wide, up, down, chosen, weight, implementation="reference")
    with pytest.raises(ValueError, match=r"chosen \(1,\), weight \(2,\): expected \[K\] twice"):
        experts_in_codes(x_D, gate, up, down, chosen, jnp.ones(2), implementation="reference")
