"""Fill-in-the-middle: a document is cut into three parts, written as prefix, suffix, middle.

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>            (V3 section 4.1, the PSM order)

It applies to whole documents before packing, so it costs three tokens and nothing else. The cuts are between tokens; a
cut inside a token, as at a user's cursor, never occurs in training (with bytes there is none).
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.data.blocks import Numbers
from deepseek_jax.data.noise import CHOOSE, CUT, noise

EXTRA_TOKENS = 3  # tokens that FIM adds to a document


class FimTokens(NamedTuple):
    """Ids of the three special tokens."""

    begin: int
    hole: int
    end: int


def n_chosen(n_documents: int, rate: float) -> int:
    """Returns how many documents of an epoch become FIM: the same number in each, so that all are equally long."""
    return round(rate * n_documents)


def choose(n_documents: int, rate: float, seed: int, epoch: int) -> np.ndarray:
    """Returns whether each document becomes FIM in this epoch."""
    chosen = np.zeros(n_documents, bool)
    lottery = noise(seed, epoch, CHOOSE, at=np.arange(n_documents))
    chosen[np.argsort(lottery, kind="stable")[: n_chosen(n_documents, rate)]] = True
    return chosen


def rearrange(
    tokens: np.ndarray | Numbers, marks: FimTokens, seed: int, epoch: int, document: int
) -> list[np.ndarray | Numbers]:
    """Returns the parts of a FIM document in order; the parts of the text are views, nothing is copied.

    Both cuts are uniform over the `len(tokens) + 1` places, so any of the three parts may be empty.
    """
    cuts = noise(seed, epoch, CUT, document, at=np.arange(2)) % np.uint64(len(tokens) + 1)
    low, high = sorted(int(cut) for cut in cuts)
    begin, hole, end = (np.array([mark]) for mark in marks)
    return [begin, tokens[:low], hole, tokens[high:], end, tokens[low:high]]
