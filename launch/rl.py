"""Reinforcement learning with GRPO, or resume a run that was stopped or killed.

    deepseek-jax rl                                         # R1-Zero in miniature, its base model included
    deepseek-jax rl --workdir=runs/a --config.loop.steps=80
    deepseek-jax rl --config=tiny_zero --config.run.init_from=runs/base --config.rl.problems=mine.jsonl
    deepseek-jax rl --config=tiny_opd --config.rl.teacher=runs/tiny_zero          # on-policy distillation
    deepseek-jax rl --config=DIR --config.rl.problems=rg:leg_counting --config.data.chat_template=r1

Answers to problems (config.rl.problems) are drawn from the model, scored by rules (config.rl.rewards) and learnt from
by GRPO (config.rl.grpo) alone: losses that balance experts, and that of multi-token prediction, have no part in
it. The model comes from config.run.init_from, a run or published weights. Without it, and with the built-in problems, a
small base is trained first, in `base` of the workdir, on text of mixed quality about them. Weights that are named
without --config, or by it, bring the recipe of fine-tuning, as for train.

With config.rl.teacher, a run or published weights with the same tokenizer, answers are learnt from token by token as
that model judges them (on-policy distillation); rewards are reported only.

Every config.loop.eval_every steps held-out problems are answered by draws and by the likeliest tokens; some of these
answers are written to samples.jsonl. RL brings out what the base can do already: compare with the line of step 0.

The workdir (runs/NAME by default) receives checkpoints/, metrics.jsonl, samples.jsonl and tensorboard/. SIGTERM, SIGHUP
or Ctrl-C saves and ends; the same command resumes the run as if nothing had happened. Exit codes as for train, and
several machines join as there; not along a pipeline or over divided sequences.
"""

import os
import shlex
from pathlib import Path

from deepseek_jax import run_config
from deepseek_jax.launch import _beginning, _options
from deepseek_jax.launch._reinforcement import inherit_template, train
from deepseek_jax.launch._sums_base import train_base
from deepseek_jax.launch._training import execute
from deepseek_jax.paths import check_writable

DEFAULT = "tiny_zero"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT, in_bucket=True)
    config = options.config
    workdir = options.workdir or Path("runs") / config.name
    run_config.validate(config)
    if config.name.endswith(_beginning.TUNED):
        print(
            f"recipe: that of fine-tuning, rate {config.schedule.peak_rate:g}, {config.loop.steps} steps. A config has "
            "one of reinforcement learning (--config=tiny_zero, r1_zero, …), which --config.run.init_from goes with.",
            flush=True,
        )
    again = shlex.join(["deepseek-jax", "rl", *(argv if options.workdir else [*argv, f"--workdir={workdir}"])])
    _beginning.check_bucket(workdir)
    if isinstance(workdir, Path):
        check_writable(workdir, "--workdir")
    if config.rl.teacher:
        config.rl.teacher = _beginning.directory(config.rl.teacher, "config.rl.teacher")
    config.run.init_from = config.run.init_from or _beginning.of_run(workdir)
    if not config.run.init_from:
        code = train_base(config, workdir / "base", again)
        if code is not None:
            return code
        base = workdir / "base"
        config.run.init_from = os.path.abspath(base) if isinstance(base, Path) else str(base)
    _beginning.inherit(config, options.overrides, workdir)
    inherit_template(config)
    if Path(config.data.tokenizer).exists():  # so that the run's model finds it from anywhere
        config.data.tokenizer = os.path.abspath(config.data.tokenizer)
    return execute(config, workdir, sample=False, again=again, run=train)
