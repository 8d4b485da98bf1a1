"""Requests to a server as its users would send them, timed: what `bench serve` and load tests measure with.

    outcomes = asyncio.run(send(Server("http://127.0.0.1:8000"), prompts, Arrivals(rate=4.0), n_new=128))

Closed loop: `concurrency` users, each of whom sends a request when the one before has been answered. Open loop:
requests arrive by a Poisson process of `rate` per second, whether or not earlier ones have been answered. Answers are
streamed.

    TTFT   from sending a request to its first chunk with text
    TPOT   (end - first chunk) / (tokens - 1), of one request
    ITL    between two chunks, of all requests together

Tokens are those that the server counts. These are the definitions of the benchmarks of vLLM and SGLang.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deepseek_jax.errors import UserError

LIMIT_S = 600.0
NO_CONNECTION, LATE = 0, -1  # in place of a status


class Server(NamedTuple):
    """Where requests go; `path` is that of text completions, `limit_s` the seconds in which each must be answered."""

    url: str
    model: str = ""
    key: str = ""
    path: str = "/v1/completions"
    limit_s: float = LIMIT_S


class Arrivals(NamedTuple):
    """When requests are sent: `rate` per second, or 0 for as soon as one of `concurrency` users is free."""

    rate: float = 0.0
    concurrency: int = 16
    seed: int = 0


class Outcome(NamedTuple):
    """One request.

    Times in seconds after it was sent. `status` is that of HTTP, `NO_CONNECTION` if the connection failed, `LATE` if
    the answer was not complete in time. `retry_s` are the seconds after which a refusal asks to come again.
    """

    status: int
    first_s: float = 0.0
    end_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    n_prompt: int = 0
    n_cached: int = 0
    n_new: int = 0
    retry_s: float = 0.0

    @property
    def per_token_s(self) -> float:
        """TPOT."""
        return (self.end_s - self.first_s) / max(1, self.n_new - 1)


async def send(
    server: Server, prompts: Sequence[Sequence[int]], arrivals: Arrivals, n_new: int, **options: Any
) -> tuple[list[Outcome], float]:
    """Sends one request per prompt for `n_new` tokens each; `options` are added to the bodies.

    Returns the outcomes in the order of the prompts, and the seconds that all of it took.
    """
    draw, users = random.Random(arrivals.seed), asyncio.Semaphore(arrivals.concurrency)
    body = {"model": server.model, "max_tokens": n_new, "temperature": 0.0, "ignore_eos": True} | options
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if not server.model:
        del body["model"]

    async def one(prompt: Sequence[int]) -> Outcome:
        try:
            return await ask(server, body | {"prompt": list(prompt)})
        finally:
            users.release()

    tasks, started = [], monotonic()
    for prompt in prompts:
        if arrivals.rate:
            await asyncio.sleep(draw.expovariate(arrivals.rate))
        else:
            await users.acquire()
        tasks.append(asyncio.create_task(one(prompt)))
    return list(await asyncio.gather(*tasks)), monotonic() - started


async def ask(server: Server, body: dict[str, Any]) -> Outcome:
    """Sends one request and reads its stream to the end, or for `server.limit_s`."""
    started, times = monotonic(), []
    usage: dict[str, Any] = {}
    try:
        async with asyncio.timeout(server.limit_s):
            async for event in events(server, body):
                usage = event.get("usage") or usage
                if any(choice.get("text") or choice.get("delta") for choice in event["choices"]):
                    times.append(monotonic() - started)
    except Refused as refusal:
        return Outcome(refusal.status, end_s=monotonic() - started, retry_s=refusal.retry_s)
    except TimeoutError:
        return Outcome(LATE, end_s=monotonic() - started)
    except (OSError, asyncio.IncompleteReadError):
        return Outcome(NO_CONNECTION, end_s=monotonic() - started)
    gaps = tuple(b - a for a, b in itertools.pairwise(times))
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0)
    return Outcome(200, times[0] if times else 0.0, times[-1] if times else 0.0, gaps, *counts)


class Refused(Exception):
    """An answer whose status is not 200; `retry_s` as in `Outcome`."""

    def __init__(self, status: int, text: str, retry_s: float = 0.0):
        super().__init__(f"status {status}: {text}")
        self.status, self.retry_s = status, retry_s


async def events(server: Server, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yields the events of a streamed answer. Raises Refused, or OSError if the connection fails."""
    reader, writer = await _posted(server, json.dumps(body).encode())
    try:
        status, headers = await _head(reader)
        if status != 200:
            text = (await reader.read(2000)).decode(errors="replace")
            retry_s = headers.get("retry-after", "")  # which may be a date
            raise Refused(status, text, float(retry_s) if retry_s.isdecimal() else 0.0)
        is_chunked = headers.get("transfer-encoding") == "chunked"
        async for line in _lines(reader, is_chunked):
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise Refused(500, str(event["error"]))
                yield event
    finally:
        writer.close()


async def _posted(server: Server, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(server.url)
    if place.scheme != "http" or not place.hostname:
        raise UserError(f"--url={server.url}: expected http://HOST:PORT.")
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
    key = f"Authorization: Bearer {server.key}\r\n" if server.key else ""
    writer.write(
        f"POST {server.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n{key}"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        + data
    )
    await writer.drain()
    return reader, writer


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Reads the head of an answer: (status, headers)."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().rstrip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split(" ", 2)[1]), {name: value.strip() for name, _, value in pairs}


async def _lines(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """The lines of a body, of which one may lie in several chunks."""
    rest = b""
    while True:
        if is_chunked:
            n_bytes = int(await reader.readuntil(b"\r\n"), 16)
            data = (await reader.readexactly(n_bytes + 2))[:-2]
        else:
            data = await reader.read(2**16)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if not data:
            return
