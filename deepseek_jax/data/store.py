"""A corpus tokenised once: a flat array of ids and a table of documents, read from the cache directory.

    <cache_dir>/tokens-<key>/tokens.uint16    ids of all documents, end to end
                             documents.npy    uint64 [documents, 3]: tokens, UTF-8 bytes, hash of the text
                             *.hashes         of the blocks of these two
                             meta.json        sizes, and hashes of the hashes
                             damaged          exists after a run has found a damaged block

The key is a hash of the files' contents and of the tokenizer, so a changed file gets another cache entry. One of the
processes that need an entry builds it and the others wait. A folder is written under a temporary name and renamed, so
it is complete or absent. Every byte is compared with its block's hash when it is first read (`blocks`): an entry found
damaged while it is opened is rebuilt; damage found later ends the run with its position, and the next start rebuilds
the entry.
"""

import contextlib
import hashlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_jax.data.blocks import Blocks, DamagedFile, Numbers, seal
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.once import once
from deepseek_jax.data.scratch import scratch
from deepseek_jax.data.tokenise import id_type, tokenise
from deepseek_jax.data.tokenizer import Encoder
from deepseek_jax.data.watch import Counter, Watch, unwatched
from deepseek_jax.paths import check_local, user_cache

VERSION = 3  # increase it when the layout, or what a reader yields, changes
LABEL = "tokenise"
WHOLE_FILE_BYTES = 64 << 20  # a shorter file is checked while it is opened
DOCUMENTS, DAMAGED = "documents.npy", "damaged"


@dataclass(frozen=True)
class TokenStore:
    """Documents as ids. Pickled as its folder if it has one, so that a reader process opens the same files."""

    tokens: np.ndarray | Numbers  # ids of all documents, end to end
    lengths: np.ndarray  # int64: tokens of each document
    n_bytes: np.ndarray  # int64: bytes of UTF-8 of each document
    hashes: np.ndarray  # uint64: of the text of each document
    offsets: np.ndarray  # int64: where each document starts in `tokens`
    folder: Path | None

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> np.ndarray | Numbers:
        """Returns a view of the ids of document `i`; they are read and checked when they become an array."""
        return self.tokens[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def __reduce__(self) -> tuple:
        return (_open_folder, (self.folder,)) if self.folder else (_assemble, (self.tokens, self._table(), None))

    def _table(self) -> np.ndarray:
        return np.stack([self.lengths.astype(np.uint64), self.n_bytes.astype(np.uint64), self.hashes], axis=1)


def open_store(corpus: Corpus, tokenizer: Encoder, cache_dir: str, watch: Watch = unwatched) -> TokenStore:
    """Returns the tokenised corpus, from the cache if possible; without a usable cache it is kept in memory.

    `watch` shows the progress of hashing a large corpus and of tokenising, in this process or another.
    """
    cache = cache_folder(cache_dir)
    content = f"{VERSION} {tokenizer.fingerprint} {corpus.fingerprint(cache, watch)}"
    folder = cache / f"tokens-{hashlib.blake2b(content.encode(), digest_size=12).hexdigest()}"
    try:
        if not _is_usable(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(f"{folder.name}.lock")

            def build(counter: Counter) -> None:
                _build_folder(corpus, tokenizer, folder, counter)

            once(lock, LABEL, corpus.n_bytes(), lambda: _is_usable(folder, remove=True), build, watch)
        return _open_folder(folder)
    except OSError as error:
        warnings.warn(
            f"The cache {folder.parent} cannot be used ({error.strerror or error}): the corpus is tokenised in memory. "
            "Set data.cache_dir to a writable folder.",
            stacklevel=2,
        )
        out = io.BytesIO()
        with watch(LABEL, corpus.n_bytes()) as counter:
            table = tokenise(corpus, tokenizer, out, counter)
        return in_memory(np.frombuffer(out.getbuffer(), id_type(tokenizer)), table)


def _is_usable(folder: Path, remove: bool = False) -> bool:
    """Returns whether an entry exists and is complete; `remove` deletes a damaged one."""
    if not folder.is_dir():
        return False
    if not _is_intact(folder):
        if remove:
            warnings.warn(f"{folder} is damaged and is rebuilt.", stacklevel=2)
            _remove(folder)
        return False
    return True


def cache_folder(cache_dir: str) -> Path:
    """Returns `cache_dir`, or the user's cache directory if it is empty."""
    if cache_dir:
        check_local(cache_dir, "data.cache_dir")
        return Path(os.path.expanduser(cache_dir))
    return user_cache()


def _build_folder(corpus: Corpus, tokenizer: Encoder, folder: Path, counter: Counter) -> None:
    with scratch(folder) as temporary:
        built = temporary / "entry"
        built.mkdir()
        with open(built / f"tokens.{id_type(tokenizer)}", "wb") as file:
            table = tokenise(corpus, tokenizer, file, counter)
        np.save(built / DOCUMENTS, table)
        _finish(built, corpus.source)
        try:
            built.rename(folder)
        except OSError:
            if not _is_intact(folder):  # otherwise another process was first, with the same content
                raise


def _finish(built: Path, source: str) -> None:
    """Seals the files of an entry, writes meta.json and flushes everything to disk."""
    files = {path.name: seal(path) for path in sorted(built.iterdir())}
    (built / "meta.json").write_text(json.dumps({"source": source, "files": files}, indent=1))
    for path in built.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _is_intact(folder: Path) -> bool:
    """Returns whether a cache entry is what was written, as far as possible without reading all of a large one."""
    try:
        if (folder / DAMAGED).exists():
            return False
        for name, blocks in _sealed(folder).items():
            if name == DOCUMENTS or blocks.size <= WHOLE_FILE_BYTES:
                blocks.check()
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile):
        return False


def _sealed(folder: Path) -> dict[str, Blocks]:
    """Returns the two files of an entry, open."""
    files = json.loads((folder / "meta.json").read_text())["files"]
    if len(files) != 2:
        raise ValueError("an entry has two files")
    return {name: _Watched(folder / name, sealed) for name, sealed in files.items()}


class _Watched(Blocks):
    """A file of an entry. Damage found during a run marks the entry, so that the next start rebuilds it."""

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes as `Blocks` does; marks the entry if they are damaged."""
        try:
            return super().read(start, stop)
        except DamagedFile as error:
            with contextlib.suppress(OSError):
                (self.path.parent / DAMAGED).write_text(f"{error}\n")
            raise DamagedFile(f"{error} Start again: the corpus is then tokenised again.") from error


def _remove(folder: Path) -> None:
    """Renames an entry before it is deleted, so that no process finds half of it."""
    with scratch(folder) as grave, contextlib.suppress(FileNotFoundError):  # another process did it
        folder.rename(grave / folder.name)


def _open_folder(folder: Path) -> TokenStore:
    files = _sealed(folder)
    name = next(name for name in files if name != DOCUMENTS)
    table = np.load(io.BytesIO(files[DOCUMENTS].read(0, files[DOCUMENTS].size)))
    return _assemble(Numbers(files[name], name.split(".")[1]), table, folder)


def in_memory(tokens: np.ndarray, table: np.ndarray) -> TokenStore:
    """Returns a store of what `tokenise` has made."""
    return _assemble(tokens, table, None)


def _assemble(tokens: np.ndarray | Numbers, table: np.ndarray, folder: Path | None) -> TokenStore:
    lengths, n_bytes = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    return TokenStore(tokens, lengths, n_bytes, table[:, 2].copy(), np.cumsum(lengths) - lengths, folder)
