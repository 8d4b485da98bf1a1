"""Text in which special tokens are spelled out: `data.special_tokens`.

By default a corpus is only text: `<｜User｜>` in it is a few letters, as if a user had typed it. This module reads a
corpus in which the tokenizer's special tokens are spelled out. The packing still adds its own <eos> (and <bos>) to each
document.
"""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer


class MarkReader:
    """A tokenizer for a `TokenStore` that encodes special tokens spelled out in a text as their ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = f"marks {tokenizer.fingerprint}"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return self._tokenizer.encode_batch(texts, specials=True)
