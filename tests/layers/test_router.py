"""Routing: cases worked by hand, and what the bias may and may not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.router import (
    Router,
    Routing,
    expert_load,
    grouped_balance,
    keep_best_groups,
    max_violation,
    sequence_balance,
    sigmoid_biased_topk,
    softmax_topk,
    updated_bias,
    without_padding,
)


def logit(scores) -> np.ndarray:
    scores = np.float64(scores)
    return np.float32(np.log(scores / (1 - scores)))[None, None]


def by_jit(function, *arguments, **sizes):
    """What a function of these arrays returns, on the host: one program instead of one per operation."""
    return jax.device_get(jax.jit(functools.partial(function, **sizes))(*arguments))


def choose(scores, bias, **sizes) -> tuple[list, list]:
    routing = by_jit(sigmoid_biased_topk, logit(scores), np.float32(bias), **sizes)
    return routing.experts_BTK[0, 0].tolist(), routing.weights_BTK[0, 0].tolist()


def test_groups_with_negative_biases_by_hand():
    # s + b = -.1 -.9 | -.4 -.5: sums -1.0 and -.9, so the second group; were the first masked by 0, it would win.
    experts, weights = choose([0.9, 0.1, 0.6, 0.5], [-1.0] * 4, top_k=2, n_groups=2, top_groups=1, scale=2.5)
    assert experts == [2, 3]
    assert weights == pytest.approx([2.5 * 0.6 / 1.1, 2.5 * 0.5 / 1.1], rel=1e-5)


def test_a_group_is_as_good_as_its_two_best():
    scores = [0.9, 0.1, 0.1, 0.7, 0.6, 0.1]  # best single score in the first group, best pair in the second
    experts, _ = choose(scores, [0.0] * 6, top_k=2, n_groups=2, top_groups=1, scale=1.0)
    assert experts == [3, 4]


def test_one_group_kept_whole_and_groups_of_one():
    choice = jnp.float32([[[0.3, -0.2, 0.9]]])
    assert keep_best_groups(choice, 1, 1, n_best=2) is choice
    best = by_jit(keep_best_groups, choice, n_groups=3, top_groups=2, n_best=2)
    np.testing.assert_array_equal(best[0, 0], np.float32([0.3, -np.inf, 0.9]))


def test_the_bias_chooses_and_does_not_weigh():
    sizes = dict(top_k=2, n_groups=1, top_groups=1, scale=1.0)
    assert choose([0.8, 0.6, 0.4], [0, 0, 0], **sizes)[0] == [0, 1]
    experts, weights = choose([0.8, 0.6, 0.4], [0, 0, 0.3], **sizes)
    assert experts == [0, 2]
    assert weights == pytest.approx([0.8 / 1.2, 0.4 / 1.2], rel=1e-5)
    same_choice = choose([0.8, 0.6, 0.4], [0.1, 0, 0.4], **sizes)[1]
    assert sorted(same_choice) == pytest.approx(sorted(weights))


def test_gradient_reaches_the_centroids_and_never_the_bias(filled):
    route = functools.partial(sigmoid_biased_topk, top_k=2, n_groups=2, top_groups=1, scale=2.5)
    definition, params, bias = filled(lambda: Router(6, 8, 0.1, route, rngs=nnx.Rngs(0)))
    x_BTD = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, bias):
        routing = bind(definition, params, bias)(x_BTD)
        return jnp.sum(routing.weights_BTK[..., 0] ** 2) + jnp.sum(sequence_balance(routing)["expert_balance"])

    d_params, d_bias = jax.jit(gradient)(params, bias)
    assert np.any(d_params["centroids_DE"])
    assert not np.any(d_bias["bias_E"])


def test_scores_are_float32_whatever_comes_in(filled):
    route = functools.partial(sigmoid_biased_topk, top_k=1, n_groups=1, top_groups=1, scale=1.0)
    parts = filled(lambda: Router(4, 3, 0.1, route, rngs=nnx.Rngs(0)))
    routing = jax.eval_shape(lambda x_BTD: bind(*parts)(x_BTD), jax.ShapeDtypeStruct((1, 2, 4), jnp.bfloat16))
    assert routing.scores_BTE.dtype == routing.weights_BTK.dtype == jnp.float32


def test_scores_of_a_decode_step_are_those_of_the_same_tokens_among_more(filled, monkeypatch):
    """On a GPU they are sums there, and parts of a product of matrices here."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    route = functools.partial(softmax_topk, top_k=2, n_groups=1, top_groups=1, scale=1.0)
    parts = filled(lambda: Router(24, 8, 0.5, route, biased=False, rngs=nnx.Rngs(0)))
    x_BTD = np.random.default_rng(2).normal(size=(3, 5, 24)).astype(np.float32)
    score = jax.jit(lambda x_BTD: bind(*parts)(x_BTD).scores_BTE)
    text = str(jax.make_jaxpr(score)(x_BTD[:, :1]))
    assert "dot_general" not in text and "dot_general" in str(jax.make_jaxpr(score)(x_BTD))
    np.testing.assert_allclose(score(x_BTD[:, :1]), score(x_BTD)[:, :1], rtol=1e-6)


def test_the_bias_moves_by_gamma_or_not_at_all():
    gamma = 0.125
    load = np.float32([[1, 3, 2], [2, 2, 2]])
    moved = by_jit(updated_bias, np.float32([[0.5, 0.5, 0.5], [1, 2, 3]]), load, gamma)
    np.testing.assert_array_equal(moved, [[0.625, 0.375, 0.5], [1, 2, 3]])


def test_load_and_violation():
    load = by_jit(expert_load, np.array([[[0, 2], [0, 1], [0, 2]]]), n_experts=4)
    np.testing.assert_array_equal(load, [3, 1, 2, 0])
    assert float(by_jit(max_violation, load)) == pytest.approx((3 - 1.5) / 1.5)
    loads = np.float32([[1, 1, 1], [1, 2, 3], [4, 4, 4], [0, 0, 0]])
    assert by_jit(max_violation, loads).tolist() == [0, 0.5, 0, 0]


def test_balance_loss_is_one_when_balanced():
    experts = np.array([[[0, 1], [2, 3]]])
    routing = Routing(experts, np.ones((1, 2, 2), np.float32), np.full((1, 2, 4), 0.7, np.float32))
    np.testing.assert_allclose(by_jit(sequence_balance, routing)["expert_balance"], [1.0], rtol=1e-6)


def test_balance_loss_is_equations_17_to_20():
    rng = np.random.default_rng(0)
    B, T, E, K = 3, 7, 6, 2
    scores = rng.uniform(0.1, 0.9, (B, T, E))
    experts = np.stack([[rng.permutation(E)[:K] for _ in range(T)] for _ in range(B)])
    expected = np.zeros(B)
    for b in range(B):
        for i in range(E):
            f = E / (K * T) * sum(i in experts[b, t] for t in range(T))
            P = sum(scores[b, t, i] / scores[b, t].sum() for t in range(T)) / T
            expected[b] += f * P
    got = by_jit(sequence_balance, Routing(experts, np.ones((B, T, K), np.float32), np.float32(scores)))
    np.testing.assert_allclose(got["expert_balance"], expected, rtol=1e-5)


def test_softmax_choice_by_hand():
    """V2: the group of the single best expert wins, though the other two are better together; weights as they are."""
    scores = np.float64([0.4, 0.05, 0.3, 0.25])
    logits = np.float32(np.log(scores))[None, None]
    routing = by_jit(softmax_topk, logits, top_k=2, n_groups=2, top_groups=1, scale=16.0)
    assert routing.experts_BTK[0, 0].tolist() == [0, 1]
    assert routing.weights_BTK[0, 0].tolist() == pytest.approx([16 * 0.4, 16 * 0.05], rel=1e-5)
    np.testing.assert_allclose(routing.scores_BTE[0, 0], scores, rtol=1e-5)


def test_grouped_balance_is_equations_23_to_31():
    rng = np.random.default_rng(0)
    B, T, E, K, D, M = 3, 7, 6, 2, 3, 2
    scores = rng.dirichlet(np.ones(E), (B, T))
    experts = np.stack([[rng.permutation(E)[:K] for _ in range(T)] for _ in range(B)])
    expected = np.zeros((3, B))
    for b in range(B):
        f = [E / (K * T) * sum(i in experts[b, t] for t in range(T)) for i in range(E)]
        P = scores[b].mean(0)
        expected[0, b] = np.dot(f, P)
        for group in np.arange(E).reshape(D, -1):
            sent = D / (M * T) * sum(any(i in experts[b, t] for i in group) for t in range(T))
            expected[1, b] += np.mean([f[i] for i in group]) * P[group].sum()
            expected[2, b] += sent * P[group].sum()
    routing = Routing(experts, np.ones((B, T, K), np.float32), np.float32(scores))
    got = by_jit(grouped_balance, routing, n_groups=D, top_groups=M)
    names = ["expert_balance", "device_balance", "communication_balance"]
    assert set(got) == set(names)
    for name, want in zip(names, expected, strict=True):
        np.testing.assert_allclose(got[name], want, rtol=1e-5)
    one = by_jit(sequence_balance, routing)["expert_balance"]
    np.testing.assert_allclose(got["expert_balance"], one, rtol=1e-5)


def test_padding_is_routed_nowhere_and_balances_nothing():
    """Balance losses and loads of a padded sequence are those of its text; a sequence of padding has none."""
    logits = np.random.default_rng(0).normal(size=(2, 12, 8)).astype(np.float32)
    real = np.arange(12) < np.array([[7], [0]])

    def balance(routing):
        return grouped_balance(routing, n_groups=4, top_groups=2), expert_load(routing.experts_BTK, 8)

    whole = by_jit(softmax_topk, logits, top_k=3, n_groups=4, top_groups=2, scale=1.0)
    padded = by_jit(without_padding, whole, real)
    np.testing.assert_array_equal(padded.experts_BTK[0, 7:], 8)
    found, load = by_jit(balance, padded)
    expected, load_of_text = by_jit(balance, jax.tree.map(lambda x: x[:1, :7], whole))
    np.testing.assert_array_equal(load, load_of_text)
    for name, got in found.items():
        np.testing.assert_allclose(got, [float(expected[name][0]), 0.0], rtol=1e-6)
    assert without_padding(whole, None) is whole


@pytest.mark.parametrize("bias", [None, [0.3, -0.2, 0.0, 0.1]], ids=["softmax", "sigmoid"])
def test_experts_that_are_given_have_the_weights_of_the_present_scores(bias):
    """Those that the router would choose change nothing; others get their own scores, from which the router learns."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    sizes = dict(top_k=2, n_groups=2, top_groups=1, scale=2.0)
    if bias is None:
        route, scores = functools.partial(softmax_topk, **sizes), jax.nn.softmax(logits)
    else:
        route, scores = functools.partial(sigmoid_biased_topk, bias_E=np.float32(bias), **sizes), jax.nn.sigmoid(logits)
    own = route(logits)
    again = route(logits, experts_BTK=own.experts_BTK)
    jax.tree.map(np.testing.assert_array_equal, own, again)
    others = np.broadcast_to([[3, 0]], (2, 3, 2))
    chosen = np.take_along_axis(np.asarray(scores), others, -1)
    over = 1.0 if bias is None else chosen.sum(-1, keepdims=True)
    found = route(logits, experts_BTK=others)
    np.testing.assert_array_equal(found.experts_BTK, others)
    np.testing.assert_allclose(found.weights_BTK, 2.0 * chosen / over, rtol=1e-6)
    slope = jax.grad(lambda x: route(x, experts_BTK=others).weights_BTK[..., 0].sum())(jnp.asarray(logits))
    assert (np.abs(slope[..., [0, 3]]) > 1e-4).all()
