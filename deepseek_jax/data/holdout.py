"""Which documents are kept for evaluation: a document is held out if the hash of its text is small.

The choice depends on nothing but the text, so it is the same on every machine, for every seed, for any order of the
files and for any tokenizer; and two copies of one text are never on different sides.
"""

import numpy as np

from deepseek_jax.errors import UserError


def held_out(hashes: np.ndarray, rate: float) -> np.ndarray:
    """Returns, for each uint64 hash of a document, whether the document is kept for evaluation.

    About ``rate`` of the documents are, and never fewer than one unless the rate is 0.

    Raises:
      UserError: no document is left to train on.
    """
    if rate == 0:
        return np.zeros(len(hashes), bool)
    chosen = hashes < np.uint64(int(rate * 2.0**64))
    if not chosen.any():
        chosen = hashes == hashes.min()
    if chosen.all():
        raise UserError(
            f"data.holdout_rate = {rate} holds out every document (there are {len(hashes)}, and equal texts count as "
            "one). Give a corpus of several documents, or set data.holdout_rate to 0 to train without evaluation."
        )
    return chosen
