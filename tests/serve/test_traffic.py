"""Load: what a server under too many requests, vanishing clients and a long run does, and what `bench serve` says."""

import asyncio
import contextlib
import gc
import os
import resource
import socket

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_serve
from deepseek_jax.serve.traffic import LATE, NO_CONNECTION, Arrivals, Outcome, Refused, Server, events, send
from tests.serve.scripted import ask, serve, wait_until

PROMPTS = [[1 + n % 200, 2, 3, 4 + n % 7] for n in range(1000)]


@pytest.fixture(scope="module")
def served(engine):
    made = serve(engine(), name=None, n_positions=32, most=16)
    yield made
    made.stop()


def pages_are_free(served):
    pages = served.worker.engine.ranks[0].pages
    return served.worker.n_open == 0 and pages.n_free == pages.n_pages - 1


def run(served, prompts, n_new=8, **arrivals):
    outcomes, _ = asyncio.run(send(Server(served.url), prompts, Arrivals(**arrivals), n_new))
    return outcomes


def test_users_are_served_and_counted(served):
    outcomes = run(served, PROMPTS[:24], concurrency=8)
    assert [(one.status, one.n_prompt, one.n_new) for one in outcomes] == [(200, 4, 8)] * 24
    assert all(0 < one.first_s <= one.end_s and len(one.gaps_s) < 8 for one in outcomes)
    wait_until(lambda: pages_are_free(served))


def test_ten_times_the_capacity_is_refused_and_those_admitted_are_served(served):
    """16 requests are taken, 160 come at once."""
    outcomes = run(served, PROMPTS[:160], concurrency=160)
    assert {one.status for one in outcomes} == {200, 429}
    assert all(one.n_new == 8 for one in outcomes if one.status == 200)
    assert sum(one.status == 200 for one in outcomes) >= 16
    wait_until(lambda: pages_are_free(served))
    assert run(served, PROMPTS[:1])[0].status == 200


async def vanish(server, number):
    """Closes the connection after up to three events, or at once."""
    stream = events(server, {"prompt": PROMPTS[number], "max_tokens": 28, "stream": True, "ignore_eos": True})
    with contextlib.suppress(TimeoutError, Refused):
        async with asyncio.timeout(20 if number % 4 else 0.001 * (number % 5)):
            for _ in range(number % 4 or 1):
                await anext(stream, None)
    await stream.aclose()


async def vanish_all(server, n_clients, at_once):
    users = asyncio.Semaphore(at_once)

    async def one(number):
        async with users:
            await vanish(server, number)

    await asyncio.gather(*(one(number) for number in range(n_clients)))


@pytest.mark.parametrize("n_clients", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_vanish_leave_all_pages_free(served, n_clients):
    asyncio.run(vanish_all(Server(served.url), n_clients, 16))
    wait_until(lambda: pages_are_free(served))
    assert served.worker.is_alive and run(served, PROMPTS[:1])[0].status == 200


def used():
    """Bytes in memory of this process, which is server and clients."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def n_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("n_requests", [100, pytest.param(1000, marks=pytest.mark.matrix)])
def test_a_long_run_takes_no_more_memory(served, n_requests):
    run(served, PROMPTS[:100], concurrency=12, n_new=2)
    before, n_files = used(), n_descriptors()
    for _ in range(n_requests // 100):
        assert {one.status for one in run(served, PROMPTS[:100], concurrency=12, n_new=2)} == {200}
    wait_until(lambda: pages_are_free(served) and n_descriptors() <= n_files)
    assert used() - before < 30 * 2**20


def test_the_bench_prints_its_figures(served, capsys):
    args = [f"--url={served.url}", f"--peer-url={served.url}", "--requests=4", "--prompt-tokens=5", "--new-tokens=4"]
    assert _bench_serve.main([*args, "--concurrency=2", "--warmup=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 users, 4 requests per turn, prompts of 5 tokens, 4 new ones"
    table = {line.split("  ")[0]: line.split() for line in lines[1:]}
    assert table["answered"][1:] == ["4", "4", "1.00"] and len(table["TTFT p99, ms"]) == 6
    assert _bench_serve.main([*args[:1], *args[2:], "--rate=200", "--warmup=0", "--limit-s=60"]) == 0
    assert "200.0 requests/s" in capsys.readouterr().out


def test_figures_by_hand():
    slow, fast = Outcome(200, 0.2, 1.2, (0.5, 0.5), 10, 0, 11), Outcome(200, 0.1, 0.2, (0.1,), 10, 5, 2)
    found = _bench_serve.summary([([slow, fast, Outcome(429)], 2.0)])
    assert (found["answered"], found["refused or failed"], found["requests/s"]) == (2, 1, 1.0)
    assert (found["new tokens/s"], found["all tokens/s"]) == (6.5, 16.5)
    assert found["prompt tokens from the cache, %"] == 25
    assert found["TPOT mean, ms"] == pytest.approx(100) and found["TTFT mean, ms"] == pytest.approx(150)
    assert found["ITL mean, ms"] == pytest.approx(1100 / 3)
    lost = [Outcome(429), Outcome(LATE), Outcome(429), Outcome(NO_CONNECTION)]
    found = _bench_serve.summary([([slow, *lost], 2.0)])
    assert (found["refused or failed"], found["over the time limit"]) == (3, 1)
    message = "no request was answered: 2 had status 429, 1 took longer than --limit-s, 1 lost their connection"
    with pytest.raises(UserError, match=message):
        _bench_serve.summary([(lost, 1.0)])


def test_a_server_that_does_not_answer_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(f"http://127.0.0.1:{silent.getsockname()[1]}", limit_s=0.05)
        outcomes, _ = asyncio.run(send(server, PROMPTS[:2], Arrivals(), 4))
    assert [one.status for one in outcomes] == [LATE, LATE]


def test_what_the_bench_cannot_reach_is_said(served):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/models: .*Start a server"):
        _bench_serve.main(["--url=http://127.0.0.1:9"])
    assert ask(served, "GET", "/health")[0] == 200
