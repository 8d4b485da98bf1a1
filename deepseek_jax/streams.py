"""Standard output and error that may break during a run: a reader that has gone, a full disk, a closed terminal.

A note about a run never decides whether the run is saved. `forgiving` makes writing to both streams a matter of
goodwill: what cannot be written is dropped. A closed descriptor is opened on the null device at the start, for the
next file that the program opens would take its number and receive whatever native code prints.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could upset a terminal
# Errors that pass once somebody makes space; after any other one a stream is given up.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR)


def open_standard() -> None:
    """Opens the null device as each of standard input, output and error that the caller has closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Within it `sys.stdout` and `sys.stderr` never raise; at its end neither holds text that cannot be written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Forgiving, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        settle()


def settle() -> None:
    """Flushes both streams, or gives up what they hold, so that the interpreter's own last flush cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            to_null_device(stream)


def printable(text: str) -> str:
    """Returns a text without control characters, which a model may well make; tabs and ends of lines stay."""
    return CONTROL.sub("\ufffd", text)


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody watches a stream on a terminal that can redraw lines."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def note(text: str) -> None:
    """Writes a line to standard error by the shortest way: from a signal handler, or before the process is left."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def to_null_device(stream: Any) -> None:
    """Points a stream's descriptor to the null device; a stream without one stays as it is."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


class Forgiving:
    """A text stream whose `write` and `flush` never raise; everything else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what can be written."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except (OSError, ValueError, AttributeError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Hands on what can be handed on."""
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if getattr(error, "errno", None) not in PASSING:
            to_null_device(self._stream)
