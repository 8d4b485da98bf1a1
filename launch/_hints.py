"""What a user may have meant by an unknown argument: the nearest flag, the config key of that name, a file."""

import difflib
import os
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from deepseek_jax.bounds import in_line
from deepseek_jax.saved_config import RENAMED, leaves

# What other trainers, and earlier versions of this one, call a key of ours.
FAMILIAR = RENAMED | {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
FAMILIAR |= {
    "batch": "batch.size",
    "block_size": "data.seq_len",
    "compile_cache": "run.compilation_cache",
    "context_length": "data.seq_len",
    "data": "data.source",
    "dataset": "data.source",
    "gradient_accumulation_steps": "pipeline.micro_batches",
    "iterations": "loop.steps",
    "learning_rate": "schedule.peak_rate",
    "lr": "schedule.peak_rate",
    "max_iters": "loop.steps",
    "max_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_steps": "loop.steps",
    "n_steps": "loop.steps",
    "num_train_steps": "loop.steps",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "train_file": "data.source",
    "warmup": "schedule.warmup_steps",
}
DIRECTORY = {"dir", "out", "out_dir", "output", "output_dir", "run", "run_dir", "work_dir"}


def unknown_flag(word: str, flags: Iterable[str], defaults: ConfigDict | None) -> str:
    """Returns what to do instead of `--word`, which may have a value behind `=`.

    Args:
      word: as given, without its dashes.
      flags: names of the flags there are.
      defaults: the keys that any config has, or None where the verb takes no config.
    """
    name, equals, value = word.partition("=")
    name, given = name.replace("-", "_"), f"{equals}{in_line(value)}"
    flags, keys = list(flags), [] if defaults is None else list(leaves(defaults))
    if "workdir" in flags and name in DIRECTORY:
        return f"Did you mean --workdir{given}?"
    familiar = [FAMILIAR[name]] if keys and name in FAMILIAR else []
    if meant := familiar or [key for key in keys if key == name or _last(key) == name]:
        return f"Did you mean {' or '.join(f'--config.{key}{given}' for key in meant)}?"
    known = [f"--{flag}" for flag in flags]
    if near := difflib.get_close_matches(f"--{name.replace('_', '-')}", known, n=1):
        return f"Did you mean {near[0]}{given}? Flags: {_list(known, keys)}."
    if near := difflib.get_close_matches(name, map(_last, keys), n=1, cutoff=0.75):
        return f"Did you mean {' or '.join(f'--config.{key}{given}' for key in keys if _last(key) == near[0])}?"
    return f"Flags: {_list(known, keys)}."


def unexpected_argument(word: str, flags: Iterable[str], configs: Sequence[str], defaults: ConfigDict | None) -> str:
    """Returns what to do instead of a word without dashes; `configs` are the names that `--config` knows."""
    bare = word.lstrip("-")
    name = bare.partition("=")[0]
    keys = [] if defaults is None else list(leaves(defaults))
    if name in flags or (name.removeprefix("config.") in keys and name.startswith("config.")):
        return f"Did you mean --{bare}?"
    if defaults is not None and bare in configs:
        return f"Did you mean --config={bare}?"
    if "=" in bare and (hint := unknown_flag(bare, flags, defaults)).startswith("Did you mean"):
        return hint
    if defaults is not None and os.path.exists(bare):
        key = "config" if bare.endswith(".py") else "config.data.source"
        return f"Did you mean --{key}={bare}?"
    return "Write values as --name=VALUE; see --help."


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _list(known: Sequence[str], keys: Sequence[str]) -> str:
    return ", ".join([*known, *(["--config.a.b=VALUE"] if keys else [])])
