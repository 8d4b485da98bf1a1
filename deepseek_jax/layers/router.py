"""Which experts a token goes to, and how the experts are kept equally busy without a loss that hurts.

    s_i,t = sigmoid(u_t . e_i)                                        (eq. 15)
    chosen: top-k of s + b within the best groups; b only chooses     (eq. 16 and section 2.1.2)
    g'_i,t = s_i,t of the chosen, 0 of all others                     (eq. 14)
    g_i,t = scale * g'_i,t / sum_j g'_j,t                             (eq. 13; scale: the released code)

A group's score is the sum of its two largest s + b (V3: 8 groups, one a node, 4 kept).
After each step b_i rises by gamma if expert i had less than the mean load and falls if it had more.
A small sequence-wise loss remains as a guard: alpha * sum_i f_i P_i (eqs. 17-20).

V2 and DeepSeekMoE before it: softmax scores, no bias, balance by losses alone (`softmax_topk`, `grouped_balance`).
V4 after it: scores sqrt(softplus(u_t . e_i)), no groups (`softplus_topk`); in its first layers a fixed table says which
experts a token id goes to, and the scores only weigh them (`HashRouter`).

All of it in float32.  Paper: V3 section 2.1.2; arXiv 2408.15664; V2 section 2.2; DeepSeekMoE, arXiv 2401.06066; V4,
arXiv 2606.19348, section 2.1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.typing import ArrayLike

from deepseek_jax.layers.base import ExpertTable, RouterBias, next_key, param
from deepseek_jax.parallel.context import WHOLE, Context


class Routing(NamedTuple):
    """The router's decision for each token."""

    experts_BTK: jax.Array  # indices of the chosen experts, int32; E (one past the last) where a token visits none
    weights_BTK: jax.Array  # g, the factor of each chosen expert's output
    scores_BTE: jax.Array  # s, the affinities


Route = Callable[..., Routing]
MOST_SUMMED = 2**23  # numbers that are multiplied for the logits of a decode step, up to which a GPU sums them faster
LEAST_LOGIT = -80.0  # of a softplus: below it float32 has no square root whose derivative is finite


def without_padding(routing: Routing, real_BT: jax.Array | None) -> Routing:
    """Returns the routing with padding (tokens not in `real_BT`) sent to no expert: it costs and counts nothing."""
    if real_BT is None:
        return routing
    none = routing.scores_BTE.shape[-1]
    return routing._replace(experts_BTK=jnp.where(real_BT[..., None], routing.experts_BTK, none))


class Router(nnx.Module):
    """Scores every expert and lets `route` choose: `route(logits_BTE, bias_E)`, without `bias_E` if not `biased`.

    Where the choice has been made already, `route` is given it as `experts_BTK`.
    """

    def __init__(self, d_model: int, n_experts: int, std: float, route: Route, *, biased: bool = True, rngs: nnx.Rngs):
        self.centroids_DE = param(rngs, (d_model, n_experts), ("embed", None), normal(std), role="router")
        self.bias_E = RouterBias(jnp.zeros((n_experts,), jnp.float32), axes=(None,)) if biased else None
        self.route = route

    @jax.named_scope("router")
    def __call__(
        self, x_BTD: jax.Array, experts_BTK: jax.Array | None = None, ids_BT: jax.Array | None = None
    ) -> Routing:
        """Routes each token, to `experts_BTK` if these are given; computed in float32 from `x_BTD` of any dtype."""
        logits_BTE, chosen = _logits(x_BTD, self.centroids_DE[...]), {}
        if experts_BTK is not None:  # padding may have been given none
            chosen["experts_BTK"] = jnp.minimum(experts_BTK.astype(jnp.int32), logits_BTE.shape[-1] - 1)
        if self.bias_E is None:
            return self.route(logits_BTE, **chosen)
        return self.route(logits_BTE, jax.lax.stop_gradient(self.bias_E[...]), **chosen)


class HashRouter(nnx.Module):
    """Sends each token to the experts that a table has for its id; `route(logits_BTE, experts_BTK=...)` weighs them.

    `experts_VK` is the released tid2eid. How that was made is not published; a fresh one has K different experts of
    each id, drawn evenly. No step changes it.
    """

    def __init__(
        self, vocab_size: int, d_model: int, n_experts: int, top_k: int, std: float, route: Route, *, rngs: nnx.Rngs
    ):
        self.centroids_DE = param(rngs, (d_model, n_experts), ("embed", None), normal(std), role="router")
        self.experts_VK = ExpertTable(random_table(next_key(rngs), vocab_size, n_experts, top_k), axes=(None, None))
        self.route = route

    @jax.named_scope("router")
    def __call__(self, x_BTD: jax.Array, experts_BTK: jax.Array | None, ids_BT: jax.Array) -> Routing:
        """Routes each token by its id, or to `experts_BTK` if these are given; ids below 0 are those of row 0."""
        logits_BTE = _logits(x_BTD, self.centroids_DE[...])
        if experts_BTK is None:
            experts_BTK = jnp.take(self.experts_VK[...], jnp.maximum(ids_BT, 0), axis=0)
        experts_BTK = jnp.minimum(experts_BTK.astype(jnp.int32), logits_BTE.shape[-1] - 1)
        return self.route(logits_BTE, experts_BTK=experts_BTK)


def random_table(key: jax.Array, vocab_size: int, n_experts: int, top_k: int) -> jax.Array:
    """experts_VK: K different experts of each token id, drawn evenly, int32."""
    return jax.lax.top_k(jax.random.uniform(key, (vocab_size, n_experts)), top_k)[1].astype(jnp.int32)


def _logits(x_BTD: jax.Array, centroids_DE: jax.Array) -> jax.Array:
    """u_t . e_i in float32.

    On a GPU of few tokens as sums, not as a product of matrices: that XLA would divide over all of the chip, where it
    waits for what runs beside it, while sums are one small kernel. (A CPU takes several times as long for sums.)
    """
    x_BTD = x_BTD.astype(jnp.float32)
    is_small = x_BTD.shape[1] <= 2 and x_BTD.size * centroids_DE.shape[1] <= MOST_SUMMED
    if is_small and jax.default_backend() == "gpu":
        return jnp.sum(x_BTD[:, :, None] * centroids_DE.T, axis=-1)
    return jnp.einsum("BTD,DE->BTE", x_BTD, centroids_DE, precision=jax.lax.Precision.HIGHEST)


def sigmoid_biased_topk(
    logits_BTE: jax.Array,
    bias_E: jax.Array,
    experts_BTK: jax.Array | None = None,
    *,
    top_k: int,
    n_groups: int,
    top_groups: int,
    scale: float,
) -> Routing:
    """V3's choice: sigmoid scores, bias for the choice only, groups by their two best, weights renormalised.

    The sizes are those of `layers.experts.ExpertsConfig`; groups are of consecutive experts, 1 for none. With
    `experts_BTK` these are chosen; their weights are those of the present scores, so that the router still learns.
    """
    scores_BTE = jax.nn.sigmoid(logits_BTE)  # eq. 15
    if experts_BTK is None:
        choice_BTE = jax.lax.stop_gradient(scores_BTE) + bias_E  # eq. 16
        _, experts_BTK = jax.lax.top_k(keep_best_groups(choice_BTE, n_groups, top_groups, n_best=2), top_k)
    return _renormalised(scores_BTE, experts_BTK, scale)


def softplus_topk(
    logits_BTE: jax.Array,
    bias_E: jax.Array | None = None,
    experts_BTK: jax.Array | None = None,
    *,
    top_k: int,
    scale: float,
) -> Routing:
    """V4's choice: scores sqrt(softplus(logit)), bias for the choice only, no groups, weights renormalised.

    Arguments as for `sigmoid_biased_topk`; a router with a table (`HashRouter`) gives no bias.
    Paper: V4 section 2.1.
    """
    scores_BTE = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_BTE, LEAST_LOGIT)))
    if experts_BTK is None:
        assert bias_E is not None
        _, experts_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE) + bias_E, top_k)
    return _renormalised(scores_BTE, experts_BTK, scale)


def _renormalised(scores_BTE: jax.Array, experts_BTK: jax.Array, scale: float) -> Routing:
    """The routing whose weights sum to `scale`."""
    chosen_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)  # eq. 14
    weights_BTK = scale * chosen_BTK / (jnp.sum(chosen_BTK, axis=-1, keepdims=True) + 1e-20)  # eq. 13
    return Routing(experts_BTK, weights_BTK, scores_BTE)


def softmax_topk(
    logits_BTE: jax.Array,
    experts_BTK: jax.Array | None = None,
    *,
    top_k: int,
    n_groups: int,
    top_groups: int,
    scale: float,
) -> Routing:
    """V2's choice: softmax scores, groups by their single best, weights as they are (not renormalised).

    Arguments as for `sigmoid_biased_topk`; a group is a device in V2, V2-Lite and DeepSeekMoE have none.
    Paper: V2 section 2.2.1, eqs. 20-22, and 2.2.2; DeepSeekMoE eqs. 9-11.
    """
    scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    if experts_BTK is None:
        choice_BTE = keep_best_groups(jax.lax.stop_gradient(scores_BTE), n_groups, top_groups, n_best=1)
        _, experts_BTK = jax.lax.top_k(choice_BTE, top_k)
    weights_BTK = scale * jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    return Routing(experts_BTK, weights_BTK, scores_BTE)


def keep_best_groups(choice_BTE: jax.Array, n_groups: int, top_groups: int, n_best: int) -> jax.Array:
    """`choice_BTE` with -inf for the experts outside the `top_groups` best groups (-inf, not 0: b may be negative).

    A group is as good as the sum of its `n_best` largest.
    """
    if top_groups == n_groups:
        return choice_BTE
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], n_groups, -1)
    best, _ = jax.lax.top_k(grouped, min(n_best, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best.sum(-1), top_groups)
    is_kept = jax.nn.one_hot(kept, n_groups, dtype=jnp.bool_).any(-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(choice_BTE.shape)


def expert_load(experts_BTK: jax.Array, n_experts: int) -> jax.Array:
    """Tokens that chose each expert: load_E, float32 (exact up to 2^24); padding (`without_padding`) chose none."""
    return jnp.bincount(experts_BTK.reshape(-1), length=n_experts).astype(jnp.float32)


def no_balance(routing: Routing, context: Context = WHOLE) -> dict[str, jax.Array]:
    """No loss, where the router does not choose (`HashRouter`)."""
    return {}


# Balance losses of each sequence by name, without their factors alpha; near 1 when a sequence is perfectly balanced.
# They are those of its text: padding (`without_padding`) changes none of them, and a sequence of padding has 0.
# Where sequences are divided (`Context`), what each device returns sums to that of the sequence: f is counted over all
# of it, and P is this device's share of the mean.
Balance = Callable[[Routing, Context], dict[str, jax.Array]]


def sequence_balance(routing: Routing, context: Context = WHOLE) -> dict[str, jax.Array]:
    """V3's only balance loss, of each sequence (eqs. 17-20); also DeepSeekMoE's and V2-Lite's."""
    f_BE, P_BE = _frequency_and_affinity(routing, context)
    return {"expert_balance": jnp.sum(f_BE * P_BE, axis=-1)}  # eq. 17


def grouped_balance(
    routing: Routing, context: Context = WHOLE, *, n_groups: int, top_groups: int
) -> dict[str, jax.Array]:
    """V2's three balance losses of each sequence.

    They ask for experts that are equally busy, for groups that are, and for groups that are sent equally many tokens.
    With D groups (devices), of which a token visits M at most, and G_i the experts of group i:

        expert_balance         sum_i f_i P_i                                                       (V2 eqs. 23-25)
        device_balance         sum_i f'_i P'_i,    f'_i = mean of f over G_i,  P'_i = sum of P over G_i   (eqs. 26-28)
        communication_balance  sum_i f''_i P''_i,  f''_i = D / (M T) * tokens sent to group i,  P'' = P'  (eqs. 29-31)

    Paper: V2 section 2.2.3.
    """
    f_BE, P_BE = _frequency_and_affinity(routing, context)
    f_BGX, P_BGX = (x.reshape(x.shape[0], n_groups, -1) for x in (f_BE, P_BE))
    P_BG = P_BGX.sum(-1)
    groups_BTK = routing.experts_BTK // f_BGX.shape[-1]
    sent_BG = context.total(jnp.sum(jax.nn.one_hot(groups_BTK, n_groups).max(axis=2), axis=1))
    sent_BG = sent_BG * (n_groups / (top_groups * _n_real(routing, context)))[:, None]
    return {
        "expert_balance": jnp.sum(f_BE * P_BE, axis=-1),
        "device_balance": jnp.sum(f_BGX.mean(-1) * P_BG, axis=-1),
        "communication_balance": jnp.sum(sent_BG * P_BG, axis=-1),
    }


def _frequency_and_affinity(routing: Routing, context: Context) -> tuple[jax.Array, jax.Array]:
    """f_i = E / (K T) * times expert i was chosen, and P_i = mean over the sequence of s'_i = s_i / sum_j s_j.

    The V3 report counts in f_i the k best of s alone; here, as in the released code, the experts that were really
    chosen (by s + b, within the best groups).
    """
    scores_BTE, experts_BTK = routing.scores_BTE, routing.experts_BTK
    n_experts, n_real_B = scores_BTE.shape[-1], _n_real(routing, context)
    counts_BE = jax.vmap(lambda chosen: jnp.bincount(chosen.reshape(-1), length=n_experts))(experts_BTK)
    counts_BE = context.total(counts_BE)
    f_BE = counts_BE * (n_experts / (n_real_B * experts_BTK.shape[2]))[:, None]  # eq. 18
    affinity_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)  # eq. 19
    P_BE = jnp.sum(jnp.where(_is_real(routing)[..., None], affinity_BTE, 0), axis=1) / n_real_B[:, None]  # eq. 20
    return f_BE, P_BE


def _is_real(routing: Routing) -> jax.Array:
    """Which tokens visit experts, bool [B, T]."""
    return routing.experts_BTK[..., 0] < routing.scores_BTE.shape[-1]


def _n_real(routing: Routing, context: Context) -> jax.Array:
    """T of each sequence: its tokens that are not padding, float32 [B]; 1 where there is none, to divide by."""
    return jnp.maximum(context.total(jnp.sum(_is_real(routing), axis=1)), 1).astype(jnp.float32)


def updated_bias(bias: jax.Array, load: jax.Array, rate: float | jax.Array) -> jax.Array:
    """b + gamma * sign(mean load - load), over the last axis (the experts)."""
    # Both sides times the number of experts: a mean is rounded, and then loads that are all alike would move the bias.
    return bias + rate * jnp.sign(jnp.sum(load, axis=-1, keepdims=True) - load.shape[-1] * load)


def max_violation(load: ArrayLike) -> jax.Array:
    """MaxVio = (max load - mean load) / mean load over the last axis: 0 when balanced, or when nothing was routed."""
    load = jnp.asarray(load)
    mean = jnp.mean(load, axis=-1)
    return jnp.where(mean > 0, (jnp.max(load, axis=-1) - mean) / jnp.where(mean > 0, mean, 1), 0)
