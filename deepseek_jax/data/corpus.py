"""The files that a source names, in an order that is the same on every machine.

`stdlib` is CPython's own library: about 600 files and 11 MB of real code, already on every machine that runs this.
Everything else is a file, a folder, or a glob: `book.txt`, `books`, `web-*.jsonl.gz`, `shards/*.parquet`.
"""

import contextlib
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.data.compression import ENDINGS, content_type, damage, decompressed
from deepseek_jax.data.fingerprints import fingerprint
from deepseek_jax.data.readers import PARTS, PLAIN, READERS, STREAMED
from deepseek_jax.data.rows import CONVERSATION, FORMATS, conversation_text, format_of, row_text
from deepseek_jax.data.watch import Watch, unwatched
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local

# Tests are repetitive, idlelib and lib2to3 contain fixtures, the others are not part of the library.
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
LARGE_BYTES = 1 << 30  # a corpus that takes seconds to read
TYPES = f"{' '.join(READERS)} (text and JSON also followed by {' or '.join(ENDINGS)})"


class Portion(NamedTuple):
    """A document in its file."""

    text: str
    n_file_bytes: int  # read since the previous document
    where: str  # the file and the row, for messages


@dataclass(frozen=True)
class Corpus:
    """Files that hold documents."""

    source: str  # as given
    files: tuple[Path, ...]  # in an order that is the same on every machine
    text_key: str  # field of a row that holds its text
    passed_over: tuple[Path, ...] = ()  # files of a folder whose type cannot be read
    format: str = "text"  # "text", or "conversations" as JSON

    def documents(self) -> Iterator[str]:
        """Yields the documents that are not empty, file by file."""
        return (portion.text for portion in self.portions())

    def portions(self) -> Iterator[Portion]:
        """Yields each non-empty document."""
        for path in self.files:
            yield from self.read(path)

    def read(self, path: Path, part: tuple[int, int] | None = None) -> Iterator[Portion]:
        """Yields each non-empty document of a file; with `part`, those that begin between these two bytes of it.

        `part` is for files of a type in `readers.PARTS`, not compressed.
        """
        kind, columns = content_type(path), self._columns()
        with _naming(path), open(path, "rb") as file:
            before = part[0] if part else 0
            rows = (
                PARTS[kind](file, columns, str(path), *part)
                if part
                else READERS[kind](decompressed(file, path), columns, str(path))
            )
            for row, where in rows:
                if text := self._document(row, where).removeprefix("\ufeff"):  # a byte-order mark is not text
                    here = max(before, file.tell())
                    yield Portion(text, here - before, where)
                    before = here

    def _columns(self) -> tuple[str, ...]:
        return CONVERSATION if self.format == "conversations" else (self.text_key,)

    def _document(self, row: Any, where: str) -> str:
        return conversation_text(row, where) if self.format == "conversations" else row_text(row, self.text_key, where)

    def found_format(self) -> str:
        """Returns the format of the first row of all files; "text" without rows."""
        for path in self.files:
            if content_type(path) not in PLAIN:
                with _naming(path), open(path, "rb") as file:
                    for row, where in READERS[content_type(path)](decompressed(file, path), None, str(path)):
                        return format_of(row, self.text_key, where)
        return "text"

    def n_bytes(self) -> int:
        """Returns the size of all files, as compressed."""
        return sum(path.stat().st_size for path in self.files if path.is_file())

    def fingerprint(self, known: Path | None = None, watch: Watch = unwatched) -> str:
        """Returns a hash of the contents and order of the files; their location does not matter.

        `known` is a folder that caches the hashes of large files; `watch` shows the progress for a large corpus.
        """
        digest = hashlib.blake2b(" ".join(self._columns()).encode(), digest_size=16)
        n_bytes = self.n_bytes()
        with (watch if n_bytes >= LARGE_BYTES else unwatched)("read the corpus", n_bytes) as counter:
            for path in self.files:
                with _naming(path):
                    digest.update(f"{content_type(path)} {fingerprint(path, known)}\n".encode())
                    counter.advance(path.stat().st_size)
        return digest.hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns errors while reading a file into a UserError that names it."""
    try:
        yield
    except damage() as error:
        raise UserError(f"{path} is damaged or truncated ({error}). Download it again or remove it.") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}). Fix that, or remove the file from data.source."
        ) from error


def open_corpus(source: str, text_key: str, format: str = "auto") -> Corpus:
    """Returns the corpus that `source` names: `stdlib`, a file, a folder with all below it, or a glob.

    A path that exists is used as it is, even with characters of a glob. `format` is one of `FORMATS`, or "auto" for
    that of the first row. Raises UserError if nothing matches, or the type of a file is unknown or does not suit the
    format.
    """
    if format not in ("auto", *FORMATS):
        raise UserError(f"data.format = {format!r} does not exist. Choose one of auto, {', '.join(FORMATS)}.")
    corpus = _find(source, text_key)
    corpus = replace(corpus, format=corpus.found_format() if format == "auto" else format)
    for path in corpus.files:
        if corpus.format == "conversations" and content_type(path) in PLAIN:
            raise UserError(f"{path} is plain text and holds no conversations. Narrow data.source to .jsonl files.")
    return corpus


def _find(source: str, text_key: str) -> Corpus:
    """Returns the files of a corpus, whatever their format."""
    if source == "stdlib":
        return Corpus(source, tuple(library_files(Path(sysconfig.get_path("stdlib")))), text_key)
    check_local(source, "data.source")
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        return _open_folder(source, Path(pattern), text_key)
    names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = tuple(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise UserError(
            f"data.source = {source!r} matches no file. Give 'stdlib', or a file, a folder or a glob of files: {TYPES}."
        )
    for path in files:
        if not content_type(path):
            raise UserError(
                f"{path}: the name does not say what the file contains. Rename it, for example to a.jsonl{path.suffix}."
            )
        if not _is_readable(path):
            raise UserError(f"{path} is not of a type that can be read. Narrow data.source to files of {TYPES}.")
    return Corpus(source, files, text_key)


def _open_folder(source: str, folder: Path, text_key: str) -> Corpus:
    """Returns all readable files below a folder, without hidden ones (`.git`)."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    files = tuple(filter(_is_readable, found))
    if not files:
        raise UserError(f"data.source = {source!r} is a folder without a file of {TYPES}. Give another one or a glob.")
    return Corpus(source, files, text_key, tuple(path for path in found if not _is_readable(path)))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_readable(path: Path) -> bool:
    kind = content_type(path)
    return kind in READERS and (path.suffix.lower() not in ENDINGS or kind in STREAMED)


def library_files(root: Path) -> Iterator[Path]:
    """Yields the Python files of the standard library, without those that differ from machine to machine."""
    for folder, subfolders, names in os.walk(root):
        kept = (name for name in subfolders if name not in NOT_LIBRARY and not name.startswith("config-"))
        subfolders[:] = sorted(kept)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)
