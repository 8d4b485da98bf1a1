"""Attention by blocks is attention: outputs, lse and gradients against the definition, and what is stored for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.layers.base import KEPT_DOTS
from pallas_kernels.mla_attention import SAVED, attention, chunked

WIDTHS = 6, 4  # of queries and keys, of values
SCALE = 0.4
PAIRS = {  # (B, T, S, H, Z), offset of the queries
    "one token": ((1, 1, 1, 2, 2), 0),
    "one block": ((2, 16, 16, 2, 2), 0),
    "blocks that are not full": ((2, 41, 41, 4, 2), 0),
    "the end of a prompt": ((1, 19, 50, 2, 1), 31),
    "its first tokens see nothing": ((1, 20, 37, 2, 1), -3),
    "none sees anything": ((1, 20, 37, 2, 1), -20),
    "more queries than keys": ((1, 200, 33, 2, 2), 3),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 16)


def numbers(b, t, s, h, z, dtype=np.float64, draw=np.random.Generator.normal) -> tuple:
    rng = np.random.default_rng(0)
    shapes = (b, t, h, WIDTHS[0]), (b, s, z, WIDTHS[0]), (b, s, z, WIDTHS[1])
    return tuple(jax.device_put(np.asarray(draw(rng, size=shape), dtype)) for shape in shapes)


def documents(b, t, s, offset) -> tuple:
    """Three documents, whose ids at equal positions are equal; the queries of one position see nothing."""
    ids = np.random.default_rng(1).integers(0, 3, (b, s + t + abs(offset)))
    of_queries = ids[:, np.arange(t) + offset].copy()
    of_queries[:, t // 2] = 7
    return jnp.asarray(of_queries), jnp.asarray(ids[:, :s])


def wave(x):
    return jnp.sin(jnp.arange(1, x.size + 1)).reshape(x.shape).astype(x.dtype)


def loss(q, k, v, **options):
    """A sum over both results, and the results."""
    o, lse = attention(q, k, v, scale=SCALE, **options)
    finite = jnp.where(jnp.isfinite(lse), lse, 0)
    return jnp.sum(wave(o) * o).astype(jnp.float32) + jnp.sum(wave(lse) * finite).astype(jnp.float32), (o, lse)


@functools.partial(jax.jit, static_argnames=("implementation", "q_offset"))
def results(q, k, v, segments=None, offset=None, *, implementation, q_offset=0):
    """[o, lse, dq, dk, dv]; a q_offset in `offset` is known only when the program runs."""
    options = {"segments": segments, "q_offset": q_offset if offset is None else offset}
    find = jax.grad(functools.partial(loss, implementation=implementation, **options), (0, 1, 2), has_aux=True)
    gradients, found = find(q, k, v)
    return [*found, *gradients]


def relative(found, expected) -> float:
    found, expected = (np.where(np.isfinite(x), x, -1e3).astype(np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("name", PAIRS)
def test_blocks_change_nothing_in_float64(name):
    shape, offset = PAIRS[name]
    with jax.enable_x64(True):
        arrays, segments = numbers(*shape), None if offset > 0 else documents(*shape[:3], offset)
        expected = results(*arrays, segments, implementation="reference", q_offset=offset)
        for options in ({"q_offset": offset}, *[{"offset": jnp.int32(offset)}] * bool(offset)):
            found = results(*arrays, segments, implementation="chunked", **options)
            assert max(map(relative, found, expected)) <= 1e-12


def test_by_hand():
    """Scores 0 and log 3: weights 1/4 and 3/4; the first query sees one key, the third, of another document, none."""
    q, k = jnp.ones((1, 3, 1, 1)), jnp.asarray([0.0, np.log(3), 5.0]).reshape(1, 3, 1, 1)
    v = jnp.asarray([8.0, 4.0, 1.0]).reshape(1, 3, 1, 1)
    segments = jnp.asarray([[1, 1, 2]]), jnp.asarray([[1, 1, 1]])
    for implementation in ("reference", "chunked"):
        o, lse = jax.jit(functools.partial(attention, implementation=implementation, scale=1.0))(
            q, k, v, segments=segments
        )
        np.testing.assert_allclose(o.ravel(), [8, 5, 0], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), [0, np.log(4), -np.inf], atol=1e-6)


INPUTS = {
    "normal": np.random.Generator.normal,
    "long-tailed": lambda rng, size: rng.standard_t(2, size),
    "large logits": lambda rng, size: 30 * rng.normal(size=size),
}


@pytest.mark.parametrize("name", INPUTS)
def test_bfloat16_is_as_exact_as_its_roundings(name):
    arrays = numbers(2, 200, 200, 2, 1, jnp.bfloat16, INPUTS[name])
    segments = documents(2, 200, 200, 0)
    found = results(*arrays, segments, implementation="chunked")
    with jax.enable_x64(True):
        expected = results(*(x.astype(jnp.float64) for x in arrays), segments, implementation="reference")
    assert [relative(*pair) <= bound for *pair, bound in zip(found, expected, (3e-3, 3e-3, *(1e-2,) * 3), strict=True)]


def test_one_visible_key_is_copied():
    """However large the scores, and in the middle of a block."""
    q, k, v = numbers(1, 40, 40, 2, 2, jnp.bfloat16, INPUTS["large logits"])
    alone = jnp.arange(40, dtype=jnp.int32)[None]
    o, lse, *_ = results(q, k, v, (alone, alone), implementation="chunked")
    np.testing.assert_array_equal(o, v)
    scores = SCALE * np.einsum("bthq,bthq->bht", *(np.asarray(x, np.float64) for x in (q, k)))
    np.testing.assert_allclose(lse, scores, rtol=1e-5, atol=1e-4)


def test_queries_that_see_nothing_move_nothing():
    """Neither by themselves, nor where their results have gradients that are not finite."""
    q, k, v = numbers(1, 20, 20, 2, 2, np.float32)
    segments = jnp.ones((1, 20), jnp.int32).at[:, 4].set(2), jnp.ones((1, 20), jnp.int32)

    def total(q, k, v):
        o, lse = attention(q, k, v, implementation="chunked", scale=SCALE, segments=segments)
        return jnp.sum(o) + jnp.sum(jnp.where(lse > -jnp.inf, lse * lse, 0))  # its gradient at -inf is 0 * -inf

    value, (dq, dk, dv) = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    assert np.isfinite(value) and not dq[:, 4].any()
    assert all(np.isfinite(x).all() and x.any() for x in (dk, dv))


def bytes_beside_results(n_tokens: int) -> int:
    shapes = [jax.ShapeDtypeStruct((1, n_tokens, 2, width), jnp.float32) for width in (6, 6, 4)]
    step = jax.jit(jax.grad(lambda *x: loss(*x, implementation="chunked")[0], (0, 1, 2)))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_tokens():
    short, middle, long = map(bytes_beside_results, (256, 512, 1024))
    assert long - middle <= 2.1 * (middle - short)
    assert long < 1024 * 1024 * 4 / 2  # half of one head's scores


def largest(jaxpr) -> int:
    """Elements of the largest array of a program, inner programs included."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())) if hasattr(x, "eqns")]
    inner += [x.jaxpr for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())) if hasattr(x, "jaxpr")]
    own = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    return max([*own, *map(largest, inner)], default=0)


def test_no_array_has_all_scores():
    """Not in a loop over layers either, before which jax computes what does not depend on the layer."""
    arrays = numbers(1, 128, 128, 1, 1, np.float32)

    def layers(implementation, q, k, v):
        def layer(q, gain):
            return q + loss(q * gain, k, v, implementation=implementation)[0], None

        return jnp.sum(jax.lax.scan(layer, q, jnp.ones(2))[0])

    steps = (jax.grad(functools.partial(layers, name), (0, 1, 2)) for name in ("chunked", "reference"))
    blocks, whole = (largest(jax.make_jaxpr(step)(*arrays).jaxpr) for step in steps)
    assert blocks <= 2 * 128 * max(WIDTHS) and whole >= 128 * 128


def test_a_policy_knows_what_attention_saves():
    """With its two results kept, nothing of the forward pass runs again."""

    def loops(policy) -> int:
        f = jax.checkpoint(lambda *x: loss(*x, implementation="chunked")[0], policy=policy)
        return str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*numbers(1, 40, 40, 2, 2, np.float32))).count("scan[")

    policies = jax.checkpoint_policies
    assert loops(policies.save_only_these_names(*SAVED)) == loops(KEPT_DOTS) == loops(policies.nothing_saveable) - 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map(check_vma):
    """Sequences split over devices, keys that all devices share: the gradients of one device."""
    q, k, v = numbers(4, 40, 40, 2, 2, np.float32)
    k, v = k[:1], v[:1]

    def total(q, k, v):
        k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (k, v))
        o, _ = attention(q, k, v, implementation="chunked", scale=SCALE)
        return jnp.sum(o**2)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def summed(*x):
        value, gradients = jax.value_and_grad(total, (0, 1, 2))(*x)
        shared = gradients[1:] if check_vma else jax.lax.psum(gradients[1:], "data")
        return jax.lax.psum(value, "data"), (gradients[0], *shared)

    specs = P("data"), P(), P()
    over_devices = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=(P(), specs), check_vma=check_vma)
    found = jax.jit(over_devices)(q, k, v)
    expected = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_inside_a_switch():
    arrays = numbers(1, 40, 40, 2, 2, np.float32)
    branches = [lambda *x: loss(*x, implementation="chunked")[0], lambda *x: jnp.sum(x[0])]
    found = jax.jit(jax.grad(lambda n, *x: jax.lax.switch(n, branches, *x), (1, 2, 3)))(0, *arrays)
    for got, expected in zip(found, results(*arrays, implementation="reference")[2:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 8, 2, 5)}, r"expected \[B, T, H, Q\]"),
        ({"q": (1, 8, 3, 6)}, "query heads that are a multiple"),
        ({"v": (1, 0, 2, 4), "k": (1, 0, 2, 6)}, "no empty axis"),
        ({"dtype": jnp.float16}, "one floating-point dtype"),
        ({"segments": (jnp.ones((1, 8)), jnp.ones((1, 7)))}, "one id per query"),
        ({"q_offset": jnp.ones(2, jnp.int32)}, "expected an integer"),
        ({"implementation": "fast"}, "Choose one of reference, chunked"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (1, 8, 2, 6), "k": (1, 8, 2, 6), "v": (1, 8, 2, 4)}
    arrays = [jnp.zeros(change.pop(name, shape)) for name, shape in shapes.items()]
    arrays[0] = arrays[0].astype(change.pop("dtype", jnp.float32))
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **{"implementation": "chunked", "scale": 1.0} | change)
