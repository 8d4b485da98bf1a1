"""Rejection sampling: of several answers to each problem, the right and well-formed ones are kept for fine-tuning.

R1 section 2.3.3: of the answers that are drawn to a problem only right ones are kept, and none whose thought mixes
languages or is too long. `Rules` say which; `keep` applies them to the answers to one problem. `Kept` is the file that
they are written to, conversations as `data.rows` reads them, with its progress beside it: an answer is a function of
(weights, seed, number of the problem, number of the answer), so a file that is continued is the one that would have
been written at once, byte for byte.
"""

import collections
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from deepseek_jax.data.file_locks import try_lock
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import Response, Score

CHOICES = ("shortest", "first")
LEAST = ("accuracy", "format", "language")  # rewards with a least value
ABOUT = ".about"  # what is appended to the name of a file for that of its progress

Counts = collections.Counter[str]  # of answers, by what became of them


class Rules(NamedTuple):
    """Which answers are kept."""

    most: int  # of one problem
    choose: str  # which of those that pass: the shortest, or the first
    longest: int  # tokens; 0: any length
    least: Mapping[str, float]  # least value of a reward, by name; 0: any


def complaint(response: Response, score: Score, rules: Rules) -> str:
    """Returns why an answer is dropped: the name of a reward, or a word; "" if it passes."""
    if not response.is_finished:
        return "cut off"
    for name, least in rules.least.items():
        part = score.parts[name] if least else 1.0
        if part is None:
            return "not scored"
        if part < least:
            return name
    return "too long" if rules.longest and response.n_tokens > rules.longest else ""


def keep(responses: Sequence[Response], scores: Sequence[Score], rules: Rules) -> tuple[list[int], Counts]:
    """Returns (the places of the answers to one problem that are kept, what became of all of them).

    Equal answers count once.
    """
    counts: Counts = Counts()
    passed: dict[str, int] = {}
    for place, (response, score) in enumerate(zip(responses, scores, strict=True)):
        text = json.dumps(response.message, sort_keys=True)
        why = complaint(response, score, rules) or ("repeated" if text in passed else "")
        if why:
            counts[why] += 1
        else:
            passed[text] = place
    found = list(passed.values())
    if rules.choose == "shortest":
        found.sort(key=lambda place: responses[place].n_tokens)
    counts["more than sample.most"] += len(found[rules.most :])
    counts["kept"] += len(found[: rules.most])
    return found[: rules.most], +counts


def conversation(problem: Problem, response: Response, number: int, thinking: bool) -> dict:
    """Returns an answer as a row of a file; answers that the problem quotes are context."""
    asked = [message | {"weight": 0} if message["role"] == "assistant" else message for message in problem.messages]
    return {"problem": number, "messages": [*asked, response.message], "thinking": thinking}


class Kept:
    """A file of kept answers, which continues where it was left; a context manager, which holds the file's lock.

    Args:
        path: of the file; its progress is in a second one, with `.about` after the name.
        about: all that the answers depend on, as JSON has it. A file about something else is refused with a UserError.
        source: where the weights are from, for people.

    Attributes:
        next: number of the first problem that is not in the file.
        counts: what became of the answers so far.
    """

    def __init__(self, path: Path, about: dict[str, Any], source: str):
        self.path, self.about, self.source = path, about, source
        self.next, self._n_bytes = 0, 0
        self.counts: Counts = Counts()
        self.progress = path.with_name(path.name + ABOUT)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(open(self.path, "ab"))
            self._begin()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def _begin(self) -> None:
        """Takes the lock of the file, and takes over what it holds."""
        if try_lock(self._file.fileno()) is False:
            raise UserError(f"{self.path} is being written by another process. Wait for it, or give another file.")
        if self.progress.exists():
            self._resume(json.loads(self.progress.read_bytes()))
        elif self.path.stat().st_size:
            raise UserError(
                f"{self.path} exists, without {self.progress.name} beside it. Give a file that is not there yet."
            )
        else:  # rows that a kill leaves without progress are then known to be this file's
            self._save()

    def _resume(self, saved: dict[str, Any]) -> None:
        """Takes over the progress, and drops what was written after it."""
        changed = sorted(
            key for key in {*saved["about"], *self.about} if saved["about"].get(key) != self.about.get(key)
        )
        if changed:
            was, now = (json.dumps(about.get(changed[0])) for about in (saved["about"], self.about))
            raise UserError(
                f"{self.path} holds answers of other settings: {changed[0]}: {was} -> {now}. Give the same ones to "
                "continue it, or another file."
            )
        self.next, self.counts, self._n_bytes = saved["next"], Counts(saved["counts"]), saved["bytes"]
        size = self.path.stat().st_size
        if size < self._n_bytes:
            raise UserError(f"{self.path} has {size} bytes, and had {self._n_bytes}. Remove it and {self.progress}.")
        self._file.truncate(self._n_bytes)

    def add(self, rows: Sequence[dict], counts: Counts, next_number: int) -> None:
        """Appends the answers to all problems before `next_number` that the file does not have."""
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.next, self.counts, self._n_bytes = next_number, self.counts + counts, self._n_bytes + len(content)
        self._save()

    def _save(self) -> None:
        """Writes the progress."""
        saved = {"source": self.source, "next": self.next, "bytes": self._n_bytes, "counts": dict(self.counts)}
        write_atomically(self.progress, json.dumps(saved | {"about": self.about}, indent=1).encode())
