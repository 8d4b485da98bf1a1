r"""Problems by number: a pure function of (seed, number), so that the step number is the whole state of the prompts.

    sums, sums:8            digits to add, made here (`rl.sums`)
    needle:1000             a number to find in a text of so many characters, made here (`rl.needle`)
    rg:NAME                 a task of reasoning-gym, by its name there
    FILE.jsonl, a glob      rows {"messages": […]} or {"prompt": "…"}, with "answer" and optionally "kind"; or as in
                            GSM8K, {"question": "…", "answer": "… #### 18"}, or as in MATH, {"problem": "…",
                            "solution": "… \boxed{18}"} with or without "answer"

Questions of the last two forms end with the sentence that R1's authors recommend, and are verified as kind "math".
`kind` says how an answer is verified (`rl.rewards.VERIFIERS`); of a row it is "exact" by default. Held-out problems are
chosen by the hash of their messages, and numbered apart from the seed: every run is judged on the same ones.
"""

import functools
import glob
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from deepseek_jax.data.messages import read
from deepseek_jax.data.noise import noise
from deepseek_jax.data.readers import read_jsonl
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local
from deepseek_jax.rl import needle, sums
from deepseek_jax.rl.boxed import boxed

TRAINING, HELD_OUT = range(2)  # the last key of the numbers that choose a problem
IO = ("input", "output")  # of a test of a program
# Where a task of reasoning-gym runs text that may be an answer of the model as a program of Python.
RUNS_ANSWERS = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\((?!entry\b)")
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
BUILT_IN: dict[str, ModuleType] = {"sums": sums, "needle": needle}  # each with level, problem and worked
GENERATED = 512  # problems of a source that makes them, where no number is given
MOST_DRAWS = 4096  # of one problem, until it is on the side that was asked for


class Problem(NamedTuple):
    """A question, and what is needed to verify an answer to it."""

    messages: tuple[dict, ...]  # up to the assistant's turn
    answer: Any  # as the verifier of `kind` expects it
    kind: str  # key of `rl.rewards.VERIFIERS`


class Problems(Protocol):
    """A source of problems."""

    fingerprint: str  # equal for equal problems
    n_training: int | None  # different ones; None: any number of them
    n_held_out: int | None  # None: as many as asked for

    def training(self, number: int) -> Problem:
        """Returns problem `number` of the run, for any number from 0 on."""

    def held_out(self, number: int) -> Problem:
        """Returns held-out problem `number`; the same in every run."""

    def known(self) -> Sequence[Problem]:
        """Returns problems to look at before a run: all of a list, the first ones of a series."""


class Generated:
    """Problems that a function makes.

    Args:
        name: of the source, for the fingerprint and messages.
        make: from an integer of 63 bits to a problem.
        seed: of the run.
        holdout_rate: share of all problems that are held out.
    """

    n_training: int | None = None
    n_held_out: int | None = None

    def __init__(self, name: str, make: Callable[[int], Problem], seed: int, holdout_rate: float):
        self.name, self.make, self.seed, self.holdout_rate = name, make, seed, holdout_rate
        self.fingerprint = f"{name} {holdout_rate}"

    def training(self, number: int) -> Problem:
        """See `Problems`."""
        return self._first(self.seed, TRAINING, number)

    def held_out(self, number: int) -> Problem:
        """See `Problems`."""
        return self._first(0, HELD_OUT, number)

    def known(self) -> Sequence[Problem]:
        """See `Problems`."""
        return [self.training(0), self.held_out(0)]

    def _first(self, seed: int, side: int, number: int) -> Problem:
        """Returns the first problem of a series of its own that is on `side`."""
        for draw in range(MOST_DRAWS):
            chosen = noise(seed, side, number, at=np.array([draw]))[0] >> np.uint64(1)
            problem = self.make(int(chosen))
            if is_held_out(problem, self.holdout_rate) == (side == HELD_OUT):
                return problem
        raise UserError(
            f"{self.name}: {MOST_DRAWS} draws gave no problem {'to hold out' if side == HELD_OUT else 'to train on'}. "
            "It has too few different ones for this share of held-out problems; change rl.holdout_rate."
        )


class Listed:
    """Problems of a list, each once per epoch, in an order that depends on the seed; at least one is held out."""

    def __init__(self, problems: Sequence[Problem], seed: int, holdout_rate: float, source: str):
        self._training, self._held_out = divided(problems, holdout_rate)
        self.seed = seed
        self.n_training: int | None = len(self._training)
        self.n_held_out: int | None = len(self._held_out)
        if not self._training:
            raise UserError(f"{source} has no problem to train on ({len(problems)} in all). Lower rl.holdout_rate.")
        self.fingerprint = digest([*self._training, *self._held_out])

    def training(self, number: int) -> Problem:
        """See `Problems`."""
        epoch, place = divmod(number, len(self._training))
        return self._training[self._order(epoch)[place]]

    def held_out(self, number: int) -> Problem:
        """See `Problems`."""
        return self._held_out[number]

    def known(self) -> Sequence[Problem]:
        """See `Problems`."""
        return [*self._training, *self._held_out]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run has one list
    def _order(self, epoch: int) -> np.ndarray:
        return np.argsort(noise(self.seed, TRAINING, epoch, at=np.arange(len(self._training))), kind="stable")


def divided(problems: Sequence[Problem], holdout_rate: float) -> tuple[list[Problem], list[Problem]]:
    """Returns (the problems of a list to train on, those that are held out), each in the order of their hashes.

    The problem with the smallest hash is held out at any rate; equal ones are on the same side.
    """
    hashed = sorted(((message_hash(problem), problem) for problem in problems), key=lambda pair: pair[0])
    training: list[Problem] = []
    held: list[Problem] = []
    for number, problem in hashed:
        side = held if number == hashed[0][0] or is_held_out(problem, holdout_rate) else training
        side.append(problem)
    return training, held


def open_problems(source: str, seed: int, holdout_rate: float) -> Problems:
    """Returns the problems that `source` names (see the top of this file).

    Raises UserError for an unknown name, a file that is damaged, or a package that is not installed.
    """
    name, _, option = source.partition(":")
    if name in BUILT_IN:
        task = BUILT_IN[name]
        level = task.level(option)
        return Generated(source, lambda n: Problem(*task.problem(n, level)), seed, holdout_rate)
    if name == "rg":
        return Generated(source, reasoning_gym(option), seed, holdout_rate)
    return Listed(listed(source)[0], seed, holdout_rate, source)


def listed(source: str) -> tuple[list[Problem], str]:
    """Returns (all problems of some JSONL files, in their order, a fingerprint of them)."""
    check_local(source, "config.rl.problems")
    paths = files_of(source)
    if not paths:
        raise UserError(f"rl.problems={source}: no such file. Give JSONL files, sums:DIGITS, needle:LENGTH or rg:NAME.")
    problems = [problem for path in paths for problem in rows(path)]
    return problems, digest(problems)


def files_of(source: str) -> list[Path]:
    """Returns the files that a source names; none if it makes its problems."""
    return [Path(path) for path in sorted(glob.glob(os.path.expanduser(source), recursive=True))]


def is_generated(source: str) -> bool:
    """Returns whether a source makes its problems, so that there are any number of them."""
    return source.partition(":")[0] in (*BUILT_IN, "rg")


def held_out(source: str, holdout_rate: float, count: int) -> tuple[list[Problem], str]:
    """Returns (the first `count` held-out problems of a source, a fingerprint of the source).

    0 takes all of a list, and 512 of a source that makes them.
    """
    problems = open_problems(source, 0, holdout_rate)
    available = problems.n_held_out
    count = (count or GENERATED) if available is None else min(available, count or available)
    return [problems.held_out(number) for number in range(count)], problems.fingerprint


def digest(problems: Sequence[Problem]) -> str:
    """Returns a hash of problems."""
    text = json.dumps(problems, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def rows(path: Path) -> list[Problem]:
    """Returns the problems of a JSONL file."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise UserError(f"{path} is not a .jsonl file. Problems are rows with messages (or prompt), answer and kind.")
    with open(path, "rb") as file:
        return [problem_of(row, where) for row, where in read_jsonl(file, None, str(path))]


def problem_of(row: Any, where: str) -> Problem:
    """Returns a row of a file as a problem."""
    row = published(row) if isinstance(row, dict) else row
    if not isinstance(row, dict) or row.get("answer") is None or ("messages" in row) == ("prompt" in row):
        raise UserError(f'{where} is not a problem. Expected {{"messages": […] or "prompt": "…", "answer": …}}.')
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    try:
        read(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where} ends with an answer of the assistant. Leave it out: it is what the model writes.")
    if row.get("kind") == "code" and not are_tests(row["answer"]):
        raise UserError(f'{where}: the answer of kind code is [{{"input": "…", "output": "…"}}, …], at least one test.')
    return Problem(tuple(messages), row["answer"], str(row.get("kind", "exact")))


def published(row: dict) -> dict:
    """Returns a row in the form of GSM8K or MATH as one with messages, answer and kind; others as they are."""
    if isinstance(row.get("question"), str) and "####" in str(row.get("answer")):
        question, answer = row["question"], row["answer"].rpartition("####")[2].strip().replace(",", "")
    elif isinstance(row.get("problem"), str) and isinstance(row.get("solution"), str):
        boxes = boxed(row["solution"])
        question, answer = row["problem"], row.get("answer", boxes[-1] if boxes else None)
    else:
        return row
    messages = [{"role": "user", "content": question + INSTRUCTION}]
    return {"messages": messages, "answer": None if answer is None else str(answer), "kind": "math"}


def are_tests(answer: Any) -> bool:
    """Returns whether these are tests of a program, as the verifier of kind code reads them."""
    is_list = isinstance(answer, list) and bool(answer)
    return is_list and all(isinstance(test, dict) and isinstance(test.get(key), str) for test in answer for key in IO)


def reasoning_gym(name: str) -> Callable[[int], Problem]:
    """Returns the function that makes problems of a task of reasoning-gym."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(
            f"rg:{name} needs reasoning-gym, which is not installed. Run: pip install 'deepseek_jax[rl]'"
        ) from None
    if name not in DATASETS:
        raise UserError(f"rg:{name}: reasoning-gym has no task of this name. It has {', '.join(sorted(DATASETS))}.")
    dataset = create_dataset(name, seed=0, size=2**31 - 1)
    if RUNS_ANSWERS.search(inspect.getsource(dataset.score_answer)):
        raise UserError(
            f"rg:{name}: reasoning-gym scores answers to this task by running them as programs of Python, which could "
            "do anything to your files. Choose another task."
        )

    def make(number: int) -> Problem:
        entry = dataset[number % (2**31 - 1)]
        question = {"role": "user", "content": entry["question"]}
        return Problem((question,), {"task": name, "entry": entry}, "reasoning_gym")

    return make


def message_hash(problem: Problem) -> int:
    """Returns 64 bits of a hash of the messages of a problem."""
    return hash_of(problem.messages)


def hash_of(messages: Sequence[dict]) -> int:
    """Returns 64 bits of a hash of messages."""
    text = json.dumps(messages, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def is_held_out(problem: Problem, rate: float) -> bool:
    """Returns whether a problem is among the share `rate` that is held out."""
    return message_hash(problem) < rate * 2.0**64
