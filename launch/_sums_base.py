"""A base model for the built-in problems, trained on text of mixed quality about them."""

import itertools
import json
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch._reinforcement import open_problems
from deepseek_jax.launch._training import execute
from deepseek_jax.storage import Place

BASE = "tiny_sums"
BASE_TEXT = 24_000  # conversations that the base reads


def train_base(config: ConfigDict, workdir: Place, again: str) -> int | None:
    """Trains the base of the built-in problems, unless that is done; returns None then, otherwise the exit code."""
    from deepseek_jax.train.checkpoint.manifest import committed_steps
    from deepseek_jax.train.mirror import local

    check_problems(config, "config.run.init_from")
    base = run_config.load(BASE)
    for key in ("seed", "precision", "model", "mesh", "sharding", "kernels"):
        base[key] = config[key]
    base.data.source = str(write_text(config, local(workdir) / "text.jsonl"))
    base.data.cache_dir = str(workdir / "tokens") if isinstance(workdir, Path) else ""
    if base.loop.steps in committed_steps(workdir / "checkpoints"):
        return None
    print(f"first a base model, which reads {BASE_TEXT:,} answers of mixed quality, in {workdir}", flush=True)
    code = execute(run_config.validate(base), workdir, sample=False, again=again)
    return None if not code and base.loop.steps in committed_steps(workdir / "checkpoints") else code


def check_problems(config: ConfigDict, key: str) -> None:
    """Raises UserError unless the problems are built-in ones; `key` names another base."""
    if config.rl.problems.partition(":")[0] != "sums":
        raise UserError(
            f"config.rl.problems={config.rl.problems} needs a model that can solve some of them. Name a run or "
            f"published weights: --{key}=DIR."
        )


def write_text(config: ConfigDict, path: Path) -> Path:
    """Writes the text of the base, conversations about problems that are not held out; returns where it is."""
    from deepseek_jax.files import write_once
    from deepseek_jax.rl import sums

    problems = open_problems(config)
    about, note = f"{problems.fingerprint}, seed {config.seed}\n", path.with_name("problems.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not write_once(note, about.encode()):
        raise UserError(
            f"{path.parent} holds a base that has read about other problems (share held out, seed): "
            f"{note.read_text(encoding='utf-8').strip()}. Expected: {about.strip()}. "
            "Give the same settings, or another --workdir."
        )
    questions = (problems.training(number).messages[0]["content"] for number in itertools.count())
    rows = sums.rows(itertools.islice(questions, BASE_TEXT))
    if not path.exists():
        write_once(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path
