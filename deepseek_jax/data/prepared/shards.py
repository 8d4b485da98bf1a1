"""Makes a shard: a pure function of the plan and the shard's number.

The documents of a section are tokenised and packed as training packs those of an epoch (`packing`), with the shard's
number in place of the epoch's: they are shuffled within the shard, a share becomes fill-in-the-middle, and the tail
that is shorter than a window is left out. A document is held out if its own hash is small: the same for its copies in
every shard, and no shard needs to know of another.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data import packing
from deepseek_jax.data.holdout import has_small_hash, whole
from deepseek_jax.data.marked_text import MarkReader
from deepseek_jax.data.noise import SHARE, noise
from deepseek_jax.data.packing import Packing, check_marks
from deepseek_jax.data.prepared import folder
from deepseek_jax.data.prepared.plan import SIDES, Plan, as_json, file_name, marker_name
from deepseek_jax.data.prepared.records import to_records, write_records
from deepseek_jax.data.scratch import clear, fresh
from deepseek_jax.data.store import in_memory
from deepseek_jax.data.tokenise import id_type, tokenise_any
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.watch import Counter

PARTIAL = "partial"


def make_shard(plan: Plan, number: int, tokenizer: Tokenizer, counter: Counter) -> dict:
    """Makes a shard in the plan's folder, if it is not there; returns what its marker says.

    `counter` is given the bytes of the corpus that have been read. A process calls `clear_partial` before its first.
    """
    if (found := plan.marker(number)) is not None:
        counter.advance(plan.n_bytes(number))
        return found
    place = _place(plan, number)
    place.parent.mkdir(parents=True, exist_ok=True)
    marker: dict[str, Any] = {"plan": plan.key}
    with fresh(place) as temporary:
        for name, side in zip(SIDES, pack(plan, number, tokenizer, counter), strict=True):
            marker[name] = _write(side, number, temporary / file_name(name, number))
        packing.lay_out.cache_clear()  # the shard's tokens
        for name in SIDES:
            if marker[name]["windows"]:
                folder.put(plan.folder, file_name(name, number), temporary / file_name(name, number))
        folder.write(plan.folder, marker_name(number), as_json(marker))
    return marker


def clear_partial(plan: Plan) -> None:
    """Removes what dead processes have left half made: once per process, since it looks at what all hosts make."""
    clear(_place(plan, 0))


def _place(plan: Plan, number: int) -> Path:
    """Returns where a shard is made."""
    return folder.here(plan.folder) / PARTIAL / marker_name(number).removesuffix(".json")


def pack(plan: Plan, number: int, tokenizer: Tokenizer, counter: Counter) -> tuple[Packing, Packing]:
    """Returns the training and the held-out side of a shard, whose windows are those of epoch `number`."""
    settings, out = plan.settings, io.BytesIO()
    encoder = MarkReader(tokenizer) if settings["special_tokens"] else tokenizer
    table = tokenise_any(plan.section(number), encoder, out, counter)
    store = in_memory(np.frombuffer(out.getbuffer(), id_type(tokenizer)), table)
    by_hash = np.argsort(store.hashes, kind="stable")
    chosen = has_small_hash(store.hashes[by_hash], settings["holdout_rate"])

    def side(documents: np.ndarray, training: bool) -> Packing:
        return packing.side(
            store,
            whole(documents, store.lengths),
            tokenizer,
            check_marks(tokenizer, settings["fim_rate"]),
            training=training,
            seq_len=settings["seq_len"],
            fim_rate=fim_share(plan, number, len(documents)) if training else 0.0,
            mask_documents=False,
            add_bos=settings["add_bos"],
            seed=settings["seed"],
        )

    return side(by_hash[~chosen], True), side(by_hash[chosen], False)


def fim_share(plan: Plan, number: int, n_documents: int) -> float:
    """Returns the share of a shard's documents that become FIM: whole documents, of many shards the rate of the plan.

    Rounded at random, for a shard may hold a few documents only.
    """
    up = int(noise(plan.settings["seed"], number, SHARE, at=np.zeros(1))[0]) / 2**64
    return int(plan.settings["fim_rate"] * n_documents + up) / max(n_documents, 1)


def _write(side: Packing, number: int, path: Path) -> dict:
    """Writes the windows of a side, if there are any; returns the counts."""
    counts = {"documents": side.n_documents, "tokens": side.n_tokens if side.n_documents else 0}
    counts["text_bytes"] = int(side.store.n_bytes[side.pieces.documents].sum())
    if not side.n_documents or not side.n_samples:
        return counts | {"windows": 0, "bytes": 0, "hash": ""}
    written = write_records(path, to_records(side, number))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return counts | written._asdict()
