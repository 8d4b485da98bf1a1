"""Rejection sampling as verbs use it: answers of a model's weights, drawn, scored, kept in a file."""

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from deepseek_jax import streams
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _provenance
from deepseek_jax.launch._reinforcement import for_answers, prepare
from deepseek_jax.units import duration

if TYPE_CHECKING:
    from deepseek_jax.rl.rejection import Counts, Kept, Rules
    from deepseek_jax.rl.step import Learner
    from deepseek_jax.train.step import State
    from deepseek_jax.train.stop import StopRequest

LINE_EVERY_S = 10
DRAWS = 8  # last key of the seed of the draws, apart from those of training


def run(config: ConfigDict, out: Path, again: str) -> int:
    """Samples; returns the exit code. `again` is the command that continues, for messages."""
    from deepseek_jax.compat import keep_freed_memory, start_compilation_cache
    from deepseek_jax.train.stop import StopRequest

    keep_freed_memory()
    check_alone("sample")
    with streams.forgiving(), StopRequest() as stop:
        start_compilation_cache(config.run.compilation_cache)
        try:
            is_done = sample(config, out, stop)
        except KeyboardInterrupt:
            streams.note(f"\nstopped. Continue with: {again}")
            return 130 if stop.is_running else stop.exit_code
        if not is_done:
            streams.note(f"stopped on request; continue with: {again}")
        return 130 if stop.signal == signal.SIGINT else 0


def check_alone(verb: str) -> None:
    """Raises UserError if this is one of several processes of a run."""
    import jax

    from deepseek_jax.compat import start_processes

    start_processes()
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: {verb} runs in one. Start it on one machine.")


def sample(config: ConfigDict, out: Path, stop: "StopRequest") -> bool:
    """Writes kept answers of `config.run.init_from` to `out` until all problems are asked, or `stop` is asked for.

    Returns whether all are.
    """
    from deepseek_jax.rl.rejection import LEAST, Kept
    from deepseek_jax.rl.rewards import Rewards

    check(config)
    rules = rules_of(config)
    weights = dict.fromkeys(LEAST, 0.0) | {"accuracy": 1.0}
    with Rewards(weights, config.rl.verifiers, config.rl.verify_s) as rewards:
        learner = prepare(for_answers(config), rewards)
        with Kept(out, about(config, learner), _provenance.name_of(config.run.init_from)) as kept:
            end = end_of(config, learner)
            print(f"{end:,} problems of {config.rl.problems} x {config.sample.answers} answers, to {out}", flush=True)
            if kept.next < end:
                draw(config, learner, rules, kept, stop)
            is_done = kept.next >= end
    if is_done:
        report(kept)
    return is_done


def draw(config: ConfigDict, learner: "Learner", rules: "Rules", kept: "Kept", stop: "StopRequest") -> None:
    """Draws batch after batch, until all problems are asked or `stop` is asked for.

    Raises UserError if the weights are no longer those that the file is about.
    """
    from deepseek_jax.weights import WEIGHTS, open_weights

    weights = open_weights(config.run.init_from)
    state = weights.read({name: learner.trainer.stored[name] for name in WEIGHTS})
    _provenance.check_unchanged(config.run.init_from, kept.about["weights"])
    stop.begin()
    end = end_of(config, learner)
    progress = Lines(end, kept.next)
    while kept.next < end and stop.signal is None:
        add_batch(config, learner, state, rules, kept)
        progress.show(kept)


def end_of(config: ConfigDict, learner: "Learner") -> int:
    """Returns how many problems are asked: each of a list is asked once at most."""
    available = learner.problems.n_training
    return config.sample.problems if available is None else min(config.sample.problems, available)


def rules_of(config: ConfigDict) -> "Rules":
    """Returns which answers are kept."""
    from deepseek_jax.rl.rejection import Rules

    c = config.sample
    return Rules(c.most, c.choose, c.longest, dict(c.least))


def seed_of(seed: int) -> int:
    """Returns the seed of the draws of a run with `seed`."""
    import numpy as np

    from deepseek_jax.data.noise import noise

    return int(noise(seed, DRAWS, at=np.zeros(1))[0])


def check(config: ConfigDict) -> None:
    """Raises UserError unless the answers to a problem divide a batch, and something is asked of them."""
    rows, n = config.rl.questions * config.rl.answers, config.sample.answers
    if rows % n:
        raise UserError(
            f"config.sample.answers={n}: {rows} answers are drawn at a time (rl.questions x rl.answers), which does "
            "not divide by it. Choose a divisor."
        )
    if not any(config.sample.least.values()):
        raise UserError("config.sample.least: every bound is 0, so any answer would do. Set least.accuracy to 1.0.")


def about(config: ConfigDict, learner: "Learner") -> dict:
    """Returns all that the answers depend on."""
    rl, turns = config.rl, learner.turns
    rules = config.sample.to_dict()
    del rules["problems"]  # more of them continue the file
    return {
        "weights": _provenance.mark_of(config.run.init_from),
        "problems": learner.problems.fingerprint,
        "seed": config.seed,
        "template": turns.name,
        "rl": {key: rl[key] for key in ("thinking", "temperature", "top_p", "longest_prompt", "longest_answer")},
        "sample": rules,
        "rows": rl.questions * rl.answers,
        "precision": config.precision,
    }


def add_batch(config: ConfigDict, learner: "Learner", state: "State", rules: "Rules", kept: "Kept") -> None:
    """Draws a batch of answers to the next problems, and appends those that are kept."""
    import numpy as np

    from deepseek_jax.rl import rejection
    from deepseek_jax.rl.rollout import row_keys

    n, last = config.sample.answers, end_of(config, learner) - 1
    numbers = [kept.next + place for place in range(learner.sizes.n_rows // n)]
    asked = [learner.problems.training(min(number, last)) for number in numbers]
    keys = np.concatenate([row_keys(seed_of(config.seed), number, n) for number in numbers])
    drawn = learner.draw(state, [problem for problem in asked for _ in range(n)], keys, config.rl.temperature)
    known = sum(number <= last for number in numbers)  # rows beyond the last problem are dropped
    scores = learner.rewards.score(drawn.problems[: known * n], drawn.responses[: known * n])
    rows: list[dict] = []
    counts = rejection.Counts()
    for place, number in enumerate(numbers[:known]):
        own = slice(place * n, (place + 1) * n)
        chosen, found = rejection.keep(drawn.responses[own], scores[own], rules)
        counts += found
        rows += [
            rejection.conversation(asked[place], drawn.responses[own][one], number, learner.turns.thinking)
            for one in chosen
        ]
    done = numbers[known - 1]
    kept.add(rows, counts, config.sample.problems if done == last else done + 1)  # a list has none after its last


class Lines:
    """A line on standard error now and then."""

    def __init__(self, total: int, done: int):
        self._total, self._first = total, done
        self._begin = self._said = time.monotonic()

    def show(self, kept: "Kept") -> None:
        """Shows the progress, if a line is due."""
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S:
            return
        self._said = now
        left = (now - self._begin) / (kept.next - self._first) * (self._total - kept.next)
        print(
            f"problem {kept.next:,} of {self._total:,}: {summary(kept.counts)}; {duration(left)} left", file=sys.stderr
        )


def summary(counts: "Counts") -> str:
    """Returns what became of answers, the most common first."""
    dropped = ", ".join(f"{name} {count:,}" for name, count in counts.most_common() if name != "kept")
    return f"{counts['kept']:,} of {counts.total():,} answers kept" + (f" (dropped: {dropped})" if dropped else "")


def report(kept: "Kept") -> None:
    """Says what the file holds. Raises UserError if that is nothing."""
    if not kept.counts["kept"]:
        raise UserError(f"{kept.path}: {summary(kept.counts)}. Lower config.sample.least, or ask a better model.")
    print(f"{kept.path}: {summary(kept.counts)}", flush=True)
