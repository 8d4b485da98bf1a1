"""What makes a checkpoint trustworthy: a hash of every file, and a COMMIT marker written last. Plain files, no JAX.

A step is one directory, and its states are distinguishable after a crash at any instant:

    step_00000100/arrays/…         written by Orbax
    step_00000100/config.json      the resolved config
    step_00000100/meta.json        the rest of the caller's metadata
    step_00000100/MANIFEST.json    arrays: {name: shape, dtype};  files: {path: size, sha256} of all the above
    step_00000100/COMMIT           the sha256 of MANIFEST.json; its existence makes the step count

Every file is flushed to the disk before COMMIT is, and deletion starts with COMMIT.  So a directory without COMMIT is
litter, and one with COMMIT either equals its manifest to the last bit or is damaged and refused by name.
The chain is COMMIT → MANIFEST.json → files: zarr and OCDBT alone hand out wrong numbers after a single flipped bit.
The cost is one more pass over the bytes at restoring, and at saving unless they were hashed as they were written, at 1
to 2 GB/s a core with SHA instructions.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import ml_dtypes  # noqa: F401 - numpy learns the names of bfloat16 and the float8s
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.files import flush_folder, write_atomically

ARRAYS, CONFIG, META, MANIFEST, COMMIT = "arrays", "config.json", "meta.json", "MANIFEST.json", "COMMIT"
FORMAT = 1
HASH_THREADS = 8


class CheckpointDamaged(Exception):
    """A committed step is not what was written; the message names the file and what is wrong with it."""


def as_json(content: object) -> bytes:
    """Returns a small file's text, indented for people."""
    return f"{json.dumps(content, indent=2)}\n".encode()


def of_meta(meta: dict) -> dict[str, bytes]:
    """Returns the files that hold a step's metadata, by name. Raises UserError for what JSON cannot hold."""
    rest = {key: value for key, value in meta.items() if key != "config"}
    try:
        return {META: as_json(rest)} | ({CONFIG: as_json(meta["config"])} if "config" in meta else {})
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint metadata must be what JSON can hold: {error}.") from None


def read_meta(path: Path) -> dict:
    """Returns the metadata of a step: the inverse of `of_meta`."""
    meta = json.loads((path / META).read_bytes())
    if (path / CONFIG).exists():
        meta["config"] = json.loads((path / CONFIG).read_bytes())
    return meta


def step_dir(root: Path, step: int) -> Path:
    """Returns the directory of a step: `step_00000100`, sorted by name as by number."""
    return root / f"step_{step:08d}"


def step_dirs(root: Path) -> dict[int, Path]:
    """Returns every directory that bears a step's name, committed or not, in ascending order."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    numbers = sorted(int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8,18}", name))
    return {step: step_dir(root, step) for step in numbers if step_dir(root, step).name in names}


def committed_steps(root: Path) -> list[int]:
    """Returns the steps that have a COMMIT marker, ascending; their contents are not looked at."""
    return [step for step, path in step_dirs(root).items() if os.path.lexists(path / COMMIT)]


def commit(path: Path, step: int, arrays: dict[str, dict], known: Mapping[str, dict] = MappingProxyType({})) -> None:
    """Hashes and flushes all files of a step, writes the manifest and, last of all, the COMMIT marker.

    `known` holds the size and sha256 of files that are on the disk already and were hashed when they were written;
    they are not read again. Raises CheckpointDamaged where one of those is missing or has another size.
    """
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    for name, written in known.items():
        if name not in found or found[name].stat().st_size != written["size"]:
            raise CheckpointDamaged(f"{name} is missing or cut short since it was written")
    others = sorted(found.keys() - known.keys())
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = dict(zip(others, pool.map(lambda name: digest(found[name], flush=True), others), strict=True))
    digests |= known
    files = {name: digests[name] for name in sorted(found)}
    for folder in (path, *(folder for folder in path.rglob("*") if folder.is_dir())):
        flush_folder(folder)
    manifest = json.dumps({"format": FORMAT, "step": step, "arrays": arrays, "files": files}, indent=1).encode()
    write_atomically(path / MANIFEST, manifest)
    write_atomically(path / COMMIT, _marker(step, manifest))
    flush_folder(path.parent)


def read_manifest(path: Path, step: int) -> dict:
    """Returns the manifest of a committed step after checking it against COMMIT; raises CheckpointDamaged."""
    raw, marker = read_checked(path / MANIFEST), read_checked(path / COMMIT)
    if marker != _marker(step, raw):
        raise CheckpointDamaged(f"{COMMIT} and {MANIFEST} do not match: one of them has changed since it was written")
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{MANIFEST} is not JSON ({error})") from None
    _check(manifest, step)
    return manifest


def _check(manifest: object, step: int) -> None:
    """Raises CheckpointDamaged unless a manifest has everything that its readers use, of the right types."""
    if not isinstance(manifest, dict):
        raise CheckpointDamaged(f"{MANIFEST} holds a {type(manifest).__name__}, expected an object")
    for key, expected in (("format", FORMAT), ("step", step)):
        if type(found := manifest.get(key)) is not int or found != expected:
            raise CheckpointDamaged(f"{MANIFEST} has {key} {found!r}, expected {expected}")
    for key in ("files", "arrays"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointDamaged(f"{MANIFEST} has no table of {key}: expected one entry for each")
    _check_entries(manifest["files"], manifest["arrays"])


def _check_entries(files: dict, arrays: dict) -> None:
    """Raises CheckpointDamaged unless every file and array is listed with what its readers use."""
    for name, file in files.items():
        if "\0" in name or {"", ".", ".."} & set(name.split("/")):  # leads out of the directory, or stands for nothing
            raise CheckpointDamaged(f"{MANIFEST} lists {name!r}: expected a path inside the step")
        if not (isinstance(file, dict) and _is_count(file.get("size")) and isinstance(file.get("sha256"), str)):
            raise CheckpointDamaged(f"{MANIFEST} lists {name!r} without a valid size and sha256")
    for name, array in arrays.items():
        shape, dtype = (array.get("shape"), array.get("dtype")) if isinstance(array, dict) else (None, None)
        if not (isinstance(shape, list) and all(map(_is_count, shape)) and _is_dtype(dtype)):
            raise CheckpointDamaged(f"{MANIFEST} lists array {name!r} without a valid shape and dtype")
    for needed in (META, *((f"{ARRAYS}/",) if arrays else ())):
        if not any(name == needed or (needed.endswith("/") and name.startswith(needed)) for name in files):
            raise CheckpointDamaged(f"{MANIFEST} lists no file {needed}: its content cannot be verified")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_dtype(value: object) -> bool:
    try:
        return isinstance(value, str) and np.dtype(value).name == value
    except TypeError:
        return False


def verify(
    path: Path, step: int, only: tuple[str, ...] | None = None, report: Callable[[int], None] = lambda n_bytes: None
) -> dict:
    """Returns the manifest after comparing all files (or those named in `only`) with it.

    `report` receives the size of each file once it is compared. Raises CheckpointDamaged, also for a file that a
    reader would use and the manifest does not list.
    """
    manifest = read_manifest(path, step)
    readable = [path / CONFIG, *((path / ARRAYS).rglob("*") if only is None else ())]
    for name in (file.relative_to(path).as_posix() for file in readable if file.is_file()):
        if name not in manifest["files"]:
            raise CheckpointDamaged(f"{name} is not listed in {MANIFEST}: it cannot be verified")
    names = [name for name in manifest["files"] if only is None or name in only]

    def complaint(name: str) -> str | None:
        try:
            found, written = digest(path / name), manifest["files"][name]
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ValueError:  # a lone surrogate
            return f"{name!r} is not a file's name"
        if found["size"] != written["size"]:
            return f"{name} has {found['size']} bytes, {written['size']} were written"
        return None if found == written else f"{name} has changed since it was written (sha256 differs)"

    complaints = []
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, text in zip(names, pool.map(complaint, names), strict=True):
            complaints += [text] if text else []
            report(manifest["files"][name]["size"])
    if complaints:
        more = f" (and {len(complaints) - 1} more files)" if len(complaints) > 1 else ""
        raise CheckpointDamaged(complaints[0] + more)
    return manifest


def remove(path: Path, tries: int = 5) -> None:
    """Deletes a step's directory, COMMIT first, so that a half-deleted step is litter and not damage; raises OSError.

    Writers of a failed save may still be adding files, hence the tries.
    """
    if path.is_symlink() or path.is_file():
        return path.unlink()
    if not (path / COMMIT).is_dir():
        (path / COMMIT).unlink(missing_ok=True)
    for left in reversed(range(tries)):
        try:
            return shutil.rmtree(path)
        except FileNotFoundError:
            if not path.exists():
                return None
        except OSError:
            if not left:
                raise
        time.sleep(0.1)


def read_checked(path: Path) -> bytes:
    """Returns a file's bytes; raises CheckpointDamaged where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointDamaged(f"{path.name} cannot be read ({error.strerror})") from None


def _marker(step: int, manifest: bytes) -> bytes:
    digest = hashlib.sha256(manifest).hexdigest()
    return f"deepseek_jax checkpoint, step {step}\nsha256 of {MANIFEST}: {digest}\n".encode()


def digest(path: Path, flush: bool = False) -> dict:
    """Returns {size, sha256} of a file, as manifests hold them, and flushes it to the disk if asked to."""
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": found}


class WriterLock:
    """One writer a directory: an flock on `.writer`, which the kernel drops when the process dies, in any way."""

    def __init__(self, root: Path):
        self._file = open(root / ".writer", "ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).decode(errors="replace").strip() or "unknown"
            self._file.close()
            raise UserError(
                f"{root} is being written by another run ({holder}). Stop that one, or choose another directory."
            ) from None
        except OSError:  # a file system without locks: nothing to hold on to
            pass
        # A forked child shares the lock and would hold it after our death: it lets go of its copy at birth.
        os.register_at_fork(after_in_child=self._file.close)
        try:
            self._file.truncate(0)
            self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # a full disk: the name is lost, the lock holds
            pass

    def release(self) -> None:
        """Lets the next writer in."""
        self._file.close()
