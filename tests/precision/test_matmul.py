"""The object that multiplies activations with weights: its halves are the derivative, and every layer uses it."""

import functools
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import kernels
from deepseek_jax.configs import base
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.attention import causal_attention
from deepseek_jax.layers.base import SINGLE_DEVICE, bind
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.precision.grouped import OfLayer, grouped_matmul, vjp_input, vjp_weight
from deepseek_jax.precision.matmul import PLAIN, PlainMatmul
from pallas_kernels import grouped_matmul as grouped_kernels

LAYERS = Path(__file__).parents[2] / "deepseek_jax" / "layers"


@pytest.mark.parametrize("equation", ["BTD,DF->BTF", "BTD,DHQ->BTHQ", "BTHU,HUD->BTD"])
def test_the_two_halves_are_the_derivative(equation):
    rng, sizes = np.random.default_rng(0), dict(B=2, T=3, D=4, F=5, H=2, Q=3, U=3)
    x, w, y = (
        rng.normal(size=[sizes[axis] for axis in axes]).astype(np.float32) for axes in re.split(",|->", equation)
    )

    @jax.jit
    def derivatives(x, w, g):
        plain, pull = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
        ours, pull_ours = jax.vjp(functools.partial(PLAIN.einsum, equation), x, w)
        halves = PLAIN.vjp_input(equation, g, w), PLAIN.vjp_weight(equation, x, g)
        return (plain, *pull(g)), (ours, *pull_ours(g)), halves

    expected, got, halves = derivatives(x, w, y)
    for right, one in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, right)
    for right, one in zip(expected[1:], halves, strict=True):
        np.testing.assert_array_equal(one, right)


def test_the_loop_over_chunks_is_the_definition_that_the_kernel_is_tested_against():
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 3), (3, 3, 4), (9, 4)))
    counts = jnp.array([4, 0, 3])

    @functools.partial(jax.jit, static_argnums=0)
    def all_three(function, x, w, g):
        y, pull = jax.vjp(lambda x, w: function(x, w, counts), x, w)
        return y, *pull(g)

    def definition(x, w, counts):
        return grouped_kernels.grouped_matmul(x, w, grouped_kernels.Groups(counts), implementation="reference")

    for loop, other in zip(all_three(grouped_matmul, x, w, g), all_three(definition, x, w, g), strict=True):
        np.testing.assert_allclose(loop, other, atol=1e-5)


def test_experts_found_in_a_stack_of_layers_are_those_of_the_layer():
    rng = np.random.default_rng(0)
    x, w_LXDF = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 3), (2, 3, 3, 4)))
    counts = np.array([4, 0, 3], np.int32)

    def both(x, w_LXDF, number):
        of_layer = OfLayer(w_LXDF, number)
        assert of_layer.shape == (3, 3, 4) and of_layer.astype(jnp.float32) is of_layer
        return of_layer.astype(jnp.bfloat16), grouped_matmul(x, of_layer, counts)

    expected = w_LXDF[1].astype(jnp.bfloat16), jax.jit(grouped_matmul)(x, w_LXDF[1], counts)
    for found in (jax.jit(both, static_argnums=2)(x, w_LXDF, 1), jax.jit(both)(x, w_LXDF, np.int32(1))):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name, device", [("mosaic_gpu", "a Hopper GPU"), ("mosaic_tpu", "a TPU")])
def test_a_kernel_says_which_device_it_needs(name, device):
    kernel = Kernels(grouped_matmul=name)["grouped_matmul"]
    with pytest.raises(UserError, match=f"grouped_matmul='{name}'.*needs {device}.*grouped_matmul=xla"):
        kernel(jnp.zeros((9, 3)), jnp.zeros((2, 3, 4)), jnp.array([4, 2]))


def test_the_halves_of_the_grouped_matmul_are_its_derivative():
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 3), (2, 3, 4), (7, 4)))
    counts = jnp.array([4, 2])  # the last row belongs to none

    @jax.jit
    def derivatives(x, w, g):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, counts), x, w)
        return y, *pull(g), vjp_input(g, w, counts), vjp_weight(x, g, counts)

    y, d_x, d_w, first, second = derivatives(x, w, g)
    np.testing.assert_allclose(y, np.concatenate([x[:4] @ w[0], x[4:6] @ w[1], np.zeros((1, 4))]), rtol=1e-5)
    np.testing.assert_array_equal(first, d_x)
    np.testing.assert_array_equal(second, d_w)
    np.testing.assert_allclose(d_w[1], x[4:6].T @ g[4:6], rtol=1e-5)


@dataclass(frozen=True)
class Counted(PlainMatmul):
    """Remembers what it was asked for."""

    asked: list = field(default_factory=list, hash=False, compare=False)

    def einsum(self, equation, x, w):
        self.asked.append(equation)
        return super().einsum(equation, x, w)

    def grouped(self, x_AD, w_XDF, count_X):
        self.asked.append("grouped")
        return super().grouped(x_AD, w_XDF, count_X)


def test_every_product_with_a_weight_of_a_block_goes_through_the_matmul_of_the_run(tiny_sizes):
    """A whole V3 on shapes: six products of attention, three of a feed-forward, two grouped, and M of each depth."""
    sizes = family("v3").Config.from_config(tiny_sizes)
    matmul = Counted()
    ids_BT = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def run(ids_BT):
        model = family("v3").Model(sizes, replace(SINGLE_DEVICE, matmul=matmul), rngs=nnx.Rngs(0))
        h_BTD, _ = model.hidden(Tokens.of(ids_BT))
        return [depth.h_BTD for depth in model.mtp_depths(h_BTD, ids_BT, Tokens.of(ids_BT))]

    jax.eval_shape(run, ids_BT)
    attention = ["BTD,DC->BTC", "BTD,DP->BTP", "BTD,DR->BTR", "BTR,RHQ->BTHQ", "BSC,CHN->BSHN", "BSC,CHU->BSHU"]
    attention += ["BTHU,HUD->BTD"]
    swiglu = ["BTD,DF->BTF", "BTD,DF->BTF", "BTF,FD->BTD"]
    experts = ["grouped", "grouped", *swiglu]
    block = attention + experts
    assert matmul.asked == attention + swiglu + block + ["BTY,YD->BTD"] + block


def test_only_scores_router_head_and_updates_of_weights_multiply_without_it():
    found = {
        path.name
        for path in LAYERS.glob("*.py")
        if re.search(r"jnp\.(einsum|dot|matmul)|dot_general", path.read_text())
    }
    v4 = {
        "hyper.py",
        "compressed.py",
        "compressor.py",
        "compressed_attention.py",
    }  # mixing, and what is not in FP8 there
    assert found == {"attention.py", "embed.py", "indexed_attention.py", "indexer.py", "router.py", "lora.py"} | v4


def doubled(*arguments, **options):
    return 2 * causal_attention(*arguments, **options)


def test_a_new_kernel_is_a_line_of_the_table(filled, monkeypatch):
    module = ModuleType("planted_kernels")
    module.doubled = doubled
    monkeypatch.setitem(sys.modules, "planted_kernels", module)
    monkeypatch.setitem(kernels.TABLE["attention"], "doubled", "planted_kernels:doubled")
    parts = filled(lambda: GQA(GQAConfig(2, 1, 4), 6, rngs=nnx.Rngs(0)))
    x_BTD = np.random.default_rng(0).normal(size=(1, 5, 6)).astype(np.float32)

    @jax.jit
    def both(x_BTD):
        attention = bind(*parts)
        plain = attention(x_BTD)
        attention.kernels = Kernels(attention="doubled")
        return plain, attention(x_BTD)

    plain, twice = both(x_BTD)
    np.testing.assert_allclose(twice, 2 * plain, rtol=1e-5)


def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match="kernels.attention='fast': unknown. Choose one of xla"):
        Kernels(attention="fast")
    with pytest.raises(UserError, match=r"kernels\.attentoin: no such operation. Choose one of attention, "):
        Kernels(attentoin="xla")


def test_every_operation_is_a_key_of_the_config_and_computed_by_xla_unless_it_says_otherwise():
    assert base.get_config().kernels.to_dict() == dict.fromkeys(kernels.TABLE, "xla") == Kernels().chosen
    assert all(callable(Kernels()[name]) for name in kernels.TABLE)
    assert Kernels(attention="xla") == Kernels() and hash(Kernels()) == hash(Kernels(attention="xla"))
