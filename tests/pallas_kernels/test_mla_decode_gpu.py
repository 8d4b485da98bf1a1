"""Latent decode on Hopper: the kernel interpreted on a CPU against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode import Fp8Pages, Pages, decode, fp8_cache, gpu, hopper, work

needs_interpreter = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")
CASES = {  # B, T, H, lengths, parts, CTAs of a cluster
    "two CTAs share pages": (2, 1, 128, [200, 1], 1, 2),
    "tokens and heads that do not fill tiles, parts, an empty sequence": (3, 2, 40, [193, 0, 65], 2, 1),
    "the last tokens of a sequence in different pages": (2, 4, 32, [130, 3], 1, 2),
}


def inputs(b, t, h, lengths, width=256, rope=64) -> tuple:
    """Queries and a cache with NaN in the null page and behind the ends."""
    rng = np.random.default_rng(0)
    most = max(-(-length // 64) for length in lengths) + 1
    queries = [jax.device_put(np.asarray(rng.normal(size=(b, t, h, n)), jnp.bfloat16)) for n in (width, rope)]
    pools = [rng.normal(size=(1 + b * most, 64, n)) for n in (width, rope)]
    table = rng.permutation(np.arange(1, 1 + b * most)).reshape(b, most)
    held = np.zeros(pools[0].shape[:2], bool)
    for pages, length in zip(table, lengths, strict=True):
        held[pages] = np.arange(most * 64).reshape(most, 64) < length
        pages[-(-length // 64) :] = 0
    pages = Pages(
        *(jax.device_put(np.asarray(np.where(held[..., None], pool, np.nan), jnp.bfloat16)) for pool in pools)
    )
    return *queries, pages, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_definition(case):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    b, t, h, lengths, n_splits, cluster = CASES[case]
    arrays = inputs(b, t, h, lengths)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
    right, lse_right = decode(*wide, implementation="reference", scale=0.1)
    o, lse = hopper.decode(
        *arrays, scale=0.1, n_splits=n_splits, n_processors=132, tuning=gpu.Tuning(cluster=cluster),
        interpret=plgpu.InterpretGPUParams(),
    )  # fmt: skip
    assert np.linalg.norm(o.astype(jnp.float32) - right) <= 3e-3 * np.linalg.norm(right)
    np.testing.assert_allclose(lse, lse_right, atol=1e-5)


FEW = {  # B, T, H, lengths, processors, parts and pages that a CTA holds
    "a part of two pages, one with a single token": (2, 1, 16, [330, 3], 6, (3, 1)),
    "two tokens of a sequence; an empty sequence": (2, 2, 8, [130, 0], 132, (2, 1)),
    "each token its own sequence": (2, 2, 16, [65, 0], 132, (2, 1)),
    "one part, whose next page is on its way": (1, 1, 16, [460], 1, (1, 2)),
}


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", FEW)
def test_the_kernel_of_few_rows_is_the_definition(case):
    """It is the one that is taken; a sequence may be empty."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    b, t, h, lengths, n_processors, divided = FEW[case]
    arrays = inputs(b, t, h, lengths)
    n_sequences = b * t if t * h > 16 else b
    assert work.are_few(t, h) and work.parts_of_few(n_sequences, arrays[3].shape[1], n_processors) == divided
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
    right, lse_right = decode(*wide, implementation="reference", scale=0.1)
    o, lse = hopper.decode(*arrays, scale=0.1, n_processors=n_processors, interpret=plgpu.InterpretGPUParams())
    assert np.linalg.norm(o.astype(jnp.float32) - right) <= 3e-3 * np.linalg.norm(right)
    np.testing.assert_allclose(lse, lse_right, atol=1e-5)


def test_sixteen_rows_are_few():
    """16 heads of one token or of two, or 8 of two; others are the other kernel's."""
    assert all(work.are_few(*size) for size in ((1, 16), (2, 8), (2, 16)))
    assert not any(work.are_few(*size) for size in ((1, 8), (1, 32), (3, 16), (1, 128)))


def test_few_rows_are_read_in_as_many_parts_as_there_are_processors():
    """(sequences, pages of the longest): (parts, pages that a CTA holds)."""
    sizes = {(1, 32): (16, 1), (16, 32): (8, 1), (64, 32): (2, 2), (256, 20): (1, 2), (16, 128): (8, 2)}
    sizes |= {(1, 512): (132, 1), (200, 4): (1, 1)}
    assert {size: work.parts_of_few(*size, 132) for size in sizes} == sizes


@needs_interpreter
@pytest.mark.slow
def test_the_kernel_reads_an_fp8_cache_as_the_numbers_it_holds():
    import jax.experimental.pallas.mosaic_gpu as plgpu

    q, q_rope, pages, table, lengths = inputs(2, 1, 16, [130, 3], width=512)
    entries = fp8_cache.encode(*pages)
    held = Pages(*fp8_cache.decode(entries, 64))
    entries = jnp.where(jnp.isnan(pages.c[..., :1].astype(jnp.float32)), jnp.uint8(255), entries)
    options = {"scale": 0.1, "n_processors": 132, "interpret": plgpu.InterpretGPUParams()}
    found = hopper.decode(q, q_rope, Fp8Pages(entries), table, lengths, **options)
    expected = hopper.decode(q, q_rope, held, table, lengths, **options)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "shape", "scale", "message"),
    [
        (jnp.float32, (1, 1, 16, 512), 0.1, "queries float32"),
        (jnp.bfloat16, (1, 1, 16, 384), 0.1, "latents of 384 numbers"),
        (jnp.bfloat16, (1, 5, 16, 512), 0.1, "5 tokens per sequence"),
        (jnp.bfloat16, (1, 1, 16, 512), -1.0, "expected a positive number"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(dtype, shape, scale, message):
    q, rope = (jax.ShapeDtypeStruct((*shape[:3], width), dtype) for width in (shape[3], 64))
    with pytest.raises(ValueError, match=message):
        hopper.check(q, rope, (q, rope), scale)


def test_a_machine_without_hopper_is_refused():
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        decode(*inputs(1, 1, 16, [5]), implementation="mosaic_gpu", scale=0.1)
