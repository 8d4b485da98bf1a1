"""Products with weights that stay FP8 codes: the definition, tiles, and the kernel interpreted on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.coded_matmul import coded_experts, coded_matmul, reference, tiles
from pallas_kernels.grouped_matmul import Groups, Scaled

DRAW = np.random.default_rng(0)


def problem(counts, n, k, n_matrices, more_rows=0, dtype=jnp.float32, block_rows=128):
    x = jax.device_put(np.asarray(DRAW.normal(size=(sum(counts) + more_rows, k)), dtype)).at[sum(counts) :].set(jnp.nan)
    codes = jax.device_put(np.asarray(50 * DRAW.normal(size=(n_matrices, n, k)), jnp.float8_e4m3fn))
    scale = jax.device_put(
        np.asarray(DRAW.uniform(0.5, 1, (n_matrices, -(-n // block_rows), -(-k // 128))), jnp.float32)
    )
    matrices = jnp.asarray(DRAW.permutation(n_matrices)[: len(counts)], jnp.int32)
    return x, Scaled(codes, scale), Groups(jnp.asarray(counts, jnp.int32), matrix_X=matrices)


def test_the_definition_by_hand():
    """Two rows, the second of group 1, whose matrix is the first; blocks of two outputs."""
    w = Scaled(jnp.asarray([[[1], [2], [4]], [[8], [16], [32]]], jnp.float8_e4m3fn), jnp.ones((2, 2, 1)))
    w = w._replace(scale=w.scale.at[0, 1].set(0.5))
    groups = Groups(jnp.asarray([1, 1], jnp.int32), matrix_X=jnp.asarray([1, 0], jnp.int32))
    y = coded_matmul(jnp.asarray([[1.0], [3.0], [7.0]]), w, groups, implementation="reference", block_rows=2)
    np.testing.assert_array_equal(y, [[8, 16, 32], [3, 6, 6], [0, 0, 0]])


@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize(
    ("counts", "n", "k", "choice"),
    [
        ([3, 0, 9, 1], 192, 384, tiles.Tiles(8, 2, 2, 4)),  # tiles reach beyond the matrix, rows to the next group
        ([5], 64, 512, tiles.Tiles(8, 1, 2, 4, parts=2)),  # a contraction in parts
    ],
)
def test_the_kernel_is_the_definition(counts, n, k, choice):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels.coded_matmul import gpu

    x, w, groups = problem(counts, n, k, len(counts) + 2, more_rows=4, dtype=jnp.bfloat16)
    dtype = jnp.float32 if len(counts) == 1 else jnp.bfloat16
    options = {"tiles": choice, "n_processors": 3, "interpret": plgpu.InterpretGPUParams()}
    y = gpu.coded_matmul(x, w, groups, out_dtype=dtype, **options)
    expected = reference.coded_matmul(x, w, groups, out_dtype=dtype)
    assert y.dtype == expected.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7, atol=1e-3)


def swiglu(counts, f, k, n_matrices, dtype=jnp.float32):
    """Arguments of `coded_experts`."""
    x, gate, groups = problem(counts, f, k, n_matrices, more_rows=3, dtype=dtype)
    (_, up, _), (_, down, _) = (problem(counts, *sizes, n_matrices) for sizes in ((f, k), (k, f)))
    # sums near 1, where silu bends
    weights = (gate._replace(scale=gate.scale / 1000), up._replace(scale=up.scale / 1000), down)
    return x, weights, jax.device_put(DRAW.uniform(0.5, 2, len(x)).astype(np.float32)), groups


def test_experts_are_three_products():
    x, weights, factor, groups = swiglu([2, 0, 3], 128, 256, 4)
    gate, up = (coded_matmul(x, w, groups, implementation="reference") for w in weights[:2])
    hidden = gate / (1 + np.exp(-gate)) * up * factor[:, None]
    expected = coded_matmul(hidden, weights[2], groups, implementation="reference")
    y = coded_experts(x, weights, factor, groups, implementation="reference")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"factor \(3,\): expected"):
        coded_experts(x, weights, factor[:3], groups, implementation="reference")


@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11 to run Mosaic GPU kernels on a CPU")
@pytest.mark.parametrize("along", [1, 2])
def test_gate_and_up_in_one_pass_are_the_definition(along):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels.coded_matmul import gpu

    given = swiglu([3, 0, 9, 1], 128, 256, 6, dtype=jnp.bfloat16)
    choice = tiles.Tiles(8, across=3 - along, along=along, stages=2), tiles.Tiles(8, 1, 1, 2)
    y = gpu.experts(*given, tiles=choice, n_processors=3, interpret=plgpu.InterpretGPUParams())
    expected = np.asarray(reference.experts(*given, block_rows=(128, 128)), np.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.01 * np.abs(expected).max())


def test_a_few_rows_give_every_processor_a_job():
    """V2-Lite's experts at batch 1, its output projection, which leaves half of them to others, prompts, queries."""
    sizes = (6, 6, 1408, 2048), (1, 1, 2048, 2048), (64, 6144, 1408, 2048), (1, 64, 3072, 2048)
    one, out, prompts, queries = (tiles.choose(*each, 132) for each in sizes)
    assert (one.rows, one.across, one.parts) == (8, 1, 1) and 6 * 1408 // 64 == 132
    assert (out.rows, out.across, out.stages, out.parts) == (8, 1, 8, 2) and 2 * 2048 // 64 <= 132 // 2
    assert prompts == tiles.Tiles(128, along=1, stages=4)
    assert (queries.rows, queries.across, queries.stages) == (32, 1, 8) and 2 * 3072 // 64 <= 132


def test_a_kernel_occupies_no_more_processors_than_it_has_jobs(monkeypatch):
    from pallas_kernels.coded_matmul import gpu

    seen = []
    monkeypatch.setattr(gpu.Plan, "call", lambda plan, interpret: seen.append(plan.n_ctas) or (lambda *_: None))
    for counts, n, rows in (((1,), 512, 16), ((3, 5), 512, 8), ((64,), 64 * 200, 64)):
        x, w, groups = problem(counts, n, 128, len(counts))
        gpu.multiplied(x, (w,), None, groups, 128, tiles.Tiles(rows, 1, 4, 4), 132, None)
    assert seen == [8, 2 * 8, 132]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 64))}, r"expected \[A, K\] and float8_e4m3fn \[M, N, K\]"),
        ({"scale": jnp.zeros((4, 1, 2))}, r"scales float32 \(4, 1, 2\): expected float32 \(4, 1, 1\)"),
        ({"implementation": "cuda"}, "'cuda': unknown. Choose one of reference, mosaic_gpu"),
        ({"implementation": "mosaic_gpu"}, "on cpu: needs a Hopper GPU"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    x, w, groups = problem([2, 1], 64, 128, 4)
    given = {"x": x, "scale": w.scale, "implementation": "reference"} | change
    with pytest.raises(ValueError, match=message):
        coded_matmul(given["x"], Scaled(w.codes, given["scale"]), groups, implementation=given["implementation"])


def test_every_code_becomes_the_number_that_it_stands_for():
    """The instructions of `mosaic_gpu.e4m3_to_bfloat16`, in numpy, on pairs of different codes."""
    codes = np.stack([np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)[::-1]], axis=1)
    found = by_instructions(mosaic_gpu._FROM_E4M3, codes[:, 0].astype(np.uint32) | codes[:, 1].astype(np.uint32) << 8)
    expected = codes.view(jnp.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(found, np.where(np.isnan(expected), np.where(codes < 128, 480, -480), expected))


def test_a_word_of_four_codes_becomes_every_second_number():
    codes = np.arange(256, dtype=np.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    word = np.stack([np.roll(codes, 61 * i) for i in range(4)], axis=1)
    found = np.stack([by_instructions(text, word.view(np.uint32)[:, 0]) for text in mosaic_gpu._FROM_E4M3_WORD], axis=1)
    numbers = word.view(jnp.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(found, np.stack([numbers[:, ::2], numbers[:, 1::2]], axis=1))
    np.testing.assert_array_equal(
        mosaic_gpu.evens_first(np.arange(32)[None]),
        [[*range(0, 16, 2), *range(1, 16, 2), *range(16, 32, 2), *range(17, 32, 2)]],
    )


def by_instructions(text, pairs):
    """What these few instructions of PTX make of registers, as two bfloat16 numbers each."""
    halves = lambda register: np.asarray(register, np.uint32)[..., None].view(jnp.bfloat16).astype(np.float64)  # noqa: E731

    def permuted(a, b, selector):
        both = a.astype(np.uint64) | np.uint64(b) << np.uint64(32)
        found = [
            (both >> np.uint64(8 * (selector >> 4 * i & 7)) & np.uint64(255)) << np.uint64(8 * i) for i in range(4)
        ]
        return sum(found).astype(np.uint32)

    instructions = {
        "prmt.b32": permuted,
        "shr.u32": lambda a, n: a >> np.uint32(n),
        "shl.b32": lambda a, n: a << np.uint32(n),
        "and.b32": lambda a, mask: a & np.uint32(mask),
        "lop3.b32": lambda a, mask, c, table: {0xEA: a & np.uint32(mask) | c}[table],
        "mov.b32": np.uint32,
        "mul.rn.bf16x2": lambda a, b: halves(a) * halves(b),
    }
    registers = {"$1": pairs}
    for name, operands in re.findall(r"^([a-z]\S+) (.*);$", text, re.MULTILINE):
        if name in instructions:
            target, *rest = operands.split(", ")
            registers[target] = instructions[name](*(registers[r] if r in registers else int(r, 0) for r in rest))
    return registers["$0"]
