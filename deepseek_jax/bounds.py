"""What values a number, a word or a path may have: one `Bound` for each, declared in tables beside what they bound.

    "optimizer.beta2": number(0, 1, below=True),      "loop.eval_batches": whole(1, STEPS),

`run_bounds.py` has the keys of a run, `models/checks.py` those of its model, a verb its own flags.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_jax.errors import UserError

LARGEST = 2**24  # of a width, a vocabulary, a batch
MOST_LAYERS = 2000
MOST_POSITIONS = 2**40  # of a sequence
STEPS = 2_000_000_000  # of a schedule; a step is counted in int32
SHOWN = 80  # characters of a wrong value that a message repeats
PATH_BYTES, NAME_BYTES = 4095, 255  # what file systems take of a path, and of a name in it


@dataclass(frozen=True)
class Bound:
    """The values that something may have."""

    expected: str  # these values as text, as in "expected a whole number from 0 to 9"
    holds: Callable[[Any], bool]  # whether a value is one of them; takes a value of any type

    def check(self, name: str, value: Any, like: Any = None) -> Any:
        """Returns `value`; raises UserError for a wrong one, with `like` as an example of a right one."""
        if self.holds(value):
            return value
        example = "" if like is None or not self.holds(like) else f", like {like!r}"
        raise UserError(f"{name}={shown(value)}: expected {self.expected}{example}.")


def whole(least: int, most: int) -> Bound:
    """Integers from `least` to `most`."""
    expected = f"a whole number from {_written(least)} to {_written(most)}"
    return Bound(expected, lambda value: type(value) is int and least <= value <= most)


def number(least: float, most: float, *, above: bool = False, below: bool = False) -> Bound:
    """Finite numbers from `least` to `most`; `above` leaves out `least` itself, `below` leaves out `most`."""

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not least <= value <= most:  # NaN fails every comparison
            return False
        return math.isfinite(value) and not (above and value == least) and not (below and value == most)

    low, high = f"{'above' if above else 'from'} {least:g}", f"{'below' if below else 'to'} {most:g}"
    return Bound(f"a number {low} {'and ' if below else ''}{high}", holds)


def one_of(*words: str) -> Bound:
    """One of some words."""
    return Bound(f"one of {', '.join(word or repr(word) for word in words)}", lambda value: value in words)


def switch() -> Bound:
    """True or False."""
    return Bound("True or False", lambda value: type(value) is bool)


def text(least: int = 0, most: int = 1000) -> Bound:
    """Text of `least` to `most` characters, without the character NUL."""
    expected = f"text of {least} to {most:,} characters"
    return Bound(expected, lambda value: isinstance(value, str) and least <= len(value) <= most and "\0" not in value)


def path(least: int = 0) -> Bound:
    """What can name a file; "" too if `least` is 0."""

    def holds(value: Any) -> bool:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not text(least, PATH_BYTES).holds(value):
            return False
        try:
            raw = os.fsencode(Path(value).expanduser())
        except (RuntimeError, UnicodeError):  # the home of a user who does not exist; half a character
            return False
        return len(raw) <= PATH_BYTES and all(len(part) <= NAME_BYTES for part in raw.split(b"/"))

    return Bound(f"a path{', not empty' if least else ''}, with names of {NAME_BYTES} bytes at most", holds)


def name() -> Bound:
    """What can name a file within a folder."""
    return Bound("a name without slashes", lambda value: path(1).holds(value) and not {*"/\\"} & {*value})


def optional(bound: Bound) -> Bound:
    """None, or what `bound` says."""
    return Bound(f"None or {bound.expected}", lambda value: value is None or bound.holds(value))


def besides(bound: Bound, value: int) -> Bound:
    """A number with a meaning of its own, like 0 for "not given", or what `bound` says."""
    return Bound(
        f"{bound.expected}, or {value}",
        lambda given: bound.holds(given) or (type(given) in (int, float) and given == value),
    )


def several(bound: Bound) -> Bound:
    """A tuple or list of what `bound` says."""
    return Bound(
        f"a tuple, each {bound.expected}",
        lambda value: isinstance(value, (tuple, list)) and all(map(bound.holds, value)),
    )


def shown(value: Any) -> str:
    """A wrong value in one line of a message, of whatever type and size."""
    try:
        words = repr(value)
    except Exception as error:  # an integer of more digits than Python writes, or what a user's own class raises
        words = f"<{type(value).__name__}: {type(error).__name__}>"
    return in_line(words)


def in_line(words: str) -> str:
    """Words of the user's, or of an error, as one line that is not too long."""
    words = " ".join(words.split())
    return words if len(words) <= SHOWN else f"{words[: SHOWN - 1]}…"


def article(noun: str) -> str:
    """A noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _written(value: int) -> str:
    """An integer as one would write it: 2^64 - 1 rather than 20 digits."""
    power = (value + 1).bit_length() - 1
    if value >= 2**24 and value + 1 == 1 << power:
        return f"2^{power} - 1"
    return f"2^{value.bit_length() - 1}" if value >= 2**24 and value & (value - 1) == 0 else f"{value:,}"


SEED = whole(0, 2**64 - 1)
