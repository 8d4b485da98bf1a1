"""The mixture of experts as a whole, on one device, against eq. 12 written out."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.router import sequence_balance, sigmoid_biased_topk
from deepseek_jax.layers.tokens import Tokens

SIZES = ExpertsConfig(
    n_experts=4, n_shared_experts=2, expert_width=3, top_k=2, n_groups=2, top_groups=1, route_scale=2.5
)
ROUTE = functools.partial(sigmoid_biased_topk, top_k=2, n_groups=2, top_groups=1, scale=2.5)


def swiglu(x, gate, up, down):
    return (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down


def test_shared_and_routed_experts_add_up(filled):
    definition, params, bias = filled(lambda: Experts(SIZES, 5, ROUTE, sequence_balance, rngs=nnx.Rngs(0)), std=0.5)
    x_BTD = np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32)

    @jax.jit
    def run(params, bias, x_BTD):
        experts = bind(definition, params, bias)
        routing = experts.router(x_BTD)
        return *experts(x_BTD, Tokens.of(x_BTD[..., 0])), routing, sequence_balance(routing)["expert_balance"]

    y_BTD, found, routing, balance = jax.device_get(run(params, bias, x_BTD))
    bias = jax.device_get(bias)
    w = jax.tree.map(np.float64, params)
    assert w["shared"]["gate_DF"].shape == (5, 6)
    for b, t in np.ndindex(2, 4):
        x = np.float64(x_BTD[b, t])
        s = 1 / (1 + np.exp(-x @ w["router"]["centroids_DE"]))
        choice = s + bias["router"]["bias_E"]
        group = int(choice[2:].sum() > choice[:2].sum())
        chosen = [2 * group, 2 * group + 1]
        expected = swiglu(x, *(w["shared"][name] for name in ("gate_DF", "up_DF", "down_FD")))
        for i in chosen:
            expected = expected + 2.5 * s[i] / s[chosen].sum() * swiglu(
                x, *(w[name][i] for name in ("gate_XDF", "up_XDF", "down_XFD"))
            )
        assert sorted(routing.experts_BTK[b, t].tolist()) == chosen
        np.testing.assert_allclose(y_BTD[b, t], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.load_E, np.bincount(np.ravel(routing.experts_BTK), minlength=4))
    assert found.losses == {"expert_balance": pytest.approx(float(balance.sum()), rel=1e-6)}
