"""Group relative policy optimization as pure functions of arrays; what published systems set differently is in `GRPO`.

Of a group of answers to one question with rewards r_1 … r_G:

    A_i = r_i - mean r, or that divided by std r                                   DeepSeekMath section 4.1.2; V3.2
    J = sum_t w_t ( M_i min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) v_t - beta D_t )
    rho_t = pi(o_t) / pi_old(o_t)                                                  GSPO: of the whole answer
    D_t = pi_ref / pi - log(pi_ref / pi) - 1                                       k3, an estimate of KL(pi || pi_ref)
    D_t rho_t                                                                      V3.2 eq. 7: its gradient is unbiased
    M_i = 0 if A_i < 0 and mean_t log(pi_sampled / pi) > delta, otherwise 1        V3.2 eqs. 8, 9: off-policy answers
    v_t = min(pi_old / pi_sampled, cap)                                            truncated importance weights

pi_sampled are the probabilities with which tokens were drawn, pi_old the trainer's own before the update. The weights
w_t say how tokens are averaged (`token_weights`); their denominators are those of the whole batch, so a loss that is
summed over micro-batches and devices does not depend on how these divide it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError

ADVANTAGES = ("mean", "std")
AGGREGATIONS = ("token", "sequence", "constant")
RATIOS = ("token", "sequence")
EPSILON = 1e-4  # added to a group's standard deviation


@dataclass(frozen=True)
class GRPO:
    """What is maximised."""

    advantage: str  # mean: r - mean (V3.2, Dr. GRPO); std: divided by the standard deviation (DeepSeekMath, R1)
    aggregation: str  # how tokens are averaged, see `token_weights`
    ratio: str  # of each token, or of the whole sequence (GSPO)
    # clip_low, clip_high: how far the ratio counts below and above 1
    clip_low: float
    clip_high: float
    log_ratio_bound: float  # logarithms of ratios are clipped to this size before they are exponentiated
    beta: float  # weight of the KL divergence to the reference; 0: no reference is kept
    unbiased_kl: bool  # V3.2's form
    off_policy_bound: float  # delta, in nats; 0: no answer is left out
    importance_cap: float  # of pi_old / pi_sampled; 0: the weights are 1

    def __post_init__(self) -> None:
        for key, values in (("advantage", ADVANTAGES), ("aggregation", AGGREGATIONS), ("ratio", RATIOS)):
            if getattr(self, key) not in values:
                raise UserError(f"rl.grpo.{key}={getattr(self, key)!r}: expected one of {', '.join(values)}.")
        if self.ratio == "sequence" and self.aggregation != "sequence":
            raise UserError("rl.grpo.ratio=sequence (GSPO) averages sequences: set rl.grpo.aggregation=sequence.")


class Drawn(NamedTuple):
    """Answers as arrays, a token per column; float32. What stands where nothing was drawn does not matter."""

    mask_BT: jax.Array  # 1 where the answer has a token, its end mark included, otherwise 0
    sampled_logp_BT: jax.Array  # log-probability with which it was drawn
    old_logp_BT: jax.Array  # the trainer's, before the update
    reference_logp_BT: jax.Array  # the reference's
    advantage_BT: jax.Array  # of its answer
    weights_BT: jax.Array  # see `token_weights`


class Figures(NamedTuple):
    """What is reported, each a sum over tokens of their share; float32 scalars."""

    kl: jax.Array  # estimate of KL(pi || pi_ref), k3
    clipped_low: jax.Array  # share of tokens whose ratio is below the clip, and which the clip leaves out
    clipped_high: jax.Array
    off_policy: jax.Array  # share of tokens of answers that are left out
    ratio: jax.Array  # mean of pi / pi_old
    importance: jax.Array  # mean of pi_old / pi_sampled, as it is used


def advantages(rewards: Sequence[float | None], groups: Sequence, kind: str) -> np.ndarray:
    """Returns float64 A of each answer.

    Args:
        rewards: of each answer; None where nothing can be said: its A is 0, and the group's mean is without it.
        groups: of each answer, the key of its group, such as the number of its problem; in any order.
        kind: "mean" or "std", as in `GRPO`; the deviation is that of a sample, with G - 1.

    Answers of a group whose rewards are equal have exactly 0: rounding of the mean would otherwise be blown up by a
    deviation of nearly 0.
    """
    values = np.array([np.nan if reward is None else reward for reward in rewards], np.float64)
    found = np.zeros(len(values))
    rows_of: dict = {}
    for row, key in enumerate(groups):
        if np.isfinite(values[row]):
            rows_of.setdefault(key, []).append(row)
    for rows in rows_of.values():
        group = values[rows]
        if len(rows) < 2 or group.max() == group.min():
            continue
        found[rows] = group - group.mean()
        if kind == "std":
            found[rows] /= group.std(ddof=1) + EPSILON
    return found


def tied_share(rewards: Sequence[float | None], groups: Sequence) -> float:
    """Returns the share of groups without two different rewards, which nothing is learnt from."""
    by_group: dict = {}
    for reward, group in zip(rewards, groups, strict=True):
        by_group.setdefault(group, set()).add(reward)
    return sum(len(found - {None}) < 2 for found in by_group.values()) / max(len(by_group), 1)


def token_weights(mask_BT: np.ndarray, aggregation: str, longest: int) -> np.ndarray:
    """Returns float32 w_t of each token of a whole batch.

    token       1 / tokens of the batch (DAPO)
    sequence    1 / (tokens of its answer * answers): a mean of means (DeepSeekMath, R1)
    constant    1 / (longest * answers), where `longest` is the number of tokens that an answer may have (Dr. GRPO)

    An answer without tokens, such as one that could not be scored, does not count as one.
    """
    mask_BT = np.asarray(mask_BT, np.float64)
    length_B = mask_BT.sum(1)
    n_answers = max((length_B > 0).sum(), 1)
    if aggregation == "token":
        over_B = np.full(len(mask_BT), max(length_B.sum(), 1))
    elif aggregation == "sequence":
        over_B = np.maximum(length_B, 1) * n_answers
    else:
        over_B = np.full(len(mask_BT), longest * n_answers)
    return (mask_BT / over_B[:, None]).astype(np.float32)


def objective(c: GRPO, logp_BT: jax.Array, drawn: Drawn, share_BT: jax.Array) -> tuple[jax.Array, Figures]:
    """Returns (the sum J over these tokens, which is to be maximised, what is reported).

    Args:
        c: what is maximised.
        logp_BT: log pi of each token, float32; the gradient flows through it alone.
        drawn: the answers.
        share_BT: 1 / tokens of the whole batch at each token, 0 elsewhere: what figures are summed with.
    """
    mask_BT, A_BT = drawn.mask_BT, drawn.advantage_BT
    logp_BT, sampled_BT, old_BT, reference_BT = (
        jnp.where(mask_BT > 0, x_BT, 0.0)
        for x_BT in (logp_BT, drawn.sampled_logp_BT, drawn.old_logp_BT, drawn.reference_logp_BT)
    )
    ratio_BT = jnp.exp(log_ratio(c, logp_BT, old_BT, mask_BT))
    clipped_BT = jnp.clip(ratio_BT, 1 - c.clip_low, 1 + c.clip_high)
    gain_BT = jnp.minimum(ratio_BT * A_BT, clipped_BT * A_BT)
    kept_B = on_policy(c, logp_BT, sampled_BT, A_BT, mask_BT)
    importance_BT = importance(c, old_BT, sampled_BT)
    kl_BT = k3(logp_BT, reference_BT, c.log_ratio_bound)
    penalty_BT = kl_BT * jnp.exp(bounded(logp_BT - old_BT, c.log_ratio_bound)) if c.unbiased_kl else kl_BT  # V3.2 eq. 7
    each_BT = kept_B[:, None] * gain_BT * importance_BT  # V3.2 eq. 8
    if c.beta:
        each_BT -= c.beta * penalty_BT

    def mean(x_BT: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jnp.sum(x_BT * share_BT))

    figures = Figures(
        kl=mean(kl_BT),
        clipped_low=mean((ratio_BT < 1 - c.clip_low) & (A_BT < 0)),
        clipped_high=mean((ratio_BT > 1 + c.clip_high) & (A_BT > 0)),
        off_policy=mean(1.0 - jnp.broadcast_to(kept_B[:, None], mask_BT.shape)),
        ratio=mean(ratio_BT),
        importance=mean(importance_BT),
    )
    return jnp.sum(each_BT * drawn.weights_BT), figures


def bounded(log_ratio_BT: jax.Array, bound: float) -> jax.Array:
    """Returns logarithms of ratios clipped to ±`bound`, so that neither they nor their gradients overflow."""
    return jnp.clip(log_ratio_BT, -bound, bound)


def log_ratio(c: GRPO, logp_BT: jax.Array, old_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns log rho of each token; for GSPO the mean over its sequence."""
    found_BT = bounded(logp_BT - old_BT, c.log_ratio_bound)
    if c.ratio == "token":
        return found_BT
    mean_B = jnp.sum(found_BT * mask_BT, axis=1) / jnp.maximum(mask_BT.sum(1), 1)
    return jnp.broadcast_to(mean_B[:, None], found_BT.shape)


def k3(logp_BT: jax.Array, reference_BT: jax.Array, bound: float) -> jax.Array:
    """Returns r - log r - 1 with r = pi_ref / pi: at least 0, and unbiased for samples of pi."""
    d_BT = bounded(reference_BT - logp_BT, bound)
    return jnp.exp(d_BT) - d_BT - 1


def on_policy(c: GRPO, logp_BT: jax.Array, sampled_BT: jax.Array, A_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns M_B: 0 for answers that are worse than their group's mean and too unlikely by now; V3.2 eq. 9."""
    if not c.off_policy_bound:
        return jnp.ones(len(mask_BT), jnp.float32)
    length_B = jnp.maximum(mask_BT.sum(1), 1)
    away_B = jnp.sum((sampled_BT - jax.lax.stop_gradient(logp_BT)) * mask_BT, axis=1) / length_B
    is_worse_B = jnp.sum(A_BT * mask_BT, axis=1) < 0
    return 1.0 - (is_worse_B & (away_B > c.off_policy_bound)).astype(jnp.float32)  # V3.2 eq. 9


def importance(c: GRPO, old_BT: jax.Array, sampled_BT: jax.Array) -> jax.Array:
    """Returns v of each token."""
    if not c.importance_cap:
        return jnp.ones_like(old_BT)
    return jnp.minimum(jnp.exp(bounded(old_BT - sampled_BT, c.log_ratio_bound)), c.importance_cap)


def kept_log_softmax(logits_BTV: jax.Array, kept_BTV: jax.Array) -> jax.Array:
    """Returns log-probabilities over those tokens that a draw by top-p or top-k could have chosen; -inf for others.

    V3.2's Keep Sampling Mask: both policies are compared over the same part of the vocabulary.
    """
    return jax.nn.log_softmax(jnp.where(kept_BTV, logits_BTV, -jnp.inf))
