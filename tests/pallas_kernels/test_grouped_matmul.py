"""Grouped matmuls: the reference against a loop in float64, laws, the kernels against it where JAX can run them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import quantize
from pallas_kernels import grouped_matmul as kernels
from pallas_kernels import mosaic_gpu, tile_table
from pallas_kernels.fp8_matmul import gpu
from pallas_kernels.grouped_matmul import Groups, Scaled, layout, pipeline, rows, tiles, weights
from pallas_kernels.quantize import reference

# One program per call instead of one per operation.
quantize_rows, quantize_blocks = jax.jit(reference.quantize_rows), jax.jit(quantize.quantize_blocks)
row_tiles = jax.jit(layout.row_tiles, static_argnums=(1, 2))
grouped_matmul = jax.jit(kernels.grouped_matmul, static_argnames=("implementation", "transposed"))
grouped_weight_gradient, grouped_fp8_matmul, grouped_fp8_weight_gradient = (
    jax.jit(function, static_argnames=("implementation", "out_dtype"))
    for function in (kernels.grouped_weight_gradient, kernels.grouped_fp8_matmul, kernels.grouped_fp8_weight_gradient)
)

COUNTS = [[5, 0, 9, 1], [0, 0, 0, 24], [0, 0, 0, 0], [24, 0, 0, 0], [8, 8, 8, 0]]
REFERENCE = {"implementation": "reference"}


def groups_of(counts, align=1):
    return Groups(jax.device_put(np.array(counts, np.int32)), align)


def rows_of(counts, align=1):
    """First row and end of each group, counted by hand."""
    first, found = 0, []
    for n in counts:
        found.append((first, first + n))
        first += -(-n // align) * align
    return found


def draw(n_rows, d, f, n_groups, dtype=jnp.float32):
    rng = np.random.default_rng(n_rows + d)
    return tuple(jax.device_put(np.asarray(rng.normal(size=shape), dtype)) for shape in ((n_rows, d), (n_groups, d, f)))


def poisoned(x, counts, align=1):
    """`x` with NaN in the rows of no group."""
    mine = np.zeros(x.shape[0], bool)
    for first, end in rows_of(counts, align):
        mine[first:end] = True
    x = np.array(x)
    x[~mine] = np.nan
    return jnp.asarray(x)


def products(x, w, counts, align=1):
    """y in float64, group by group."""
    x, w = (np.asarray(a).astype(np.float64) for a in (x, w))
    y = np.zeros((x.shape[0], w.shape[2]))
    for (first, end), one in zip(rows_of(counts, align), w, strict=True):
        y[first:end] = x[first:end] @ one
    return y


def gradients(x, dy, counts, align=1):
    """dw in float64, group by group."""
    x, dy = (np.asarray(a).astype(np.float64) for a in (x, dy))
    return np.stack([x[first:end].T @ dy[first:end] for first, end in rows_of(counts, align)])


def assert_near(found, expected, tolerance):
    found = np.asarray(found).astype(np.float64)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_reference_is_a_loop_over_the_groups(counts, align):
    """Rows of no group hold NaN, and give 0."""
    x, w = map(np.asarray, draw(40, 6, 7, 4))
    x, groups = np.asarray(poisoned(x, counts, align)), groups_of(counts, align)
    y = grouped_matmul(x, w, groups, **REFERENCE)
    assert_near(y, products(x, w, counts, align), 1e-6)
    y = grouped_matmul(x, w.swapaxes(1, 2), groups, transposed=True, **REFERENCE)
    assert_near(y, products(x, w, counts, align), 1e-6)
    of_three_layers = np.concatenate([w + 1, w, w - 1])
    y = grouped_matmul(x, of_three_layers, dataclasses.replace(groups, matrix_X=4 + np.arange(4)), **REFERENCE)
    assert_near(y, products(x, w, counts, align), 1e-6)
    dw = grouped_weight_gradient(x, x[:, :5], groups, **REFERENCE)
    assert_near(dw, gradients(x, x[:, :5], counts, align), 1e-6)


def fp8_problem(n_rows, d, f, n_groups):
    """Codes and scales of x, of w for the forward pass, and both of x and dy along the rows."""
    x, w = map(np.asarray, draw(n_rows, d, f, n_groups))
    dy = np.random.default_rng(5).normal(size=(n_rows, f)).astype(np.float32)
    w = quantize_blocks(w.swapaxes(1, 2))
    return [Scaled(*one) for one in (quantize_rows(x), w, quantize_rows(x.T), quantize_rows(dy.T))]


def decoded(codes, scale, block=None):
    """What codes and 1 x 128 scales (blocks first), or 128 x 128 ones, stand for."""
    columns = np.repeat(np.asarray(scale).T if block is None else np.asarray(scale), 128, axis=1)
    if block is not None:
        columns = np.repeat(columns, 128, axis=0)[: codes.shape[0]]
    return np.float32(codes) * columns[:, : codes.shape[1]]


@pytest.mark.parametrize("counts", [[100, 0, 29], [0, 129, 0], [0, 0, 0]])
def test_the_fp8_reference_is_a_loop_over_the_groups(counts):
    x, w, x_t, dy_t = fp8_problem(384, 256, 136, 3)
    y = grouped_fp8_matmul(x, w, groups_of(counts), out_dtype=jnp.float32, **REFERENCE)
    decoded_w = np.stack([decoded(*one, block=128) for one in zip(*jax.device_get(w), strict=True)]).swapaxes(1, 2)
    assert_near(y, products(decoded(*x), decoded_w, counts), 1e-6)
    dw = grouped_fp8_weight_gradient(x_t, dy_t, groups_of(counts, 128), **REFERENCE)
    assert_near(dw, gradients(decoded(*x_t).T, decoded(*dy_t).T, counts, 128), 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradients_are_those_of_the_definition(transposed):
    """The custom rule against what autodiff makes of one matmul per row."""
    x, w = draw(24, 6, 7, 4)
    w = w.swapaxes(1, 2) if transposed else w
    counts = [5, 0, 9, 6]
    group = np.repeat([0, 1, 2, 3, 3], [*counts, 4])

    def by_rows(x, w):
        y = jnp.einsum("ad,afd->af" if transposed else "ad,adf->af", x, w[group])
        return jnp.where(jnp.arange(24)[:, None] < sum(counts), y, 0.0)

    def loss(function, x, w):
        return jnp.sum(jnp.sin(function(x, w)))

    ours = functools.partial(grouped_matmul, groups=groups_of(counts), transposed=transposed, **REFERENCE)
    found, expected = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(x, w) for f in (ours, by_rows))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_permuted_groups_give_permuted_rows_and_gradients():
    counts, order = [5, 0, 9, 10], [2, 3, 1, 0]
    x, w = map(np.asarray, draw(24, 6, 7, 4))
    pieces = [np.arange(first, end) for first, end in rows_of(counts)]
    moved = np.concatenate([pieces[g] for g in order])
    groups, permuted = groups_of(counts), groups_of([counts[g] for g in order])
    y = np.asarray(grouped_matmul(x, w, groups, **REFERENCE))
    np.testing.assert_array_equal(grouped_matmul(x[moved], w[order], permuted, **REFERENCE), y[moved])
    dw = np.asarray(grouped_weight_gradient(x, x, groups, **REFERENCE))
    np.testing.assert_allclose(grouped_weight_gradient(x[moved], x[moved], permuted, **REFERENCE), dw[order], atol=1e-5)


@pytest.mark.parametrize("tile_rows", [64, 256])
@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("counts", [[0] * 5, [1] * 5, [0, 64, 0, 7, 513], [200, 56, 100, 0, 0], [640, 0, 0, 0, 0]])
def test_row_tiles_cover_every_row_once(counts, align, tile_rows):
    n_rows = 1280 if align > 1 else 640
    table = np.asarray(row_tiles(groups_of(counts, align), n_rows, tile_rows))
    n_tiles = table[0, -1]
    assert n_tiles <= len(table)
    owner = np.full(n_rows, -1)
    valid = np.zeros(n_rows, bool)
    for group, row, low, high, end in table[:n_tiles, :5]:
        assert row % 8 == 0
        own = np.arange(max(row, low), min(row + tile_rows, high))
        assert (owner[own] == -1).all()
        owner[own] = group
        valid[own] = own < end
    assert (owner >= 0).all()
    expected = np.zeros(n_rows, bool)
    for group, (first, end) in enumerate(rows_of(counts, align)):
        expected[first:end] = True
        assert (owner[first:end] == group).all()
    np.testing.assert_array_equal(valid, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w, n: grouped_matmul(x[:, :3], w, n, **REFERENCE), r"expected \[A, D\] and \[X, D, F\]"),
        (lambda x, w, n: grouped_matmul(x, w, n, transposed=True, **REFERENCE), r"expected \[A, D\] and \[X, F, D\]"),
        (lambda x, w, _: grouped_matmul(x, w, groups_of([9] * 3), **REFERENCE), r"int32 \(3,\): expected int32 \(4,\)"),
        (lambda x, w, _: grouped_matmul(x, w, groups_of([6] * 4, 0), **REFERENCE), "align=0: expected a positive mul"),
        (
            lambda x, w, n: grouped_matmul(x, w, dataclasses.replace(n, matrix_X=jnp.arange(3)), **REFERENCE),
            r"4 groups with the numbers \(3,\) of their matrices, by 'reference': expected a number per group",
        ),
        (lambda x, w, n: grouped_matmul(x, w, n, implementation="cuda"), "Choose one of reference, mosaic_gpu"),
        (lambda x, w, n: grouped_matmul(x, w, n, implementation="mosaic_gpu"), "needs a Hopper GPU"),
        (lambda x, w, n: rows.grouped_matmul(x, w, n), "x is float32, expected bfloat16"),
        (lambda x, w, n: rows.grouped_matmul(x.astype("bfloat16"), w, n), "D=6, F=7, expected positive multiples"),
        (lambda x, w, n: grouped_weight_gradient(x, x[:3], n, **REFERENCE), "with the same A"),
        (
            lambda x, w, n: grouped_fp8_matmul(Scaled(x, x), Scaled(w.swapaxes(1, 2), w), n, **REFERENCE),
            "x is float32: expected",
        ),
        (
            lambda x, w, n: grouped_fp8_weight_gradient(Scaled(x, x), Scaled(x, x), n, **REFERENCE),
            "same A, a multiple of 128",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_reported(call, message):
    x, w = draw(24, 6, 7, 4)
    with pytest.raises(ValueError, match=message):
        call(x, w, groups_of([1, 2, 3, 4]))


def test_an_fp8_weight_gradient_needs_groups_that_begin_with_a_block():
    _, _, x_t, dy_t = fp8_problem(128, 128, 128, 3)
    with pytest.raises(ValueError, match="align=64: expected a positive multiple of 128"):
        grouped_fp8_weight_gradient(x_t, dy_t, groups_of([1, 2, 3], 64), **REFERENCE)


# The kernels, interpreted on the CPU. NaN in rows of no group must stay there.

interpreted = pytest.mark.skipif(
    not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU"
)
SMALL = tiles.Tiles(64, 128, warpgroups=1, stages=2)


def interpreted_run(choice):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    # Each warpgroup of each processor is a thread: with a dozen of them a machine of two cores waits for ever.
    return {"run": pipeline.Run(choice, n_processors=2, interpret=plgpu.InterpretGPUParams())}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    "counts, align, choice",
    [
        ([70, 0, 3, 58], 1, SMALL),
        ([0, 128, 0, 64], 1, tiles.Tiles(64, 128, cluster="rows", stages=2, store_slots=2)),
        ([100, 0, 1, 30], 128, tiles.Tiles(64, 128, stack="columns", cluster="columns", stages=3, store_columns=128)),
    ],
)
def test_the_kernels_are_the_reference(counts, align, choice):
    """Groups that begin and end anywhere, in bfloat16 and FP8, forward, transposed and weight gradient."""
    n_rows = 512 if align > 1 else 200
    x, w = draw(n_rows, 256, 384, 4, jnp.bfloat16)
    x, groups, options = poisoned(x, counts, align), groups_of(counts, align), interpreted_run(choice)
    assert_near(rows.grouped_matmul(x, w, groups, **options), products(x, w, counts, align), 2e-3)
    y = rows.grouped_matmul(x, w.swapaxes(1, 2), groups, transposed=True, **options)
    assert_near(y, products(x, w, counts, align), 2e-3)
    y = rows.grouped_matmul(
        x, jnp.concatenate([w + 1, w]), dataclasses.replace(groups, matrix_X=4 + jnp.arange(4)), **options
    )
    assert_near(y, products(x, w, counts, align), 2e-3)
    dy = poisoned(draw(n_rows, 128, 1, 1, jnp.bfloat16)[0], counts, align)
    assert_near(weights.grouped_weight_gradient(x, dy, groups, **options), gradients(x, dy, counts, align), 1e-6)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    "choice",
    [
        SMALL,
        tiles.Tiles(64, 256, cluster="columns", stages=2, store_columns=128),
        tiles.Tiles(128, 128, warpgroups=1, stages=2, chunk_columns=64, in_flight=2),
    ],
)
def test_the_fp8_kernels_are_the_reference(choice):
    counts, options = [70, 0, 3, 58], {"out_dtype": jnp.float32, **interpreted_run(choice)}
    x, w, _, _ = fp8_problem(200, 256, 384, 4)
    operands = Scaled(x.codes, poisoned(x.scale.T, counts).T), w, groups_of(counts)
    expected = grouped_fp8_matmul(*operands, out_dtype=jnp.float32, **REFERENCE)
    assert_near(rows.grouped_fp8_matmul(*operands, **options), np.asarray(expected), 1e-6)
    mine = np.zeros(640, bool)
    for first, end in rows_of([70, 0, 3, 158], 128):
        mine[first:end] = True
    x, dy = (jnp.where(mine[:, None], draw(640, width, 1, 1)[0], 0.0) for width in (256, 128))
    operands = *(Scaled(*quantize_rows(one.T)) for one in (x, dy)), groups_of([70, 0, 3, 158], 128)
    expected = grouped_fp8_weight_gradient(*operands, **REFERENCE)
    assert_near(weights.grouped_fp8_weight_gradient(*operands, **options), np.asarray(expected), 1e-6)


@pytest.mark.skipif(mosaic_gpu.can_interpret(), reason="later versions of JAX are tested by interpreter and compiler")
def test_jax_0_10_lowers_the_kernels():
    """What one warp may do there is little; that such a kernel cannot be lowered would show on a GPU only."""
    x, w = draw(128, 128, 128, 1, jnp.bfloat16)
    for call, operands in [
        (weights.grouped_weight_gradient, (x, x, groups_of([60, 68]))),
        (gpu.fp8_matmul, (*quantize_rows(x), *quantize_blocks(w[0]))),
    ]:
        lowered = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("rows, columns", [(32, 128), (64, 96)])
def test_tiles_that_the_hardware_does_not_take_are_reported(rows, columns):
    with pytest.raises(ValueError, match="expected multiples of 64 and of 128"):
        tiles.Tiles(rows, columns)


CHOICES = [tiles.WIDE, tiles.WIDE_FLOAT32, tiles.THREE, tiles.SQUARE, tiles.SQUARE_FLOAT32, tiles.GRADIENT]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_copy_fills_a_multiple_of_128_bytes(choice):
    """A copy's target in shared memory has to begin at one; neither the interpreter nor the compiler checks it."""
    fp8, bf16 = jnp.float8_e4m3fn, jnp.bfloat16
    for dtype in (fp8, bf16):
        plans = [
            rows.RowsPlan(4, 64, 256, dtype, bf16, choice, 132, True, k=256, transposed=dtype == fp8),
            weights.WeightsPlan(4, 256, 256, dtype, bf16, choice, 132, True),
        ]
        for plan in plans:
            for shape in plan.operand_shapes:
                assert shape[1] * jnp.dtype(dtype).itemsize % pipeline.STAGE_BYTES == 0
    assert choice.cta[0] * 4 % 128 == 0 and choice.cta[1] * 4 % 128 == 0  # scales


@pytest.mark.parametrize("choice", CHOICES)
def test_warpgroups_ask_for_no_more_registers_than_the_cta_starts_with(choice):
    """They would wait for them for ever."""
    n = choice.warpgroups + 1
    at_start = 65536 // (128 * n) // 8 * 8 * n
    assert pipeline.compute_registers(choice) * choice.warpgroups + choice.producer_registers <= at_start


@pytest.mark.parametrize("group_rows", [1, 256, 8192])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_the_chosen_tiles_fit_into_shared_memory(dtype, out_dtype, group_rows):
    choice = tiles.choose(dtype, out_dtype, 4, 4 * group_rows, 640, 512)
    gradient = tiles.choose_for_weights(dtype, out_dtype)
    for plan in (
        rows.RowsPlan(4, 64, 256, dtype, out_dtype, choice, 132, True, k=256, transposed=True),
        weights.WeightsPlan(4, 256, 256, dtype, out_dtype, gradient, 132, True),
    ):
        buffers = [buffer for buffer in plan.scratch() if hasattr(buffer, "dtype")]
        size = sum(np.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in buffers)
        assert 100_000 < size < 232_448 - 1024  # barriers take a few hundred bytes


def test_groups_of_a_size_get_the_tiles_that_were_the_fastest_for_groups_most_like_it():
    times = {(4, 8192, 640, 512): {"THREE": 1.0, "SQUARE": 2.0}, (32, 256, 640, 512): {"THREE": 2.0, "SQUARE": 1.0}}
    table = tile_table.Table("a chip", 132, "0.11.2", "2026-11-28", {tiles.FP8: times})
    assert tiles.fastest(table, (8, 5000, 640, 512)) == tiles.THREE
    assert tiles.fastest(table, (8, 300, 640, 512)) == tiles.fastest(table, (8, 0, 640, 512)) == tiles.SQUARE
