"""Laws of V4's network on a small twin: its stacks, causality, what learns; decoding is in `test_v4_lengths.py`."""

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind, split
from deepseek_jax.layers.decoder import stacks_of
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import v4
from deepseek_jax.train.loss import Totals, losses
from deepseek_jax.train.step import moved_biases
from deepseek_jax.tree import paths

B, T, V, E, K = 2, 24, 64, 6, 2
CHANGED = {"vocab_size": V, "d_model": 32, "n_layers": 3, "compress_ratios": (0, 4, 8, 0), "head_width": 16}
CHANGED |= {"rope_width": 8, "q_rank": 16, "out_rank": 8, "window": 6, "index_width": 8, "index_top_k": 3}
CHANGED |= {"n_experts": E, "expert_width": 16, "top_k": K, "n_streams": 2, "sinkhorn_steps": 2}


def sizes(**changed):
    config = run_config.load("tiny_v4")
    config.model.update(CHANGED | changed)
    return v4.Config.from_config(config.model)


@pytest.fixture(scope="module")
def model(filled):
    """(definition, weights, router biases), with a table of experts."""
    definition, params, biases = filled(lambda: v4.Model(sizes(), rngs=nnx.Rngs(0)), std=0.15)
    drawn = np.random.default_rng(2).random((1, V, E)).argsort(-1)[..., :K]
    biases["blocks_0"]["experts"]["router"]["experts_VK"] = np.int32(drawn)
    return definition, params, biases


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, V, (B, T + 1)).astype(np.int32)


@pytest.fixture(scope="module")
def run(model):
    """ids -> (logits, those of multi-token prediction), compiled once."""
    definition, params, biases = model

    @jax.jit
    def both(params, ids_BT):
        found, tokens = bind(definition, params, biases), Tokens.of(ids_BT[:, :-1])
        x_BTOD, _ = found.run_blocks(found.begin(found.embed(tokens)), tokens)
        h_BTD = found.finish(x_BTOD)
        (depth,) = found.mtp_depths(found.ahead_of(x_BTOD, h_BTD), ids_BT[:, 1:], tokens)
        return found.head(h_BTD), found.head(depth.h_BTD)

    return lambda ids_BT: jax.device_get(both(params, ids_BT))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v4_flash_284b", [("blocks_0", 1, 2), ("blocks_2", 1, 1), ("blocks_3", 2, 20)]),
        ("v4_pro_1t6", [("blocks_0", 1, 2), ("blocks_2", 1, 1), ("blocks_3", 2, 29)]),
        ("tiny_v4", [("blocks_0", 1, 1), ("blocks_1", 2, 2)]),
    ],
)
def test_layers_run_as_few_stacks_in_the_released_order(name, expected):
    c = v4.Config.from_config(run_config.load(name).model)
    stacks = stacks_of(c.kinds[: c.n_layers], lambda kind: kind)
    assert [(stack.name, len(stack.builds), stack.repeats) for stack in stacks] == expected
    again = [kind for stack in stacks for kind in stack.builds * stack.repeats]
    assert again == c.kinds[: c.n_layers] and len(again) == c.n_layers
    assert [kind.is_hashed for kind in c.kinds[: c.n_layers]] == [n < c.n_hash_layers for n in range(c.n_layers)]
    assert c.kinds[c.n_layers :] == [v4.Kind(0, False)]


def test_stacks_cover_any_order_of_layers():
    for kinds in ("a", "ab", "abab", "aab", "abcabcab", "aabbaabb", "abcd", "aaaa"):
        stacks = stacks_of(list(kinds), lambda kind: kind)
        assert "".join("".join(stack.builds) * stack.repeats for stack in stacks) == kinds
    assert [len(s.builds) * s.repeats for s in stacks_of(list("xabababy"), lambda kind: kind)] == [1, 6, 1]


def test_no_logit_depends_on_a_later_token_nor_prediction_on_one_after_the_next(run, ids):
    before = run(ids)
    for changed in (7, 8, 12):  # the ends of blocks of 4 and 8 tokens, and a token within
        other = ids.copy()
        other[:, changed] = (other[:, changed] + 1) % V
        for at, was, now in zip((changed, changed - 1), before, run(other), strict=True):
            np.testing.assert_array_equal(was[:, :at], now[:, :at])
            assert np.abs(was[:, at] - now[:, at]).max() > 1e-4


@pytest.mark.slow
def test_every_weight_learns_and_tables_stay(model, ids):
    definition, params, biases = model
    ones = np.ones((B, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))

    def loss(params):
        found = losses(bind(definition, params, biases), batch, Totals(B * T, B), chunk=8, mask=True)
        return found.weighted(0.3, dict.fromkeys(found.auxiliary, 0.1)), found

    gradients, found = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    silent = [path for path, gradient in paths(gradients).items() if not np.any(gradient)]
    assert not silent
    assert set(found.auxiliary) == {"expert_balance", "index_kl", "index_recall"}
    assert {name: np.sum(load) for name, load in found.loads.items() if name != "mtp"} == dict.fromkeys(
        ("blocks_0", "blocks_1", "blocks_2"), B * T * K
    )
    moved = jax.device_get(jax.jit(moved_biases)(biases, found.loads, np.float32(0.5)))
    for path, bias in paths(biases).items():
        has_moved = np.any(paths(moved)[path] != bias)
        assert has_moved == (path[-1] == "bias_E"), path


def test_a_fresh_table_names_different_experts():
    build = lambda: split(v4.Model(sizes(n_layers=1), rngs=nnx.Rngs(0)))[2]  # noqa: E731
    (table_VK,) = jax.jit(build)()["blocks_0"]["experts"]["router"]["experts_VK"]
    assert table_VK.shape == (V, K) and table_VK.min() >= 0 and table_VK.max() < E
    assert (np.diff(np.sort(table_VK, axis=1), axis=1) > 0).all()
    assert len(np.unique(table_VK, axis=0)) > V / 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compress_ratios": (0, 4, 8)}, "has 3 numbers: expected one for each of 3 layers and 1 depths"),
        ({"compress_ratios": (0, -4, 8, 0)}, "compress_ratios"),
        ({"out_groups": 3}, "out_groups=3 does not divide"),
        ({"index_width": 4}, "index_width=4 is less than rope_width=8"),
        ({"top_k": 7}, "choose a smaller top_k"),
        ({"rope_width": 7}, "even width"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        sizes(**changed)


def test_the_twin_is_as_large_as_v3s():
    ours, theirs = (
        sum(w.size for path, w in paths(split(abstract_module(run_config.load(name)))[1]).items() if path[0] != "mtp")
        for name in ("tiny_v4", "tiny_v3")
    )
    assert ours == pytest.approx(theirs, rel=0.005)
