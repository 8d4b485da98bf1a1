"""`deepseek-jax serve` in a process of its own under ten times its capacity, then left by a thousand clients.

    pytest -m matrix -n0 -s tests/serve/test_load.py        # ten minutes; prints what it measures
    DEEPSEEK_JAX_LOAD_S=30 pytest …                         # other seconds of load

Clients ask for all kinds of drawing. One that is refused asks again after the seconds that Retry-After names, as
OpenAI's client does; in a shorter load after that, all ask again at once, whatever it says. A first server fills the
cache of compiled programs; the times of the second are those of a server that starts again.
"""

import asyncio
import contextlib
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
import urllib.request

import pytest

from deepseek_jax.language_model import save_pretrained
from deepseek_jax.serve.traffic import Server, ask
from tests.serve import twin
from tests.serve.test_traffic import vanish_all

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(3600)]
LOAD_S = int(os.environ.get("DEEPSEEK_JAX_LOAD_S", "300"))
N_ROWS, N_TAKEN, N_CLIENTS = 16, 32, 1000
ADDRESS = re.compile(r" at (http://\S+)/v1 ")
OURS = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")  # of the tests alone


class Process:
    """A server, and what it wrote to its log."""

    def __init__(self, folder, log):
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        environment |= {"JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-P", "-m", "deepseek_jax", "serve", f"--from={folder}", "--port=0", "--name=mine"]
        command += [f"--rows={N_ROWS}", f"--queue={N_TAKEN}"]
        self.log, self.started = log, time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment)

    def wait_for(self, words):
        while not (found := re.search(words, self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return found

    @property
    def seconds(self):
        return time.monotonic() - self.started

    @property
    def n_compiled(self):
        return self.log.read_text().count("Compiling jit(")

    @property
    def mebibytes(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    @property
    def cpu_s(self):
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def some_body(draw, vocab_size):
    """A request: prompts of one to some sixty tokens, of which many begin alike; all ways to draw."""
    prompt = [7] * draw.choice((0, 32)) + [draw.randrange(vocab_size) for _ in range(draw.randrange(1, 32))]
    body = {"prompt": prompt, "max_tokens": draw.randrange(1, 33), "ignore_eos": draw.random() < 0.5}
    body |= draw.choice(({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9}, {"top_k": 9}))
    body |= draw.choice(({}, {"logprobs": draw.randrange(5)}, {"presence_penalty": 1.0}, {"logit_bias": {"9": 2.0}}))
    body |= draw.choice(({}, {"seed": 3}, {"echo": True, "logprobs": 1}, {"stop": ["a"]}, {"user": "alice"}))
    return body | {"stream": True, "stream_options": {"include_usage": True}}


async def load(url, n_users, seconds, vocab_size, watch=lambda: None, *, obeys=True):
    """Users who ask as soon as they are answered; returns the outcomes, and what `watch` gives each second.

    Those who are refused wait as they are asked to, or not at all.
    """
    ends, outcomes, watched = time.monotonic() + seconds, [], []

    async def user(number):
        draw = random.Random(number)
        while time.monotonic() < ends:
            outcomes.append(await ask(Server(url), some_body(draw, vocab_size)))
            if obeys:
                await asyncio.sleep(outcomes[-1].retry_s)

    async def look():
        while time.monotonic() < ends:
            watched.append(watch())
            await asyncio.sleep(1)

    await asyncio.gather(look(), *map(user, range(n_users)))
    return outcomes, watched


def report(title, outcomes, seconds, cpu_s):
    """Prints the load, and returns how often each status came."""
    answered = [one for one in outcomes if one.status == 200]
    statuses = {status: sum(one.status == status for one in outcomes) for status in {one.status for one in outcomes}}
    times = {"first token": [one.first_s for one in answered if one.n_new], "whole": [one.end_s for one in answered]}
    said = [
        f"{name} {1e3 * statistics.median(all_s):.0f} and {1e3 * cut(all_s):.0f} ms" for name, all_s in times.items()
    ]
    print(f"{title}: {statuses}, {len(answered) / seconds:.1f} answered/s, {cpu_s:.1f} CPU s; median, p99:", *said)
    return statuses


def cut(values):
    return statistics.quantiles(values, n=100)[-1]


def gauges(url):
    """The server's metrics that have no labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.removeprefix("deepseek_jax_").split(" ") for line in lines if line[:1] != "#" and "{" not in line]
    return {name: float(value) for name, value in pairs}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_ten_times_the_capacity(tmp_path):
    model, _ = twin.train(tmp_path)
    vocab_size = model.tokenizer.vocab_size
    save_pretrained(model, tmp_path / "twin", dtype="fp32")
    for turn in ("cold", "warm"):
        server = Process(tmp_path / "twin", tmp_path / f"{turn}.log")
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            url = server.wait_for(ADDRESS)[1]
            listens_s = server.seconds
            assert asyncio.run(ask(Server(url), some_body(random.Random(0), vocab_size))).status == 200
            answers_s, answers_cpu_s = server.seconds, server.cpu_s
            server.wait_for("compiled all")
            print(
                f"{turn}: listens {listens_s:.1f} s, first answer {answers_s:.1f} s ({answers_cpu_s:.1f} CPU s)", end=""
            )
            print(f", all {server.n_compiled} programs {server.seconds:.1f} s")
            if turn == "warm":
                under_load(server, url, vocab_size)
                stack.pop_all()
                server.stop()
                assert server.process.returncode in (0, -15)


def under_load(server, url, vocab_size):
    n_compiled, before = server.n_compiled, server.cpu_s
    assert n_compiled > 10, "the log says nothing of compiled programs"
    outcomes, _ = asyncio.run(load(url, N_TAKEN, LOAD_S / 5, vocab_size))
    assert set(report("at capacity", outcomes, LOAD_S / 5, server.cpu_s - before)) == {200}
    before = server.cpu_s
    outcomes, mebibytes = asyncio.run(load(url, 10 * N_TAKEN, LOAD_S, vocab_size, lambda: server.mebibytes))
    assert set(report("ten times", outcomes, LOAD_S, server.cpu_s - before)) == {200, 429}
    places = range(0, len(mebibytes), max(1, len(mebibytes) // 10))
    print("MiB:", *(round(mebibytes[place]) for place in places))
    assert max(mebibytes) - mebibytes[len(mebibytes) // 5] < 30
    before = server.cpu_s
    outcomes, _ = asyncio.run(load(url, 10 * N_TAKEN, LOAD_S / 5, vocab_size, obeys=False))
    assert set(report("ten times, at once again", outcomes, LOAD_S / 5, server.cpu_s - before)) == {200, 429}
    asyncio.run(vanish_all(Server(url), N_CLIENTS, N_ROWS))
    deadline = time.monotonic() + 60
    while (now := gauges(url))["requests_open"] or now["pages_free"] != now["pages"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    assert asyncio.run(ask(Server(url), some_body(random.Random(1), vocab_size))).status == 200
    print(f"{N_CLIENTS} clients vanished: {server.mebibytes:.0f} MiB, all {now['pages']:.0f} pages free")
    assert server.n_compiled == n_compiled, server.log.read_text()[-2000:]
