"""The bytes of a checkpoint in format 2: objects that each process writes, hashes and reads for itself. No JAX.

    shards/step_00000100/5f2c91aa/00003_000017    pieces of arrays, one after the other, written by process 3
    shards/step_00000100/5f2c91aa/00003.json      what process 3 has written: its objects, with their hashes
    step_00000100/BEGUN                           the folder above; who began this step
    step_00000100/meta.json, config.json          as in format 1
    step_00000100/MANIFEST.json                   arrays, files, and the objects of all processes
    step_00000100/COMMIT                          the sha256 of MANIFEST.json

A hash is taken of the bytes in memory as they are handed to the store. The folder is new with each attempt, so that
nothing that an earlier one still writes can end up in a later one. All that stands under `step_` is small: a list of
these names is a list of the checkpoints.
"""

import collections
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - numpy learns the names of bfloat16 and the float8s
import numpy as np

from deepseek_jax.storage import StorageError, Store
from deepseek_jax.train.checkpoint import grid
from deepseek_jax.train.checkpoint.grid import Piece, Region
from deepseek_jax.train.checkpoint.tier import Tier

SHARDS = "shards"
THREADS = 4  # objects that a process writes, or reads, at a time

Described = Mapping[str, Mapping[str, Any]]  # name -> {"shape", "dtype"}, as a manifest has it


class Source(Protocol):
    """What objects are read from: a store, or something between it and a reader."""

    @property
    def is_remote(self) -> bool:
        """Whether they lie in a bucket."""

    def read(self, name: str) -> bytes:
        """Returns an object; raises FileNotFoundError or StorageError."""


class ShardDamaged(Exception):
    """An object is not what was written; the message names it."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """An object of pieces."""

    name: str  # in the store of the checkpoints
    size: int
    sha256: str
    pieces: tuple[tuple[str, Region], ...]

    def as_json(self) -> list:
        """Returns it as a manifest holds it."""
        return [self.name, self.size, self.sha256, self.pieces]


def folder_of(step_name: str, token: int) -> str:
    """Returns the folder of an attempt to save a step."""
    return f"{SHARDS}/{step_name}/{token:08x}"


def sha256(content: bytes) -> str:
    """Returns the hash of an object."""
    return hashlib.sha256(content).hexdigest()


def write(store: Store | Tier, folder: str, process: int, parts: list[tuple[Piece, np.ndarray]]) -> list[Shard]:
    """Writes what a process holds of a state, and returns its objects.

    `parts` are its pieces and their values; the list is emptied, so that memory is free again once they are written.
    """
    values = {(piece.name, piece.region): value for piece, value in parts}
    objects = grid.packed([piece for piece, _ in parts])
    parts.clear()

    def put(numbered: tuple[int, list[Piece]]) -> Shard:
        number, pieces = numbered
        keys = tuple((piece.name, piece.region) for piece in pieces)
        content = b"".join(_bytes_of(values.pop(key)) for key in keys)
        name = f"{folder}/{process:05d}_{number:06d}"
        store.write(name, content)
        return Shard(name, len(content), sha256(content), keys)

    with ThreadPoolExecutor(THREADS, "shards") as pool:
        return list(pool.map(put, enumerate(objects)))


def parsed(listed: object, arrays: Described) -> list[Shard]:
    """Returns the objects that a manifest lists; ValueError for anything that no writer has written.

    The pieces of an array lie inside it and their bytes fill their objects; whether they cover it a reader finds out.
    """
    if not isinstance(listed, list):
        raise ValueError("no list of objects")
    found = []
    for entry in listed:
        try:
            name, size, digest, pieces = entry
            keys = tuple((array, tuple((int(a), int(b)) for a, b in region)) for array, region in pieces)
            inside = (
                isinstance(name, str) and name.startswith(f"{SHARDS}/") and not {"", ".", ".."} & {*name.split("/")}
            )
            n_bytes = sum(grid.count(region) * np.dtype(arrays[array]["dtype"]).itemsize for array, region in keys)
            shapes = [(region, arrays[array]["shape"]) for array, region in keys]
        except (TypeError, ValueError, KeyError, OverflowError, AttributeError):
            raise ValueError(f"an invalid object {str(entry)[:80]!r}") from None
        fits = all(
            len(region) == len(shape) and all(0 <= a < b <= n for (a, b), n in zip(region, shape, strict=True))
            for region, shape in shapes
        )
        if not (inside and fits and type(size) is int and n_bytes == size and isinstance(digest, str)) or "\0" in name:
            raise ValueError(f"an invalid object {str(entry)[:80]!r}")
        found.append(Shard(name, size, digest, keys))
    return found


def fetch(store: Source, shard: Shard) -> bytes:
    """Returns an object after comparing it with its hash; raises ShardDamaged, StorageError if nothing answers."""
    content = _asked(store.read, store, shard)
    is_whole = _is_whole(content, shard)
    if not is_whole and isinstance(store, Tier):
        content = _asked(store.again, store, shard)
        is_whole = _is_whole(content, shard)
    if len(content) != shard.size:
        raise ShardDamaged(f"{shard.name} has {len(content)} bytes, {shard.size} were written")
    if not is_whole:
        raise ShardDamaged(f"{shard.name} has changed since it was written (sha256 differs)")
    return content


def _asked(read: Callable[[str], bytes], store: Source, shard: Shard) -> bytes:
    """Returns what is there of an object; raises as `fetch` does."""
    try:
        return read(shard.name)
    except FileNotFoundError:
        raise ShardDamaged(f"{shard.name} is missing") from None
    except StorageError as error:
        if store.is_remote:
            raise
        raise ShardDamaged(f"{shard.name} cannot be read ({error})") from None


def _is_whole(content: bytes, shard: Shard) -> bool:
    return len(content) == shard.size and sha256(content) == shard.sha256


def read(
    store: Source,
    shards: Iterable[Shard],
    arrays: Described,
    regions: Mapping[str, Iterable[Region]],
    done: Callable[[str, Region, np.ndarray], None],
) -> None:
    """Reads blocks of arrays, of any division; each object that has a part of them is read once and compared.

    Args:
        store: of the checkpoints.
        shards: of the step.
        arrays: shapes and dtypes.
        regions: name -> blocks.
        done: is given each block once it is complete; the array is the caller's.

    Raises ShardDamaged: an object is not what was written, or a part of a block is in none.
    """
    blocks = {name: [_Block(region, np.dtype(arrays[name]["dtype"])) for region in regions[name]] for name in regions}
    needed = [shard for shard in shards if any(_touches(blocks.get(name, ()), region) for name, region in shard.pieces)]
    for name, several in blocks.items():
        for block in several:
            if not block.left:
                done(name, block.region, block.take())
    for shard, content in _fetched(store, needed):
        start = 0
        for name, region in shard.pieces:
            dtype, n = np.dtype(arrays[name]["dtype"]), grid.count(region)
            piece = np.frombuffer(content, dtype, n, start).reshape(grid.shape_of(region))
            start += n * dtype.itemsize
            for block in blocks.get(name, ()):
                if block.add(piece, region):
                    done(name, block.region, block.take())
    for name, several in blocks.items():
        for block in several:
            if block.left:
                raise ShardDamaged(f"a part of {name} is in none of the objects that its manifest lists")


class _Block:
    """A block of an array that is being read."""

    def __init__(self, region: Region, dtype: np.dtype):
        self.region, self.left, self._dtype = region, grid.count(region), dtype
        self._values: np.ndarray | None = None

    def add(self, piece: np.ndarray, region: Region) -> bool:
        """Copies what a piece has of the block; whether the block is complete with it."""
        common = grid.overlap(self.region, region)
        if common is None or not self.left:
            return False
        if self._values is None:
            self._values = np.empty(grid.shape_of(self.region), self._dtype)
        self._values[grid.within(common, self.region)] = piece[grid.within(common, region)]
        self.left -= grid.count(common)
        return not self.left

    def take(self) -> np.ndarray:
        """Returns the values and lets go of them."""
        values, self._values = self._values, None
        return np.empty(grid.shape_of(self.region), self._dtype) if values is None else values


def _touches(blocks: Iterable[_Block], region: Region) -> bool:
    return any(grid.overlap(block.region, region) is not None for block in blocks)


def _fetched(store: Source, shards: list[Shard]) -> Iterator[tuple[Shard, bytes]]:
    """Yields objects in order, a few of them ahead."""
    with ThreadPoolExecutor(THREADS, "shards") as pool:
        ahead: collections.deque[tuple[Shard, Future]] = collections.deque()
        try:
            for shard in shards:
                ahead.append((shard, pool.submit(fetch, store, shard)))
                if len(ahead) > THREADS:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _bytes_of(value: np.ndarray) -> bytes:
    return np.ascontiguousarray(value).tobytes()


class Reader:
    """Reads blocks of the arrays of a step one after the other; keeps the objects used last, `cache_bytes` of them."""

    def __init__(self, store: Store, manifest: dict, cache_bytes: int):
        self._store, self._arrays, self._left = store, manifest["arrays"], cache_bytes
        self._kept: collections.OrderedDict[str, bytes] = collections.OrderedDict()  # the one used last comes last
        self._lock = threading.Lock()
        self._with: dict[str, list[Shard]] = {}
        for shard in manifest["objects"]:
            for name in {name for name, _ in shard.pieces}:
                self._with.setdefault(name, []).append(shard)

    def __call__(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """Returns `array[index]`; raises ShardDamaged, StorageError."""
        shape = self._arrays[name]["shape"]
        region = (*((i, i + 1) for i in index), *((0, n) for n in shape[len(index) :]))
        found: list[np.ndarray] = []
        read(
            *(self, self._with.get(name, ()), self._arrays, {name: [region]}),
            lambda _, region, values: found.append(values.reshape(shape[len(index) :])),
        )
        return found[0]

    @property
    def is_remote(self) -> bool:
        """As of the store."""
        return self._store.is_remote

    def read(self, name: str) -> bytes:
        """Returns an object, compared with nothing yet."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        content = self._store.read(name)
        with self._lock:
            self._left += len(self._kept.pop(name, b"")) - len(content)
            self._kept[name] = content
            while self._left < 0:
                self._left += len(self._kept.popitem(last=False)[1])
        return content


def part_name(folder: str, process: int) -> str:
    """Returns the name of the list of what a process has written."""
    return f"{folder}/{process:05d}.json"


def part_of(shards: list[Shard]) -> bytes:
    """Returns the content of that list."""
    return json.dumps([shard.as_json() for shard in shards], separators=(",", ":")).encode()
