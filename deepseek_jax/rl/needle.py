"""The built-in task of long contexts: a needle in a haystack.

    river stone … The code of lemon is 4071. … garden cloud         so many characters of words, and one sentence
    What is the code of lemon?                           ->  4071

The sentence stands anywhere, or with `needle:1000@50` at half of the length. It is the pressure test by which V3's
report judges a context of 128K (section 4.3, figure 8).
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deepseek_jax.data.noise import noise
from deepseek_jax.errors import UserError

if TYPE_CHECKING:
    from deepseek_jax.rl.problems import Problems

LENGTH, LEAST, MOST = 200, 64, 4_000_000
OPTION = re.compile(r"(\d{1,7})?(?:@(\d{1,3}))?", re.ASCII)
N_DIGITS = 4
NAMES = ("lemon", "apple", "cherry", "olive", "peach", "melon", "grape", "plum", "fig", "date", "quince", "almond")
WORDS: tuple[str, ...] = (
    "river",
    "stone",
    "garden",
    "cloud",
    "winter",
    "silver",
    "window",
    "paper",
    "island",
    "candle",
    "forest",
    "bridge",
    "letter",
    "market",
    "summer",
    "mirror",
    "harbor",
    "meadow",
    "copper",
    "feather",
    "lantern",
    "valley",
)
NAME, DIGITS, DEPTH, WORD = range(4)  # the last key of random numbers


class Level(NamedTuple):
    """Which haystack."""

    length: int  # characters
    depth: int | None  # of the needle, in percent of the length; None: anywhere


def level(text: str) -> Level:
    """Returns what `needle:TEXT` names: a length, 200 by default, and a depth. Raises UserError for anything else."""
    found = OPTION.fullmatch(text)
    length = int((found and found[1]) or LENGTH)
    depth = int(found[2]) if found and found[2] else None
    if not found or not LEAST <= length <= MOST or (depth or 0) > 100:
        raise UserError(
            f"needle:{text}: expected a length of {LEAST:,} to {MOST:,} characters, such as needle:1000, or with the "
            "needle's depth in percent, needle:1000@50."
        )
    return Level(length, depth)


def problem(number: int, level: Level) -> tuple[tuple[dict, ...], str, str]:
    """Returns (messages, answer, kind) of problem `number`."""
    name = NAMES[int(noise(number, NAME, at=np.array([0]))[0] % np.uint64(len(NAMES)))]
    code = "".join(map(str, noise(number, DIGITS, at=np.arange(N_DIGITS)) % np.uint64(10)))
    needle = f"The code of {name} is {code}."
    words = _words(number, level.length - len(needle))
    drawn = int(noise(number, DEPTH, at=np.array([0]))[0] % np.uint64(len(words) + 1))
    place = drawn if level.depth is None else round(len(words) * level.depth / 100)
    haystack = " ".join([*words[:place], needle, *words[place:]])
    return ({"role": "user", "content": f"{haystack}\nWhat is the code of {name}?"},), code, "exact"


def _words(number: int, length: int) -> list[str]:
    """Returns as many words as fit into so many characters, each with a space."""
    most = length // (1 + min(map(len, WORDS)))
    drawn = [WORDS[n] for n in (noise(number, WORD, at=np.arange(most)) % np.uint64(len(WORDS))).tolist()]
    ends = np.cumsum([1 + len(word) for word in drawn])
    return drawn[: int(np.searchsorted(ends, length, side="right"))]


def worked(problems: "Problems", count: int) -> Iterator[dict]:
    """Yields conversations: the first `count` training problems with their answers, without thoughts."""
    for number in range(count):
        problem = problems.training(number)
        yield {"messages": [*problem.messages, {"role": "assistant", "content": problem.answer}], "thinking": False}
