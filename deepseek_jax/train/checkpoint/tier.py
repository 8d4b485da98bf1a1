"""Copies of what this host has written of its checkpoints, on its own disk, to be read in place of the bucket.

    config.checkpoint.local = "/local/ssd"

A run that starts again mostly reads what the same host has just written. So each object of a save is also kept in a
folder here, under its name in the store, which is new with each attempt to save. A restore takes the step that the
store's COMMIT names, and of that step each object that is here and has the hash of the manifest; all others, and those
that are damaged here, come from the store. What is restored does not depend on what is here: hosts may have been
exchanged, or have kept other steps. A disk that is full or gone is reported once and stops no run; it needs space for
three steps, two that are kept and one that is being written.
"""

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from deepseek_jax.storage import Store

KEPT = 2  # steps: the last one, and the one that is being written
STEP = re.compile(r"step_(\d+)")


class Tier:
    """A store whose objects are read from a folder of this host where it has them.

    Args:
        store: of the checkpoints.
        folder: of this host's disk; several runs may share it.
        warn: called once with what is wrong with it; in any thread.

    Attributes:
        n_read: bytes that were read from the folder.
    """

    def __init__(self, store: Store, folder: Path, warn: Callable[[str], None]):
        self._store, self._warn = store, warn
        self.folder = folder / hashlib.sha256(str(store.place).encode()).hexdigest()[:16]
        self.n_read, self._lock, self._has_warned = 0, threading.Lock(), False

    @property
    def is_remote(self) -> bool:
        """As of the store."""
        return self._store.is_remote

    def write(self, name: str, content: bytes) -> None:
        """Writes an object to the store and, where that is possible, here."""
        self._store.write(name, content)
        file = self.folder / name
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            with self._lock:
                is_first, self._has_warned = not self._has_warned, True
            if is_first:
                self._warn(
                    f"checkpoint.local: {self.folder} cannot be written ({error.strerror}). Training continues, and "
                    f"checkpoints are in {self._store} alone."
                )

    def read(self, name: str) -> bytes:
        """Returns an object, compared with nothing yet; from here if it is here."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return self._store.read(name)
        with self._lock:
            self.n_read += len(content)
        return content

    def again(self, name: str) -> bytes:
        """Returns an object from the store, after deleting what is here of it, which is damaged.

        Another process of the host may have deleted it, or the disk may refuse.
        """
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()
        return self._store.read(name)

    def prune(self, committed: int) -> None:
        """Deletes all but the last steps up to the one just committed; later ones are of a path that was left."""
        with contextlib.suppress(OSError):
            found = {int(number[1]): path for path in self.folder.glob("*/*") if (number := STEP.fullmatch(path.name))}
            stays = sorted(step for step in found if step <= committed)[-KEPT:]
            for step in found.keys() - set(stays):
                shutil.rmtree(found[step], ignore_errors=True)
