"""One of the answers to a request, from the engine's outputs to what its client receives, whole or in steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.answers import Usage
from deepseek_jax.serve.grammar import Constrained
from deepseek_jax.serve.outputs import Logprob, Output
from deepseek_jax.serve.reply import Piece, Reply
from deepseek_jax.serve.sampling import Sampling

LEAST = -9999.0  # in place of minus infinity, which JSON does not have


class Logged(NamedTuple):
    """A token of a prompt or answer, for clients that ask for ids or log-probabilities."""

    token: int
    logprob: Logprob | None
    is_thought: bool


@dataclass
class Choice:
    """An answer, as far as it is.

    `echo` is the text of the prompt, if the answer begins with it; `is_empty` leaves out the one token that the engine
    draws at least; `shows_ids` and `sampling.logprobs` add the tokens to what the client receives.
    """

    index: int
    prompt: list[int]
    sampling: Sampling
    reply: Reply
    usage: Usage = field(default_factory=Usage)
    echo: str = ""
    is_empty: bool = False
    shows_ids: bool = False
    reason: str = ""
    logged: list[Logged] = field(default_factory=list)
    n_told: int = 0  # of `logged`, those that the client has
    n_characters: int = 0  # of the tokens that the client has

    def push(self, output: Output) -> list[Piece]:
        """Adds what the engine gave; `reason` is set by the last of it."""
        for token, logprob in zip(self.prompt, output.prompt_logprobs, strict=False):
            self.logged.append(Logged(token, logprob, False))
        pieces: list[Piece] = []
        for place, token in enumerate(() if self.is_empty else output.ids):
            if self.reply.has_stopped:
                break
            is_thought = self.reply.is_in_thought
            self.usage.completion += 1
            self.usage.reasoning += is_thought
            logprob = output.logprobs[place] if output.logprobs else None
            self.logged.append(Logged(token, logprob, is_thought))
            pieces += self.reply.push([] if token in self.sampling.stop_ids else [token])
        if output.ending:
            pieces += self.reply.finish()
        if output.ending or self.reply.has_stopped:
            is_call = "tool_calls" in self.reply.message() and output.ending == "stop"
            form = self.sampling.constraint
            is_broken_off = output.ending == "length" or (isinstance(form, Constrained) and form.has_failed)
            is_cut = is_broken_off and not self.reply.has_stopped
            self.reason = "length" if is_cut else "tool_calls" if is_call else "stop"
        return answers.joined(pieces)

    @property
    def new_ids(self) -> list[int]:
        """The ids after the prompt."""
        return [one.token for one in self.logged[len(self.logged) - self.usage.completion :]]

    def told(self, is_chat: bool, spell: Callable[[int], str]) -> dict[str, Any]:
        """Returns log-probabilities and ids of the tokens that the client does not have yet, if it asked for them."""
        new, self.n_told = self.logged[self.n_told :], len(self.logged)
        found: dict[str, Any] = {"token_ids": [one.token for one in new]} if self.shows_ids else {}
        if self.sampling.logprobs is not None:
            found["logprobs"] = _of_message(new, spell) if is_chat else self._of_text(new, spell)
        return found

    def _of_text(self, logged: Sequence[Logged], spell: Callable[[int], str]) -> dict[str, Any]:
        """Log-probabilities as text completions have them: lists side by side, null for a token without any."""
        tokens, offsets = [spell(one.token) for one in logged], []
        for token in tokens:
            offsets.append(self.n_characters)
            self.n_characters += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob and _finite(one.logprob.logprob) for one in logged],
            "top_logprobs": [one.logprob and _by_text(one, spell) for one in logged],
            "text_offset": offsets,
        }


def _of_message(logged: Sequence[Logged], spell: Callable[[int], str]) -> dict[str, Any]:
    """Log-probabilities as chat completions have them: one object per token, thought and content apart."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = spell(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}

    found: dict[str, Any] = {"content": []}
    for token, logprob, is_thought in logged:
        if logprob:
            top = {"top_logprobs": [entry(*one) for one in logprob.top]}
            place = found.setdefault("reasoning_content", []) if is_thought else found["content"]
            place.append(entry(token, logprob.logprob) | top)
    return found


def _by_text(one: Logged, spell: Callable[[int], str]) -> dict[str, float]:
    """The token and the likeliest ones by their text; by their number where another one has the same text."""
    assert one.logprob
    found: dict[str, float] = {}
    for token, logprob in dict([*one.logprob.top, (one.token, one.logprob.logprob)]).items():
        text = spell(token)
        found[f"token_id:{token}" if text in found or "\ufffd" in text else text] = _finite(logprob)
    return found


def _finite(logprob: float) -> float:
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST
