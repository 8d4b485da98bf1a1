"""Windows as records of an ArrayRecord file.

    record  =  T+1 ids | end of each document in the window, uint32        (all little-endian)

Ids take the smallest type that holds the vocabulary. The last end is the number of tokens; what follows is padding.
The files compress to about a third, verify their own blocks, and give any record by its number.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.blocks import DamagedFile
from deepseek_jax.data.packing import Packing, Window
from deepseek_jax.data.prepared.folder import fetched
from deepseek_jax.errors import LocalError, LocalPassingError, PassingError, UserError
from deepseek_jax.storage import Place, StorageError, refusal

WRITING = "group_size:1,zstd:1"  # a record can be read without its neighbours
READING = "readahead_buffer_size:0"  # records are read one at a time, in any order
MOST_OPEN = 256  # files
ENDS = np.dtype("<u4")


class Written(NamedTuple):
    """A file of records."""

    windows: int
    bytes: int  # of the file
    hash: str  # of its records


def to_records(packing: Packing, epoch: int) -> Iterator[bytes]:
    """Yields the windows of an epoch, in order, with ids of the dtype of the store."""
    tokens, ends = packing.stream(epoch)
    tokens = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    starts = np.arange(packing.n_samples) * packing.seq_len
    stops = np.minimum(starts + packing.seq_len + 1, len(tokens))
    firsts, lasts = (np.searchsorted(ends, places, side="right") for places in (starts, stops - 1))
    for start, stop, first, last in zip(starts, stops, firsts, lasts, strict=True):
        window = tokens[start:stop]
        if short := packing.seq_len + 1 - len(window):
            window = np.pad(window, (0, short), constant_values=packing.pad_id)
        yield window.tobytes() + (np.minimum(ends[first : last + 1], stop) - start).astype(ENDS).tobytes()


def from_record(record: bytes, n_tokens: int, dtype: np.dtype) -> Window:
    """Returns a window of `n_tokens` that `to_records` wrote. Raises ValueError if it is none."""
    split = n_tokens * dtype.itemsize
    tokens = np.frombuffer(record[:split], dtype.newbyteorder("<"))
    ends = np.frombuffer(record[split:], ENDS)
    if len(tokens) != n_tokens or not len(ends) or ends[-1] > n_tokens:
        raise ValueError(f"a record of {len(record)} bytes is not a window of {n_tokens} tokens")
    places = np.arange(n_tokens)
    numbers = np.searchsorted(ends, places, side="right") + 1
    return Window(tokens.astype(np.int32), np.where(places < ends[-1], numbers, 0).astype(np.int32))


def write_records(path: Path, records: Iterable[bytes]) -> Written:
    """Writes a file, the same bytes for the same records. Raises UserError if it cannot be written."""
    from array_record.python.array_record_module import ArrayRecordWriter

    digest, count = hashlib.blake2b(digest_size=12), 0
    with _written(path):
        writer = ArrayRecordWriter(str(path), WRITING)
    for record in records:
        with _written(path):
            writer.write(record)
        digest.update(len(record).to_bytes(8, "little") + record)
        count += 1
    with _written(path):
        writer.close()
    return Written(count, path.stat().st_size, digest.hexdigest())


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turns what the C++ writer raises, errors of any class, into a UserError."""
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be written ({what}). Free space on its disk if that is full, then repeat the command: it "
            "continues."
        ) from error


def read_record(path: Place, number: int, size: int, text: str) -> bytes:
    """Returns a record of a file that has `size` bytes, of the prepared text that has the hash `text`.

    A copy in the cache from which it cannot be read is fetched once more. Raises DamagedFile if the file is not as it
    was written, another LocalError if it cannot be fetched or kept.
    """
    try:
        return _record(path, number, size, text)
    except DamagedFile:
        if isinstance(path, Path):
            raise
    _fetched(path, size, text, anew=True)
    _opened.cache_clear()
    return _record(path, number, size, text)


def _record(path: Place, number: int, size: int, text: str) -> bytes:
    try:
        return _opened(path, size, text).read([number])[0]
    except LocalError:
        raise
    except Exception as error:  # the C++ reader raises errors of any class
        what = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{path} is damaged: record {number} cannot be read ({what}).") from error


@functools.lru_cache(MOST_OPEN)
def _opened(path: Place, size: int, text: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(_fetched(path, size, text)), READING)


def _fetched(path: Place, size: int, text: str, *, anew: bool = False) -> Path:
    """Returns where a file is on this machine; raises as `read_record`."""
    try:
        file = fetched(path, size, text, anew=anew)
        found = file.stat().st_size
    except StorageError as error:
        kind = LocalPassingError if isinstance(refusal(error), PassingError) else LocalError
        raise kind(str(error)) from error
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror}).") from error
    if found != size:
        raise DamagedFile(f"{path} has {found:,} bytes, expected {size:,}.")
    return file
