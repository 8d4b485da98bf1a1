"""Progress of a long copy: a bar on a terminal, a line every few seconds elsewhere, both on standard error.

with Progress("convert", total_bytes, done=bytes_of_an_earlier_start) as progress:
    progress.advance(n_bytes)
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Self

from deepseek_jax.streams import is_terminal
from deepseek_jax.units import duration

LINE_EVERY_S = 5
BRIEF_S = 1  # what takes less needs no line


class Progress:
    """Bytes done of a total; the rate and the time left count this start only.

    `heard` is called whenever some are done.

    Attributes:
        seconds: between begin and end.
    """

    def __init__(self, label: str, total: int, done: int = 0, heard: Callable[[], None] = lambda: None):
        self._heard = heard
        self.label, self.total, self.done = label, total, done
        self._start, self._start_done, self._told = time.monotonic(), done, time.monotonic()
        self.seconds = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if is_terminal(sys.stderr):
            from rich import progress
            from rich.console import Console

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn())
            sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, *sizes, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done)
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.monotonic() - self._start
        if self._bar:
            self._bar.stop()

    def advance(self, n_bytes: int) -> None:
        """Counts what has been done since the last call; never past the total, which may leave out small files."""
        self._heard()
        before, self.done = self.done, min(self.done + n_bytes, self.total)
        if self._bar:
            self._bar.update(self._task, completed=self.done)
            return
        now, ends = time.monotonic(), before < self.total == self.done
        if now - self._told >= LINE_EVERY_S or (ends and now - self._start >= BRIEF_S):
            self._told = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """`convert  42%  3.40 of 8.10 GB  0.35 GB/s  0:00:13 left`; MB where the total is less than one GB."""
        rate = (self.done - self._start_done) / max(seconds, 1e-9)
        is_going = self.done < self.total and rate
        left = f"{duration((self.total - self.done) / rate)} left" if is_going else duration(seconds)
        share = f"{self.done / max(self.total, 1):4.0%}"
        unit, size = ("GB", 1e9) if self.total >= 1e9 else ("MB", 1e6)
        done = f"{self.done / size:,.2f} of {self.total / size:,.2f} {unit}"
        return f"{self.label} {share}  {done}  {rate / size:.2f} {unit}/s  {left}"
