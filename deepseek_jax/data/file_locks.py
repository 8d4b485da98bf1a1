"""Locks on open files (`flock`), which the system releases when their holder dies, however it dies."""

import fcntl
import os
from pathlib import Path


def try_lock(file: int) -> bool | None:
    """Returns whether the lock of an open file was free and is held now; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock(file: int) -> bool:
    """Waits for the lock of an open file; returns whether it is held now: not if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def is_at(path: Path, file: int) -> bool:
    """Returns whether an open file is still the one that the next process would open under `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
