"""Measure a running server: time to the first token, time per token, tokens per second.

    deepseek-jax bench serve                                       # 16 users, prompts of 1,024 tokens, 128 new ones
    deepseek-jax bench serve --rate=4                              # requests that arrive at random, 4 per second
    deepseek-jax bench serve --peer-url=http://127.0.0.1:9000      # another server beside it, in turns, and the ratios

The servers are any that answer POST /v1/completions with prompts of ids: ours, vLLM, SGLang. All get the same random
prompts, as often as --turns says; the first few requests warm up. TTFT is the time to a request's first token, TPOT the
time per token after it, ITL the time between two steps of a stream, in milliseconds. A key is read from the
environment variable DEEPSEEK_JAX_API_KEY.
"""

import asyncio
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.bounds import number, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._http import ask
from deepseek_jax.launch._tables import print_table
from deepseek_jax.serve.traffic import LATE, LIMIT_S, NO_CONNECTION, Arrivals, Outcome, Server, send

FLAGS = {
    "url": (str, "http://127.0.0.1:8000", "the server"),
    "peer_url": (str, "", "another server, measured in turns with the first"),
    "model": (str, "", "model to ask for (default: the first that a server lists)"),
    "requests": (int, 128, "requests per turn", whole(1, 10**6)),
    "warmup": (int, 4, "requests before the first turn, which are not counted", whole(0, 10**6)),
    "turns": (int, 1, "times that each server is measured", whole(1, 1000)),
    "concurrency": (int, 16, "users, each with one request at a time", whole(1, 10**5)),
    "rate": (float, 0.0, "requests per second, which arrive at random, instead of users", number(0, 1e6)),
    "prompt_tokens": (int, 1024, "tokens of each prompt", whole(1, 10**7)),
    "new_tokens": (int, 128, "tokens that each is continued by", whole(1, 10**6)),
    "vocabulary": (int, 0, "ids of prompts are below this (default: as the server's tokenizer says)", whole(0, 2**24)),
    "limit_s": (float, LIMIT_S, "seconds in which a request must be answered; later ones fail", number(0.001, 1e6)),
    "seed": (int, 0, "of prompts and arrivals", whole(0, 2**31)),
}
KEY = "DEEPSEEK_JAX_API_KEY"


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False, workdir=False)
    urls = [url for url in (options.url, options.peer_url) if url]
    servers = [_server(url, options.model, options.limit_s) for url in urls]
    vocabulary = options.vocabulary or _vocabulary(servers[0])
    results: list[list[tuple[list[Outcome], float]]] = [[] for _ in servers]
    for turn in range(options.turns + 1):
        n_requests = options.requests if turn else options.warmup
        draw = np.random.default_rng((options.seed, turn))
        prompts = draw.integers(0, vocabulary, (n_requests, options.prompt_tokens)).tolist()
        arrivals = Arrivals(options.rate if turn else 0.0, options.concurrency, options.seed + turn)
        for server, found in zip(servers, results, strict=True):
            measured = asyncio.run(send(server, prompts, arrivals, options.new_tokens))
            found += [measured] if turn else []
    how = f"{options.rate} requests/s" if options.rate else f"{options.concurrency} users"
    shape = f"prompts of {options.prompt_tokens} tokens, {options.new_tokens} new ones"
    print(f"{how}, {options.requests} requests per turn, {shape}")
    report(urls, [summary(found) for found in results])
    return 0


def summary(turns: Sequence[tuple[Sequence[Outcome], float]]) -> dict[str, float]:
    """Returns the figures of one server: throughputs as medians over its turns, times over all its requests."""
    done = [[one for one in outcomes if one.status == 200] for outcomes, _ in turns]
    every = [one for outcomes in done for one in outcomes]
    if not every:
        raise UserError(f"no request was answered: {_failures([one for outcomes, _ in turns for one in outcomes])}.")

    def per_second(count: Any) -> float:
        return statistics.median(sum(map(count, one)) / turns[n][1] for n, one in enumerate(done))

    found: dict[str, float] = {
        "answered": len(every),
        "refused or failed": sum(one.status not in (200, LATE) for outcomes, _ in turns for one in outcomes),
        "over the time limit": sum(one.status == LATE for outcomes, _ in turns for one in outcomes),
        "requests/s": per_second(lambda _: 1),
        "new tokens/s": per_second(lambda one: one.n_new),
        "all tokens/s": per_second(lambda one: one.n_prompt + one.n_new),
        "prompt tokens from the cache, %": 100
        * sum(o.n_cached for o in every)
        / max(1, sum(o.n_prompt for o in every)),
    }
    times = {
        "TTFT": [one.first_s for one in every],
        "TPOT": [one.per_token_s for one in every if one.n_new > 1],
        "ITL": [gap for one in every for gap in one.gaps_s],
        "whole request": [one.end_s for one in every],
    }
    for name, seconds in times.items():
        values = 1000 * np.asarray(seconds or [0.0])
        found[f"{name} mean, ms"] = float(values.mean())
        found |= {f"{name} p{p}, ms": float(np.percentile(values, p)) for p in (50, 99)}
    return found


def _failures(outcomes: Sequence[Outcome]) -> str:
    """How many failed for which reason."""
    words = {NO_CONNECTION: "lost their connection", LATE: "took longer than --limit-s"}
    counts = Counter(one.status for one in outcomes).most_common()
    return ", ".join(f"{count} {words.get(status, f'had status {status}')}" for status, count in counts)


def report(urls: Sequence[str], found: Sequence[dict[str, float]]) -> None:
    """Prints the figures side by side; the last column is the first server's over the second's."""
    rows = []
    for name in found[0]:
        values = [one[name] for one in found]
        ratio = [f"{values[0] / values[1]:.2f}" if values[1] else "-"] if len(values) > 1 else []
        rows.append((name, *(f"{value:,.6g}" for value in values), *ratio))
    header = ("", *urls, *(["ratio"] if len(urls) > 1 else []))
    print_table(header, rows, right=header[1:])


def _server(url: str, model: str, limit_s: float) -> Server:
    found = Server(url.rstrip("/"), model, os.environ.get(KEY, ""), limit_s=limit_s)
    return found if model else found._replace(model=ask(found.url + "/v1/models", found.key)["data"][0]["id"])


def _vocabulary(server: Server) -> int:
    try:
        return int(ask(server.url + "/tokenizer_info", server.key)["vocab_size"])
    except (UserError, KeyError):
        raise UserError(f"{server.url} does not state the size of its vocabulary. Give --vocabulary.") from None
