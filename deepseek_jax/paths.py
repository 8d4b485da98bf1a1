"""Checks of paths that the user gives: those of other machines, before `gs:` becomes a folder; the user's cache."""

import hashlib
import os
import re
from pathlib import Path

from deepseek_jax.errors import UserError

# A scheme has two letters or more: C:/ is a disk.  pathlib makes gs:/b of gs://b.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
HUB = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
IN_BUCKETS = "workdirs of train, sft and rl, prepared text, and published weights"
MOUNTS = {"gs": "gcsfuse", "s3": "mountpoint-s3", "hdfs": "hadoop-hdfs-fuse", "abfs": "blobfuse2", "az": "blobfuse2"}


def check_local(path: str | os.PathLike, given: str = "") -> None:
    """Raises UserError for gs://, s3:// and the like; `given` is what the user calls the value, such as --workdir."""
    found = SCHEME.match(os.fspath(path))
    if not found:
        return
    scheme, rest = found[1].lower(), found[2]
    shown = f"{given}={scheme}://{rest}" if given else f"{scheme}://{rest}"
    if scheme == "file":
        raise UserError(f"{shown}: a plain path is expected here. Give /{rest.lstrip('/')}.")
    if scheme in ("hf", "http", "https") and (model := HUB.match(rest if scheme != "hf" else f"hf.co/{rest}")):
        raise UserError(f"{shown}: models of the hub go by their ids where weights are read. Give {model[1]} there.")
    mount = f", such as {MOUNTS[scheme]}" if scheme in MOUNTS else ""
    where = f"nothing is read from or written to {scheme}:// as yet"
    if scheme in ("gs", "s3"):
        where = f"this one cannot be in {scheme}://, where {IN_BUCKETS} can"
    raise UserError(f"{shown}: {where}. Give a path here: of a mounted file system{mount}, or of a copy.")


def check_writable(folder: Path, given: str) -> None:
    """Raises UserError if a folder, or the nearest above it that exists, cannot be written; `given` as above."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "you may not write there" if nearest.is_dir() else "it is not a directory"
        raise UserError(f"{given}={folder} cannot be used: {nearest}: {reason}. Choose another {given}.")


def user_cache() -> Path:
    """Returns this package's folder in the user's cache (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepseek_jax"


def cache_of(kind: str, place: object) -> Path:
    """Returns the folder for what is kept of a place in a bucket, of one kind ("published")."""
    return user_cache() / kind / hashlib.sha256(f"{place}".encode()).hexdigest()[:16]
