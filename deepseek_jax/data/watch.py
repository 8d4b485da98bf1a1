"""How far long work is, for whoever wants to show it: nothing here prints.

A ``Watch`` is called with what is done and the bytes of it in all, and gives a context in which ``advance(n_bytes)``
counts.  The command line passes its progress bar.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Counter(Protocol):
    """Counts bytes of work that is done."""

    def advance(self, n_bytes: int) -> None:
        """Counts what has been done since the last call."""


Watch = Callable[[str, int], AbstractContextManager[Counter]]


class _Unwatched:
    def advance(self, n_bytes: int) -> None:
        """Counts nothing."""


def unwatched(label: str, total: int) -> AbstractContextManager[Counter]:
    """The ``Watch`` of those who do not want to see anything."""
    return nullcontext(_Unwatched())
