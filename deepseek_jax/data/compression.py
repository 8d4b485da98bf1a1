"""Files as they are, or decompressed while they are read: `.gz` by the standard library, `.zst` by zstandard.

A truncated compressed file causes an error, never less text.
"""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from deepseek_jax.errors import UserError

ENDINGS = (".gz", ".zst")
BLOCK = 128 << 10  # compressed bytes read at a time


def content_type(path: Path) -> str:
    """Returns the ending that gives a file's type, in lower case: `.jsonl` for `a.JSONL.gz`."""
    *_, inner, outer = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return inner if outer in ENDINGS else outer


def decompressed(file: io.BufferedIOBase, path: Path) -> io.BufferedIOBase:
    """Returns a reader of the text in `file`, according to the ending of `path`.

    Raises:
        UserError: the file is a `.zst` and the package zstandard is missing. The returned reader raises an error of
            `damage()` if the file is damaged or truncated.
    """
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(file, path), BLOCK)
    return file


class _Zstandard(io.RawIOBase):
    """Consecutive frames of zstandard; the package's own reader accepts a truncated frame as complete."""

    def __init__(self, file: io.BufferedIOBase, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path} is compressed with zstandard, and the package is not installed. Run: pip install zstandard"
            ) from error
        self._file, self._new_frame = file, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` as far as possible and returns the number of bytes; 0 at the end of the file."""
        while not self._rest:
            block = self._file.read(BLOCK)
            if not block and self._frame is not None:
                raise EOFError("the file ends in the middle of a frame")
            if not block:
                return 0
            self._rest = self._decompress(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            self._frame = self._frame or self._new_frame()
            parts.append(self._frame.decompress(block))
            block = b""
            if self._frame.eof:
                block, self._frame = self._frame.unused_data, None
        return b"".join(parts)


def damage() -> tuple[type[Exception], ...]:
    """Returns the errors that a damaged compressed file causes."""
    known = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        from zstandard import ZstdError
    except ImportError:
        return known
    return (*known, ZstdError)
