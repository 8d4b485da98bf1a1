"""DeepSeekMoE: a few shared experts that every token visits, and many small routed ones of which it visits k.

    h'_t = sum_shared FFN_i(u_t) + sum_routed g_i,t FFN_i(u_t)      (eq. 12)

Many fine-grained experts instead of few wide ones, so that the k chosen make up a more specific feed-forward for the
same cost; shared experts hold what all tokens need.  No token is ever dropped.
Paper: V3 section 2.1.2; DeepSeekMoE, arXiv 2401.06066.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, normal, param
from deepseek_jax.layers.block import Statistics
from deepseek_jax.layers.grouped import grouped_swiglu
from deepseek_jax.layers.router import Balance, Route, Router, Routing, expert_load, without_padding
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.alltoall import on_expert_devices


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a mixture of experts (V3's in brackets).

    Attributes:
        n_experts: E, routed experts (256).
        n_shared: experts that every token visits, run as one wider feed-forward (1); 0 for none.
        width: F, hidden width of one expert (2048).
        top_k: K, routed experts a token visits (8).
        n_groups: groups that the routed experts are divided into (8).
        top_groups: groups that a token may visit (4).
        route_scale: factor of the routed experts' weights (2.5).
        init_std: standard deviation of the initial weights (0.006).
    """

    n_experts: int
    n_shared: int
    width: int
    top_k: int
    n_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    init_std: float = 0.006


class Routed(NamedTuple):
    """Tokens on their way through a mixture of experts: vectors, and where they go."""

    x_BTD: jax.Array
    routing: Routing


class Experts(nnx.Module):
    """A mixture-of-experts feed-forward.

    Args:
        c: sizes.
        d_model: width of the residual stream.
        route: how the router chooses: `route(logits_BTE, bias_E) -> Routing`, without `bias_E` if it has none.
        balance: the balance losses of each sequence, by name, from its routing.
        run: its `matmul` and `expert_axis` are used.
        biased: whether the router has a balancing bias.
        rngs: initialisers' keys.
    """

    def __init__(
        self,
        c: ExpertsConfig,
        d_model: int,
        route: Route,
        balance: Balance,
        run: Execution = SINGLE_DEVICE,
        *,
        biased: bool = True,
        rngs: nnx.Rngs,
    ):
        init = normal(c.init_std)
        self.router = Router(d_model, c.n_experts, c.init_std, route, biased=biased, rngs=rngs)
        self.shared = SwiGLU(d_model, c.n_shared * c.width, c.init_std, run.matmul, rngs=rngs) if c.n_shared else None
        self.gate_XDF = param(rngs, (c.n_experts, d_model, c.width), ("experts", "embed", "mlp"), init)
        self.up_XDF = param(rngs, (c.n_experts, d_model, c.width), ("experts", "embed", "mlp"), init)
        self.down_XFD = param(rngs, (c.n_experts, c.width, d_model), ("experts", "mlp", "embed"), init)
        self.balance, self.expert_axis, self.matmul = balance, run.expert_axis, run.matmul

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Statistics]:
        """Returns (y_BTD, loads and balance losses); padding goes to no routed expert and counts nowhere."""
        return self.combine(self.compute(self.dispatch(x_BTD, tokens)))

    def dispatch(self, x_BTD: jax.Array, tokens: Tokens) -> Routed:
        """Chooses each token's experts."""
        return Routed(x_BTD, without_padding(self.router(x_BTD), tokens.real_BT))

    def compute(self, routed: Routed) -> Routed:
        """Runs the routed experts and the shared one: `x_BTD` becomes y_BTD."""
        y_BTD = self.routed(*routed)
        return routed._replace(x_BTD=y_BTD if self.shared is None else self.shared(routed.x_BTD) + y_BTD)

    def combine(self, routed: Routed) -> tuple[jax.Array, Statistics]:
        """Returns (y_BTD, tokens per expert and the balance losses summed over the sequences)."""
        y_BTD, routing = routed
        load_E = expert_load(routing.experts_BTK, routing.scores_BTE.shape[-1])
        return y_BTD, Statistics(load_E, jax.tree.map(jnp.sum, self.balance(routing)))

    def routed(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """y_BTD: the routed experts' weighted sum alone."""
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        top_k = routing.experts_BTK.shape[-1]
        experts_MK, weights_MK = (part.reshape(-1, top_k) for part in routing[:2])
        weights = {"gate_XDF": self.gate_XDF[...], "up_XDF": self.up_XDF[...], "down_XFD": self.down_XFD[...]}
        compute = functools.partial(grouped_swiglu, matmul=self.matmul, **weights)
        if self.expert_axis is None:
            y_MD = compute(x_MD, experts_MK, weights_MK)
        else:
            y_MD = on_expert_devices(
                compute, x_MD, experts_MK, weights_MK, n_local=self.gate_XDF.shape[0], axis=self.expert_axis
            )
        return y_MD.reshape(x_BTD.shape)
