"""Temporary folders that do not stay for ever after a kill: the next process that needs one clears them.

A folder in use holds `.owner`, locked by the process that created it (`file_locks`). If locks say nothing (another
host, a file system without them), a folder counts as abandoned after a day.
"""

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.data.file_locks import is_at, lock, try_lock

OWNER = ".owner"
ABANDONED_S = 24 * 3600


@contextlib.contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """Creates a folder beside `place` and removes it at the end; first clears folders of dead processes there.

    `place` is named `KIND-KEY`: abandoned folders of its kind are cleared, whatever their key.
    """
    clear(place)
    with fresh(place) as folder:
        yield folder


@contextlib.contextmanager
def fresh(place: Path) -> Iterator[Path]:
    """Creates a folder beside `place` and removes it at the end, as `scratch`, without a look at others."""
    folder = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    with open(folder / OWNER, "wb", buffering=0) as owner:
        lock(owner.fileno())  # another process may hold it for a moment, to see whose it is
        with contextlib.suppress(OSError):  # a full disk
            owner.write(socket.gethostname().encode())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clear(place: Path) -> None:
    """Removes temporary folders and lock files of `place`'s kind whose owner is dead."""
    kind = place.name.partition("-")[0]
    for folder in place.parent.glob(f"{kind}-*.????????"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
    for path in place.parent.glob(f"{kind}-*.lock"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if path.name != f"{place.name}.lock" and try_lock(file.fileno()) and is_at(path, file.fileno()):
                path.unlink()


def _is_abandoned(folder: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    is_old = time.time() - newest > ABANDONED_S
    if not (folder / OWNER).is_file():  # being created or removed at this moment, or by an older version
        return is_old
    with open(folder / OWNER, "rb") as owner:
        is_ours = owner.read(300) == socket.gethostname().encode()
        is_free = try_lock(owner.fileno())
        return is_old if is_free is None else is_free and (is_ours or is_old)
