"""A model's answers to problems: what `deepseek-jax evaluate --problems=SOURCE` draws, keeps and reports."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _provenance, _serving
from deepseek_jax.launch._tables import print_table
from deepseek_jax.storage import Place
from deepseek_jax.units import duration

if TYPE_CHECKING:
    from deepseek_jax.language_model import LanguageModel
    from deepseek_jax.rl.problems import Problem
    from deepseek_jax.rl.turns import Turns

R1_TOKENS = 32_768  # of an answer at most, in the evaluations of R1 (section 3)
STEPS = 8  # tokens per row that one program of the engine draws, and prompts that one reads
LINE_EVERY_S = 10


def evaluate(options: Any, source: Place | str) -> dict[str, Any]:
    """Returns the results as JSON, after drawing those answers that are not kept yet."""
    from deepseek_jax.rl import evaluation
    from deepseek_jax.rl.rewards import ACCURACY, Rewards

    mark = _provenance.mark_of(source)
    model, engine = _serving.open_engine(options, source, n_steps=STEPS, n_prompts=STEPS)
    _provenance.check_unchanged(source, mark)
    problems, fingerprint = asked(options, model)
    turns = turns_of(options, model, engine.most_positions)
    draws = evaluation.Draws(options.temperature, options.top_p, options.seed)
    about = {"weights": mark, "format": options.weights, "cache": options.cache, "precision": model.config.precision}
    about |= {"problems": fingerprint, **draws._asdict()}
    about |= {"template": turns.name, "thinking": turns.thinking, "max_tokens": turns.longest_answer}
    places = evaluation.places(len(problems), options.samples)
    with (
        evaluation.Record(Path(options.answers).expanduser() if options.answers else None, about) as record,
        Rewards({ACCURACY: 1.0}, options.verifiers) as rewards,
    ):
        rewards.check({problem.kind for problem in problems})
        missing = [place for place in places if place not in record.answers]
        counter = Counter(len(places), len(places) - len(missing))
        for place, response in evaluation.draw(engine, turns, problems, missing, draws):
            record.add(place, response)
            counter.count(response.n_tokens)
        found = evaluation.results(problems, record.answers, options.samples, rewards)
    about |= {"model": model.source, "source": options.problems, "samples": options.samples}
    return about | found.as_json()


def asked(options: Any, model: "LanguageModel") -> "tuple[list[Problem], str]":
    """Returns the problems to answer, and a fingerprint of all that could be asked."""
    from deepseek_jax.rl import problems

    source, rate = options.problems, model.config.rl.holdout_rate
    if problems.is_generated(source):
        found, fingerprint = problems.held_out(source, rate, options.limit)
        print(f"{len(found)} problems of {source}, of the {rate:.0%} that are held out", file=sys.stderr)
        return found, fingerprint
    rows, _ = problems.listed(source)
    seen = trained_on(rows, model.config, fingerprint_of(options.workdir)) if options.workdir else set()
    new = [row for row in rows if problems.message_hash(row) not in seen]
    if not new:
        raise UserError(f"--problems={source}: of {len(rows)} problems there, none is new to the model. Give others.")
    found = new[: options.limit or None]
    why = "" if len(new) == len(rows) else f"; {options.workdir} was trained on {len(rows) - len(new)} of them"
    print(f"{len(found)} of {len(rows)} problems of {source}{why}", file=sys.stderr)
    return found, problems.digest(new)


def fingerprint_of(workdir: Path) -> str:
    """Returns the fingerprint of the problems of a run of `rl`; "" for other runs."""
    from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
    from deepseek_jax.weights import checkpoint_directory

    with Checkpointer(checkpoint_directory(workdir), read_only=True) as checkpoints:
        return checkpoints.read_meta()[1].get("problems", "")


def trained_on(rows: "Sequence[Problem]", config: ConfigDict, fingerprint: str) -> set[int]:
    """Returns the hashes of the messages of problems that a run was trained on, as far as one can know.

    These are the problems of `rl.problems` that are not held out; those of `rows`, if they are the problems of the run
    by their fingerprint, though its files may have moved; and those that its conversations (`data.source`) answer.
    """
    from deepseek_jax.rl.problems import digest, divided, files_of, is_generated, listed, message_hash

    rl, found = config.rl, []
    if not is_generated(rl.problems) and files_of(rl.problems):
        found += divided(listed(rl.problems)[0], rl.holdout_rate)[0]
    training, held = divided(rows, rl.holdout_rate)
    if digest([*training, *held]) == fingerprint:
        found += training
    return {message_hash(problem) for problem in found} | answered(files_of(config.data.source))


def answered(files: "Sequence[Path]") -> set[int]:
    """Returns the hashes of the messages before the last one of conversations in JSONL files."""
    from deepseek_jax.data.readers import read_jsonl
    from deepseek_jax.rl.problems import hash_of

    found = set()
    for path in files:
        if path.suffix == ".jsonl":
            with open(path, "rb") as file:
                rows = [row for row, _ in read_jsonl(file, None, str(path)) if isinstance(row, dict)]
            found |= {hash_of(row["messages"][:-1]) for row in rows if isinstance(row.get("messages"), list)}
    return found


def turns_of(options: Any, model: "LanguageModel", n_positions: int) -> "Turns":
    """Returns the chat format of the answers, and how long they may be."""
    from deepseek_jax.data.conversations import template_name
    from deepseek_jax.rl.turns import Turns

    rl = model.config.rl
    most = rl.longest_answer if options.workdir else R1_TOKENS
    longest = options.max_tokens or min(most, n_positions // 2)
    if longest >= n_positions:
        raise UserError(
            f"--max-tokens={longest}: the model has {n_positions} positions, for prompt and answer. Give fewer."
        )
    config = model.config
    template = template_name(options.template or config.data.chat_template, config.data.tokenizer)
    thinking = rl.thinking if options.thinking is None else options.thinking
    return Turns(model.tokenizer, template, thinking, n_positions - longest, longest, model.end_ids)


class Counter:
    """Says now and then how many answers there are."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.tokens = total, done, 0
        self._new, self._begin, self._said = 0, 0.0, 0.0
        if done:
            print(f"{done:,} of {total:,} answers are there already", file=sys.stderr)

    def count(self, n_tokens: int) -> None:
        """Counts an answer; the first, for which programs were compiled, starts the clock."""
        now, self.done = time.monotonic(), self.done + 1
        if not self._begin:
            self._begin = self._said = now
            return
        self._new, self.tokens = self._new + 1, self.tokens + n_tokens
        if now - self._said >= LINE_EVERY_S or self.done == self.total:
            self._said, seconds = now, max(now - self._begin, 1e-9)
            left = duration(seconds / self._new * (self.total - self.done))
            done, rate = f"{self.done:,} of {self.total:,} answers", self.tokens / seconds
            print(f"{done}, {rate:,.0f} tokens/s, {left} left", file=sys.stderr)


def report(found: dict[str, Any]) -> None:
    """Prints the results."""
    how = f"{found['samples']} samples at temperature {found['temperature']:g}, top-p {found['top_p']:g}"
    print(f"{found['source']}: {how}; 95 % intervals over problems (Wilson)")
    estimates = {name: value for name, value in found.items() if isinstance(value, dict) and "low" in value}
    header = ("", "share", "from", "to", "problems")
    cells = [
        (name, *(f"{one[key]:.3f}" for key in ("value", "low", "high")), str(one["problems"]))
        for name, one in estimates.items()
    ]
    print_table(header, cells, right=header[1:])
    print(
        f"tokens per answer {found['answer_length']:.1f}, with a thought {found['thought']:.1%}, cut off "
        f"{found['cut_off']:.1%}, not scored {found['unscored']:.1%}"
    )
