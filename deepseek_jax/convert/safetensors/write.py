"""Directories of safetensors files, written in one pass.

`write_directory` knows all sizes beforehand, so it writes headers first and each tensor as it is made. Files get their
final names only once all of them are on disk, and the index comes last: a directory that looks complete is complete.

An object of a bucket is written as a whole. There a shard is filled in memory and then sent, so that memory holds it
twice, beside the tensor that is made: shards are small, a single tensor if that is larger.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from deepseek_jax.convert.safetensors.format import DTYPE_NAMES, DTYPES, INDEX, IO_BYTES, SINGLE, Info, few
from deepseek_jax.errors import UserError
from deepseek_jax.files import flush_folder, write_atomically
from deepseek_jax.paths import check_local
from deepseek_jax.storage import Remote, Store, answered, open_store, place

MAX_SHARD_BYTES = 5_000_000_000
SENT_SHARD_BYTES = 1 << 28  # of a shard in a bucket
COPIED_BYTES = 1 << 26  # of a transposed array at a time


class Entry(NamedTuple):
    """A tensor to write: `make()` is called when its turn comes, and the array is dropped afterwards."""

    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike  # a key of DTYPES, or a numpy dtype
    make: Callable[[], np.ndarray]


def write_directory(
    directory: str | os.PathLike | Remote,
    entries: Iterable[Entry],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    single: str = SINGLE,
) -> None:
    """Writes tensors in the given order, one at a time, as one file (`single`) or as shards with an index.

    A shard takes tensors in order until the next one would exceed `max_shard_bytes`, in a bucket `SENT_SHARD_BYTES` if
    that is less (a single larger one is a shard). Each array must have the shape and dtype of its entry. On a disk,
    file names end in `.partial` until all are there. Raises UserError if the directory already holds weights, cannot be
    written, or the disk is full.
    """
    where, entries = place(directory), [Entry(*entry) for entry in entries]
    infos = {name: Info(_dtype_name(dtype), tuple(map(int, shape))) for name, shape, dtype, _ in entries}
    if len(infos) != len(entries) or "__metadata__" in infos:
        raise ValueError("tensor names must be unique and not __metadata__")
    total = sum(info.nbytes for info in infos.values())
    limit = min(max_shard_bytes, SENT_SHARD_BYTES) if isinstance(where, Remote) else max_shard_bytes
    shards = list(_into_shards(entries, infos, limit))
    count = len(shards)
    names = [single] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
    into = _send if isinstance(where, Remote) else _write
    into(where, dict(zip(names, shards, strict=True)), infos, index if count > 1 else None)  # type: ignore[arg-type]


def _write(directory: Path, shards: dict[str, list[Entry]], infos: dict[str, Info], index: bytes | None) -> None:
    """Writes shards, given by the names of their files, and their index."""
    check_local(directory)
    try:
        _prepare(directory, sum(info.nbytes for info in infos.values()))
        for name, shard in shards.items():
            _write_file(directory / f"{name}.partial", shard, infos)
        for name in shards:
            os.replace(directory / f"{name}.partial", directory / name)
        flush_folder(directory)
        if index is not None:
            write_atomically(directory / INDEX, index)
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be written ({error.strerror}).") from None
    finally:
        for name in shards:
            with contextlib.suppress(OSError):
                (directory / f"{name}.partial").unlink()


def _send(where: Remote, shards: dict[str, list[Entry]], infos: dict[str, Info], index: bytes | None) -> None:
    """Writes shards and their index to a place in a bucket, one object at a time."""
    store = open_store(where)
    with answered():
        check_free(store)
        for name, shard in shards.items():
            _send_file(store, name, shard, infos)
        if index is not None:
            store.write(INDEX, index)


def check_free(store: Store) -> None:
    """Raises UserError if a place in a bucket already holds weights; what lies below it in folders is none of them."""
    found = [name for name in store.names() if "/" not in name]
    if old := [name for name in found if name == INDEX or name.endswith(".safetensors")]:
        raise UserError(f"{store}: already holds {few(old)}. Choose another place, or delete them first.")


def _dtype_name(dtype: DTypeLike) -> str:
    return dtype if isinstance(dtype, str) and dtype in DTYPES else DTYPE_NAMES[np.dtype(dtype)]


def _into_shards(entries: list[Entry], infos: dict[str, Info], max_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        nbytes = infos[entry.name].nbytes
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += nbytes
    yield shard


def _prepare(directory: Path, total: int) -> None:
    """Makes the directory. Raises UserError if it already holds weights, or if the disk has too little space."""
    directory.mkdir(parents=True, exist_ok=True)
    old = sorted(name for name in os.listdir(directory) if name == INDEX or name.endswith(".safetensors"))
    if old:
        raise UserError(f"{directory}: already holds {few(old)}. Choose another directory, or delete them first.")
    for name in os.listdir(directory):  # left by a killed run
        if re.fullmatch(r"(adapter_)?model[-.\w]*\.partial", name):
            (directory / name).unlink()
    free = shutil.disk_usage(directory).free
    if total > free:
        numbers = f"{total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free on its disk"
        raise UserError(f"{directory}: {numbers}. Free some space.")


def _write_file(path: Path, entries: list[Entry], infos: dict[str, Info]) -> None:
    """Writes one file."""
    with open(path, "wb", buffering=0) as file:
        for view, offset in _pieces(entries, infos):
            _write_at(file.fileno(), view, offset)
            del view
        os.fsync(file.fileno())


def _send_file(store: Store, name: str, entries: list[Entry], infos: dict[str, Info]) -> None:
    """Writes one object."""
    pieces = _pieces(entries, infos)
    view, offset = next(pieces)
    content = bytearray(len(view) + sum(infos[entry.name].nbytes for entry in entries))
    content[: len(view)] = view
    filled = memoryview(content)  # a slice of the array itself would make a copy first
    for view, offset in pieces:
        filled[offset : offset + len(view)] = view
        del view
    store.write(name, content)


def _pieces(entries: list[Entry], infos: dict[str, Info]) -> Iterator[tuple[memoryview, int]]:
    """Yields the parts of one file and where they belong, first the header; each tensor is made when its turn comes.

    The widest dtypes lie first whatever the order of writing, so that all tensors are aligned.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for entry in sorted(entries, key=lambda entry: -DTYPES[infos[entry.name].dtype].itemsize):
        info = infos[entry.name]
        offsets[entry.name], begin, end = end, end, end + info.nbytes
        header[entry.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield memoryview(len(raw).to_bytes(8, "little") + raw), 0
    for entry in entries:
        info, array = infos[entry.name], np.asarray(entry.make())
        if array.shape != info.shape or array.dtype != DTYPES[info.dtype]:
            raise ValueError(f"{entry.name}: got {array.dtype}{array.shape}, expected {info.dtype}{info.shape}")
        offset = 8 + len(raw) + offsets[entry.name]
        for block in _blocks_in_order(array):
            yield block.reshape(-1).view(np.uint8).data, offset
            offset += block.nbytes
        del array, block


def _blocks_in_order(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array as blocks of rows in C order, so that a transposed one is never copied as a whole."""
    if array.flags.c_contiguous:
        yield array
        return
    n_rows = max(1, COPIED_BYTES // array[:1].nbytes)
    for start in range(0, len(array), n_rows):
        yield np.ascontiguousarray(array[start : start + n_rows])


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(descriptor, view[:IO_BYTES], offset)
        view, offset = view[done:], offset + done
