"""What stands before the routes: keys, the queue, bounds of what is read.

Under ten times the load that a server can take, nine of ten requests are refused, and those who are served wait for all
that the event loop does: so a refusal must cost little, and come seldom (`refusals`). It is made here, of a request's
head if it can be, and its answer is written once.
"""

import asyncio
import collections
import functools
import hashlib
import hmac
import itertools
from typing import Any, cast

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.refusals import Refusals
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.worker import Busy, Place

MOST_BYTES = 32 * 2**20  # of a request's body
MOST_HEAD_BYTES = 2**16  # of its headers, where they do not arrive at once
OPEN = ("/", "/health")  # routes that need no key
PREFIXES = ("/v1", "", "/beta")  # routes are searched in this order
COMPLETIONS = frozenset(itertools.chain(*((f"{one}/chat/completions", f"{one}/completions") for one in PREFIXES)))


class Door:
    """Refuses requests without a key, completions while the queue is full, and bodies of more than `MOST_BYTES`.

    A completion takes its place in the queue when its body is here, before that is parsed: however many come at once,
    no more are parsed than the queue takes, and one whose body does not come keeps no place. What length headers state
    does not matter. It also counts responses.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self._keys, self._worker = app, service.keys, service.worker
        self._responses, self.refusals = service.metrics.responses, Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as ASGI asks."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        place: Place | None = None

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
                if place and message["status"] != 200:  # the next one may come before the answer is sent
                    place.leave()
            await send(message)

        is_completion = scope["method"] == "POST" and scope["path"] in COMPLETIONS
        try:
            self._check_key(scope)
            if is_completion:
                self._worker.check_place()
            if scope["method"] == "POST" and scope["path"] not in OPEN:
                receive = _again(await _body(receive), receive)
            if is_completion:
                scope["state"]["place"] = place = self._worker.take()
                self.refusals.note_taken()
            await self.app(scope, receive, counted)
        except _Refusal as refusal:
            await refusal.response(scope, receive, counted)
        except Busy as busy:
            seconds = await self.refusals.hold()
            await _busy(str(busy), seconds)(scope, receive, counted)
        except _Gone:
            pass
        finally:
            if place:
                place.leave()

    def _check_key(self, scope: Scope) -> None:
        tenant = _tenant(scope, self._keys)
        scope.setdefault("state", {})["tenant"] = tenant
        if tenant is None and scope["path"] not in OPEN:
            raise _Refusal(NO_KEY)

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in COMPLETIONS else getattr(scope.get("route"), "path", "none")
        route = path.removeprefix("/v1").removeprefix("/beta")
        self._responses.labels(route, status).inc()


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's, closed when more than `MOST_HEAD_BYTES` have come and no part of a message is whole.

    When a client leaves, all its requests learn of it: uvicorn marks the last one alone, which may wait for another.
    """

    n_bytes = 0  # that came since any part of a message was whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins a connection."""
        self.begun = collections.deque[Any]()  # requests whose answers have not ended, in order
        super().connection_made(cast(asyncio.Transport, _Joining(transport, self.loop)))

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends a connection."""
        super().connection_lost(exc)
        for one in self.begun:
            one.disconnected = not one.response_complete
            one.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Takes what has come."""
        self.n_bytes += len(data)
        super().data_received(data)
        if self.n_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """Begins to answer a request."""
        self.n_bytes = 0
        super().on_headers_complete()
        while self.begun and self.begun[0].response_complete:
            self.begun.popleft()
        if self.cycle:
            self.begun.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Takes a part of a body."""
        self.n_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends a request."""
        self.n_bytes = 0
        super().on_message_complete()


class _Joining:
    """A transport that sends together what is written in one turn of the loop: heads, bodies, ends of streams."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Sends data before the loop's next turn."""
        if not self._waiting:
            self._loop.call_soon(self._send)
        self._waiting.append(data)

    def close(self) -> None:
        """Sends what was written, and closes."""
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._waiting and not self._transport.is_closing():
            self._transport.write(b"".join(self._waiting))
        self._waiting.clear()


class _Refusal(Exception):
    """A request gets this answer and no other."""

    def __init__(self, response: Response):
        self.response = response


class _Gone(Exception):
    """The client has left."""


def failed(status: int, text: str, retry_s: int = 1) -> Response:
    """The answer that says an error, of which only the server's log has the words if it is the server's own."""
    kind = "invalid_request_error" if status < 429 else "server_error"
    headers = {"Retry-After": str(retry_s)} if status in (429, 503) else None
    text = "an error of the server: see its log" if status == 500 else text  # which may say what others wrote
    return JSONResponse(answers.error(text, kind), status_code=status, headers=headers)


@functools.lru_cache(64)
def _busy(text: str, retry_s: int) -> Response:
    return failed(429, text, retry_s)


NO_KEY = failed(401, "missing or wrong API key: expected Authorization: Bearer KEY")
NO_KEY.headers["WWW-Authenticate"] = "Bearer"
TOO_LONG = failed(413, f"a body of more than {MOST_BYTES} bytes")


async def _body(receive: Receive) -> bytes:
    """Reads a request's body. Raises _Refusal if it is too long, _Gone if its client leaves."""
    parts, n_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        n_bytes += len(parts[-1])
        if n_bytes > MOST_BYTES:
            raise _Refusal(TOO_LONG)
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body before what comes after it."""
    is_read = False

    async def again() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _tenant(scope: Scope, keys: tuple[str, ...]) -> bytes | None:
    """What stands for a request's key; b"" where none is needed, None if it is missing or wrong.

    All keys are compared, in constant time.
    """
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    given = given.removeprefix(b"Bearer ")
    found = [hmac.compare_digest(given, key.encode()) for key in keys]
    return hashlib.sha256(given).digest() if any(found) else None if keys else b""
