"""What stands before the routes: who is refused, in which order, and what is read of them. No server, no engine."""

import asyncio
import json
import types

import pytest
from prometheus_client import CollectorRegistry, Counter

from deepseek_jax.serve.api.door import MOST_BYTES, Door, _Joining
from deepseek_jax.serve.api.refusals import MOST_HELD, MOST_HELD_S, MOST_RETRY_S, WINDOW_S, Refusals
from deepseek_jax.serve.outputs import Output
from deepseek_jax.serve.worker import Dead, Inbox, Worker


class Entrance:
    """A door before an application that answers `status` once `gate` is open; bodies that reach it are in `seen`."""

    def __init__(self, most=2, keys=()):
        self.worker, self.seen, self.gate, self.status = Worker(None, most), [], asyncio.Event(), 200
        self.registry, self.open_at_answer = CollectorRegistry(), []
        responses = Counter("responses", "", ("route", "status"), registry=self.registry)
        metrics = types.SimpleNamespace(responses=responses)
        self.door = Door(self.app, types.SimpleNamespace(keys=keys, worker=self.worker, metrics=metrics))
        self.door.refusals = Refusals(draw=lambda: 0.0)  # none is held
        self.gate.set()

    async def app(self, scope, receive, send):
        self.seen.append((await receive())["body"])
        await self.gate.wait()
        if self.status == 500:
            raise RuntimeError
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, parts=(b"{}",), path="/v1/completions", key=""):
        """Returns (status, headers, message of the error); parts are what comes of the body, None that it ends."""
        parts, sent = list(parts), []

        async def receive():
            await asyncio.sleep(0)
            if not parts:
                await asyncio.Event().wait()  # never
            part = parts.pop(0)
            return part if isinstance(part, dict) else {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            if message["type"] == "http.response.start":
                self.open_at_answer.append(self.worker.n_open)
            sent.append(message)

        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await self.door(scope, receive, send)
        if not sent:
            return None
        head, body = sent
        error = json.loads(body["body"]).get("error", {"message": ""})
        return head["status"], dict(head["headers"]), error["message"]

    def count(self, status, route="/completions"):
        return self.registry.get_sample_value("responses_total", {"route": route, "status": str(status)})


def test_a_full_queue_refuses_by_the_head_alone():
    async def run():
        entrance = Entrance(most=1, keys=("secret",))
        entrance.worker.take()
        status, headers, said = await entrance.ask([], key="secret")  # its body never comes
        assert (status, headers[b"retry-after"], said) == (429, b"1", "1 requests are running or waiting")
        assert (await entrance.ask([], key="wrong"))[0] == 401, "keys come before the queue"
        assert (await entrance.ask(path="/v1/tokenize", key="secret"))[0] == 200, "it needs no place"
        assert not entrance.seen[1:] and entrance.worker.n_open == 1
        assert (entrance.count(429), entrance.count(401)) == (1, 1)

    asyncio.run(run())


@pytest.mark.parametrize("parts", [[b"{}"], [b"", b"{", b"}"]])
def test_of_many_at_once_as_many_are_parsed_as_the_queue_takes(parts):
    async def run():
        entrance = Entrance(most=3)
        entrance.gate.clear()
        asking = [asyncio.create_task(entrance.ask(parts)) for _ in range(20)]
        while sum(one.done() for one in asking) < 17:
            await asyncio.sleep(0)
        assert entrance.seen == [b"{}"] * 3 and entrance.worker.n_open == 3
        entrance.gate.set()
        statuses = [status for status, *_ in await asyncio.gather(*asking)]
        assert (statuses.count(200), statuses.count(429), entrance.worker.n_open) == (3, 17, 0)
        assert (entrance.count(200), entrance.count(429)) == (3, 17)

    asyncio.run(run())


def test_a_request_whose_body_does_not_come_keeps_no_place():
    async def run():
        entrance = Entrance(most=1)
        slow = asyncio.create_task(entrance.ask([]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert entrance.worker.n_open == 0 and (await entrance.ask())[0] == 200
        slow.cancel()
        assert await entrance.ask([b"{", {"type": "http.disconnect"}]) is None  # who has left gets no answer

    asyncio.run(run())


@pytest.mark.parametrize("status", [200, 400, 422, 500, 503])
def test_the_place_is_free_after_any_end(status):
    async def run():
        entrance = Entrance(most=1)
        entrance.status = status
        for _ in range(3):
            try:
                assert (await entrance.ask())[0] == status
            except RuntimeError:
                assert status == 500
            assert entrance.worker.n_open == 0
        if status not in (200, 500):  # who is answered may ask again at once
            assert entrance.open_at_answer == [0] * 3

    asyncio.run(run())


def test_bodies_are_joined_up_to_their_bound():
    async def run():
        entrance, half = Entrance(), bytes(MOST_BYTES // 2)
        assert (await entrance.ask([half, half]))[0] == 200 and len(entrance.seen[0]) == MOST_BYTES
        status, _, said = await entrance.ask([half, half, b"x"])
        assert status == 413 and "a body of more than" in said and len(entrance.seen) == 1
        assert entrance.worker.n_open == 0 and entrance.count(413) == 1

    asyncio.run(run())


def test_an_inbox_gives_all_that_came_and_then_says_that_no_more_will():
    async def run():
        inbox, stream = Inbox(), object()
        outputs = [Output(None, [token], "") for token in range(3)]
        for output in outputs:
            inbox.put(stream, output)
        assert await inbox.read() == [(stream, output) for output in outputs]
        inbox.put(stream, outputs[0])
        inbox.put(stream, Dead("gone"))
        assert await inbox.read() == [(stream, outputs[0])]
        for _ in range(2):
            with pytest.raises(Dead, match="gone"):
                await inbox.read()

    asyncio.run(run())


class Wire:
    def __init__(self):
        self.sent, self.has_closed = [], False

    def write(self, data):
        self.sent.append(data)

    def close(self):
        self.has_closed = True

    def is_closing(self):
        return self.has_closed


def test_what_is_written_in_one_turn_is_sent_together_and_before_the_end():
    async def run():
        wire = Wire()
        joining = _Joining(wire, asyncio.get_running_loop())
        joining.write(b"head,")
        joining.write(b"body,")
        assert not wire.sent
        await asyncio.sleep(0)
        assert wire.sent == [b"head,body,"] and not joining.is_closing()
        joining.write(b"end")
        joining.close()
        joining.write(b"too late")
        await asyncio.sleep(0)
        assert wire.sent[1:] == [b"end"] and wire.has_closed

    asyncio.run(run())


class Hours:
    """A clock that stands still, and turns of the loop that end when nothing is left to do at once."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def hold(self, refusals, n):
        """Begins that many refusals; returns their tasks."""
        tasks = [asyncio.create_task(refusals.hold()) for _ in range(n)]
        for _ in range(3):
            await asyncio.sleep(0)
        return tasks


def test_the_more_are_refused_the_longer_they_are_asked_to_wait():
    """1 refused per request taken; then a window without any, after which there are none."""

    async def run():
        clock = Hours()
        draws = []
        refusals = Refusals(clock, lambda: draws.pop() if draws else 0.5)
        refusals._wait = lambda seconds: asyncio.sleep(0, held.append(seconds))
        held = []
        assert await refusals.hold() == 1 and held == [0.0]  # the first one hears of it at once
        for _ in range(49):
            refusals.note_taken()
        for _ in range(49):
            await refusals.hold()
        draws[:] = [0.0, 1.0, 0.5, 0.0, 1.0, 0.25]  # drawn from the end: how long it is held, then Retry-After
        assert [await refusals.hold() for _ in range(3)] == [24, 16, 8]  # rounded
        assert held[-3:] == [0.25 * MOST_HELD_S, 0.0, MOST_HELD_S]
        clock.now += 1.1 * WINDOW_S
        assert await refusals.hold() == 1 and held[-1] < 0.01
        for _ in range(1000):
            await refusals.hold()
        assert await refusals.hold() == MOST_RETRY_S and max(held) <= MOST_HELD_S

    asyncio.run(run())


def test_no_more_are_held_than_the_bound_and_none_once_the_server_ends():
    async def run():
        clock = Hours()
        refusals = Refusals(clock, lambda: 1.0)
        first = await clock.hold(refusals, MOST_HELD + 5)
        assert refusals.n_held == MOST_HELD and sum(one.done() for one in first) == 5
        first[0].cancel()  # its client's connection was ended
        for _ in range(3):
            await asyncio.sleep(0)
        assert refusals.n_held == MOST_HELD - 1
        (another,) = await clock.hold(refusals, 1)
        refusals.end()
        assert await another == MOST_RETRY_S and refusals.n_held == 0
        assert not (await asyncio.wait(first, timeout=0.0))[1]
        (late,) = await clock.hold(refusals, 1)
        assert late.done()

    asyncio.run(run())


def test_a_refusal_is_written_after_it_was_held():
    async def run():
        entrance = Entrance(most=1)
        entrance.door.refusals = Refusals(draw=lambda: 1.0)
        place = entrance.worker.take()
        asking = asyncio.create_task(entrance.ask())
        while not entrance.door.refusals.n_held:
            await asyncio.sleep(0)
        assert entrance.count(429) is None and not entrance.open_at_answer
        place.leave()  # it stays refused: a place that is free now is for who comes now
        entrance.door.refusals.end()
        assert (await asking)[0] == 429 and entrance.count(429) == 1 and not entrance.seen
        assert (await entrance.ask())[0] == 200

    asyncio.run(run())
