"""The engine's thread: clients that leave, a full queue, an engine that fails or is stopped."""

import asyncio
import threading

import openai
import pytest

from deepseek_jax.serve.engine import Sampling
from deepseek_jax.serve.worker import Dead, Inbox, Worker
from tests.serve.scripted import ASK, Script, ask, message_of, serve, wait_until


def test_clients_that_leave_end_their_requests(client, served, script):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.01
    stream = client.chat.completions.create(model="mine", messages=ASK, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: script.is_idle and served.worker.n_open == 0)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(model="mine", messages=ASK)
    wait_until(lambda: script.is_idle and served.worker.n_open == 0)


def test_a_full_queue_refuses_and_recovers(client, served, script):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.01
    streams = [client.chat.completions.create(model="mine", messages=ASK, stream=True) for _ in range(8)]
    with pytest.raises(openai.RateLimitError, match="8 requests are running or waiting"):
        client.chat.completions.create(model="mine", messages=ASK)
    for path in ("/chat/completions", "/v1/completions"):  # what is sent is not even read
        assert ask(served, "POST", path, b"{")[0] == 429
    assert ask(served, "GET", "/models")[0] == 200
    for stream in streams:
        stream.close()
    wait_until(lambda: served.worker.n_open == 0)
    assert client.chat.completions.create(model="mine", messages=ASK, max_tokens=4).choices[0].message.content == "word"


class Panic(BaseException):
    """What libraries in Rust raise where they fail."""


@pytest.mark.parametrize("failure", [RuntimeError, Panic])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_said(failure):
    script = Script()
    script.answer, script.failure = (lambda prompt: "\0"), failure
    made = serve(script)
    status, found = ask(made, "POST", "/chat/completions", {"messages": ASK, "max_tokens": 1})
    assert status == 503 and "see the server's log" in message_of(found) and "device" not in message_of(found)
    assert ask(made, "GET", "/health")[0] == 503
    assert ask(made, "POST", "/chat/completions", {"messages": ASK})[0] == 503
    made.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_that_comes_while_the_engine_fails_is_answered():
    script, gate = Script(), threading.Event()
    script.answer, step = (lambda prompt: "\0"), script.step
    script.step = lambda: gate.wait() and step()
    worker = Worker(script)
    worker.start()

    async def say():
        with pytest.raises(Dead):
            async with worker.open([1], Sampling(1), inbox := Inbox()):
                await inbox.read()

    async def two():
        first = asyncio.create_task(say())
        while not script.requests:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(say())
        while worker._calls.empty():
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.wait_for(asyncio.gather(first, second), 10)

    asyncio.run(two())
    worker.stop()
    assert worker.n_open == 0


def test_a_worker_that_stops_ends_what_is_open():
    script = Script()
    script.answer, script.delay_s = lambda prompt: "word " * 80, 0.01
    worker = Worker(script, 2)
    worker.start()

    async def talk():
        async with worker.open([1], Sampling(300), inbox := Inbox()):
            await inbox.read()
            await asyncio.to_thread(worker.stop)
            with pytest.raises(Dead, match="stopping"):
                while True:
                    await inbox.read()

    asyncio.run(talk())
