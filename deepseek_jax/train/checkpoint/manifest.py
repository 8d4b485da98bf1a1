"""What makes a checkpoint trustworthy: a hash of all bytes, and a COMMIT marker written last. No JAX.

In format 2, which `Checkpointer` writes, on a disk or in a bucket, the bytes of arrays are in objects of their own
(`shards.py`). In format 1, that of converted weights and of older versions, a step is one directory:

    step_00000100/arrays/…         zarr arrays, as Orbax writes and reads them
    step_00000100/config.json      the resolved config
    step_00000100/meta.json        the rest of the caller's metadata
    step_00000100/MANIFEST.json    arrays: {name: shape, dtype};  files: {path: size, sha256} of all the above
    step_00000100/COMMIT           the sha256 of MANIFEST.json; its existence makes the step count

In both, everything is on the disk before COMMIT is, and deletion starts with COMMIT.  So a step without COMMIT is
litter, and one with COMMIT either equals its manifest to the last bit or is damaged and refused by name.
The chain is COMMIT → MANIFEST.json → bytes: zarr and OCDBT alone hand out wrong numbers after a single flipped bit.
Hashing takes 1 to 2 GB/s a core with SHA instructions; restoring format 1 takes one more pass over the bytes.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401 - numpy learns the names of bfloat16 and the float8s
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.files import flush_folder, write_atomically
from deepseek_jax.storage import Place, Remote, StorageError, Store, open_store
from deepseek_jax.train.checkpoint import shards
from deepseek_jax.train.checkpoint.shards import SHARDS, Shard, ShardDamaged

ARRAYS, CONFIG, META, MANIFEST, COMMIT = "arrays", "config.json", "meta.json", "MANIFEST.json", "COMMIT"
FORMATS = (1, 2)
BEGUN = "BEGUN"  # of a step in format 2: whoever began it, and in which folder
HASH_THREADS = 8


CheckpointDamaged = ShardDamaged  # a committed step is not what was written; the message names the file and its fault


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


def read_meta(path: Place) -> dict:
    """Returns the metadata of a step: the inverse of `of_meta`."""
    return json.loads(_read(path / META)) | read_config(path)


def read_config(path: Place) -> dict:
    """Returns {"config": …} of a step as far as it has one."""
    with contextlib.suppress(FileNotFoundError):
        return {"config": json.loads(_read(path / CONFIG))}
    return {}


def _read(place: Place) -> bytes:
    return place.read_bytes() if isinstance(place, Path) else open_store(place.parent).read(place.name)


def step_dir(root: Place, step: int) -> Any:
    """Returns the directory of a step, of the type of `root`: `step_00000100`, sorted by name as by number."""
    return root / f"step_{step:08d}"


def _numbers(names: Iterable[str]) -> list[int]:
    """The steps among names, ascending."""
    found = {int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8,18}", name)} if (names := {*names}) else ()
    return [step for step in sorted(found) if f"step_{step:08d}" in names]


def step_dirs(root: Place) -> dict[int, Any]:
    """Returns every directory that bears a step's name, committed or not, in ascending order."""
    if isinstance(root, Remote):
        names = [name.partition("/")[0] for name in open_store(root).names("step_")]
    else:
        try:
            names = os.listdir(root)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    return {step: step_dir(root, step) for step in _numbers(names)}


def committed_steps(root: Place) -> list[int]:
    """Returns the steps that have a COMMIT marker, ascending; their contents are not looked at."""
    if isinstance(root, Remote):
        ends = [name.removesuffix(f"/{COMMIT}") for name in open_store(root).names("step_") if name.endswith(COMMIT)]
        return _numbers(ends)
    return [step for step, path in step_dirs(root).items() if os.path.lexists(path / COMMIT)]


def begin(root: Place, step: int, token: int, who: str) -> None:
    """Marks a step of format 2 as begun, in an attempt that has a number of its own; raises OSError."""
    name = step_dir(root, step).name
    open_store(root).write(f"{name}/{BEGUN}", as_json({"shards": shards.folder_of(name, token), "by": who}))


def commit_shards(root: Place, step: int, arrays: dict[str, dict], texts: dict[str, bytes], found: list[Shard]) -> None:
    """Writes what makes a step of format 2 a checkpoint: its metadata, its manifest and, last of all, COMMIT.

    Raises FileExistsError where another writer has been faster.
    """
    store, name = open_store(root), step_dir(root, step).name
    for file, text in texts.items():
        store.write(f"{name}/{file}", text)
    files = {file: {"size": len(text), "sha256": shards.sha256(text)} for file, text in texts.items()}
    described = {"format": 2, "step": step, "arrays": arrays, "files": files}
    objects = ",\n".join(json.dumps(shard.as_json(), separators=(",", ":")) for shard in found)
    manifest = f'{json.dumps(described, indent=1)[:-2]},\n "objects": [\n{objects}\n]\n}}\n'.encode()
    for file, content in ((MANIFEST, manifest), (COMMIT, _marker(step, manifest))):
        if not store.write_if_absent(f"{name}/{file}", content):
            raise FileExistsError(17, f"another run writes to {root}: it has written {name}/{file}")


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
    manifest = json.dumps({"format": 1, "step": step, "arrays": arrays, "files": files}, indent=1).encode()
    write_atomically(path / MANIFEST, manifest)
    write_atomically(path / COMMIT, _marker(step, manifest))
    flush_folder(path.parent)


def read_manifest(path: Place, step: int) -> dict:
    """Returns the manifest of a committed step after checking it against COMMIT; raises CheckpointDamaged.

    "objects" are `Shard`s; a manifest of format 1 has none.
    """
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
    for key, expected in (("format", FORMATS), ("step", (step,))):
        if type(found := manifest.get(key)) is not int or found not in expected:
            raise CheckpointDamaged(f"{MANIFEST} has {key} {found!r}, expected {' or '.join(map(str, expected))}")
    for key in ("files", "arrays"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointDamaged(f"{MANIFEST} has no table of {key}: expected one entry for each")
    _check_entries(manifest["files"], manifest["arrays"], is_first=manifest["format"] == 1)
    if manifest["format"] == 1:
        manifest["objects"] = []
        return
    try:
        manifest["objects"] = shards.parsed(manifest.get("objects"), manifest["arrays"])
    except ValueError as error:
        raise CheckpointDamaged(f"{MANIFEST} lists {error}") from None


def _check_entries(files: dict, arrays: dict, is_first: bool) -> None:
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
    for needed in (META, *((f"{ARRAYS}/",) if arrays and is_first else ())):
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
    path: Place, step: int, only: tuple[str, ...] | None = None, report: Callable[[int], None] = lambda n_bytes: None
) -> dict:
    """Returns the manifest after comparing all files and objects (or only the files named in `only`) with it.

    `report` receives the size of each once it is compared. Raises CheckpointDamaged, also for a file that a reader
    would use and the manifest does not list.
    """
    manifest = read_manifest(path, step)
    store, files = open_store(path.parent), manifest["files"]
    for name in _readable(path, has_arrays=only is None and manifest["format"] == 1):
        if name not in files:
            raise CheckpointDamaged(f"{name} is not listed in {MANIFEST}: it cannot be verified")
    names = [name for name in files if only is None or name in only]
    parts = [(f"{path.name}/{name}", name, files[name]["size"], files[name]["sha256"]) for name in names]
    parts += [(one.name, one.name, one.size, one.sha256) for one in manifest["objects"] if only is None]
    complaints = []
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for part, text in zip(parts, pool.map(lambda part: _complaint(store, *part), parts), strict=True):
            complaints += [text] if text else []
            report(part[2])
    if complaints:
        more = f" (and {len(complaints) - 1} more files)" if len(complaints) > 1 else ""
        raise CheckpointDamaged(complaints[0] + more)
    return manifest


def _readable(path: Place, has_arrays: bool) -> list[str]:
    """The files of a step that a reader uses because they are there; in a bucket the manifest alone says what is."""
    if not isinstance(path, Path):
        return []
    files = [path / CONFIG, *((path / ARRAYS).rglob("*") if has_arrays else ())]
    return [file.relative_to(path).as_posix() for file in files if file.is_file()]


def _complaint(store: Store, name: str, shown: str, size: int, sha256: str) -> str | None:
    """What is wrong with a file; None if nothing is. Raises StorageError where a bucket does not answer."""
    try:
        if isinstance(store.place, Path):
            found = digest(store.place / name)
        else:
            content = store.read(name)
            found = {"size": len(content), "sha256": shards.sha256(content)}
    except FileNotFoundError:
        return f"{shown} is missing"
    except StorageError:
        raise
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"
    except ValueError:  # a lone surrogate
        return f"{shown!r} is not a file's name"
    if found["size"] != size:
        return f"{shown} has {found['size']} bytes, {size} were written"
    return None if found["sha256"] == sha256 else f"{shown} has changed since it was written (sha256 differs)"


def remove(path: Place, keep_begun: bool = False) -> None:
    """Deletes a step, COMMIT first, so that a half-deleted one is litter and not damage; raises OSError.

    With `keep_begun` BEGUN stays, by which a later call finds what other processes were still writing.
    """
    if isinstance(path, Path):
        if path.is_symlink() or path.is_file():
            return path.unlink()
        if not (path / COMMIT).is_dir():
            (path / COMMIT).unlink(missing_ok=True)
        _remove_folder(path.parent / SHARDS / path.name)
        return None if keep_begun else _remove_folder(path)
    store = open_store(path.parent)
    store.delete(f"{path.name}/{COMMIT}")
    store.delete_below(f"{SHARDS}/{path.name}/")
    return None if keep_begun else store.delete_below(f"{path.name}/")


def _remove_folder(path: Path, tries: int = 5) -> None:
    """Deletes a folder; writers of a failed save may still be adding files, hence the tries."""
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


def read_checked(place: Place) -> bytes:
    """Returns a file's bytes; raises CheckpointDamaged where it cannot be read, StorageError for a silent bucket."""
    try:
        return _read(place)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{place.name} is missing") from None
    except StorageError:
        raise
    except OSError as error:
        raise CheckpointDamaged(f"{place.name} cannot be read ({error.strerror})") from None


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
