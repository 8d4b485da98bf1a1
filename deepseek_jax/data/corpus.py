"""Which files a source names, in an order that is the same on every machine.

``stdlib`` is CPython's own library: about 600 files and 11 MB of real code, already on every machine that runs this.
Anything else is a glob: ``books/**/*.txt``, ``web-*.jsonl``, ``shards/*.parquet``.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_jax.data.readers import READERS
from deepseek_jax.errors import UserError

# Tests repeat themselves, idlelib and lib2to3 hold fixtures, the others are not the library.
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
TYPES = " ".join(READERS)

WHOLE_FILE_BYTES = 64 << 20  # up to here a fingerprint reads all of a file, beyond it a sample of blocks
SAMPLED_BLOCKS = 64


@dataclass(frozen=True)
class Corpus:
    """Files that hold documents; ``text_key`` is the field of a row that holds one."""

    source: str
    files: tuple[Path, ...]
    text_key: str

    def documents(self) -> Iterator[str]:
        """Yields the documents that are not empty, file by file."""
        for path in self.files:
            try:
                for text in READERS[path.suffix](path, self.text_key):
                    if text:
                        yield text
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror or error}). Mend it or leave it out of data.source."
                ) from error

    def fingerprint(self) -> str:
        """Returns a hash of the contents and order of the files; where they lie does not matter."""
        digest = hashlib.blake2b(self.text_key.encode(), digest_size=16)
        for path in self.files:
            try:
                digest.update(f"{path.suffix} {file_fingerprint(path)}\n".encode())
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror or error}). Mend it or leave it out of data.source."
                ) from error
        return digest.hexdigest()


def open_corpus(source: str, text_key: str) -> Corpus:
    """Returns the corpus that ``source`` names: ``stdlib`` or a glob.

    Raises:
      UserError: nothing matches, or a file is of a type that no reader knows.
    """
    if source == "stdlib":
        return Corpus(source, tuple(library_files(Path(sysconfig.get_path("stdlib")))), text_key)
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise UserError(f"data.source = {source!r} is a folder. Name its files: '{source.rstrip('/')}/**/*.txt'.")
    files = tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name))
    if not files:
        raise UserError(f"data.source = {source!r} matches no file. Give 'stdlib' or a glob of {TYPES} files.")
    for path in files:
        if path.suffix not in READERS:
            raise UserError(f"{path} is not of a type that can be read. Narrow data.source to {TYPES} files.")
    return Corpus(source, files, text_key)


def library_files(root: Path) -> Iterator[Path]:
    """Yields the Python files of the standard library, without those that differ from machine to machine."""
    for folder, subfolders, names in os.walk(root):
        kept = (name for name in subfolders if name not in NOT_LIBRARY and not name.startswith("config-"))
        subfolders[:] = sorted(kept)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def file_fingerprint(path: Path) -> str:
    """Returns a hash of a file.

    The hash covers every byte of a file of up to 64 MiB.  Of a longer one it covers the size and 64 evenly spaced
    blocks of 1 MiB, so that opening a corpus takes the same time whatever its size; a change between the blocks that
    leaves the size alone goes unseen.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for block in range(SAMPLED_BLOCKS):
            file.seek((size - (1 << 20)) * block // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(1 << 20))
        return digest.hexdigest()
