"""Counts from shapes: the published ones to the printed digit, and what holds for any network."""

import functools
from types import SimpleNamespace

import pytest

from deepseek_jax import run_config
from deepseek_jax.launch._plan import subject_of
from deepseek_jax.models import family
from deepseek_jax.plan.counts import count
from deepseek_jax.plan.network import cache_bytes_per_token, describe
from deepseek_jax.plan.report.published import compared


@functools.cache
def network(name: str):
    config = run_config.load(name)
    module = family(config.family)
    return describe(module, module.Config.from_config(config.model))


def cache_bytes(name: str) -> int:
    config = run_config.load(name)
    module = family(config.family)
    return cache_bytes_per_token(module, module.Config.from_config(config.model))


@functools.cache
def subject(name: str):
    return subject_of(run_config.load(name))


# Billions: total, active per token, active per token without the embedding.
PUBLISHED = {
    "llm_7b": (6.910, 6.910, 6.491),
    "llm_67b": (67.425, 67.425, 66.586),
    "coder_1b3": (1.346, 1.346, 1.280),
    "coder_6b7": (6.741, 6.741, 6.608),
    "coder_33b": (33.343, 33.343, 33.112),
    "moe_16b": (16.376, 2.829, 2.619),
    "v2_lite": (15.706, 2.661, 2.451),
    "v2_236b": (235.741, 21.376, 20.852),
    "v3_671b": (671.026, 37.552, 36.626),
    "r1_0528_qwen3_8b": (8.191, 8.191, 7.568),
    "v4_flash_284b": (284.332, 13.800, 13.270),
    "v4_pro_1t6": (1572.997, 49.779, 48.852),
}
# Sizes that differ from a config of ours, and the counts published for those models.
MOONLIGHT = {"vocab_size": 163_840, "d_model": 2048, "n_layers": 27, "n_dense_layers": 1, "dense_width": 11_264}
MOONLIGHT |= {"n_heads": 16, "q_rank": 0, "n_experts": 64, "n_shared_experts": 2, "expert_width": 1408, "top_k": 6}
MOONLIGHT |= {"n_groups": 1, "top_groups": 1, "mtp_depth": 0}
KIMI_K2 = {"vocab_size": 163_840, "n_dense_layers": 1, "n_heads": 64, "n_experts": 384, "n_groups": 1, "top_groups": 1}
KIMI_K2 |= {"mtp_depth": 0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_counts_come_out(name):
    found = count(network(name))
    billions = (found.total, found.active, found.active_without_embedding)
    assert tuple(round(n / 1e9, 3) for n in billions) == PUBLISHED[name]


def test_multi_token_prediction_of_v3_is_counted_apart():
    found = count(network("v3_671b"))
    assert (found.mtp_total, found.mtp_active) == (11_610_067_968, 688_100_352)
    with_shared_tables = found.mtp_active + found.embedding + found.head
    assert round(with_shared_tables / 1e9, 3) == 2.541
    assert found.router_biases == (58 + 1) * 256
    assert count(network("llm_7b")).mtp_total == 0


@pytest.mark.parametrize(("name", "total"), [("v4_flash_284b", 6.610), ("v4_pro_1t6", 1598.837 - 1572.997)])
def test_multi_token_prediction_of_v4_has_matrices_of_its_own(name, total):
    assert count(network(name)).mtp_total / 1e9 == pytest.approx(total, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("v4_flash_284b", "7.3%"), ("v4_pro_1t6", "10.5%")])
def test_v4s_cache_of_a_million_tokens_beside_v32s(name, share):
    """Entries of 584 bytes, an indexer's keys in FP4, the window and what open blocks need."""
    ours, theirs = subject(name), subject("v32_671b")
    assert f"{ours.fp8_cache_bytes / theirs.fp8_cache_bytes:.1%}" == share
    job = SimpleNamespace(layout=SimpleNamespace(seq_len=4096))
    (row,) = (row for row in compared(ours, job, theirs).rows if row.label == "  in FP8")
    assert row.note.endswith(f" B against 48,068 B: {share} of it")


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("v3_671b", 70_272),
        ("v32_671b", 61 * 2 * (576 + 128)),
        ("v2_236b", 69_120),
        ("v2_lite", 31_104),
        ("llm_7b", 491_520),
        ("llm_67b", 389_120),
    ],
)
def test_bytes_of_the_cache_per_token(name, n_bytes):
    assert cache_bytes(name) == n_bytes


@pytest.mark.parametrize(("name", "n_bytes"), [("v3_671b", 61 * 656), ("v32_671b", 48_068)])
def test_bytes_of_the_cache_in_fp8(name, n_bytes):
    assert subject(name).fp8_cache_bytes == n_bytes


def test_a_model_without_latents_has_no_cache_in_fp8():
    assert subject_of(run_config.load("tiny_v1")).fp8_cache_bytes is None


def changed(name: str, **model):
    config = run_config.load(name)
    config.model.update(model)
    module = family(config.family)
    return describe(module, module.Config.from_config(config.model))


@pytest.mark.parametrize(("sizes", "total", "active"), [(MOONLIGHT, 15.96, 2.24), (KIMI_K2, 1026.41, 32.0)])
def test_counts_of_other_models_of_the_same_network(sizes, total, active):
    """Moonlight says 15.96B and 2.24B, without embedding and head; Kimi K2 1T and 32B."""
    found = count(changed("v3_671b", **sizes))
    assert found.total / 1e9 == pytest.approx(total, abs=0.01)
    shown = found.active_without_embedding - (found.head if total < 100 else 0)
    assert shown / 1e9 == pytest.approx(active, abs=0.01 if total < 100 else 0.5)


def test_a_network_without_experts_is_dense():
    found = count(changed("tiny_v3", n_dense_layers=4, mtp_depth=0))
    assert found.experts == found.router_biases == 0
    assert found.active == found.total
    assert changed("tiny_v3", n_dense_layers=4, mtp_depth=0).n_experts == 1


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_moe", "tiny_v2", "tiny_v2_lite", "tiny_v3", "tiny_v32", "tiny_v4"])
def test_counts_of_any_network(name):
    found = count(network(name))
    assert 0 < found.active <= found.total
    assert found.embedding + found.head + found.experts < found.total
    assert found.mtp_active <= found.mtp_total
    if not found.experts:
        assert found.active == found.total


def test_gains_biases_and_tables_are_not_matrices():
    kinds = {w.name.rpartition(".")[2] for w in network("r1_distill_qwen_1b5").weights if not w.is_matrix}
    assert kinds == {"table_VD", "gain", "q_bias_HQ", "k_bias_ZQ", "v_bias_ZU"}


def test_what_goes_into_a_matrix_and_comes_out():
    widths = {w.name: w.widths for w in network("v3_671b").weights if w.is_matrix}
    assert widths["moe_blocks.attention.q_up_RHQ"] == (1536, 128 * 192)
    assert widths["moe_blocks.attention.out_HUD"] == (128 * 128, 7168)
    assert widths["moe_blocks.experts.gate_XDF"] == (7168, 2048)
    assert widths["moe_blocks.experts.down_XFD"] == (2048, 7168)
    assert widths["head.weight_DV"] == (7168, 129_280)
    assert widths["mtp.0.join_YD"] == (2 * 7168, 7168)
