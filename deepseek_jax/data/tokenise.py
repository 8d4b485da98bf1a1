"""Documents to ids: many at a time, so that a parallel tokenizer uses every core, and long ones in parts.

A long document is cut where the text around the cut has the same tokens as its two halves, so that the parts have the
same ids as the whole. A file of one gigabyte then takes no more time and memory than many small ones.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.rows import RowError
from deepseek_jax.data.tokenizer import Encoder
from deepseek_jax.data.watch import Counter
from deepseek_jax.errors import UserError

CHUNK_CHARACTERS = 4 << 20  # text tokenised at a time
PART_CHARACTERS = 256 << 10  # a longer document is cut
AROUND = 64  # characters on either side of a cut that are compared
TRIALS = 16  # places tried per cut
PLACES = re.compile(r"(?<=\S\n)(?=\S)|(?<=[^\s])(?= \S)")  # at the start of a line, or before a space


class Part(NamedTuple):
    """Text of a document, the bytes it takes in its file, whether it is the document's end, and where that is."""

    text: str
    n_file_bytes: int
    is_last: bool
    where: str


def tokenise(corpus: Corpus, tokenizer: Encoder, out: BinaryIO, counter: Counter) -> np.ndarray:
    """Writes the ids of all documents to `out`, in the smallest type that can hold them; counts the files' bytes.

    Returns uint64 [documents, 3]: tokens, bytes of UTF-8, hash of the text. Raises UserError if there is no text.
    """
    table = tokenise_any(corpus, tokenizer, out, counter)
    if not len(table):
        raise UserError(_no_text(corpus))
    return table


def tokenise_any(corpus: Corpus, tokenizer: Encoder, out: BinaryIO, counter: Counter) -> np.ndarray:
    """Does what `tokenise` does; without any text the table is empty."""
    table, document, left = [], _Document(), corpus.n_bytes()
    for parts in _chunks(_parts(corpus, tokenizer)):
        for part, ids in zip(parts, _encoded(parts, tokenizer), strict=True):
            out.write(ids.astype(id_type(tokenizer)).tobytes())
            document.add(part.text, len(ids))
            if part.is_last:
                table += [document.row()] if document.n_tokens else []
                document = _Document()
            left -= part.n_file_bytes
            counter.advance(part.n_file_bytes)
    counter.advance(max(left, 0))  # the rest of the last files, which is not text
    return np.array(table, np.uint64).reshape(-1, 3)


def _encoded(parts: list[Part], tokenizer: Encoder) -> list[np.ndarray]:
    """Returns the ids of each part. Raises UserError, with the file and the row, for a row that cannot be encoded."""
    try:
        return tokenizer.encode_batch([part.text for part in parts])
    except RowError as error:
        raise UserError(f"{parts[error.row].where}: {error}") from error


def id_type(tokenizer: Encoder) -> np.dtype:
    """Returns the smallest unsigned type that can hold every id."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


class _Document:
    """What is known about a document whose parts arrive one by one."""

    def __init__(self) -> None:
        self.n_tokens, self._n_bytes, self._digest = 0, 0, hashlib.blake2b(digest_size=8)

    def add(self, text: str, n_tokens: int) -> None:
        data = text.encode()
        self.n_tokens, self._n_bytes = self.n_tokens + n_tokens, self._n_bytes + len(data)
        self._digest.update(data)

    def row(self) -> tuple[int, int, int]:
        return self.n_tokens, self._n_bytes, int.from_bytes(self._digest.digest(), "little")


def _parts(corpus: Corpus, tokenizer: Encoder) -> Iterator[Part]:
    """Yields the documents, long ones in parts."""
    for text, n_file_bytes, where in corpus.portions():
        inner = cut(text, tokenizer) if corpus.format == "text" else ()  # a conversation is read whole
        cuts = [0, *inner, len(text)]
        for start, stop in itertools.pairwise(cuts):
            n_bytes = n_file_bytes * stop // len(text) - n_file_bytes * start // len(text)
            yield Part(text[start:stop], n_bytes, stop == len(text), where)


def cut(text: str, tokenizer: Encoder) -> Iterator[int]:
    """Yields the places at which a text is cut; none if it is short or cannot be cut."""
    last = 0
    while len(text) - last > PART_CHARACTERS:
        found = _cut_near(text, last + PART_CHARACTERS, tokenizer)
        if found is not None:
            yield found
        last = found or last + PART_CHARACTERS


def _cut_near(text: str, place: int, tokenizer: Encoder) -> int | None:
    """Returns the first place for a cut at or after `place`, None if none of the next few is suitable."""
    for _, match in zip(range(TRIALS), PLACES.finditer(text, place, len(text) - 1), strict=False):
        i = match.start()
        left, right = text[i - AROUND : i], text[i : i + AROUND]
        whole, *halves = tokenizer.encode_batch([left + right, left, right])
        if np.array_equal(whole, np.concatenate(halves)):
            return i
    return None


def _chunks(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Yields lists of parts, about 4 million characters each: enough to keep a parallel tokenizer busy."""
    chunk, size = [], 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _no_text(corpus: Corpus) -> str:
    """Returns the message for a corpus of empty files or rows."""
    names = ", ".join(path.name for path in corpus.files[:3]) + (", ..." if len(corpus.files) > 3 else "")
    if corpus.n_bytes() == 0:
        what = f"{names} is empty" if len(corpus.files) == 1 else f"all of its {len(corpus.files)} files are empty"
    else:
        what = f"no row of {names} has any" + (f" in {corpus.text_key!r}" if corpus.format == "text" else "")
    return f"data.source = {corpus.source!r} holds no text: {what}. Give files with text."
