"""Rewards: what an answer is worth, by named functions with weights.

    total = sum over the names of  weight * reward(problem, response)

    accuracy    whether the answer is right, by the problem's kind (`verifiers`); 0 for one that was cut off
    format, language, length, overlong       see `rules`

A reward is a number, or None if nothing can be said: a verifier that hung or could not read the problem's own answer.
Then the total is None too, and the response is left out of what is learnt, rather than called wrong.
"""

import collections
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from deepseek_jax.errors import UserError
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import rules, sandbox, verifiers
from deepseek_jax.rl.rewards.processes import Failed, Workers
from deepseek_jax.rl.rewards.rules import Response, has_thought
from deepseek_jax.rl.rewards.verifiers import COMPARED, NEEDED, SLOW, VERIFIERS

ACCURACY = "accuracy"
Rule = Callable[[Problem, Response], float | None]
RULES: dict[str, Rule] = {
    "format": rules.format,
    "language": rules.language,
    "length": rules.length,
    "overlong": rules.overlong,
}
NAMES = (ACCURACY, *RULES)
END_S = 5.0  # to end a program that takes too long, and to start the next
NOTHING_TO_SAY = "the problem's own answer cannot be read, or a program cannot be started"


class Score(NamedTuple):
    """What a response is worth."""

    total: float | None
    parts: dict[str, float | None]  # by name, without the weights


class Rewards:
    """Rewards with weights; a context manager, since slow verifiers run in processes of their own.

    Args:
        weights: of each reward, by name; those of weight 0 are reported only.
        n_processes: for slow verifiers.
        seconds: that one of these may take; a program of kind code fails a test in which it takes longer.

    `failures` counts why answers could not be scored.
    """

    def __init__(self, weights: Mapping[str, float], n_processes: int = 2, seconds: float = 10.0):
        if unknown := sorted(weights.keys() - set(NAMES)):
            raise UserError(f"rl.rewards.{unknown[0]}: no reward has this name. Choose among {', '.join(NAMES)}.")
        if not any(weights.values()):
            raise UserError(
                "rl.rewards: every weight is 0, so nothing would be learnt. Set rl.rewards.accuracy to 1.0."
            )
        self.weights = dict(weights)
        self._seconds = seconds
        self._workers = Workers(n_processes, seconds)
        self._checked: set[str] = set()
        self.failures: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._workers.close()

    def score(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Score]:
        """Returns what each response to a problem is worth."""
        right = self._accuracies(problems, responses) if ACCURACY in self.weights else [None] * len(problems)
        scores = []
        for problem, response, accuracy in zip(problems, responses, right, strict=True):
            parts = {name: RULES[name](problem, response) for name in self.weights if name != ACCURACY}
            scores.append(weighted(({ACCURACY: accuracy} if ACCURACY in self.weights else {}) | parts, self.weights))
        return scores

    def _accuracies(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float | None]:
        """Returns whether each response is right; slow verifiers run side by side."""
        self.check({problem.kind for problem in problems})
        found: list[float | None] = [0.0] * len(problems)
        slow: list[int] = []
        for n, (problem, response) in enumerate(zip(problems, responses, strict=True)):
            if response.is_finished and problem.kind in SLOW:
                slow.append(n)
            elif response.is_finished:
                found[n] = self._known(problem.kind, VERIFIERS[problem.kind](problem.answer, response.content))
        calls = [(problems[n].kind, problems[n].answer, responses[n].content, self._seconds) for n in slow]
        per_test = 1 + END_S / self._seconds
        shares = [len(problems[n].answer) * per_test if problems[n].kind == "code" else 1 for n in slow]
        for n, result in zip(slow, self._workers.map(verify, calls, shares), strict=True):
            found[n] = self._known(problems[n].kind, result)
        return found

    def alike(self, kinds: Sequence[str], contents: Sequence[Sequence[str]]) -> list[list[int | None] | None]:
        """Returns which responses to each problem have equal answers (`verifiers.alike`).

        None if that failed, or if right answers of its kind need not be equal.
        """
        slow = [n for n, kind in enumerate(kinds) if kind == "math"]
        found: list[Any] = [
            verifiers.alike(kind, answers) if kind in COMPARED and kind not in SLOW else None
            for kind, answers in zip(kinds, contents, strict=True)
        ]
        calls = [(kinds[n], contents[n]) for n in slow]
        shares = [max(len(contents[n]), 1) for n in slow]
        for n, result in zip(slow, self._workers.map(verifiers.alike, calls, shares), strict=True):
            found[n] = None if isinstance(result, Failed) else result
        return found

    def _known(self, kind: str, result: float | Failed | None) -> float | None:
        """Returns the result of a verifier, None if there is none, and counts why."""
        if isinstance(result, float):
            return result
        self.failures[f"kind {kind}: {result.reason if isinstance(result, Failed) else NOTHING_TO_SAY}"] += 1
        return None

    def check(self, kinds: set[str]) -> None:
        """Raises UserError for kinds that cannot be verified here; each is checked once."""
        for kind in sorted(kinds - self._checked):
            if kind not in VERIFIERS:
                raise UserError(f"a problem has kind {kind!r}. Expected one of {', '.join(VERIFIERS)}.")
            if kind in NEEDED and importlib.util.find_spec(NEEDED[kind]) is None:
                raise UserError(
                    f"problems of kind {kind} need {NEEDED[kind].replace('_', '-')}, which is not installed. "
                    "Run: pip install 'deepseek_jax[rl]'"
                )
            if kind == "code":
                sandbox.check()
            self._checked.add(kind)


def verify(kind: str, answer: object, content: str, seconds: float) -> float | None:
    """Returns whether an answer is right, by kind; runs in a process of its own.

    A program may take `seconds` in each test: there the time is the program's own, and tells a wrong one.
    """
    if kind == "code":
        return verifiers.code(answer, content, seconds)
    return VERIFIERS[kind](answer, content)


def weighted(parts: dict[str, float | None], weights: Mapping[str, float]) -> Score:
    """Returns the score of some rewards; an unknown part of weight 0 leaves the total known."""
    counted = [(weights[name], part) for name, part in parts.items() if weights[name]]
    known = [weight * part for weight, part in counted if part is not None]
    return Score(sum(known) if len(known) == len(counted) else None, parts)
