"""Weights are cast once to what a step reads; a GPU runs without a loop and takes the kernel where that can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import on_device, run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.kernels import XLA
from deepseek_jax.layers.base import split
from pallas_kernels import mosaic_gpu


def test_weights_are_cast_once_and_only_where_they_are_wider_than_what_is_read():
    config = run_config.load("tiny_v3")
    _, shapes, _ = split(abstract_module(config))
    params = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), shapes)
    assert on_device.Narrowed(config)(params) is params  # float32
    config.precision = "bf16"
    narrowed = on_device.Narrowed(config)
    before, after = narrowed(params), narrowed(params)
    jax.tree.map(lambda one, other: np.testing.assert_(one is other), before, after)
    moe = before["moe_blocks"]
    assert moe["experts"]["gate_XDF"].dtype == before["embedding"]["table_VD"].dtype == jnp.bfloat16
    kept = (("moe_blocks", "experts", "router", "centroids_DE"), ("final_norm", "gain"))
    for path in kept:
        one, same = before, params
        for key in path:
            one, same = one[key], same[key]
        assert one is same
    replaced = params | {"head": jax.tree.map(lambda w: w + 1, params["head"])}
    again = narrowed(replaced)
    assert again["moe_blocks"]["experts"]["gate_XDF"] is moe["experts"]["gate_XDF"]
    for new, old in zip(jax.tree.leaves(again["head"]), jax.tree.leaves(replaced["head"]), strict=True):
        np.testing.assert_array_equal(new, old.astype(new.dtype))


@pytest.mark.parametrize("name, kernel", [("v2_lite", "mosaic_gpu"), ("tiny_v3", "xla"), ("r1_distill_qwen_7b", "xla")])
def test_a_hopper_gpu_generates_without_a_loop_and_by_the_kernel_where_it_can_run(name, kernel, monkeypatch):
    """tiny_v3 is float32; R1's student has no experts."""
    config = run_config.load(name)
    in_a_loop = split(abstract_module(config, XLA))[0]
    assert on_device.definition(config, in_a_loop) is in_a_loop
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mosaic_gpu, "is_hopper", lambda: True)
    assert on_device.kernels(config).chosen["grouped_matmul"] == kernel
    assert on_device.definition(config, in_a_loop) != in_a_loop
