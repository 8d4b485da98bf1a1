"""FP8 products: the codes' product to float32 rounding, three matmuls per weight, one quantisation per activation."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run, run_config
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import TABLE, XLA, Kernels
from deepseek_jax.layers.base import SINGLE_DEVICE, roles, split
from deepseek_jax.layers.grouped import grouped_swiglu, sort_by_expert
from deepseek_jax.layers.mla import MLA, MLAConfig
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.parallel.alltoall import Stay
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.precision import fp8_kernels
from deepseek_jax.precision.fp8 import BlockMatmul
from deepseek_jax.precision.matmul import PLAIN
from deepseek_jax.precision.policy import policy
from deepseek_jax.precision.quantize import dequantize_blocks, quantize_blocks
from deepseek_jax.precision.wire import AS_IS, Codes, carried
from pallas_kernels import fp8_matmul, grouped_matmul
from pallas_kernels.grouped_matmul import Groups, Scaled
from pallas_kernels.quantize import quantize

FP8 = BlockMatmul()
EQUATIONS = {
    "BTD,DF->BTF": ((2, 70, 200), (200, 72)),
    "BTD,DHQ->BTHQ": ((2, 64, 128), (128, 2, 40)),
    "BTHU,HUD->BTD": ((1, 130, 2, 64), (2, 64, 70)),
}


def numbers(*shape: int, seed: int = 0, std: float = 1.0, dtype=jnp.float32) -> jax.Array:
    """Normal, some of them a hundred times as large."""
    rng = np.random.default_rng([seed, *shape])
    return jax.device_put(np.asarray(rng.normal(size=shape) * std * np.where(rng.random(shape) < 0.01, 100, 1), dtype))


def wide(codes: jax.Array, scale: jax.Array) -> np.ndarray:
    """What codes [M, K] with scales [blocks, M] stand for, in float64."""
    return np.float64(codes) * np.repeat(np.float64(scale).T, 128, axis=1)[:, : codes.shape[1]]


codes_of = jax.jit(functools.partial(quantize, implementation="reference"))


@jax.jit
def weight_of(w: jax.Array) -> tuple:
    """(codes, scales, what they stand for)."""
    codes = quantize_blocks(w)
    return *codes, dequantize_blocks(*codes, jnp.float32)


def definition(function):
    return functools.partial(function, implementation="reference")


def error(found, right) -> float:
    found, right = np.float64(found), np.float64(right)
    return np.linalg.norm(found - right) / np.linalg.norm(right)


@pytest.mark.parametrize("shape", [(3, 200, 70), (130, 128, 256)])
def test_the_product_is_that_of_the_codes(shape):
    m, k, n = shape
    x, g = codes_of(numbers(m, k)), codes_of(numbers(m, n))
    q, scale, w = weight_of(numbers(k, n, std=0.02))
    product = jax.jit(functools.partial(XLA["fp8_matmul"], out_dtype=jnp.float32), static_argnames="w_block")
    y = product(x.q, x.scale, q.T, scale.T)
    assert error(y, wide(x.q, x.scale) @ np.float64(w)) < 1e-6
    definition = functools.partial(fp8_matmul.fp8_matmul, implementation="reference", out_dtype=jnp.float32)
    assert error(y, jax.jit(definition)(x.q, x.scale, q.T, scale.T)) < 1e-6
    dw = product(x.q_t, x.scale_t, g.q_t, g.scale_t, w_block=(1, 128))
    assert error(dw, wide(x.q_t, x.scale_t) @ wide(g.q_t, g.scale_t).T) < 1e-6


@pytest.mark.parametrize("m, n, k, parts", [(130, 72, 17 * 128, 2), (256, 128, 2000, 1), (4096, 4096, 4096, 1)])
def test_a_small_weight_gradient_is_summed_in_parts(m, n, k, parts):
    assert fp8_kernels._parts(m, n, k) == parts
    if m > 256:
        return
    x, g = codes_of(numbers(k, m)), codes_of(numbers(k, n))
    operands = (x.q_t, x.scale_t, g.q_t, g.scale_t)
    options = {"w_block": (1, 128), "out_dtype": jnp.float32, "implementation": "reference"}
    whole, summed = (
        jax.jit(functools.partial(f, **options))(*operands)
        for f in (fp8_matmul.fp8_matmul, fp8_kernels.product_in_parts)
    )
    assert error(summed, whole) < 1e-6


def test_the_grouped_products_are_those_of_the_definition():
    count_X, rows = jnp.array([130, 0, 5]), 512
    holds = np.r_[np.ones(130), np.zeros(126), np.ones(5), np.zeros(251)].astype(np.float32)[:, None]
    x, g = (codes_of(numbers(rows, width) * holds) for width in (200, 72))
    q, scale, _ = weight_of(numbers(3, 200, 72, std=0.02))

    @jax.jit
    def both(x, g, q, scale):
        results = []
        groups = Groups(count_X, align=128)
        rows = Scaled(x.q, x.scale), Scaled(q.mT, scale.mT), groups
        columns = Scaled(x.q_t, x.scale_t), Scaled(g.q_t, g.scale_t), groups
        for matmul, gradient in [
            (XLA["grouped_fp8_matmul"], XLA["grouped_fp8_weight_gradient"]),
            (definition(grouped_matmul.grouped_fp8_matmul), definition(grouped_matmul.grouped_fp8_weight_gradient)),
        ]:
            results.append((matmul(*rows, out_dtype=jnp.float32), gradient(*columns)))
        return results

    (y, dw), (y_defined, dw_defined) = both(x, g, q, scale)
    assert error(y, y_defined) < 1e-6 and error(dw, dw_defined) < 1e-6 and not dw[1].any()


@pytest.mark.parametrize("size", [1.0, 1e-12])  # of the gradients: a mean over many tokens has small ones
@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_three_matmuls_of_a_product(equation, size):
    of_x, of_w = EQUATIONS[equation]
    x, w = numbers(*of_x, dtype=jnp.bfloat16), numbers(*of_w, seed=1, std=0.02)

    @jax.jit
    def all_of_it(x, w):
        y, pull = jax.vjp(functools.partial(FP8.einsum, equation), x, w)
        g = size * numbers(*y.shape, seed=2, dtype=jnp.bfloat16)
        exact, exactly = jax.vjp(functools.partial(PLAIN.einsum, equation), *(a.astype(jnp.float32) for a in (x, w)))
        halves = FP8.vjp_input(equation, g, w), FP8.vjp_weight(equation, x, g)
        return (y, *pull(g)), (exact, *exactly(g.astype(jnp.float32))), halves

    found, exact, halves = all_of_it(x, w)
    assert [part.dtype for part in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for one, right in zip(found, exact, strict=True):
        assert 0.01 < error(one, right) < 0.05  # codes of three bits, and not more exact than that
        one, right = np.float64(one) / size, np.float64(right) / size
        assert abs(np.vdot(one, right) / np.vdot(right, right) - 1) < 0.01  # errors average out: nothing shrinks
    for half, one in zip(halves, found[1:], strict=True):
        np.testing.assert_array_equal(half, one)


def test_the_weight_gradient_is_made_of_the_codes_along_tokens():
    x, w, g = numbers(130, 64, dtype=jnp.bfloat16), numbers(64, 32, std=0.02), numbers(130, 32, dtype=jnp.bfloat16)
    dx, dw = jax.jit(lambda: (FP8.vjp_input("TD,DF->TF", g, w), FP8.vjp_weight("TD,DF->TF", x, g)))()
    of_x, of_g = codes_of(x), codes_of(g)
    assert error(dw, wide(of_x.q_t, of_x.scale_t) @ wide(of_g.q_t, of_g.scale_t).T) < 1e-6
    assert error(dx, wide(of_g.q, of_g.scale) @ np.float64(weight_of(w)[2]).T) < 3e-3  # bfloat16


def test_squares_of_gradients_share_one_scale():
    g = numbers(256, 256)
    codes = jax.jit(BlockMatmul(gradient_block="128x128")._gradient, static_argnums=1)(g, "fp32")
    assert np.unique(np.float32(codes.scale)).size == 4
    np.testing.assert_array_equal(wide(codes.q, codes.scale), wide(codes.q_t, codes.scale_t).T)
    assert error(wide(codes.q, codes.scale), g) < 0.04
    matmuls = [BlockMatmul(gradient_block=block) for block in ("1x128", "128x128")]
    rows, squares = jax.jit(lambda g: [m.vjp_input("TD,DF->TF", g, jnp.eye(256)) for m in matmuls])(g)
    assert error(rows, squares) > 1e-3


def test_experts_in_fp8_are_close_to_experts_and_each_weight_has_its_rows():
    n_experts, width, hidden, n_tokens = 4, 128, 64, 96
    rng = np.random.default_rng(0)
    experts = rng.integers(0, n_experts + 1, (n_tokens, 2)).astype(np.int32)
    experts[:, 1] = 4
    experts[experts == 2] = 3  # one expert has no rows, and some tokens go to none
    weights = {"gate_XDF": (4, width, hidden), "up_XDF": (4, width, hidden), "down_XFD": (4, hidden, width)}
    weights = {name: numbers(*shape, std=0.1) for name, shape in weights.items()}
    x, factors = (
        numbers(n_tokens, width, dtype=jnp.bfloat16),
        jax.device_put(np.asarray(rng.random((n_tokens, 2)), jnp.float32)),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def both(matmul, x, factors, weights):
        y, pull = jax.vjp(lambda *a: grouped_swiglu(a[0], experts, a[1], **a[2], matmul=matmul), x, factors, weights)
        return y, pull(numbers(*y.shape, dtype=y.dtype))

    found, exact = both(FP8, x, factors, weights), both(PLAIN, x, factors, weights)
    jax.tree.map(lambda one, right: np.testing.assert_array_less(error(one, right), 0.1), found, exact)
    for gradient in jax.device_get(found[1][2]).values():
        assert gradient.dtype == jnp.float32
        assert not gradient[2].any() and all(gradient[e].any() for e in (0, 1, 3))
    narrow = both(FP8, x, factors, jax.tree.map(jnp.bfloat16, weights))
    jax.tree.map(lambda one, right: np.testing.assert_array_less(error(one, right), 0.1), narrow, exact)
    assert {gradient.dtype for gradient in narrow[1][2].values()} == {jnp.dtype(jnp.bfloat16)}


def test_aligned_rows_hold_every_assignment_once():
    experts = np.random.default_rng(0).integers(0, 4, (9, 2)).astype(np.int32)  # 3 is none
    order = jax.device_get(jax.jit(functools.partial(sort_by_expert, n_experts=3, align=8))(experts))
    assert order.assignment_A.size % 8 == 0
    np.testing.assert_array_equal(order.assignment_A[order.row_MK.reshape(-1)], np.arange(18))
    np.testing.assert_array_equal(order.count_X, np.bincount(experts.reshape(-1), minlength=4)[:3])
    row = 0
    for expert, count in enumerate(order.count_X.tolist()):
        rows = order.assignment_A[row : row + count]
        assert (experts.reshape(-1)[rows] == expert).all() and (np.diff(rows) > 0).all()
        filled = -(-count // 8) * 8
        assert (order.assignment_A[row + count : row + filled] == 18).all()
        row += filled


def counted(monkeypatch) -> list:
    """The shapes that are quantised, from now on."""
    shapes: list = []
    plain = XLA["quantize"]

    def quantise(x, **options):
        shapes.append(x.shape)
        return plain(x, **options)

    monkeypatch.setattr("deepseek_jax.precision.fp8_kernels.quantize", quantise)
    return shapes


def test_an_activation_is_quantised_once_for_all_its_products(monkeypatch):
    shapes = counted(monkeypatch)
    sizes = MLAConfig(n_heads=2, q_rank=8, kv_rank=12, nope_width=6, rope_width=4, value_width=5)
    run = dataclasses.replace(SINGLE_DEVICE, matmul=FP8)
    x = jax.ShapeDtypeStruct((2, 3, 16), jnp.bfloat16)
    jax.eval_shape(lambda x: MLA(sizes, 16, run, rngs=nnx.Rngs(0))(x), x)
    # the stream (three products), the query's latent, the latent of keys and values (two), the heads' outputs
    assert sorted(shapes) == sorted([(6, 16), (6, 8), (6, 12), (6, 10)])


def test_the_backward_pass_keeps_codes_and_no_activation():
    x, w = (
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((64, 128), jnp.bfloat16), ((128, 32), jnp.float32))
    )

    def kept(matmul, *operands):
        def product(*operands):
            *operands, w = operands
            rows = matmul.swiglu(*operands) if len(operands) > 1 else matmul.operand(*operands)
            return jax.vjp(lambda rows, w: matmul.einsum("TD,DF->TF", rows, w), rows, w)[1]

        return sorted((str(leaf.dtype), leaf.size) for leaf in jax.tree.leaves(jax.eval_shape(product, *operands, w)))

    weight = [("float32", 1), ("float8_e4m3fn", 128 * 32)]
    assert kept(FP8, x) == sorted([("float8_e4m3fn", 64 * 128), ("float32", 128), *weight])
    inputs = [("float8_e4m3fn", 64 * 128), ("float8_e8m0fnu", 64)]
    assert kept(FP8, x, x) == sorted([*inputs, *inputs, *weight])


def test_which_weights_are_multiplied_in_fp8(tiny_sizes, monkeypatch):
    """Those of attention, feed-forwards and the joint of multi-token prediction; no table, head, router or norm."""
    seen: list = []
    plain = BlockMatmul._weight
    monkeypatch.setattr(BlockMatmul, "_weight", lambda self, w: seen.append(w.shape) or plain(self, w))
    sizes = copy.deepcopy(tiny_sizes)
    sizes.update(vocab_size=90, q_rank=18, kv_rank=20, nope_width=6, value_width=10, expert_width=14, n_experts=6)
    sizes = family("v3").Config.from_config(sizes)
    build = functools.partial(family("v3").Model, sizes, dataclasses.replace(SINGLE_DEVICE, matmul=FP8))
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))

    def forward(ids_BT):
        model = build(rngs=nnx.Rngs(0))
        h_BTD, _ = model.hidden(Tokens.of(ids_BT))
        return model.head(h_BTD), [depth.h_BTD for depth in model.mtp_depths(h_BTD, ids_BT, Tokens.of(ids_BT))]

    jax.eval_shape(forward, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    params, of_role = (jax.tree.leaves(tree) for tree in (split(model)[1], roles(model)))
    found = {role for role, w in zip(of_role, params, strict=True) if any(fits(shape, w.shape) for shape in seen)}
    assert found == {"attention_in", "attention_out", "gate", "up", "down", "join"}


def fits(matrix: tuple, weight: tuple) -> bool:
    """Whether a weight, perhaps of stacked layers, is multiplied as this matrix; gate and up of experts are joined."""
    *stacked, rows, columns = matrix
    sizes = {rows * columns, rows * columns // 2} if stacked else {rows * columns}
    return any(np.prod(weight[n:]) == np.prod(stacked) * size for n in (0, 1) for size in sizes)


FP8_KERNELS = [
    (operation, name)
    for operation, implementations in TABLE.items()
    if "quantize" in operation or "fp8" in operation
    for name in implementations
    if name != "xla"
]


@pytest.mark.parametrize("operation, name", FP8_KERNELS)
def test_kernels_say_which_device_they_need(operation, name):
    q, scale = jnp.zeros((128, 128), jnp.float8_e4m3fn), jnp.ones((1, 128))
    groups = Groups(jnp.array([3]), align=128)
    operands = {
        "quantize": (jnp.zeros((128, 128)),),
        "quantize_swiglu": (jnp.zeros((128, 256)),),
        "quantize_squares": (jnp.zeros((2, 128, 128)),),
        "fp8_matmul": (q, scale, q, jnp.ones((1, 1))),
        "grouped_fp8_matmul": (Scaled(q, scale), Scaled(q[None], jnp.ones((1, 1, 1))), groups),
        "grouped_fp8_weight_gradient": (Scaled(q, scale), Scaled(q, scale), groups),
    }
    device = {"mosaic_gpu": "a Hopper GPU", "mosaic_tpu": "a TPU"}[name]
    with pytest.raises(
        UserError, match=f"kernels.{operation}='{name}'.*needs {device}.*config.kernels.{operation}=xla"
    ):
        Kernels(**{operation: name})[operation](*operands[operation])


def test_what_travels_is_half_of_bfloat16_and_arrives_as_what_is_computed_with():
    x = numbers(16, 256, dtype=jnp.bfloat16)
    sent = jax.jit(Codes().encode)(x)
    assert sent.dtype == jnp.uint8 and sent.shape == (16, 256 + 2)
    arrived = jax.jit(lambda sent: Codes().decode(sent, x.dtype, 256))(sent)
    assert error(arrived, x) < 0.04
    rounded = jax.jit(functools.partial(quantize, implementation="reference", scale="ue8m0"))
    again, right = rounded(arrived), rounded(x)
    np.testing.assert_array_equal(wide(again.q, again.scale), wide(right.q, right.scale))
    np.testing.assert_array_equal(arrived, wide(right.q, right.scale))


def test_gradients_of_results_travel_as_codes_and_those_of_tokens_as_they_are():
    x, g = numbers(4, 128, dtype=jnp.bfloat16), numbers(4, 128, seed=1, dtype=jnp.bfloat16)

    @jax.jit
    def there_and_back(x, g):
        there, pull = jax.vjp(lambda x: carried(x, Codes(), AS_IS, Stay()), x)
        back, pull_back = jax.vjp(lambda x: carried(x, AS_IS, Codes(), Stay()), x)
        return there, *pull(g), back, *pull_back(g)

    rounded = jax.jit(lambda g: Codes().decode(Codes().encode(g), g.dtype, 128))(g)
    there, d_there, back, d_back = there_and_back(x, g)
    assert error(there, x) > 0.01 and error(rounded, g) > 0.01
    for found, right in [(d_there, g), (back, x), (d_back, rounded)]:
        np.testing.assert_array_equal(found, right)


def test_a_run_takes_its_options_from_the_config():
    config = run_config.load("tiny_v3")
    run_config.override(config, {"precision": "fp8", "fp8.scale": "ue8m0", "fp8.gradient_block": "128x128"})
    run_config.override(config, {"fp8.weights": "bfloat16"})
    run_config.validate(config)
    trainer = run.trainer(config, make_mesh(1, 1, jax.devices()[:1]))
    assert trainer.run.matmul == BlockMatmul(scale="ue8m0", gradient_block="128x128")
    assert trainer.run.compute == policy("fp8", config.fp8).weights == jnp.bfloat16
    with pytest.raises(UserError, match="config.fp8.gradient_block='64x64': expected one of 1x128, 128x128"):
        run_config.validate(run_config.override(config, {"fp8.gradient_block": "64x64"}))
