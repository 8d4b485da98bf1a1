"""One writer per directory of checkpoints: a lock of the kernel on a disk, a lease in a bucket.

A lease is an object that its holder writes anew every `RENEW_S`. Nobody compares clocks: whoever finds a lease waits
whether it changes. If it does, its holder is alive and the second writer is refused. If it stays the same for `DEAD_S`,
its holder is gone and the lease is taken, by a write that succeeds only if it is still the same. A holder that was
taken for dead finds its lease changed, and saves nothing any more.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from deepseek_jax.errors import UserError
from deepseek_jax.storage import ABSENT, StorageError, Store

LEASE = ".writer"
RENEW_S, DEAD_S, LOOK_S = 10.0, 45.0, 1.0


def _holder() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _refusal(where: object, holder: str) -> UserError:
    return UserError(f"{where} is being written by another run ({holder}). Stop that one, or choose another directory.")


class WriterLock:
    """One writer a directory: an flock on `.writer`, which the kernel drops when the process dies, in any way.

    A refusal names what the directory stands for, `of`, if that is something else.
    """

    def __init__(self, root: Path, of: object = None):
        self._file = open(root / LEASE, "ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).decode(errors="replace").strip() or "unknown"
            self._file.close()
            raise _refusal(of or root, holder) from None
        except OSError:  # a file system without locks: nothing to hold on to
            pass
        # A forked child shares the lock and would hold it after our death: it lets go of its copy at birth.
        os.register_at_fork(after_in_child=self._file.close)
        try:
            self._file.truncate(0)
            self._file.write(f"{_holder()}\n".encode())
        except OSError:  # a full disk: the name is lost, the lock holds
            pass

    def is_held(self) -> bool:
        """Whether it is still this process that may write."""
        return True

    def release(self) -> None:
        """Lets the next writer in."""
        self._file.close()


class Lease:
    """One writer per place in a bucket. Raises UserError where another one is alive, StorageError without an answer."""

    def __init__(self, store: Store):
        self._store, self._over, self._count, self._name = store, threading.Event(), 0, uuid.uuid4().hex
        self._seen_s = time.monotonic()
        self._generation: bytes | None = self._taken()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Whether nobody can have taken it: it was renewed not long ago."""
        return self._generation is not None and time.monotonic() - self._seen_s < DEAD_S - RENEW_S

    def release(self) -> None:
        """Lets the next writer in at once."""
        self._over.set()
        self._thread.join()
        if self._generation is not None:
            with contextlib.suppress(StorageError):  # the next writer waits until it counts as dead
                self._store.exchange(LEASE, None, self._generation)

    def _taken(self) -> bytes:
        """Takes the lease, after waiting for a dead holder's to end."""
        found, since = self._store.generation(LEASE), time.monotonic()
        while found != ABSENT and time.monotonic() - since < DEAD_S:
            time.sleep(LOOK_S)
            now = self._store.generation(LEASE)
            if now not in (found, ABSENT):
                break
            found = now
        else:
            self._seen_s = time.monotonic()
            taken = self._store.exchange(LEASE, self._content(), found)
            if taken is None and self._is_own():
                taken = self._store.generation(LEASE)
            if taken is not None:
                return taken
        raise _refusal(self._store, self._store.read(LEASE).decode(errors="replace").partition("\n")[0])

    def _content(self) -> bytes:
        self._count += 1
        return f"{_holder()}\n{self._name} {self._count}\n".encode()

    def _is_own(self) -> bool:
        """Whether the lease bears this holder's name, whichever of its writes that was."""
        return f"\n{self._name} ".encode() in self._store.read(LEASE)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            assert self._generation is not None
            try:
                began_s = time.monotonic()
                renewed = self._store.exchange(LEASE, self._content(), self._generation)
                if renewed is None and self._is_own():  # an answer was lost, to this renewal or to an earlier one
                    renewed = self._store.generation(LEASE)
                self._generation, self._seen_s = renewed, began_s
            except FileNotFoundError:
                self._generation = None
            except StorageError:  # not answered: until DEAD_S is over, nobody takes it
                continue
            if self._generation is None:
                return


def sole_writer(store: Store) -> WriterLock | Lease:
    """Returns what keeps other writers out of a place. Raises UserError where there is one, OSError for no right."""
    if isinstance(store.place, Path):
        return WriterLock(store.place)
    return Lease(store)
