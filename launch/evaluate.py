r"""Run published benchmarks on a model, through lm-eval.

    deepseek-jax evaluate --from=DeepSeek-V2-Lite --tasks=arc_easy,hellaswag --limit=200
    deepseek-jax evaluate --workdir=runs/tiny_v3 --tasks=mine --tasks-dir=my_tasks
    deepseek-jax evaluate --url=http://127.0.0.1:8000 --tasks=gsm8k --shots=5      # a server that runs already

The tasks are those of lm-eval (`lm-eval ls tasks`) or those of a directory of yours; lm-eval loads their data. The
engine that serves answers them, in this process; with --url it is a server. Either way by ids, so the scores are of
what is served. Every text begins with the begin mark if the model's tokenizer asks for one. Needs
pip install 'deepseek_jax[evaluate]'.
"""

import json
import os
from pathlib import Path
from typing import Any

from deepseek_jax.bounds import path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.launch import _options, _serving

FLAGS = _serving.FLAGS | {
    "tasks": (str, "", "names of tasks, separated by commas"),
    "tasks_dir": (str, "", "directory with tasks of your own", path()),
    "url": (str, "", "a server that runs already, instead of --from or --workdir"),
    "shots": (int, -1, "worked examples in each prompt (default: as the task says)", whole(-1, 1000)),
    "limit": (int, 0, "questions per task (default: all)", whole(0, 10**9)),
    "out": (str, "", "file for the results, as JSON", path()),
}
KEY = "DEEPSEEK_JAX_API_KEY"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False)
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise UserError("expected --tasks=NAME[,NAME…]; lm-eval ls tasks prints their names.")
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


def _model(options: Any, source: Path | str) -> Any:
    """What lm-eval asks: a server, or an engine of this process."""
    from deepseek_jax.launch import _lm_eval

    if options.url:
        return _lm_eval.over_http(options.url.rstrip("/"), os.environ.get(KEY, ""), options.rows)
    model, engine = _serving.open_engine(options, source)
    engine.compile()
    return _lm_eval.InProcess(engine, model.tokenizer, model.end_ids)
