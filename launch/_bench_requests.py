"""Measure the engine on this machine's CPU beside transformers on torch, in tokens per CPU second.

    deepseek-jax bench requests                                  # tiny_v3, one request, then 32 of different lengths
    deepseek-jax bench requests --steps=1,8,32 --no-peer         # several numbers of steps per program

Both sides have the same weights and continue the same random prompts greedily; their texts are compared. One request,
then many of different lengths, half to all of --prompt-tokens and --new-tokens each: here in continuous batching,
there in one batch with padding, which runs until the longest has ended, and one after the other. Tokens are those that
were asked for. CPU seconds are those of all threads of a process, so other work on the machine counts little. A first
turn, which is not counted, compiles our programs. The peer comes with: pip install "deepseek_jax[parity]"
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import run_config
from deepseek_jax.bounds import path, whole
from deepseek_jax.compat import start_compilation_cache
from deepseek_jax.errors import UserError
from deepseek_jax.language_model import OFFLINE, LanguageModel, build, save_pretrained
from deepseek_jax.launch import _options
from deepseek_jax.launch._peer import PeerProcess
from deepseek_jax.serve.offline import complete
from deepseek_jax.serve.sampling import Sampling

EXTRA = {
    "requests": (int, 32, "requests of different lengths", whole(2, 4096)),
    "rows": (int, 32, "requests that run at the same time", whole(1, 4096)),
    "steps": (str, "1,8", "most tokens per row that one program draws, separated by commas"),
    "prompt_tokens": (int, 64, "tokens of the longest prompt", whole(1, 10**6)),
    "new_tokens": (int, 64, "tokens that a request is continued by at most", whole(1, 10**6)),
    "turns": (int, 5, "times that each side is measured", whole(1, 10**6)),
    "seed": (int, 0, "of weights, prompts and lengths", whole(0, 2**31)),
    "peer": (bool, True, "measure transformers on torch as well"),
    "peer_python": (str, sys.executable, "the interpreter that has torch and transformers", path(1)),
}
Run = Callable[["Work"], tuple[float, list[list[int]]]]  # -> CPU seconds, new ids


class Work(NamedTuple):
    """Prompts, and how many tokens each is continued by."""

    prompts: list[list[int]]
    n_new: list[int]


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    options = _options.parse(argv, "tiny_v3", EXTRA, workdir=False)
    start_compilation_cache("")
    model = build(run_config.validate(options.config), options.seed)
    sides: dict[str, Run] = {}
    for n_steps in _numbers(options.steps):
        sides[f"deepseek_jax, {n_steps} per program"] = ours(model, options.rows, n_steps)
    print(f"{model.config.name}: prompts up to {options.prompt_tokens} tokens, up to {options.new_tokens} new ones")
    works = {
        "1 request": work(model, 1, options),
        f"{options.requests} requests": work(model, options.requests, options),
    }
    if not options.peer:
        report(works, sides, options.turns)
        return 0
    with tempfile.TemporaryDirectory() as folder, Peer(model, f"{folder}/weights", options.peer_python) as peer:
        print(f"  {peer.title}")
        sides |= {"transformers, one batch": peer.together, "transformers, one by one": peer.apart}
        report(works, sides, options.turns)
    return 0


def work(model: LanguageModel, n_requests: int, options: Any) -> Work:
    """Random prompts; a single one has all tokens, others half of them or more."""
    draw = np.random.default_rng((options.seed, n_requests))

    def lengths(most: int) -> list[int]:
        return [most] if n_requests == 1 else draw.integers(-(-most // 2), most + 1, n_requests).tolist()

    sizes, n_new = lengths(options.prompt_tokens), lengths(options.new_tokens)
    return Work([draw.integers(0, model.config.model.vocab_size, size).tolist() for size in sizes], n_new)


def ours(model: LanguageModel, n_rows: int, n_steps: int) -> Run:
    """Returns what runs our engine; the first time compiles the programs that these requests need."""
    engine = model.engine(**OFFLINE | {"n_rows": n_rows, "n_steps": n_steps})

    def run(work: Work) -> tuple[float, list[list[int]]]:
        engine.replace_weights(engine.weights)  # so that no prompt is found in the cache
        begin = time.process_time()
        found = complete(engine, work.prompts, [Sampling(n) for n in work.n_new])
        return time.process_time() - begin, [one.ids for one in found]

    return run


def report(works: dict[str, Work], sides: dict[str, Run], n_turns: int) -> None:
    """Measures the sides in turns, and prints medians and how many times the better peer's they are."""
    for title, one in works.items():
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(n_turns + 1):
            texts = {}
            for name, run in sides.items():
                seconds, texts[name] = run(one)
                if turn:  # the first turn warms up
                    rates[name].append(sum(one.n_new) / seconds)
        first, medians = next(iter(texts.values())), {name: statistics.median(found) for name, found in rates.items()}
        peers = [rate for name, rate in medians.items() if name.startswith("transformers")]
        print(f"  {title}")
        for name, rate in medians.items():
            ratio = f", {rate / max(peers):.2f} of the peer" if peers and rate not in peers else ""
            same = sum(a == b for a, b in zip(first, texts[name], strict=True))
            print(f"    {name:<28} {rate:9,.0f} tokens/CPU s{ratio}; {same} of {len(first)} texts as the first line's")


class Peer(PeerProcess):
    """transformers' model with our weights."""

    def __init__(self, model: LanguageModel, folder: str, python: str):
        save_pretrained(model, folder, dtype="fp32")
        super().__init__("_torch_requests.py", {"folder": folder}, python)
        self.title = self.ready["name"]

    def together(self, work: Work) -> tuple[float, list[list[int]]]:
        """Continues all prompts in one batch."""
        return self._run(work, len(work.prompts))

    def apart(self, work: Work) -> tuple[float, list[list[int]]]:
        """Continues one prompt after the other."""
        return self._run(work, 1)

    def _run(self, work: Work, batch: int) -> tuple[float, list[list[int]]]:
        import json

        answer = self.ask(json.dumps({**work._asdict(), "batch": batch}))
        return answer["cpu_seconds"], answer["ids"]


def _numbers(text: str) -> Sequence[int]:
    numbers = [int(one) for one in text.split(",") if one.isdecimal()]
    if not numbers or len(numbers) != len(text.split(",")) or min(numbers) < 1:
        raise UserError(f"--steps={text}: expected numbers of steps separated by commas, such as 1,8.")
    return numbers
