"""Draw answers to problems, and keep the right ones for fine-tuning: rejection sampling.

    deepseek-jax sample --workdir=runs/tiny_zero --out=kept.jsonl                # problems and rewards as in that run
    deepseek-jax sample --from=DIR --out=kept.jsonl --config.rl.problems=mine.jsonl --config.sample.answers=16
    deepseek-jax sft --config=tiny_sft --config.run.init_from=runs/base --config.data.source=kept.jsonl

Of the config.sample.answers that are drawn to each of config.sample.problems training problems (each of a list once at
most), those are kept that are right (by the problem's kind), well-formed, in one language and not too long:
config.sample.least and config.sample.longest; at most config.sample.most per problem, the shortest first
(config.sample.choose=first: in the order of the draws). Answers are drawn at config.rl.temperature and config.rl.top_p,
rl.questions x rl.answers at a time. Without --config the config is that of the weights.

OUT receives a row {"problem": number, "messages": [...], "thinking": ...} per kept answer. OUT.about says which
weights, problems, seed and rules it comes from, how many answers were dropped and why. SIGTERM, SIGHUP or Ctrl-C ends
after the batch; the same command continues, also after a kill or with more problems, and the file is the one that would
have been written at once. Exit codes as for train.
"""

import shlex
from pathlib import Path

from deepseek_jax import run_config
from deepseek_jax.bounds import path
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _options, _serving
from deepseek_jax.launch._reinforcement import inherit_template
from deepseek_jax.launch._sampling import run
from deepseek_jax.paths import check_writable

FLAGS = {
    "from": (str, "", "directory of published weights, or their id on the hub", path()),
    "out": (Path, _options.REQUIRED, "file for the kept answers, such as kept.jsonl"),
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, of_weights=True)
    origin, out = _beginning.directory(str(_serving.source_of(options)), "--workdir"), options.out.expanduser()
    if given := [key for key in options.overrides if key.startswith("lora.")]:
        raise UserError(
            f"config.{given[0]}: adapters are part of the weights of the run that trained them. Leave the key out, and "
            "give that run: --workdir=RUN."
        )
    config = options.config or _options.config_of_weights(origin, options.overrides)
    config.run.init_from = origin
    if out.suffix != ".jsonl":
        raise UserError(f"--out={out}: expected a name that ends in .jsonl.")
    check_writable(out.parent, "--out")
    run_config.validate(config)
    _beginning.inherit(config, options.overrides, out)
    inherit_template(config)
    return run(config, out, shlex.join(["deepseek-jax", "sample", *argv]))
