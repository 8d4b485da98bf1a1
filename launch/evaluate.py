r"""Run published benchmarks on a model, through lm-eval.

    deepseek-jax evaluate --from=DeepSeek-V2-Lite --tasks=arc_easy,hellaswag --limit=200
    deepseek-jax evaluate --workdir=runs/tiny_v3 --tasks=mine --tasks-dir=my_tasks
    deepseek-jax evaluate --url=http://127.0.0.1:8000 --tasks=gsm8k --shots=5      # a server that runs already

The tasks are those of lm-eval (`lm-eval ls tasks`) or those of a directory of yours; lm-eval loads their data. It asks
our server, which this verb starts for itself, for log-probabilities and continuations by ids, so the scores are of what
is served. Every text begins with the begin mark if the model's tokenizer asks for one. Needs
pip install 'deepseek_jax[evaluate]'.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.bounds import path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.launch import _options, _serving
from deepseek_jax.launch._http import ask

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
    with _address(options) as url:
        found = lm_eval.simple_evaluate(
            model=client(url, options.rows),
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


def client(url: str, n_concurrent: int) -> Any:
    """Returns lm-eval's client for a server, which knows the longest sequence and the begin mark of its model."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    key = os.environ.get(KEY, "")
    asked = ask(f"{url}/tokenize", key, {"prompt": "", "add_special_tokens": True})
    begin = asked["tokens"]

    class Client(LocalCompletionsAPI):
        def tok_encode(self, string: Any, left_truncate_len: int | None = None, **options: Any) -> Any:
            if left_truncate_len:
                left_truncate_len -= len(begin)
            ids = super().tok_encode(string, left_truncate_len=left_truncate_len, **options)
            return [*begin, *ids] if isinstance(string, str) else [[*begin, *one] for one in ids]

    return Client(
        base_url=f"{url}/v1/completions",
        model=ask(f"{url}/v1/models", key)["data"][0]["id"],
        tokenizer_backend="remote",
        max_length=asked["max_model_len"],
        num_concurrent=n_concurrent,
        auth_token=key or None,
        header={"Authorization": f"Bearer {key}"} if key else {},
    )


@contextlib.contextmanager
def _address(options: Any) -> Iterator[str]:
    if not options.url:
        with _serving.in_thread(_serving.open_service(options, _serving.source_of(options))) as url:
            yield url
    elif getattr(options, "from") or options.workdir:
        raise UserError("--url beside --from or --workdir: expected one of them.")
    else:
        yield options.url.rstrip("/")
