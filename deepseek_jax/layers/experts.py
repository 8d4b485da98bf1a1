"""DeepSeekMoE: a few shared experts that every token visits, and many small routed ones of which it visits k.

    h'_t = u_t + sum_shared FFN_i(u_t) + sum_routed g_i,t FFN_i(u_t)      (eq. 12; the block adds u_t)

Many fine-grained experts instead of few wide ones, so that the k chosen make up a more specific feed-forward for the
same cost; shared experts hold what all tokens need. No token is ever dropped.
Paper: V3 section 2.1.2; DeepSeekMoE, arXiv 2401.06066.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, ReplicaSlots, param
from deepseek_jax.layers.block import Build, Statistics
from deepseek_jax.layers.grouped import grouped_swiglu
from deepseek_jax.layers.router import Balance, Route, Router, Routing, expert_load, without_padding
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel import alltoall
from deepseek_jax.parallel.alltoall import Arrived, Plan, Sent


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a mixture of experts (V3's in brackets)."""

    n_experts: int  # E, routed experts (256)
    n_shared_experts: int  # experts that every token visits, run as one wider feed-forward (1); 0 for none
    expert_width: int  # F, hidden width of one expert (2048)
    top_k: int  # K, routed experts a token visits (8)
    n_groups: int = 1  # groups that the routed experts are divided into (8)
    top_groups: int = 1  # groups that a token may visit (4)
    route_scale: float = 1.0  # factor of the routed experts' weights (2.5)
    init_std: float = 0.006  # standard deviation of the initial weights (0.006)


class Routed(NamedTuple):
    """Tokens on their way to the experts."""

    x_BTD: jax.Array  # this device's own
    routing: Routing  # where they go
    # plan, sent: the exchange with the experts' devices, and what it reports; None where all experts are here
    plan: Plan | None = None
    sent: Sent | None = None
    arrived: Arrived | None = None  # those that have come here; None where nothing has been sent yet


class Computed(NamedTuple):
    """What the experts made of them."""

    y_AD: jax.Array  # of the rows that arrived; of this device's own tokens where none has been sent
    shared_BTD: jax.Array | None  # of the shared experts; None without any
    routed: Routed  # what came in


class Experts(nnx.Module):
    """A mixture-of-experts feed-forward.

    | ours | report | released name |
    | --- | --- | --- |
    | router.centroids_DE | e_i | mlp.gate.weight |
    | router.bias_E | b_i | mlp.gate.e_score_correction_bias |
    | shared | FFN^(s) | mlp.shared_experts |
    | gate_XDF, up_XDF, down_XFD | FFN^(r)_i | mlp.experts.i.gate_proj, up_proj, down_proj |

    Args:
        route: how the router chooses: `route(logits_BTE, bias_E) -> Routing`, without `bias_E` if it has none.
        balance: the balance losses of each sequence, by name, from its routing.
        run: its `matmul`, `exchange`, `context`, `routes` and `redundant` are used. With redundant experts the weights
            have a slot for each replica, and `slot_ER` says which slots those of an expert have.
        biased: whether the router has a balancing bias.
        router: makes a router that is called like `Router`, in its place.
        limit: bounds what a SwiGLU multiplies (`precision.matmul.clamped`); 0: nothing does.
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
        router: Build | None = None,
        limit: float = 0.0,
        rngs: nnx.Rngs,
    ):
        init, usual = (
            normal(c.init_std),
            functools.partial(Router, d_model, c.n_experts, c.init_std, route, biased=biased),
        )
        self.router: Any = router(rngs) if router else usual(rngs=rngs)
        shared_width = c.n_shared_experts * c.expert_width
        shared = functools.partial(SwiGLU, d_model, shared_width, c.init_std, run.matmul, limit=limit)
        self.shared = shared(rngs=rngs) if shared_width else None
        slots = (c.n_experts, 1 + run.redundant)
        self.slot_ER = ReplicaSlots(jnp.full(slots, -1, jnp.int32), axes=(None, None)) if run.redundant else None
        n_slots = c.n_experts + run.redundant
        wide, axes = (n_slots, d_model, c.expert_width), ("experts", "embed", "mlp")
        self.gate_XDF = param(rngs, wide, axes, init, role="gate")
        self.up_XDF = param(rngs, wide, axes, init, role="up")
        narrow, axes = (n_slots, c.expert_width, d_model), ("experts", "mlp", "embed")
        self.down_XFD = param(rngs, narrow, axes, init, role="down")
        self.balance, self.exchange, self.matmul, self.context = balance, run.exchange, run.matmul, run.context
        self.limit, self.routes, self.swiglu_limit = (c.top_groups, c.n_groups), run.routes, limit
        if run.redundant:
            self.limit = 1, 1  # replicas may be with any group of experts

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Statistics]:
        """Returns (y_BTD, loads and balance losses); padding goes to no routed expert and counts nowhere."""
        return self.combine(self.compute(self.dispatch(x_BTD, tokens)))

    def dispatch(self, x_BTD: jax.Array, tokens: Tokens) -> Routed:
        """Chooses each token's experts and, if the exchange has buffers of a given size, sends the tokens there.

        Otherwise `compute` holds the whole exchange, in buffers of the size that is needed.
        """
        routing = without_padding(self.router(x_BTD, tokens.experts_BTK, tokens.ids_BT), tokens.real_BT)
        if self.exchange is None:
            return Routed(x_BTD, routing)
        here, wire = self._flat(x_BTD, routing), self.matmul.wire
        n_tokens, top_k = here[1].shape
        plan = self.exchange.plan(n_tokens, top_k, self.gate_XDF.shape[0], self.limit)
        sent, arrived = plan.report(*here, wire), None
        if plan.given:
            arrived = alltoall.dispatch(*here, plan=plan, sizes=plan.given, wire=wire)
        return Routed(x_BTD, routing, plan, sent, arrived)

    def compute(self, routed: Routed) -> Computed:
        """Runs the experts of this device on the tokens that are here, and the shared ones on its own tokens."""
        run = functools.partial(
            grouped_swiglu,
            gate_XDF=self.gate_XDF[...],
            up_XDF=self.up_XDF[...],
            down_XFD=self.down_XFD[...],
            matmul=self.matmul,
            limit=self.swiglu_limit,
        )
        here, plan, wire = self._flat(routed.x_BTD, routed.routing), routed.plan, self.matmul.wire
        if plan is None or routed.sent is None:
            y_AD = alltoall.on_this_device(run, *here, wire=wire)
        elif routed.arrived is None or plan.given is None:
            y_AD = alltoall.on_expert_devices(run, *here, plan, routed.sent, wire)
        else:
            y_AD = run(*routed.arrived[:3], plan.given.computed)
        return Computed(y_AD, None if self.shared is None else self.shared(routed.x_BTD), routed)

    def combine(self, computed: Computed) -> tuple[jax.Array, Statistics]:
        """Returns (y_BTD, tokens per expert and the balance losses summed over the sequences)."""
        y_AD, shared_BTD, (x_BTD, routing, plan, sent, arrived) = computed
        y_MD = y_AD
        if plan and arrived:
            y_MD = alltoall.combine(y_AD, arrived, wire=self.matmul.wire)
        y_BTD = y_MD.reshape(x_BTD.shape)
        load_E = expert_load(routing.experts_BTK, routing.scores_BTE.shape[-1])
        routes_BTK = routing.experts_BTK.astype(jnp.int16) if self.routes else None
        losses = jax.tree.map(jnp.sum, self.balance(routing, self.context))
        statistics = Statistics(load_E, losses, sent, routes_BTK)
        return (y_BTD if shared_BTD is None else shared_BTD + y_BTD), statistics  # eq. 12

    def _flat(self, x_BTD: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(x_MD, experts_MK, weights_MK): the tokens of all sequences in one row, experts by their slots."""
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts_BTK, weights_BTK, _ = routing
        experts_MK = experts_BTK.reshape(len(x_MD), -1)
        if self.slot_ER is not None:
            experts_MK = _slots(experts_MK, self.slot_ER[...])
        return x_MD, experts_MK, weights_BTK.reshape(len(x_MD), -1)


def _slots(experts_MK: jax.Array, slot_ER: jax.Array) -> jax.Array:
    """The slot of each token's experts: its replicas take turns. One past the last slot where there is no expert."""
    n_experts, most = slot_ER.shape
    count_E = jnp.sum(slot_ER >= 0, axis=1)
    expert_MK = jnp.minimum(experts_MK, n_experts - 1)
    replica_MK = jnp.arange(len(experts_MK))[:, None] % count_E[expert_MK]
    return jnp.where(experts_MK < n_experts, slot_ER[expert_MK, replica_MK], n_experts + most - 1)
