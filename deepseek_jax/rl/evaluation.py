"""A model's answers to problems: each drawn several times and once greedily, by an engine; and what they come to.

A draw is a function of (weights, problem, sample, seed). So answers that were kept in a file need not be drawn again,
and more samples add to those that are there.
"""

import contextlib
import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deepseek_jax.data.file_locks import try_lock
from deepseek_jax.data.noise import noise
from deepseek_jax.errors import UserError
from deepseek_jax.rl.estimates import Estimate, estimate, majority, pass_at_k
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import ACCURACY, Response, Rewards, Score, has_thought
from deepseek_jax.rl.turns import Turns
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.offline import outputs
from deepseek_jax.serve.sampling import Sampling

GREEDY = -1  # the sample that takes the likeliest token each time
COLUMNS = ("message", "tokens", "allowed", "finished", "opened")  # of a kept answer, the fields of `Response`
RIGHT = "right"  # the vote of a right answer


class Place(NamedTuple):
    """Which answer: number of the problem, and of the sample."""

    problem: int
    sample: int


class Draws(NamedTuple):
    """How answers are drawn."""

    temperature: float
    top_p: float
    seed: int

    def sampling(self, place: Place, n_new: int, stop_ids: Sequence[int]) -> Sampling:
        """Returns how one answer is drawn."""
        if place.sample == GREEDY:
            return Sampling(n_new, stop_ids=stop_ids)
        seed = int(noise(self.seed, place.problem, at=np.array([place.sample]))[0])
        return Sampling(n_new, self.temperature, self.top_p, seed=seed, stop_ids=stop_ids)


def places(n_problems: int, n_samples: int) -> list[Place]:
    """Returns the answers of an evaluation, problem by problem: their prompts are then in the engine's cache."""
    return [Place(problem, sample) for problem in range(n_problems) for sample in (GREEDY, *range(n_samples))]


def draw(
    engine: Engine,
    turns: Turns,
    problems: Sequence[Problem],
    asked: Sequence[Place],
    draws: Draws,
) -> Iterator[tuple[Place, Response]]:
    """Yields answers as they end; the engine is idle before and after.

    Args:
        engine: with the model.
        turns: the chat format.
        problems: all of the evaluation.
        asked: the answers to draw.
        draws: how.

    Raises UserError, before the first answer, for a prompt that is too long.
    """
    prompts = {
        n: turns.prompt(problems[n], f"problem {n}").tolist() for n in sorted({place.problem for place in asked})
    }
    found: dict[int, list[int]] = {}
    requests = ((prompts[place.problem], draws.sampling(place, turns.longest_answer, turns.end_ids)) for place in asked)
    for number, output in outputs(engine, requests):
        found.setdefault(number, []).extend(output.ids)
        if output.ending:
            ids = found.pop(number)
            yield asked[number], turns.response(ids, output.ending == "stop")


class Record:
    """Answers in a file, one JSON object per line; a context manager. The first line says what they are answers to.

    Args:
        path: of the file; None keeps nothing.
        about: what the answers depend on; answers that depend on something else are refused with a UserError.

    `answers` are those that the file had.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.answers: dict[Place, Response] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(path.open("a+b"))
            if try_lock(file.fileno()) is False:
                raise UserError(f"{path} is being written by another process. Wait for it, or give another file.")
            self._resume(path, file, about)
            opened.pop_all()
        self._file = file

    def _resume(self, path: Path, file: BinaryIO, about: dict[str, Any]) -> None:
        """Reads the answers of a file without a last line that a kill has torn, or begins the file."""
        file.seek(0)
        content, header = file.read(), _line({"about": about})
        if header.startswith(content):  # empty, or killed in the first line
            file.truncate(0)
            return _append(file, header)
        whole = content[: content.rfind(b"\n") + 1]
        rows = [row for line in whole.splitlines() if (row := _row(line))]
        if not rows or rows[0].get("about") != about:
            raise UserError(
                f"{path} holds something else than answers of {json.dumps(about)}. Give the same settings to "
                "continue it, or another file."
            )
        for row in rows[1:]:
            self.answers[Place(row["problem"], row["sample"])] = Response(*(row[name] for name in COLUMNS))
        file.truncate(len(whole))

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, place: Place, response: Response) -> None:
        """Keeps an answer."""
        self.answers[place] = response
        if self._file:
            _append(self._file, _line(place._asdict() | dict(zip(COLUMNS, response, strict=True))))


def _line(row: dict) -> bytes:
    """Returns a line of a record."""
    return f"{json.dumps(row)}\n".encode()


def _append(file: BinaryIO, line: bytes) -> None:
    """Adds a line to a record."""
    file.write(line)
    file.flush()


def _row(line: bytes) -> dict | None:
    """Returns a line of a record, None for one that a kill has torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class Results(NamedTuple):
    """What an evaluation found."""

    estimates: dict[str, Estimate]  # by name: pass@1, maj@64, greedy, …
    shares: dict[str, float]  # means over the drawn answers, or the greedy ones where none was drawn

    def as_json(self) -> dict[str, Any]:
        """Returns them as JSON."""
        return {name: found._asdict() for name, found in self.estimates.items()} | self.shares


def results(problems: Sequence[Problem], answers: dict[Place, Response], n_samples: int, rewards: Rewards) -> Results:
    """Returns what the answers of `places(len(problems), n_samples)` come to."""
    asked = places(len(problems), n_samples)
    responses = [answers[place] for place in asked]
    scores = rewards.score([problems[place.problem] for place in asked], responses)
    right = {place: score.parts[ACCURACY] for place, score in zip(asked, scores, strict=True)}
    drawn = range(n_samples)
    greedy = [right[Place(n, GREEDY)] for n in range(len(problems))]
    estimates = {"greedy": [one for one in greedy if one is not None]}
    counts = []  # (scored, right) of each problem
    for n in range(len(problems)):
        known = [one for sample in drawn if (one := right[Place(n, sample)]) is not None]
        counts.append((len(known), int(sum(known))))
    for k in powers_of_two(n_samples):
        estimates[f"pass@{k}"] = [pass_at_k(n, c, k) for n, c in counts if n >= k]
    if n_samples > 1:
        estimates[f"maj@{n_samples}"] = majorities(problems, answers, right, n_samples, rewards)
    counted = [n for n, place in enumerate(asked) if (place.sample != GREEDY) == (n_samples > 0)]
    shares = answer_shares([responses[n] for n in counted], [scores[n] for n in counted])
    return Results({name: estimate(values) for name, values in estimates.items() if values}, shares)


def answer_shares(responses: Sequence[Response], scores: Sequence[Score]) -> dict[str, float]:
    """Returns what kind of answers these are: means over them."""
    return {
        "answer_length": float(np.mean([response.n_tokens for response in responses])),
        "thought": float(np.mean([has_thought(response) for response in responses])),
        "cut_off": float(np.mean([not response.is_finished for response in responses])),
        "unscored": float(np.mean([score.total is None for score in scores])),
    }


def majorities(
    problems: Sequence[Problem],
    answers: dict[Place, Response],
    right: dict[Place, float | None],
    n_samples: int,
    rewards: Rewards,
) -> list[float]:
    """Returns the vote of the answers to each problem, of those all of whose answers could be scored and compared."""
    wrong: list[list[Place]] = []
    for n in range(len(problems)):
        of_problem = [Place(n, sample) for sample in range(n_samples)]
        wrong.append([place for place in of_problem if right[place] == 0.0 and answers[place].is_finished])
    kinds = [problem.kind for problem in problems]
    groups = rewards.alike(kinds, [[answers[place].content for place in places] for places in wrong])
    found = []
    for n, group in enumerate(groups):
        known = [right[Place(n, sample)] for sample in range(n_samples)]
        if group is None or None in known:
            continue
        votes: list[Hashable | None] = [RIGHT] * known.count(1.0)
        found.append(majority([*votes, *group], RIGHT))
    return found


def powers_of_two(most: int) -> Iterable[int]:
    """Yields 1, 2, 4, … up to `most`."""
    k = 1
    while k <= most:
        yield k
        k *= 2
