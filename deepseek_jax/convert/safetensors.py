"""Directories of safetensors files, read without trust.  Plain files and numpy, no JAX; `safetensors_writer` writes.

A file is    u64 little-endian n | n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data
A directory is model.safetensors alone, or shards and model.safetensors.index.json {"weight_map": {name: shard}}.

Reading.  `open_directory` looks at headers and file sizes only and accepts what leaves no doubt: every byte of data
belongs to exactly one tensor, shape times item size equals the bytes, index and shards name the same tensors, shards
stand in the directory itself (a symlink may lead elsewhere: that is how download caches are built).  Anything else is
a UserError, found with less than 200 MB of memory however hostile the file; hence headers of at most 24 MB, where the
format's own libraries take 100.  Tensors come by pread into fresh memory: pages of a memory map would count as ours.

8-bit weights.  `read_dequantized` gives    w[i, j] = q[i, j] * scale_inv[i // 128, j // 128]
with q and scale_inv taken to float32, multiplied there and rounded once.  A code has 256 values, so each block gets
a table of 256 results and the rest is looking up: 0.7 to 0.9 GB of codes a second and core, five times what the
plain expression takes in numpy.

Format: https://github.com/huggingface/safetensors; the published libraries read bfloat16 but not float8 into numpy.
"""

import json
import math
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
BLOCK = (128, 128)

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# 8-bit floats that are weights: how many of their positive codes are finite numbers (they come first).
FINITE_CODES = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")

MAX_JSON_BYTES = 24_000_000  # of text: an index of 250,000 tensors has so much
MAX_JSON_VALUES = 250_000  # lists, objects and what stands in them: what bounds the memory of the parsed text
MAX_SHARDS = 10_000
MAX_RANK = 32
ALIGNMENT = 64  # bytes; with it JAX can take an array on the CPU without a copy
COMPARED_BYTES = 1 << 24  # of two tensors at a time
IO_BYTES = 1 << 30  # one system call moves at most 2 GiB
OPEN_FILES = 32
THREADS = min(8, os.cpu_count() or 1)
TABLE_CODES = 1 << 18  # codes looked up at once, so that their indices stay in the cache


class Info(NamedTuple):
    """What a header says of a tensor: dtype by its name in the format, a key of DTYPES."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def open_directory(directory: str | os.PathLike) -> "Tensors":
    """Returns the tensors of a directory after checking all headers; reads no data.  Raises UserError."""
    directory = Path(directory)
    if not directory.is_dir():
        what = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise UserError(f"{directory}: {what}. Give the directory that holds {SINGLE} or {INDEX}.")
    try:
        found = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror}).") from None
    if SINGLE in found and INDEX in found:
        raise UserError(f"{directory}: has both {SINGLE} and {INDEX}, which may differ. Keep the one that is meant.")
    if SINGLE in found:
        return Tensors(directory, {SINGLE: None})
    if INDEX in found:
        return Tensors(directory, _by_shard(directory / INDEX))
    shards = [name for name in found if name.endswith((".safetensors", ".partial"))]
    hint = f" It holds {few(shards)}: an unfinished download or export?" if shards else ""
    if pickled := [name for name in found if re.fullmatch(r"pytorch_model.*\.bin", name)]:
        hint = f" It holds {few(pickled)}: let transformers load it and save_pretrained it, which writes safetensors."
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}.{hint}")


def read_json(path: str | os.PathLike) -> dict:
    """Returns the JSON object in a file; UserError for anything else, duplicated keys and hostile sizes included."""
    path = Path(path)
    with _File(path) as file:
        _check_json_size(path, file.size)
        return _parse_object(path, file.read(0, file.size))


class Tensors:
    """The tensors of a directory.  Safe to read from several threads."""

    def __init__(self, directory: Path, shards: dict[str, set[str] | None]):
        self.directory = directory
        self._places: dict[str, _Place] = {}
        self._states: dict[str, tuple[int, int]] = {}  # of the files whose headers were read
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        missing = [shard for shard in shards if not os.path.lexists(directory / shard)]
        if missing:
            raise UserError(
                f"{directory / missing[0]}: missing, {len(missing)} of {len(shards)} files named in {INDEX} are. "
                "Download or export again."
            )
        for shard, names in shards.items():
            with _File(directory / shard) as file:
                places, self._states[shard] = _read_header(file, shard), file.state
            if names is not None:
                _compare(directory, shard, names, places.keys())
            self._places |= places

    def names(self) -> list[str]:
        """Returns all names, scales included, file by file in the order of the data."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def info(self, name: str) -> Info:
        """Returns the dtype and shape of a tensor as stored."""
        return self._place(name).info

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as stored, in fresh memory, aligned.  Raises UserError where the file has changed."""
        place = self._place(name)
        buffer = _aligned(place.info.nbytes)
        self._file(place.shard).read_into(buffer, place.offset)
        if place.info.dtype == "BOOL" and buffer.size and buffer.max() > 1:
            raise UserError(f"{self._where(name)}: a BOOL holds a byte other than 0 and 1. The file is damaged.")
        return buffer.view(DTYPES[place.info.dtype]).reshape(place.info.shape)

    def is_same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte; a block of each is held at a time."""
        one, two = self._place(name), self._place(other)
        if one.info != two.info:
            return False
        for start in range(0, one.info.nbytes, COMPARED_BYTES):
            n_bytes = min(COMPARED_BYTES, one.info.nbytes - start)
            blocks = [np.empty(n_bytes, np.uint8) for _ in range(2)]
            for block, place in zip(blocks, (one, two), strict=True):
                self._file(place.shard).read_into(block, place.offset + start)
            if not np.array_equal(*blocks):
                return False
        return True

    def holds(self, name: str, array: np.ndarray) -> bool:
        """Whether a tensor is stored with the dtype, the shape and every byte of an array."""
        place = self._place(name)
        if (DTYPES[place.info.dtype], place.info.shape) != (array.dtype, array.shape):
            return False
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, place.info.nbytes, COMPARED_BYTES):
            block = np.empty(min(COMPARED_BYTES, place.info.nbytes - start), np.uint8)
            self._file(place.shard).read_into(block, place.offset + start)
            if not np.array_equal(block, data[start : start + block.size]):
                return False
        return True

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is one of 8-bit floats, which `read_dequantized` multiplies with its scales."""
        return self.info(name).dtype in FINITE_CODES

    def read_dequantized(self, name: str, dtype: object = None, block: tuple[int, int] = BLOCK) -> np.ndarray:
        """Returns an 8-bit weight times its ``NAME_scale_inv`` in ``dtype`` (bfloat16), any other tensor as stored.

        w = round(float32(q) * float32(scale_inv)), blocks over the last two axes, the last ones may be partial.
        Memory: the result and a few MB for each of THREADS threads.  Raises UserError for scales that are missing,
        of a wrong shape, not finite, negative or beyond ``dtype``, and for a NaN or an infinity among the codes.
        """
        if not self.is_quantized(name):
            return self.read(name)
        place, dtype = self._place(name), np.dtype(dtype or ml_dtypes.bfloat16)
        shape = place.info.shape
        scales = self._scales(name, dtype, block)
        values = np.arange(256, dtype=np.uint8).view(DTYPES[place.info.dtype]).astype(np.float32)
        *leading, rows, columns = shape
        matrices = math.prod(leading)
        scales = scales.reshape(matrices, *scales.shape[-2:])
        result = _aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(matrices, rows, columns)
        file, limit = self._file(place.shard), FINITE_CODES[place.info.dtype]

        def one_row_of_blocks(matrix: int, i: int) -> None:
            start, stop = i * block[0], min((i + 1) * block[0], rows)
            codes = np.empty((stop - start, columns), np.uint8)
            file.read_into(codes.reshape(-1), place.offset + (matrix * rows + start) * columns)
            if (codes & 0x7F).max() >= limit:
                row, column = np.argwhere((codes & 0x7F) >= limit)[0]
                raise UserError(f"{self._where(name)}: NaN or infinity in row {start + row}, column {column}.")
            with np.errstate(all="ignore"):  # the table has the codes that do not occur as well
                table = (scales[matrix, i, :, None] * values).astype(dtype).reshape(-1)
            _look_up(table, codes, block[1], result[matrix, start:stop])

        if result.size:
            jobs = [(matrix, i) for matrix in range(matrices) for i in range(scales.shape[1])]
            with ThreadPoolExecutor(min(THREADS, len(jobs))) as pool:
                list(pool.map(lambda job: one_row_of_blocks(*job), jobs))
        return result.reshape(shape)

    def _scales(self, name: str, dtype: np.dtype, block: tuple[int, int]) -> np.ndarray:
        scale_name, shape = name + SCALE_SUFFIX, self.info(name).shape
        if scale_name not in self:
            raise UserError(f"{self._where(name)}: 8-bit, but there is no {_shown(scale_name)} to multiply it with.")
        found = self.info(scale_name)
        if len(shape) < 2 or found.shape != _blocks(shape, block):
            wanted = f"{list(_blocks(shape, block))}" if len(shape) > 1 else "two axes or more"
            raise UserError(
                f"{self._where(scale_name)}: shape {list(found.shape)}; {_shown(name)} of shape {list(shape)} "
                f"in blocks of {block[0]}x{block[1]} wants {wanted}."
            )
        if found.dtype not in SCALE_DTYPES:
            raise UserError(f"{self._where(scale_name)}: dtype {found.dtype}; scales are {' or '.join(SCALE_DTYPES)}.")
        scales = self.read(scale_name).astype(np.float32)
        largest = float(ml_dtypes.finfo(DTYPES[self.info(name).dtype]).max)
        lawful = (scales >= 0) & (scales * np.float64(largest) <= float(ml_dtypes.finfo(dtype).max))  # false for a NaN
        if not lawful.all():
            at = [int(i) for i in np.argwhere(~lawful)[0]]
            raise UserError(f"{self._where(scale_name)}: {scales[tuple(at)]} at {at} is no scale for {dtype.name}.")
        return scales

    def _place(self, name: str) -> "_Place":
        if name not in self._places:
            raise UserError(f"{self.directory}: no tensor {_shown(name)}.")
        return self._places[name]

    def _where(self, name: str) -> str:
        return f"{self.directory / self._place(name).shard}: {_shown(name)}"

    def _file(self, shard: str) -> "_File":
        with self._lock:
            if shard not in self._files:
                while len(self._files) >= OPEN_FILES:
                    del self._files[next(iter(self._files))]  # closed when its last reader lets go of it
                self._files[shard] = _File(self.directory / shard, self._states[shard])
            return self._files[shard]


def _look_up(table: np.ndarray, codes: np.ndarray, width: int, result: np.ndarray) -> None:
    """result[i, j] = table[256 * (j // width) + codes[i, j]], some rows at a time."""
    rows, columns = codes.shape
    first = np.arange(columns) // width * 256
    step = max(1, min(rows, TABLE_CODES // columns))
    for i in range(0, rows, step):
        indices = codes[i : i + step].astype(np.intp)
        indices += first
        np.take(table, indices, out=result[i : i + step], mode="clip")


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=False)))


def _aligned(nbytes: int) -> np.ndarray:
    """Returns uninitialised bytes that start at a multiple of ALIGNMENT."""
    try:
        room = np.empty(nbytes + ALIGNMENT, np.uint8)
    except MemoryError:
        raise UserError(f"{nbytes / 2**30:.1f} GiB for one tensor: not enough memory.") from None
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes]


# -- headers ---------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    shard: str
    offset: int  # bytes from the start of the file
    info: Info


def _by_shard(path: Path) -> dict[str, set[str]]:
    """Returns the names that an index expects in each shard."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map {{tensor: file}} in it. Download or export again.")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in shards:
            _check_shard_name(path, name, shard, len(shards))
            shards[shard] = set()
        shards[shard].add(name)
    return shards


def _check_shard_name(path: Path, name: str, shard: object, seen: int) -> None:
    if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,200}", shard):
        raise UserError(
            f"{path}: {_shown(name)} is said to be in {_shown(shard)}; "
            "wanted the plain name of a file in the same directory."
        )
    if seen == MAX_SHARDS:
        raise UserError(f"{path}: names more than {MAX_SHARDS} files. The file is damaged?")


def _compare(directory: Path, shard: str, wanted: set[str], found: Iterable[str]) -> None:
    if lacking := sorted(wanted - set(found)):
        raise UserError(f"{directory / shard}: {few(lacking)} not in it, though {INDEX} says so.")
    if unexpected := sorted(set(found) - wanted):
        raise UserError(f"{directory / shard}: {few(unexpected)} in it, of which {INDEX} does not say so.")


def _read_header(file: "_File", shard: str) -> dict[str, _Place]:
    """Returns where the tensors of a file are, in the order of the data; raises UserError."""
    path, again = file.path, "The file is damaged or no safetensors file."
    if file.size < 8:
        raise UserError(f"{path}: {file.size} bytes, too few for a header. {again}")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise UserError(f"{path}: a header of {length} bytes in a file of {file.size}. {again}")
    _check_json_size(path, length)
    raw = file.read(8, length)
    if not raw.startswith(b"{"):
        raise UserError(f"{path}: the header does not start with a brace. {again}")
    header = _parse_object(path, raw)
    del raw
    _check_metadata(path, header.pop("__metadata__", {}))
    ordered = sorted((*_tensor(path, name, entry), name) for name, entry in header.items())
    end, places = 0, {}
    for begin, stop, info, name in ordered:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes before it unused"
            raise UserError(f"{path}: {_shown(name)} {what}. {again}")
        end, places[name] = stop, _Place(shard, 8 + length + begin, info)
    if end != file.size - 8 - length:
        what = "truncated" if end > file.size - 8 - length else "longer than its header says"
        raise UserError(f"{path}: {what}, {file.size} bytes where {8 + length + end} are described. Download it again.")
    return places


def _tensor(path: Path, name: str, entry: object) -> tuple[int, int, Info]:
    """Returns begin, end and what a header says of one tensor, checked by itself."""
    if not name.isprintable() or not 0 < len(name) <= 1000:
        raise _unlawful(path, name, "no lawful name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _unlawful(path, name, "wanted dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _unlawful(path, name, f"dtype {_shown(dtype)} is unknown; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape, MAX_RANK):
        raise _unlawful(path, name, f"shape {_shown(shape)} is no list of up to {MAX_RANK} sizes")
    if not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise _unlawful(path, name, f"data_offsets {_shown(offsets)} are not two positions")
    itemsize, nbytes = DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if math.prod(shape) * itemsize != nbytes:
        takes = math.prod(shape) * itemsize
        raise _unlawful(path, name, f"{nbytes} bytes for {dtype} of shape {_shown(shape)}, which takes {takes}")
    if not nbytes and math.prod(size or 1 for size in shape) * itemsize >= 2**63:
        raise _unlawful(path, name, f"shape {_shown(shape)} is beyond any memory")
    return *offsets, Info(dtype, tuple(shape))


def _unlawful(path: Path, name: str, what: str) -> UserError:
    return UserError(f"{path}: {_shown(name)}: {what}. The file is damaged or not for this version.")


def _are_sizes(values: object, most: int) -> bool:
    """Whether this is a list of at most so many integers, each from 0 to 2^63 - 1; True and False are none."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all([type(value) is int and 0 <= value < 2**63 for value in values])


def _check_metadata(path: Path, metadata: object) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and _is_unicode(text) for text in texts):
        raise UserError(f"{path}: __metadata__ is no map from text to text. The file is damaged.")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _check_json_size(path: Path, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read. The file is damaged?")


def _parse_object(path: Path, raw: bytearray) -> dict:
    """Returns a JSON object; what would take long or much memory is refused before it is parsed."""
    ascii_only = raw.isascii()
    if not ascii_only:
        _check_json_size(path, 4 * len(raw))  # a character may take four bytes in memory
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_JSON_VALUES:
        raise UserError(f"{path}: JSON of more than {MAX_JSON_VALUES} values. The file is damaged?")
    try:
        value = json.loads(raw.decode("ascii" if ascii_only else "utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply. The file is damaged?") from None
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({str(error)[:100]}). The file is damaged?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object, found {_shown(value)}.")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_shown(twice)} stands there twice")
    return result


def _shown(value: object) -> str:
    """A value from a file on one short line, quoted and escaped where it is text."""
    if isinstance(value, list):
        inner = ["…" if isinstance(item, (list, dict)) else _shown(item) for item in value[:8]]
        text = f"[{', '.join(inner)}{', …' if len(value) > 8 else ''}]"
    else:
        text = "{…}" if isinstance(value, dict) else repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 120 else text[:119] + "…"


def few(names: list[str]) -> str:
    shown = ", ".join(map(_shown, names[:3]))
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _File:
    """A regular file open for reading at any place; closed with its last user.

    Args:
        path: of the file.
        state: what `state` was when it was opened before; UserError if it is not so any more.

    Attributes:
        size: in bytes.
        state: (size, time of the last change in ns), by which a file that was replaced or rewritten is known.
    """

    def __init__(self, path: Path, state: tuple[int, int] | None = None):
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

    def read(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        self.read_into(buffer, offset)
        return buffer

    def read_into(self, buffer: bytearray | np.ndarray, offset: int) -> None:
        """Fills contiguous bytes from a place in the file."""
        view = memoryview(buffer)
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
        return UserError(f"{self.path}: was replaced or changed while it was in use. Start again, with files at rest.")

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
