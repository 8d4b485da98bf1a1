r"""Judge a model: by its answers to problems, by published benchmarks through lm-eval, or its loss by position.

    deepseek-jax evaluate --workdir=runs/tiny_zero --problems=sums --samples=8
    deepseek-jax evaluate --from=DeepSeek-R1-Distill-Qwen-7B --problems=aime.jsonl --samples=64 --answers=aime.answers
    deepseek-jax evaluate --from=DeepSeek-V2-Lite --tasks=arc_easy,hellaswag --limit=200
    deepseek-jax evaluate --workdir=runs/tiny_v3 --tasks=mine --tasks-dir=my_tasks
    deepseek-jax evaluate --workdir=runs/v3_128k --problems=needle:100000@50 --samples=1
    deepseek-jax evaluate --url=http://127.0.0.1:8000 --tasks=gsm8k --shots=5      # a server that runs already
    deepseek-jax evaluate --workdir=runs/v3_128k --by-position --limit=16
    deepseek-jax evaluate --from=DeepSeek-V2-Lite --by-position --text='books/*.txt' --length=32768

Problems are those of `deepseek-jax rl`: JSONL files, also in the form of GSM8K and of MATH, the built-in sums, tasks
of reasoning-gym, or a number to find in a long text: needle:1000 has 1,000 characters, and with @50 the number in their
middle. Each is answered once by the likeliest tokens and --samples times by draws (as R1's report has it, 64
at temperature 0.6 with top-p 0.95), on the engine that serves. Printed are pass@1 (the mean over the samples), pass@k,
maj@n (the vote of all samples) and greedy, each with a 95 % interval over problems (Wilson's). Answers kept with
--answers are not drawn again: the same command resumes, and a larger --samples adds to them. Of a list, the problems
that a run was trained on are left out: those of its config.rl.problems, wherever the list lies, and those that the
JSONL files of its config.data.source answer. How many these are is printed. Problems of kind code and
reasoning_gym have no maj@n, since their right answers need not be equal.

Tasks are those of lm-eval (`lm-eval ls tasks`) or those of a directory of yours; lm-eval loads their data. The engine
answers them in this process; with --url it is a server. Either way by ids, so the scores are of what is served. Every
text begins with the begin mark if the model's tokenizer asks for one. Needs pip install 'deepseek_jax[evaluate]'.

--by-position reads text, what a run has held out or --text, in sequences of the run's length or of --length tokens, and
prints the loss per token and per byte of positions 0 to 15, 16 to 31, 32 to 63 and so on: it falls as far as the model
makes use of its context.
"""

import json
import os
from pathlib import Path
from typing import Any

from deepseek_jax.bounds import SEED, number, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.launch import _options, _serving
from deepseek_jax.storage import Place

FLAGS = _serving.FLAGS | {
    "tasks": (str, "", "names of tasks, separated by commas"),
    "tasks_dir": (str, "", "directory with tasks of your own", path()),
    "url": (str, "", "a server that runs already, instead of --from or --workdir"),
    "shots": (int, -1, "worked examples in each prompt (default: as the task says)", whole(-1, 1000)),
    "limit": (
        int,
        0,
        "questions per task, or problems (default: all; of problems without end 512), or sequences of text (64)",
        whole(0, 10**9),
    ),
    "out": (str, "", "file for the results, as JSON", path()),
    "problems": (str, "", "problems to answer, instead of --tasks: sums:DIGITS, needle:LENGTH, rg:NAME or JSONL files"),
    "by_position": (bool, False, "loss on text by the positions of its tokens, instead of --tasks and --problems"),
    "text": (str, "", "files of text for --by-position (default: what the run has held out)"),
    "length": (int, 0, "tokens of a sequence there (default: as the run has it)", whole(0, 10**8)),
    "samples": (int, 64, "answers drawn to each problem", whole(0, 10**6)),
    "temperature": (float, 0.6, "at which they are drawn", number(0, 1e6, above=True)),
    "top_p": (float, 0.95, "draw from the likeliest tokens of this share", number(0, 1)),
    "max_tokens": (
        int,
        0,
        "tokens per answer at most (default: as a run has it; 32,768 or half of the positions of published weights)",
        whole(0, 10**9),
    ),
    "template": (str, "", "chat template, where the model's own is not found beside its tokenizer"),
    "thinking": (bool, None, "let the prompt open a thought (default: as the run did)"),
    "seed": (int, 0, "of the draws", SEED),
    "verifiers": (int, 2, "processes for answers that take long to verify", whole(1, 4096)),
    "answers": (str, "", "file that keeps every answer, as JSONL; resumes from it", path()),
}
KEY = "DEEPSEEK_JAX_API_KEY"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False, in_bucket=True)
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if [bool(tasks), bool(options.problems), options.by_position].count(True) != 1:
        raise UserError(
            "expected --tasks=NAME[,NAME…] (lm-eval ls tasks prints their names), --problems=SOURCE or --by-position: "
            "one of them."
        )
    if (options.text or options.length) and not options.by_position:
        raise UserError("--text and --length are of --by-position, which is not given. Leave them out.")
    if not tasks:
        return _answer(options)
    if options.url and (getattr(options, "from") or options.workdir):
        raise UserError("--url beside --from or --workdir: expected one of them.")
    source = "" if options.url else _serving.source_of(options)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Run pip install 'deepseek_jax[evaluate]'.") from None
    manager = TaskManager(include_path=options.tasks_dir or None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: lm-eval has no {', '.join(unknown)}. lm-eval ls tasks prints the names.")
    found = lm_eval.simple_evaluate(
        model=_model(options, source),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=None if options.shots < 0 else options.shots,
        limit=options.limit or None,
        bootstrap_iters=0,
    )
    print(make_table(found))
    if options.out:
        write_atomically(Path(options.out), json.dumps(found["results"], indent=1, default=str).encode())
    return 0


def _answer(options: Any) -> int:
    """Answers problems, or reads text, and reports what comes of it."""
    from deepseek_jax.launch import _by_position, _evaluation

    kind: Any = _by_position if options.by_position else _evaluation
    if options.url:
        what = "--by-position" if options.by_position else "--problems"
        raise UserError(f"--url beside {what}: expected --from=DIR or --workdir=RUN, whose model runs here.")
    found = kind.evaluate(options, _serving.source_of(options))
    kind.report(found)
    if options.out:
        write_atomically(Path(options.out), json.dumps(found, indent=1).encode())
    return 0


def _model(options: Any, source: Place | str) -> Any:
    """What lm-eval asks: a server, or an engine of this process."""
    from deepseek_jax.launch import _lm_eval

    if options.url:
        return _lm_eval.over_http(options.url.rstrip("/"), os.environ.get(KEY, ""), options.rows)
    model, engine = _serving.open_engine(options, source)
    engine.compile()
    return _lm_eval.InProcess(engine, model.tokenizer, model.end_ids)
