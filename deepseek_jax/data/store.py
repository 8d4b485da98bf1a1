"""A corpus tokenised once: a flat array of ids and a table of documents, memory-mapped from the cache directory.

    <cache_dir>/tokens-<key>/tokens.uint16    ids of all documents, end to end
                             documents.npy    uint64 [documents, 3]: tokens, UTF-8 bytes, hash of the text
                             meta.json        fingerprints of the other two

The key is a hash of the files' contents and of the tokenizer, so a changed file is another cache entry.  A folder is
written under a temporary name and renamed: it is whole or absent, and of two processes that build it at once one wins.
An entry that does not agree with its fingerprints is built again.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deepseek_jax.data.corpus import Corpus, file_fingerprint
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

VERSION = 2  # raise it when the layout, or what a reader yields, changes
CHUNK_CHARACTERS = 4 << 20  # text tokenised at a time


@dataclass(frozen=True)
class TokenStore:
    """Documents as ids.  Pickled by its folder if it has one, so that a reader process maps the same pages."""

    tokens: np.ndarray  # ids of all documents, end to end
    lengths: np.ndarray  # int64: tokens of each document
    n_bytes: np.ndarray  # int64: bytes of UTF-8 of each document
    hashes: np.ndarray  # uint64: of the text of each document
    offsets: np.ndarray  # int64: where each document starts in ``tokens``
    folder: Path | None

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> np.ndarray:
        """Returns a view of the ids of document ``i``."""
        return self.tokens[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def __reduce__(self):
        return (_map_folder, (self.folder,)) if self.folder else (_assemble, (self.tokens, self._table(), None))

    def _table(self) -> np.ndarray:
        return np.stack([self.lengths.astype(np.uint64), self.n_bytes.astype(np.uint64), self.hashes], axis=1)


def open_store(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str) -> TokenStore:
    """Returns the tokenised corpus, from the cache if it is there; without a usable cache it is kept in memory."""
    key = hashlib.blake2b(
        f"{VERSION} {tokenizer.fingerprint} {corpus.fingerprint()}".encode(), digest_size=12
    ).hexdigest()
    folder = cache_folder(cache_dir) / f"tokens-{key}"
    try:
        if folder.is_dir():
            if _is_sound(folder):
                return _map_folder(folder)
            warnings.warn(f"{folder} is damaged and is built again.", stacklevel=2)
            _remove(folder)
        _build_folder(corpus, tokenizer, folder)
        return _map_folder(folder)
    except OSError as error:
        warnings.warn(
            f"The cache {folder.parent} cannot be used ({error.strerror or error}): the corpus is tokenised in memory. "
            "Set data.cache_dir to a writable folder.",
            stacklevel=2,
        )
        return _build_in_memory(corpus, tokenizer)


def cache_folder(cache_dir: str) -> Path:
    """Returns ``cache_dir``, or the user's cache directory if it is empty."""
    if cache_dir:
        return Path(os.path.expanduser(cache_dir))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "deepseek_jax")


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, out: BinaryIO) -> np.ndarray:
    """Writes the ids of all documents to ``out`` and returns the table of documents."""
    table = []
    for texts in _chunks(corpus.documents()):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if len(ids):
                data = text.encode()
                digest = hashlib.blake2b(data, digest_size=8).digest()
                table.append((len(ids), len(data), int.from_bytes(digest, "little")))
                out.write(ids.astype(_id_type(tokenizer)).tobytes())
    if not table:
        raise UserError(
            f"data.source = {corpus.source!r} holds no text in {len(corpus.files)} files. Give files with text."
        )
    return np.array(table, np.uint64)


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yields texts by the list, about 4 million characters each: enough to keep a parallel tokenizer busy."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _id_type(tokenizer: Tokenizer) -> np.dtype:
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def _build_in_memory(corpus: Corpus, tokenizer: Tokenizer) -> TokenStore:
    out = io.BytesIO()
    table = _tokenise(corpus, tokenizer, out)
    return _assemble(np.frombuffer(out.getbuffer(), _id_type(tokenizer)), table, None)


def _build_folder(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    built = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with open(built / f"tokens.{_id_type(tokenizer)}", "wb") as file:
            table = _tokenise(corpus, tokenizer, file)
        np.save(built / "documents.npy", table)
        files = {path.name: file_fingerprint(path) for path in sorted(built.iterdir())}
        (built / "meta.json").write_text(json.dumps({"source": corpus.source, "files": files}, indent=1))
        built.chmod(0o755)
        try:
            built.rename(folder)
        except OSError:
            if not _is_sound(folder):  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(built, ignore_errors=True)


def _is_sound(folder: Path) -> bool:
    """Says whether a cache entry is what was written."""
    try:
        files = json.loads((folder / "meta.json").read_text())["files"]
        return len(files) == 2 and all(file_fingerprint(folder / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(folder: Path) -> None:
    """Renames an entry away before it is deleted, so that nobody meets half of it."""
    grave = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):  # another process did it
        folder.rename(grave / folder.name)
    shutil.rmtree(grave, ignore_errors=True)


def _map_folder(folder: Path) -> TokenStore:
    path = next(folder.glob("tokens.*"))
    tokens = np.memmap(path, dtype=path.suffix[1:], mode="r").view(np.ndarray)
    return _assemble(tokens, np.load(folder / "documents.npy"), folder)


def _assemble(tokens: np.ndarray, table: np.ndarray, folder: Path | None) -> TokenStore:
    lengths, n_bytes = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    return TokenStore(tokens, lengths, n_bytes, table[:, 2].copy(), np.cumsum(lengths) - lengths, folder)
