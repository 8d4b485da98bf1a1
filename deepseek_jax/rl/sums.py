"""The built-in task: the last digit of the sum of some digits; and the text that a base model reads about it.

    479305  ->  8                                        4 + 7 + 9 + 3 + 0 + 5 = 28
    thought of stride 1    1410338, behind a 1: the last digit of the total after each digit
    thought of stride 2    2128, behind a 2: the same after every second digit

A step of stride 1 adds two digits (100 facts), one of stride 2 three (1,000), an answer without a thought all of them.
So longer thoughts are what makes answers right, though nothing says so. In the text most answers have no thought, and
some totals are wrong; a thought continues from a wrong total.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from deepseek_jax.data.noise import noise
from deepseek_jax.errors import UserError

if TYPE_CHECKING:
    from deepseek_jax.rl.problems import Problems

DIGITS, MOST_DIGITS = 6, 18
STYLES = {0: 0.66, 2: 0.17, 1: 0.17}  # share of each stride in the text; 0: no thought
MISTAKES = 0.02  # share of the totals that are wrong
WORKED = {1: 1.0}  # styles of a cold start: every answer has a thought with all totals
DRAW, STYLE, SLIP, SLIP_BY = range(4)  # the last key of random numbers


def level(text: str) -> int:
    """Returns the number of digits that `sums:TEXT` names; 6 for "". Raises UserError unless it is even and small."""
    if not text:
        return DIGITS
    if not text.isascii() or not text.isdigit() or int(text) % 2 or not 2 <= int(text) <= MOST_DIGITS:
        raise UserError(f"sums:{text}: expected an even number of digits from 2 to {MOST_DIGITS}, such as sums:6.")
    return int(text)


def problem(number: int, n_digits: int) -> tuple[tuple[dict, ...], str, str]:
    """Returns (messages, answer, kind) of problem `number`."""
    digits = noise(number, DRAW, at=np.arange(n_digits)) % np.uint64(10)
    question = {"role": "user", "content": "".join(map(str, digits))}
    return (question,), str(int(digits.sum()) % 10), "exact"


def written(question: str, number: int, styles: dict[int, float] | None = None, mistakes: float = MISTAKES) -> dict:
    """Returns an answer to a question as the text has it: an assistant's message; `number` decides style and slips."""
    styles = styles or STYLES
    digits = np.array([int(digit) for digit in question])
    place = np.searchsorted(np.cumsum(list(styles.values())), uniform(number, STYLE, 1)[0])
    stride = list(styles)[min(int(place), len(styles) - 1)]
    groups = digits.reshape(-1, stride or len(digits)).sum(1)
    steps = [int(step) for step in groups] + [0] * bool(stride)  # after a thought the answer repeats the last total
    slips = uniform(number, SLIP, len(steps)) < mistakes
    by = 1 + noise(number, SLIP_BY, at=np.arange(len(steps))) % np.uint64(9)
    totals = [0]
    for step, slip, amount in zip(steps, slips, by, strict=True):
        totals.append((totals[-1] + step + (int(amount) if slip else 0)) % 10)
    answer = {"role": "assistant", "content": str(totals[-1])}
    if stride:
        answer["reasoning_content"] = f"{stride}{''.join(map(str, totals[1:-1]))}"
    return answer


def uniform(number: int, purpose: int, count: int) -> np.ndarray:
    """Returns `count` float64 in [0, 1)."""
    return noise(number, purpose, at=np.arange(count)) / 2.0**64


def rows(
    questions: Iterable[str], styles: dict[int, float] | None = None, mistakes: float = MISTAKES
) -> Iterator[dict]:
    """Yields conversations of questions with answers as the text has them: what a base model reads."""
    for number, question in enumerate(questions):
        messages = [{"role": "user", "content": question}, written(question, number, styles, mistakes)]
        yield {"messages": messages, "thinking": False}


def worked(problems: "Problems", count: int) -> Iterator[dict]:
    """Yields conversations in which the first `count` training problems are thought through without a mistake."""
    questions = (problems.training(number).messages[0]["content"] for number in itertools.count())
    return rows(itertools.islice(questions, count), WORKED, mistakes=0.0)
