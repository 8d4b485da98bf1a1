"""Work that may hang or use up memory, in processes of its own, each killed at a deadline and replaced.

A library's own time limit is a signal, which works in the main thread only and not inside C code. Here the deadline is
this process's, and what misses it is killed. A call without a result gives a `Failed`, never a number. Ctrl-C is for
this process alone: calls that are being made have their results, so that the step can be ended and saved. None of the
others outlives it, even if it is killed.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from deepseek_jax.errors import UserError

MEMORY_BYTES = 4 << 30  # of a process, on Linux
START_S = 60.0  # for a process to start and import what it needs, beside the time of its first call


class Failed(NamedTuple):
    """A call without a result."""

    reason: str


class Call(NamedTuple):
    """A call that is being made."""

    number: int
    seconds: float  # that it may take
    deadline: float


class Worker:
    """A process that makes one call after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.is_new = True

    def begin(self, number: int, function: Callable, arguments: tuple, seconds: float) -> Call:
        """Hands over a call."""
        self.connection.send((function, arguments))
        call = Call(number, seconds, time.monotonic() + seconds + START_S * self.is_new)
        self.is_new = False
        return call

    def kill(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Workers:
    """Some processes; a context manager. They start when they are first needed."""

    def __init__(self, count: int, seconds: float):
        self.count, self.seconds = count, seconds
        self._idle: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; they start again if there is more to do."""
        while self._idle:
            self._idle.pop().kill()

    def map(self, function: Callable, arguments: Sequence[tuple], shares: Sequence[float] | None = None) -> list[Any]:
        """Returns function(*arguments[n]) for every n, or a `Failed`; the function must be one of a module.

        Call n may take `seconds` times shares[n], by default 1. Raises UserError where the function does.
        """
        seconds = [self.seconds * share for share in shares or [1] * len(arguments)]
        results: list[Any] = [Failed("not called")] * len(arguments)
        waiting = list(reversed(range(len(arguments))))
        busy: dict[Worker, Call] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.count:
                    number = waiting.pop()
                    worker, call = self._begin(number, function, arguments[number], seconds[number])
                    busy[worker] = call
                for worker in ended(busy):
                    call = busy.pop(worker)
                    results[call.number] = self._result(worker, call)
        finally:
            for worker in busy:
                worker.kill()
        for result in results:
            if isinstance(result, UserError):
                raise result
        return results

    def _begin(self, number: int, function: Callable, arguments: tuple, seconds: float) -> tuple[Worker, Call]:
        """Hands a call to an idle worker, or to a new one; those that were killed from outside are left out."""
        while self._idle:
            worker = self._idle.pop()
            try:
                return worker, worker.begin(number, function, arguments, seconds)
            except OSError:
                worker.kill()
        worker = Worker()
        return worker, worker.begin(number, function, arguments, seconds)

    def _result(self, worker: Worker, call: Call) -> Any:
        """Returns the result of a call that is over; keeps the worker, or kills it."""
        try:
            if worker.connection.poll():
                result = worker.connection.recv()
                self._idle.append(worker)
                return result
            reason = f"no result after {call.seconds:g} s"
        except (EOFError, OSError):
            reason = "the process ended"
        worker.kill()
        return Failed(reason)


def ended(busy: dict[Worker, Call]) -> list[Worker]:
    """Waits until at least one call is over, or its deadline is; returns the workers of those."""
    left = min(call.deadline for call in busy.values()) - time.monotonic()
    ready = multiprocessing.connection.wait([worker.connection for worker in busy], max(left, 0))
    now = time.monotonic()
    return [worker for worker, call in busy.items() if worker.connection in ready or call.deadline <= now]


def serve(connection: Any) -> None:
    """Makes calls until the other end is closed; runs in a worker."""
    for number in (signal.SIGINT, signal.SIGHUP):  # sent to all processes of a terminal
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    limit_memory()
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(outcome(call))


def outcome(call: bytes) -> bytes:
    """Makes a call; returns its result, its UserError or a `Failed`. All are pickled, and pickling may fail as well."""
    try:
        function, arguments = pickle.loads(call)
        return pickle.dumps(function(*arguments))
    except UserError as error:
        return pickle.dumps(error)
    except BaseException as error:  # whatever it is, it says nothing about the answer
        return pickle.dumps(Failed(f"{type(error).__name__}: {error}"))


def end_with_parent() -> None:
    """Ends this process, whatever it is doing, as soon as the one that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def limit_memory() -> None:
    """Makes allocations beyond `MEMORY_BYTES` fail in this process."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
