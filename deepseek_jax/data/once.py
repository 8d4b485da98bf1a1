"""Work done once for all processes that share a folder: one process does it, the others wait.

The processes meet at a lock file beside the result (`file_locks`), so they need not know of each other: they may belong
to one run on one host, to several hosts with a common cache, or to two runs started together. The holder writes its
progress into the file. If the file system has no locks, every process does the work and one result is kept.
"""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from deepseek_jax.data.file_locks import is_at, try_lock
from deepseek_jax.data.watch import Counter, Watch
from deepseek_jax.errors import UserError

POLL_S = 0.2  # between checks of a lock that another process holds
STALL_S = 900.0  # without progress of the holder, after which a waiting process gives up


def once(
    lock: Path, label: str, total: int, is_done: Callable[[], bool], work: Callable[[Counter], None], watch: Watch
) -> None:
    """Calls `work` unless `is_done()`; among processes with the same lock, one at a time does so.

    Raises UserError if the process that holds the lock has made no progress for `STALL_S`.

    Args:
        lock: path of the lock file, which is removed at the end.
        label, total: name of the work and its size in bytes, for `watch`.
        is_done: returns whether the result exists; called while the lock is held.
        work: creates the result; it is given the counter of its bytes.
        watch: shows the progress, made in this process or another.
    """
    with _held(lock, label, total, watch) as file:
        if not is_done():
            with watch(label, total) as counter:
                work(_SharedCounter(counter, file))


class _SharedCounter:
    """Counts, and writes the count into the lock file for the processes that wait."""

    def __init__(self, counter: Counter, file: int):
        self._counter, self._file, self._done = counter, file, 0

    def advance(self, n_bytes: int) -> None:
        self._counter.advance(n_bytes)
        self._done += n_bytes
        _write_progress(self._file, self._done)


def _write_progress(file: int, done: int) -> None:
    """Writes the count in a fixed width, then the holder: a reader sees one count or the next, never a mixture."""
    with contextlib.suppress(OSError):  # a full disk: the work itself will report it
        os.pwrite(file, f"{done:20d} process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _read_progress(path: Path) -> tuple[int, str]:
    """Returns the count of a lock's holder, and the holder."""
    try:
        done, _, holder = path.read_text().strip().partition(" ")
        return int(done), holder
    except (OSError, ValueError):  # just created, or removed
        return 0, "another process"


@contextlib.contextmanager
def _held(path: Path, label: str, total: int, watch: Watch) -> Iterator[int]:
    """Waits for the lock, yields its descriptor and removes the file at the end."""
    file = _take(path)
    if file is None:
        file = _wait(path, label, total, watch)
    try:
        _write_progress(file, 0)
        yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # while it is held: a process that has it open notices, in `is_at`
        os.close(file)


def _take(path: Path) -> int | None:
    """Returns the descriptor of the lock file if the lock was free, else None; warns if there are no locks."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    is_free = try_lock(file)
    if is_free is None:
        message = f"{path.parent}: the file system has no file locks, so each process tokenises for itself."
        warnings.warn(message, stacklevel=2)
        return file
    if is_free and is_at(path, file):
        return file
    os.close(file)
    return None


def _wait(path: Path, label: str, total: int, watch: Watch) -> int:
    """Returns the descriptor of the lock file as soon as the lock is free; shows the holder's progress until then."""
    done, since = 0, time.monotonic()
    with watch(f"{label} (waiting for {_read_progress(path)[1]})", total) as counter:
        while (file := _take(path)) is None:
            found, holder = _read_progress(path)
            if found != done:
                counter.advance(max(found - done, 0))
                done, since = found, time.monotonic()
            if time.monotonic() - since > STALL_S:
                raise UserError(
                    f"{holder} holds {path} and has made no progress for {STALL_S / 60:.0f} minutes. "
                    "End that process, or set data.cache_dir to another folder."
                )
            time.sleep(POLL_S)
    return file
