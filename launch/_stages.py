"""The stages of R1 as data, the config of each, and a record of what each was made from.

    base ── cold ── first ── kept        cold start, reinforcement learning, rejection sampling      R1 section 2.3.1-3
    base ── sft (kept) ── second         fine-tuning of the base on what was kept, learning again    R1 section 2.3.3-4
    student_base ── student (kept)       distillation into a smaller model                           R1 section 2.4
    student_base ── student_zero         reinforcement learning of that one alone, to compare        R1 section 4.1

A stage has a folder of its own in the workdir. `stage.json` there is its record: what it was made from (the config, and
marks of weights, problems and files), and once it is finished the mark of what it made. So a chain that was
killed anywhere knows what is done; and where something has changed since, it says what has, and stops.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.saved_config import completed, from_json, leaves, to_json

RECORD = "stage.json"
UNFINISHED = f"{RECORD}.partial"  # what a kill leaves of it
# Keys that do not change what a stage makes, but where, how fast, and what is kept and shown of it.
FREE: tuple[str, ...] = (
    "mesh.",
    "kernels.",
    "exchange.",
    "pipeline.",
    "data.workers",
    "data.cache_dir",
    "run.compilation_cache",
)
FREE += ("rl.verifiers", "rl.rows_at_once", "loop.log_every", "checkpoint.keep")


class Stage(NamedTuple):
    """One stage of a chain."""

    name: str  # of its folder, and of its group in `config.r1`
    kind: str  # key of `_chain.KINDS`
    says: str  # what it is, for people
    weights: str = ""  # the stage whose weights it begins with
    data: str = ""  # the stage whose answers it is trained on; "": what data.source names


R1 = (
    Stage("base", "base", "base model"),
    Stage("cold", "sft", "cold start", weights="base"),
    Stage("first", "rl", "reinforcement learning", weights="cold"),
    Stage("kept", "sample", "rejection sampling", weights="first"),
    Stage("sft", "sft", "fine-tuning of the base", weights="base", data="kept"),
    Stage("second", "rl", "reinforcement learning", weights="sft"),
    Stage("student_base", "base", "base of the student"),
    Stage("student", "sft", "distillation", weights="student_base", data="kept"),
    Stage("student_zero", "rl", "reinforcement learning alone", weights="student_base"),
)


def configs_of(config: ConfigDict, stages: tuple[Stage, ...] = R1) -> dict[str, ConfigDict]:
    """Returns the config of each stage, by name: `config` with the changes of its group in `config.r1`.

    A stage with weights has the model of the stage that they are from. Raises UserError for a group of no stage, for an
    unknown key, and for a value out of its bounds.
    """
    if unknown := sorted({*config.r1} - {stage.name for stage in stages}):
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"config.r1.{unknown[0]}: no such stage. Expected some of {names}.")
    if config.run.init_from:
        raise UserError("config.run.init_from: each base has its own. Set config.r1.base.run.init_from.")
    found: dict[str, ConfigDict] = {}
    for stage in stages:
        made = config.copy_and_resolve_references()
        with made.unlocked():
            made.r1 = ConfigDict()
            made.name = f"{config.name}_{stage.name}"
            if stage.weights:
                inherit_model(made, found[stage.weights])
            changed(made, config.r1.get(stage.name, ConfigDict()), f"config.r1.{stage.name}")
            if stage.kind == "base" and made.run.init_from:
                take_model(made)
        found[stage.name] = run_config.validate(made.lock())
    return found


def changed(config: ConfigDict, changes: ConfigDict, where: str) -> None:
    """Sets the keys of a group of changes in a config."""
    for path, value in leaves(changes).items():
        try:
            run_config.lookup(config, path)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        *groups, last = path.split(".")
        node = config
        for name in groups:
            node = node[name]
        node[last] = value


def inherit_model(config: ConfigDict, other: ConfigDict) -> None:
    """Takes the network of another stage, and how it reads text."""
    for key in ("family", "model", "precision"):
        config[key] = other[key]
    config.data.tokenizer, config.data.chat_template = other.data.tokenizer, other.data.chat_template


def take_model(config: ConfigDict) -> None:
    """Takes the network of the weights that a base names."""
    from deepseek_jax.weights import is_published, open_weights

    there = open_weights(config.run.init_from).config
    template = config.data.chat_template
    inherit_model(config, there)
    if is_published(config.run.init_from):  # these name a template beside the tokenizer, if at all
        config.data.chat_template = template


class Record:
    """The record of a stage in its folder.

    Args:
        workdir: of the stage.
        stage: which.
        config: of the stage, with what decides the result.
        sources: marks of the weights, data and problems that it is made from, by what they are.

    Raises UserError if the folder holds something made from anything else.
    """

    def __init__(self, workdir: Path, stage: Stage, config: ConfigDict, sources: dict[str, Any]):
        self.workdir, self._path = workdir, workdir / RECORD
        self.content: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "from": sources, "made": None}
        self.content |= {"held_out": None, "config": to_json(config)}
        if self._path.exists():
            saved = json.loads(self._path.read_bytes())
            check_same(self.workdir, saved, self.content)
            self.content |= {"made": saved["made"], "held_out": saved["held_out"]}
        elif workdir.exists() and any(file.name != UNFINISHED for file in workdir.iterdir()):
            raise UserError(f"{workdir} is not empty, and holds no {RECORD}: no stage made it. Give another --workdir.")
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            self.write()

    @property
    def made(self) -> dict[str, Any] | None:
        """The mark of what the stage made; None before it is finished."""
        return self.content["made"]

    def write(self, **found: Any) -> None:
        """Writes the record, with what is known now."""
        self.content |= found
        write_atomically(self._path, json.dumps(self.content, indent=1).encode())

    def check(self, mark: dict[str, Any]) -> None:
        """Raises UserError unless what lies there is still what a finished stage made."""
        if mark != self.made:
            raise UserError(
                f"{self.workdir} does not hold what its stage made: {json.dumps(self.made)} was there, now it is "
                f"{json.dumps(mark)}. Remove the folder, and those made from it, to make them again."
            )


def check_same(workdir: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError where two records of a stage are of different things."""
    from deepseek_jax.run import differences

    advice = "Remove that folder, and those made from it, to make them again; or give another --workdir."
    for what in sorted({*saved["from"], *now["from"]}):
        if saved["from"].get(what) != now["from"].get(what):
            raise UserError(f"{workdir} was made from other {what} than there are now. {advice}")
    for change in differences(*(completed(from_json(record["config"])) for record in (saved, now))):
        if not change.startswith(FREE):
            raise UserError(f"{workdir} was made with another config.{change}. {advice}")
