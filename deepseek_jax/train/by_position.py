"""Loss by position: how much tokens gain from what comes before them, and whether they still do far into a sequence.

    loss of a range of positions = sum of w -log p(target) over its targets / sum of their w

Ranges double, 0 to 15, 16 to 31, 32 to 63 and so on: where a model makes use of longer contexts the loss falls from
each to the next, and it rises where positions lie beyond those that it was trained on. Positions count from where
attention begins: the sequence, or the document if documents are masked.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.train.cross_entropy import token_nll
from deepseek_jax.train.loss import WHOLE, Totals, stage_losses

if TYPE_CHECKING:
    from deepseek_jax.data.pipeline import Batch

FIRST = 16  # positions of the first range


class Range(NamedTuple):
    """What is known of the targets at some positions."""

    # start, end: the positions, the last one not included
    start: int
    end: int
    weight: float  # sum of the weights of its targets: their number, in text
    nats: float  # per target
    bits_per_byte: float  # nan without any bytes, such as of end marks


def nll(model: Any, batch: "Batch", *, chunk: int, mask: bool) -> jax.Array:
    """Returns -log p(target) of every token, float32 nats [B, T]; 0 without a target.

    Args:
        model: bound, in its compute dtype, on one device.
        batch: tokens and targets.
        chunk: tokens whose logits exist at a time.
        mask: whether attention stays inside a document.
    """
    _, hidden, _ = stage_losses(model, batch, Totals(1.0, 1.0), WHOLE, mask=mask)
    h_MD = hidden[0].reshape(-1, hidden[0].shape[-1])
    return token_nll(h_MD, model.head.weight_DV[...], batch.targets_BT.reshape(-1), chunk).reshape(batch.ids_BT.shape)


class ByPosition:
    """Sums over the targets of each range of positions.

    Args:
        n_positions: tokens of the longest sequence.
        byte_lengths_V: UTF-8 bytes that each token id stands for.
    """

    def __init__(self, n_positions: int, byte_lengths_V: np.ndarray):
        self.edges = [0]
        while self.edges[-1] < n_positions:
            self.edges.append(min(max(2 * self.edges[-1], FIRST), n_positions))
        self._lengths_V, self._sums = np.asarray(byte_lengths_V), np.zeros((3, len(self.edges) - 1))

    def add(self, nll_BT: np.ndarray, batch: "Batch") -> None:
        """Adds the targets of a batch, whose losses are those of `nll`."""
        range_BT = np.searchsorted(self.edges, batch.positions_BT, side="right") - 1
        weights_BT = np.where(batch.targets_BT >= 0, batch.weights_BT, 0.0)
        bytes_BT = self._lengths_V[np.maximum(batch.targets_BT, 0)]
        for sums, value in zip(self._sums, (1.0, np.asarray(nll_BT, np.float64), bytes_BT), strict=True):
            sums += np.bincount(range_BT.reshape(-1), (weights_BT * value).reshape(-1), len(sums))

    def ranges(self) -> list[Range]:
        """Returns the ranges that have targets."""
        found = []
        for start, end, (weight, nats, n_bytes) in zip(self.edges, self.edges[1:], self._sums.T, strict=False):
            if weight:
                bits = nats / (n_bytes * math.log(2)) if n_bytes else math.nan
                found.append(Range(start, end, float(weight), float(nats / weight), float(bits)))
        return found
