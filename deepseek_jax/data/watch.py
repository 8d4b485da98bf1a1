"""Progress of long work, for callers that show it: nothing here prints.

A `Watch` is called with the name of the work and its size in bytes, and returns a context whose `advance(n_bytes)`
counts. The command line passes its progress bar.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Counter(Protocol):
    """Counts the bytes of finished work."""

    def advance(self, n_bytes: int) -> None:
        """Counts the bytes since the last call."""


Watch = Callable[[str, int], AbstractContextManager[Counter]]


class _Unwatched:
    def advance(self, n_bytes: int) -> None:
        """Counts nothing."""


def unwatched(label: str, total: int) -> AbstractContextManager[Counter]:
    """The `Watch` of callers that show nothing."""
    return nullcontext(_Unwatched())
