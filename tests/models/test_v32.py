"""DeepSeek-V3.2 as a function: its ways of running agree beyond top_k, V3 is its limit, and its losses stay apart."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind, split
from deepseek_jax.models import family
from deepseek_jax.rl.grpo import GRPO
from deepseek_jax.rl.objective import Answers, PolicyGradient
from deepseek_jax.train.loss import Totals, losses

B, T, SLOTS, TOP_K = 2, 14, 16, 5
INDEXER = {"index_heads": 3, "index_width": 8, "index_top_k": TOP_K, "index_dense": False}
TWO_LAYERS = {"n_layers": 2, "n_dense_layers": 0, "mtp_depth": 0}


def sizes_of(tiny_sizes, **changed):
    m = tiny_sizes.copy_and_resolve_references()
    m.update(INDEXER | TWO_LAYERS | changed)
    return family("v32").Config.from_config(m)


def made(sizes, filled) -> tuple:
    return filled(lambda: family("v32").Model(sizes, rngs=nnx.Rngs(0)), std=0.15)


@pytest.fixture(scope="module")
def model(tiny_sizes, filled) -> tuple:
    return made(sizes_of(tiny_sizes), filled)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 64, (B, T + 1)).astype(np.int32)


def logits_of(model, ids_BT):
    definition, params, bias = model
    return np.asarray(jax.jit(lambda p, ids_BT: bind(definition, p, bias)(ids_BT))(params, ids_BT))


@pytest.fixture(scope="module")
def logits(model, ids) -> np.ndarray:
    return logits_of(model, ids[:, :-1])


@pytest.fixture(scope="module")
def prefilled(model, ids) -> tuple:
    definition, params, bias = model

    @jax.jit
    def run(params, ids_BT):
        m = bind(definition, params, bias)
        h_BTD, cache = m.prefill(ids_BT, SLOTS)
        return m.head(h_BTD), cache

    return jax.device_get(run(params, ids[:, :-1]))


def with_a_strangers(cache, start: int):
    """The cache with other numbers from `start` on, which must be overwritten before they are seen."""
    cache = jax.tree.map(np.array, cache)
    for part in jax.tree.leaves(cache):
        part[:, :, start:] = 50.0
    return cache


def test_prefill_is_the_full_forward(prefilled, logits):
    np.testing.assert_allclose(prefilled[0], logits, atol=1e-5)
    assert [a.shape[-1] for a in prefilled[1]["moe_blocks"]] == [16, 8, INDEXER["index_width"]]


@pytest.mark.parametrize("at_once", [1, 3])
def test_decode_is_the_full_forward(model, prefilled, logits, ids, at_once):
    definition, params, bias = model
    run = jax.jit(lambda p, *given: bind(definition, p, bias).decode(*given))
    cache = with_a_strangers(prefilled[1], 2)
    for at in range(2, T, at_once):  # from before top_k positions to far beyond
        positions_BT = np.broadcast_to(np.arange(at, at + at_once, dtype=np.int32), (B, at_once))
        got, cache = run(params, ids[:, at : at + at_once], positions_BT, cache)
        np.testing.assert_allclose(got, logits[:, at : at + at_once], atol=1e-5)


def test_a_prompt_read_in_parts_is_the_full_forward(model, prefilled, logits, ids):
    definition, params, bias = model

    @jax.jit
    def extend(params, ids_BT, start, cache):
        m = bind(definition, params, bias)
        h_BTD, cache = m.extend(ids_BT, start, cache)
        return m.head(h_BTD), cache

    start = T // 2
    got, _ = extend(params, ids[:, start:T], start, with_a_strangers(prefilled[1], start))
    np.testing.assert_allclose(got, logits[:, start:], atol=1e-5)


def test_no_logit_depends_on_a_later_token(model, logits, ids):
    other = ids[:, :-1].copy()
    other[:, 8] = (other[:, 8] + 1) % 64
    after = logits_of(model, other)
    np.testing.assert_array_equal(after[:, :8], logits[:, :8])
    assert np.abs(after[:, 8] - logits[:, 8]).max() > 1e-4


def test_where_all_are_chosen_it_is_v3_bit_for_bit(tiny_sizes, filled, model, logits, ids):
    _, params, bias = model
    given = ids[:, :-1]
    m = tiny_sizes.copy_and_resolve_references()
    m.update(TWO_LAYERS)
    plain = split(nnx.eval_shape(lambda: family("v3").Model(family("v3").Config.from_config(m), rngs=nnx.Rngs(0))))
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    own = jax.tree_util.tree_map_with_path(lambda path, _: flat[jax.tree_util.keystr(path)], plain[1])
    dense = logits_of((plain[0], own, bias), given)
    for changed in ({"index_top_k": T}, {"index_dense": True}):
        definition = made(sizes_of(tiny_sizes, **changed), filled)[0]
        np.testing.assert_array_equal(logits_of((definition, params, bias), given), dense)
    np.testing.assert_array_equal(logits[:, 0], dense[:, 0])
    assert np.abs(logits[:, TOP_K:] - dense[:, TOP_K:]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("is_dense", [False, True], ids=["sparse", "warm-up"])
def test_the_two_losses_reach_weights_of_their_own(tiny_sizes, filled, ids, is_dense):
    """The language model's loss is there whatever the indexer does, and reaches all but it; the KL reaches it alone."""
    sizes = sizes_of(tiny_sizes, index_dense=is_dense, n_layers=1, mtp_depth=1)
    definition, params, bias = made(sizes, filled)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones_like(positions)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))

    def run(params, lm_and_kl):
        m = bind(definition, params, bias)
        found = losses(m, batch, Totals(B * T, B), chunk=8, mask=False)
        weights = {"expert_balance": 0.1 * lm_and_kl[0], "index_kl": lm_and_kl[1], "index_recall": 0.0}
        rest = found.weighted(0.3, weights) - found.main - 0.3 * found.mtp
        return lm_and_kl[0] * (found.main + 0.3 * found.mtp) + rest, found

    run = jax.jit(jax.grad(run, has_aux=True))
    for number, share in enumerate(np.eye(2, dtype=np.float32)):
        gradients, found = jax.device_get(run(params, share))
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            name = jax.tree_util.keystr(path)
            assert np.any(gradient) == (("indexer" in name) == bool(number)), name
    assert float(found.main) > 3 and float(found.mtp) > 3
    assert found.auxiliary.keys() == {"expert_balance", "index_kl", "index_recall"}
    assert 0.3 < float(found.auxiliary["index_recall"]) < 0.99 and float(found.auxiliary["index_kl"]) > 0.01


def test_recall_is_reported_where_there_is_a_choice(tiny_sizes, filled, ids):
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = Batch(ids[:, :-1], ids[:, 1:], positions + 1, positions, np.ones((B, T), np.float32))
    for top_k in (T - 1, T):
        definition, params, bias = made(sizes_of(tiny_sizes, index_top_k=top_k, n_layers=1), filled)

        def run(params, definition=definition, bias=bias):
            return losses(bind(definition, params, bias), batch, Totals(B * T, B), chunk=8, mask=False).auxiliary

        assert ("index_recall" in jax.eval_shape(run, params)) == (top_k < T)


def test_in_reinforcement_learning_the_indexer_learns_by_its_own_loss(tiny_sizes, filled, ids):
    """Without advantages nothing else has a gradient."""
    sizes = sizes_of(tiny_sizes, n_layers=1, n_dense_layers=1)
    definition, params, bias = made(sizes, filled)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones, none = np.ones((B, T), np.int32), np.zeros((B, T), np.float32)
    known = dict(weights_BT=none, share_BT=none, sampled_logp_BT=none, old_logp_BT=none, reference_logp_BT=none)
    known |= dict(measured_B1=np.zeros((B, 1), bool), advantage_BT=none, kept_BTV=np.zeros((B, T, 0), np.uint8))
    given = Answers(ids[:, :-1], ids[:, 1:], ones, positions, routes={}, **known)
    grpo = GRPO(**run_config.load("tiny_zero").rl.grpo)
    weights = {"expert_balance": 0.1, "index_kl": 2.0, "index_recall": 0.0}  # the first is pre-training's alone
    objective = PolicyGradient(grpo, 1.0, 8, weights)
    run = jax.jit(jax.grad(lambda p: objective(bind(definition, p, bias), given, Totals(B, B), 0), has_aux=True))
    gradients, found = jax.device_get(run(params))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.any(gradient) == ("indexer" in name), name
    assert float(found.auxiliary["index_kl"]) > 0.01 and "expert_balance" not in found.auxiliary


def test_the_released_indexer_has_13_959_424_parameters_per_layer():
    _, params, _ = split(abstract_module(run_config.load("v32_671b")))
    indexer = params["moe_blocks"]["attention"]["indexer"]
    assert sum(leaf.size for leaf in jax.tree.leaves(indexer)) == 58 * 13_959_424


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("q_rank", 0, "latent of the queries"), ("index_width", 4, "numbers of the indexer's heads that are rotated")],
)
def test_sizes_that_make_no_indexer_are_refused(tiny_sizes, key, value, message):
    with pytest.raises(UserError, match=message):
        sizes_of(tiny_sizes, **{key: value})


def test_sizes_are_those_of_v3_and_the_indexers():
    v3, v32 = ({field.name for field in dataclasses.fields(family(name).Config)} for name in ("v3", "v32"))
    assert v32 - v3 == {"indexer", "index_dense"} and v3 < v32
