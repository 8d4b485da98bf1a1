"""GRPO as the objective of a `Trainer`: the log-probabilities of drawn tokens, at the temperature of the draw."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.pipeline import Array
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.rl.grpo import GRPO, Drawn, kept_log_softmax, objective, token_weights
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.train.cross_entropy import IGNORE, token_nll
from deepseek_jax.train.loss import WHOLE, Losses, Totals, stage_losses


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
    )


def part(found: Answers, rows: np.ndarray, aggregation: str, longest: int) -> Answers:
    """Returns some rows as the batch of an update, with the weights of their targets."""
    chosen = Answers(*(column[rows] for column in found))
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
        _, hidden, found = stage_losses(model, batch, over, WHOLE, mask=False)
        logp_BT = drawn_logp(hidden[0], model, batch, self.temperature, self.chunk)
        mask_BT = (batch.targets_BT != IGNORE).astype(jnp.float32)
        logps = (batch.sampled_logp_BT, batch.old_logp_BT, batch.reference_logp_BT)
        drawn = Drawn(mask_BT, *logps, batch.advantage_BT, batch.weights_BT)
        gain, figures = objective(self.grpo, logp_BT, drawn, batch.share_BT)
        return -gain, found._replace(main=-gain, auxiliary=figures._asdict())


def drawn_logp(h_BTD: jax.Array, model: Any, batch: Answers, temperature: float, chunk: int) -> jax.Array:
    """Returns log pi of each target at a temperature, over what it was drawn from, float32; 0 without a target.

    Where that is the whole vocabulary, the logits of `chunk` tokens exist at a time, otherwise all of them.
    """
    targets_BT = batch.targets_BT
    if batch.kept_BTV.shape[-1]:
        logits_BTV, is_target_BT = model.head(h_BTD) / temperature, targets_BT != IGNORE
        kept_BTV = jnp.unpackbits(batch.kept_BTV, axis=-1, count=logits_BTV.shape[-1]) > 0
        logp_BTV = kept_log_softmax(logits_BTV, kept_BTV | ~is_target_BT[..., None])
        logp_BT = jnp.take_along_axis(logp_BTV, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(is_target_BT, logp_BT, 0.0)
    h_MD, targets_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)
    return -token_nll(h_MD, model.head.weight_DV[...], targets_M, chunk, temperature).reshape(targets_BT.shape)


class Measured(NamedTuple):
    """What a policy says of answers, float32."""

    logp_BT: Array  # of each target
    entropy_BT: Array  # at the temperature of the draw, over the whole vocabulary, nats


def measurer(temperature: float, chunk: int) -> Any:
    """Returns `measure(model, answers) -> Measured`."""

    def measure(model: Any, batch: Answers) -> Measured:
        tokens = Tokens(batch.ids_BT, batch.positions_BT, None, batch.segments_BT > 0)
        h_BTD, _ = model.hidden(tokens)
        logp_BT = drawn_logp(h_BTD, model, batch, temperature, chunk)
        weight_DV = model.head.weight_DV[...].astype(h_BTD.dtype)

        def entropy(h_D: jax.Array) -> jax.Array:
            logp_V = jax.nn.log_softmax(jnp.dot(h_D, weight_DV, preferred_element_type=jnp.float32) / temperature)
            return -jnp.sum(jnp.exp(logp_V) * logp_V)

        entropy_M = jax.lax.map(entropy, h_BTD.reshape(-1, h_BTD.shape[-1]), batch_size=chunk)
        return Measured(logp_BT, entropy_M.reshape(logp_BT.shape))

    return measure
