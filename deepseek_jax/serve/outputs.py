"""What the programs of a step give, as outputs of requests: tokens and log-probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.serve import batches
from deepseek_jax.serve.batches import Plans
from deepseek_jax.serve.sampler import Scores
from deepseek_jax.serve.scheduler import Request


class Logprob(NamedTuple):
    """The log-probability of a token under the model's own distribution, and the likeliest tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]]  # descending


class Output(NamedTuple):
    """New tokens of a request. `ending` is "" while it runs, "stop" after a stop id, "length" at its last position."""

    request: Request
    ids: list[int]
    ending: str
    logprobs: Sequence[Logprob] = ()  # of `ids`, if the request asked for them
    # of the prompt, None for its first token; with the first output, if the request asked for them
    prompt_logprobs: Sequence[Logprob | None] = ()
    # with the last output, if the engine notes them: the experts that each token but the last chose, layer by layer,
    # [tokens, layers with experts, experts per token], int16
    routes: np.ndarray | None = None


class Drawn(NamedTuple):
    """What a step draws for a request: a row of arrays that may not be computed yet, with `n` tokens at most."""

    request: Request
    row: int
    n: int
    id_BT: jax.Array
    scores_BT: Scores | None


class Recited(NamedTuple):
    """Log-probabilities of a part of a prompt: of the `n` tokens after position `start`."""

    request: Request
    row: int
    start: int
    n: int
    scores_BT: Scores


def all_recited(plans: Plans, scores_BT: Scores) -> list[Recited]:
    """The log-probabilities of prompts that these parts are to report; `scores_BT` has a row per device."""
    found = [(row, part) for row, plan in enumerate(plans) for part in plan if batches.recites(part)]
    ends = [min(part.n_tokens, len(part.request.prompt) - 1 - part.start) for _, part in found]
    return [Recited(part.request, row, part.start, n, scores_BT) for (row, part), n in zip(found, ends, strict=True)]


def all_drawn(plans: Plans, n_rows: int, id_BT: jax.Array, scores_BT: Scores | None) -> list[Drawn]:
    """What these parts draw, where each device has `n_rows` rows."""
    return [
        Drawn(part.request, rank * n_rows + row, part.n_draws, id_BT, scores_BT)
        for rank, plan in enumerate(plans)
        for row, part in enumerate(plan)
        if part.n_draws
    ]


def logprobs_at(scores_BT: Scores, row: int, places: np.ndarray, n_top: int) -> list[Logprob]:
    """Of a row's tokens at some places, with the `n_top` likeliest."""
    logprob_T, top_TK, ids_TK = (np.asarray(array)[row, places].tolist() for array in scores_BT)
    tops = [list(zip(*both, strict=True))[:n_top] for both in zip(ids_TK, top_TK, strict=True)]
    return [Logprob(*one) for one in zip(logprob_T, tops, strict=True)]
