"""Traffic: V3's exchange and reductions by hand, and laws."""

from dataclasses import replace

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.plan.traffic import Sent, exchange, rank_traffic


def v3(job_of, **how):
    return job_of("v3_671b", **{"style": "v3", "plan": "dualpipe", "pipe": 16, "data": 2, "expert": 64} | how)


def test_a_token_of_v3_crosses_the_network_once_per_node(job_of):
    sent = exchange(v3(job_of))
    copy = 7168 * (1 + 4 / 128) + 7168 * 2  # FP8 with a scale for 128 out, bfloat16 back: 21.7 kB
    assert round(copy / 1e3, 1) == 21.7
    assert sent.network == 4 * 7 / 8 * copy  # 4 of 8 nodes, one of which may be its own
    assert sent.fast == 8 * 7 / 8 * copy


def test_without_the_limit_each_copy_crosses_by_itself(job_of):
    limited, plain = (exchange(v3(job_of, style=style)) for style in ("bf16", "run"))
    assert plain.network > 1.5 * limited.network


def test_a_run_in_two_hops_sends_less_over_the_network(job_of):
    """Rows of float32 there and back with 8 experts and factors beside, padded; 8 nodes of 8 devices."""
    direct, grouped = (replace(v3(job_of, style="run"), groups=groups) for groups in (1, 8))
    row = (7168 * (direct.recipe.dispatch + direct.recipe.combine) + 8 * 8) * 1.25
    assert exchange(direct) == Sent(8 * 7 / 64 * row, 8 * 56 / 64 * row)
    assert exchange(grouped) == Sent(8 * 7 / 8 * row, 4 * 7 / 8 * row)
    over_both = exchange(replace(direct, groups=4))  # of 16 devices on two nodes
    # four of the eight groups of experts can lie on all four groups of devices
    assert over_both == Sent(8 * 7 / 16 * row, (4 * 3 / 4 + 8 * 8 / 16) * row)
    with pytest.raises(UserError, match="exchange.groups=3"):
        exchange(replace(direct, groups=3))


def test_a_pipeline_that_keeps_everything_repeats_no_exchange(job_of):
    kept, again = (v3(job_of, style="run", remat=remat) for remat in ("none", "block"))
    assert rank_traffic(again, 8).exchange.total == pytest.approx(1.5 * rank_traffic(kept, 8).exchange.total)


def test_v2_sends_a_token_to_three_devices_at_most(job_of):
    sent = exchange(job_of("v2_236b", style="bf16", expert=8, batch=9216))
    assert (sent.network, sent.fast) == (0, 3 * 7 / 8 * 5120 * 4)


def test_a_step_of_v3_by_hand(job_of):
    found = rank_traffic(v3(job_of), 8)  # two stages of four MoE layers
    assert found.exchange.network == pytest.approx(120 * 4096 * 4 * 2 * exchange(v3(job_of)).network)
    assert found.pipeline.network == 120 * 4096 * 2 * 7168 * 2
    assert found.fsdp.total == 0


def test_one_device_sends_nothing(job_of):
    assert rank_traffic(job_of("tiny_v3"), 0).total == 0


def test_zero_sends_every_gradient_and_weight_once(job_of):
    job = job_of("tiny_v1", data=8)
    numbers = sum(w.size for w in job.network.weights)
    assert rank_traffic(job, 0).zero == Sent(fast=7 / 8 * numbers * (4 + 4))


def test_stored_in_shards_weights_travel_for_each_micro_batch(job_of):
    def fsdp(micro_batches: int) -> float:
        job = job_of("tiny_v1", data=2, sharding={"embed": "data"}, micro_batches=micro_batches)
        return rank_traffic(job, 0).fsdp.total

    assert fsdp(2) == 2 * fsdp(1) > 0


def test_links_work_at_the_same_time(job_of):
    chip = job_of("tiny_v1").chip
    assert Sent(fast=200e9, network=100e9).seconds(chip) == 2.0
