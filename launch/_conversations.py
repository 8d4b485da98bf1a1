"""Conversations to fine-tune on, as verbs name them: files, or the built-in problems with worked answers."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_writable
from deepseek_jax.storage import Place

N_BUILT_IN = 6_000  # conversations


def settle_source(config: ConfigDict, workdir: Place) -> None:
    """Settles that the source holds conversations, and writes built-in ones in `workdir`.

    Raises UserError for a source of text, or a workdir that cannot be written.
    """
    if config.data.source == "stdlib" or config.data.format == "text":
        raise UserError(
            f"config.data.source={config.data.source} with data.format={config.data.format} is text, not "
            'conversations. Give --config.data.source=FILES, JSONL with a row {"messages": [...]} per line, or '
            "sums:6 or needle:200; deepseek-jax train is for text."
        )
    config.data.format = "conversations"
    if is_built_in(config):
        from deepseek_jax.train.mirror import local

        folder = local(workdir)
        check_writable(folder, "--workdir")
        config.data.source = str(write_built_in(config, folder / "conversations.jsonl"))


def is_built_in(config: ConfigDict) -> bool:
    """Returns whether the source is one of the built-in problems."""
    from deepseek_jax.rl.problems import BUILT_IN

    return _name(config) in BUILT_IN


def _name(config: ConfigDict) -> str:
    return config.data.source.partition(":")[0]


def write_built_in(config: ConfigDict, path: Path) -> Path:
    """Writes the conversations of the built-in problems that `data.source` names; returns where they are.

    Raises UserError if others are there, which a run may be reading.
    """
    from deepseek_jax.files import write_once
    from deepseek_jax.rl.problems import BUILT_IN, open_problems

    rows = BUILT_IN[_name(config)].worked(
        open_problems(config.data.source, config.seed, config.rl.holdout_rate), N_BUILT_IN
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if not write_once(path, "".join(json.dumps(row) + "\n" for row in rows).encode()):
        raise UserError(
            f"{path} holds other conversations than config.data.source={config.data.source} gives with this seed and "
            "config.rl.holdout_rate. Give the same settings, or another --workdir."
        )
    return path.absolute()
