"""The small files of a run whose workdir is in a bucket: written in a local folder, copied to the bucket now and then.

    with mirrored(storage.place("gs://bucket/runs/a"), warn) as folder:      # of a local workdir: that itself
        Metrics(folder, ...)

`metrics.jsonl`, the events of TensorBoard and the like grow by a line at a time, which no object can. So they lie in a
folder of the user's cache; what has changed there is uploaded every `UPLOAD_S`, at each checkpoint, before a watchdog
ends the process, and at the end. A run that resumes on another machine first brings them back. A file that could not be
fetched is not uploaded, for the bucket's has more in it. A bucket that refuses is reported once and stops no run.
"""

import contextlib
import re
import string
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from deepseek_jax.errors import UserError
from deepseek_jax.paths import cache_of
from deepseek_jax.storage import Place, Remote, Store, open_store
from deepseek_jax.train.checkpoint.writer import WriterLock
from deepseek_jax.train.watchdog import HOSTS

UPLOAD_S = 60.0
CHECKPOINTS = "checkpoints/"  # in the bucket itself
# A bucket of S3 cannot be asked for what comes after a name, and there may be 100,000 shards of checkpoints. So what
# follows them is asked for by its first letter; no file of a run begins as "checkpoints" does.
AFTER = string.ascii_lowercase[3:]
OF_PROCESS = ("hosts/process_{}.", "profiles/process_{}/")


_live: dict[Place, "Mirror"] = {}  # that copy at present, by workdir


def local(workdir: Place) -> Path:
    """Returns the folder for the small files of a run: its workdir, or one in the user's cache that stands for it."""
    if isinstance(workdir, Path):
        return workdir
    return cache_of("workdirs", workdir) / workdir.name


def fetched(workdir: Place, name: str) -> Path | None:
    """Returns where a file of a run is on this machine, brought there first from a workdir in a bucket.

    None where the bucket has none: what lies in the cache then is of a run that was deleted.
    """
    file = local(workdir) / name
    if isinstance(workdir, Remote):
        try:
            content = open_store(workdir).read(name)
        except FileNotFoundError:
            return None
        if not (file.is_file() and file.read_bytes().startswith(content)):  # this machine's last lines stay
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return file


@contextlib.contextmanager
def mirrored(workdir: Place, warn: Callable[[str], None]) -> Iterator[Path]:
    """A context in which `local(workdir)`, which it gives, is copied to a workdir in a bucket."""
    folder = local(workdir)
    if isinstance(workdir, Path):
        yield folder
        return
    lock = _locked(folder, workdir)
    try:
        mirror = _live[workdir] = Mirror(open_store(workdir), folder, warn, jax.process_index())
        try:
            yield folder
        finally:
            del _live[workdir]
            mirror.close()
    finally:
        lock.release()


def upload(workdir: Place) -> None:
    """Copies what has changed in `local(workdir)` now, where that is mirrored."""
    if mirror := _live.get(workdir):
        mirror.copy()


def _locked(folder: Path, workdir: Place) -> WriterLock:
    """Makes the folder and keeps a second start on this machine out, before it fetches anything."""
    beside = folder.with_name(f"{folder.name}.lock_{jax.process_index()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.mkdir(exist_ok=True)
        return WriterLock(beside, workdir)
    except OSError as error:
        raise UserError(
            f"{folder}: the small files of a run in a bucket cannot be written there ({error.strerror}). Set "
            "XDG_CACHE_HOME to a folder that can be written."
        ) from error


class Mirror:
    """Copies files of a folder to a store when they have changed; begins by fetching those of the store.

    A process takes care of the files that bear its number, process 0 of those that bear none as well.
    """

    def __init__(self, store: Store, folder: Path, warn: Callable[[str], None], process: int = 0):
        self._process = process
        self._store, self._folder, self._warn = store, folder, warn
        self._copied: dict[str, tuple[int, int]] = {}  # name -> size and time of change when it was copied
        self._missing: set[str] | None = set()  # names in the bucket that were not fetched; None: it was not listed
        self._has_warned = False
        self._over, self._copying = threading.Event(), threading.Lock()
        self._fetch()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copies what has changed a last time."""
        self._over.set()
        self._thread.join()
        self.copy()

    def copy(self) -> None:
        """Copies what has changed since the last call, first what processes say of themselves: they may be ending."""
        with self._copying:
            self._copy()

    def _copy(self) -> None:
        try:
            for file in sorted(self._folder.rglob("*"), key=lambda file: (HOSTS not in file.parts, file)):
                name, state = file.relative_to(self._folder).as_posix(), _state(file)
                if self._missing is None or name in self._missing:
                    continue
                if state is not None and self._is_own(name) and self._copied.get(name) != state:
                    self._store.write(name, file.read_bytes())
                    self._copied[name] = state
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._warn(f"files of the run could not be copied: {error}. Training continues.")

    def _fetch(self) -> None:
        """The bucket's files replace those of the folder: another machine may have continued the run meanwhile.

        A file that begins with what the bucket has stays, for its last lines were not uploaded before the run died.
        """
        self._missing = None
        try:
            names = {name for name in self._names() if self._is_own(name) and not {"", ".", ".."} & {*name.split("/")}}
            self._missing = names
            for name in sorted(names):
                file, content = self._folder / name, self._store.read(name)
                if not (file.is_file() and file.read_bytes().startswith(content)):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
                    self._copied[name] = _state(file) or (0, 0)
                names.discard(name)
        except OSError as error:
            self._has_warned = True
            self._warn(
                f"files of the run could not be fetched: {error}. Training continues; what was not fetched stays as "
                f"it is in the bucket, and new lines of it in {self._folder}."
            )

    def _names(self) -> list[str]:
        """The names in the bucket that this process may fetch; nothing lists the shards of its checkpoints."""
        if self._process:
            return [name for begin in OF_PROCESS for name in self._store.names(begin.format(self._process))]
        return self._store.names_before(CHECKPOINTS) + [name for first in AFTER for name in self._store.names(first)]

    def _is_own(self, name: str) -> bool:
        if "checkpoints" in name.split("/"):  # of another run inside this one's workdir, such as its base
            return False
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
