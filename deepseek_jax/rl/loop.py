"""The loop of reinforcement learning: step, log, evaluate on held-out problems, save.

The number of a step is the whole state of problems and draws (`step`). A checkpoint holds the train state, which counts
updates, and the reference with the step that it was taken at, if there is one: so a run that is killed resumes from its
last checkpoint with the same draws, and ends with the same weights, bit for bit.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_jax import streams
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.layers.base import Tree
from deepseek_jax.parallel.mesh import REPLICATED, place
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import ACCURACY, Response
from deepseek_jax.rl.step import Drawn, Learner, copied
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.ledger import Ledger
from deepseek_jax.train.loop import StopPoll
from deepseek_jax.train.metrics import Metrics, read_log
from deepseek_jax.train.phases import COMPILE, EVALUATE, PROFILE, SAVE, STEP, Phases
from deepseek_jax.train.profiles import Profiles
from deepseek_jax.train.step import State
from deepseek_jax.train.stop import StopRequest

REFERENCE, TAKEN_AT = "reference", "reference_step"  # entries of a checkpoint
METRICS = "metrics.jsonl"  # as `train.metrics` writes it
SAMPLES = "samples.jsonl"  # answers to held-out problems, in the workdir
N_SAMPLES = 8  # of an evaluation
SHOWN = 300  # characters of a sample that is printed
MOST_CUT_OFF = 0.5  # share of answers that are too long, above which there is a warning
MOST_UNSCORED = 0.05  # share of answers, likewise
MASTERED = 0.9  # share of right answers from which there is little left to learn


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what besides stepping; all in steps."""

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    refresh_every: int  # between the moments at which the policy becomes the reference; 0: never
    eval_problems: int  # of an evaluation
    max_skipped: int  # non-finite updates in a row that stop the run


class Loop:
    """A run from its checkpoint (or the beginning) to its last step; `meta` is kept beside each checkpoint.

    `phases` hears what the run is doing; `ledger` keeps what its time went into, `profiles` are of its steps.
    """

    def __init__(
        self,
        learner: Learner,
        config: LoopConfig,
        *,
        checkpoints: Checkpointer,
        metrics: Metrics,
        meta: dict,
        workdir: Path,
        phases: Phases | None = None,
        ledger: Ledger | None = None,
        profiles: Profiles | None = None,
    ):
        self.learner, self.config, self.phases = learner, config, phases or Phases()
        self.ledger, self.profiles = ledger, profiles
        self.checkpoints, self.metrics, self.meta, self.workdir = checkpoints, metrics, meta, workdir
        self._start_accuracy: float | None = None
        self._warned: set[str] = set()

    @property
    def has_reference(self) -> bool:
        """Whether a reference is kept."""
        return self.learner.objective.grpo.beta > 0

    def begin(self, state: State) -> State:
        """Returns the state before the first step, with the reference, if one is kept: the weights as they are."""
        if self.has_reference and REFERENCE not in state:
            return state | self._reference(state, 0)
        return state

    def _reference(self, state: State, step: int) -> State:
        """Returns what is kept of the weights after `step` as the reference."""
        taken_at = place(np.int32(step), self.learner.trainer.mesh, REPLICATED)
        return {REFERENCE: copied(state["params"]), TAKEN_AT: taken_at}

    def run(self, state: State, start: int, stop: StopRequest) -> tuple[State, int]:
        """Trains from `state`, that after `start` steps, to the last step or until `stop` is asked for, and saves.

        Returns (the state, the steps that it has behind it).
        """
        stop.begin()
        self._look_back(start)
        if start == 0:
            self.evaluate(state, 0)
        poll = StopPoll(stop, start, self.config.steps)
        with self.phases.of(STEP):
            return self._steps(state, start, poll)

    def _steps(self, state: State, start: int, poll: StopPoll) -> tuple[State, int]:
        """Trains from `state`, that after `start` steps."""
        done = start
        is_ending = poll.should_stop(done)
        while done < self.config.steps and not is_ending:
            if self.profiles:
                with self.phases.of(PROFILE):
                    self.profiles.before(done + 1)
            with self.phases.of(COMPILE if done == start else STEP):
                state, figures = self._step(state, done)
                self.phases.progress()
            done += 1
            is_ending = poll.should_stop(done)
            self._check(state, figures, done)
            if done == start + 1 or self._is_due(done, self.config.log_every):
                self.metrics.step(done, figures, tokens=self._tokens(figures, done, start))
            if self._is_due(done, self.config.eval_every):
                self.evaluate(state, done)
            if is_ending or self._is_due(done, self.config.checkpoint_every):
                with self.metrics.paused(), self.phases.of(SAVE):
                    self.checkpoints.save(done, self.learner.trainer.store(state), self.meta)
                if self.ledger:
                    self.ledger.note(done)
        return state, done

    def evaluate(self, state: State, step: int) -> None:
        """Answers held-out problems, by draws as in training and by the likeliest tokens."""
        with self.metrics.paused(), self.phases.of(EVALUATE):
            trained = self._trained(state)
            figures, first = self.learner.evaluate(trained, self.config.eval_problems, self.learner.sizes.temperature)
            greedy, _ = self.learner.evaluate(trained, self.config.eval_problems, 0.0)
            if ACCURACY in greedy:
                figures["greedy_accuracy"] = greedy[ACCURACY]
            self.metrics.evaluation(step, figures)
            self._write_samples(step, first)
            self._judge(step, figures)

    def _step(self, state: State, done: int) -> tuple[State, dict[str, float]]:
        """Runs a step; refreshes the reference where that is due after it."""
        kept: dict[str, Tree] = {name: state[name] for name in (REFERENCE, TAKEN_AT) if name in state}
        trained, figures = self.learner.step(self._trained(state), kept.get(REFERENCE), done)
        every = self.config.refresh_every
        if kept and every and (done + 1) % every == 0:
            kept = self._reference(trained, done + 1)
        return trained | kept, figures | {f"{what}_s": seconds for what, seconds in self.learner.seconds.items()}

    def _trained(self, state: State) -> State:
        """Returns what the trainer knows of a state."""
        return {name: tree for name, tree in state.items() if name not in (REFERENCE, TAKEN_AT)}

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _tokens(self, figures: dict[str, float], done: int, start: int) -> int:
        """Returns about how many tokens were drawn since the last line of the log."""
        steps = 1 if done == start + 1 else min(self.config.log_every, done - start)
        return int(figures["answer_length"] * self.learner.sizes.n_rows * steps)

    def _check(self, state: State, figures: dict[str, float], done: int) -> None:
        """Warns, once each, of what keeps a run from learning. Raises UserError after too many updates in a row."""
        if int(state["skipped_in_row"]) >= self.config.max_skipped:
            raise UserError(
                f"step {done}: {int(state['skipped_in_row'])} updates in a row had a loss or gradient that is not "
                "finite, and were skipped. Lower schedule.peak_rate, or rl.grpo.log_ratio_bound."
            )
        if figures["cut_off"] > MOST_CUT_OFF:
            self._warn(
                "cut_off",
                f"step {done}: {figures['cut_off']:.0%} of the answers were cut off after "
                f"{self.learner.turns.longest_answer} tokens and so are wrong. Raise rl.longest_answer.",
            )
        if figures.get("tied") == 1:
            self._warn(
                "tied",
                f"step {done}: all answers to each problem have equal rewards, so nothing is learnt from this step. "
                "If that lasts, take easier or harder problems, or more answers (rl.answers).",
            )
        if figures["unscored"] > MOST_UNSCORED and not self.learner.teacher:
            reason = "".join(reason for reason, _ in self.learner.rewards.failures.most_common(1))
            self._warn(
                "unscored",
                f"step {done}: {figures['unscored']:.0%} of the answers could not be scored and are not learnt from. "
                f"The commonest reason since the start: {reason}. If it is the time, raise rl.verify_s.",
            )

    def _warn(self, kind: str, text: str) -> None:
        """Prints a warning, the first of its kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            self.metrics.message(f"warning: {text}")

    def _judge(self, step: int, figures: dict[str, float]) -> None:
        """Says at the end if the share of right answers has not risen though it could, whatever else has."""
        if ACCURACY not in figures:
            return
        if step == 0:
            self._start_accuracy = figures[ACCURACY]
        if step < self.config.steps or self._start_accuracy is None or self._start_accuracy >= MASTERED:
            return
        if figures[ACCURACY] <= self._start_accuracy + math.sqrt(2) * figures["accuracy_error"]:
            self.metrics.message(
                f"the share of right answers was {self._start_accuracy:.3f} and is {figures[ACCURACY]:.3f}: no more "
                "than by chance. Reinforcement learning brings out what a model can do already; longer answers or "
                "more thoughts alone are no sign of learning. Train the base further, or take easier problems."
            )

    def _look_back(self, start: int) -> None:
        """Reads what the run has written until step `start`: its first accuracy; later samples are dropped."""
        if not self.metrics.enabled:
            return
        records = read_log(self.workdir / METRICS) if start else []
        first = [record for record in records if record["step"] == 0 and ACCURACY in record]
        self._start_accuracy = first[0][ACCURACY] if first else None
        samples = [row for row in read_log(self.workdir / SAMPLES) if 0 < start >= row["step"]]
        write_atomically(self.workdir / SAMPLES, "".join(json.dumps(row) + "\n" for row in samples).encode())

    def _write_samples(self, step: int, drawn: Drawn) -> None:
        """Appends some answers to the file of samples, shows them in TensorBoard, and prints the first."""
        rows, shown = [], []
        for problem, response in list(zip(drawn.problems, drawn.responses, strict=True))[:N_SAMPLES]:
            messages = [*problem.messages, response.message]
            rows.append(json.dumps({"step": step, "messages": messages, "answer": problem.answer}, default=str))
            shown.append(spelled(problem, response))
        if self.metrics.enabled:
            with (self.workdir / SAMPLES).open("a", encoding="utf-8") as file:
                file.write("".join(row + "\n" for row in rows))
            self.metrics.samples(step, shown)
            self.metrics.message("  drawn: " + streams.printable(" ".join(shown[0].split())[:SHOWN]))


def spelled(problem: Problem, response: Response) -> str:
    """Returns a question, the thought and the content of a response, and the answer expected, as text."""
    ending = "" if response.is_finished else " (cut off)"
    thought = f"<think>{response.thought}</think>" if response.thought else ""
    answer = problem.answer if isinstance(problem.answer, str | int | float) else "…"
    return f"{problem.messages[-1]['content']}\n\n→ {thought}{response.content}{ending}\n\n(expected {answer})"
