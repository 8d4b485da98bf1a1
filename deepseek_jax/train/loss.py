"""What is minimised: L = CE + lambda / D * sum_k CE_k(MTP) + sum_layers alpha . auxiliary losses.

    CE = sum_t w_t * -log p(target_t) / sum_t w_t        over the whole batch, whatever devices and micro-batches hold

A weight w goes with its target: 1 in pre-training; in fine-tuning 1 for the assistant's tokens and 0 for the others.
Multi-token prediction reads every token and learns those with a weight.

The cross-entropy never holds the logits of all tokens: it goes through them in chunks and, while a chunk's logits are
there, computes its share of the gradients as well, so that nothing is kept and nothing is computed twice.
Paper: V3 sections 2.1.2 (eqs. 17-20) and 2.2 (eqs. 24-25); V2 section 2.2.3 (three balance losses).
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.layers.block import Statistics
from deepseek_jax.layers.mtp import shift_left
from deepseek_jax.layers.tokens import Tokens

if TYPE_CHECKING:
    from deepseek_jax.data.pipeline import Batch

IGNORE = -1  # a target that is not there


def _chunks(h_MD: jax.Array, targets_M: jax.Array, weights_M: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    """The arrays cut to (chunks, chunk, …), filled up with ignored rows."""
    chunk = min(chunk, targets_M.shape[0])
    n_chunks = -(-targets_M.shape[0] // chunk)
    spare = n_chunks * chunk - targets_M.shape[0]
    h_MD = jnp.pad(h_MD, ((0, spare), (0, 0)))
    targets_M = jnp.pad(targets_M, (0, spare), constant_values=IGNORE)
    weights_M = jnp.pad(weights_M, (0, spare))
    return h_MD.reshape(n_chunks, chunk, -1), targets_M.reshape(n_chunks, chunk), weights_M.reshape(n_chunks, chunk)


def _chunk_loss(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, weights_M: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(summed loss, softmax probabilities_MV, weight of each row: 0 without a target) of one chunk."""
    logits_MV = jnp.einsum("MD,DV->MV", h_MD, weight_DV, preferred_element_type=jnp.float32)
    weights_M = jnp.where(targets_M != IGNORE, weights_M, 0.0)
    highest_M = jnp.max(logits_MV, axis=-1)
    shifted_MV = jnp.exp(logits_MV - highest_M[:, None])
    total_M = jnp.sum(shifted_MV, axis=-1)
    target_M = jnp.take_along_axis(logits_MV, jnp.maximum(targets_M, 0)[:, None], axis=-1)[:, 0]
    loss_M = jnp.where(weights_M != 0, weights_M * (jnp.log(total_M) + highest_M - target_M), 0.0)
    return jnp.sum(loss_M), shifted_MV / total_M[:, None], weights_M


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, weights_M: jax.Array, chunk: int
) -> jax.Array:
    """Sum over the tokens of w * -log softmax(h W)[target], in nats.

    Args:
        h_MD: hidden states, in the compute dtype.
        weight_DV: the output head (cast to the dtype of `h_MD`; products accumulated in float32).
        targets_M: ids to predict; -1 is left out of the sum.
        weights_M: w of each target, float32; a constant, to which no gradient flows.
        chunk: tokens whose logits exist at a time.

    Returns:
        A float32 scalar.
    """

    def body(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        h, targets, weights = part
        return total + _chunk_loss(h, weight_DV.astype(h.dtype), targets, weights)[0], None

    return jax.lax.scan(body, jnp.float32(0), _chunks(h_MD, targets_M, weights_M, chunk))[0]


def _forward(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, weights_M: jax.Array, chunk: int
) -> tuple[jax.Array, tuple]:
    weight = weight_DV.astype(h_MD.dtype)

    def body(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        (total, d_weight_DV), (h, targets, weights) = carry, part
        loss, probabilities_MV, weights = _chunk_loss(h, weight, targets, weights)
        is_target_MV = jnp.arange(weight.shape[1]) == targets[:, None]
        d_logits_MV = ((probabilities_MV - is_target_MV) * weights[:, None]).astype(h.dtype)
        d_h_MD = jnp.einsum("MV,DV->MD", d_logits_MV, weight)
        d_weight_DV += jnp.einsum("MD,MV->DV", h, d_logits_MV, preferred_element_type=jnp.float32)
        return (total + loss, d_weight_DV), d_h_MD

    start = (jnp.float32(0), jnp.zeros(weight_DV.shape, jnp.float32))
    (total, d_weight_DV), d_h = jax.lax.scan(body, start, _chunks(h_MD, targets_M, weights_M, chunk))
    d_h_MD = d_h.reshape(-1, h_MD.shape[1])[: h_MD.shape[0]]
    return total, (d_h_MD, d_weight_DV, jnp.zeros((0,), weight_DV.dtype))


def _backward(chunk: int, saved: tuple, g: jax.Array) -> tuple:
    d_h_MD, d_weight_DV, like = saved
    return (d_h_MD * g).astype(d_h_MD.dtype), (d_weight_DV * g).astype(like.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


class Weights(NamedTuple):
    """Factors of the loss parts at a step."""

    mtp: jax.Array | float  # lambda
    auxiliary: Mapping[str, float]  # alpha of each auxiliary loss


class Losses(NamedTuple):
    """Sums over this device's share of the batch, ready to be added up over devices and micro-batches.

    Attributes:
        main: weighted cross-entropy of the main model divided by the sum of the batch's weights, nats per token.
        mtp: the same of multi-token prediction, mean over the depths; 0 without any.
        auxiliary: by name, sums over the layers of the mean auxiliary losses of a sequence (without alpha).
        loads: tokens per expert of every router; where routers have biases, a prefix of the tree of those.
    """

    main: jax.Array
    mtp: jax.Array
    auxiliary: dict[str, jax.Array]
    loads: dict

    def weighted(self, weights: Weights) -> jax.Array:
        """The loss that is minimised.  Raises UserError for an auxiliary loss without a weight."""
        if missing := self.auxiliary.keys() - weights.auxiliary.keys():
            raise UserError(
                f"config.loss.auxiliary.{min(missing)}: missing, though the model has a loss of this name. Set its "
                "weight there; with 0.0 it is reported and not minimised."
            )
        by_name = sorted(self.auxiliary.items(), reverse=True)
        return self.main + weights.mtp * self.mtp + sum(weights.auxiliary[name] * loss for name, loss in by_name)


class Totals(NamedTuple):
    """What the losses of a part are divided by, so that those of all parts add up to means over the whole batch.

    Attributes:
        weight: sum of the weights of all targets, over all devices and micro-batches; float32.
        sequences: sequences that hold any text, likewise.
    """

    weight: jax.Array | float
    sequences: jax.Array | float


def totals(batch: "Batch") -> Totals:
    """The totals of a part of a batch, to be added up."""
    weight = jnp.sum(jnp.where(batch.targets_BT != IGNORE, batch.weights_BT, 0.0))
    return Totals(weight, jnp.sum(jnp.any(batch.segments_BT > 0, axis=1)).astype(jnp.float32))


def losses(model, batch: "Batch", over: Totals, weights: Weights, *, chunk: int, mask: bool):
    """The loss of a part of a batch.

    Args:
        model: a bound family model (`hidden`, `mtp_depths`, `head`).
        batch: this part.
        over: of the whole batch.
        weights: factors of the parts.
        chunk: tokens whose logits exist at a time.
        mask: whether attention stays inside documents.

    Returns:
        (loss to differentiate, `Losses`).
    """
    tokens = Tokens(batch.ids_BT, batch.positions_BT, batch.segments_BT if mask else None, batch.segments_BT > 0)
    weight_DV = model.head.weight_DV[...]

    def nll(h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        h_MD, targets_M, weights_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1)
        return cross_entropy(h_MD, weight_DV, targets_M, weights_M, chunk) / over.weight

    h_BTD, statistics = model.hidden(tokens)
    depths = model.mtp_depths(h_BTD, batch.targets_BT, tokens)
    main, mtp = nll(h_BTD, batch.targets_BT, batch.weights_BT), 0.0
    weights_BT = batch.weights_BT
    for depth in depths:
        weights_BT = shift_left(weights_BT, fill=0)  # a weight stays with its target
        mtp += nll(depth.h_BTD, depth.targets_BT, weights_BT) / len(depths)
    auxiliary = summed([*statistics.values(), *(depth.statistics for depth in depths)])
    auxiliary = {name: loss / over.sequences for name, loss in auxiliary.items()}
    result = Losses(main, jnp.asarray(mtp, jnp.float32), auxiliary, model.loads(statistics, depths))
    return result.weighted(weights), result


def summed(statistics: list[Statistics]) -> dict[str, jax.Array]:
    """The auxiliary losses of all layers, each summed under its name."""
    sums: dict[str, jax.Array] = {}
    for layers in statistics:
        for name, loss in layers.losses.items():
            sums[name] = sums.get(name, 0.0) + jnp.sum(loss)
    return sums
