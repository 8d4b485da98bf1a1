"""The parts of a prompt, text and special tokens of a template: as one string, and as ids."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.messages import Call
from deepseek_jax.data.tokenizer import MarkEncoder
from deepseek_jax.errors import UserError

Pieces = list[Part | str]  # a bare string is text


class Spaces(NamedTuple):
    """Blanks and line breaks that belong to the format of an answer, not to its thought or content."""

    before_thought: str = ""  # after the special token that opens it
    after_thought: str = ""
    before_content: str = ""  # after a thought
    before_answer: str = ""  # without a thought
    after_content: str = ""


NO_SPACES = Spaces()


class CallFormat(NamedTuple):
    """How a call is written between its two special tokens.

    `begun(text)` returns the call that the text begins, with its arguments as far as they go; None before its name has
    ended. After the arguments the whole call has `after_arguments`.
    """

    begun: Callable[[str], Call | None]
    after_arguments: str = ""

    def read(self, text: str) -> Call | None:
        """Returns the call; None if the text is not whole."""
        call = self.begun(text)
        if call is None or not call.arguments.endswith(self.after_arguments):
            return None
        return call._replace(arguments=call.arguments.removesuffix(self.after_arguments))


def join(pieces: Pieces) -> list[Part]:
    """Returns pieces as parts: adjacent texts are joined, as a tokenizer must see them; empty ones are dropped."""
    parts: list[Part] = []
    for piece in pieces:
        part = piece if isinstance(piece, Part) else Part(piece, False)
        if part.text and not part.is_mark and parts and not parts[-1].is_mark:
            parts[-1] = Part(parts[-1].text + part.text, False)
        elif part.text:
            parts.append(part)
    return parts


def spell(parts: Iterable[Part]) -> str:
    """Returns parts as one string."""
    return "".join(part.text for part in parts)


def to_ids(parts: Iterable[Part], tokenizer: MarkEncoder) -> np.ndarray:
    """Returns int32 ids: a special token as its id, text as text, whatever it spells.

    Raises UserError if the tokenizer does not have a special token.
    """
    ids = [np.zeros(0, np.int32)]
    for text, is_mark in parts:
        ids.append(tokenizer.encode(text, specials=is_mark))
        if is_mark and len(ids[-1]) != 1:
            raise UserError(
                f"the tokenizer has no special token {text}, which the chat template needs. "
                "Use the template and the tokenizer of the same model."
            )
    return np.concatenate(ids)


def fim_parts(prefix: str, suffix: str) -> list[Part]:
    """Returns a base model's prompt to fill in the middle, ended by EOS; for Coder, Coder-V2-Lite, V2.5 and V3."""
    return join([marks.BOS, marks.FIM_BEGIN, prefix, marks.FIM_HOLE, suffix, marks.FIM_END])


def marked(text: str, *found: Part) -> Pieces:
    """Returns a template's own text with the given special tokens, which are spelled out in it, as such."""
    by_text = {mark.text: mark for mark in found}
    return [by_text.get(piece, piece) for piece in re.split(f"({'|'.join(map(re.escape, by_text))})", text)]


def overlap(text: str, start: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `start`."""
    longest = min(len(start), len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(start[:n])), 0)


def before(mark: Part, text: str) -> str:
    """Returns the text before the first occurrence of a special token."""
    return text.partition(mark.text)[0]
