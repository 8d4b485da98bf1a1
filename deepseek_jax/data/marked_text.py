"""Text in which marks are spelled out: ``data.special_tokens``.

By default a corpus is text and nothing else: ``<｜User｜>`` in it is a few letters, as it is when a user types it.  A
corpus that holds the marks of its tokenizer in their places is read by this.  The packing adds its own <eos> (and
<bos>) to each document all the same.
"""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer


class MarkReader:
    """A tokenizer for a `TokenStore` that makes of each mark spelled out in a text its id."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = f"marks {tokenizer.fingerprint}"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return self._tokenizer.encode_batch(texts, specials=True)
