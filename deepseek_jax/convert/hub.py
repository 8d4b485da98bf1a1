"""A model of the Hugging Face hub as a directory: its id, owner/name, works wherever a directory does.

    local("deepseek-ai/DeepSeek-V2-Lite")     the directory in the hub's cache, downloaded if needed
    local("DeepSeek-V2-Lite")                 the path itself: an id is owner/name, and not an existing path
    local("gs://bucket/DeepSeek-V2-Lite")     the small files beside weights in a bucket (`convert.fetched`)

A revision may follow after @. Small files come first, so that a model of an unknown family is rejected before its
weights are downloaded; of the weights, only safetensors files are. Downloads show progress; after a broken connection a
file is resumed, and a download that was killed keeps its complete files. Everything is in the hub's cache (HF_HOME),
and HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply here too.
"""

import functools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.convert import fetched, formats, safetensors
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Remote, place

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
SMALL = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "tokenization_*.py")
WEIGHTS = ("*.safetensors",)
FOLDERS = ("*/*",)  # other formats of the same weights
LINE_EVERY_S = 30  # of progress, if it goes to a file
SPARE_BYTES = 2**26
REFUSED = ("GatedRepoError",)
UNKNOWN = ("RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError")
OFFLINE = ("OfflineModeIsEnabled",)


def is_id(name: str | os.PathLike | Remote) -> bool:
    """Returns whether this names a model of the hub: owner/name, and not a path that exists here."""
    return not isinstance(name, Remote) and bool(ID.fullmatch(os.fspath(name))) and not os.path.lexists(name)


def local(name: str | os.PathLike | Remote, weights: bool = True) -> Path:
    """Returns the directory of a model: a path itself, or the snapshot of an id in the cache.

    Of weights in a bucket the directory has all other files. `weights`: whether they are needed too, or only the files
    that describe them. Raises UserError if there is no such model, no access to it, no connection, or no space for it.
    """
    where = place(name)
    if isinstance(where, Remote):
        return fetched.fetch(where)
    return _snapshot(os.fspath(where), weights) if is_id(where) else where.expanduser()


@functools.cache
def _snapshot(name: str, weights: bool) -> Path:
    """Downloads what is not in the cache, once per process, so that a run sees one state of the model."""
    from deepseek_jax.convert import hf

    repository, _, revision = name.partition("@")
    directory = _download(name, repository, revision, SMALL)
    if not (directory / formats.CONFIG).is_file():
        raise UserError(f"{name} on the hub: {_what_else(repository, revision, directory)}")
    if not weights:
        return directory
    hf.announced(directory)  # rejects an unusable model before it is downloaded
    _check_space(name, directory)
    return _download(name, repository, revision, (*SMALL, *WEIGHTS))


def _download(name: str, repository: str, revision: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": list(patterns),
        "ignore_patterns": list(FOLDERS),
    }
    try:
        return Path(snapshot_download(repository, tqdm_class=_bars(is_long=WEIGHTS[0] in patterns), **options))
    except Exception as error:  # the library's own, those of its HTTP library, and OSErrors
        raise UserError(f"{name}: no such directory here, and {_reason(repository, error)}") from error


def _bars(is_long: bool) -> type:
    """Returns the library's progress bars for long downloads; without a terminal they print a line now and then."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        """Bars that are drawn rarely."""

        def __init__(self, *given: Any, **options: Any) -> None:
            if not is_long:
                options["disable"] = True
            if not sys.stderr.isatty():
                options |= {"mininterval": LINE_EVERY_S, "maxinterval": 2 * LINE_EVERY_S}
            super().__init__(*given, **options)

    return Bars


def _reason(repository: str, error: Exception) -> str:
    """Returns why a model could not be downloaded, and what to do."""
    from huggingface_hub import constants

    chain = list(_causes(error))
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    responses = [getattr(cause, "response", None) for cause in chain]
    statuses = [response.status_code for response in responses if response is not None]
    site = constants.ENDPOINT
    if kinds.intersection(REFUSED) or 403 in statuses:
        return (
            f"{site} gives access to it on request only: request access on {site}/{repository}, then log in with "
            "hf auth login, or set HF_TOKEN."
        )
    if kinds.intersection(UNKNOWN) or {401, 404} & {*statuses}:
        return (
            f"{site} has no model of that name that you may read. Check the name; for a private one log in with "
            "hf auth login, or set HF_TOKEN."
        )
    elsewhere = f"Or download it elsewhere (hf download {repository} --local-dir=DIR) and give that directory."
    if kinds.intersection(OFFLINE) or constants.HF_HUB_OFFLINE:
        cache = constants.HF_HUB_CACHE
        return f"HF_HUB_OFFLINE is set and {cache} does not contain all of it. Unset HF_HUB_OFFLINE. {elsewhere}"
    if any(isinstance(cause, OSError) and cause.errno == 28 for cause in chain):
        return f"the disk of {constants.HF_HUB_CACHE} is full. Free some space or set HF_HOME; complete files stay."
    if statuses:
        return f"{site} answers with status {statuses[0]}. Try again later: complete files are kept. {elsewhere}"
    last = str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__]
    return f"{site} cannot be reached ({last[0][:150]}). Check the connection and try again. {elsewhere}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _what_else(repository: str, revision: str, directory: Path) -> str:
    """Returns what a repository without a config.json contains."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repository, revision=revision or None)
    except Exception:  # no connection: use what is in the cache
        names = os.listdir(directory) if directory.is_dir() else []
    said = formats.describe(sorted(names), directory)
    return said or f"no {formats.CONFIG} in it. Give the id of a language model in the format of transformers."


def _check_space(name: str, directory: Path) -> None:
    """Raises UserError if the cache's disk is too small for the weights listed in the index."""
    index = directory / safetensors.INDEX
    metadata = safetensors.read_json(index).get("metadata") if index.is_file() else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int):
        return
    blobs = directory.parent.parent / "blobs"
    there = sum(file.stat().st_size for file in blobs.iterdir()) if blobs.is_dir() else 0
    free, needed = shutil.disk_usage(directory).free, total - there + SPARE_BYTES
    if needed > free:
        raise UserError(
            f"{name}: {needed / 1e9:,.1f} GB to download, {free / 1e9:,.1f} GB free on the disk of {directory}. "
            "Free some space, or set HF_HOME to a larger disk."
        )
