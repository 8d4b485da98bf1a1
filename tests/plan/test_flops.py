"""Operations per token: the published figures, the formula written out once more, and one case by hand."""

from dataclasses import replace

import jax
import pytest
from jax.interpreters import partial_eval

from deepseek_jax import run, run_config
from deepseek_jax.layers.base import SINGLE_DEVICE, bind, split
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan.flops import forward, keys_seen, next_token, pair_flops, reading_flops, training
from deepseek_jax.plan.network import INDEXER, Reading, abstract_model, describe
from deepseek_jax.tree import dotted


def network(name: str, **model):
    config = run_config.load(name)
    config.model.update(model)
    module = family(config.family)
    return describe(module, module.Config.from_config(config.model))


def written_out(m, seq_len: float) -> float:
    """V3's training operations per token: causal attention, routers and multi-token prediction included."""
    width = m.nope_width + m.rope_width
    attention = m.d_model * m.q_rank + m.q_rank * m.n_heads * width + m.d_model * (m.kv_rank + m.rope_width)
    attention += m.n_heads * (m.kv_rank * (m.nope_width + m.value_width) + m.value_width * m.d_model)
    attention += m.n_heads * (width + m.value_width) * seq_len / 2
    moe = attention + m.d_model * m.n_experts + 3 * m.d_model * m.expert_width * (m.top_k + m.n_shared_experts)
    dense = attention + 3 * m.d_model * m.dense_width
    head = m.d_model * m.vocab_size
    main = m.n_dense_layers * dense + (m.n_layers - m.n_dense_layers) * moe + head
    return 3 * 2 * (main + m.mtp_depth * (moe + 2 * m.d_model**2 + head))


def test_v3_has_the_published_operations_per_token():
    v3 = network("v3_671b")
    published = {"router": False, "mtp": False}
    assert round(training(v3, 4096, causal=False, **published) / 1e9, 1) == 280.5
    assert round(training(v3, 4096, causal=True, **published) / 1e9, 1) == 249.8


@pytest.mark.parametrize("name", ["v3_671b", "tiny_v3", "micro_v3"])
@pytest.mark.parametrize("seq_len", [256, 4096])
def test_the_shapes_give_what_the_formula_says(name, seq_len):
    assert training(network(name), seq_len) == written_out(run_config.load(name).model, seq_len)


@pytest.mark.parametrize("changed", [{"n_dense_layers": 0}, {"n_shared_experts": 0}, {"n_dense_layers": 4}], ids=str)
def test_shapes_of_other_releases_give_what_the_formula_says(changed):
    m = run_config.load("tiny_v3").model
    m.update(changed)
    assert training(network("tiny_v3", **changed), 256) == written_out(m, 256)


def test_the_training_log_counts_causally_and_with_multi_token_prediction():
    config = run_config.load("tiny_v3")
    trainer = run.trainer(config, make_mesh(devices=jax.devices()[:1]))
    assert trainer.flops_per_token(256) == written_out(config.model, 256)


def test_the_parts_add_up():
    found = forward(network("tiny_v3"), 256, causal=True)
    everything = found.blocks + found.head + found.attention + found.router + found.mtp + found.mtp_router
    assert found.total(router=True, mtp=True) == everything
    assert found.total(router=False, mtp=False) == found.blocks + found.head + found.attention


def test_a_dense_model_by_hand():
    # 2 layers of width 4: q, k, v, out 16 each, feed-forward 3 x 4 x 8; head 4 x 10; attention 2 heads of width 2.
    sizes = {"vocab_size": 10, "d_model": 4, "n_layers": 2, "dense_width": 8}
    sizes |= {"n_heads": 2, "n_kv_heads": 2, "head_width": 2}
    found = forward(network("tiny_v1", **sizes), 6, causal=True)
    assert found.blocks == 2 * 2 * (4 * 16 + 96)
    assert found.head == 2 * 40
    assert found.attention == 2 * (2 * 2 * (2 + 2)) * 3
    assert (found.router, found.mtp) == (0, 0)


def test_attention_in_full_sees_twice_the_keys():
    assert keys_seen(4096, causal=False) == 2 * keys_seen(4096, causal=True)
    tiny = network("tiny_v2")
    full, causal = (forward(tiny, 256, causal=c) for c in (False, True))
    assert full.attention == 2 * causal.attention
    assert full.blocks == causal.blocks


def test_v32s_new_token_costs_at_a_million_tokens_what_is_published():
    """2 per weight, 2 H (2 C + P) per position attended to, 2 J Q of the indexer per position: 1.16 against 17.9e12."""
    v32 = network("v32_671b")
    sparse, dense = (next_token(v32, 2**20, dense=dense) for dense in (False, True))
    assert (f"{sparse / 1e12:.2f}", f"{dense / 1e12:.1f}") == ("1.16", "17.9")
    assert dense == next_token(network("v3_671b"), 2**20)
    per_layer = (sparse - next_token(v32, 0)) / 61
    assert per_layer == 2 * 128 * (2 * 512 + 64) * 2048 + 2 * 64 * 128 * 2**20


@pytest.mark.parametrize(("name", "trillions"), [("v4_flash_284b", "0.140"), ("v4_pro_1t6", "0.303")])
def test_v4s_new_token_costs_at_a_million_tokens_what_is_published(name, trillions):
    """The report says 10% and 27% of V3.2's 1.16; it counts operations in FP4 as less."""
    assert f"{next_token(network(name), 2**20) / 1e12:.3f}" == trillions


def test_keys_of_several_tokens_are_fewer_and_a_window_comes_beside():
    """By hand, of 8 tokens in full: a window of 3; and entries of 4 and 2 tokens, of which 1 is chosen."""
    layers = [
        Reading(flops_per_pair=5, flops_per_slot=7, most_keys=most, flops_per_index=index, tokens_per_key=m, window=3)
        for most, index, m in ((0, 0, 1), (None, 0, 4), (1, 11, 2))
    ]
    found = [reading_flops(reading, 8, causal=False) for reading in layers]
    assert found == [5 * 3, 5 * (3 + 2), 5 * (3 + 1) + 11 * 4]


@pytest.mark.parametrize("causal", [True, False])
def test_an_indexer_bounds_the_keys_that_are_seen(causal):
    """By hand, of 6 tokens that attend to 2: causally half a key and one and a half, then 2 each."""
    tiny = network("tiny_v32", index_top_k=2)
    keys = (0.5 + 1.5 + 4 * 2) / 6 if causal else 2
    (reading,) = tiny.layers
    expected = reading.flops_per_pair * keys + 2 * 4 * 32 * (3 if causal else 6)
    assert pair_flops(tiny, 6, causal=causal) == pytest.approx(expected)
    assert pair_flops(network("tiny_v32"), 64, causal=causal) == pair_flops(
        network("tiny_v3"), 64, causal=causal
    ) + 256 * (32 if causal else 64)


@pytest.mark.parametrize("rests", [True, False])
def test_an_indexer_that_no_step_reads_costs_nothing(subject, rests):
    """The weights that the traced layers do not read, losses included, are those that count for nothing."""
    it = subject("tiny_v4_dense")
    assert it.network.index_rests
    network = it.network if rests else describe(it.module, it.sizes)
    definition, params, biases = split(abstract_model(it.module, it.sizes, replace(SINGLE_DEVICE, index_rests=rests)))

    def layers(params, biases, ids_BT):
        model, tokens = bind(definition, params, biases), Tokens.of(ids_BT)
        return model.run_blocks(model.begin(model.embed(tokens)), tokens)

    traced = jax.make_jaxpr(layers)(params, biases, jax.ShapeDtypeStruct((1, 32), "int32")).jaxpr
    _, is_read = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    names = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unread = {name for name, read in zip(names, is_read, strict=False) if not read and ".blocks." in name}
    assert unread == {w.name for w in network.weights if w.is_idle}
    assert bool(unread) == rests and all(INDEXER in name for name in unread)
    if rests:  # as the training log counts
        logged = run.trainer(it.config, make_mesh(devices=jax.devices()[:1])).flops_per_token(256)
        assert logged == training(network, 256) < training(describe(it.module, it.sizes), 256)


@pytest.mark.parametrize(("name", "rests"), [("v4_dense", True), ("v4_warmup", False)])
def test_stages_of_v4_count_an_indexer_from_its_warm_up_on(name, rests):
    """By hand: 2 per number of its matrices, 2 J Q per entry of 4 tokens, causally half of these; three times."""
    config = run_config.load(name)
    found, seq_len, n_layers = run.network_of(config), config.data.seq_len, 21
    index = sum(2 * w.size for w in network(name).weights if INDEXER in w.name and w.is_matrix)
    index += n_layers * 2 * 64 * 128 * seq_len / 8
    assert training(network(name), seq_len) - training(found, seq_len) == 3 * index * rests
