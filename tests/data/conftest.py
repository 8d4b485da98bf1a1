"""A small corpus, and a tokenizer of bytes with every special token of every chat template."""

from collections.abc import Sequence

import numpy as np
import pytest

from deepseek_jax.data.chat import marks

MARKS = tuple(part.text for part in vars(marks).values() if isinstance(part, marks.Part))


class MarkedBytes:
    """Ids 0-255 are bytes, the others special tokens."""

    vocab_size = 256 + len(MARKS)
    bos_id, eos_id, pad_id = (256 + MARKS.index(part.text) for part in (marks.BOS, marks.EOS, marks.FIM_HOLE))
    add_bos, fim, fingerprint = False, None, "marked bytes"

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        return np.array([256 + MARKS.index(text)] if specials else list(text.encode()), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def byte_lengths(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


@pytest.fixture(scope="session")
def marked_bytes() -> MarkedBytes:
    return MarkedBytes()


@pytest.fixture
def settings(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        letters = rng.integers(97, 123, rng.integers(20, 200)).astype(np.uint8)
        (tmp_path / f"{i:02}.txt").write_bytes(bytes(letters))
    return dict(
        source=str(tmp_path / "*.txt"),
        text_key="text",
        format="auto",
        chat_template="",
        train_on="answers",
        special_tokens=False,
        add_bos=True,
        tokenizer="bytes",
        seq_len=32,
        fim_rate=0.25,
        mask_documents=False,
        holdout_rate=0.1,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
        seed=3,
    )
