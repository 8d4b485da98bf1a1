"""A server whose engine says given texts, a few tokens per step, so that what arrives is known to the letter."""

import http.client
import json
import random
import threading
import time
import types
from typing import NamedTuple

import uvicorn

from deepseek_jax.data.chat import TEMPLATES
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api.app import make_server
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.outputs import Logprob, Output
from deepseek_jax.serve.worker import Worker

BYTES = open_tokenizer("bytes")

END = "<｜end▁of▁sentence｜>"

ASK = [{"role": "user", "content": "1+1=?"}]


def score(token):
    """A log-probability that depends on the token; the likeliest tokens are this one and the one before."""
    return Logprob(-token / 64, [(token, -token / 64), (token - 1, -9.0)])


class Job:
    def __init__(self, ids, n_cached, options, prompt):
        self.ids, self.n_cached, self.options, self.prompt = ids, n_cached, options, prompt

    def scores(self, new):
        """What the engine reports beside new ids."""
        if self.options.logprobs is None:
            return ()
        n_top, prompt, self.prompt = self.options.logprobs, self.prompt, []
        found = [score(token)._replace(top=score(token).top[:n_top]) for token in [*prompt, *new]]
        recited = [None, *found[1 : len(prompt)]] if prompt and self.options.prompt_logprobs else []
        return found[len(prompt) :], recited


class Script:
    """An engine whose requests say `answer(prompt)`, a text or ids, `speed` tokens per step."""

    longest = 400  # ids of a prompt

    def __init__(self, tokenizer=BYTES):
        self.tokenizer = tokenizer
        self.answer, self.speed, self.requests, self.delay_s = lambda prompt: "Hi!" + END, 3, [], 0.0
        self.prompts, self.samplings, self.failure = [], [], RuntimeError
        scheduler, pages = types.SimpleNamespace(running=[]), types.SimpleNamespace(n_pages=9, n_free=8)
        self.ranks = [types.SimpleNamespace(scheduler=scheduler, pages=pages)]
        self.n_drafted, self.n_accepted = 5, 4

    def submit(self, prompt, sampling):
        if len(prompt) > self.longest:
            raise UserError("too long")
        self.prompts.append(self.tokenizer.decode(prompt, specials=True))
        self.samplings.append(sampling)
        said = self.answer(self.prompts[-1])
        ids = self.tokenizer.encode(said, specials=True).tolist() if isinstance(said, str) else said
        ids = ids[: sampling.max_new_tokens]
        if sampling.constraint:
            ids = self.constrained(ids, sampling)
        self.requests.append(Job(ids, min(64, len(prompt)), sampling, prompt))
        return self.requests[-1]

    def constrained(self, ids, sampling):
        """What `ids` would be if after them, or after a wrong one, tokens were drawn from the allowed ones."""
        found, draw = [], random.Random(0)
        while len(found) < sampling.max_new_tokens and found[-1:] != [BYTES.eos_id]:
            bits = sampling.constraint.allowed()
            allowed = range(272) if bits is None else [v for v in range(272) if bits[v // 32] >> (v % 32) & 1]
            token = ids[len(found)] if len(found) < len(ids) and ids[len(found)] in allowed else draw.choice(allowed)
            sampling.constraint.push(token)
            found.append(token)
        return found

    def cancel(self, request):
        if request in self.requests:
            self.requests.remove(request)

    @property
    def is_idle(self):
        return not self.requests

    def step(self):
        if self.delay_s:
            time.sleep(self.delay_s)
        outputs = []
        for request in list(self.requests):
            new, request.ids = request.ids[: self.speed], request.ids[self.speed :]
            ending = "" if request.ids else "stop" if new[-1] in request.options.stop_ids else "length"
            outputs.append(Output(request, new, ending, *request.scores(new)))
            if ending:
                self.cancel(request)
        if any(output.ids == [0] for output in outputs):
            raise self.failure("the device is gone")
        return outputs


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Served(NamedTuple):
    """A server that runs in a thread."""

    url: str
    worker: Worker
    server: uvicorn.Server
    thread: threading.Thread

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


def serve(script, name="r1", **options):
    options = {"name": "mine", "tokenizer": BYTES, "end_ids": (BYTES.eos_id,), "n_positions": 500} | options
    worker = Worker(script, options.pop("most", 8))
    service = Service(worker=worker, template=TEMPLATES[name] if name else None, **options)
    server = make_server(service, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    return Served(f"http://127.0.0.1:{port}", worker, server, thread)


def ask(served, method, path, body=None, key="secret"):
    """Returns (status, body as JSON)."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}".encode()} if key else {})
    data = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def message_of(found):
    return found["error"]["message"]


def SCHEMA(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
