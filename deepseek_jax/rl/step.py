"""A step of reinforcement learning: problems, answers, rewards, advantages, updates; every part by the step's number.

    problems    rl.questions of them from the source, by number
    answers     rl.answers to each, drawn with the present weights (`rollout`, or `engine_rollout`)
    rewards     `rewards`; answers without a total are left out of everything that follows
    advantages  within the answers to each problem (`grpo.advantages`), or by a teacher (`distillation`)
    measured    log-probabilities of the trainer, before the updates, and of the reference (`objective.measurer`); those
                of the trainer not for the first update, which is made with the weights that are to be measured
    updates     rl.updates of them, each on its share of the answers, in an order that is a function of the step

Random numbers are functions of (seed, step, row), so nothing besides weights and moments has to be kept for a run to
resume exactly where it was.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.data.noise import noise
from deepseek_jax.layers.base import Tree
from deepseek_jax.parallel.mesh import fetched, global_batch, joined, own_share
from deepseek_jax.rl.distillation import Teacher, judged, without_routes
from deepseek_jax.rl.grpo import Figures, advantages, tied_share
from deepseek_jax.rl.objective import Answers, Measured, PolicyGradient, answers, measurer, of_indexers, part
from deepseek_jax.rl.problems import Problem, Problems
from deepseek_jax.rl.rewards import ACCURACY, Response, Rewards, Score, has_thought
from deepseek_jax.rl.rollout import Prompts, Rollouts, pad, roller, row_keys
from deepseek_jax.rl.turns import Turns
from deepseek_jax.train.cross_entropy import IGNORE
from deepseek_jax.train.step import Report, State, Trainer

ORDER = 7  # last key of the numbers that order the answers of a step
EVALUATION = 1 << 62  # seed of the draws of evaluations: the same in every run


@dataclass(frozen=True)
class StepSizes:
    """How much a step does."""

    questions: int  # problems
    answers: int  # to each
    updates: int
    temperature: float
    top_p: float  # mass of the nucleus that tokens are drawn from; 1: the whole vocabulary
    rows_at_once: int  # answers that are drawn, and measured, at a time; 0: all

    @property
    def n_rows(self) -> int:
        """Answers in all."""
        return self.questions * self.answers

    def chunks(self) -> list[slice]:
        """Returns the rows that are drawn at a time."""
        size = self.rows_at_once or self.n_rows
        return [slice(start, start + size) for start in range(0, self.n_rows, size)]

    @property
    def measured_at_once(self) -> int:
        """Answers that are measured at a time: as many, or a part of those of an update."""
        return math.gcd(self.rows_at_once or self.n_rows, self.n_rows // self.updates)


class Drawn(NamedTuple):
    """Answers to problems, on the host."""

    problems: list[Problem]
    length_B1: np.ndarray  # of the prompts
    rollouts: Rollouts
    responses: list[Response]


class Learner:
    """The programs of reinforcement learning with one model.

    Args:
        trainer: whose objective is `PolicyGradient`.
        turns: the chat format.
        problems: where they are from.
        rewards: what answers are worth.
        sizes: of a step.
        seed: of the run.
        teacher: whose judgement of each token is learnt from, in place of rewards.
        roll: draws the answers of a step, `roll(state, prompts) -> Rollouts`; None: `rollout.roller`, as one program.
    """

    def __init__(
        self,
        trainer: Trainer,
        turns: Turns,
        problems: Problems,
        rewards: Rewards,
        sizes: StepSizes,
        seed: int,
        teacher: Teacher | None = None,
        roll: Callable[[State, Prompts], Rollouts] | None = None,
    ):
        self.trainer, self.turns, self.problems, self.rewards = trainer, turns, problems, rewards
        self.sizes, self.seed, self.teacher = sizes, seed, teacher
        self.objective: PolicyGradient = trainer.objective  # type: ignore[assignment]
        # in a loop over layers XLA on a GPU copies each layer's weights and cache for each token (`on_device`)
        rolled, in_a_loop = roller(turns.longest_answer, turns.end_ids, sizes.top_p), jax.default_backend() != "gpu"
        program = trainer.with_model(rolled, stacks=True, loop=in_a_loop)
        self._roll = roll or functools.partial(self._in_chunks, program)
        self._measure = trainer.with_model(measurer(sizes.temperature, self.objective.chunk))
        self.seconds: dict[str, float] = {}  # of the last step, by what they were spent on

    def step(self, state: State, reference: Tree | None, step: int) -> tuple[State, dict[str, float]]:
        """Runs step `step`; returns (state, figures). `reference` are the params of the reference if beta > 0."""
        self.seconds = {}
        numbers = [step * self.sizes.questions + n for n in range(self.sizes.questions)]
        with self._timed("rollout"):
            asked = [one for number in numbers for one in [self.problems.training(number)] * self.sizes.answers]
            drawn = self.draw(state, asked, row_keys(self.seed, step, len(asked)), self.sizes.temperature)
        with self._timed("reward"):
            scores = self.score(drawn, self.sizes.n_rows)
        groups = np.repeat(numbers, self.sizes.answers).tolist()
        totals = [score.total for score in scores]
        with self._timed("update"):
            first, *later = shares = self._shares(step)
            rows = np.concatenate(shares if self.teacher else [first[:0], *later])
            found, figures = self._measured(state, reference, drawn, totals, groups, rows)
            state, reports = self._updates(state, found, shares)
        figures |= self._figures_of_updates(reports) | before_updates(found, figures, reports[0])
        tied = {} if self.teacher else {"tied": tied_share(totals, groups)}
        return state, reward_figures(scores, drawn.responses) | tied | figures

    def draw(self, state: State, asked: Sequence[Problem], keys: np.ndarray, temperature: float) -> Drawn:
        """Returns an answer to each of `n_rows` problems."""
        prompts: list[np.ndarray] = []
        for before, problem in zip([None, *asked], asked, strict=False):
            prompts.append(prompts[-1] if problem is before else self.turns.prompt(problem, named(problem)))
        given = pad(prompts, self.turns.longest_prompt, keys, temperature)
        rolled: Rollouts = self._roll(state, given)
        responses = []
        for row, ids in enumerate(rolled.ids_BT):
            begin, count = len(prompts[row]), int(rolled.n_drawn_B1[row, 0])
            responses.append(self.turns.response(ids[begin : begin + count], bool(rolled.is_finished_B1[row, 0])))
        return Drawn(list(asked), given.length_B1, rolled, responses)

    def score(self, drawn: Drawn, count: int) -> list[Score]:
        """Returns what the first `count` responses are worth; of several processes each looks at a share of all."""
        if jax.process_count() == 1:
            return self.rewards.score(drawn.problems[:count], drawn.responses[:count])
        n_own = len(drawn.responses) // jax.process_count()
        own = slice(jax.process_index() * n_own, (jax.process_index() + 1) * n_own)
        scores = self.rewards.score(drawn.problems[own], drawn.responses[own])
        rows = joined(np.array([(score.total, *score.parts.values()) for score in scores], np.float64))
        values = [[None if np.isnan(value) else float(value) for value in row] for row in rows]
        return [Score(total, dict(zip(scores[0].parts, parts, strict=True))) for total, *parts in values[:count]]

    def check(self) -> None:
        """Raises UserError for problems that have too long prompts, or whose answers cannot be verified here.

        Looked at are all problems of a list, and the first ones of a series without end.
        """
        known = self.problems.known()
        for problem in known:
            self.turns.prompt(problem, named(problem))
        self.rewards.check({problem.kind for problem in known})

    def evaluate(self, state: State, count: int, temperature: float) -> tuple[dict[str, float], Drawn]:
        """Returns (figures of answers to `count` held-out problems, the first of the answers)."""
        available = self.problems.n_held_out
        count = count if available is None else min(count, available)
        scores: list[Score] = []
        responses: list[Response] = []
        first: Drawn | None = None
        for start in range(0, count, self.sizes.n_rows):
            numbers = [min(start + n, count - 1) for n in range(self.sizes.n_rows)]  # rows beyond the last are dropped
            asked = [self.problems.held_out(number) for number in numbers]
            drawn = self.draw(state, asked, row_keys(EVALUATION, start, len(asked)), temperature)
            n_kept = min(count - start, self.sizes.n_rows)
            scores += self.score(drawn, n_kept)
            responses += drawn.responses[:n_kept]
            first = first or drawn
        assert first is not None
        figures = reward_figures(scores, responses)
        if ACCURACY in figures:
            share = figures[ACCURACY]
            figures["accuracy_error"] = 1.96 * (share * (1 - share) / count) ** 0.5  # of 95 % of samples
        return figures, first

    def _measured(
        self,
        state: State,
        reference: Tree | None,
        drawn: Drawn,
        totals: Sequence[float | None],
        groups: Sequence[int],
        rows: np.ndarray,
    ) -> tuple[Answers, dict[str, float]]:
        """Returns (the answers with all that an update reads, figures of the policy before it on `rows`).

        On the others the policy before is left to the update; with a teacher they are all measured.
        """
        is_scored_B = np.array([total is not None or self.teacher is not None for total in totals])
        found = answers(drawn.rollouts, drawn.length_B1, is_scored_B)
        now = self._measurements(self._measure, state, found, rows)
        of_reference = now
        if reference is not None:
            of_reference = self._measurements(self._measure, state | {"params": reference}, found)
        is_drawn_BT = found.targets_BT != IGNORE
        if self.teacher:
            theirs = self._measurements(self.teacher.measure, self.teacher.state, without_routes(found))
            A_BT, figures = judged(theirs.logp_BT, now.logp_BT, is_drawn_BT, self.objective.grpo.log_ratio_bound)
        else:
            A_B = advantages(totals, groups, self.objective.grpo.advantage).astype(np.float32)
            A_BT, figures = np.broadcast_to(A_B[:, None], found.targets_BT.shape), {}
        found = found._replace(old_logp_BT=now.logp_BT, reference_logp_BT=of_reference.logp_BT, advantage_BT=A_BT)
        found.measured_B1[:] = np.isin(np.arange(len(found.targets_BT)), rows)[:, None]
        is_drawn_BT = is_drawn_BT & found.measured_B1
        gap_BT = np.abs(now.logp_BT - found.sampled_logp_BT) * is_drawn_BT
        n_drawn = max(is_drawn_BT.sum(), 1)
        return found, figures | {
            "entropy": float((now.entropy_BT * is_drawn_BT).sum() / n_drawn),
            "gap": float(gap_BT.max()),
            "gap_mean": float(gap_BT.sum() / n_drawn),
        }

    def _measurements(
        self, measure: Callable[[State, Any], Any], state: State, found: Answers, rows: np.ndarray | None = None
    ) -> Measured:
        """Returns what a program says of `rows`, or of all; 0 elsewhere."""
        whole = Measured(*(np.zeros(found.targets_BT.shape, np.float32) for _ in Measured._fields))
        rows, size = np.arange(self.sizes.n_rows) if rows is None else rows, self.sizes.measured_at_once
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            for all_BT, part_BT in zip(whole, self._one_chunk(measure, state, found, some), strict=True):
                all_BT[some] = part_BT
        return whole

    def _shares(self, step: int) -> list[np.ndarray]:
        """Returns the rows of each update of a step."""
        order = np.argsort(noise(self.seed, step, ORDER, at=np.arange(self.sizes.n_rows)), kind="stable")
        return np.split(order, self.sizes.updates)

    def _updates(self, state: State, found: Answers, shares: Sequence[np.ndarray]) -> tuple[State, list[Report]]:
        """Returns (the state after the updates of a step, their reports)."""
        grpo, longest = self.objective.grpo, self.turns.longest_answer
        reports = []
        for rows in shares:
            state, report = self.trainer.step(state, self._placed(part(found, rows, grpo.aggregation, longest)))
            reports.append(report)
        return state, jax.device_get(reports)

    def _figures_of_updates(self, reports: list[Report]) -> dict[str, float]:
        """Returns the means over the updates of a step."""
        names = [name for name in Figures._fields if name != "kl" or self.objective.grpo.beta]
        names += of_indexers(reports[0].auxiliary)
        found = {name: float(np.mean([r.auxiliary[name] for r in reports])) for name in names}
        found |= {name: float(np.mean([getattr(r, name) for r in reports])) for name in ("loss", "gradient_norm")}
        last = reports[-1]
        rest = {"learning_rate": last.learning_rate, "max_violation": last.max_violation}
        return found | {name: float(value) for name, value in rest.items()} | {"skipped": int(last.skipped)}

    def _in_chunks(self, run: Callable[[State, Any], Any], state: State, rows: Any) -> Any:
        """Returns what a program makes of rows, on the host."""
        parts = [self._one_chunk(run, state, rows, chunk) for chunk in self.sizes.chunks()]
        return jax.tree.map(lambda *of_parts: np.concatenate(of_parts), *parts)

    def _one_chunk(self, run: Callable[[State, Any], Any], state: State, rows: Any, which: slice | np.ndarray) -> Any:
        return fetched(run(state, self._placed(jax.tree.map(lambda x: x[which], rows))))

    def _placed(self, rows: Any) -> Any:
        return global_batch(own_share(rows, self.trainer.mesh), self.trainer.mesh)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - begin


def before_updates(found: Answers, measured: dict[str, float], first: Report) -> dict[str, float]:
    """Returns figures of the policy before the updates, from those of the measured rows and of the first update.

    entropy         of the distributions that tokens are drawn from
    gap, gap_mean   between log-probabilities of the draw and of the trainer
    """
    is_drawn_BT = found.targets_BT != IGNORE
    n_drawn, n_measured = max(is_drawn_BT.sum(), 1), (is_drawn_BT & found.measured_B1).sum()
    share = n_measured / n_drawn
    blended = {
        name: share * measured[name] + (1 - share) * float(first.auxiliary[name]) for name in ("entropy", "gap_mean")
    }
    is_known = found.measured_B1.all()
    return blended | {"gap": max(measured["gap"], 0.0 if is_known else float(first.auxiliary["gap"]))}


def named(problem: Problem) -> str:
    """Returns a problem's name in messages: by its text, which can be looked up in a file."""
    return f"the problem {problem.messages[-1]['content'][:80]!r}"


def reward_figures(scores: Sequence[Score], responses: Sequence[Response]) -> dict[str, float]:
    """Returns means over answers: rewards, and what kind of answers they are."""
    totals = [score.total for score in scores if score.total is not None]
    figures = {"reward": float(np.mean(totals)) if totals else 0.0}
    for name in scores[0].parts:
        known = [part for score in scores if (part := score.parts[name]) is not None]
        figures[name] = float(np.mean(known)) if known else 0.0
    finished = [response.n_tokens for response in responses if response.is_finished]
    return figures | {
        "unscored": 1 - len(totals) / len(scores),
        "answer_length": float(np.mean([response.n_tokens for response in responses])),
        "finished_length": float(np.mean(finished)) if finished else 0.0,
        "cut_off": 1 - len(finished) / len(responses),
        "thought": float(np.mean([has_thought(response) for response in responses])),
    }


def copied(params: Tree) -> Tree:
    """Returns weights in memory of their own, which a step does not take over."""
    return jax.tree.map(lambda x: x.copy(), params)
