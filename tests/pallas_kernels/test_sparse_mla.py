"""Latent attention to chosen rows: the definition against float64, the kernel for Hopper interpreted against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.sparse_mla import attend, hopper


def inputs(b, t, h, width, rope, n_rows, counts, dtype) -> tuple:
    """Rows in no order; a row of NaN, which those that do not count point at."""
    rng = np.random.default_rng(0)
    most = -(-max(counts) // 4) * 4
    queries = [jnp.asarray(rng.normal(size=(b, t, h, n)), dtype) for n in (width, rope)]
    c, keys = (rng.normal(size=(n_rows, n)) for n in (width, rope))
    c[-1] = keys[-1] = np.nan
    row = np.stack([rng.permutation(n_rows - 1)[:most] for _ in range(b * t)]).reshape(b, t, most)
    count = np.asarray(counts).reshape(b, t)
    row = np.where(np.arange(most) < count[..., None], row, n_rows - 1)
    return *queries, (jnp.asarray(c, dtype), jnp.asarray(keys, dtype)), jnp.asarray(row), jnp.asarray(count)


def test_the_definition_is_attention_to_the_rows_that_count():
    q, q_rope, (c, rope), row, count = given = inputs(1, 3, 2, 8, 4, 20, (7, 0, 1), jnp.float32)
    o, lse = jax.jit(lambda *given: attend(*given, implementation="reference", scale=0.3))(*given)
    for t in range(3):
        at = np.asarray(row[0, t, : count[0, t]])
        scores = 0.3 * (np.float64(q[0, t]) @ np.float64(c)[at].T + np.float64(q_rope[0, t]) @ np.float64(rope)[at].T)
        if not len(at):
            assert not np.any(o[0, t])
            assert np.all(lse[0, t] == -np.inf)
            continue
        weights = np.exp(scores)
        np.testing.assert_allclose(lse[0, t], np.log(weights.sum(-1)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(o[0, t], weights @ np.float64(c)[at] / weights.sum(-1)[:, None], atol=1e-5)


def test_what_does_not_fit_is_said():
    q, q_rope, cache, row, count = inputs(1, 1, 2, 8, 4, 5, (3,), jnp.float32)
    for given, name, message in (
        ((q, q_rope, cache, row, count), "other", "unknown"),
        ((q, q_rope, cache[::-1], row, count), "reference", "as wide as the queries"),
        ((q, q_rope, cache, row[0], count), "reference", "expected rows"),
        ((q, q_rope, cache, row, count * 1.0), "reference", "expected integers"),
        ((q, q_rope, cache, row, count), "mosaic_gpu", "expected bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*given, implementation=name, scale=1.0)


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")
@pytest.mark.parametrize("n_splits", [1, 2])
def test_the_kernel_is_the_definition(n_splits):
    """Heads that do not fill tiles, rows that do not fill pages, a query without any."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    given = inputs(1, 3, 40, 256, 64, 300, (260, 0, 65), jnp.bfloat16)
    q, q_rope, cache, row, count = given
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q, q_rope, cache))
    right, lse_right = attend(*wide, row, count, implementation="reference", scale=0.1)
    o, lse = hopper.attend(
        q, q_rope, *cache, row, count, scale=0.1, n_splits=n_splits, n_processors=132,
        interpret=plgpu.InterpretGPUParams(),
    )  # fmt: skip
    assert np.linalg.norm(o.astype(jnp.float32) - right) <= 3e-3 * np.linalg.norm(right)
    np.testing.assert_allclose(lse, lse_right, atol=1e-5)
