"""An engine run to the end of some prompts, all of them known: ids in; ids, log-probabilities and routes out."""

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.outputs import Logprob, Output
from deepseek_jax.serve.sampling import Sampling
from deepseek_jax.serve.scheduler import Request

OPEN_PER_ROW = 4  # requests that an engine has at a time, where they are many


@dataclass
class Completion:
    """What a prompt was continued with."""

    ids: list[int] = field(default_factory=list)  # the new ids, with the stop id at the end if there was one
    ending: str = ""  # "stop" or "length"
    logprobs: list[Logprob] = field(default_factory=list)  # of the new ids, if asked for
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)  # of the prompt's, if asked for
    routes: np.ndarray | None = None  # see `engine.Output`
    n_cached: int = 0  # tokens of the prompt that the cache had


def complete(engine: Engine, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[Completion]:
    """Runs an engine until it has continued all prompts; one sampling per prompt.

    Raises UserError if the engine has other requests, if a request could never run, or for values out of range: then
    none of them runs.
    """
    if len(prompts) != len(samplings):
        raise UserError(f"{len(prompts)} prompts with {len(samplings)} samplings: expected one per prompt.")
    with _submitted(engine, prompts, samplings) as requests:
        found = {request: Completion() for request in requests}
        while not engine.is_idle:
            for output in engine.step():
                one = found[output.request]
                one.ids += output.ids
                one.logprobs += output.logprobs
                one.prompt_logprobs += output.prompt_logprobs
                one.ending, one.routes, one.n_cached = output.ending, output.routes, output.request.n_cached
    return [found[request] for request in requests]


def stream(engine: Engine, prompt: Sequence[int], sampling: Sampling, n_steps: int = 1) -> Iterator[int]:
    """Yields the new ids of one prompt as they are drawn, `n_steps` at a time; when it is closed, the request ends.

    Raises UserError as `complete` does, at the first id.
    """
    with _submitted(engine, [prompt], [sampling]):
        while not engine.is_idle:
            for output in engine.step(n_steps):
                yield from output.ids


def outputs(engine: Engine, asked: Iterable[tuple[Sequence[int], Sampling]]) -> Iterator[tuple[int, Output]]:
    """Yields what an engine says to each of many prompts, with its number; only a few of them are open at a time.

    The caller may cancel a request; when this is closed, those that are open end. Raises UserError where the engine
    does, or if it has other requests.
    """
    waiting, n_most = enumerate(asked), OPEN_PER_ROW * engine.n_rows * len(engine.ranks)
    numbers: dict[Request, int] = {}
    with _left_idle(engine, numbers):
        while True:
            for number, (prompt, sampling) in itertools.islice(waiting, n_most - len(numbers)):
                numbers[engine.submit(prompt, sampling)] = number
            if engine.is_idle:
                return
            for output in engine.step():
                yield numbers[output.request], output
            for request in [request for request in numbers if request.has_ended]:
                del numbers[request]


@contextlib.contextmanager
def _submitted(
    engine: Engine, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
) -> Iterator[list[Request]]:
    """Requests of an idle engine, which is idle again afterwards."""
    requests: list[Request] = []
    with _left_idle(engine, requests):
        for prompt, sampling in zip(prompts, samplings, strict=True):
            requests.append(engine.submit(prompt, sampling))
        yield requests


@contextlib.contextmanager
def _left_idle(engine: Engine, requests: Collection[Request]) -> Iterator[None]:
    """Ends an idle engine's `requests`, which may grow meanwhile, if what is done with them does not reach its end."""
    if not engine.is_idle:
        raise UserError("the engine has requests already: expected one that is idle. Call its step() until it is.")
    try:
        yield
    except BaseException:
        for request in requests:
            engine.cancel(request)
        while not engine.is_idle:  # steps that were in flight
            engine.step()
        raise
