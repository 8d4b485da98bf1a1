"""Log-probabilities as clients receive them: one entry per token in chats, parallel lists in text completions.

Of a text, the likeliest tokens are keyed by what they say. Several that say the same, such as parts of a character,
are one entry, that of the likeliest.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.serve.engine import Logprob
from deepseek_jax.serve.text import HALF

Decode = Callable[[int], str]  # what a token says, special ones too


class Scored(NamedTuple):
    """A token of an answer or a prompt. `score` is None for the first token of a prompt, which nothing predicts."""

    token: int
    score: Logprob | None
    is_thought: bool = False


def chat_logprobs(found: Sequence[Scored], decode: Decode) -> dict[str, Any]:
    """The field `logprobs` of a message, or of a step of one: content and thought apart, as DeepSeek's server."""
    parts = ([_entry(one, decode) for one in found if one.is_thought is is_thought] for is_thought in (False, True))
    content, thought = parts
    return {"content": content} | ({"reasoning_content": thought} if thought else {})


def text_logprobs(found: Sequence[Scored], decode: Decode, offset: int = 0) -> dict[str, Any]:
    """The field `logprobs` of a text, or of a step of one that begins at character `offset`."""
    tokens = [decode(one.token) for one in found]
    return {
        "tokens": tokens,
        "token_logprobs": [one.score.logprob if one.score else None for one in found],
        "top_logprobs": [_likeliest(one.score, decode) if one.score else None for one in found],
        "text_offset": [*itertools.accumulate(map(len, tokens[:-1]), initial=offset)] if tokens else [],
    }


def _entry(one: Scored, decode: Decode) -> dict[str, Any]:
    assert one.score
    top = [_token(token, logprob, decode) for token, logprob in one.score.top]
    return _token(one.token, one.score.logprob, decode) | {"top_logprobs": top}


def _token(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    text = decode(token)
    return {"token": text, "logprob": logprob, "bytes": None if HALF in text else list(text.encode())}


def _likeliest(score: Logprob, decode: Decode) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in score.top:
        found.setdefault(decode(token), logprob)
    return found
