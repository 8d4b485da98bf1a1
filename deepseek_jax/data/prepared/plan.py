"""What a folder of prepared text is made from, and how much of it is there.

    <folder>/prepared-plan.json           the settings, written first: whoever works here must have the same
             train-00000.array_record     windows of shard 0 (`records`); none if it has none
             holdout-00000.array_record   held-out windows
             shard-00000.json             written last: the shard is complete; its counts and hashes
             prepared-manifest.json       after all shards: the settings, counts and hashes of all
             partial/                     shards that are being made

Every file is a function of corpus, settings and shard number, and appears whole or not at all. So any number of
processes may work here, be killed, and do the same work twice; shards made elsewhere may be copied here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepseek_jax.data.corpus import Corpus, open_corpus
from deepseek_jax.data.packing import check_marks
from deepseek_jax.data.prepared import folder
from deepseek_jax.data.prepared.sections import Line, Section
from deepseek_jax.data.prepared.source import MANIFEST, PLAN, sources
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place, StorageError

VERSION = 1  # increase it when the files, or what is in them, change
SIDES = ("train", "holdout")
SHARD_BYTES = 64 << 20  # of a corpus, as stored, in a shard, unless the number of shards is given
HASHES = {"listing": "names or sizes of files", "cuts": "where shards begin"}  # of settings, and what they are of
KEYS = ("seq_len", "fim_rate", "holdout_rate", "add_bos", "special_tokens", "text_key")  # of config.data, in a plan


@dataclass(frozen=True)
class Plan:
    """How a corpus becomes the shards of a folder.

    `tokenizer` is as for `open_tokenizer`; `settings` are what a shard depends on, by name; `cuts` are the ends of the
    sections, with 0 at the start.
    """

    folder: Place
    corpus: Corpus
    tokenizer: str
    settings: Mapping[str, Any]
    cuts: tuple[int, ...]

    @property
    def n_shards(self) -> int:
        """The number of shards."""
        return len(self.cuts) - 1

    @property
    def key(self) -> str:
        """A hash of the settings."""
        return hashlib.blake2b(as_json(self.settings), digest_size=12).hexdigest()

    @cached_property
    def _line(self) -> Line:
        return Line(self.corpus)

    def section(self, number: int) -> Section:
        """Returns the part of the corpus that a shard is made from."""
        return self._line.section(self.cuts[number], self.cuts[number + 1])

    def n_bytes(self, number: int) -> int:
        """Returns the size of that part, as stored."""
        return self.cuts[number + 1] - self.cuts[number]

    def begin(self) -> None:
        """Writes the settings into the folder. Raises UserError if it holds shards of others."""
        if isinstance(self.folder, Path):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not folder.write_once(self.folder, PLAN, as_json(self.settings)):
            changes = "; ".join(_changes(_read(self.folder, PLAN), self.settings))
            raise UserError(
                f"{self.folder} holds shards of other settings: {changes}. Give the same settings and corpus to "
                "continue, or another --to."
            )

    def marker(self, number: int) -> dict | None:
        """Returns what is known about a shard, None if it is not complete."""
        return self._checked(number, _read(self.folder, marker_name(number)))

    def _checked(self, number: int, found: dict) -> dict | None:
        """Returns what a marker says, None if that is not this shard; in a bucket a marker comes after its files."""
        if found.get("plan") != self.key:
            return None
        if not isinstance(self.folder, Path):
            return found
        for side in SIDES:
            path, rows = self.folder / file_name(side, number), found[side]
            if rows["windows"] and (not path.is_file() or path.stat().st_size != rows["bytes"]):
                return None
        return found

    def markers(self) -> list[dict | None]:
        """Returns what is known about each shard, None for one that is not complete."""
        names = [marker_name(number) for number in range(self.n_shards)]
        found = folder.read_all(self.folder, names)
        return [self._checked(number, _parsed(found.get(name, b""))) for number, name in enumerate(names)]

    def finish(self) -> dict | None:
        """Writes the manifest and returns it; None if shards are missing. Raises UserError for too little text."""
        done = [marker for marker in self.markers() if marker is not None]
        if len(done) < self.n_shards:
            return None
        sides = {side: _together([marker[side] for marker in done]) for side in SIDES}
        self._check_amount(sides)
        manifest = {"settings": dict(self.settings), "sides": sides}
        if not folder.write_once(self.folder, MANIFEST, as_json(manifest)):
            raise UserError(f"{self.folder / MANIFEST} is that of other shards. Remove it, then start again.")
        return manifest

    def _check_amount(self, sides: dict) -> None:
        train, holdout = sides["train"], sides["holdout"]
        if not sum(train["windows"]):
            raise UserError(
                f"data.source = {self.corpus.source!r} has {train['tokens']:,} training tokens in {self.n_shards} "
                f"shards, and a window takes {self.settings['seq_len'] + 1}. Give more text, lower data.seq_len or "
                "--shards, and another --to."
            )
        if self.settings["holdout_rate"] and not sum(holdout["windows"]):
            raise UserError(
                f"none of the {train['documents']:,} documents is held out: in a prepared corpus each is chosen by "
                f"its own hash, and data.holdout_rate = {self.settings['holdout_rate']} is too little for so few. "
                "Set it to 0 or higher, with another --to, or train from the text itself."
            )


def make_plan(place: Place, opened: Tokenizer, n_shards: int = 0, *, seed: int, **data: Any) -> Plan:
    """Returns the plan of a corpus; writes nothing.

    Args:
        place: the folder where the shards are or will be.
        opened: the tokenizer that `data["tokenizer"]` names.
        n_shards: at most; 0 takes what was asked for in a plan that is there, or one per 64 MiB of files.
        seed: of the order of documents in a shard, and of fill-in-the-middle.
        data: keys of `config.data`; those that a shard depends on, `source`, `format` and `tokenizer` are used.

    Raises:
        UserError: files cannot be read, hold no text, or hold conversations.
    """
    check_marks(opened, data["fim_rate"])
    if sources(data["source"]):
        raise UserError(
            f"data.source = {data['source']!r} is prepared already. Train from it, or give the text itself."
        )
    corpus = open_corpus(data["source"], data["text_key"], data["format"])
    if corpus.format != "text":
        raise UserError(
            f"data.source = {data['source']!r} holds conversations, which are not prepared. Train from them directly."
        )
    line = Line(corpus)
    if not line.n_bytes:
        raise UserError(f"data.source = {data['source']!r} holds no text: its {len(corpus.files)} files are empty.")
    count = n_shards or _read(place, PLAN).get("shards_asked") or max(1, round(line.n_bytes / SHARD_BYTES))
    cuts = line.cuts(count)
    where = hashlib.blake2b(as_json(cuts), digest_size=12).hexdigest()
    settings = {"version": VERSION, "tokenizer": opened.fingerprint, "vocab_size": opened.vocab_size}
    settings |= {"seed": seed, **{key: data[key] for key in KEYS}}
    settings |= {"shards_asked": count, "shards": len(cuts) - 1, "cuts": where}
    settings |= {"files": len(corpus.files), "bytes": line.n_bytes, "listing": line.listing()}
    return Plan(place, corpus, data["tokenizer"], settings, tuple(cuts))


def file_name(side: str, number: int) -> str:
    """Returns the name of a shard's file of one of `SIDES`."""
    return f"{side}-{number:05}.array_record"


def marker_name(number: int) -> str:
    """Returns the name of the file that says that a shard is complete."""
    return f"shard-{number:05}.json"


def _together(rows: list[dict]) -> dict:
    """Returns the counts of all shards: sums, and lists of what reading needs of each."""
    sums = {key: sum(row[key] for row in rows) for key in ("documents", "tokens", "text_bytes")}
    return sums | {key: [row[key] for row in rows] for key in ("windows", "bytes", "hash")}


def _changes(old: Mapping, new: Mapping) -> Iterator[str]:
    """Yields the settings in which two plans differ."""
    for key in (*new, *(key for key in old if key not in new)):
        if old.get(key) != new.get(key):
            name = f"data.{key}" if key in (*KEYS, "tokenizer") else key
            yield HASHES.get(key, f"{name}: {old.get(key)} -> {new.get(key)}")


def _read(where: Place, name: str) -> dict:
    """Returns the object in a JSON file, {} if there is none."""
    try:
        return _parsed(folder.read(where, name))
    except StorageError:
        raise
    except OSError:
        return {}


def _parsed(text: bytes) -> dict:
    """Returns a JSON object, {} for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def as_json(value: Any) -> bytes:
    """Returns a value as the files here hold it."""
    return (json.dumps(value, indent=1) + "\n").encode()
