"""What weights and files are, so that one can say later what something was made from."""

import contextlib
import hashlib
import os
from typing import BinaryIO

from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place, Remote, open_store, place

PIECES, PIECE_BYTES = 64, 1 << 14  # of a file of published weights, spread over it


def mark_of(origin: str | Place) -> dict:
    """Returns what identifies weights: of a run its latest intact step and the sha256 of that step's manifest.

    That is the step that `weights.open_weights` reads. Its files are compared with the manifest, which holds their
    hashes: this reads the whole checkpoint. Published weights are known by `published_digest`.
    """
    from deepseek_jax.train.checkpoint import manifest
    from deepseek_jax.weights import checkpoint_directory, is_published

    if is_published(origin):
        return {"files": published_digest(origin)}
    directory = checkpoint_directory(origin)
    for step in reversed(manifest.committed_steps(directory)):
        path = manifest.step_dir(directory, step)
        with contextlib.suppress(manifest.CheckpointDamaged):
            manifest.verify(path, step)
            return {"step": step, "manifest": file_mark(path / manifest.MANIFEST)["sha256"]}
    raise UserError(f"{origin} has no intact checkpoint. Train it first.")


def check_unchanged(origin: str | Place, mark: dict) -> None:
    """Raises UserError if weights are no longer those of a mark: then others may have been read since it was taken."""
    now = mark_of(origin)
    if now != mark:
        raise UserError(
            f"{origin} has changed while its weights were read: {mark} was there, now it is {now}. Start again when "
            "its run has stopped."
        )


def published_digest(origin: str | Place) -> str:
    """Returns the sha256 of config.json and of the names, sizes and samples of the bytes of published weights.

    In a bucket of the names and generations of their objects, which change whenever one is written: a copy of the same
    weights has another digest.
    """
    from deepseek_jax.convert import hub

    directory, where = hub.local(origin), place(origin)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    if isinstance(where, Remote):
        store = open_store(where)
        for name in store.names():
            if "/" in name or not name.endswith(".safetensors"):
                continue
            digest.update(f"{name} {store.generation(name).hex()}\n".encode())
        return digest.hexdigest()
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb") as weights:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            digest.update(samples(weights, size))
    return digest.hexdigest()


def samples(file: BinaryIO, size: int) -> bytes:
    """Returns pieces of a file, its beginning and its end among them: other weights of the same sizes differ there."""
    found = []
    for n in range(PIECES):
        file.seek(max(size - PIECE_BYTES, 0) * n // (PIECES - 1))
        found.append(file.read(PIECE_BYTES))
    return b"".join(found)


def name_of(origin: str | Place) -> str:
    """Returns where weights are, for people: an absolute path, or the id of the hub."""
    where = place(origin)
    if isinstance(where, Remote):
        return str(where)
    return os.path.abspath(where) if where.is_dir() else str(origin)


def file_mark(path: Place) -> dict:
    """Returns what identifies a file."""
    content = open_store(path.parent).read(path.name) if isinstance(path, Remote) else path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest()}
