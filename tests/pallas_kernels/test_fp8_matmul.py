"""The block-scaled FP8 matmul: the reference against float64, the kernel against the reference where JAX can run it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.launch import _bench_kernels
from deepseek_jax.precision import quantize
from pallas_kernels import fp8_matmul as kernels
from pallas_kernels import mosaic_gpu, tile_table
from pallas_kernels.fp8_matmul import gpu, tiles
from pallas_kernels.quantize import reference

# One program per call instead of one per operation.
quantize_rows, quantize_blocks = jax.jit(reference.quantize_rows), jax.jit(quantize.quantize_blocks)
fp8_matmul = jax.jit(kernels.fp8_matmul, static_argnames=("w_block", "out_dtype", "implementation"))


def operands(m, n, k, w_block=(128, 128), draw="normal"):
    """Codes and scales of a random problem."""
    rng = np.random.default_rng(m + n + k)
    x, w = (rng.standard_cauchy(shape) if draw == "heavy" else rng.normal(size=shape) for shape in ((m, k), (n, k)))
    for matrix in (x, w):
        if draw == "one hot":
            matrix[:, 5] *= 1e6
        if draw == "zero blocks":
            matrix[:, :128] = 0
    x, w = np.float32(x), np.float32(w)
    quantised_w = quantize_rows(w) if w_block == (1, 128) else quantize_blocks(w)
    return *quantize_rows(x), *quantised_w


def in_float64(x, x_scale, w, w_scale, w_block=(128, 128)):
    """The product of what the codes and scales stand for."""
    x, x_scale, w, w_scale = (np.asarray(a).astype(np.float64) for a in (x, x_scale, w, w_scale))
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
    # of heavy-tailed data few elements make up the norm, whose rounding is up to 2**-8
    assert relative_error(np.float32(y), expected) < (2e-3 if draw in ("normal", "zero blocks") else 2**-8)


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


def test_a_product_is_added_to_a_sum():
    problem = operands(4, 16, 200)
    y = fp8_matmul(*problem, out_dtype=jnp.float32, add_to=jnp.full((4, 16), 2.0), implementation="reference")
    assert relative_error(y, in_float64(*problem) + 2.0) < 1e-6


@pytest.mark.parametrize("shape, out_dtype", [((16, 4), jnp.float32), ((4, 16), jnp.bfloat16)])
def test_a_sum_that_does_not_fit_is_reported(shape, out_dtype):
    with pytest.raises(ValueError, match=r"expected float32 \(4, 16\) and out_dtype float32"):
        fp8_matmul(*operands(4, 16, 128), out_dtype=out_dtype, add_to=jnp.zeros(shape), implementation="reference")


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


def test_a_device_that_is_no_hopper_gpu_is_reported():
    with pytest.raises(ValueError, match="'mosaic_gpu' on cpu: needs a Hopper GPU.*implementation='reference'"):
        fp8_matmul(*operands(9, 136, 256), implementation="mosaic_gpu")


SMALL = {"rows": 64, "columns": 64, "stages": 2}
WIDE = {"stages": 4, "store_columns": 128}


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize(
    "shape, w_block, choice",
    [
        ((200, 192, 384), (128, 128), tiles.Tiles(**SMALL, cluster="rows")),
        ((64, 320, 256), (128, 128), tiles.Tiles(64, 256, cluster="columns", stages=2, store_slots=2)),
        ((300, 320, 384), (1, 128), tiles.Tiles(128, 128, cluster="rows", stages=2)),
        ((64, 1000, 640), (128, 128), tiles.Tiles(64, 128, warpgroups=1, in_flight=2, together=2, **WIDE)),
        ((192, 640, 384), (1, 128), tiles.Tiles(128, 128, stages=2, chunk_columns=64, in_flight=2)),
    ],
)
def test_the_kernel_is_the_reference(shape, w_block, choice):
    """Tiles beyond the matrix, both kinds of scales, clusters, many tiles per CTA, products in flight.

    Not a split contraction: what its CTAs send one another (`async_store_smem`) cannot be interpreted.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    problem = operands(*shape, w_block)
    mode = plgpu.InterpretGPUParams()
    y = gpu.fp8_matmul(*problem, w_block=w_block, out_dtype=jnp.float32, tiles=choice, n_processors=4, interpret=mode)
    assert relative_error(y, in_float64(*problem, w_block)) < 1e-6


@pytest.mark.parametrize("n_processors", [114, 132])
@pytest.mark.parametrize("out_dtype, w_block", [(jnp.bfloat16, (128, 128)), (jnp.float32, (1, 128))])
@pytest.mark.parametrize(
    "shape", [(1, 7, 16), (64, 2112, 7168), (128, 7168, 512), (300, 576, 7168), (4096, 4096, 16384)]
)
def test_the_chosen_tiles_cover_every_output_and_every_block_once(shape, out_dtype, w_block, n_processors):
    m, n, k = shape
    choice = tiles.choose(m, n, k, w_block, out_dtype, n_processors)
    plan = gpu.Plan(m, n, -(-k // 128), choice, w_block[0] == 1, out_dtype, False, n_processors)
    for size, tile, ctas, count in zip((m, n), choice.cta, choice.cluster_shape, plan.grid, strict=True):
        assert (count - 1) * tile * ctas < size <= count * tile * ctas
    assert (plan.splits - 1) * plan.blocks_per_split < plan.blocks <= plan.splits * plan.blocks_per_split
    assert len(plan.chunks) * 64 * plan.chunk_columns * choice.warpgroups == choice.cta[0] * choice.cta[1]
    assert 1 <= plan.n_clusters * max(*choice.cluster_shape, plan.splits) <= n_processors
    # Registers that the loading warpgroup has not given back would be waited for without end.
    at_start = 65536 // (128 * (choice.warpgroups + 1)) // 8 * 8 * (choice.warpgroups + 1)
    assert choice.producer_registers + choice.warpgroups * plan.registers <= at_start


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 32, "columns": 128},
        {"rows": 64, "columns": 80},
        {"rows": 64, "columns": 96},
        {"rows": 64, "columns": 16, "store_columns": 16},
        {"rows": 64, "columns": 128, "store_columns": 256},
        {"rows": 64, "columns": 128, "cluster": "rows", "splits": 2},
    ],
)
def test_tiles_that_the_hardware_does_not_take_are_reported(sizes):
    expected = "expected a multiple of 64 by|expected a divisor|no multiple of 128 bytes|one of the two"
    with pytest.raises(ValueError, match=expected):
        tiles.Tiles(**sizes)


def table(**microseconds):
    """A table of two shapes."""
    times = {(4096, 7168, 2048): microseconds, (4096, 24576, 1536): {name: 3 * us for name, us in microseconds.items()}}
    return tile_table.Table("a chip", 132, "0.11.2", "2026-11-28", {tiles.FORWARD: times})


def test_the_fastest_tiles_of_the_table_are_chosen():
    for name in tiles.VARIANTS[tiles.FORWARD]:
        times = table(**{other: 100.0 + (other != name) for other in tiles.VARIANTS[tiles.FORWARD]})
        assert tiles.fastest(tiles.FORWARD, 4096, 7168, 2048, times, 132) == tiles.VARIANTS[tiles.FORWARD][name]


def test_a_shape_that_is_not_in_the_table_gets_tiles_that_leave_few_processors_idle():
    """4,096 x 4,096 outputs are 3.9 rounds of WIDE and 5.3 of TALL, the last of which is as long as a whole one."""
    times = table(WIDE=110.0, TALL=110.0)
    assert tiles.fastest(tiles.FORWARD, 4096, 4096, 7168, times, 132) == tiles.WIDE
    slow = table(WIDE=220.0, TALL=110.0)
    assert tiles.fastest(tiles.FORWARD, 4096, 4096, 7168, slow, 132).warpgroups == 3


def test_the_committed_table_has_a_row_per_shape_of_the_bench():
    known = tile_table.load(tile_table.file_of("NVIDIA H200"))
    shapes = [shape for shape in _bench_kernels.parsed(_bench_kernels.FORWARD, 3) if shape[0] > tiles.FEW]
    assert list(known.microseconds[tiles.FORWARD]) == shapes
    for operation, variants in tiles.VARIANTS.items():
        for times in known.microseconds[operation].values():
            assert set(times) == set(variants)


def test_the_bench_reads_shapes():
    assert _bench_kernels.parsed("64x2112x7168,1x2x3", 3) == [(64, 2112, 7168), (1, 2, 3)]
    for text in ("64x2112", "axbxc", "0x1x2"):
        with pytest.raises(Exception, match="expected positive sizes such as 4096x7168x2048"):
            _bench_kernels.parsed(text, 3)
