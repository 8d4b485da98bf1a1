"""Reader processes that are watched: one that dies is replaced, and none outlives the process that reads.

A reader may be killed from outside, as when a machine runs out of memory, and in the middle of handing over a batch:
then whoever waits for it waits for the other half for ever.  So a thread does the waiting, while the caller looks every
second whether all readers are alive.  Batches are a function of their number: new readers start at the one that is due,
and what is read is the same as if nothing had happened.
"""

import contextlib
import functools
import multiprocessing
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_jax.errors import LocalError

LOOK_S = 1.0
GRACE_S = 5.0  # in which the death of a reader may still come out as an error of its own
CLOSE_S = 5.0  # for readers to end when asked; then they are killed
MOST_DEATHS = 3  # in a row, without a batch between them
NAME = "grain-process-prefetch"  # what grain calls its processes

Open = Callable[[int], Iterator[Any]]


class ReaderDied(Exception):
    """A reader process ended before its last batch."""


def watched(open_at: Open, count: int) -> Iterator[Any]:
    """Yields batches 0 to ``count`` from reader processes, which are replaced when one dies.

    Args:
      open_at: returns an iterator with ``close`` over the batches from a given one on; starts its processes.
      count: of batches.

    Raises:
      LocalError: readers die again and again; those of other processes may be well.
    """
    done, deaths = 0, 0
    while done < count:
        try:
            for batch in _pulled(open_at, done):
                deaths, done = 0, done + 1
                yield batch
        except ReaderDied as error:
            deaths += 1
            if deaths == MOST_DEATHS:
                raise LocalError(
                    f"reader processes end again and again before they have made a batch ({error}). They may need more "
                    "memory than there is: lower data.workers, or set it to 0 to read in threads."
                ) from error
            warnings.warn(f"{error}: started anew, with the same samples.", stacklevel=2)


def _pulled(open_at: Open, start: int) -> Iterator[Any]:
    """Yields the batches from ``start`` on; raises ReaderDied within seconds of a reader's death."""
    handed: queue.Queue = queue.Queue(maxsize=1)
    iterator, known, is_over = open_at(start), set(), threading.Event()
    threading.Thread(target=_pull, args=(iterator, handed, is_over), daemon=True).start()
    dead_since = None
    try:
        while True:
            known.update(_running())  # a process that has ended is in no list of those that run
            try:
                batch, error = handed.get(timeout=LOOK_S)
            except queue.Empty:
                dead_since = dead_since or (time.monotonic() if _dead(known) else None)
                if dead_since and time.monotonic() - dead_since > GRACE_S:
                    raise ReaderDied(_shown(known)) from None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise ReaderDied(_shown(known)) if _dead(known) else error
            yield batch
    finally:
        is_over.set()
        _close(iterator, known)


def _pull(iterator: Iterator[Any], handed: queue.Queue, is_over: threading.Event) -> None:
    """Hands over what the iterator gives, (batch, None), and how it ends, (None, error), until nobody asks."""
    error = None
    while error is None and not is_over.is_set():
        batch = None
        try:
            batch = next(iterator)
        except BaseException as found:  # handed on, whatever it is
            error = found
        while not is_over.is_set():
            with contextlib.suppress(queue.Full):
                handed.put((batch, error), timeout=LOOK_S)
                break


def _close(iterator: Any, known: set) -> None:
    """Asks the readers to end, and kills those that do not."""
    thread = threading.Thread(target=iterator.close, daemon=True)
    thread.start()
    thread.join(CLOSE_S)
    for process in known:
        if process.exitcode is None:
            process.kill()
            process.join(CLOSE_S)


def _running() -> list:
    return [process for process in multiprocessing.active_children() if process.name.startswith(NAME)]


def _dead(known: set) -> list:
    return [process for process in known if process.exitcode not in (None, 0)]


def _shown(known: set) -> str:
    codes = ", ".join(str(process.exitcode) for process in _dead(known))
    return f"a reader process ended unexpectedly (exit code {codes}; -9 is a kill)"


def init_of_readers() -> Callable[[int, int], None]:
    """Returns what each reader process calls first: it makes the reader end when this process does, even by SIGKILL."""
    return functools.partial(_end_with, os.getpid())


def _end_with(parent: int, index: int, count: int) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
