"""A file of numbers of which every byte is checked when it is first read: one hash per block of 64 KiB.

    tokens.uint16            the numbers
    tokens.uint16.hashes     blake2b of each block, 16 bytes each, in order

A flipped bit in a token file would silently train on a wrong token, and hashing a whole file of a terabyte at every
start would take hours. So the first read of a block hashes it, once per process. Files are read, not mapped: if one is
truncated while it is in use, a short read becomes an error message, but a mapped page would end the process by SIGBUS.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from deepseek_jax.errors import LocalError

BLOCK_BYTES = 64 << 10
DIGEST_BYTES = 16


class DamagedFile(LocalError):
    """A file is not what was written; the message names the file and the bytes."""


def seal(path: Path) -> dict:
    """Writes the hashes of a file's blocks beside it; returns what `Blocks` needs to check them."""
    digests, size = bytearray(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digests += _digest(block)
            size += len(block)
    hashes_of(path).write_bytes(digests)
    return {"size": size, "hashes": _digest(digests).hex()}


def hashes_of(path: Path) -> Path:
    """Returns the path of the hashes of a file's blocks."""
    return path.with_name(f"{path.name}.hashes")


class Blocks:
    """A sealed file, open for reading by any number of threads.

    Raises DamagedFile: immediately if size or hashes are not those returned by `seal`, otherwise at the first read of a
    damaged block.
    """

    def __init__(self, path: Path, sealed: dict):
        self.path, self.size = path, int(sealed["size"])
        self._digests = hashes_of(path).read_bytes()
        n_blocks = -(-self.size // BLOCK_BYTES)
        if len(self._digests) != n_blocks * DIGEST_BYTES or _digest(self._digests).hex() != sealed["hashes"]:
            raise DamagedFile(f"{hashes_of(path)} has changed since it was written.")
        self._descriptor = os.open(path, os.O_RDONLY)
        self._is_good = bytearray(n_blocks)
        if (found := os.fstat(self._descriptor).st_size) != self.size:
            raise DamagedFile(f"{path} has {found:,} bytes, expected {self.size:,}.")

    def __del__(self) -> None:
        if (descriptor := self.__dict__.pop("_descriptor", None)) is not None:
            os.close(descriptor)

    def check(self) -> None:
        """Reads the whole file."""
        for start in range(0, self.size, 64 * BLOCK_BYTES):
            self.read(start, min(start + 64 * BLOCK_BYTES, self.size))

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes `start` to `stop`, which must be within the file."""
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if all(self._is_good[first:last]):
            return self._read(start, stop)
        begin = first * BLOCK_BYTES
        found = self._read(begin, min(last * BLOCK_BYTES, self.size))
        for block in range(first, last):
            part = found[block * BLOCK_BYTES - begin :][:BLOCK_BYTES]
            if _digest(part) != self._digests[block * DIGEST_BYTES :][:DIGEST_BYTES]:
                where = f"bytes {block * BLOCK_BYTES:,} to {block * BLOCK_BYTES + len(part):,}"
                raise DamagedFile(f"{self.path}: {where} have changed since they were written.")
            self._is_good[block] = 1
        return found[start - begin : stop - begin]

    def _read(self, start: int, stop: int) -> bytes:
        found = bytearray()
        while len(found) < stop - start:
            try:
                part = os.pread(self._descriptor, stop - start - len(found), start + len(found))
            except OSError as error:
                raise DamagedFile(f"{self.path} cannot be read ({error.strerror}).") from error
            if not part:
                raise DamagedFile(f"{self.path} ends at byte {start + len(found):,}, expected {self.size:,}.")
            found += part
        return bytes(found)


class Numbers:
    """A one-dimensional array in a sealed file; slices are cheap, and read when they become numpy arrays."""

    def __init__(self, blocks: Blocks, dtype: str | np.dtype, start: int = 0, stop: int | None = None):
        self.blocks, self.dtype, self._start = blocks, np.dtype(dtype), start
        self._stop = blocks.size // self.dtype.itemsize if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, places: slice) -> "Numbers":
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise IndexError("numbers of a sealed file: expected a slice of step 1")
        return Numbers(self.blocks, self.dtype, self._start + start, self._start + max(start, stop))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        size = self.dtype.itemsize
        found = np.frombuffer(self.blocks.read(self._start * size, self._stop * size), self.dtype)
        return found if dtype is None else found.astype(dtype, copy=False)


def _digest(content: bytes | bytearray) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
