"""Files that survive a crash: written whole or not at all, and on the disk when a function returns."""

import os
import uuid
from pathlib import Path


def write_once(path: Path, content: bytes) -> bool:
    """Writes a file if it is not there, as `write_atomically`; returns whether it holds `content` now.

    Several processes may do so at once, on one machine or over a shared file system: what is there stays.
    """
    if not path.exists():
        partial = _write_partial(path, content, f".{uuid.uuid4().hex}.partial")
        try:
            os.link(partial, path)
        except FileExistsError:  # another process was first
            pass
        except OSError:  # a file system without links
            os.replace(partial, path)
        partial.unlink(missing_ok=True)
        flush_folder(path.parent)
    return path.read_bytes() == content


def write_atomically(path: Path, content: bytes, partial_suffix: str = ".partial") -> None:
    """Writes a file that after a crash is either whole or absent, and on the disk when this returns.

    Meanwhile it is beside `path`, under that name with `partial_suffix`.
    """
    os.replace(_write_partial(path, content, partial_suffix), path)
    flush_folder(path.parent)


def _write_partial(path: Path, content: bytes, suffix: str) -> Path:
    """Writes a file beside `path`, and returns where."""
    partial = path.with_name(path.name + suffix)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return partial


def flush_folder(path: Path) -> None:
    """Puts a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
