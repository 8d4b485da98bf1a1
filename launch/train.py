"""Train a model, or resume a run that was stopped or killed.

    deepseek-jax train                                        # a small DeepSeek-V3 on Python's own library
    deepseek-jax train --config=tiny_v3 --workdir=runs/a --config.loop.steps=2000
    deepseek-jax train --workdir=runs/a                       # resumes from the last checkpoint of runs/a
    deepseek-jax train --config=DIR --config.data.source='mine/*.txt'      # fine-tunes the model in DIR

DIR holds published weights (config.json and safetensors files) or is the workdir of a run. Family, sizes, tokenizer
and context length come from it; the recipe is a constant rate of 1e-5 after 20 steps of warm-up, batches of 8 sequences
of 2,048 tokens at most, 200 steps; any key of it can be set. --config.run.init_from=DIR alone does the same, and
beside a --config of your own it takes only weights, tokenizer and marks from DIR.

The workdir (runs/NAME by default) receives checkpoints/, metrics.jsonl and tensorboard/. It may be in a bucket,
--workdir=gs://BUCKET/FOLDER or s3://…, with the machine's own credentials; checkpoints go straight there, the other
files once a minute. Text, weights to begin with and tokenizers are local paths. SIGTERM, SIGHUP or Ctrl-C
saves and ends; the same command resumes the run as if nothing had happened, on any mesh that fits.

A signal to any process of several stops all of them within the step in flight and 5 s, and the time of a save. A
process that is lost is noticed within config.watch.heartbeat_s and 5 s; the others say so and end with exit code 75 (if
it is process 0, JAX may end them first, within a second and in its own words). So do processes that are alive but make
no progress (config.watch), with the stacks of their threads in hosts/ of the workdir. A second Ctrl-C ends without
saving the present step. Exit codes: 0 done, or saved after SIGTERM or SIGHUP; 130 saved after Ctrl-C, or broken off; 1
not saved; 2 something to correct; 75 another process was lost or cannot be reached, no progress, or saved after a
signal to another process: start all again, as deepseek-jax supervise does; 128 + the signal's number: stopped before
training.
"""

import os
import shlex
from pathlib import Path

from deepseek_jax import run_config
from deepseek_jax.launch import _beginning, _options
from deepseek_jax.launch._training import execute

DEFAULT = "tiny_v3"
EXTRA = {"sample": (bool, True, "end with a generated sample")}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT, EXTRA, in_bucket=True)
    config = options.config
    workdir = options.workdir or Path("runs") / config.name
    _beginning.leave_own_text(config, options.overrides)
    run_config.validate(config)
    _beginning.check_prepared(config, options.overrides)
    _beginning.check_bucket(workdir)
    _beginning.inherit(config, options.overrides, workdir)
    if Path(config.data.tokenizer).exists():  # so that the run's model finds it from anywhere
        config.data.tokenizer = os.path.abspath(config.data.tokenizer)
    again = argv if options.workdir else [*argv, f"--workdir={workdir}"]
    return execute(config, workdir, sample=options.sample, again=shlex.join(["deepseek-jax", "train", *again]))
