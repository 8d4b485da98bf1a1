"""Weights are prepared once as a step reads them; a GPU runs without a loop and takes the kernel where that can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import on_device, run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.kernels import XLA
from deepseek_jax.layers.base import Turned, Unstacked, logical_axes, split
from deepseek_jax.precision.fp8_weight import Layout, encoded
from deepseek_jax.precision.matmul import PLAIN
from pallas_kernels import mosaic_gpu
from pallas_kernels.token_experts import gpu as token_experts


def test_weights_are_cast_once_and_only_where_they_are_wider_than_what_is_read():
    config = run_config.load("tiny_v3")
    _, shapes, _ = split(abstract_module(config))
    params = jax.tree.map(lambda w: jax.device_put(np.zeros(w.shape, w.dtype)), shapes)
    assert on_device.Prepared(config)(params) is params  # float32
    config.precision = "bf16"
    prepared = on_device.Prepared(config)
    before, after = prepared(params), prepared(params)
    jax.tree.map(lambda one, other: np.testing.assert_(one is other), before, after)
    moe = before["moe_blocks"]
    assert moe["experts"]["gate_XDF"].dtype == before["embedding"]["table_VD"].dtype == jnp.bfloat16
    kept = (("moe_blocks", "experts", "router", "centroids_DE"), ("final_norm", "gain"))
    for path in kept:
        one, same = before, params
        for key in path:
            one, same = one[key], same[key]
        assert one is same
    replaced = params | {"head": jax.tree.map(lambda w: jnp.asarray(np.asarray(w) + 1), params["head"])}
    again = prepared(replaced)
    assert again["moe_blocks"]["experts"]["gate_XDF"] is moe["experts"]["gate_XDF"]
    for new, old in zip(jax.tree.leaves(again["head"]), jax.tree.leaves(replaced["head"]), strict=True):
        np.testing.assert_array_equal(new, np.asarray(old).astype(new.dtype))


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v3", "tiny_moe"])
def test_a_gpu_reads_one_array_per_layer_with_the_axes_that_are_summed_over_inside(name):
    """All numbers are the same; routed experts stay in their stack, and what a step does not multiply as it is."""
    config = run_config.load(name)
    module = abstract_module(config, XLA)
    _, shapes, _ = split(module)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: jax.device_put(np.asarray(rng.normal(size=w.shape), w.dtype)), shapes)
    prepared = on_device.Prepared(config, for_gpu=True)
    read = prepared(params)
    assert jax.tree.leaves(prepared(params))[0] is jax.tree.leaves(read)[0]

    def check(path, stored, axes, found):
        stored = np.asarray(stored)
        if axes[0] != "layers" or axes[1] == "experts":
            np.testing.assert_array_equal(found[...], stored)
            return
        assert isinstance(found, Unstacked) and len(found.layers) == len(stored)
        for layer, expected in zip(found.layers, stored, strict=True):
            np.testing.assert_array_equal(layer[...], expected)
        if path[-1].key == "out_HUD":
            assert found.layers[0].order == (2, 0, 1)
        if path[-1].key == "gain":
            assert not any(isinstance(layer, Turned) for layer in found.layers)

    jax.tree_util.tree_map_with_path(check, params, logical_axes(module)[0], read)


def test_a_hidden_layer_that_xla_cannot_divide_is_filled_up_with_zeros():
    """Once, where a few are enough: the feed-forward is the same, also from FP8 codes."""
    config = run_config.load("tiny_v3")
    config.model.dense_width = 2 * on_device.DIVIDED - 4  # of 64 / 508 more, none of all other widths
    module = abstract_module(config, XLA)
    _, shapes, _ = split(module)
    reads = on_device.reads(config, module, True)
    leaves = jax.tree.leaves(reads, is_leaf=lambda read: isinstance(read, on_device.Read))
    assert sum(bool(read.zeros) for read in leaves) == 3
    names, rng = ("gate_DF", "up_DF", "down_FD"), np.random.default_rng(0)
    stored = {n: jnp.asarray(rng.normal(size=shapes["dense_blocks"]["mlp"][n].shape), jnp.float32) for n in names}
    layouts = {n: Layout(w.shape[2:], w.shape[1:2], (1, 0)) for n, w in stored.items()}
    for weights in (stored, {n: encoded((w,), (layouts[n],))[0] for n, w in stored.items()}):
        read = {n: on_device.prepared(w, reads["dense_blocks"]["mlp"][n]).layers[0] for n, w in weights.items()}
        layer = {n: on_device.layer_of(w, 0) for n, w in weights.items()}
        assert {w[...].shape for w in read.values()} == {(config.model.d_model, 512), (512, config.model.d_model)}
        x = jnp.asarray(rng.normal(size=(1, 3, config.model.d_model)), jnp.float32)
        found, right = (_feed_forward(x, *(PLAIN, *(w[n][...] for n in names))) for w in (read, layer))
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-4)


def _feed_forward(x, matmul, gate, up, down):
    hidden = matmul.swiglu(matmul.einsum("BTD,DF->BTF", x, gate), matmul.einsum("BTD,DF->BTF", x, up))
    return matmul.einsum("BTF,FD->BTD", hidden, down)


CODES = {"coded_matmul": "mosaic_gpu"}
HOPPER = CODES | {
    "coded_experts": "mosaic_gpu",
    "grouped_matmul": "mosaic_gpu",
    "token_experts": "mosaic_gpu",
    "latent_decode": "by_size",
    "attention": "mosaic_gpu",
}


@pytest.mark.parametrize(
    "name, kernels",
    [("v2_lite", HOPPER), ("tiny_v3", {}), ("r1_distill_qwen_7b", CODES)],
)
def test_a_hopper_gpu_generates_without_a_loop_and_by_kernels_where_they_can_run(name, kernels, monkeypatch):
    """tiny_v3 is float32; R1's student has neither experts nor latents."""
    config = run_config.load(name)
    in_a_loop = split(abstract_module(config, XLA))[0]
    assert on_device.definition(config, in_a_loop) is in_a_loop and not on_device.compiler_options()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mosaic_gpu, "is_hopper", lambda: True)
    chosen = on_device.kernels(config).chosen
    assert {operation: by for operation, by in chosen.items() if by != "xla"} == kernels
    assert on_device.definition(config, in_a_loop) != in_a_loop


def test_streams_are_mixed_by_a_kernel():
    assert on_device._on_hopper(run_config.load("tiny_v4").model) == {"sinkhorn": "triton"}


def test_a_model_that_is_wider_than_the_kernel_of_one_token_takes_is_xlas(monkeypatch):
    config = run_config.load("v2_lite")
    monkeypatch.setattr(mosaic_gpu, "is_hopper", lambda: True)
    found = {}
    for config.model.d_model in (token_experts.MOST, token_experts.MOST + 256):
        found[config.model.d_model] = on_device.kernels(config).chosen["token_experts"]
    assert list(found.values()) == ["mosaic_gpu", "xla"]
