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
it holds out); needle:200 asks for a number in a text of 200 characters (deepseek-jax evaluate --problems=needle:200).

DIR holds published weights or is the workdir of a run; --config=DIR brings a recipe for fine-tuning, any key of which
can be set (`deepseek-jax train --help`). The chat template is the model's own; data.chat_template names another one,
which a base model needs.

--config.lora.rank=16 trains low-rank adapters alone (LoRA); `deepseek-jax export --adapters` writes them for PEFT.

At the end, answers to held-out conversations are shown beside those expected. Workdir, signals and exit codes are as
for train.
"""

import os
import shlex
from pathlib import Path

from deepseek_jax import run_config
from deepseek_jax.launch import _beginning, _options
from deepseek_jax.launch._conversations import settle_source
from deepseek_jax.launch._reinforcement import inherit_template
from deepseek_jax.launch._training import execute

DEFAULT = "tiny_sft"
EXTRA = {"sample": (bool, True, "end with answers to held-out conversations")}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT, EXTRA, in_bucket=True)
    config = options.config
    workdir = options.workdir or Path("runs") / config.name
    run_config.validate(config)
    _beginning.check_bucket(workdir)
    settle_source(config, workdir)
    _beginning.inherit(config, options.overrides, workdir)
    if config.run.init_from:
        inherit_template(config)
    if Path(config.data.tokenizer).exists():  # so that the run's model finds it from anywhere
        config.data.tokenizer = os.path.abspath(config.data.tokenizer)
    again = argv if options.workdir else [*argv, f"--workdir={workdir}"]
    return execute(config, workdir, sample=options.sample, again=shlex.join(["deepseek-jax", "sft", *again]))
