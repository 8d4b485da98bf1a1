"""The small files of a run whose workdir is in a bucket: written in a local folder, copied to the bucket now and then.

    with mirrored(storage.place("gs://bucket/runs/a"), warn) as folder:      # of a local workdir: that itself
        Metrics(folder, ...)

`metrics.jsonl`, the events of TensorBoard and the like grow by a line at a time, which no object can. So they lie in a
folder of the user's cache; what has changed there is uploaded every `UPLOAD_S` and at the end. A run that resumes on
another machine first brings them back. A bucket that refuses is reported once and stops no run.
"""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from deepseek_jax.storage import Place, StorageError, Store, open_store

UPLOAD_S = 60.0
CHECKPOINTS = "checkpoints/"  # in the bucket itself


def local(workdir: Place) -> Path:
    """Returns the folder for the small files of a run: its workdir, or one in the user's cache that stands for it."""
    if isinstance(workdir, Path):
        return workdir
    digest = hashlib.sha256(f"{workdir}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "deepseek_jax" / "workdirs" / f"{workdir.name}-{digest}"


@contextlib.contextmanager
def mirrored(workdir: Place, warn: Callable[[str], None]) -> Iterator[Path]:
    """A context in which `local(workdir)`, which it gives, is copied to a workdir in a bucket."""
    folder = local(workdir)
    if isinstance(workdir, Path):
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(open_store(workdir), folder, warn, jax.process_index())
    try:
        yield folder
    finally:
        mirror.close()


class Mirror:
    """Copies files of a folder to a store when they have changed; begins by fetching those of the store.

    A process takes care of the files that bear its number, process 0 of those that bear none as well.
    """

    def __init__(self, store: Store, folder: Path, warn: Callable[[str], None], process: int = 0):
        self._process = process
        self._store, self._folder, self._warn = store, folder, warn
        self._copied: dict[str, tuple[int, int]] = {}  # name -> size and time of change when it was copied
        self._has_warned = False
        self._over = threading.Event()
        self._fetch()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copies what has changed a last time."""
        self._over.set()
        self._thread.join()
        self.copy()

    def copy(self) -> None:
        """Copies what has changed since the last call."""
        try:
            for file in sorted(self._folder.rglob("*")):
                name, state = file.relative_to(self._folder).as_posix(), _state(file)
                if state is not None and self._is_own(name) and self._copied.get(name) != state:
                    self._store.write(name, file.read_bytes())
                    self._copied[name] = state
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._warn(f"files of the run could not be copied: {error}. Training continues.")

    def _fetch(self) -> None:
        """The bucket's files replace those of the folder: another machine may have continued the run meanwhile."""
        with contextlib.suppress(StorageError):  # whoever writes checkpoints there says so
            for name in self._store.names():
                inside = not {"", ".", ".."} & {*name.split("/")}
                if inside and self._is_own(name) and not name.startswith(CHECKPOINTS):
                    file = self._folder / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(self._store.read(name))
                    self._copied[name] = _state(file) or (0, 0)

    def _is_own(self, name: str) -> bool:
        found = re.search(r"process_(\d+)", name)
        return int(found[1] if found else 0) == self._process

    def _run(self) -> None:
        while not self._over.wait(UPLOAD_S):
            self.copy()


def _state(file: Path) -> tuple[int, int] | None:
    """The size of a file and when it was changed; None for a folder and for what is half written."""
    if not file.is_file() or file.suffix == ".partial":
        return None
    found = file.stat()
    return found.st_size, found.st_mtime_ns
