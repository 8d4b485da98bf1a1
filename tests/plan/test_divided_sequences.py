"""V3.2 and V4 over divided sequences, by hand: queries meet what was gathered as it is; V3 makes keys and values."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh

from deepseek_jax.layers.base import Execution
from deepseek_jax.layers.sparse_mla import SparseMLA
from deepseek_jax.parallel.context import Context
from deepseek_jax.parallel.mesh import ALL
from deepseek_jax.plan.activations import ActivationBytes, residual_bytes
from deepseek_jax.plan.flops import pair_flops
from deepseek_jax.plan.memory import rank_memory
from deepseek_jax.plan.network import abstract_model
from deepseek_jax.plan.recipes import recipe
from deepseek_jax.plan.step_time import stage_compute
from deepseek_jax.plan.traffic import rank_traffic

N = 8  # devices of a sequence
H, C, P, HEAD, INDEX = 128, 512, 64, 128, 128  # heads; widths: latent, rotary key, head without position, index
NOTHING = {name: ActivationBytes(0, 0) for name in ("dense_blocks", "moe_blocks")}


@pytest.fixture(scope="module")
def divided(job_of):
    """A job with one sequence of 4,096 tokens over N devices."""

    def job(name="v32_671b", *, remat="none", precision="bf16"):
        job = job_of(name, context=N, batch=1)
        return replace(job, recipe=recipe("run", precision=precision, moments_dtype="float32", remat=remat))

    return job


def test_only_where_there_is_a_choice_are_latents_gathered(divided):
    sparse, expanded = divided(), divided("v3_671b")
    short = replace(sparse, layout=replace(sparse.layout, seq_len=2048))
    whole = replace(sparse, layout=replace(sparse.layout, context=1))
    assert [job.is_absorbed for job in (sparse, short, whole, expanded)] == [True, False, False, False]
    in_warmup = [SparseMLA.gathers_chosen.fget(SimpleNamespace(is_dense=is_dense)) for is_dense in (False, True)]
    assert in_warmup == [True, False]


def test_pairs_are_those_of_a_cache_and_nothing_is_expanded(divided):
    """2 H (2 C + P) per pair; W^UK and W^UV once, in bfloat16 in FP8 training too."""
    job = divided(precision="fp8")
    keys, tokens, rate = 4096 / 2 - 2048**2 / (2 * 4096), 4096 / N, job.chip.bf16 * 1e12
    layers = 61 + job.network.mtp_depth
    per_token = 2 * H * (2 * C + P) * keys + 2 * 64 * INDEX * 4096 / 2
    found = stage_compute(job, 0, 1.0)
    assert found.pairs == pytest.approx(layers * per_token * tokens / rate)
    assert per_token > 2 * pair_flops(job.network, 4096, causal=True)  # more than what a single device computes

    fewer = replace(job, layout=replace(job.layout, context=1, seq_len=512))  # as many tokens, expanded, in FP8
    numbers = C * H * HEAD

    def seconds(rows: float, width: int, per_second: float, n_bytes: float) -> float:
        moved = (numbers + rows * width) * n_bytes
        return 2 * layers * max(2 * numbers * rows / per_second, moved / (job.chip.hbm * 1e9))

    absorbed = seconds(tokens, H * HEAD + H * C, rate, job.recipe.activations)
    expanded = seconds(tokens, C + H * HEAD, job.chip.fp8 * 1e12, 1)
    assert found.matmuls - stage_compute(fewer, 0, 1.0).matmuls == pytest.approx(absorbed - expanded)
    assert found.recomputed == pytest.approx(found.pairs)  # sequences are long; of the matrices nothing


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 2), ("block", 2)])
def test_entries_are_gathered_once_and_gradients_are_as_wide_as_activations(divided, remat, times):
    job = divided(remat=remat)
    layers = 61 + job.network.mtp_depth
    entries = (C + P + INDEX) * (times + 1) * job.recipe.activations
    assert rank_traffic(job, 0).context.total == layers * 4096 / N * (N - 1) * entries


def test_gathered_entries_are_counted_once(divided, job_of):
    """Among activations where these are traced, and by V3's rule beside them."""
    for name, is_beside in (("v32_671b", False), ("v3_671b", True)):
        assert ("gathered_entries" in rank_memory(divided(name), 0, NOTHING, 2048)) == is_beside
    by_rule = job_of("v32_671b", context=N, batch=1, style="v3")
    whole = 4096 * (C + P + INDEX) * 2 * by_rule.recipe.activations
    assert rank_memory(by_rule, 0, NOTHING, 2048)["gathered_entries"] == whole


def test_v4_gathers_keys_and_what_compressors_read_and_expands_nothing(divided):
    """Key 512; two numbers in float32 per channel: 1,024 and 256 of CSA, whose blocks overlap, 512 of HCA."""
    job, layers = divided("v4_flash_284b"), {0: 2, 4: 21, 128: 20}
    wide = {0: 0, 4: 2 * (2 * 512 + 2 * INDEX), 128: 2 * 512}
    per_layer = sum(n * (512 * 2 + 4 * wide[ratio]) for ratio, n in layers.items()) / 43
    assert job.gathered_bytes == pytest.approx(per_layer)
    assert rank_traffic(job, 0).context.total == pytest.approx(44 * 4096 / N * (N - 1) * 2 * per_layer)
    assert "gathered_entries" not in rank_memory(job, 0, dict.fromkeys(job.network.groups, ActivationBytes(0, 0)), 2048)
    whole = replace(job, layout=replace(job.layout, context=1, seq_len=4096))
    shares = [stage_compute(job, 0, 1.0).pairs, stage_compute(whole, 0, 1.0).pairs / N]
    assert shares[0] == pytest.approx(shares[1])


@pytest.mark.slow
def test_what_a_layer_keeps_includes_the_whole_sequence(subject):
    """For as many tokens on a device, more where the sequence is longer, by its entries at least (float32)."""
    it, kept = subject("tiny_v32"), []
    for n in (2, 4):
        run, mesh = Execution(context=Context(n)), AbstractMesh((1, 1, n, 1), ALL)
        blocks = abstract_model(it.module, it.sizes, run).dense_blocks
        kept.append(residual_bytes(blocks, run, (1, 64, it.sizes.d_model), {}, mesh))
    assert kept[1] - kept[0] >= 2 * 64 * it.network.entries * 4
