"""Grouped experts against every expert applied to every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers import grouped, swiglu
from deepseek_jax.layers.base import bind, split
from deepseek_jax.layers.grouped import grouped_swiglu, is_one_expert, sort_by_expert
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.precision import fp8_weight_kernels
from deepseek_jax.precision import grouped as grouped_matmuls
from deepseek_jax.precision.fp4_weight import Fp4Weight
from deepseek_jax.precision.fp8_weight import Layout, encoded
from deepseek_jax.precision.grouped import OfLayer, chunk_rows
from deepseek_jax.precision.matmul import PLAIN, PlainMatmul
from pallas_kernels import token_experts
from pallas_kernels.coded_matmul import coded_experts

sort = jax.jit(sort_by_expert, static_argnums=(1, 2, 3))
# traced once MOST_COUNTED, and then LARGEST_KEY, is another
sort_keys, sort_pairs = (jax.jit(lambda *given, _=n: sort_by_expert(*given), static_argnums=1) for n in range(2))
M, K, X, D, F = 13, 2, 4, 5, 6


def all_to_one(expert: int) -> np.ndarray:
    return np.full((M, K), expert)


ROUTINGS = {
    "even": np.stack([np.arange(M) % X, (np.arange(M) + 1) % X], axis=1),
    "skewed": np.stack([np.where(np.arange(M) < 11, 2, 0), np.where(np.arange(M) < 12, 3, 2)], axis=1),
    "all to the first": all_to_one(0),
    "all to the last": all_to_one(X - 1),
    "some to none": np.stack([np.arange(M) % (X + 1), np.full(M, X)], axis=1),
    "all to none": all_to_one(X),
}


@pytest.fixture(scope="module")
def inputs() -> tuple:
    rng = np.random.default_rng(0)
    shapes = ((M, D), (M, K), (X, D, F), (X, D, F), (X, F, D))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def dense(x_MD, experts_MK, weights_MK, *, gate_XDF, up_XDF, down_XFD):
    """Every expert on every token, then the chosen ones weighted; index X hits no expert."""
    hidden = jax.nn.silu(jnp.einsum("MD,XDF->MXF", x_MD, gate_XDF)) * jnp.einsum("MD,XDF->MXF", x_MD, up_XDF)
    y = jnp.einsum("MXF,XFD->MXD", hidden, down_XFD)
    share = jnp.sum(jax.nn.one_hot(experts_MK, gate_XDF.shape[0]) * weights_MK[..., None], axis=1)
    return jnp.einsum("MX,MXD->MD", share, y)


@functools.cache
def compiled(chunk: int | None):
    """(gradients, y) of the grouped experts in chunks of so many rows; of the dense ones without."""

    def loss(x, weights, gate, up, down, experts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouped_matmuls, "chunk_rows", lambda n_rows, n_experts: min(chunk, n_rows))
            y_MD = (grouped_swiglu if chunk else dense)(x, experts, weights, gate_XDF=gate, up_XDF=up, down_XFD=down)
        return jnp.sum(y_MD * jnp.cos(jnp.arange(y_MD.size)).reshape(y_MD.shape)), y_MD

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


@pytest.mark.parametrize("chunk", [3, 128])
@pytest.mark.parametrize("name", ROUTINGS)
def test_grouped_is_dense_with_all_gradients(inputs, name, chunk):
    wanted_gradients, expected = compiled(None)(*inputs, ROUTINGS[name])
    gradients, y_MD = compiled(chunk)(*inputs, ROUTINGS[name])
    np.testing.assert_allclose(y_MD, expected, rtol=1e-5, atol=1e-5)
    for got, right in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5 * max(1, np.abs(right).max()))


def test_experts_without_tokens_have_no_gradient(inputs):
    _, _, *d_weights = compiled(3)(*inputs, ROUTINGS["all to the first"])[0]
    for d_weight in d_weights:
        assert np.any(d_weight[0]) and not np.any(d_weight[1:])


def test_bfloat16_is_close(inputs):
    narrow = (jnp.bfloat16(inputs[0]), *inputs[1:])
    gradients, y_MD = compiled(3)(*narrow, ROUTINGS["skewed"])
    wanted_gradients, expected = compiled(None)(*inputs, ROUTINGS["skewed"])
    assert y_MD.dtype == jnp.bfloat16
    assert [g.dtype for g in gradients] == [jnp.bfloat16] + [jnp.float32] * 4
    for got, right in zip((y_MD, *gradients), (expected, *wanted_gradients), strict=True):
        got = np.float32(got)
        assert np.linalg.norm(got - right) < 0.03 * np.linalg.norm(right)


def test_sorting_by_hand():
    order = sort(np.array([[2, 0], [1, 3], [0, 2]]), 3)  # 3 means none
    np.testing.assert_array_equal(order.assignment_A, [1, 4, 2, 0, 5, 3])
    np.testing.assert_array_equal(order.row_MK, [[3, 0], [2, 5], [1, 4]])
    np.testing.assert_array_equal(order.count_X, [2, 1, 2])


@pytest.mark.parametrize(("align", "n_rows", "n_sorted"), [(1, 5, 5), (4, 5, 16), (4, None, 16)])
def test_rows_for_no_more_assignments_than_there_are(align, n_rows, n_sorted):
    """Five assignments of six are to an expert: the sixth has no row, or one after the others, which none computes."""
    order = sort(np.array([[2, 0], [1, 3], [0, 2]]), 3, align, n_rows)
    rows_of_middle = 1 if n_sorted == 5 else 2
    assert order.assignment_A.size == n_sorted
    x_MD = np.float32([[1, 2], [3, 4], [5, 6]])

    @jax.jit
    def there_and_back(x_MD):
        rows, back = jax.vjp(lambda x_MD: grouped.to_rows(x_MD, order), x_MD)
        weights, back_to_pairs = jax.vjp(lambda weights_MK: grouped.sort_weights(weights_MK, order), x_MD)
        return grouped.to_tokens(rows, order), *back(rows), *back_to_pairs(weights)

    *tokens, pairs = there_and_back(x_MD)
    for found in tokens:
        np.testing.assert_array_equal(found, x_MD * np.array([[2], [rows_of_middle], [2]]))
    np.testing.assert_array_equal(pairs, [[1, 2], [3, 4 * (rows_of_middle - 1)], [5, 6]])


@pytest.mark.parametrize("name", ROUTINGS)
def test_all_ways_of_sorting_agree(name, monkeypatch):
    """By counting, as few are, by keys, and by pairs."""
    by_count = sort(ROUTINGS[name], X)
    np.testing.assert_array_equal(by_count.assignment_A, np.argsort(ROUTINGS[name].reshape(-1), kind="stable"))
    monkeypatch.setattr(grouped, "MOST_COUNTED", 0)
    by_key = sort_keys(ROUTINGS[name], X)
    monkeypatch.setattr(grouped, "LARGEST_KEY", 0)
    by_pairs = sort_pairs(ROUTINGS[name], X)
    for one, *others in zip(by_count, by_key, by_pairs, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_so_many_rows_that_a_sort_key_would_overflow_are_sorted_by_pairs():
    few, many = (
        jax.eval_shape(lambda experts: sort_by_expert(experts, 8), jax.ShapeDtypeStruct((n, 2), jnp.int32))
        for n in (4, 2**27)
    )
    assert [x.dtype for x in few] == [x.dtype for x in many]
    assert many.assignment_A.shape == (2**28,)


@pytest.mark.parametrize(
    ("n_rows", "n_experts", "expected"),
    [(3, 4, 3), (26, 4, 8), (128, 16, 16), (1024, 16, 128), (4096, 16, 128), (8192, 16, 256), (10**6, 8, 512)],
)
def test_rows_of_a_chunk(n_rows, n_experts, expected):
    assert chunk_rows(n_rows, n_experts) == expected


@pytest.mark.parametrize("experts", [[[2, 0]], [[3, 3]], [[X, X]]])
def test_one_token_takes_its_experts_out_of_the_stack_without_sorting(inputs, experts):
    """Equal to what all experts of the layer give; nowhere if it goes to none."""
    x_MD, _, weights_MK, *weights = inputs[0], None, inputs[1], *inputs[2:]
    stacks = [np.stack([w + 1, w]) for w in weights]
    arguments = x_MD[:1], np.array(experts), weights_MK[:1]
    expected, found = jax.jit(dense_and_of_layer)(arguments, weights, stacks)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def dense_and_of_layer(arguments, weights, stacks) -> tuple:
    names = "gate_XDF", "up_XDF", "down_XFD"
    of_layer = dict(zip(names, (OfLayer(w, 1) for w in stacks), strict=True))
    return dense(*arguments, **dict(zip(names, weights, strict=True))), grouped_swiglu(*arguments, **of_layer)


@pytest.mark.parametrize("experts", [[2, 0], [X, 3]])
def test_the_kernel_of_one_token_is_given_the_matrices_of_its_layer(inputs, experts, monkeypatch):
    """By the definition of the kernel; the other layer differs, and number X, "none", gives nothing."""
    x_MD, weights_MK, *weights = inputs
    reference = functools.partial(token_experts.experts, implementation="reference")
    monkeypatch.setattr(grouped, "_lowered_once", lambda *arrays, implementation: reference(*arrays))

    @jax.jit
    def of_one_and_of_two(x_MD, chosen_MK, weights_MK, arrays):
        stacks, found = tuple(OfLayer(w, 1) for w in arrays), []
        by_role = dict(zip(("gate_XDF", "up_XDF", "down_XFD"), stacks, strict=True))
        for name in ("xla", "mosaic_gpu"):
            one = grouped._swiglu_of_few(x_MD[:1], chosen_MK[:1], weights_MK[:1], stacks, by_kernel(name))
            found.append((one, grouped_swiglu(x_MD[:2], chosen_MK, weights_MK[:2], **by_role, matmul=by_kernel(name))))
        return found

    chosen_MK, arrays = np.int32([experts, [1, 2]]), [np.stack([w + 1, w]) for w in weights]
    expected, found = of_one_and_of_two(x_MD, chosen_MK, weights_MK, arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [[2, 0], [X, 3]])
def test_the_kernel_of_one_token_is_given_the_codes_of_its_layer(experts, monkeypatch):
    draw, d, f = np.random.default_rng(0), 130, 48
    layouts = [Layout((f,), (d,), (1, 0)), Layout((f,), (d,), (1, 0)), Layout((d,), (f,), (1, 0))]
    stacks = [
        jax.device_put(np.asarray(0.1 * draw.normal(size=(2, X, *layout.shape)), jnp.float32)) for layout in layouts
    ]
    weights = tuple(OfLayer(encoded((w,), (how,))[0], 1) for w, how in zip(stacks, layouts, strict=True))
    reference = functools.partial(token_experts.experts_in_codes, implementation="reference")
    monkeypatch.setattr(grouped, "_of_codes_lowered_once", lambda *arrays, implementation: reference(*arrays))
    given = (
        jax.device_put(np.asarray(draw.normal(size=(1, d)), jnp.float32)),
        jnp.asarray([experts]),
        jnp.asarray([[0.3, 0.9]]),
    )
    by_name = (grouped._swiglu_of_few(*given, weights, by_kernel(name)) for name in ("xla", "mosaic_gpu"))
    np.testing.assert_allclose(*by_name, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    with pytest.raises(UserError, match="kernels.coded_token_experts='mosaic_gpu': .*coded_token_experts=xla"):
        grouped._swiglu_of_few(*given, weights, by_kernel("mosaic_gpu"))


@pytest.mark.slow
def test_the_kernels_of_few_rows_are_given_the_codes_of_their_layer(monkeypatch):
    """By the definition of the kernel that reads gate and up in one pass; rows of no expert come last."""
    draw, d, f = np.random.default_rng(0), 130, 48
    shapes = ((f, d), (f, d), (d, f))
    arrays = [jax.device_put(np.asarray(0.1 * draw.normal(size=(2, X, m, n)), jnp.float32)) for n, m in shapes]
    weights = tuple(
        OfLayer(encoded((w,), (Layout((n,), (m,), (1, 0)),))[0], 1) for w, (n, m) in zip(arrays, shapes, strict=True)
    )
    rows = jax.device_put(np.asarray(draw.normal(size=(5, d)), np.float32))
    given = rows, jnp.arange(5) + 0.5, jnp.asarray([1, 0, 3, 0][:X], jnp.int32), weights, by_kernel("xla")
    reference = functools.partial(coded_experts, implementation="reference")
    monkeypatch.setattr(
        grouped, "_in_codes_lowered_once", lambda *a, implementation, block_rows: reference(*a, block_rows=block_rows)
    )
    by_name = (grouped.by_three_grouped_products(*given), grouped.by_two_passes_on_hopper(*given))
    np.testing.assert_allclose(*by_name, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    with pytest.raises(UserError, match="kernels.coded_experts='mosaic_gpu': .*coded_experts=xla"):
        grouped.by_two_passes_on_hopper(*given)


def test_a_dense_feed_forward_in_fp8_is_that_of_one_expert_with_all_rows(monkeypatch):
    """Where a kernel computes experts in FP8 and the hidden layer is of whole blocks; by XLA instead of the kernel."""
    draw, layouts = np.random.default_rng(0), [Layout((128,), (32,), (1, 0))] * 2 + [Layout((32,), (128,), (1, 0))]
    arrays = [np.asarray(0.1 * draw.normal(size=layout.shape), np.float32) for layout in layouts]
    weights = [encoded((w,), (layout,))[0] for w, layout in zip(arrays, layouts, strict=True)]
    definition, *_ = split(nnx.eval_shape(lambda: SwiGLU(32, 128, 0.1, PLAIN, rngs=nnx.Rngs(0))))
    params = {"gate_DF": weights[0], "up_DF": weights[1], "down_FD": weights[2]}
    x_BTD = np.asarray(draw.normal(size=(2, 3, 32)), np.float32)
    dense = jax.jit(lambda x_BTD, params: bind(definition, params, {})(x_BTD))(x_BTD, params)
    kernels = Kernels(coded_experts="mosaic_gpu")
    assert is_one_expert(weights, PlainMatmul(kernels)) and not is_one_expert(weights, PLAIN)
    for others in ([weights[2]] * 3, [*weights[:2], arrays[2]]):  # 32 wide, and one that is not in FP8
        assert not is_one_expert(others, PlainMatmul(kernels))
    seen = []
    monkeypatch.setattr(swiglu, "is_one_expert", lambda *given: seen.append(given) or True)
    of_one = jax.jit(lambda x_BTD, params: bind(definition, params, {})(x_BTD))(x_BTD, params)
    assert len(seen) == 1
    np.testing.assert_allclose(of_one, dense, rtol=1e-4, atol=1e-5)


def test_the_kernels_that_read_fp8_refuse_fp4():
    """Whatever the device, and before they look at the rows."""
    layout = Layout((32,), (32,), (1, 0))
    in_fp4 = Fp4Weight(np.zeros((X, 32, 16), np.uint8), np.zeros((X, 32, 1), np.uint8), layout)
    row, weights, matmul = np.zeros((1, 32), np.float32), (in_fp4,) * 3, by_kernel("mosaic_gpu")
    calls = {
        "coded_matmul": lambda: fp8_weight_kernels.on_hopper(row, in_fp4, np.ones(X, np.int32)),
        "coded_experts": lambda: grouped.by_two_passes_on_hopper(row, row[:, 0], np.ones(X, np.int32), weights, matmul),
        "coded_token_experts": lambda: grouped.of_codes_on_hopper(row, row[:, :1], weights, matmul),
    }
    for name, call in calls.items():
        with pytest.raises(UserError, match=rf"kernels.{name}='mosaic_gpu': .* in FP4, .*'fp8'.*weights='wide'"):
            call()


def test_the_kernel_of_one_token_says_what_it_needs(inputs):
    x_MD, weights_MK, *weights = inputs
    stacks = tuple(OfLayer(w[None], 0) for w in weights)
    with pytest.raises(UserError, match="kernels.token_experts='mosaic_gpu': .*config.kernels.token_experts=xla"):
        given = x_MD[:1], jnp.asarray([[2, 0]]), jnp.asarray(weights_MK[:1])
        grouped._swiglu_of_few(*given, stacks, by_kernel("mosaic_gpu"))


def by_kernel(name: str) -> PlainMatmul:
    return PlainMatmul(kernels=Kernels(token_experts=name, coded_token_experts=name))
