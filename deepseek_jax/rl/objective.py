"""GRPO as the objective of a `Trainer`: the log-probabilities of drawn tokens, at the temperature of the draw."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.abstract_model import AHEAD
from deepseek_jax.data.pipeline import Array
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.rl.grpo import GRPO, Drawn, kept_log_softmax, objective, token_weights
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.train.cross_entropy import IGNORE, token_nll
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

    def __call__(self, model: Any, batch: Any, over: Totals, step: jax.Array) -> tuple[jax.Array, Losses]:
        """See `train.loss.Objective`; `Losses.auxiliary` are the figures of `grpo.Figures`."""
        _, hidden, found = stage_losses(model, batch, over, WHOLE, mask=False, routes=batch.routes)
        logp_BT = drawn_logp(hidden[0], model, batch, self.temperature, self.chunk)
        mask_BT = (batch.targets_BT != IGNORE).astype(jnp.float32)
        logps = (batch.sampled_logp_BT, batch.old_logp_BT, batch.reference_logp_BT)
        drawn = Drawn(mask_BT, *logps, batch.advantage_BT, batch.weights_BT)
        gain, figures = objective(self.grpo, logp_BT, drawn, batch.share_BT)
        return -gain, found._replace(main=-gain, auxiliary=figures._asdict())


def learnt(path: Path) -> bool:
    """Returns whether a weight is trained: not those of multi-token prediction, which would only decay."""
    return path[0] != AHEAD


def drawn_logp(h_BTD: jax.Array, model: Any, batch: Answers, temperature: float, chunk: int) -> jax.Array:
    """Returns log pi of each target at a temperature, over what it was drawn from, float32; 0 without a target.

    The logits of `chunk` tokens exist at a time.
    """
    weight_DV, targets_BT = model.head.weight_DV[...], batch.targets_BT
    h_MD, targets_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)
    if not batch.kept_BTV.shape[-1]:
        return -token_nll(h_MD, weight_DV, targets_M, chunk, temperature).reshape(targets_BT.shape)

    @jax.checkpoint
    def logp(of: tuple) -> jax.Array:
        h_D, target, kept_W = of
        logp_V = logp_of(h_D, weight_DV, kept_W, target, temperature)
        return jnp.where(target != IGNORE, logp_V[jnp.maximum(target, 0)], 0.0)

    kept_MW = batch.kept_BTV.reshape(len(targets_M), -1)
    return jax.lax.map(logp, (h_MD, targets_M, kept_MW), batch_size=chunk).reshape(targets_BT.shape)


def logp_of(
    h_D: jax.Array, weight_DV: jax.Array, kept_W: jax.Array, target: jax.Array, temperature: float
) -> jax.Array:
    """Returns logp_V of one place, float32: over what its target was drawn from, if that is known; -inf elsewhere."""
    logits_V = jnp.dot(h_D, weight_DV.astype(h_D.dtype), preferred_element_type=jnp.float32) / temperature
    if not len(kept_W):
        return jax.nn.log_softmax(logits_V)
    kept_V = jnp.unpackbits(kept_W, count=len(logits_V)) > 0
    return kept_log_softmax(logits_V, kept_V | (target == IGNORE))


class Measured(NamedTuple):
    """What a policy says of answers, float32."""

    logp_BT: Array  # of each target
    entropy_BT: Array  # at the temperature of the draw, over what a target is drawn from, nats


def measurer(temperature: float, chunk: int) -> Any:
    """Returns `measure(model, answers) -> Measured`."""

    def measure(model: Any, batch: Answers) -> Measured:
        tokens = Tokens(batch.ids_BT, batch.positions_BT, None, batch.segments_BT > 0)
        h_BTD, _ = model.hidden(tokens, batch.routes)
        logp_BT, weight_DV = drawn_logp(h_BTD, model, batch, temperature, chunk), model.head.weight_DV[...]

        def entropy(of: tuple) -> jax.Array:
            logp_V = logp_of(of[0], weight_DV, of[1], of[2], temperature)
            return -jnp.sum(jnp.where(logp_V > -jnp.inf, jnp.exp(logp_V) * logp_V, 0.0))

        rows = h_BTD, batch.kept_BTV, batch.targets_BT
        flat = jax.tree.map(lambda x: x.reshape(logp_BT.size, *x.shape[2:]), rows)
        return Measured(logp_BT, jax.lax.map(entropy, flat, batch_size=chunk).reshape(logp_BT.shape))

    return measure
