"""GRPO as the objective of a `Trainer`: the log-probabilities of drawn tokens, at the temperature of the draw."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.abstract_model import AHEAD
from deepseek_jax.data.pipeline import Array
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.rl.grpo import GRPO, Drawn, kept_log_softmax, objective, token_weights
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.train.cross_entropy import IGNORE, token_figures
from deepseek_jax.train.loss import WHOLE, Losses, Totals, stage_losses
from deepseek_jax.train.trainable import Path


class Answers(NamedTuple):
    """Rollouts as a `Trainer` reads them: the fields of a `Batch`, and what is known of each target.

    A target is a token that was drawn; -1 where none was, and everywhere in answers that could not be scored.
    """

    ids_BT: Array
    targets_BT: Array
    segments_BT: Array
    positions_BT: Array
    weights_BT: Array  # of each target in the objective (`grpo.token_weights`)
    share_BT: Array  # 1 / targets of the batch, at each
    sampled_logp_BT: Array
    old_logp_BT: Array
    measured_B1: Array  # whether this is known; otherwise the policy of the update is the one before it, bool
    reference_logp_BT: Array
    advantage_BT: Array
    kept_BTV: Array  # what each target was drawn from, as `Rollouts` has it
    routes: dict[str, Array]  # the experts that each token visits, likewise


def answers(rollouts: Rollouts, length_B1: np.ndarray, is_scored_B: np.ndarray) -> Answers:
    """Returns rollouts, arrays of the host, as answers; those fields that are not known yet are 0."""
    length_B1, column_T = np.asarray(length_B1), np.arange(rollouts.ids_BT.shape[1])
    end_B1 = length_B1 + rollouts.n_drawn_B1
    is_drawn_BT = (column_T >= length_B1) & (column_T < end_B1) & is_scored_B[:, None]
    targets_BT = np.where(is_drawn_BT, rollouts.ids_BT, IGNORE)[:, 1:].astype(np.int32)
    zeros_BT = np.zeros(targets_BT.shape, np.float32)
    return Answers(
        ids_BT=rollouts.ids_BT[:, :-1],
        targets_BT=targets_BT,
        segments_BT=(column_T < end_B1)[:, :-1].astype(np.int32),
        positions_BT=np.broadcast_to(column_T[:-1].astype(np.int32), targets_BT.shape),
        weights_BT=zeros_BT,
        share_BT=zeros_BT,
        sampled_logp_BT=np.where(is_drawn_BT, rollouts.logp_BT, 0.0)[:, 1:].astype(np.float32),
        old_logp_BT=zeros_BT,
        measured_B1=np.ones((len(targets_BT), 1), bool),
        reference_logp_BT=zeros_BT,
        advantage_BT=zeros_BT,
        kept_BTV=rollouts.kept_BTV[:, 1:],
        routes={name: found_BTLK[:, :-1] for name, found_BTLK in rollouts.routes.items()},
    )


def part(found: Answers, rows: np.ndarray, aggregation: str, longest: int) -> Answers:
    """Returns some rows as the batch of an update, with the weights of their targets."""
    chosen = jax.tree.map(lambda column: column[rows], found)
    mask_BT = chosen.targets_BT != IGNORE
    shares_BT = token_weights(mask_BT, "token", longest)
    return chosen._replace(weights_BT=token_weights(mask_BT, aggregation, longest), share_BT=shares_BT)


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of an update; see `train.loss.Objective`. It has no stages: a pipeline cannot run it."""

    grpo: GRPO
    temperature: float  # at which the answers were drawn
    chunk: int  # tokens whose logits exist at a time
    # `config.loss.auxiliary`, of which the losses of indexers are minimised too: an indexer learns by nothing else
    auxiliary: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, model: Any, batch: Any, over: Totals, step: jax.Array) -> tuple[jax.Array, Losses]:
        """See `train.loss.Objective`.

        `Losses.auxiliary` are the figures of `grpo.Figures` and `figures_before`, and the losses of indexers.
        """
        _, hidden, found = stage_losses(model, batch, over, WHOLE, mask=False, routes=batch.routes)
        logp_BT, entropy_BT = judged_tokens(hidden[0], model, batch, self.temperature, self.chunk)
        mask_BT = (batch.targets_BT != IGNORE).astype(jnp.float32)
        old_BT = jnp.where(batch.measured_B1, batch.old_logp_BT, jax.lax.stop_gradient(logp_BT))
        logps = (batch.sampled_logp_BT, old_BT, batch.reference_logp_BT)
        drawn = Drawn(mask_BT, *logps, batch.advantage_BT, batch.weights_BT)
        gain, figures = objective(self.grpo, logp_BT, drawn, batch.share_BT)
        before = figures_before(batch, jax.lax.stop_gradient(logp_BT), entropy_BT)
        indexers = found._replace(main=-gain, auxiliary=of_indexers(found.auxiliary))
        loss = indexers.weighted(0.0, of_indexers(self.auxiliary))
        means = figures._asdict() | before | indexers.auxiliary
        return loss, indexers._replace(auxiliary=means, largest={"gap": largest_gap(batch, logp_BT)})


def of_indexers(auxiliary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a model's auxiliary losses, or of their weights, that its indexers report (`SparseMLA`)."""
    return {name: value for name, value in auxiliary.items() if name.startswith("index_")}


def figures_before(batch: Answers, logp_BT: jax.Array, entropy_BT: jax.Array) -> dict[str, jax.Array]:
    """Returns means of a policy that has not been updated: `before_updates` says what each is."""
    means = {"entropy": entropy_BT, "gap_mean": gaps(batch, logp_BT)}
    return {name: jnp.sum(x_BT * batch.share_BT) for name, x_BT in means.items()}


def gaps(batch: Answers, logp_BT: jax.Array) -> jax.Array:
    """Returns how far log-probabilities of the targets are from those of the draw."""
    return jnp.where(batch.targets_BT != IGNORE, jnp.abs(logp_BT - batch.sampled_logp_BT), 0.0)


def largest_gap(batch: Answers, logp_BT: jax.Array) -> jax.Array:
    """Returns the largest of `gaps`."""
    return jnp.max(gaps(batch, jax.lax.stop_gradient(logp_BT)))


def learnt(path: Path) -> bool:
    """Returns whether a weight is trained: not those of multi-token prediction, which would only decay."""
    return path[0] != AHEAD


class Measured(NamedTuple):
    """What a policy says of answers, float32."""

    logp_BT: Array  # of each target
    entropy_BT: Array  # at the temperature of the draw, over what a target is drawn from, nats


def judged_tokens(h_BTD: jax.Array, model: Any, batch: Answers, temperature: float, chunk: int) -> Measured:
    """Returns log pi of each target at a temperature, over what it was drawn from, 0 without one; and the entropy.

    The logits of `chunk` tokens exist at a time. No gradient flows through the entropy.
    """
    weight_DV, targets_BT = model.head.weight_DV[...], batch.targets_BT
    h_MD, targets_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)
    if not batch.kept_BTV.shape[-1]:
        nll_M, entropy_M = token_figures(h_MD, weight_DV, targets_M, chunk, temperature)
        return Measured(-nll_M.reshape(targets_BT.shape), entropy_M.reshape(targets_BT.shape))

    @jax.checkpoint
    def one(of: tuple) -> Measured:
        h_D, target, kept_W = of
        logp_V = logp_of(h_D, weight_DV, kept_W, target, temperature)
        own_V = jax.lax.stop_gradient(logp_V)
        entropy = -jnp.sum(jnp.where(own_V > -jnp.inf, jnp.exp(own_V) * own_V, 0.0))
        return Measured(jnp.where(target != IGNORE, logp_V[jnp.maximum(target, 0)], 0.0), entropy)

    found = jax.lax.map(one, (h_MD, targets_M, batch.kept_BTV.reshape(len(targets_M), -1)), batch_size=chunk)
    return Measured(*(each_M.reshape(targets_BT.shape) for each_M in found))


def logp_of(
    h_D: jax.Array, weight_DV: jax.Array, kept_W: jax.Array, target: jax.Array, temperature: float
) -> jax.Array:
    """Returns logp_V of one place, float32: over what its target was drawn from; -inf elsewhere."""
    logits_V = jnp.dot(h_D, weight_DV.astype(h_D.dtype), preferred_element_type=jnp.float32) / temperature
    kept_V = jnp.unpackbits(kept_W, count=len(logits_V)) > 0
    return kept_log_softmax(logits_V, kept_V | (target == IGNORE))


def measurer(temperature: float, chunk: int) -> Any:
    """Returns `measure(model, answers) -> Measured`."""

    def measure(model: Any, batch: Answers) -> Measured:
        tokens = Tokens(batch.ids_BT, batch.positions_BT, None, batch.segments_BT > 0)
        h_BTD, _ = model.hidden(tokens, batch.routes)
        return judged_tokens(h_BTD, model, batch, temperature, chunk)

    return measure
