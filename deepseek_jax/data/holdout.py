"""The text held out for evaluation: whole documents with a small hash, or the ends of a few long documents.

The choice depends only on the texts, so it is the same on every machine, for every seed and any order of the files. Two
copies of a whole document are never on different sides. If whole documents would hold out a share far from the rate
(one text file, three books), each document is cut instead: the fraction `rate` of its tokens at the end is held out,
and the rest is trained on.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import UserError

FAR = 8  # largest ratio between the odds of being held out and those of the rate, either way


class Pieces(NamedTuple):
    """Parts of documents: positions of the documents in a store, first token and end of each part; int64."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """The tokens per part."""
        return self.stops - self.starts


def whole(documents: np.ndarray, lengths: np.ndarray) -> Pieces:
    """Returns whole documents as pieces."""
    stops = lengths[documents]
    return Pieces(documents, np.zeros_like(stops), stops)


def divide(hashes: np.ndarray, lengths: np.ndarray, n_bytes: np.ndarray, rate: float) -> tuple[Pieces, Pieces]:
    """Returns the (training, held-out) sides of a corpus, each in the order of the documents' hashes.

    `hashes` (uint64), `lengths` and `n_bytes` are the hash of the text, tokens and bytes of UTF-8 of each document;
    `rate` is the share of the text to hold out. Raises UserError if there is too little text to hold out any.
    """
    by_hash = np.argsort(hashes, kind="stable")
    chosen = held_out(hashes, rate)
    if rate == 0 or _is_near(n_bytes[chosen].sum() / n_bytes.sum(), rate):
        chosen = chosen[by_hash]
        return whole(by_hash[~chosen], lengths), whole(by_hash[chosen], lengths)
    stops = lengths[by_hash]
    cuts = stops - (stops * rate).astype(np.int64)
    if (cuts == stops).all():
        raise UserError(
            f"the text is too short to hold out data.holdout_rate = {rate} of it ({len(hashes)} documents, the longest "
            f"of {lengths.max()} tokens). Give more text, or set data.holdout_rate to 0 to train without evaluation."
        )
    is_cut = cuts < stops
    return Pieces(by_hash, np.zeros_like(cuts), cuts), Pieces(by_hash[is_cut], cuts[is_cut], stops[is_cut])


def held_out(hashes: np.ndarray, rate: float) -> np.ndarray:
    """Returns whether each document is held out, if whole documents are.

    About the fraction `rate` of the documents is, and at least one unless the rate is 0.
    """
    chosen = has_small_hash(hashes, rate)
    return chosen if rate == 0 or chosen.any() else hashes == hashes.min()


def has_small_hash(hashes: np.ndarray, rate: float) -> np.ndarray:
    """Returns which documents are among the fraction `rate` with the smallest hashes, by their own hash alone."""
    return hashes < np.uint64(int(rate * 2.0**64))


def _is_near(share: float, rate: float) -> bool:
    """Returns whether the odds `share / (1 - share)` are within a factor of `FAR` of those of the rate."""
    found, expected = share * (1 - rate), rate * (1 - share)
    return expected <= FAR * found and found <= FAR * expected
