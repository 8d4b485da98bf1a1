"""An engine whose weights stay in FP8: the text is that of the weights which the codes stand for, however it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import on_device, on_mesh
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.convert import fp8_weights
from deepseek_jax.kernels import XLA
from deepseek_jax.layers.base import bind, split
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.serve.engine import Engine, Sampling

DRAW = np.random.default_rng(3)
PROMPTS = [DRAW.integers(0, 200, n).tolist() for n in (3, 20, 9)]


def is_fp8(leaf):
    return isinstance(leaf, Fp8Weight)


@pytest.fixture(scope="module")
def weights(network):
    """Of the network: in FP8, and in float32 what the codes stand for."""
    params, router_bias = jax.tree.map(lambda a: a, network.weights)  # dicts of their own
    in_fp8 = fp8_weights.quantized({"params": params, "router_bias": router_bias})["params"]
    widen = jax.jit(lambda w: w.astype(jnp.float32))
    wide = jax.tree.map(lambda w: widen(w) if is_fp8(w) else w, in_fp8, is_leaf=is_fp8)
    return {"fp8": (in_fp8, router_bias), "wide": (wide, router_bias)}


def run(network, weights, **options):
    options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 9} | options
    engine = Engine(network.definition, weights, 32, **options)
    engine._pads_to_largest = True  # few programs
    requests = [engine.submit(prompt, Sampling(9)) for prompt in PROMPTS]
    found = {request: [] for request in requests}
    while not engine.is_idle:
        for output in engine.step():
            found[output.request] += output.ids
    return [found[request] for request in requests], engine


@pytest.mark.slow
def test_logits_are_those_of_the_dequantised_weights(network, weights):
    ids_BT = jnp.asarray([PROMPTS[1]])
    found, expected = (np.asarray(network.forward(*weights[kind], ids_BT)) for kind in ("fp8", "wide"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - np.asarray(network.forward(*network.weights, ids_BT))).max() > 1e-3  # others than before


@pytest.mark.slow
def test_the_text_is_theirs_however_it_is_computed(network, weights):
    texts, engine = run(network, weights["fp8"])
    expected, _ = run(network, weights["wide"])
    small_parts, _ = run(network, weights["fp8"], chunk=8)  # by the same programs
    alone, _ = run(network, weights["fp8"], n_rows=1, n_ahead=0)
    assert texts == expected == small_parts == alone
    held = sum(a.nbytes for a in jax.tree.leaves(engine.weights[0]))
    assert held == sum(fp8_weights.n_bytes(weights["fp8"][0]).values())


@pytest.mark.slow
def test_a_gpu_reads_each_layers_codes_apart(network, weights):
    """Routed experts stay in their stack; without a loop over layers the logits are the same."""
    module = abstract_module(network.config, XLA)
    params, router_bias = weights["fp8"]
    read = jax.tree.map(on_device.prepared, params, on_device.reads(network.config, module, True), is_leaf=is_fp8)
    assert isinstance(read["moe_blocks"]["experts"]["gate_XDF"], Fp8Weight)
    attention, stored = read["moe_blocks"]["attention"], params["moe_blocks"]["attention"]
    assert all(is_fp8(layer) for layer in attention["out_HUD"].layers)
    for name in on_device.ABSORBED:  # which XLA would dequantise in every step
        for layer, numbers in zip(attention[name].layers, stored[name].astype(jnp.float32), strict=True):
            np.testing.assert_array_equal(layer[...], numbers)
    definition = split(abstract_module(network.config, XLA, unroll=0))[0]
    ids_BT = jnp.asarray([PROMPTS[1]])

    @jax.jit
    def last(params, router_bias):
        model = bind(definition, params, router_bias)
        return model.head(model.prefill(ids_BT, 32)[0])

    expected = np.asarray(network.forward(params, router_bias, ids_BT))
    np.testing.assert_allclose(last(read, router_bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_devices_that_share_the_experts_hold_a_part_of_the_codes(network, weights):
    """And give the same text."""
    mesh = make_mesh(1, 2, jax.devices()[:2])
    replicas = on_mesh.replicas(network.config, network.definition, weights["fp8"], mesh)
    placed = replicas.place(weights["fp8"])
    gate = placed[0]["moe_blocks"]["experts"]["gate_XDF"]
    for part in (gate.codes, gate.scale):
        assert part.addressable_shards[0].data.shape[1] == part.shape[1] // 2
    expected, _ = run(network, weights["fp8"])
    found, _ = run(network, placed, replicas=replicas, n_pages=6)
    assert found == expected
