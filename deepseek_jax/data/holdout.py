"""Which text is kept for evaluation: whole documents whose hash is small, or the ends of documents where few are long.

The choice depends on nothing but the texts, so it is the same on every machine, for every seed and any order of the
files.  Of whole documents, two copies of one are never on different sides.  Where whole ones would hold out a share far
from the rate (one text file, three books), each document is cut instead: its last tokens, ``rate`` of them, are held
out, and the rest is trained on.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import UserError

FAR = 8  # how many times the odds of being held out may be those of the rate, or the reverse


class Pieces(NamedTuple):
    """Parts of documents: places of the documents in a store, and from which token to which each part goes; int64."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each part."""
        return self.stops - self.starts

    def are_whole(self, lengths: np.ndarray) -> bool:
        """Returns whether each part is all of its document, where ``lengths`` are those of the store's documents."""
        return np.array_equal(self.lengths, lengths[self.documents])


def whole(documents: np.ndarray, lengths: np.ndarray) -> Pieces:
    """Returns whole documents as pieces."""
    stops = lengths[documents]
    return Pieces(documents, np.zeros_like(stops), stops)


def divide(hashes: np.ndarray, lengths: np.ndarray, n_bytes: np.ndarray, rate: float) -> tuple[Pieces, Pieces]:
    """Returns the (training, held-out) sides of a corpus, each in the order of the documents' hashes.

    Args:
      hashes, lengths, n_bytes: of each document: uint64 of its text, its tokens, its bytes of UTF-8.
      rate: share of the text to hold out.

    Raises:
      UserError: there is too little text to hold any of it out.
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
    """Returns, for each document, whether it is kept for evaluation if whole ones are.

    About ``rate`` of the documents are, and never fewer than one unless the rate is 0.
    """
    if rate == 0:
        return np.zeros(len(hashes), bool)
    chosen = hashes < np.uint64(int(rate * 2.0**64))
    return chosen if chosen.any() else hashes == hashes.min()


def _is_near(share: float, rate: float) -> bool:
    """Returns whether the odds ``share / (1 - share)`` are within a factor of those of the rate."""
    found, expected = share * (1 - rate), rate * (1 - share)
    return expected <= FAR * found and found <= FAR * expected
