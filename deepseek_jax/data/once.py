"""Work done once for all processes that share a folder: one does it, the others wait.

The processes meet at a lock file beside the result (``flock``, which the system releases when its holder dies), so they
need not know of one another: those of one run on one host, those of all hosts with a common cache, two runs started
together.  The holder notes in the file how far it is.  Where nothing is shared, each host has a lock of its own.
"""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from deepseek_jax.data.watch import Counter, Watch
from deepseek_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: every process does the work, and one result is kept
    fcntl = None

POLL_S = 0.2  # between looks at a lock that another process holds
STILL_S = 900.0  # without progress of the holder, after which a waiting process gives up


def once(
    lock: Path, label: str, total: int, is_done: Callable[[], bool], work: Callable[[Counter], None], watch: Watch
) -> None:
    """Calls ``work`` unless ``is_done()``; of several processes at the same lock one at a time does so.

    Args:
      lock: the lock file, which is removed at the end.
      label, total: what the work is called, and the bytes of it, for ``watch``.
      is_done: whether the result is there; asked while the lock is held.
      work: makes the result; is given what it counts its bytes with.
      watch: shows how far the work is, in this process or another.

    Raises:
      UserError: the process that holds the lock has made no progress for ``STILL_S``.
    """
    with _held(lock, label, total, watch) as file:
        if not is_done():
            with watch(label, total) as counter:
                work(_Noting(counter, file))


class _Noting:
    """Counts, and notes the count in the lock file for those who wait."""

    def __init__(self, counter: Counter, file: int | None):
        self._counter, self._file, self._done = counter, file, 0

    def advance(self, n_bytes: int) -> None:
        self._counter.advance(n_bytes)
        self._done += n_bytes
        _note(self._file, self._done)


def _note(file: int | None, done: int) -> None:
    """Writes the count in a width that never shrinks, then who counts: a reader sees one count or the next."""
    if file is not None:
        with contextlib.suppress(OSError):  # a full disk: the work itself will say so
            os.pwrite(file, f"{done:20d} process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _noted(path: Path) -> tuple[int, str]:
    """Returns the count of a lock's holder, and who that is."""
    try:
        done, _, holder = path.read_text().strip().partition(" ")
        return int(done), holder
    except (OSError, ValueError):  # just made, or gone
        return 0, "another process"


@contextlib.contextmanager
def _held(path: Path, label: str, total: int, watch: Watch) -> Iterator[int | None]:
    """Waits for the lock, gives its descriptor (None without locks) and removes the file in the end."""
    if fcntl is None:
        yield None
        return
    file = _taken(path)
    if file is None:
        file = _awaited(path, label, total, watch)
    try:
        _note(file, 0)
        yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # while it is held: whoever has it open finds out, in `_is_at`
        os.close(file)


def _taken(path: Path) -> int | None:
    """Returns the descriptor of the lock file if the lock could be had at once, else None."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if _lock(file) and _is_at(path, file):
        return file
    os.close(file)
    return None


def _awaited(path: Path, label: str, total: int, watch: Watch) -> int:
    """Returns the descriptor of the lock file once the lock can be had; shows the holder's progress until then."""
    done, since = 0, time.monotonic()
    with watch(f"{label} (waiting for {_noted(path)[1]})", total) as counter:
        while (file := _taken(path)) is None:
            found, holder = _noted(path)
            if found != done:
                counter.advance(max(found - done, 0))
                done, since = found, time.monotonic()
            if time.monotonic() - since > STILL_S:
                raise UserError(
                    f"{holder} holds {path} and has made no progress for {STILL_S / 60:.0f} minutes. "
                    "End that process, or set data.cache_dir to another folder."
                )
            time.sleep(POLL_S)
    return file


def _lock(file: int) -> bool:
    """Returns whether the lock could be had; where the file system has none, True with a warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        message = f"The cache directory has no file locks ({error.strerror}): each process tokenises for itself."
        warnings.warn(message, stacklevel=2)
    return True


def _is_at(path: Path, file: int) -> bool:
    """Returns whether a locked file is still the one that the next process would open."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file))
    return False
