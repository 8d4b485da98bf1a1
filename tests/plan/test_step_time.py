"""Time and money: the published figures of V3 and V2, and laws of the model of a step."""

from dataclasses import replace

import pytest

from deepseek_jax.chips import CHIPS
from deepseek_jax.plan import flops
from deepseek_jax.plan.cost import Speed, mfu_of_hours
from deepseek_jax.plan.published import RUNS
from deepseek_jax.plan.recipes import recipe
from deepseek_jax.plan.step_time import mean_times, recomputed_flops, slowest, step
from deepseek_jax.plan.traffic import rank_traffic

AS_PUBLISHED = {"router": False, "mtp": False}
V3 = Speed(19.926, 15_360 * 4096, 2048)


def v3(job_of, **how):
    return job_of("v3_671b", **{"style": "v3", "plan": "dualpipe", "pipe": 16, "data": 2, "expert": 64} | how)


@pytest.mark.parametrize(("causal", "percent"), [(False, 43.73), (True, 38.94)])
def test_v3_has_the_published_utilization_at_the_published_step(subject, causal, percent):
    work = flops.training(subject("v3_671b").network, 4096, causal=causal, **AS_PUBLISHED)
    assert round(100 * V3.mfu(work, CHIPS["h800"]), 2) == percent


def test_v3_takes_the_published_hours_and_days():
    assert round(V3.tokens_per_day / 1e9, 2) == 272.80
    assert round(V3.hours() / 1e3, 1) == 180.2
    assert round(V3.days(), 2) == 3.67
    assert V3.hours(14.8e12) == pytest.approx(2664e3, rel=2e-3)  # the published hours of pre-training


def test_the_published_run_costs_what_was_published():
    hours = sum(hours for _, hours in RUNS["v3_671b"].hours)
    assert (hours, hours * RUNS["v3_671b"].dollars_per_hour) == (2_788_000, 5_576_000)


def test_v2_saves_what_was_published_and_more_operations_than_that(subject):
    hours = [RUNS[name].hours_per_trillion for name in ("v2_236b", "llm_67b")]
    assert round(100 * (hours[0] / hours[1] - 1), 1) == -42.5
    work = [flops.training(subject(name).network, 4096, **AS_PUBLISHED) for name in ("v2_236b", "llm_67b")]
    assert round(100 * (work[0] / work[1] - 1)) == -63
    used = [mfu_of_hours(h, w, CHIPS["h800"]) for h, w in zip(hours, work, strict=True)]
    assert hours[0] / hours[1] == pytest.approx(work[0] / work[1] * used[1] / used[0])


def test_fp8_in_a_run_computes_faster_and_sends_less_to_experts(job_of):
    job = job_of("v3_671b", data=2, expert=64, batch=256)
    options = {"moments_dtype": "bfloat16", "remat": "none"}
    bf16, fp8 = (replace(job, recipe=recipe("run", precision=name, **options)) for name in ("bf16", "fp8"))
    assert 1 < step(bf16).compute / step(fp8).compute < 2  # attention and head do not run in FP8
    assert rank_traffic(bf16, 0).exchange.total > rank_traffic(fp8, 0).exchange.total
    assert rank_traffic(bf16, 0).zero.total > rank_traffic(fp8, 0).zero.total  # it gathers codes


def test_the_efficiency_of_recipe_v3_is_fitted_to_one_step(job_of):
    job = v3(job_of)
    assert step(job, job.recipe.efficiency).total == pytest.approx(19.926, rel=0.01)
    assert step(job, job.recipe.efficiency).bubble == pytest.approx(
        1.09, rel=0.05
    )  # the formula with V3's own operations


def test_the_efficiency_of_recipe_bf16_is_fitted_to_the_hours_of_v2(job_of):
    job = job_of("v2_236b", style="bf16", plan="zb1p", pipe=16, expert=8)
    seconds = step(job, job.recipe.efficiency).total
    assert Speed(seconds, job.layout.tokens_per_step, job.layout.devices).hours() == pytest.approx(172.8e3, rel=0.01)


def test_v3_operations_take_about_what_its_profile_shows(job_of):
    # Published phases over the operations of rank 0: F&B 143.8 ms, W 32 ms; not fitted one by one.
    times = mean_times(v3(job_of), v3(job_of).recipe.efficiency)
    assert times.both == pytest.approx(0.1438, rel=0.02)
    assert times.weights == pytest.approx(0.032, rel=0.2)


def test_no_efficiency_beats_the_roofline(job_of):
    for plan in ("1f1b", "dualpipe"):
        best, real = (step(v3(job_of, plan=plan), efficiency) for efficiency in (1.0, 0.3))
        assert best.total < real.total
        assert best.compute < real.compute


def test_parts_of_a_step_add_up(job_of):
    found = step(v3(job_of))
    assert found.total == found.compute + found.exchange + found.bubble + found.reduce + found.optimizer


def test_overlapping_hides_the_exchange(job_of):
    plain, overlapped = (step(v3(job_of, plan=plan), 0.28) for plan in ("zb1p", "dualpipe"))
    assert overlapped.exchange == 0 < plain.exchange


def test_the_slowest_device_is_named(job_of):
    job = v3(job_of, plan="1f1b")
    rank, found = slowest(job, 0.28)
    assert rank == 15 and found == step(job, 0.28)  # head and multi-token prediction outweigh layers


def test_without_a_pipeline_nobody_waits(job_of):
    assert step(job_of("tiny_v3", data=2)).bubble == 0


def test_twice_the_devices_take_half_the_arithmetic(job_of):
    one, two = (step(job_of("llm_7b", style="bf16", data=n, batch=64)) for n in (8, 16))
    assert two.compute == pytest.approx(one.compute / 2, rel=1e-3)


def test_small_batches_wait_for_the_memory(job_of):
    small = step(job_of("llm_7b", style="bf16", batch=1))
    large = step(job_of("llm_7b", style="bf16", batch=64))
    assert large.compute / 64 <= small.compute
    chip = CHIPS["h800"]
    work = flops.training(job_of("llm_7b").network, 4096) * 64 * 4096 / (chip.bf16 * 1e12)
    assert large.compute >= work  # and what is recomputed comes on top


@pytest.mark.parametrize(("policy", "more"), [("none", 0.0), ("block", 1.0)])
def test_what_a_policy_recomputes(job_of, policy, more):
    job = job_of("tiny_v1", remat=policy)
    found = flops.forward(job.network, 256, causal=True)
    assert recomputed_flops(job) == more * (found.blocks + found.attention)


def test_v3_recomputes_its_up_projections(job_of):
    layers = 61 + 1
    up = 1536 * 128 * 192 + 512 * 128 * (128 + 128)
    assert recomputed_flops(v3(job_of)) == 2 * layers * up


@pytest.mark.parametrize("chip", ["tpu_v5p", "b200"])
def test_faster_chips_are_faster(job_of, chip):
    jobs = [job_of("llm_7b", style="bf16", data=4, batch=64, chip=c) for c in (chip, "h800")]
    times = [step(job).compute for job in jobs]
    rates = [job.chip.bf16 for job in jobs]
    assert (times[0] < times[1]) == (rates[0] > rates[1])


def test_muon_multiplies_in_ten_steps_and_keeps_one_moment(job_of):
    """A matrix of n x n takes 10 x 6 n^3 operations, at half the rate of bfloat16; each device has its share."""
    plain, muon = (job_of("tiny_v3", method=method, data=2) for method in ("adamw", "muon"))
    spared = products = 0.0
    for part in muon.parts[0]:
        if part.weight.role not in ("table", "head", "gain", "bias"):
            short, long = sorted(part.weight.widths)
            n_matrices = part.weight.size / (short * long) * part.optimizer_numbers / part.weight.size
            products += 10 * n_matrices * (4 * short**2 * long + 2 * short**3) / (muon.chip.bf16 / 2 * 1e12)
            spared += part.optimizer_numbers * 2 * 4 / (muon.chip.hbm * 1e9)  # the second moment, read and written
    before, after = (slowest(job, 1.0)[1].optimizer for job in (plain, muon))
    assert after - before == pytest.approx(products - spared, rel=1e-6)
