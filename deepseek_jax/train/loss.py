"""What is minimised: L = CE + lambda / D * sum_k CE_k(MTP) + sum_layers alpha . auxiliary losses.

    CE = sum_t w_t * -log p(target_t) / sum_t w_t        over the whole batch, whatever devices and micro-batches hold

A weight w goes with its target: 1 in pre-training; in fine-tuning 1 for the assistant's tokens and 0 for the others.
Multi-token prediction reads every token and learns those with a weight.

`PreTraining` is the objective of pre-training and, with the weights of conversations, of fine-tuning. What a `Trainer`
minimises is an argument: any other `Objective` may take its place.
Paper: V3 sections 2.1.2 (eqs. 17-20) and 2.2 (eqs. 24-25); V2 section 2.2.3 (three balance losses).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution
from deepseek_jax.layers.block import Statistics
from deepseek_jax.layers.decoder import NO_ROUTES, Depth, Part, Routes
from deepseek_jax.layers.mtp import ahead, shift_left
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.alltoall import Sent, added, nothing_sent
from deepseek_jax.parallel.context import CONTEXT, Context
from deepseek_jax.parallel.mesh import REPLICAS, SEQUENCES, maximum, total
from deepseek_jax.train.cross_entropy import IGNORE

if TYPE_CHECKING:
    from deepseek_jax.data.pipeline import Batch


class Losses(NamedTuple):
    """Sums over this device's share of the batch, ready to be added up over devices and micro-batches (`together`)."""

    # weighted cross-entropy of the main model divided by the sum of the batch's weights, nats per token
    main: jax.Array
    mtp: jax.Array  # the same of multi-token prediction, mean over the depths; 0 without any
    # by name, sums over the layers of the mean auxiliary losses of a sequence (without alpha)
    auxiliary: dict[str, jax.Array]
    loads: dict  # tokens per expert of every router; where routers have biases, a prefix of the tree of those
    # what the exchanges with experts on other devices report (`alltoall.nothing_sent` without any): a pipeline reads
    # from it whether the step has to be run again
    sent: Sent
    largest: dict[str, jax.Array]  # by name, 0 or more: of devices and micro-batches the largest is reported

    def weighted(self, mtp: jax.Array | float, auxiliary: Mapping[str, float], *, is_part: bool = False) -> jax.Array:
        """The loss that is minimised: lambda is `mtp`, and alpha of each auxiliary loss, by name, in `auxiliary`.

        A part of a model, such as a pipeline's stage, need not have all of these losses.
        """
        if is_part:
            auxiliary = {name: weight for name, weight in auxiliary.items() if name in self.auxiliary}
        if idle := [name for name in auxiliary.keys() - self.auxiliary.keys() if auxiliary[name]]:
            names = ", ".join(sorted(self.auxiliary)) or "none"
            raise UserError(
                f"config.loss.auxiliary.{min(idle)}={auxiliary[min(idle)]}: no layer of this model reports a loss of "
                f"this name. Its losses: {names}. Set the weight to 0.0."
            )
        if missing := self.auxiliary.keys() - auxiliary.keys():
            raise UserError(
                f"config.loss.auxiliary.{min(missing)}: missing, though the model has a loss of this name. Set its "
                "weight there; with 0.0 it is reported and not minimised."
            )
        by_name = sorted(self.auxiliary.items(), reverse=True)
        return self.main + mtp * self.mtp + sum(auxiliary[name] * loss for name, loss in by_name)


def together(one: Losses, other: Losses) -> Losses:
    """Returns what two parts of a batch have together."""
    sums = jax.tree.map(jnp.add, one._replace(largest={}), other._replace(largest={}))
    return sums._replace(largest=jax.tree.map(jnp.maximum, one.largest, other.largest))


def over_devices(loss: jax.Array, found: Losses) -> tuple[jax.Array, Losses]:
    """Returns what all devices have together; inside `mesh.per_device`."""
    most = jax.tree.map(maximum, found.largest)
    loss, found = total((loss, found._replace(largest={})))
    return loss, found._replace(largest=most)


class Totals(NamedTuple):
    """What the losses of a part are divided by, so that those of all parts add up to means over the whole batch."""

    weight: jax.Array | float  # sum of the weights of all targets, over all devices and micro-batches; float32
    sequences: jax.Array | float  # sequences that hold any text, likewise


def totals(batch: "Batch") -> Totals:
    """The totals of whole sequences of a batch, to be added up."""
    weight = jnp.sum(jnp.where(batch.targets_BT != IGNORE, batch.weights_BT, 0.0))
    return Totals(weight, jnp.sum(jnp.any(batch.segments_BT > 0, axis=1)).astype(jnp.float32))


def step_totals(batch: "Batch") -> Totals:
    """The totals over all devices, from a device's share of a batch; inside `mesh.per_device`.

    A sequence that is divided over devices counts once, and if only one of them holds text of it.
    """
    holds_text_B = total(jnp.sum(batch.segments_BT > 0, axis=1), (CONTEXT,)) > 0
    sequences = total(jnp.sum(holds_text_B).astype(jnp.float32), SEQUENCES)
    return Totals(total(totals(batch).weight, REPLICAS), sequences)


class Stage(NamedTuple):
    """What runs of a model in one stage of a pipeline: some layers, and after the last ones the final norm and MTP."""

    ends: bool  # whether it ends with what the head reads
    part: Part | None  # its layers; None: all


WHOLE = Stage(True, None)
# nll(h_BTD, targets_BT, weights_BT): the sum of w * -log p(target), as `train.cross_entropy`
CrossEntropy = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Objective(Protocol):
    """What a `Trainer` minimises."""

    def __call__(self, model: Any, batch: "Batch", over: Totals, step: jax.Array) -> tuple[jax.Array, Losses]:
        """The loss of a part of a batch.

        Args:
            model: bound (`Trainer.bind`), in its compute dtype.
            batch: this part, one device's share of a micro-batch.
            over: totals of the whole batch: what a mean over it divides by.
            step: int32, for factors that follow a schedule.

        Returns (loss to differentiate, what is reported of it): the sum over all parts is that of the step.
        """

    def stage(
        self,
        model: Any,
        batch: "Batch",
        over: Totals,
        step: jax.Array,
        stage: Stage,
        x_BTD: jax.Array,
        x_KBTD: Sequence[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array], jax.Array, Losses]:
        """What one stage of a pipeline adds to `__call__`, without the head.

        `x_BTD` is the embedding or comes from the stage before; `x_KBTD` are the embeddings that the depths of
        multi-token prediction read. Returns (x_BTD for the stage after, what the head reads where the stage ends with
        it, loss, what is reported of it): with those of `head`, the sums over the stages are those of `__call__`.
        """

    def head(
        self,
        hidden: Sequence[jax.Array],
        weight_DV: jax.Array,
        run: Execution,
        batch: "Batch",
        over: Totals,
        step: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the head adds to `__call__`: (loss, `Losses.main`, `Losses.mtp`).

        `hidden` is from `stage`; `weight_DV` are the columns of the head that are here (`run.vocabulary`). All ranks
        of the pipeline call it with the same `hidden`, and the loss that each returns is the whole one.
        """

    def nats(self, model: Any, batch: "Batch") -> jax.Array:
        """Sum over the targets of w * -log p(target), main model alone: how held-out text is judged."""


@dataclass(frozen=True)
class PreTraining:
    """The objective of the reports."""

    chunk: int  # tokens whose logits exist at a time
    mask_documents: bool  # whether attention stays inside a document
    # mtp_weight, mtp_weight_final, mtp_weight_switch: lambda before and from the step of the switch
    mtp_weight: float
    mtp_weight_final: float
    mtp_weight_switch: int
    auxiliary: Mapping[str, float]  # alpha of each auxiliary loss, by its name

    def __call__(self, model: Any, batch: "Batch", over: Totals, step: jax.Array) -> tuple[jax.Array, Losses]:
        """See `Objective`."""
        found = losses(model, batch, over, chunk=self.chunk, mask=self.mask_documents)
        return found.weighted(self._mtp_weight(step), self.auxiliary), found

    def stage(
        self,
        model: Any,
        batch: "Batch",
        over: Totals,
        step: jax.Array,
        stage: Stage,
        x_BTD: jax.Array,
        x_KBTD: Sequence[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array], jax.Array, Losses]:
        """See `Objective`."""
        x_BTD, hidden, found = stage_losses(model, batch, over, stage, x_BTD, x_KBTD, mask=self.mask_documents)
        return x_BTD, hidden, found.weighted(0.0, self.auxiliary, is_part=True), found

    def head(
        self,
        hidden: Sequence[jax.Array],
        weight_DV: jax.Array,
        run: Execution,
        batch: "Batch",
        over: Totals,
        step: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `Objective`."""
        main, mtp = predicted(hidden, cross_entropy_of(run, weight_DV, self.chunk), batch, over, run.context)
        return main + self._mtp_weight(step) * mtp, main, mtp

    def nats(self, model: Any, batch: "Batch") -> jax.Array:
        """See `Objective`."""
        return losses(model, batch, Totals(1.0, 1.0), chunk=self.chunk, mask=self.mask_documents).main

    def _mtp_weight(self, step: jax.Array) -> jax.Array:
        return jnp.where(step < self.mtp_weight_switch, self.mtp_weight, self.mtp_weight_final)


def losses(model: Any, batch: "Batch", over: Totals, *, chunk: int, mask: bool, routes: Routes = NO_ROUTES) -> Losses:
    """The losses of a part of a batch; arguments as for `Objective`, `PreTraining` and `stage_losses`."""
    _, hidden, found = stage_losses(model, batch, over, WHOLE, mask=mask, routes=routes)
    nll = cross_entropy_of(model.run, model.head.weight_DV[...], chunk)
    main, mtp = predicted(hidden, nll, batch, over, model.run.context)
    return found._replace(main=main, mtp=mtp)


def tokens_of(batch: "Batch", *, mask: bool) -> Tokens:
    """A batch as the layers take it; with `mask` attention stays inside a document."""
    return Tokens(batch.ids_BT, batch.positions_BT, batch.segments_BT if mask else None, batch.segments_BT > 0)


def stage_losses(
    model: Any,
    batch: "Batch",
    over: Totals,
    stage: Stage,
    x_BTD: jax.Array | None = None,
    x_KBTD: Sequence[jax.Array] | None = None,
    *,
    mask: bool,
    routes: Routes = NO_ROUTES,
) -> tuple[jax.Array, list[jax.Array], Losses]:
    """(x_BTD after the last block, what the head reads, the losses of a stage but for the head's).

    Arguments as for `Objective`; embeddings that are not given are looked up. `routes` is as in `Decoder.run_blocks`.
    """
    tokens = tokens_of(batch, mask=mask)
    x_BTD = model.begin(model.embed(tokens)) if x_BTD is None else x_BTD
    x_BTD, statistics = model.run_blocks(x_BTD, tokens, part=stage.part, routes=routes)
    depths: list[Depth] = []
    hidden: list[jax.Array] = []
    if stage.ends:
        h_BTD = model.finish(x_BTD)
        depths = model.mtp_depths(model.ahead_of(x_BTD, h_BTD), batch.targets_BT, tokens, x_KBTD)
        hidden = [h_BTD, *(depth.h_BTD for depth in depths)]
    found = [*statistics.values(), *(depth.statistics for depth in depths)]
    auxiliary = {name: loss / over.sequences for name, loss in summed(found).items()}
    nothing = jnp.float32(0)
    return x_BTD, hidden, Losses(nothing, nothing, auxiliary, model.loads(statistics, depths), exchanged(found), {})


def cross_entropy_of(run: Execution, weight_DV: jax.Array, chunk: int) -> CrossEntropy:
    """Returns the cross-entropy of hidden states with a head, of which `run.vocabulary` says what is here."""
    cross_entropy = run.kernels["cross_entropy"]

    @jax.named_scope("loss")
    def nll(h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        h_MD, targets_M, weights_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1)
        return cross_entropy(h_MD, weight_DV, targets_M, weights_M, chunk, run.vocabulary)

    return nll


def predicted(
    hidden: Sequence[jax.Array], nll: CrossEntropy, batch: "Batch", over: Totals, context: Context
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of the main model and that of multi-token prediction, from what the head reads."""
    h_BTD, *depths = hidden
    main, mtp = nll(h_BTD, batch.targets_BT, batch.weights_BT) / over.weight, jnp.float32(0)
    weights_BT = batch.weights_BT
    for h_BTD, targets_BT in zip(depths, ahead(batch.targets_BT, len(depths) + 1, context)[1:], strict=True):
        weights_BT = shift_left(weights_BT, fill=0, context=context)  # a weight stays with its target
        nll_of_depth = nll(h_BTD, targets_BT, weights_BT) / over.weight  # eq. 24
        mtp += nll_of_depth / len(depths)  # eq. 25, but for lambda
    return main, mtp


def summed(statistics: list[Statistics]) -> dict[str, jax.Array]:
    """The auxiliary losses of all layers, each summed under its name."""
    sums: dict[str, jax.Array] = {}
    for layers in statistics:
        for name, loss in layers.losses.items():
            sums[name] = sums.get(name, 0.0) + jnp.sum(loss)
    return sums


def exchanged(statistics: list[Statistics]) -> Sent:
    """What the exchanges of all layers report."""

    def of_all(stacked: jax.Array, one: jax.Array) -> jax.Array:
        return jnp.sum(stacked.reshape(-1, *one.shape), axis=0)

    return added([jax.tree.map(of_all, found.sent, nothing_sent()) for found in statistics if found.sent])
