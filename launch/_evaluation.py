"""A model's answers to problems: what `deepseek-jax evaluate --problems=SOURCE` draws, keeps and reports."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _serving
from deepseek_jax.launch._tables import print_table
from deepseek_jax.units import duration

if TYPE_CHECKING:
    from deepseek_jax.language_model import LanguageModel
    from deepseek_jax.rl.problems import Problem
    from deepseek_jax.rl.turns import Turns

R1_TOKENS = 32_768  # of an answer at most, in the evaluations of R1 (section 3)
STEPS = 8  # tokens per row that one program of the engine draws, and prompts that one reads
LINE_EVERY_S = 10


def evaluate(options: Any, source: Path | str) -> dict[str, Any]:
    """Returns the results as JSON, after drawing those answers that are not kept yet."""
    from deepseek_jax.rl import evaluation
    from deepseek_jax.rl.rewards import ACCURACY, Rewards

    model, engine = _serving.open_engine(options, source, n_steps=STEPS, n_prompts=STEPS)
    problems, fingerprint = asked(options, model)
    turns = turns_of(options, model, engine.most_positions)
    draws = evaluation.Draws(options.temperature, options.top_p, options.seed)
    about = {"model": model.source, "problems": fingerprint, **draws._asdict()}
    about |= {"template": turns.name, "thinking": turns.thinking, "max_tokens": turns.longest_answer}
    wanted = evaluation.places(len(problems), options.samples)
    with (
        evaluation.Record(Path(options.answers).expanduser() if options.answers else None, about) as record,
        Rewards({ACCURACY: 1.0}, options.verifiers) as rewards,
    ):
        rewards.score(problems[:1], [evaluation.Response({"content": ""}, 0, 1, True, False)])
        missing = [place for place in wanted if place not in record.answers]
        counter = Counter(len(wanted), len(wanted) - len(missing))
        for place, response in evaluation.draw(engine, turns, problems, missing, draws):
            record.add(place, response)
            counter.count(response.n_tokens)
        found = evaluation.results(problems, record.answers, options.samples, rewards)
    return about | {"source": options.problems, "samples": options.samples} | found.as_json()


def asked(options: Any, model: "LanguageModel") -> "tuple[list[Problem], str]":
    """Returns the problems to answer, and a fingerprint of all that the source has."""
    from deepseek_jax.rl import problems

    source, rl = options.problems, model.config.rl
    if problems.is_generated(source) or (options.workdir and source == rl.problems):
        found, fingerprint = problems.held_out(source, rl.holdout_rate, options.limit)
        print(f"{len(found)} problems of {source}, of the {rl.holdout_rate:.0%} that are held out", file=sys.stderr)
    else:
        found, fingerprint = problems.listed(source)
        found = found[: options.limit or None]
    if not found:
        raise UserError(f"--problems={source}: there is no problem in it. Expected one or more.")
    return found, fingerprint


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
    estimates = {name: value for name, value in found.items() if isinstance(value, dict)}
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
