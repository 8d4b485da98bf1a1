"""`bench generate`: the bytes that a step has to read, and the lines that it prints."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax import run_config
from deepseek_jax.chips import memory_bandwidth
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_generate


@pytest.fixture(scope="module")
def ours():
    config = run_config.load("tiny_v2_lite")
    config.precision = "bf16"
    return _bench_generate.Ours(config, n_prompt=32)


def test_the_bytes_of_a_step_are_its_weights_the_chosen_experts_and_the_cache(ours):
    m, params = ours.config.model, ours.weights[0]
    experts = params["moe_blocks"]["experts"]
    assert experts["gate_XDF"].dtype == jnp.bfloat16
    routed = sum(experts[name].nbytes for name in ("gate_XDF", "up_XDF", "down_XFD"))
    assert routed == 3 * (m.n_layers - m.n_dense_layers) * m.n_experts * m.d_model * m.expert_width * 2
    cached = 32 * m.n_layers * (m.kv_rank + m.rope_width) * 2
    rest = ours.bytes_per_step(1) - routed * m.top_k / m.n_experts - cached
    more = ours.bytes_per_step(10**6) - rest - routed - 10**6 * cached  # all experts are chosen
    assert abs(more) < 1e-9 * ours.bytes_per_step(10**6)
    assert rest > jax.tree.leaves(params["head"])[0].nbytes and ours.floor(1) is None  # a CPU


def test_lines_give_speeds_and_the_share_of_the_floor():
    class Side:
        def run(self, batch, n_new):
            return 0.5 + 0.002 * (n_new - 1)

    head, line = _bench_generate.rows({"deepseek_jax": Side()}, 16, 11, 1, 0.001)
    assert head == "  batch 16: at most 16,000 tokens/s, 1.00 ms a step"
    assert "8,000.0 tokens/s (2.00 ms a step, fastest 2.00), 50% of the floor; first token after 0.500 s" in line


def test_a_step_is_run_and_its_program_read(ours):
    steps = _bench_generate.Steps(ours, 2)
    assert steps.run(3) > 0 and "while" in steps.program()


def test_bandwidths_and_arguments():
    assert memory_bandwidth("NVIDIA H200") == 4.8e12 and memory_bandwidth("cpu") is None
    assert memory_bandwidth("NVIDIA L40S") is None  # its peak is known, its memory is not
    with pytest.raises(UserError, match="--batches=1,x: expected numbers"):
        _bench_generate.main(["--batches=1,x"])
