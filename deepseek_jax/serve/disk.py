"""Pages of the cache on the disk, where they survive a restart.

    DIR/WEIGHTS/PAGE     one file per page: magic, SHA-256 of the rest, the tokens that its name covers, its entries

WEIGHTS is a fingerprint of the weights and of the layout of a page; PAGE is the digest by which the pool knows it
(`pages`), which covers all tokens before it and those who may share it. A page is written when a request that computed
it ends, and read when a prompt needs it. Any doubt is a miss: a file of another length, another digest or other tokens
is deleted, and its tokens are computed again. The files that were used last are kept, up to `most_bytes`.
"""

import hashlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.serve.pages import PagePool, Table
from deepseek_jax.tree import dotted

MAGIC = b"deepseek_jax page 1\n"
NAMES = "/".join("[0-9a-f]" * n for n in (32, 64))  # of files below the directory, where others may lie too


class DiskPages:
    """The pages of one engine on the disk.

    Args:
        folder: where they are; made if it is missing.
        most_bytes: what they may take there together.
        weights: of the model; pages of other weights are not found.
        memory_of: returns the shapes of the engine's memory for a number of pages.
    """

    def __init__(self, folder: Path, most_bytes: int, weights: Any, memory_of: Callable[[int], Any]):
        self._top, self._most_bytes = folder, most_bytes
        one, two = memory_of(1), memory_of(2)
        self._axes = jax.tree.map(_differing_axis, one, two)
        self._page = jax.tree.map(lambda a, axis: _without(a, axis), one, self._axes)
        self._take = jax.jit(lambda memory, n: jax.tree.map(lambda a, i: jnp.take(a, n, axis=i), memory, self._axes))
        self._put = jax.jit(self._replaced, donate_argnums=0)
        self._waiting: queue.Queue[tuple[Path, bytes, Any] | None] = queue.Queue(maxsize=64)
        self._writer = threading.Thread(target=self._write_all, name="pages to disk", daemon=True)
        self.use(weights)
        self._writer.start()

    def use(self, weights: Any) -> None:
        """Keys all pages from here on by these weights."""
        layout = repr(jax.tree.leaves_with_path(self._page)).encode()
        self.folder = self._top / hashlib.sha256(fingerprint(weights) + layout).hexdigest()[:32]
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)  # pages contain what users wrote
        except OSError as error:
            raise UserError(
                f"pages cannot be kept in {self._top} ({error.strerror}). Choose another directory."
            ) from None
        self._known = {path.name for path in self.folder.iterdir()}

    def load(self, pages: PagePool, memory: Any, root: bytes, tokens: Sequence[int]) -> Any:
        """Reads the pages that memory does not have of the beginning of `tokens`, as far as there is place.

        Returns the memory with them. They are held by nobody, and found by name when the request is admitted.
        """
        table = pages.open(root, tokens)
        for digest, covered in pages.names_after(table, tokens):
            values = self._read(digest, covered) if digest.hex() in self._known else None
            n_tokens = (len(table.pages) + 1) * pages.page_size
            if values is None or not pages.extend(table, n_tokens):
                break
            memory = self._put(memory, values, np.int32(table.pages[-1]))
            pages.name(table, tokens[: n_tokens + pages.look_ahead])
        pages.close(table)
        return memory

    def save(self, pages: PagePool, memory: Any, table: Table) -> None:
        """Writes those of the table's pages that are not on the disk yet, while others compute; none if it is slow."""
        for page, digest, covered in pages.named(table):
            if digest.hex() not in self._known and not self._waiting.full():
                self._known.add(digest.hex())
                self._waiting.put((self.folder / digest.hex(), covered, self._take(memory, np.int32(page))))

    def flush(self) -> None:
        """Waits until all is written."""
        self._waiting.join()

    def close(self) -> None:
        """Writes what is left and ends the thread that writes."""
        self._waiting.put(None)
        self._writer.join()

    def _read(self, digest: bytes, covered: bytes) -> Any:
        """The entries of a page; None for a file that is missing or in doubt, which is deleted."""
        path = self.folder / digest.hex()
        try:
            content = path.read_bytes()
            os.utime(path)  # it was used
        except OSError:
            self._known.discard(path.name)
            return None
        body = content[len(MAGIC) + 32 :]
        sizes = [int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(self._page)]
        is_sound = content.startswith(MAGIC + hashlib.sha256(body).digest()) and body.startswith(covered)
        if not is_sound or len(body) != len(covered) + sum(sizes):
            path.unlink(missing_ok=True)
            self._known.discard(path.name)
            return None
        ends = np.cumsum([len(covered), *sizes])
        parts = [body[start:end] for start, end in itertools.pairwise(ends)]
        leaves, tree = jax.tree.flatten(self._page)
        values = [np.frombuffer(part, a.dtype).reshape(a.shape) for part, a in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, values)

    def _write_all(self) -> None:
        while job := self._waiting.get():
            path, covered, values = job
            try:
                body = covered + b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(values))
                write_atomically(path, MAGIC + hashlib.sha256(body).digest() + body)
                self._make_room()
            except OSError:  # a full disk costs a miss later
                self._known.discard(path.name)
            finally:
                self._waiting.task_done()
        self._waiting.task_done()

    def _make_room(self) -> None:
        """Deletes the files that were not used for longest, of any weights."""
        found = sorted((stat.st_mtime, stat.st_size, path) for path, stat in _files(self._top))
        excess = sum(size for _, size, _ in found) - self._most_bytes
        for _, size, path in found:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            self._known.discard(path.name)
            excess -= size

    def _replaced(self, memory: Any, values: Any, page: jax.Array) -> Any:
        def one(a: jax.Array, value: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(a, value, page, axis)

        return jax.tree.map(one, memory, values, self._axes)


def fingerprint(weights: Any) -> bytes:
    """Returns 32 bytes that differ if any weight does: sums of all bits with odd factors, made where they lie.

    Not against forgery: whoever can write weights can say anything.
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(weights):
        found.update(f"{dotted(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.asarray(_sums(leaf)).tobytes())
    return found.digest()


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Two sums modulo 2**32 over the bits of an array; a change of one element changes both."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32).ravel()
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    factors = [2 * place + 1, (place * jnp.uint32(0x9E3779B9)) | 1]
    return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in factors])


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob(NAMES):
        try:
            found.append((path, path.stat()))
        except OSError:
            continue  # deleted meanwhile
    return found


def _differing_axis(one: jax.ShapeDtypeStruct, two: jax.ShapeDtypeStruct) -> int:
    return next(i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b)


def _without(a: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*a.shape[:axis], *a.shape[axis + 1 :]), a.dtype)
