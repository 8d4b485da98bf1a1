"""A checkpoint written or read piece by piece, so that a model of any size passes through little memory. No JAX.

    arrays = {"params/head/weight_DV": ((7168, 129280), "bfloat16"), …}
    with StreamedStep(workdir / "checkpoints", 0, arrays, source="what is being written") as step:
        for name, index, piece in pieces:                 # index: layer, or layer and expert, or () for the whole
            if not step.is_done(name, index):             # done before the program was killed
                step.write(name, index, piece)
        step.commit({"config": …})                        # from now on it is a checkpoint

    read = StepReader(workdir / "checkpoints", 0)
    read("params/moe_blocks/experts/gate_XDF", (3, 17))   # one expert of one layer

What `Checkpointer` restores, on any mesh, is an Orbax directory of zarr arrays (version 2). In the
plainest form of that format an array is a folder with a JSON header, `.zarray`, and a file for each chunk: the bytes
of an evenly spaced block in C order, named by its place, `3.17.0.0`. Here a chunk is one piece, or a block of rows
of a large one, uncompressed: weights shrink by a quarter at best, and at a tenth of a disk's speed.

A journal beside the step, `step_00000000.journal`, lists the pieces that are on the disk (flushed, not merely handed
to the system) with a hash of each chunk, taken from memory as it was written. Its first line says what is written from
what, and only the same again may resume there. Pieces of an earlier start count only if their files still have the
hashes of the journal, so that a damaged one is written anew; nothing else is read back. The step has no COMMIT marker
until all is written, so nobody takes it for a checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

import ml_dtypes  # noqa: F401 - numpy learns the names of bfloat16 and the float8s
import numpy as np

from deepseek_jax.data.watch import Watch, unwatched
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Remote, open_store, place
from deepseek_jax.train.checkpoint import manifest as files
from deepseek_jax.train.checkpoint import shards
from deepseek_jax.train.checkpoint.writer import WriterLock

CHUNK_BYTES = 64 * 2**20  # a larger piece is cut into blocks of rows
PENDING_BYTES = 256 * 2**20  # of pieces that are waiting to be written, at most
THREADS = 4  # each copies a chunk and waits for the disk
STRIP = 16  # columns of a transposed array copied at a time: twice as fast as all at once
DICT_KEY = 2  # Orbax's number for the key of a dict
JOURNAL_FORMAT = 2

Index = tuple[int, ...]


class StreamedStep:
    """One step of a directory of checkpoints, written in pieces that come in any order; takes up where it was killed.

    Args:
        directory: of the checkpoints; made if need be, and locked against other writers.
        step: its number.
        arrays: name, as `tree.flatten` gives it, -> (shape, dtype).
        source: a line that is the same for the same bytes; what was written from another one is not resumed.
        watch: shows how far the check of an earlier start's pieces is.

    Attributes:
        n_bytes: of all arrays.
        n_bytes_done: of those pieces that are written, now or before.
        resumed: whether an earlier start left pieces to resume from.
        n_damaged: pieces of an earlier start that are not what was written, and so are to be written again.

    Raises UserError: the step exists, or another source's unfinished one; no right to write; another writer.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        step: int,
        arrays: Mapping[str, tuple],
        source: str,
        watch: Watch = unwatched,
    ):
        self.directory, self.step = Path(os.path.abspath(directory)), step
        self.path = files.step_dir(self.directory, step)
        self._arrays = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        self._lead: dict[str, int] = {}  # leading axes that an index names: one number an array
        self._done: dict[tuple[str, Index], list[str]] = {}  # piece -> sha256 of its chunks
        self.n_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._arrays.values())
        self.n_bytes_done = self.n_damaged = 0
        self._journal: BinaryIO
        self._failure: BaseException | None = None
        self._pending_bytes, self._changed = 0, threading.Condition()
        with self._telling():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self.directory)
        try:
            with self._telling():
                self._open(source, watch)
        except BaseException:
            self._lock.release()
            raise
        self.resumed = bool(self._done)
        self._writers = ThreadPoolExecutor(THREADS, "write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def is_done(self, name: str, index: Index = ()) -> bool:
        """Whether a piece is written already."""
        return (name, tuple(index)) in self._done

    def write(self, name: str, index: Index, piece: np.ndarray) -> None:
        """Writes `array[index] = piece`; the indices of one array are all of the same length.

        Threads do it: `piece` must not change any more. Returns once no more than 256 MiB are waiting, so that
        memory holds these, the copies of chunks that are being written (as much again) and the caller's next piece.
        """
        shape, dtype = self._arrays[name]
        index = tuple(int(i) for i in index)
        if piece.dtype != dtype or piece.shape != shape[len(index) :]:
            there = f"{piece.dtype}{list(piece.shape)}"
            raise ValueError(f"{name}{list(index)}: {there} is not a piece of an array {dtype}{list(shape)}.")
        if len(index) != self._lead.setdefault(name, len(index)) or any(
            not 0 <= i < n for i, n in zip(index, shape, strict=False)
        ):
            raise ValueError(f"{name}{list(index)}: expected {self._lead[name]} indices inside {list(shape)}.")
        if self.is_done(name, index):
            return
        chunks = _chunk_files(shape, dtype, index)
        job = _Job(name, index, self._folder(name), piece.nbytes, len(chunks), [""] * len(chunks))
        self._mark(name, index, job.digests)
        with self._telling():
            job.folder.mkdir(parents=True, exist_ok=True)
        with self._changed:
            self._pending_bytes += piece.nbytes
        rows = _chunk_shape(shape, dtype, len(index))[len(index) :][:1]
        for number, (key, size) in enumerate(chunks):
            block = piece[number * rows[0] :][: rows[0]] if rows else piece
            self._writers.submit(self._write_chunk, job, number, job.folder / _file_name(key), block, size)
        self._wait(PENDING_BYTES)

    def flush(self) -> None:
        """Returns once all that was written is on the disk and in the journal."""
        self._wait(0)

    def commit(self, meta: dict) -> None:
        """Makes the step a checkpoint; `meta["config"]` becomes `config.json`."""
        missing = next(self._missing(), None)
        if missing is not None:
            raise ValueError(f"{self.path}: {missing} was never written.")
        self.flush()
        with self._telling():
            self._commit(meta)

    def close(self) -> None:
        """Flushes what was written and lets go of the directory; what is not committed can be resumed."""
        self._writers.shutdown()
        self._journal.close()
        self._lock.release()

    # ---- how

    def _commit(self, meta: dict) -> None:
        for litter in (self.path / files.MANIFEST, *self.path.rglob("*.partial")):  # of a commit that was killed
            litter.unlink(missing_ok=True)
        for name, (shape, dtype) in self._arrays.items():
            header = _zarr_header(shape, dtype, _chunk_shape(shape, dtype, self._lead[name]))
            files.write_atomically(self._folder(name) / ".zarray", files.as_json(header))
        files.write_atomically(self.path / files.ARRAYS / "_METADATA", files.as_json(_orbax_metadata(self._arrays)))
        for name, content in files.of_meta(meta).items():
            files.write_atomically(self.path / name, content)
        described = {name: {"shape": list(shape), "dtype": str(dtype)} for name, (shape, dtype) in self._arrays.items()}
        try:
            files.commit(self.path, self.step, described, self._known())
        except files.CheckpointDamaged as damage:
            raise UserError(
                f"{self.path}: {damage}. Start the same command again: it writes what is missing."
            ) from None
        self._journal_path.unlink(missing_ok=True)

    def _known(self) -> dict[str, dict]:
        """Size and hash of every chunk, by its path in the step."""
        found = {}
        for (name, index), digests in self._done.items():
            folder = self._folder(name).relative_to(self.path).as_posix()
            for (key, size), digest in zip(_chunk_files(*self._arrays[name], index), digests, strict=True):
                found[f"{folder}/{_file_name(key)}"] = {"size": size, "sha256": digest}
        return found

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    def _folder(self, name: str) -> Path:
        return self.path / files.ARRAYS / name.replace("/", ".")

    def _open(self, source: str, watch: Watch) -> None:
        """Reads what an earlier start has left behind, or begins anew."""
        arrays = json.dumps({name: [shape, str(dtype)] for name, (shape, dtype) in sorted(self._arrays.items())})
        digest = hashlib.sha256(arrays.encode()).hexdigest()
        first = {"format": JOURNAL_FORMAT, "step": self.step, "source": source, "arrays": digest}
        if self.step in files.committed_steps(self.directory):
            self._journal_path.unlink(missing_ok=True)
            raise UserError(f"{self.path} is a finished checkpoint. Choose another directory, or move it away.")
        lines = _whole_lines(self._journal_path)
        if lines and lines[0] != first:
            was = lines[0].get("source") if isinstance(lines[0], dict) else "what an unreadable journal does not say"
            what = "another version of this program or other arrays" if was == source else was
            raise UserError(
                f"{self.path} was begun with {what} and is not finished; now given: {source}. "
                f"Delete it and {self._journal_path.name} to begin anew, or choose another directory."
            )
        if not lines and self.path.exists():  # what some other unfinished save has left
            files.remove(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._recall([piece for line in lines[1:] if (piece := self._piece(line))], watch)
        done = ([name, index, digests] for (name, index), digests in sorted(self._done.items()))
        text = "".join(f"{json.dumps(line)}\n" for line in [first, *done])
        files.write_atomically(self._journal_path, text.encode())  # without what was torn or is not there any more
        self._journal = open(self._journal_path, "ab")

    def _wait(self, n_bytes: int) -> None:
        """Waits until no more than so many bytes are left to be written; raises what went wrong with any."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending_bytes <= n_bytes or self._failure)
        if self._failure:
            with self._telling():
                raise self._failure

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns what the disk refuses into a UserError."""
        try:
            yield
        except OSError as error:
            text = f"{self.path} could not be written ({error.strerror})"
            raise UserError(f"{text}. Fix that; the same command then resumes here.") from error

    def _write_chunk(self, job: "_Job", number: int, path: Path, block: np.ndarray, size: int) -> None:
        """Runs in a thread; the last chunk of a piece enters it into the journal, unless any has failed."""
        try:
            if self._failure is None:
                job.digests[number] = _write_file(path, block, size)
            with self._changed:
                job.n_left -= 1
                if job.n_left:
                    return
                if self._failure is None:
                    files.flush_folder(job.folder)
                    self._journal.write(f"{json.dumps([job.name, job.index, job.digests])}\n".encode())
                    self._journal.flush()
                    os.fsync(self._journal.fileno())
                self._pending_bytes -= job.n_bytes
                self._changed.notify_all()
        except BaseException as error:  # raised at the next write
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _piece(self, line: Any) -> tuple[str, Index, list[str]] | None:
        """The name, index and hashes in a line of the journal; None where a damaged disk has left something else."""
        try:
            name, index, digests = line
            shape, dtype = self._arrays[name]
            index, expected = tuple(index), _chunk_files(shape, dtype, tuple(index))
            is_inside = len(index) <= len(shape) and all(0 <= i < n for i, n in zip(index, shape, strict=False))
            return (name, index, digests) if is_inside and len(digests) == len(expected) else None
        except (TypeError, ValueError, KeyError, IndexError):
            return None

    def _recall(self, pieces: list[tuple[str, Index, list[str]]], watch: Watch) -> None:
        """Takes those pieces as done whose files are there and have the hashes of the journal."""

        def is_intact(piece: tuple[str, Index, list[str]]) -> bool:
            name, index, digests = piece
            for (key, size), sha256 in zip(_chunk_files(*self._arrays[name], index), digests, strict=True):
                file = self._folder(name) / _file_name(key)
                if not file.is_file() or files.digest(file) != {"size": size, "sha256": sha256}:
                    return False
            return True

        total = sum(self._n_bytes(name, index) for name, index, _ in pieces)
        with watch("check", total) as progress, ThreadPoolExecutor(files.HASH_THREADS) as pool:
            for (name, index, digests), intact in zip(pieces, pool.map(is_intact, pieces), strict=True):
                progress.advance(self._n_bytes(name, index))
                if not intact:
                    self.n_damaged += 1
                elif not self.is_done(name, index) and len(index) == self._lead.setdefault(name, len(index)):
                    self._mark(name, index, digests)

    def _mark(self, name: str, index: Index, digests: list[str]) -> None:
        self._done[name, index] = digests
        self.n_bytes_done += self._n_bytes(name, index)

    def _n_bytes(self, name: str, index: Index) -> int:
        shape, dtype = self._arrays[name]
        return math.prod(shape[len(index) :]) * dtype.itemsize

    def _missing(self) -> Iterator[Any]:
        """Yields the pieces not yet written."""
        for name, (shape, _) in self._arrays.items():
            if name not in self._lead:
                yield name
                continue
            for index in itertools.product(*map(range, shape[: self._lead[name]])):
                if not self.is_done(name, index):
                    yield f"{name}{list(index)}"


class StepReader:
    """Reads pieces of a committed step, whether `Checkpointer`, `StreamedStep` or Orbax has written it.

    Args:
        directory: of the checkpoints.
        step: a committed one; files of format 1 are taken as they are (`manifest.verify` proves them).
        cache_bytes: decoded chunks to keep. Orbax puts all layers of an array that one device held into one chunk,
            which has to be decoded for each layer again unless it is kept.

    Attributes:
        arrays: name -> (shape, dtype).
    """

    def __init__(self, directory: str | os.PathLike | Remote, step: int, cache_bytes: int = 512 * 2**20):
        import tensorstore

        root = place(directory)
        path = files.step_dir(Path(os.path.abspath(root)) if isinstance(root, Path) else root, step)
        manifest = files.read_manifest(path, step)
        self.arrays = {name: (tuple(a["shape"]), np.dtype(a["dtype"])) for name, a in manifest["arrays"].items()}
        self._shards = shards.Reader(open_store(path.parent), manifest, cache_bytes) if manifest["format"] > 1 else None
        if self._shards is not None:
            return
        self._folder = path / files.ARRAYS
        self._is_database = (self._folder / "manifest.ocdbt").exists()
        few = {"limit": THREADS}  # chunks read at a time; by default as many as there are cores
        cache = {"total_bytes_limit": cache_bytes if self._is_database else 0}
        limits = {"cache_pool": cache, "file_io_concurrency": few, "data_copy_concurrency": few}
        self._context = tensorstore.Context(limits)
        self._opened: dict[str, Any] = {}

    def __call__(self, name: str, index: Index = ()) -> np.ndarray:
        """Returns `array[index]`, the only part of it that is kept in memory."""
        if self._shards is not None:
            return self._shards(name, tuple(index))
        if name not in self._opened:
            self._opened[name] = self._open(name.replace("/", "."))
        return self._opened[name][tuple(index)].read().result()

    def _open(self, key: str) -> Any:
        import tensorstore

        if self._is_database:
            store = {"driver": "ocdbt", "base": f"file://{self._folder}/", "path": f"{key}/"}
        else:
            store = {"driver": "file", "path": f"{self._folder / key}/"}
        spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
        return tensorstore.open(spec, read=True, open=True, context=self._context).result()


@dataclasses.dataclass
class _Job:
    """A piece that is being written."""

    name: str
    index: Index
    folder: Path
    n_bytes: int
    n_left: int  # chunks
    digests: list[str]  # sha256 of each chunk, once it is written


def _chunk_shape(shape: tuple[int, ...], dtype: np.dtype, lead: int) -> tuple[int, ...]:
    """A piece, or as many equal blocks of its rows as keep each within CHUNK_BYTES."""
    piece = shape[lead:]
    if not piece:
        return (1,) * lead
    n_blocks = min(math.ceil(math.prod(piece) * dtype.itemsize / CHUNK_BYTES), piece[0])
    return (*(1,) * lead, math.ceil(piece[0] / n_blocks), *piece[1:])


def _chunk_files(shape: tuple[int, ...], dtype: np.dtype, index: Index) -> list[tuple[Index, int]]:
    """(Place of a chunk in the grid, its bytes) for the chunks of a piece."""
    chunk = _chunk_shape(shape, dtype, len(index))
    size = math.prod(chunk) * dtype.itemsize
    if len(index) == len(shape):
        return [(index, size)]
    rest = (0,) * (len(shape) - len(index) - 1)
    return [((*index, block, *rest), size) for block in range(math.ceil(shape[len(index)] / chunk[len(index)]))]


def _file_name(key: Index) -> str:
    return ".".join(map(str, key)) or "0"


def _write_file(path: Path, block: np.ndarray, size: int) -> str:
    """Writes a chunk of `size` bytes, the last one of an array filled up with zeros, and flushes it to the disk.

    Returns the sha256 of the file, from the bytes in memory.
    """
    data = _contiguous(block.view(f"u{block.itemsize}")).reshape(-1).view(np.uint8).data
    sha256 = hashlib.sha256(data)
    sha256.update(bytes(size - len(data)))
    with open(path, "wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        file.truncate(size)
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _contiguous(block: np.ndarray) -> np.ndarray:
    """The array in C order; `numpy.ascontiguousarray` reads a transposed one with a cache miss for each number."""
    if block.flags.c_contiguous:
        return block
    copy = np.empty(block.shape, block.dtype)
    for start in range(0, block.shape[-1], STRIP):
        copy[..., start : start + STRIP] = block[..., start : start + STRIP]
    return copy


def _whole_lines(path: Path) -> list:
    """The JSON lines of a journal; a line that cannot be read is None, one that a crash has torn is left out."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []

    def parsed(line: bytes) -> object:
        try:
            return json.loads(line)
        except ValueError:
            return None

    return [parsed(line) for line in text.split(b"\n")[:-1]]


def _zarr_header(shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> dict:
    kind = dtype.str if dtype.isbuiltin == 1 else dtype.name
    settings = {"zarr_format": 2, "order": "C", "dimension_separator": "."}
    return {"shape": shape, "chunks": chunks, "dtype": kind, **settings} | dict.fromkeys(
        ("compressor", "filters", "fill_value")
    )


def _orbax_metadata(arrays: Mapping[str, tuple]) -> dict:
    """The `_METADATA` file by which Orbax knows the tree and the format."""

    def leaf(name: str, shape: tuple[int, ...]) -> dict:
        keys = [{"key": key, "key_type": DICT_KEY} for key in name.split("/")]
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)}
        return {"key_metadata": keys, "value_metadata": value}

    tree = {str(tuple(name.split("/"))): leaf(name, shape) for name, (shape, _) in arrays.items()}
    settings = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return {"tree_metadata": tree, **settings, "custom_metadata": None}
