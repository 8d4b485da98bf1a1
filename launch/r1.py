r"""The whole chain of R1: cold start, reinforcement learning twice, rejection sampling, distillation.

    deepseek-jax r1                                          # in miniature, all models included
    deepseek-jax r1 --workdir=runs/r1 --config.r1.first.loop.steps=80
    deepseek-jax r1 --config=r1_stages --config.rl.problems=mine.jsonl --config.r1.cold.data.source=worked.jsonl \
        --config.r1.base.run.init_from=DIR --config.r1.student_base.run.init_from=SMALL

    base           a base model                                            r1.base.run.init_from, or trained here
    cold           fine-tunes it on worked answers                         R1 section 2.3.1; r1.cold.data.source
    first          reinforcement learning                                  section 2.3.2
    kept           draws answers, keeps the right ones                     section 2.3.3; config.sample
    sft            fine-tunes the base on these                            section 2.3.3
    second         reinforcement learning                                  section 2.3.4
    student_base   a smaller base model
    student        fine-tunes that one on the answers kept: distillation   section 2.4
    student_zero   reinforcement learning of it alone, to compare          section 4.1

Each stage has a folder in the workdir (runs/NAME by default) and its own group of changes to the config,
config.r1.STAGE, any key of which can be set. `stage.json` in the folder says what it was made from: config, weights,
problems, files, by their hashes (published weights by names and sizes). SIGTERM, SIGHUP or Ctrl-C saves and ends, and
the same command resumes, also after a kill; what is done is checked and skipped. The end is a table: how each stage
answers held-out problems. Exit codes as for train.
"""

import shlex
from pathlib import Path

from deepseek_jax import run_config
from deepseek_jax.launch import _chain, _options
from deepseek_jax.paths import check_writable

DEFAULT = "tiny_r1"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT)
    workdir = options.workdir or Path("runs") / options.config.name
    config = run_config.validate(options.config)
    check_writable(workdir, "--workdir")
    again = argv if options.workdir else [*argv, f"--workdir={workdir}"]
    return _chain.run(config, workdir, shlex.join(["deepseek-jax", "r1", *again]))
