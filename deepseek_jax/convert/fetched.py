"""Published weights in a bucket: their small files as a folder of this machine; the weights stay where they are.

    fetch(storage.place("gs://bucket/DeepSeek-V2-Lite"))      a folder with config.json, tokenizer.json, the index

Whatever takes a directory of published weights takes such a place as well, and reads tensors from the bucket one at a
time, when they are needed. The folder is in the user's cache (XDG_CACHE_HOME); each start compares it with the bucket.
"""

import fnmatch
import functools
import os
import shutil
import uuid
from pathlib import Path

from deepseek_jax.convert import formats
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.paths import cache_of
from deepseek_jax.storage import ABSENT, Remote, answered, open_store

SMALL = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "*.py")
BESIDE = ("generation_config", "merges", "special_tokens", "tokeni", "vocab")  # after "checkpoints"
PARTIAL = ".partial"  # a file of the cache that a process is writing
UNFINISHED = "export.partial"  # an object that stands beside weights while they are written


def is_published(where: Remote) -> bool:
    """Returns whether a place holds published weights rather than a run. Raises UserError, or PassingError.

    Those that an export has not finished count: `fetch` says so.
    """
    with answered():
        return any(open_store(where).generation(name) != ABSENT for name in (formats.CONFIG, UNFINISHED))


@functools.cache
def beside(run: Remote) -> Path:
    """Returns a folder with the files of a run that its weights need beside them, fetched once per process.

    They are asked for by how their names begin, for a run may have 100,000 objects.
    """
    store = open_store(run)
    with answered():
        names = store.names_before("checkpoints/") + [name for begin in BESIDE for name in store.names(begin)]
        return _kept(run, {name: store.read(name) for name in names if "/" not in name and _is_small(name)})


@functools.cache
def fetch(where: Remote) -> Path:
    """Returns a folder with the small files of a place, fetched once per process.

    Raises UserError: there is no config.json, an export to this place was not finished, no right to read.
    """
    store = open_store(where)
    with answered():
        names = [name for name in store.names() if "/" not in name]
        if UNFINISHED in names:
            raise UserError(f"{where}: an export to this place is under way, or was not finished. Export again.")
        if formats.CONFIG not in names:
            what = formats.describe(names, Path(os.devnull)) if names else "nothing is there"
            raise UserError(f"{where}: no {formats.CONFIG}. {what or f'Give {formats.NEEDED}'}".rstrip(".") + ".")
        return _kept(where, {name: store.read(name) for name in names if _is_small(name)})


def is_exported(name: str) -> bool:
    """Returns whether an export writes objects of such a name: weights, their index, small files; none in a folder."""
    return "/" not in name and (name.endswith(".safetensors") or _is_small(name))


def _is_small(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in SMALL)


def _kept(where: Remote, contents: dict[str, bytes]) -> Path:
    """Returns the folder of a place in the user's cache, after making it hold these files and no others.

    It has the name of the place, which becomes that of the model. Several processes of a host may do so at once.
    """
    folder = cache_of("published", where) / where.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.name not in contents and not file.name.endswith(PARTIAL):
                shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
        for name, content in contents.items():
            if not ((folder / name).is_file() and (folder / name).read_bytes() == content):
                write_atomically(folder / name, content, f".{uuid.uuid4().hex}{PARTIAL}")
    except OSError as error:
        raise UserError(
            f"{folder}: the small files of {where} cannot be kept there ({error.strerror}). Set XDG_CACHE_HOME to a "
            "folder that can be written."
        ) from error
    return folder
