"""Logits of a lightning indexer: the definition against float64, the kernel for Hopper interpreted against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.indexer import Codes, encode, gpu, logits, reference

needs_interpreter = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")


def inputs(b, t, s, h):
    rng = np.random.default_rng(0)
    q, k = (encode(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((b, t, h, 128), (b, s, 128)))
    return q, k, jnp.asarray(rng.normal(size=(b, t, h)), jnp.float32)


def test_rows_that_were_rounded_are_encoded_exactly():
    """In E4M3 with a scale that is a power of two; rows of zeros, and rows whose scale could be half as large."""
    rng = np.random.default_rng(0)
    codes = np.asarray(rng.normal(size=(6, 128)) * 50, jnp.float8_e4m3fn).astype(np.float32)
    codes[0], codes[1] = 0, np.minimum(codes[1], 224)
    x = codes * np.exp2(np.arange(6) - 3)[:, None].astype(np.float32)
    found = encode(jnp.asarray(x))
    np.testing.assert_array_equal(found.codes.astype(jnp.float32) * found.scale[:, None], x)
    np.testing.assert_array_equal(np.frexp(found.scale)[0], 0.5)


def test_the_definition_is_the_papers_formula():
    """eq. 1 over what a query sees."""
    q, k, weight = inputs(2, 5, 9, 8)
    segments = jnp.asarray([[0] * 4 + [1] * 5] * 2)
    found = logits(q, k, weight, implementation="reference", q_offset=4, segments=(segments[:, 4:], segments))
    wide_q, wide_k = (np.float64(x.codes) * np.float64(x.scale)[..., None] for x in (q, k))
    expected = np.einsum("bths,bth->bts", np.maximum(np.einsum("bthq,bsq->bths", wide_q, wide_k), 0), weight)
    seen = (np.arange(9) >= 4) & (np.arange(9) <= np.arange(5)[:, None] + 4)
    np.testing.assert_array_equal(np.isfinite(found), np.broadcast_to(seen, found.shape))
    np.testing.assert_allclose(np.where(seen, found, 0), np.where(seen, expected, 0), rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_said():
    q, k, weight = inputs(1, 2, 4, 8)
    with pytest.raises(ValueError, match="unknown"):
        logits(q, k, weight, implementation="other")
    with pytest.raises(ValueError, match="a weight for each head"):
        logits(q, k, weight[:, :1], implementation="reference")
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        logits(Codes(q.codes.astype(jnp.float32), q.scale), k, weight, implementation="reference")
    with pytest.raises(ValueError, match="12 heads; expected a multiple of 8"):
        gpu.check(jnp.zeros((1, 1, 12, 128)))


@needs_interpreter
def test_the_kernel_is_the_definition():
    """Queries and keys that do not fill tiles, parts of the keys, documents."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    q, k, weight = inputs(1, 3, 200, 32)
    segments = jnp.asarray([[0] * 199 + [1]]), jnp.asarray([[1] * 60 + [0] * 139 + [1]])
    given = q.codes, k.codes, k.scale, weight * q.scale, 150, (segments[0][:, -3:], segments[1])
    options = {"tuning": gpu.Tuning(warpgroups=1, keys=64, stages=2), "n_processors": 2}
    found = gpu.logits(*given, **options, interpret=plgpu.InterpretGPUParams())
    expected = reference.logits(*given)
    np.testing.assert_array_equal(jnp.isfinite(found), jnp.isfinite(expected))
    np.testing.assert_allclose(
        *(np.where(np.isfinite(x), x, 0) for x in jax.device_get((found, expected))), rtol=1e-3, atol=1e-3
    )
