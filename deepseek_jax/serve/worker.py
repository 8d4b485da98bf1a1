"""The engine in a thread of its own, and what it says handed to asyncio.

    worker = Worker(engine, most=256); worker.start()
    inbox = Inbox()
    async with worker.open(prompt, sampling, inbox) as stream:  # raises Busy
        for stream, output in await inbox.read(): …             # leaving the block ends the request

Only the thread touches the engine. Requests and cancellations reach it through a queue, which it empties between two
steps; what a step gave is handed to the event loops in one call each.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from deepseek_jax.serve.engine import Engine, Sampling
from deepseek_jax.serve.outputs import Output
from deepseek_jax.serve.scheduler import Request


class Busy(Exception):
    """There are as many requests as the worker takes."""


class Dead(Exception):
    """The engine has failed, or was stopped."""


class Inbox:
    """Where the outputs of one or more streams arrive, in their order. Used in one event loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Stream, Output]] = []
        self._error: Dead | None = None
        self._has_some = asyncio.Event()

    def put(self, stream: "Stream", output: Output | Dead) -> None:
        """Adds an output, or why there will be no more of them."""
        if isinstance(output, Dead):
            self._error = output
        else:
            self._waiting.append((stream, output))
        self._has_some.set()

    async def read(self) -> "list[tuple[Stream, Output]]":
        """Waits for an output, and returns all that have come by then. Raises Dead if there will be none."""
        await self._has_some.wait()
        found, self._waiting = self._waiting, []
        if self._error and not found:
            raise self._error
        if not self._error:
            self._has_some.clear()
        return found


class Stream:
    """A request that is open; its outputs arrive in `inbox`, of which the last has an `ending`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inbox: Inbox):
        self.loop, self.inbox = loop, inbox
        self.request: Request | None = None


class Place:
    """One of the places for requests that a worker has, taken until `leave`."""

    def __init__(self, worker: "Worker"):
        self._worker: Worker | None = worker
        worker._n_open += 1

    def leave(self) -> None:
        """Gives it back, for others; once is enough."""
        if self._worker:
            self._worker._n_open -= 1
        self._worker = None


class Worker:
    """Runs an engine; `most` requests at a time are accepted, running and waiting together."""

    def __init__(self, engine: Engine, most: int = 256):
        self.engine, self.most = engine, most
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Request, Stream] = {}
        self._n_open = 0
        self._error: Exception | None = Dead("the engine has not started")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return self._error is None

    @property
    def n_open(self) -> int:
        """Requests that are running, waiting or being read."""
        return self._n_open

    def check_place(self) -> None:
        """Raises Busy if no other request is taken."""
        if self._n_open >= self.most:
            raise Busy(f"{self._n_open} requests are running or waiting")

    def take(self) -> Place:
        """Returns a place for a request that `open` will be called for. Raises Busy."""
        self.check_place()
        return Place(self)

    def start(self) -> None:
        """Starts the thread."""
        self._error = None
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; requests that are open fail with `Dead`."""
        self._calls.put(self._raise)
        self._thread.join()

    @contextlib.asynccontextmanager
    async def open(
        self, prompt: Sequence[int], sampling: Sampling, inbox: Inbox, place: Place | None = None
    ) -> AsyncIterator[Stream]:
        """A request, for as long as the block runs; its `place` is taken here if it was not before.

        Raises Busy, Dead, and UserError for a request that could never run.
        """
        if self._error:
            raise self._error
        place = place or self.take()
        stream = Stream(asyncio.get_running_loop(), inbox)
        submitted: asyncio.Future[None] = stream.loop.create_future()
        self._calls.put(lambda: self._submit(stream, prompt, sampling, submitted))
        try:
            if self._error:  # since it was put there: nobody may look any more
                raise self._error
            await submitted
            yield stream
        finally:
            place.leave()
            self._calls.put(lambda: self._cancel(stream))

    def _submit(self, stream: Stream, prompt: Sequence[int], sampling: Sampling, submitted: asyncio.Future) -> None:
        try:
            if self._error:
                raise self._error
            stream.request = self.engine.submit(prompt, sampling)
            self._streams[stream.request] = stream
            answer = None
        except Exception as error:  # the request is at fault, not the engine
            answer = error
        _call(stream.loop, lambda: _settle(submitted, answer))

    def _cancel(self, stream: Stream) -> None:
        if stream.request:
            self._streams.pop(stream.request, None)
            self.engine.cancel(stream.request)

    def _run(self) -> None:
        try:
            while True:
                while self.engine.is_idle or not self._calls.empty():
                    self._calls.get()()
                self._hand_out(self.engine.step())
        except BaseException as error:  # some libraries' failures are no Exception
            self._error = error if isinstance(error, Dead) else Dead("the engine has failed: see the server's log")
            for stream in self._streams.values():
                _call(stream.loop, lambda stream=stream: stream.inbox.put(stream, self._error))
            while not self._calls.empty():  # those who wait there get the error too
                with contextlib.suppress(Dead):
                    self._calls.get()()
            if not isinstance(error, Dead):
                raise

    def _raise(self) -> None:
        raise Dead("the server is stopping")

    def _hand_out(self, outputs: list[Output]) -> None:
        found = [(self._streams[output.request], output) for output in outputs if output.request in self._streams]
        for loop in {stream.loop for stream, _ in found}:
            mine = [(stream, output) for stream, output in found if stream.loop is loop]
            _call(loop, lambda mine=mine: [stream.inbox.put(stream, output) for stream, output in mine])


def _call(loop: asyncio.AbstractEventLoop, function: Callable) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
        loop.call_soon_threadsafe(function)


def _settle(future: asyncio.Future, error: Exception | None) -> None:
    if future.done():  # cancelled: its client has gone
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
