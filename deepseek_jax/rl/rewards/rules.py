"""Rewards by rules: pure functions of a problem and a response, quick enough to be computed where they are needed.

    format      1 for one thought and one answer, neither empty nor with marks of a thought inside
    language    share of the thought's words that are in the language of the question (R1 section 2.3.2)
    length      - tokens / tokens allowed: a penalty for every token
    overlong    0 up to 4/5 of the tokens allowed, from there down to -1 (DAPO eq. 13)

Whether an answer is right is the subject of `verifiers`.
"""

import re
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deepseek_jax.rl.problems import Problem

THOUGHT_MARK = re.compile(r"<\s*/?\s*think\s*>", re.IGNORECASE)
# A word is a run of letters of an alphabet, or one Chinese character.
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
LATIN = "A-Za-z\u00c0-\u024f"
WORD = re.compile(rf"[{CHINESE}]|(?:(?![{CHINESE}])[^\W\d_])+")
BUFFER = 0.2  # share of the tokens allowed over which `overlong` falls


class Response(NamedTuple):
    """What a model answered."""

    message: dict  # the assistant's: content, reasoning_content if there is a thought
    n_tokens: int  # drawn, the end mark included
    n_allowed: int  # tokens after which it would have been cut off
    is_finished: bool  # whether it ended with an end mark
    is_opened: bool = True  # whether its thought, if it has one, began with the mark of one

    @property
    def content(self) -> str:
        """What follows the thought."""
        return self.message.get("content") or ""

    @property
    def thought(self) -> str:
        """The thought, "" without one."""
        return self.message.get("reasoning_content") or ""


def has_thought(response: Response) -> bool:
    """Returns whether a response has a thought that is not empty."""
    return bool(visible(response.thought))


def visible(text: str) -> str:
    """Returns a text without the characters that leave no mark: blanks, controls, marks of direction, joiners."""
    return "".join(letter for letter in text if unicodedata.category(letter)[0] not in "ZC")


def format(problem: "Problem", response: Response) -> float:
    """Returns 1 for a finished response of one thought and then an answer."""
    parts = response.thought, response.content
    whole = all(seen and not THOUGHT_MARK.search(seen) for seen in map(visible, parts))
    return float(whole and response.is_finished and response.is_opened)


def language(problem: "Problem", response: Response) -> float:
    """Returns the share of the thought's words in the language of the question; 1 for a thought without words.

    A language is recognised by its script: Latin letters, Chinese characters, others.
    """
    if not has_thought(response):
        return 0.0
    asked = scripts(" ".join(str(message.get("content") or "") for message in problem.messages))
    found = scripts(response.thought)
    if not found or not asked:
        return 1.0
    expected = max(sorted(set(asked)), key=asked.count)
    return found.count(expected) / len(found)


def scripts(text: str) -> list[str]:
    """Returns the script of each word of a text."""
    return [script(word[0]) for word in WORD.findall(text)]


def script(letter: str) -> str:
    """Returns "chinese", "latin" or "other"."""
    if re.match(f"[{CHINESE}]", letter):
        return "chinese"
    return "latin" if re.match(f"[{LATIN}]", letter) else "other"


def length(problem: "Problem", response: Response) -> float:
    """Returns the share of the tokens allowed that were used, as a penalty."""
    return -response.n_tokens / response.n_allowed


def overlong(problem: "Problem", response: Response) -> float:
    """Returns the soft penalty for responses that are nearly, or entirely, as long as allowed; from -1 to 0."""
    if not response.is_finished:
        return -1.0
    used = response.n_tokens / response.n_allowed
    return min(0.0, (1 - BUFFER - used) / BUFFER)  # DAPO eq. 13
