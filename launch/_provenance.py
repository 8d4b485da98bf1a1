"""What weights and files are, so that one can say later what something was made from."""

import hashlib
import os
from pathlib import Path

from deepseek_jax.errors import UserError


def mark_of(origin: str | Path) -> dict:
    """Returns what identifies weights: of a run its latest step and the sha256 of that step's manifest.

    The manifest holds the hash of every file of the checkpoint, which are verified when they are read. Published
    weights are known by the names and sizes of their files and the content of config.json.
    """
    from deepseek_jax.train.checkpoint import manifest
    from deepseek_jax.weights import checkpoint_directory, is_published

    if is_published(origin):
        return {"files": published_digest(origin)}
    directory = checkpoint_directory(origin)
    steps = manifest.committed_steps(directory)
    if not steps:
        raise UserError(f"{origin} has no checkpoint. Train it first.")
    content = (manifest.step_dir(directory, steps[-1]) / manifest.MANIFEST).read_bytes()
    return {"step": steps[-1], "manifest": hashlib.sha256(content).hexdigest()}


def published_digest(origin: str | Path) -> str:
    """Returns the sha256 of the names and sizes of published weights, and of their config.json."""
    from deepseek_jax.convert import hub

    directory = Path(hub.local(os.fspath(origin))).expanduser()
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def name_of(origin: str | Path) -> str:
    """Returns where weights are, for people: an absolute path, or the id of the hub."""
    return os.path.abspath(origin) if os.path.isdir(origin) else os.fspath(origin)


def file_mark(path: Path) -> dict:
    """Returns what identifies a file."""
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
