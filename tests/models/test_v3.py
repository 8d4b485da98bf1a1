"""DeepSeek-V3 as a function: three ways of running it agree, nothing leaks backwards in time, the size is published."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.configs import v3_671b
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.base import bind, logical_axes, split
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.parallel.sharding import is_axes
from deepseek_jax.train.loss import Totals, losses

B, T, SLOTS, DEPTH = 2, 12, 14, 2


@pytest.fixture(scope="module")
def sizes(tiny_sizes):
    return dataclasses.replace(family("v3").Config.from_config(tiny_sizes), mtp_depth=DEPTH)


@pytest.fixture(scope="module")
def model(sizes, filled) -> tuple:
    return filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)), std=0.15)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """One token more than a sequence, so that every position has a target."""
    return np.random.default_rng(1).integers(0, 64, (B, T + 1)).astype(np.int32)


@pytest.fixture(scope="module")
def forward(model):
    """Compiled: ids_BT, targets_BT -> logits_BTV, those of each depth, the targets of each depth; all on the host."""
    definition, params, bias = model

    @jax.jit
    def run(params, ids_BT, targets_BT):
        m = bind(definition, params, bias)
        h_BTD, _ = m.hidden(Tokens.of(ids_BT))
        depths = m.mtp_depths(h_BTD, targets_BT, Tokens.of(ids_BT))
        return m.head(h_BTD), [m.head(d.h_BTD) for d in depths], [d.targets_BT for d in depths]

    return lambda *given: jax.device_get(run(params, *given))


@pytest.fixture(scope="module")
def logits(forward, ids) -> np.ndarray:
    return np.asarray(forward(ids[:, :-1], ids[:, 1:])[0])


@pytest.fixture(scope="module")
def prefilled(model, ids) -> tuple:
    """What prefill says and keeps of a whole sequence."""
    definition, params, bias = model

    @jax.jit
    def run(params, ids_BT):
        m = bind(definition, params, bias)
        h_BTD, cache = m.prefill(ids_BT, SLOTS)
        return m.head(h_BTD), cache

    return jax.device_get(run(params, ids[:, :-1]))


@pytest.fixture(scope="module")
def decode(model):
    definition, params, bias = model
    run = jax.jit(lambda p, ids, at, cache: bind(definition, p, bias).decode(ids, at, cache))
    return lambda *given: jax.device_get(run(params, *given))


def with_a_strangers(cache, start: int):
    """The cache with other numbers from `start` on, which must be overwritten before they are seen."""
    cache = jax.tree.map(np.array, cache)
    for part in jax.tree.leaves(cache):
        part[:, :, start:] = 50.0
    return cache


def test_prefill_is_the_full_forward(prefilled, logits):
    np.testing.assert_allclose(prefilled[0], logits, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3])
def test_decode_is_the_full_forward(prefilled, decode, logits, ids, at_once):
    start = 6
    cache = with_a_strangers(prefilled[1], start)
    for at in range(start, T, at_once):
        positions_BT = np.broadcast_to(np.arange(at, at + at_once, dtype=np.int32), (B, at_once))
        got, cache = decode(ids[:, at : at + at_once], positions_BT, cache)
        np.testing.assert_allclose(got, logits[:, at : at + at_once], atol=1e-5)
    np.testing.assert_allclose(
        cache["moe_blocks"].c_BSC[:, :, :T], prefilled[1]["moe_blocks"].c_BSC[:, :, :T], atol=1e-5
    )


def test_a_prompt_read_in_parts_is_the_full_forward(model, prefilled, logits, ids):
    definition, params, bias = model

    @jax.jit
    def extend(params, ids_BT, start, cache):
        m = bind(definition, params, bias)
        h_BTD, cache = m.extend(ids_BT, start, cache)
        return m.head(h_BTD), cache

    start = T // 2
    got, cache = jax.device_get(extend(params, ids[:, start:T], start, with_a_strangers(prefilled[1], start)))
    np.testing.assert_allclose(got, logits[:, start:], atol=1e-5)
    np.testing.assert_allclose(
        cache["moe_blocks"].c_BSC[:, :, :T], prefilled[1]["moe_blocks"].c_BSC[:, :, :T], atol=1e-5
    )


def test_sequences_decode_at_positions_of_their_own(prefilled, decode, logits, ids):
    at = np.array([[4], [9]])
    got, _ = decode(np.take_along_axis(ids, at, axis=1), at, prefilled[1])
    np.testing.assert_allclose(got[:, 0], np.take_along_axis(logits, at[..., None], axis=1)[:, 0], atol=1e-5)


@pytest.mark.parametrize("changed", [5, T - 1, T])
def test_no_logit_depends_on_a_later_token(forward, ids, changed):
    """Token j reaches main logits from position j on, and depth k's from j - k on."""
    other = ids.copy()
    other[:, changed] = (other[:, changed] + 1) % 64
    before, after = (forward(x[:, :-1], x[:, 1:]) for x in (ids, other))
    for depth, (old, new) in enumerate(zip([before[0], *before[1]], [after[0], *after[1]], strict=True)):
        first = changed - depth
        np.testing.assert_array_equal(old[:, :first], new[:, :first])
        if first < T:
            assert np.abs(old[:, first] - new[:, first]).max() > 1e-4


def test_a_batch_row_does_not_see_another(forward, ids):
    other = ids.copy()
    other[1] = (other[1] + 7) % 64
    np.testing.assert_allclose(
        forward(ids[:, :-1], ids[:, 1:])[0][0], forward(other[:, :-1], other[:, 1:])[0][0], atol=1e-5
    )


def test_depth_k_predicts_k_tokens_further(forward, ids):
    targets = ids[:, 1:].copy()
    targets[0, 4] = -1  # a document ends: nothing is known past it
    _, _, (first, second) = forward(ids[:, :-1], targets)
    expected = np.concatenate([targets[:, 1:], np.full((B, 1), -1)], axis=1)
    expected[0, 4] = -1
    np.testing.assert_array_equal(first, expected)
    expected = np.concatenate([expected[:, 1:], np.full((B, 1), -1)], axis=1)
    expected[0, 4] = -1
    np.testing.assert_array_equal(second[:, :-2], expected[:, :-2])
    assert (np.asarray(second)[0, 2:5] == -1).all() and (np.asarray(second)[:, -2:] == -1).all()


@pytest.mark.slow
def test_the_loss_is_the_full_cross_entropy_and_its_mtp_part_is_eq_24(model, forward, ids):
    """CE_k = -1/T sum over the targets there are of log p; the mean over the depths; gradients reach what is shared."""
    definition, params, bias = model
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones_like(positions)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))

    def parts(params):
        m = bind(definition, params, bias)
        found = losses(m, batch, Totals(B * T, B), chunk=7, mask=False)
        loss = found.weighted(0.3, {"expert_balance": 0.1})
        return found.mtp, (loss, found)

    d_params, (loss, found) = jax.device_get(jax.jit(jax.grad(parts, has_aux=True))(params))
    main, ahead, targets = forward(ids[:, :-1], ids[:, 1:])

    def nll(logits, targets) -> float:
        logits, targets = np.float64(logits), np.asarray(targets)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.where(targets < 0, 0, np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]).sum()

    assert float(found.main) == pytest.approx(nll(main, ids[:, 1:]) / (B * T), rel=1e-5)
    assert float(found.main) > 3
    mtp = sum(nll(logits, expected) for logits, expected in zip(ahead, targets, strict=True)) / DEPTH / (B * T)
    assert float(found.mtp) == pytest.approx(mtp, rel=1e-5)
    balance = found.auxiliary["expert_balance"]
    assert float(loss) == pytest.approx(float(found.main + 0.3 * found.mtp + 0.1 * balance), rel=1e-6)
    assert float(balance) > 2 + DEPTH - 0.5  # about one for each MoE layer
    assert float(found.loads["moe_blocks"].sum()) == 2 * B * T * 2
    for path, gradient in jax.tree_util.tree_leaves_with_path(d_params):
        assert np.any(gradient), f"{jax.tree_util.keystr(path)} gets no gradient from multi-token prediction"


@pytest.mark.parametrize("depth", [0, 1])
def test_other_depths_run(sizes, depth):
    sizes = dataclasses.replace(sizes, mtp_depth=depth)
    definition, params, bias = split(nnx.eval_shape(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0))))
    batch = Batch(*[jax.ShapeDtypeStruct((B, T), jnp.int32)] * 4, jax.ShapeDtypeStruct((B, T), jnp.float32))

    def run(params, bias, batch):
        m = bind(definition, params, bias)
        found = losses(m, batch, Totals(B * T, B), chunk=8, mask=True)
        return found.weighted(0.3, {"expert_balance": 0.1}), found

    loss, found = jax.eval_shape(jax.grad(run, has_aux=True), params, bias, batch)
    assert set(loss) == set(params) and ("mtp" in params) == bool(depth) == ("mtp" in found.loads)
    assert found.mtp.shape == ()


def test_loads_match_the_router_biases(model):
    _, _, bias = model
    assert set(bias) == {"moe_blocks", "mtp"}
    assert bias["moe_blocks"]["experts"]["router"]["bias_E"].shape == (2, 8)
    assert set(bias["mtp"]) == {"0", "1"}


def test_every_weight_names_its_axes(model, sizes):
    _, params, bias = model
    axes = logical_axes(nnx.eval_shape(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0))))
    ranks = [jax.tree.map(len, tree, is_leaf=is_axes) for tree in axes]
    assert ranks == [jax.tree.map(jnp.ndim, tree) for tree in (params, bias)]


def test_the_released_model_has_the_published_number_of_parameters():
    sizes = family("v3").Config.from_config(v3_671b.get_config().model)
    _, params, bias = split(nnx.eval_shape(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0))))

    def count(tree) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    ahead = count(params["mtp"]) + count(bias["mtp"])
    assert count(params) + count(bias) - ahead == 671_026_419_200
    assert ahead == 11_610_068_224
