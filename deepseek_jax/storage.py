"""Files that may lie in a bucket: read, write, write if absent, list, delete. Google Cloud Storage, S3, local folders.

    store = open_store("gs://bucket/runs/a")              # s3://bucket/runs/a, /data/runs/a
    store.write("checkpoints/x", b"...")                  # whole or not at all, and kept when this returns
    store.write_if_absent("checkpoints/COMMIT", b"...")   # True for one writer of several
    store.names("checkpoints/"), store.read("checkpoints/x"), store.delete_below("checkpoints/")

A bucket has no folders, no locks and no renaming, so nothing here has. What it does have is a condition on a write: the
object must not exist, or must still be the one that was read. Everything that several processes agree on in a bucket
rests on that. It also refuses to change one name many times in a row: write new names rather than one again and again.

TensorStore does the work. Credentials are those of the machine: for gs:// what `gcloud auth application-default login`
leaves, GOOGLE_APPLICATION_CREDENTIALS or the service account of a virtual machine; for s3:// AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, a profile in ~/.aws or the role of the machine. AWS_ENDPOINT_URL and AWS_REGION name another
service that speaks S3.
"""

import contextlib
import dataclasses
import errno
import functools
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.errors import PassingError, UserError

SCHEMES = ("gs", "s3")
URL = re.compile(r"(gs|s3):/+([^/]+)/*(.*)", re.DOTALL)  # pathlib makes gs:/b of gs://b
# How long a request is repeated that a busy or absent service did not answer: about a minute.
RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "16s"}
ABSENT = b"\x02"  # TensorStore's generation of what does not exist; an empty one means any
DRIVERS = {"gs": "gcs", "s3": "s3"}
PART_BYTES, PARTS = (
    2**24,
    4,
)  # of an object that is read into memory that is there: bytes of a request, requests at a time
LOGIN = {
    "gs": "Run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}


class StorageError(OSError):
    """A store refused a request; `strerror` is one line that says which, why, and what to do."""

    def __init__(self, text: str, number: int = errno.EIO):
        super().__init__(number, text)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple:  # as it comes from another process
        return type(self), (self.strerror, self.errno)


def refusal(error: StorageError) -> UserError:
    """Returns what ends a program in one line: PassingError where it was the service, else what is to be corrected."""
    return (PassingError if error.errno == errno.EIO else UserError)(str(error))


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """A context that raises the `refusal` of a StorageError instead of it."""
    try:
        yield
    except StorageError as error:
        raise refusal(error) from error


@dataclasses.dataclass(frozen=True)
class Remote:
    """A place in a bucket, joined with `/` as paths are. Not a path, so that nothing opens it by mistake."""

    url: str  # gs://bucket/a/b, without a slash at the end

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        """The place above; a bucket is its own."""
        above = self.url.rpartition("/")[0]
        return Remote(above) if above.count("/") > 1 else self


Place = Path | Remote


def place(text: str | os.PathLike | Remote) -> Place:
    """Returns the path, or the place in a bucket, that a text names. Raises UserError for gs:// without a bucket."""
    if isinstance(text, Remote):
        return text
    text = os.fspath(text)
    found = URL.fullmatch(text)
    if found:
        return Remote("/".join([f"{found[1]}://{found[2]}", *filter(None, found[3].split("/"))]))
    if text.startswith(tuple(f"{scheme}:/" for scheme in SCHEMES)):
        raise UserError(f"{text}: no bucket is named. Give {text[:2]}://BUCKET/FOLDER.")
    return Path(text)


def open_store(where: str | os.PathLike | Remote) -> "Store":
    """Returns the store of a folder or of a place in a bucket; nothing is asked of it or made there yet."""
    where = place(where)
    return Store(where if isinstance(where, Remote) else Path(os.path.abspath(where)))


class Store:
    """Objects by name, below a folder or a place in a bucket; safe in several threads.

    Every method raises StorageError where the store refuses or cannot be reached. Names are relative, with slashes.

    Attributes:
        place: the folder, absolute, or the place in a bucket.
    """

    def __init__(self, where: Place):
        self.place = where

    def __str__(self) -> str:
        return str(self.place)

    @property
    def is_remote(self) -> bool:
        """Whether the objects lie in a bucket."""
        return isinstance(self.place, Remote)

    def below(self, name: str) -> "Store":
        """Returns the store of a folder of this one."""
        return Store(self.place / name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Returns an object, or its bytes from `start` to `stop`; raises FileNotFoundError where there is none."""
        part = {} if start is None and stop is None else {"byte_range": slice(start, stop)}
        with self._asking("read", name):
            found = self._keys.read(name, **part).result()
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self}/{name}")
        return found.value

    def read_into(self, name: str, view: memoryview, start: int, generation: bytes) -> bool:
        """Fills a buffer with an object's bytes from `start` on, some requests at a time.

        Returns whether the object is still that of `generation` and has so many bytes.
        """
        under_way: deque[tuple[int, int, Any]] = deque()
        for first in range(0, len(view), PART_BYTES):
            stop = min(first + PART_BYTES, len(view))
            with self._asking("read", name):
                asked = self._keys.read(name, byte_range=slice(start + first, start + stop))
            under_way.append((first, stop, asked))
            if len(under_way) == PARTS and not self._fill(name, view, generation, *under_way.popleft()):
                return False
        return all(self._fill(name, view, generation, *part) for part in under_way)

    def _fill(self, name: str, view: memoryview, generation: bytes, first: int, stop: int, asked: Any) -> bool:
        """Fills `view[first:stop]` with an answer; returns whether it is that of `generation`."""
        try:
            with self._asking("read", name):
                found = asked.result()
        except StorageError as error:
            if "OUT_OF_RANGE" in str(error.__cause__):
                return False
            raise
        if found.state != "value" or found.stamp.generation != generation or len(found.value) != stop - first:
            return False
        view[first:stop] = found.value
        return True

    def write(self, name: str, content: bytes | bytearray) -> None:
        """Writes an object, over another one if need be: whole or not at all."""
        with self._asking("write", name):
            self._keys.write(name, content).result()

    def write_if_absent(self, name: str, content: bytes) -> bool:
        """Writes an object unless one has its name; returns whether it did.

        A request that is repeated because its answer was lost finds its own object, and has written it then.
        """
        return self.exchange(name, content, ABSENT) is not None or self._is(name, content)

    def exchange(self, name: str, content: bytes | None, generation: bytes) -> bytes | None:
        """Writes an object (None deletes it) if it is still that of `generation`; returns its new one, or None."""
        with self._asking("write", name):
            return self._keys.write(name, content, if_equal=generation).result().generation or None

    def generation(self, name: str) -> bytes:
        """Returns what changes with each write of an object; `ABSENT` where there is none."""
        with self._asking("read", name):
            return self._keys.read(name, byte_range=slice(0, 1)).result().stamp.generation

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of all objects that begin so, sorted; a bucket is asked for a thousand at a time."""
        return self._listed(self._range(prefix), prefix)

    def names_before(self, end: str) -> list[str]:
        """Returns the names of all objects that come before `end` by their bytes, sorted; what follows is not asked."""
        import tensorstore

        return self._listed(tensorstore.KvStore.KeyRange("", end), "")

    def delete(self, name: str) -> None:
        """Deletes an object; one that is not there is no error."""
        with self._asking("delete", name):
            self._keys.write(name, None).result()

    def delete_below(self, prefix: str) -> None:
        """Deletes all objects whose names begin so; of a folder (`a/b/`) the folder as well."""
        with self._asking("delete", prefix):
            self._keys.delete_range(self._range(prefix)).result()
        if isinstance(self.place, Path) and prefix.endswith("/"):
            _remove_empty(self.place / prefix)

    def check(self) -> None:
        """Raises UserError in one line unless the place can be listed: no such bucket, no right; PassingError."""
        with answered():
            self.names(".check/")

    # ---- how

    def _listed(self, names: Any, shown: str) -> list[str]:
        with self._asking("list", shown):
            found = self._keys.list(names).result()
        return sorted(name.decode(errors="surrogateescape") for name in found)

    def _is(self, name: str, content: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.read(name) == content
        return False

    @functools.cached_property
    def _keys(self) -> Any:
        import tensorstore

        with self._asking("open", ""):
            return tensorstore.KvStore.open(spec(self.place), context=_context()).result()

    def _range(self, prefix: str) -> Any:
        import tensorstore

        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        return tensorstore.KvStore.KeyRange(prefix, end)

    @contextlib.contextmanager
    def _asking(self, verb: str, name: str) -> Iterator[None]:
        """Turns what TensorStore raises into a StorageError."""
        try:
            yield
        except (ValueError, RuntimeError, NotImplementedError, OSError, IndexError) as error:
            if isinstance(error, (StorageError, FileNotFoundError)):
                raise
            where = f"{self}/{name}".rstrip("/")
            text, number = _explained(self.place, str(error))
            raise StorageError(f"{where}: could not {verb}: {text}", number) from error


def spec(where: Place) -> dict[str, Any]:
    """Returns the description of a place as TensorStore's key-value stores take it."""
    if isinstance(where, Path):
        return {"driver": "file", "path": f"{where}/"}
    found = URL.fullmatch(where.url)
    assert found is not None, where
    scheme, bucket, folder = found.groups()
    made: dict[str, Any] = {"driver": DRIVERS[scheme], "bucket": bucket, "path": f"{folder}/" if folder else ""}
    if scheme == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        made |= {"endpoint": endpoint, "aws_region": region or "us-east-1"} if endpoint else {}
        made |= {"aws_region": region} if region else {}
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # the search for profiles prints what it does not find
            made["aws_credentials"] = {"type": "environment"}
    return made


@functools.cache
def _context() -> Any:
    import tensorstore

    return tensorstore.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})


def _explained(where: Place, text: str) -> tuple[str, int]:
    """What a refusal means, in a line that ends with what to do, and the number of the error."""
    line = re.split(r" \[[\w-]+='|\n", text)[0].rstrip(". ")
    line = line[:300]
    if isinstance(where, Path):
        full = "No space left" in text or "RESOURCE_EXHAUSTED" in text
        return f"{line}.", errno.ENOSPC if full else errno.EIO
    scheme, bucket = where.url.split(":")[0], where.url.split("/")[2]
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return f"there is no bucket {bucket}. Make it, or correct the name.", errno.ENOENT
    if re.search(r"credential|UNAUTHENTICATED|PERMISSION_DENIED|AccessDenied|InvalidAccessKeyId|code='40[13]'", text):
        return f"no right to do so ({line}). {LOGIN[scheme]}, for an account that may use {bucket}.", errno.EACCES
    if "NOT_FOUND" in text:
        return f"there is no bucket {bucket}, or it hides from you ({line}). {LOGIN[scheme]}.", errno.ENOENT
    return f"the service cannot be reached or refuses ({line}). Try again, or check the network.", errno.EIO


def _remove_empty(folder: Path) -> None:
    """Removes a folder and those inside it, as far as they hold no file; another process may be at it as well."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)
