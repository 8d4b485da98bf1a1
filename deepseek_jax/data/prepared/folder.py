"""The folder of prepared text, on a disk or in a bucket: what is read, written once, and made beside it.

In a bucket a shard's files are whole objects, and its marker comes after them. A run fetches a shard when it first
needs a window of it, and keeps it in the user's cache (XDG_CACHE_HOME): training shuffles windows over all shards, so
the disk of each host must have space for all that it reads.
"""

import contextlib
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepseek_jax import files
from deepseek_jax.errors import LocalError
from deepseek_jax.paths import cache_of
from deepseek_jax.storage import ABSENT, Place, Remote, open_store

READERS = 16  # small objects that are read at a time


def read(folder: Place, name: str) -> bytes:
    """Returns a small file. Raises FileNotFoundError, and StorageError in a bucket."""
    return open_store(folder).read(name) if isinstance(folder, Remote) else (folder / name).read_bytes()


def exists(folder: Place, name: str) -> bool:
    """Returns whether a file is there. Raises StorageError in a bucket."""
    if isinstance(folder, Remote):
        return open_store(folder).generation(name) != ABSENT
    return os.path.isfile(folder / name)  # False for what can be no path


def read_all(folder: Place, names: Iterable[str]) -> dict[str, bytes]:
    """Returns those of small files that are there. Raises StorageError in a bucket."""
    if isinstance(folder, Path):
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    store = open_store(folder)
    there = {*store.names()}
    with ThreadPoolExecutor(READERS) as pool:
        found = [name for name in names if name in there]
        return dict(zip(found, pool.map(store.read, found), strict=True))


def write_once(folder: Place, name: str, content: bytes) -> bool:
    """Writes a small file if it is not there; returns whether it holds `content` now."""
    if isinstance(folder, Path):
        return files.write_once(folder / name, content)
    store = open_store(folder)
    if store.generation(name) == ABSENT:
        store.write_if_absent(name, content)
    return store.read(name) == content


def put(folder: Place, name: str, file: Path) -> None:
    """Moves a file that was made beside it into the folder."""
    if isinstance(folder, Remote):
        open_store(folder).write(name, file.read_bytes())
    else:
        os.replace(file, folder / name)


def write(folder: Place, name: str, content: bytes) -> None:
    """Writes a small file, over another one if need be, whole or not at all."""
    if isinstance(folder, Remote):
        open_store(folder).write(name, content)
    else:
        files.flush_folder(folder)  # what was put there before
        files.write_atomically(folder / name, content, f".{os.urandom(4).hex()}.partial")


def here(folder: Place) -> Path:
    """Returns where files of a folder are made, and kept if it is in a bucket: that itself, or one in the cache."""
    return folder if isinstance(folder, Path) else cache_of("prepared", folder)


def fetched(file: Place, size: int, text: str, *, anew: bool = False) -> Path:
    """Returns where a shard's file is on this machine, brought there first if it is in a bucket.

    `text` is a hash of the prepared text: another one may come to lie in the same place. With `anew` a file that is
    kept is fetched once more. Raises FileNotFoundError, StorageError; LocalError if it cannot be kept.
    """
    if isinstance(file, Path):
        return file
    kept = here(file.parent) / text / file.name
    if anew or not (kept.is_file() and kept.stat().st_size == size):
        content = open_store(file.parent).read(file.name)
        suffix = f".{uuid.uuid4().hex}.partial"
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(kept, content, suffix)
        except OSError as error:
            with contextlib.suppress(OSError):
                kept.with_name(kept.name + suffix).unlink(missing_ok=True)
            raise LocalError(
                f"{kept.parent}: a shard of {file.parent} cannot be kept there ({error.strerror}). Free space on its "
                "disk, or set XDG_CACHE_HOME to a folder that can be written, then start again."
            ) from error
    return kept
