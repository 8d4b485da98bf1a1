"""Buffers of a run's pipeline: stages grow layer by layer, slots follow the schedule, ranks hold the same."""

import math
from collections import Counter

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from deepseek_jax.layers.base import Execution
from deepseek_jax.parallel.mesh import ALL
from deepseek_jax.parallel.split_backward import SAVEABLE
from deepseek_jax.plan.memory import rank_memory
from deepseek_jax.plan.network import abstract_model
from deepseek_jax.plan.stage_buffers import divided, growth, slot_bytes, slots

MESH, RULES = AbstractMesh((1, 1, 1, 1), ALL), {"experts": "expert"}


def n_bytes(arrays) -> int:
    return sum(n * math.prod(shape) * dtype.itemsize for (shape, dtype), n in arrays.items())


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_stage_of_three_layers_has_what_one_has_and_two_more(subject, remat):
    it, run = subject("tiny_v3"), Execution(unroll=0)
    blocks, shape = abstract_model(it.module, it.sizes, run).moe_blocks, (1, 64, it.sizes.d_model)
    grown = growth(blocks, run, shape, RULES, MESH, SAVEABLE[remat])
    three = divided(blocks, 3, run, shape, RULES, MESH, SAVEABLE[remat])
    for pool, (one, more) in grown.items():
        counted = {kind: one[kind] + 2 * more[kind] for kind in {*one, *more}}
        assert n_bytes(three[pool]) == n_bytes(counted)
        of_tokens = {kind: n for kind, n in counted.items() if len(kind[0]) > 2}
        assert {
            kind: three[pool][kind] for kind in of_tokens
        } == of_tokens  # gradients of gains [layers, width] grow with it


def test_a_slot_holds_what_any_stage_needs_by_hand():
    wide, narrow = ((2, 8), jnp.dtype("float32")), ((2, 4), jnp.dtype("bfloat16"))
    one = {"stash": (Counter({wide: 1}), Counter({wide: 1}))}
    other = {"stash": (Counter({narrow: 3, wide: 1}), Counter({narrow: 2}))}
    stages = [(("a", 3),), (("b", 2),), ()]
    # a: 3 wide; b: 5 narrow, 1 wide; a slot has the larger number of each
    assert slot_bytes("stash", stages, {"a": one, "b": other}) == 3 * 64 + 5 * 16


def test_only_schedules_that_put_off_w_have_slots_for_it():
    assert slots("1f1b", 4, 8) == {"x": 2, "dy": 2, "early": 5, "late": 5, "stash": 0, "d_out": 2}
    assert slots("zb1p", 4, 8)["stash"] > 1 and slots("dualpipe", 4, 8)["stash"] > 1
    assert slots("dualpipe", 4, 8, put_off=0)["stash"] == 0


@pytest.mark.slow
def test_a_run_keeps_its_buffers_on_every_rank(job_of, kept_of):
    job = job_of("tiny_v3", pipe=4, batch=8, micro_batches=8, remat="block")
    kept = kept_of("tiny_v3", job)
    found = [rank_memory(job, rank, kept, 2048) for rank in range(4)]
    assert len({parts["buffers"] for parts in found}) == 1 and not any("activations" in parts for parts in found)
    stream = 256 * job.network.d_model * 4
    assert found[0]["buffers"] >= (2 + 2 + 5) * stream
