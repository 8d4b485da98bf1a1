"""How a request draws and when it ends; many of them as the arrays that a program takes.

A program has no parts that none of its rows needs: the likeliest token is taken without noise, and only requests with
filters, penalties or biases look for the tokens that they have.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from deepseek_jax import seeds
from deepseek_jax.bounds import SEED, Bound, number, optional, whole
from deepseek_jax.errors import UserError

MOST_TOP = 20  # likeliest tokens that can be reported with each token
MOST_BIASES = 300  # biases of a request
MOST_IDS = 2**24  # of a vocabulary
N_STOPS = 8  # stop ids of a row that the device knows; the host knows all

DRAWING = dict.fromkeys(("temperature_B", "top_p_B"), np.float32)
SHAPING = {**DRAWING, "top_k_B": np.int32}
SHAPING |= dict.fromkeys(("min_p_B", "presence_B", "frequency_B", "repetition_B"), np.float32)

Kind = Literal["greedy", "random", "shaped"]  # what a program of the drawing has: see `kind`

BOUNDS: dict[str, Bound] = {
    "max_new_tokens": whole(1, 2**31 - 1),
    "temperature": number(0, 1e6),
    "top_p": number(0, 1),
    "top_k": whole(0, MOST_IDS),
    "min_p": number(0, 1),
    "presence_penalty": number(-1e6, 1e6),
    "frequency_penalty": number(-1e6, 1e6),
    "repetition_penalty": number(0, 1e6, above=True),
    "seed": SEED,
    "logprobs": optional(whole(0, MOST_TOP)),
}


class Constraint(Protocol):
    """Which tokens a request may draw next, as the tokens before them decide; its state is of one request alone.

    The engine waits for a token before it plans the next one, which costs such a request one step of latency.
    """

    def allowed(self) -> np.ndarray | None:
        """Returns uint32 words: bit v % 32 of word v // 32 allows token v, at least one does. None allows all."""

    def push(self, token: int) -> None:
        """Takes the next token."""


@dataclass(frozen=True)
class Sampling:
    """How a request draws, and when it ends; see `sampler` for the formulas."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draws from the fewest likeliest tokens whose probabilities add up to it
    top_k: int = 0  # draws from so many likeliest tokens; 0: from all
    min_p: float = 0.0  # draws from tokens at least so likely, where the likeliest counts as 1
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that were drawn before
    frequency_penalty: float = 0.0  # subtracted as often as a token was drawn before
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or answer, multiplies negative ones
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by id
    seed: int = 0
    stop_ids: Sequence[int] = ()  # ids that end it; they are part of the output
    salt: bytes = b""  # requests with other salts share no pages
    constraint: Constraint | None = None  # None draws from the whole vocabulary
    logprobs: int | None = None  # reports log-probabilities: of each new token, and of so many likeliest ones
    prompt_logprobs: bool = False  # reports as many for the tokens of the prompt, all of which are computed then

    def check(self, vocab_size: int) -> None:
        """Raises UserError for a value out of range."""
        for name, bound in BOUNDS.items():
            bound.check(name, getattr(self, name))
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise UserError(f"logprobs={self.logprobs}: expected {vocab_size} or less, the size of the vocabulary.")
        if self.prompt_logprobs and self.logprobs is None:
            raise UserError("prompt_logprobs without logprobs: expected logprobs, 0 or more.")
        if len(self.logit_bias) > MOST_BIASES:
            raise UserError(f"logit_bias of {len(self.logit_bias)} tokens: expected {MOST_BIASES} or fewer.")
        for token, bias in self.logit_bias.items():
            whole(0, vocab_size - 1).check("an id of logit_bias", token)
            number(-1e6, 1e6).check(f"logit_bias of {token}", bias)

    @functools.cached_property
    def key_data(self) -> np.ndarray:
        """The raw data of the random key."""
        return seeds.key_data(self.seed)

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """What a row of `arguments` is made of."""
        ids, biases = np.zeros(MOST_BIASES, np.int32), np.zeros(MOST_BIASES, np.float32)
        ids[: len(self.logit_bias)] = list(self.logit_bias)
        biases[: len(self.logit_bias)] = list(self.logit_bias.values())
        return {
            "key_BK": self.key_data,
            "temperature_B": self.temperature,
            "top_p_B": self.top_p,
            "top_k_B": self.top_k or MOST_IDS,
            "min_p_B": self.min_p,
            "presence_B": self.presence_penalty,
            "frequency_B": self.frequency_penalty,
            "repetition_B": self.repetition_penalty,
            "bias_ids_BJ": ids,
            "bias_BJ": biases,
        }

    @functools.cached_property
    def kind(self) -> Kind:
        """What its draws need."""
        filters = self.top_k, self.min_p, self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        if any(filters) or self.logit_bias:
            return "shaped"
        return "random" if self.temperature > 0 else "greedy"

    @property
    def n_top(self) -> int:
        """The number of likeliest tokens that its program reports; -1 if it reports no log-probabilities."""
        return -1 if self.logprobs is None else MOST_TOP if self.logprobs else 0


def kind(samplings: Sequence[Sampling]) -> Kind:
    """Returns what a program needs that draws for all of these rows."""
    kinds = {sampling.kind for sampling in samplings}
    return "shaped" if "shaped" in kinds else "random" if "random" in kinds else "greedy"


def arguments(samplings: Sequence[Sampling], n_rows: int, kind: Kind) -> dict[str, np.ndarray]:
    """Returns how each row draws, padded to `n_rows`: nothing for greedy rows, and the last seven if some are shaped.

    key_BK, temperature_B, top_p_B; top_k_B, min_p_B, presence_B, frequency_B, repetition_B, bias_ids_BJ, bias_BJ.
    """
    if kind == "greedy":
        return {}
    rows = [*samplings, *[PADDING] * (n_rows - len(samplings))]
    numbers, arrays = (DRAWING, ("key_BK",)) if kind == "random" else (SHAPING, ("key_BK", "bias_ids_BJ", "bias_BJ"))
    found = {name: np.array([row.values[name] for row in rows], dtype) for name, dtype in numbers.items()}
    return found | {name: np.stack([row.values[name] for row in rows]) for name in arrays}


def stops(samplings: Sequence[Sampling], n_rows: int) -> np.ndarray:
    """Returns stop_BJ: the first stop ids of each row, filled up with a number that no token has."""
    stop_BJ = np.full((n_rows, N_STOPS), -1, np.int32)
    for row, sampling in enumerate(samplings):
        ids = list(sampling.stop_ids)[:N_STOPS]
        stop_BJ[row, : len(ids)] = ids
    return stop_BJ


PADDING = Sampling(1)
