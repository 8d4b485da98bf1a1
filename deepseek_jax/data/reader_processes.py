"""Reader processes under supervision: one that dies is replaced, and none outlives the process that started it.

A reader may be killed from outside, for example when a machine runs out of memory, and in the middle of handing over a
batch: then the process that waits for the batch waits for ever. So a thread does the waiting, while the caller checks
every second whether all readers are alive. Batches are a function of their number: new readers start at the next
batch, and the samples are the same as if nothing had happened.
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

POLL_S = 1.0
START_POLL_S = 0.02
START_S = 60.0  # for the readers of an iterator to start
GRACE_S = 5.0  # in which the death of a reader may still be reported as an error of its own
CLOSE_S = 5.0  # for readers to end when asked; then they are killed
MOST_DEATHS = 3  # in a row, without a batch between them
NAME = "grain-process-prefetch"  # start of the names that grain gives its processes

Open = Callable[[int], Iterator[Any]]

# Held while the readers of one iterator start, so that each iterator knows which readers are its own.
_STARTING = threading.Lock()


class ReaderDied(Exception):
    """A reader process ended before its last batch."""


def watched(open_at: Open, count: int, n_readers: int) -> Iterator[Any]:
    """Yields batches 0 to `count` from reader processes, which are replaced when one dies.

    `open_at(n)` returns an iterator with `close` over the batches from number n on, whose `n_readers` processes start
    with the first one. Raises LocalError if readers die repeatedly; those of other processes may be alive.
    """
    done, deaths = 0, 0
    while done < count:
        try:
            for batch in _batches(open_at(done), n_readers):
                deaths, done = 0, done + 1
                yield batch
        except ReaderDied as error:
            deaths += 1
            if deaths == MOST_DEATHS:
                raise LocalError(
                    f"reader processes end repeatedly before they have made a batch ({error}). They may need more "
                    "memory than there is: lower data.workers, or set it to 0 to read in threads."
                ) from error
            warnings.warn(f"{error}: restarted, with the same samples.", stacklevel=2)


def _batches(iterator: Any, n_readers: int) -> Iterator[Any]:
    """Yields the batches of an iterator. Raises ReaderDied within seconds of a reader's death."""
    handed: queue.Queue = queue.Queue(maxsize=1)
    is_over, readers, dead_since = threading.Event(), set(), None
    thread = threading.Thread(target=_pull, args=(iterator, handed, is_over), daemon=True)
    try:
        readers = _start(thread, handed, n_readers)
        while True:
            try:
                batch, error = handed.get(timeout=POLL_S)
            except queue.Empty:
                dead_since = dead_since or (time.monotonic() if _dead(readers) else None)
                if dead_since and time.monotonic() - dead_since > GRACE_S:
                    raise ReaderDied(_describe(readers)) from None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise ReaderDied(_describe(readers)) if _dead(readers) else error
            yield batch
    finally:
        is_over.set()
        _close(iterator, readers)


def _start(thread: threading.Thread, handed: queue.Queue, n_readers: int) -> set:
    """Starts a thread that pulls batches, and returns the reader processes that it starts."""
    with _STARTING:
        others, begin = set(_running()), time.monotonic()
        thread.start()
        readers: set = set()
        while True:
            readers |= set(_running()) - others  # a process that has ended is no longer listed
            if len(readers) >= n_readers or not handed.empty() or time.monotonic() - begin > START_S:
                return readers
            time.sleep(START_POLL_S)


def _pull(iterator: Iterator[Any], handed: queue.Queue, is_over: threading.Event) -> None:
    """Hands over (batch, None) for each batch and (None, error) at the end, until `is_over`."""
    error = None
    while error is None and not is_over.is_set():
        batch = None
        try:
            batch = next(iterator)
        except BaseException as found:  # handed over, whatever it is
            error = found
        while not is_over.is_set():
            with contextlib.suppress(queue.Full):
                handed.put((batch, error), timeout=POLL_S)
                break


def _close(iterator: Any, readers: set) -> None:
    """Asks the readers to end, and kills those that do not."""
    thread = threading.Thread(target=iterator.close, daemon=True)
    thread.start()
    thread.join(CLOSE_S)
    for process in readers:
        if process.exitcode is None:
            process.kill()
            process.join(CLOSE_S)


def _running() -> list:
    return [process for process in multiprocessing.active_children() if process.name.startswith(NAME)]


def _dead(readers: set) -> list:
    return [process for process in readers if process.exitcode not in (None, 0)]


def _describe(readers: set) -> str:
    codes = ", ".join(str(process.exitcode) for process in _dead(readers))
    return f"a reader process ended unexpectedly (exit code {codes}; -9 means killed)"


def init_of_readers() -> Callable[[int, int], None]:
    """Returns what each reader process calls first: it makes the reader end when this process ends, even by SIGKILL."""
    return functools.partial(_end_with, os.getpid())


def _end_with(parent: int, index: int, count: int) -> None:
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
