r"""Whether an answer is right, by kinds of problems: `verify(answer of the problem, content of the response)`.

    exact           the same text, but for blanks around it
    number          the last number, in the last \boxed{…} if there is one, is equal: 1,234, 0.5, 1/2, 2e3
    math            math-verify finds the last \boxed{…} equal: formulas, sets, intervals, …
    reasoning_gym   the task's own function gives full marks
    code            a program in the last ```python block passes all tests: [{"input": "…", "output": "…"}, …]

Each returns 1.0, 0.0, or None if nothing can be said, for example since the problem's own answer cannot be read. Only
what follows the thought is looked at. Those in `SLOW` may take long or never return: `processes` runs them.
"""

import functools
import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from deepseek_jax.rl.boxed import BOXED, boxed
from deepseek_jax.rl.rewards import sandbox

Verifier = Callable[[Any, str], float | None]

NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?(?:/[0-9]+)?(?![\w/])"
)
LONGEST_NUMBER = 100  # characters; a longer one would take long to compute with
OPENING, CLOSING = re.compile(r"```(?:python|py|python3)[ \t]*"), re.compile(r"```[ \t]*")  # lines around a program
PROGRAM_S = 10.0  # on the clock, for a program in each test
LONGEST_FORMULA = 1000  # characters that math-verify is given
COMPUTED = re.compile(r"[+*!^=]|[\w)}]\s*-|\\(?:cdot|times|div|sum|prod|int|binom|neq?|leq?|geq?)\b")


def exact(answer: Any, content: str) -> float:
    """Returns 1 if a response is the answer, blanks around it aside."""
    return float(content.strip() == str(answer).strip())


def number(answer: Any, content: str) -> float | None:
    """Returns 1 if the last number of a response equals that of the answer; None if the answer is not one number."""
    expected = numbers(str(answer))
    if len(expected) != 1 or expected[0] is None:
        return None
    return float(last_number(content) == expected[0])


def last_number(content: str) -> Fraction | None:
    """Returns the number that a response ends with, or that of its last box; None if there is none."""
    boxes = boxed(content)
    if not boxes and BOXED in content:
        return None  # of a box that never ends
    found = numbers(boxes[-1] if boxes else content)
    if not found or (boxes and len(found) != 1):
        return None
    return found[-1]


def numbers(text: str) -> list[Fraction | None]:
    """Returns the numbers in a text, exactly; None in place of one that is too long or divided by zero."""
    return [value_of(spelled) for spelled in NUMBER.findall(text.replace("−", "-"))]


def value_of(spelled: str) -> Fraction | None:
    """Returns the value of a number as `NUMBER` matches it."""
    if len(spelled) > LONGEST_NUMBER:
        return None
    above, _, below = spelled.replace(",", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / (int(below) if below else 1)


def math(answer: Any, content: str) -> float | None:
    r"""Returns 1 if math-verify finds the last \boxed{…} equal to the answer; None if it cannot read the answer.

    Where the answer is a number, one that is still to be computed (3 \cdot 7, which may be copied from the question) is
    not an answer.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit: there is ours
    read = functools.partial(math_verify.parse, parsing_timeout=None)
    expected = [found for found in read(f"${answer}$") or read(str(answer)) if not isinstance(found, str)]
    if not expected:  # what it cannot read it returns as text, or not at all
        return None
    boxes = boxed(content)
    if not boxes or len(boxes[-1]) > LONGEST_FORMULA or (NUMBER.fullmatch(str(answer)) and COMPUTED.search(boxes[-1])):
        return 0.0
    found = read(f"{BOXED}{boxes[-1]}}}")
    return float(bool(found) and math_verify.verify(expected, found, timeout_seconds=None))


def reasoning_gym(answer: Any, content: str) -> float:
    """Returns 1 if the task of reasoning-gym gives full marks: what it gives for parts needs no solution."""
    return float(scorer_of(answer["task"])(content.strip(), answer["entry"]) >= 1.0)


@functools.lru_cache
def scorer_of(task: str) -> Callable[[str, dict], float]:
    """Returns the function by which a task of reasoning-gym scores an answer."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, seed=0, size=1).score_answer


def code(answer: Any, content: str, seconds: float = PROGRAM_S) -> float | None:
    """Returns 1 if the program of a response passes all tests; None if one could not be run.

    A program that takes more than `seconds` in a test fails it.
    """
    found = programs(content)
    if not found:
        return 0.0
    return passes(found[-1], answer, seconds)


def programs(content: str) -> list[str]:
    """Returns the programs in a response: lines between ```python and ```; one that is not closed is left out."""
    found: list[str] = []
    program: list[str] | None = None
    for line in content.split("\n"):
        if program is None:
            program = [] if OPENING.fullmatch(line) else None
        elif CLOSING.fullmatch(line):
            found.append("".join(f"{one}\n" for one in program))
            program = None
        else:
            program.append(line)
    return found


def passes(program: str, tests: Sequence[dict], seconds: float) -> float | None:
    """Returns 1 if a program writes the output of every test, blanks at ends of lines aside; at least one test."""
    if not tests:
        return None
    for test in tests:
        ran = sandbox.run(program, test["input"], sandbox.Limits(seconds))
        if ran.ending == sandbox.NOT_STARTED:
            return None
        if ran.ending != sandbox.FINISHED or lines(ran.output) != lines(test["output"]):
            return 0.0
    return 1.0


def lines(text: str) -> list[str]:
    """Returns the lines of an output without blanks at their ends and empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def said(kind: str, content: str) -> str | None:
    """Returns the part of a response that the verifier of a kind compares; None if it has none."""
    if kind == "number":
        return None if (value := last_number(content)) is None else str(value)
    if kind == "math":
        parts = boxed(content)
        return parts[-1] if parts else None
    return content.strip() or None


def alike(kind: str, contents: Sequence[str]) -> list[int | None]:
    """Returns a number for each response: the same for those that are equal to the verifier; None without an answer.

    The kind is one of `COMPARED`. Formulas are equal if math-verify takes one for the other, other answers if their
    texts are.
    """
    firsts: list[str] = []  # an answer of each group
    group_of: dict[str | None, int | None] = {None: None}
    for text in (texts := [said(kind, content) for content in contents]):
        if text is None or text in group_of:
            continue
        same = (n for n, first in enumerate(firsts) if kind == "math" and math(first, f"{BOXED}{text}}}") == 1.0)
        group_of[text] = next(same, len(firsts))
        if group_of[text] == len(firsts):
            firsts.append(text)
    return [group_of[text] for text in texts]


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "number": number,
    "math": math,
    "reasoning_gym": reasoning_gym,
    "code": code,
}
NEEDED = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}  # packages, by kind
COMPARED = ("exact", "number", "math")  # kinds whose right answers are all equal
SLOW = ("math", "reasoning_gym", "code")
