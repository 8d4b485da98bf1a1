"""Latent attention to chosen rows: the definition against float64, the kernel for Hopper interpreted against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_attention import bits
from pallas_kernels.sparse_mla import attend, attend_expanded, hopper, mean_weights


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


def chosen(b, t, s, density) -> np.ndarray:
    """Sets of keys, none after its query; one query has none."""
    rng = np.random.default_rng(1)
    seen = (rng.random((b, t, s)) < density) & (np.arange(s) <= np.arange(t)[:, None] + s - t)
    seen[:, min(5, t - 1)] = False
    return seen


def test_bits_say_which_pairs_are_visible():
    seen = chosen(2, 37, 70, 0.4)
    words = bits.packed(jnp.asarray(seen))
    np.testing.assert_array_equal(bits.unpacked(words, 70), seen)
    np.testing.assert_array_equal(bits.unpacked(bits.transposed(words, 70), 37), seen.swapaxes(1, 2))
    some = np.asarray(bits.some(bits.in_tiles(words, 64, 16), 64, 16))
    tiles = np.pad(seen, ((0, 0), (0, 11), (0, 58))).reshape(2, 3, 16, 2, 64).any(axis=(2, 4))
    np.testing.assert_array_equal(some, tiles)


def test_the_expanded_definition_is_attention_to_the_chosen_keys():
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(2, 9, 2, n)) for n in (8, 8, 4))
    seen = chosen(2, 9, 9, 0.6)
    words = bits.packed(jnp.asarray(seen))
    given = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    o, lse = attend_expanded(*given, words, implementation="reference", scale=0.3)
    weights = np.exp(0.3 * np.einsum("bthq,bshq->bhts", q, k)) * seen[:, None]
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total[..., 0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(o, np.einsum("bhts,bshu->bthu", weights / np.where(total > 0, total, 1), v), atol=1e-5)
    with pytest.raises(ValueError, match="expected words"):
        attend_expanded(*given, words[:, :, :3], implementation="reference", scale=0.3)
    with pytest.raises(ValueError, match="q, k, v are float32"):
        attend_expanded(*given, words, implementation="mosaic_gpu", scale=0.3)


def test_of_chosen_pairs_no_block_goes_without_a_mask():
    """Also where the other CTA of a cluster begins earlier: of two tiles the second has no pair in blocks 0 to 2."""
    from pallas_kernels.mla_attention import gpu_forward

    some = jnp.asarray([[[1, 1, 1, 0], [0, 0, 0, 1]]], bool)
    sizes = {"b": 1, "t": 256, "s": 512, "h": 1, "z": 1, "width": 64, "v_width": 64, "dtype": jnp.bfloat16}
    more = {"documents": False, "tuning": gpu_forward.Tuning(cluster=2), "n_processors": 2, "chosen": True}
    plan = gpu_forward.Plan(**sizes, **more, scale=1.0, on_chip=True)
    first, whole_from, whole_to, end = np.moveaxis(np.asarray(plan.ranges(None, 256, some)), -1, 0)
    assert (whole_from <= first).all() and (whole_to <= first).all()
    assert (first == 0).all() and (end == 4).all()


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")
def test_the_expanded_kernels_are_the_definition():
    """Forward and backward: two tiles, of which one is not full; a query without keys; more keys than queries."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    t, s = 150, 200
    rng = np.random.default_rng(3)
    shapes = (1, t, 1, 192), (1, s, 1, 192), (1, s, 1, 128), (1, t, 1, 128)
    *given, do = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    words = bits.packed(jnp.asarray(chosen(1, t, s, 0.3)))

    def results(given, do, **options):
        (o, lse), pull = jax.vjp(lambda *x: attend_expanded(*x, words, scale=0.1, **options), *given)
        return lse, o, *pull((do, jnp.zeros_like(lse)))

    wide = [x.astype(jnp.float32) for x in given]
    lse_right, *right = results(wide, do.astype(jnp.float32), implementation="reference")
    lse, *found = results(given, do, implementation="mosaic_gpu", interpret=plgpu.InterpretGPUParams())
    np.testing.assert_allclose(lse, lse_right, atol=1e-5)
    for x, y in zip(found, right, strict=True):
        assert np.linalg.norm(x.astype(jnp.float32) - y) <= 6e-3 * np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")
def test_the_kernel_of_mean_weights_is_the_definition():
    """Tiles that are not full, keys that no query has."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    t, s, h = 150, 200, 3
    rng = np.random.default_rng(4)
    q, k = (jnp.asarray(rng.normal(size=(1, n, h, 64)), jnp.bfloat16) for n in (t, s))
    seen = chosen(1, t, s, 0.3)
    seen[:, :128, 128:] = False
    lse = jnp.asarray(rng.normal(size=(1, h, t)) + 3, jnp.float32)
    given = q, k, lse, bits.packed(jnp.asarray(seen))
    right = mean_weights(*given, implementation="reference", scale=0.1)
    found = mean_weights(*given, implementation="mosaic_gpu", scale=0.1, interpret=plgpu.InterpretGPUParams())
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
    assert not np.any(found[~seen])
