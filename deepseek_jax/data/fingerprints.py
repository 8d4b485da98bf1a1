"""A hash of every byte of a file, cached until the file changes.

A large file is hashed once and then recognised by its path, size, inode and times of change: the system itself sets the
time of the last status change, so rewriting a file always changes one of them. The hash of a file that changed just now
is not cached, since a second change could fall within the same tick of the clock.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically

REMEMBERED_BYTES = 64 << 20  # shorter files are hashed each time
SETTLED_S = 2.0


def fingerprint(path: Path, known: Path | None = None) -> str:
    """Returns a hash of all of a file's bytes; `known` is a folder that caches the hashes of large files.

    Raises UserError if the file changes while it is read, OSError if it cannot be read.
    """
    before = _identity(path)
    memo = known and before["size"] > REMEMBERED_BYTES and _memo(path, known)
    if memo and (found := _recall(memo, before)):
        return found
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if _identity(path) != before:
        raise UserError(f"{path} changes while it is read. Wait until it is complete, then start again.")
    if memo and time.time_ns() - max(before["changed_ns"], before["modified_ns"]) > SETTLED_S * 1e9:
        _remember(memo, before, found)
    return found


def _identity(path: Path) -> dict[str, int]:
    status = os.stat(path)
    names = {"size": "st_size", "inode": "st_ino", "modified_ns": "st_mtime_ns", "changed_ns": "st_ctime_ns"}
    return {name: getattr(status, field) for name, field in names.items()}


def _memo(path: Path, known: Path) -> Path:
    place = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=12).hexdigest()
    return known / "fingerprints" / f"{place}.json"


def _recall(memo: Path, identity: dict[str, int]) -> str | None:
    try:
        saved = json.loads(memo.read_text())
        content = {"identity": saved["identity"], "hash": saved["hash"]}
        return saved["hash"] if saved["identity"] == identity and saved["check"] == _check(content) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(memo: Path, identity: dict[str, int], found: str) -> None:
    content = {"identity": identity, "hash": found}
    with contextlib.suppress(OSError):  # the next start takes longer then
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, json.dumps(content | {"check": _check(content)}).encode())


def _check(content: dict) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
