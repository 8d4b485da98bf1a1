"""How `data.source` names prepared text: one folder, or several with their weights in a mixture."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.data.prepared.folder import exists
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place, Remote, place

PLAN, MANIFEST = "prepared-plan.json", "prepared-manifest.json"  # either makes a folder one of prepared text
WEIGHTED = re.compile(r"(.+?)(?:@(\d*\.?\d+))?")


class Source(NamedTuple):
    """A folder of prepared text that a run reads, perhaps in a bucket, and its weight in the mixture."""

    folder: Place
    weight: float


def sources(source: str) -> list[Source]:
    """Returns the folders of prepared text that `data.source` names, [] if it names something else.

    It is a folder, or several with weights: `tokens/web@0.7,tokens/code@0.3`; a weight that is left out is 1. Raises
    UserError if only some of several are prepared, or a weight is 0.
    """
    whole = os.path.expanduser(source)
    if source == "stdlib" or os.path.exists(whole):
        return [Source(Path(whole), 1.0)] if source != "stdlib" and is_prepared(whole) else []
    parts = [WEIGHTED.fullmatch(part) for part in source.split(",")]
    found = [Source(place(os.path.expanduser(part[1])), float(part[2] or 1)) for part in parts if part]
    others = [str(one.folder) for one in found if not is_prepared(one.folder)]
    if len(found) < len(parts) or len(others) == len(found):
        return []
    if others:
        raise UserError(
            f"data.source = {source!r} mixes prepared text with {others[0]}, which is not. Prepare that as well, with "
            "deepseek-jax prepare."
        )
    if not all(one.weight > 0 for one in found):
        raise UserError(f"data.source = {source!r} has a weight of 0. Give weights above 0, or leave that folder out.")
    return found


def is_prepared(folder: str | Place) -> bool:
    """Returns whether a folder holds prepared text, complete or not. Raises StorageError in a bucket.

    A bucket is not asked for `*.txt`, which names raw text.
    """
    if isinstance(place(folder), Remote) and "*" in str(folder):
        return False
    return any(exists(place(folder), name) for name in (PLAN, MANIFEST))
