"""`bench generate`: the bytes that a step has to read, and the lines that it prints."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax import run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.chips import memory_bandwidth
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_engine, _bench_generate
from deepseek_jax.layers.base import logical_axes


@pytest.fixture(scope="module")
def ours():
    config = run_config.load("tiny_v2_lite")
    config.precision = "bf16"
    return _bench_generate.Ours(config, n_prompt=32)


@pytest.mark.slow
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

    sides = {"one": Side(), "other": Side()}
    sides["other"].acceptance = 0.85
    head, line, other = _bench_generate.rows(sides, 16, 11, 1, {"one": 0.001, "other": None})
    assert head == "  batch 16"
    speed = "8,000.0 tokens/s (2.00 ms a token, fastest 2.00)"
    assert f"{speed}, 50% of the floor of 1.00 ms; first token after 0.500 s" in line
    assert other.endswith(f"{speed}; first token after 0.500 s; 85% of the drafts right")


@pytest.mark.slow
def test_a_step_is_run_and_its_program_read(ours):
    steps = _bench_generate.Steps(ours, 2)
    assert steps.run(3) > 0 and "while" in steps.program()


@pytest.mark.slow
def test_codes_are_half_the_bytes_and_drafts_are_right_as_often_as_asked_for():
    """The engine runs both; what layers add is so small that the next id follows from the last one."""
    config = run_config.load("tests/train/nano_v3.py")
    config.precision = "bf16"
    ours = _bench_generate.Ours(config, 20, in_fp8=True, drafts=0.8)
    wide = _bench_generate.read_per_token(_bench_generate.Ours(config, 20).weights[0], _axes(config))
    assert 0.5 < ours.bytes_read[1] / wide[1] < 0.6 and ours.bytes_read[0] < wide[0]
    engine = _bench_engine.Engine(ours, 2, 40, n_drafts=1)
    assert engine.title == "the engine, up to 2 requests of 60 tokens, 8 steps and 8 prompts at a time"
    assert engine.acceptance is None and engine.run(2, 40) > 0
    assert engine.floor(2) is None and 0.7 < engine.acceptance < 0.9


@pytest.mark.parametrize("share", [0, 0.3, 0.85, 1])
def test_drafts_are_wrong_after_so_many_ids_that_the_share_of_steps_is_as_asked_for(share):
    is_wrong_V = _bench_engine.wrong_after(share, 5000)
    for token in (0, 7, 8, 100):
        found = []
        while token < 4998:
            found.append(not is_wrong_V[token])
            token += 1 + found[-1]
        assert abs(sum(found) / len(found) - share) < 0.002


def _axes(config):
    return logical_axes(abstract_module(config))[0]


def test_tables_of_experts_are_drawn_as_those_of_a_fresh_router_and_biases_are_zero():
    shape = jax.ShapeDtypeStruct
    params = {"blocks_0": {"router": {"centroids_DE": shape((2, 4, 6), jnp.float32)}}}
    biases = {"blocks_0": {"router": {"experts_VK": shape((2, 50, 3), jnp.int32)}}, "b": shape((6,), jnp.float32)}
    found = _bench_generate.random_biases(params, biases, iter([jax.random.key(0)]))
    assert not found["b"].any()
    table_LVK = found["blocks_0"]["router"]["experts_VK"]
    assert table_LVK.shape == (2, 50, 3) and (jnp.diff(jnp.sort(table_LVK)) > 0).all()
    assert jnp.unique(table_LVK).tolist() == list(range(6)) and (table_LVK[0] != table_LVK[1]).any()


def test_bandwidths_and_arguments():
    assert memory_bandwidth("NVIDIA H200") == 4.8e12 and memory_bandwidth("cpu") is None
    assert memory_bandwidth("NVIDIA L40S") is None  # its peak is known, its memory is not
    with pytest.raises(UserError, match="--batches=1,x: expected numbers"):
        _bench_generate.main(["--batches=1,x"])
    with pytest.raises(UserError, match="--drafts=2.0: expected a number from 0 to 1"):
        _bench_generate.main(["--drafts=2"])
    with pytest.raises(UserError, match="--drafts=0.85: v2_lite has no multi-token prediction"):
        _bench_generate.main(["--config=v2_lite", "--drafts=0.85"])
