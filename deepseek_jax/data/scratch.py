"""Temporary folders that a killed process does not leave for ever: the next one that needs such a place clears them.

A folder in use holds ``.owner``, locked by the process that made it; the kernel drops the lock however that process
ends.  Where locks say nothing (another host, a file system without them) a folder counts as left behind after a day.
"""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what is left behind goes after a day
    fcntl = None

OWNER = ".owner"
LEFT_BEHIND_S = 24 * 3600


@contextlib.contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """Makes a folder beside ``place``, clears what dead processes have left there, and removes it at the end.

    ``place`` is named ``KIND-KEY``: left-overs of its kind are cleared, whatever their key.
    """
    clear(place)
    folder = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    with open(folder / OWNER, "wb", buffering=0) as owner:
        _lock(owner.fileno())
        with contextlib.suppress(OSError):  # a full disk
            owner.write(socket.gethostname().encode())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clear(place: Path) -> None:
    """Removes temporary folders and lock files of ``place``'s kind whose owner is dead."""
    kind = place.name.partition("-")[0]
    for folder in place.parent.glob(f"{kind}-*.????????"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and _is_left_behind(folder):
                shutil.rmtree(folder, ignore_errors=True)
    for lock in place.parent.glob(f"{kind}-*.lock"):
        with contextlib.suppress(OSError), open(lock, "rb") as file:
            if lock.name != f"{place.name}.lock" and _lock(file.fileno()) and _is_at(lock, file.fileno()):
                lock.unlink()


def _is_left_behind(folder: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    is_old = time.time() - newest > LEFT_BEHIND_S
    if not (folder / OWNER).is_file():  # being made or removed at this moment, or of an older version
        return is_old
    with open(folder / OWNER, "rb") as owner:
        is_ours = owner.read(300) == socket.gethostname().encode()
        is_free = _lock(owner.fileno())
        return is_old if is_free is None else is_free and (is_ours or is_old)


def _lock(file: int) -> bool | None:
    """Returns whether the lock could be had; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _is_at(path: Path, file: int) -> bool:
    return os.path.samestat(path.stat(), os.fstat(file))
