"""Checkpoints in format 1, as they were written before each process wrote shards of its own: by Orbax."""

from pathlib import Path

import orbax.checkpoint as ocp

from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.checkpoint.tree import flatten


def write_format_1(directory: Path, step: int, state: dict, meta: dict) -> None:
    """Writes a step."""
    path = manifest.step_dir(directory, step)
    path.mkdir(parents=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(path / manifest.ARRAYS, args=ocp.args.PyTreeSave(state))
    for name, text in manifest.of_meta(meta).items():
        (path / name).write_bytes(text)
    shapes = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in flatten(state).items()}
    manifest.commit(path, step, shapes)
