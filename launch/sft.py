"""Supervised fine-tuning on conversations, or resume a run that was stopped or killed.

    deepseek-jax sft                                        # a tiny model learns to think through sums, from scratch
    deepseek-jax sft --config=DIR --config.data.source='chats/*.jsonl'   # fine-tunes the model in DIR
    deepseek-jax sft --config=tiny_sft --config.run.init_from=runs/base  # the recipe of tiny_sft, the weights of a run
    deepseek-jax sft --workdir=runs/tiny_sft                # resumes from the last checkpoint

This is `deepseek-jax train` on conversations: only the assistant's answers are learnt, end marks included, each after
exactly the prompt that it has at inference. data.source names JSONL, JSON or parquet files (also .gz and .zst) with
rows {"messages": [...]}, optionally with "tools" and "thinking"; every invalid row is named by file and line. An answer
may have reasoning_content, tool_calls and "weight": 0, which makes it context. Or data.source=sums:6 are built-in
problems with the right answers, thought through: a cold start for `deepseek-jax rl` (none of them is among those that
it holds out).

DIR holds published weights or is the workdir of a run; --config=DIR brings a recipe for fine-tuning, any key of which
can be set (`deepseek-jax train --help`). The chat template is the model's own; data.chat_template names another one,
which a base model needs.

At the end, answers to held-out conversations are shown beside those expected. Workdir, signals and exit codes are as
for train.
"""

import json
import os
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _options
from deepseek_jax.launch._reinforcement import inherit_template
from deepseek_jax.launch._training import execute
from deepseek_jax.paths import check_writable

DEFAULT = "tiny_sft"
EXTRA = {"sample": (bool, True, "end with answers to held-out conversations")}
BUILT_IN = "sums"
N_BUILT_IN = 6_000  # conversations


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT, EXTRA)
    config = options.config
    workdir = options.workdir or Path("runs") / config.name
    check_source(config)
    run_config.validate(config)
    if config.data.source.partition(":")[0] == BUILT_IN:
        check_writable(workdir, "--workdir")
        config.data.source = str(write_built_in(config, workdir / "conversations.jsonl"))
    _beginning.inherit(config, options.overrides, workdir)
    if config.run.init_from:
        inherit_template(config)
    if Path(config.data.tokenizer).exists():  # so that the run's model finds it from anywhere
        config.data.tokenizer = os.path.abspath(config.data.tokenizer)
    again = argv if options.workdir else [*argv, f"--workdir={workdir}"]
    return execute(config, workdir, sample=options.sample, again=shlex.join(["deepseek-jax", "sft", *again]))


def check_source(config: ConfigDict) -> None:
    """Settles that the source holds conversations. Raises UserError for one of text."""
    if config.data.source == "stdlib" or config.data.format == "text":
        raise UserError(
            f"config.data.source={config.data.source} with data.format={config.data.format} is text, not "
            'conversations. Give --config.data.source=FILES, JSONL with a row {"messages": [...]} per line, or '
            "sums:6; deepseek-jax train is for text."
        )
    config.data.format = "conversations"


def write_built_in(config: ConfigDict, path: Path) -> Path:
    """Writes the conversations of the built-in problems that `data.source` names; returns where they are."""
    from deepseek_jax.files import write_atomically
    from deepseek_jax.rl.problems import open_problems
    from deepseek_jax.rl.sums import worked

    rows = worked(open_problems(config.data.source, config.seed, config.rl.holdout_rate), N_BUILT_IN)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path.absolute()
