"""A chain of stages (`_stages`), each by the functions of the verb of its kind, and the table of what they made.

    base      `train` on text about the built-in problems, or weights that are there
    sft       `train` on conversations
    rl        `rl`
    sample    `sample`

A stage whose record says that it is done is skipped after checking that its folder still holds what it made. The others
are started, or resumed from their last checkpoint, so the order of kills and starts does not change a bit of the
results.
"""

import contextlib
import glob
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from deepseek_jax.launch import _beginning, _conversations, _provenance, _reinforcement, _sampling, _sums_base
from deepseek_jax.launch._stages import R1, Record, Stage, configs_of, inherit_model
from deepseek_jax.launch._tables import print_table
from deepseek_jax.launch._training import execute, settle_products
from deepseek_jax.saved_config import to_json

if TYPE_CHECKING:
    from deepseek_jax.rl.rewards import Rewards
    from deepseek_jax.rl.step import Learner

ACCURACY = "accuracy"  # the reward that stages are judged by
ANSWERS = "answers.jsonl"  # in the folder of a stage that samples
COLUMNS = {  # figure of an evaluation: its title in the table
    "accuracy": "right",
    "greedy_accuracy": "greedy",
    "answer_length": "tokens",
    "thought": "with thought",
    "cut_off": "cut off",
}


class Judge:
    """Answers held-out problems with the weights of stages, of all as `config.rl` says."""

    def __init__(self, config: ConfigDict, rewards: "Rewards"):
        self._config, self._rewards = config, rewards
        self._learners: dict[str, Learner] = {}

    def figures(self, config: ConfigDict, origin: str) -> dict[str, float]:
        """Returns figures of the answers of the weights in `origin`, those of the stage with `config`."""
        from deepseek_jax.weights import WEIGHTS, open_weights

        weights, rl = open_weights(origin), self._config.rl
        own = self.asking(config, weights.config)
        key = json.dumps(to_json(own), sort_keys=True)
        if key not in self._learners:
            own.run.init_from = origin
            self._learners[key] = _reinforcement.prepare(own, self._rewards)
        learner = self._learners[key]
        settle_products(own)
        state = weights.read({name: learner.trainer.stored[name] for name in WEIGHTS})
        figures, _ = learner.evaluate(state, rl.eval_problems, rl.temperature)
        greedy, _ = learner.evaluate(state, rl.eval_problems, 0.0)
        return figures | {"greedy_accuracy": greedy[ACCURACY]}

    def asking(self, config: ConfigDict, there: ConfigDict) -> ConfigDict:
        """Returns the config to ask a stage with: the chain's, with the network of the stage and how that reads text.

        `there` is the config that its weights bring. Stages with equal configs share their programs; and since nothing
        else of a stage is in it, the figures do not depend on which of them was judged before.
        """
        own = _reinforcement.for_answers(self._config)
        inherit_model(own, config)
        own.fp8, own.release = config.fp8, there.release
        return own


class Place(NamedTuple):
    """A stage of a chain and where it is."""

    stage: Stage
    configs: dict[str, ConfigDict]  # of all stages
    workdir: Path  # of the chain
    again: str  # the command that resumes the chain, for messages
    stages: tuple[Stage, ...] = R1  # of the chain

    @property
    def config(self) -> ConfigDict:
        """The config of the stage, without the paths of what earlier stages made."""
        return self.configs[self.stage.name]

    @property
    def folder(self) -> Path:
        """The workdir of the stage."""
        return self.workdir / self.stage.name

    @property
    def origin(self) -> str:
        """Where the weights that it made are, or those that a base names."""
        named = self.config.run.init_from if self.stage.kind == "base" else ""
        return named or os.path.abspath(self.folder)

    def of(self, name: str) -> "Place":
        """Returns the place of another stage."""
        return self._replace(stage=next(stage for stage in self.stages if stage.name == name))


def run(config: ConfigDict, workdir: Path, again: str, stages: tuple[Stage, ...] = R1) -> int:
    """Runs the stages that are not done; returns the exit code, and prints the table at the end."""
    from deepseek_jax.compat import keep_freed_memory, start_compilation_cache
    from deepseek_jax.rl.rewards import Rewards
    from deepseek_jax.train.checkpoint.writer import WriterLock

    keep_freed_memory()
    _sampling.check_alone("r1")
    start_compilation_cache(config.run.compilation_cache)
    configs = configs_of(config, stages)
    records: dict[str, Record] = {}
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(WriterLock(workdir).release)
        rewards = stack.enter_context(Rewards({ACCURACY: 1.0}, config.rl.verifiers, config.rl.verify_s))
        judge = Judge(config, rewards)
        for stage in stages:
            place = Place(stage, configs, workdir, again, stages)
            records[stage.name] = Record(place.folder, stage, place.config, sources_of(place, records))
            code = advance(place, records, judge)
            if code is not None:
                return code
    print_results(stages, records)
    return 0


def advance(place: Place, records: dict[str, Record], judge: Judge) -> int | None:
    """Finishes a stage, unless it is done, and has it judged; returns an exit code if it was stopped."""
    stage, record = place.stage, records[place.stage.name]
    if record.made:
        record.check(mark_of(place))
    else:
        print(f"\n{stage.name}: {stage.says}", flush=True)
        code = KINDS[stage.kind](place)
        if code or not is_complete(place):
            return code
        record.write(made=mark_of(place))
    if stage.kind != "sample" and not record.content["held_out"]:
        record.write(held_out=judge.figures(place.config, place.origin))
        print(f"{stage.name}: {in_words(record.content['held_out'])}", flush=True)
    return None


def sources_of(place: Place, records: dict[str, Record]) -> dict[str, Any]:
    """Returns the marks of all that a stage is made from and judged by, apart from its config, by what they are."""
    config, stage = place.config, place.stage
    found: dict[str, Any] = {what: records[name].made for what in ("weights", "data") if (name := getattr(stage, what))}
    found["problems"] = _reinforcement.open_problems(config).fingerprint
    if stage.kind == "sft" and not stage.data and not _conversations.is_built_in(config):
        files = sorted(glob.glob(os.path.expanduser(config.data.source), recursive=True))
        found["data"] = {file: _provenance.file_mark(Path(file)) for file in files if os.path.isfile(file)}
    return found


def settled(place: Place) -> ConfigDict:
    """Returns the config of a stage with the weights and the text that earlier stages made."""
    config, stage = place.config.copy_and_resolve_references().unlock(), place.stage
    if stage.weights:
        config.run.init_from = place.of(stage.weights).origin
        _beginning.inherit(config, {}, place.folder)
    if stage.data:
        config.data.source = os.path.abspath(place.of(stage.data).folder / ANSWERS)
    config.data.cache_dir = config.data.cache_dir or os.path.abspath(place.workdir / "tokens")
    return config


def mark_of(place: Place) -> dict[str, Any]:
    """Returns the mark of what a stage made."""
    if place.stage.kind == "sample":
        return _provenance.file_mark(place.folder / ANSWERS)
    return _provenance.mark_of(place.origin)


def is_complete(place: Place) -> bool:
    """Returns whether a stage has come to its end, rather than been stopped."""
    from deepseek_jax.train.checkpoint.manifest import committed_steps

    if place.stage.kind == "sample":
        from deepseek_jax.rl.rejection import ABOUT

        progress = place.folder / (ANSWERS + ABOUT)
        return progress.exists() and json.loads(progress.read_bytes())["next"] >= place.config.sample.problems
    if place.stage.kind == "base" and place.config.run.init_from:
        return True
    return committed_steps(place.folder / "checkpoints")[-1:] == [place.config.loop.steps]


def make_base(place: Place) -> int:
    """Trains a base on text about the built-in problems, unless its config names weights."""
    config = settled(place)
    if config.run.init_from:
        return 0
    _sums_base.check_problems(config, f"config.r1.{place.stage.name}.run.init_from")
    config.data.source = str(_sums_base.write_text(config, place.folder / "text.jsonl"))
    return execute(config, place.folder, sample=False, again=place.again)


def fine_tune(place: Place) -> int:
    """Trains on conversations, as sft does."""
    config = settled(place)
    _conversations.settle_source(config, place.folder)
    return execute(config, place.folder, sample=False, again=place.again)


def reinforce(place: Place) -> int:
    """Trains by reinforcement, as rl does."""
    return execute(settled(place), place.folder, sample=False, again=place.again, run=_reinforcement.train)


def reject(place: Place) -> int:
    """Draws answers and keeps the right ones, as sample does."""
    return _sampling.run(settled(place), place.folder / ANSWERS, place.again)


KINDS: dict[str, Callable[[Place], int]] = {
    "base": make_base,
    "sft": fine_tune,
    "rl": reinforce,
    "sample": reject,
}


def in_words(figures: dict[str, float]) -> str:
    """Returns the figures of a stage in a line."""
    return ", ".join(f"{title} {shown(name, figures[name])}" for name, title in COLUMNS.items())


def shown(name: str, value: float) -> str:
    """Returns a figure as text."""
    return f"{value:.1f}" if name == "answer_length" else f"{value:.3f}"


def print_results(stages: tuple[Stage, ...], records: dict[str, Record]) -> None:
    """Prints how each stage answers held-out problems."""
    header = ("stage", "", "from", *COLUMNS.values())
    rows = []
    for stage in stages:
        if figures := records[stage.name].content["held_out"]:
            made_from = " + ".join(name for name in (stage.weights, stage.data) if name)
            rows.append((stage.name, stage.says, made_from, *(shown(name, figures[name]) for name in COLUMNS)))
    print("\nheld-out problems: share of right answers by draws and by the likeliest tokens; means over the draws")
    print_table(header, rows, right=tuple(COLUMNS.values()))
