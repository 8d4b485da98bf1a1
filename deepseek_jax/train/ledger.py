"""Where the time of a run went, over all its starts: goodput.jsonl in the workdir, and what it comes to.

Process 0 appends a record at each checkpoint, at the end and once a minute:

    {"start": 1.7e9, "first": 100, "step": 250, "now": 1.7e9, "seconds": {"start": 8.1, "compile": 30.2, ...}}

`start` and `now` are seconds since 1970, `first` is the step that this start has begun at, `seconds` are those of each
phase (`phases`) since. Time goes to waste in two ways that only the next start shows: `lost` are the steps after the
checkpoint that it resumed from, which are made again; `down` is the time from the last record of one start to the
next. Goodput is the share of all time in which steps were made that were not lost.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax.train.phases import STEPPING, Phases
from deepseek_jax.units import duration

FILE = "goodput.jsonl"  # in a workdir
EVERY_S = 60.0
PRODUCTIVE, LOST, DOWN = "productive", "lost", "down"


class Account(NamedTuple):
    """Seconds by kind, in the order in which they are shown; what they add up to; the number of starts."""

    seconds: dict[str, float]
    total_s: float
    n_starts: int

    def __str__(self) -> str:
        shares = [f"{kind} {s / self.total_s:.1%}" for kind, s in self.seconds.items() if s >= 0.0005 * self.total_s]
        starts = "1 start" if self.n_starts == 1 else f"{self.n_starts} starts"
        return f"time of this run: {duration(self.total_s)} in {starts}: {', '.join(shares)}"


class Ledger:
    """Appends the records of one start; `first` is the step that it begins at. A full disk loses records, no more.

    Process 0 alone is `enabled`. `clock` returns seconds since 1970.
    """

    def __init__(
        self,
        workdir: Path,
        phases: Phases,
        first: int,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.time,
    ):
        self.path, self.phases, self.first, self.enabled = workdir / FILE, phases, first, enabled
        self._clock = clock
        self._start = clock() - sum(phases.seconds().values())
        self._noted_s = -EVERY_S

    def note(self, step: int, due: bool = True) -> None:
        """Appends a record of the time until now, after `step`; where none is due, only once a minute."""
        total_s = sum((seconds := self.phases.seconds()).values())
        if not self.enabled or not (due or total_s - self._noted_s >= EVERY_S):
            return
        self._noted_s = total_s
        kept = {name: round(s, 3) for name, s in seconds.items()}
        record = {"start": self._start, "first": self.first, "step": step, "now": self._clock(), "seconds": kept}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError:  # what the run computes matters more, and says so elsewhere
            self.enabled = False

    def close(self, step: int, say: Callable[[str], None]) -> None:
        """Appends the last record and prints what all starts come to."""
        self.note(step)
        if self.enabled and (found := account(read(self.path.parent))):
            say(str(found))


def read(workdir: str | os.PathLike) -> list[dict]:
    """Returns the records of a run, none if there are none; torn lines are passed over."""
    from deepseek_jax.train.metrics import read_log

    return [record for record in read_log(Path(workdir) / FILE) if {"start", "first", "now", "seconds"} <= {*record}]


def account(records: Sequence[dict]) -> Account | None:
    """Returns what the records of a run come to, None without any."""
    starts: dict[float, list[dict]] = {}
    for record in records:
        starts.setdefault(record["start"], []).append(record)
    ordered = [starts[start] for start in sorted(starts)]
    if not ordered:
        return None
    found: dict[str, float] = {PRODUCTIVE: 0.0}
    for start in ordered:
        for name, seconds in start[-1]["seconds"].items():
            kind = PRODUCTIVE if name in STEPPING else name
            found[kind] = found.get(kind, 0.0) + seconds
    lost = sum(_lost_s(before, after[0]["first"]) for before, after in pairwise(ordered))
    down = sum(max(after[0]["start"] - before[-1]["now"], 0.0) for before, after in pairwise(ordered))
    found[PRODUCTIVE] -= lost
    found |= {LOST: lost, DOWN: down}
    return Account(found, sum(found.values()), len(ordered))


def _lost_s(records: list[dict], resumed_at: int) -> float:
    """Returns the time of the steps of a start that come after `resumed_at`, read off between its records."""
    steps = [records[0]["first"], *(record["step"] for record in records)]
    spent = [0.0, *(sum(record["seconds"].get(name, 0.0) for name in STEPPING) for record in records)]
    return spent[-1] - float(np.interp(resumed_at, steps, spent)) if resumed_at < steps[-1] else 0.0
