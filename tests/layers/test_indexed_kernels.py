"""Sparse attention over a cache by `pallas_kernels`: with their definitions, it is the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.base import Execution
from deepseek_jax.layers.indexed_attention import Places, chosen_words
from deepseek_jax.layers.indexed_kernels import attention, check_choice, choose, decode, learning
from deepseek_jax.layers.indexer import Index
from pallas_kernels import mosaic_gpu
from pallas_kernels.indexer import encode
from pallas_kernels.mla_decode import fp8_cache

B, T, S, H, K = 2, 2, 40, 8, 6
DRAW = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(DRAW.normal(size=shape), jnp.float32)


def rounded(x):
    codes = encode(x)
    return codes.codes.astype(jnp.float32) * codes.scale[..., None]


@pytest.mark.parametrize(("scoring", "sorting"), [(None, "threshold"), ("reference", "reference")])
def test_the_chosen_slots_are_those_of_the_plain_form(scoring, sorting):
    """Of queries and keys in E4M3; the second sequence has fewer slots than are chosen."""
    index = Index(rounded(normal(B, T, H, 128)), normal(B, T, H), rounded(normal(B, S, 128)))
    seen_BTS = np.arange(S) < np.array([[[S], [S - 1]], [[3], [4]]])
    choices = Kernels()["indexed_choice"], functools.partial(choose, scoring, sorting)
    right, found = jax.device_get([jax.jit(choice, static_argnums=2)(index, seen_BTS, K) for choice in choices])
    np.testing.assert_array_equal(found[1], right[1])
    np.testing.assert_array_equal(np.where(found[1], found[0], S), np.sort(np.where(right[1], right[0], S)))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_attention_to_chosen_rows_is_that_of_the_plain_form(is_fp8):
    cache = normal(B * S, 128), normal(B * S, 8)
    if is_fp8:
        cache = (fp8_cache.encode(*cache),)
    given = normal(B, T, 3, 128), normal(B, T, 3, 8), cache, DRAW.integers(0, B * S, (B, T, K))
    is_chosen_BTK = np.arange(K) < np.array([[6, 4], [1, 3]])[..., None]
    functions = Kernels()["indexed_decode"], functools.partial(decode, "reference")
    right, found = (jax.jit(functools.partial(f, scale=0.1))(*given, is_chosen_BTK) for f in functions)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_codes_are_those_of_a_cache_in_fp8():
    """Keys that were not turned before they are rounded, or are of another width, are refused where a layer is made."""
    on_codes = Kernels(indexed_choice="mosaic_gpu")
    for run, width in ((Execution(kernels=on_codes), 128), (Execution(kernels=on_codes, cache="fp8"), 256)):
        with pytest.raises(UserError, match=f"indexed_choice='mosaic_gpu' with keys of {width} .* to triton or xla"):
            check_choice(run, width)
    check_choice(Execution(kernels=on_codes, cache="fp8"), 128)
    check_choice(Execution(kernels=Kernels(indexed_choice="triton")), 32)


@pytest.mark.parametrize("name", ["triton", "mosaic_gpu"])
def test_kernels_that_do_not_run_here_say_so(name):
    index = Index(normal(1, 1, H, 128), normal(1, 1, H), normal(1, S, 128))
    with pytest.raises(UserError, match=f"indexed_choice='{name}'.*config.kernels.indexed_choice=xla"):
        Kernels(indexed_choice=name)["indexed_choice"](index, np.ones((1, 1, S), bool), K)
    if name == "mosaic_gpu":
        given = normal(1, 1, 2, 512), normal(1, 1, 2, 64), (normal(S, 512), normal(S, 64))
        with pytest.raises(UserError, match="indexed_decode='mosaic_gpu'.*config.kernels.indexed_decode=xla"):
            attend = Kernels(indexed_decode=name)["indexed_decode"]
            attend(*given, np.zeros((1, 1, K), int), np.ones((1, 1, K), bool), scale=1.0)


def test_attention_of_training_to_chosen_bits_is_the_plain_form(monkeypatch):
    """Of two documents, the choice made in blocks of queries; its gradients are those of the plain form."""
    t, h = 40, 2
    index = Index(normal(B, t, 3, 8), normal(B, t, 3), normal(B, t, 8))
    segments_BT = np.repeat([[1] * 25 + [2] * 15], B, axis=0).astype(np.int32)
    places = Places(np.broadcast_to(np.arange(t, dtype=np.int32), (B, t)), segments_BT, segments_BT)
    given, weight = (normal(B, t, h, 8), normal(B, t, h, 8), normal(B, t, h, 4)), normal(B, t, h, 4)
    words = functools.partial(chosen_words, at_once=7 * B * t * 3)
    monkeypatch.setattr("deepseek_jax.layers.indexed_kernels.chosen_words", words)

    def run(attend, *given):
        o_BTHU = attend(*given, index, places, top_k=K, scale=0.3)
        return jnp.sum(o_BTHU * weight), o_BTHU

    functions = Kernels()["indexed_attention"], functools.partial(attention, "reference")
    right, found = (
        jax.jit(jax.value_and_grad(functools.partial(run, f), (0, 1, 2), has_aux=True))(*given) for f in functions
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, right)


def test_attention_of_training_says_where_it_does_not_run():
    x, index = normal(1, S, 1, 64), Index(normal(1, S, 1, 8), normal(1, S, 1), normal(1, S, 8))
    places = Places(np.arange(S, dtype=np.int32)[None])
    with pytest.raises(UserError, match=r"indexed_attention='mosaic_gpu'.*config.kernels.indexed_attention=xla"):
        Kernels(indexed_attention="mosaic_gpu")["indexed_attention"](x, x, x, index, places, top_k=K, scale=1.0)


@pytest.mark.parametrize("is_dense", [False, True])
def test_what_the_indexer_learns_by_is_that_of_the_plain_form(is_dense):
    t, h = 40, 2
    index = Index(normal(B, t, 3, 8), normal(B, t, 3), normal(B, t, 8))
    segments_BT = np.repeat([[1] * 25 + [2] * 15], B, axis=0).astype(np.int32)
    places = Places(np.broadcast_to(np.arange(t, dtype=np.int32), (B, t)), segments_BT, segments_BT)
    q, k, weight = normal(B, t, h, 64), normal(B, t, h, 64), normal(B, t)
    options = {"top_k": K, "is_dense": is_dense, "scale": 0.1, "at_once": 7 * B * t * 3}

    def run(learn, index):
        found = learn(q, k, index, places, **options)
        return jnp.sum(found.divergence_BT * weight), found

    functions = Kernels()["indexed_learning"], functools.partial(learning, "reference")
    right, found = (jax.jit(jax.value_and_grad(functools.partial(run, f), has_aux=True))(index) for f in functions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, right)


def test_gradients_of_training_by_kernels_are_traced(monkeypatch):
    """What is computed again backwards, over layers: only attention differentiates a kernel."""
    monkeypatch.setattr(mosaic_gpu, "check_hopper", lambda name: 2)
    t, places = 70, Places(np.arange(70, dtype=np.int32)[None])
    options = {"top_k": K, "scale": 0.1}

    def layer(x, _):
        q, index = x
        o = Kernels(indexed_attention="mosaic_gpu")["indexed_attention"](q, q, q, index, places, **options)
        learn = Kernels(indexed_learning="mosaic_gpu")["indexed_learning"]
        found = learn(o, q, index, places, is_dense=False, **options)
        return (o, index), found.divergence_BT

    def loss(x):
        (o, _), found = jax.lax.scan(jax.checkpoint(layer), x, None, length=2)
        return o.astype(jnp.float32).sum() + found.sum()

    index = Index(normal(1, t, 3, 8), normal(1, t, 3), normal(1, t, 8))
    given = normal(1, t, 2, 64).astype(jnp.bfloat16), index
    assert [x.shape for x in jax.tree.leaves(jax.eval_shape(jax.grad(loss), given))] == [
        x.shape for x in jax.tree.leaves(given)
    ]
