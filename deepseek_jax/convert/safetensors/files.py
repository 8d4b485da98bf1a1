"""A file, or an object of a bucket, that is read at any offset and notices when it changes meanwhile."""

import os
import stat
import weakref
from pathlib import Path
from typing import Self

from deepseek_jax.convert.safetensors.format import IO_BYTES
from deepseek_jax.errors import UserError
from deepseek_jax.storage import ABSENT, Place, Remote, answered, open_store

State = tuple[int, int] | bytes


def open_file(path: Place, state: State | None = None) -> "OpenFile | OpenObject":
    """Returns a file or an object open for reading; `state` as for `OpenFile`."""
    return OpenObject(path, state) if isinstance(path, Remote) else OpenFile(path, state)


class OpenFile:
    """A regular file open for reading at any offset; it is closed when its last user drops it.

    Tensors are read by `preadv` into fresh memory: pages of a memory map would count as memory of this process.

    Args:
        path: path of the file.
        state: `state` of the file when it was opened before, or None. Raises UserError if it has changed since.

    Attributes:
        size: size in bytes.
        state: (size, time of the last change in ns), which identifies a file that was replaced or rewritten.
    """

    def __init__(self, path: Path, state: State | None = None):
        self.path = path
        try:  # without O_NONBLOCK a named pipe would wait for its writer
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
        self._close = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file.")
        self.size, self.state = status.st_size, (status.st_size, status.st_mtime_ns)
        if state is not None and state != self.state:
            raise self._changed()

    def compared(self, size: int) -> int:
        """Returns 0 for a file of `size` bytes, -1 for a shorter one, 1 for a longer one."""
        return (self.size > size) - (self.size < size)

    def read(self, offset: int, size: int) -> bytearray:
        """Returns `size` bytes from `offset`."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return buffer

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills a contiguous buffer from `offset`. Raises UserError if the file has changed."""
        while view:
            try:
                got = os.preadv(self._descriptor, [view[:IO_BYTES]], offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from None
            if not got:
                raise self._changed()
            view, offset = view[got:], offset + got
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self.state:
            raise self._changed()

    def _changed(self) -> UserError:
        return changed(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class OpenObject:
    """An object of a bucket, read at any offset; as `OpenFile`, but that the size of an object is asked by comparing.

    Attributes:
        state: what changes with each write of the object.
    """

    def __init__(self, path: Remote, state: State | None = None):
        self.path, self._store = path, open_store(path.parent)
        with answered():
            found = self._store.generation(path.name)
        if found == ABSENT:
            raise UserError(f"{path}: missing. Upload it again.")
        if state is not None and state != found:
            raise changed(path)
        self.state: State = found

    def compared(self, size: int) -> int:
        """Returns 0 for an object of `size` bytes, -1 for a shorter one, 1 for a longer one."""
        if size and not self._filled(memoryview(bytearray(1)), size - 1):
            return -1
        return int(self._filled(memoryview(bytearray(1)), size))

    def read(self, offset: int, size: int) -> bytearray:
        """Returns `size` bytes from `offset`."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return buffer

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills a contiguous buffer from `offset`. Raises UserError if the object has changed."""
        if not self._filled(view.cast("B"), offset):
            raise changed(self.path)

    def _filled(self, view: memoryview, offset: int) -> bool:
        with answered():
            return self._store.read_into(self.path.name, view, offset, self.state)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def changed(path: Place) -> UserError:
    """Returns what is raised where a file is not the one that was opened."""
    return UserError(
        f"{path}: was replaced or changed while it was being read. Wait until nothing writes to it, then start again."
    )
