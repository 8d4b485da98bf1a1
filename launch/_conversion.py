"""`deepseek-jax convert`, once its command line has been read: from the published files to a checkpoint."""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import deepseek_jax
from deepseek_jax import release
from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.compat import peak_memory_bytes
from deepseek_jax.convert import hub
from deepseek_jax.convert.hf import Source, copy_files, open_published
from deepseek_jax.convert.safetensors.read import Tensors
from deepseek_jax.errors import UserError
from deepseek_jax.launch._progress import Progress
from deepseek_jax.saved_config import to_json
from deepseek_jax.storage import Place, Remote, answered, open_store
from deepseek_jax.train.checkpoint import manifest, tree
from deepseek_jax.train.checkpoint.manifest import step_dir
from deepseek_jax.train.checkpoint.streamed import PENDING_BYTES, StreamedStep
from deepseek_jax.units import binary, duration
from deepseek_jax.weights import published_config

STEP = 0
PROGRAM_BYTES = 2**29  # of memory: the interpreter and its libraries
SPARE_BYTES = 2**26  # of disk


def convert(source: Place, workdir: Path, dtype: str, to: str | None) -> None:
    """Writes the weights of `source` as step 0 of `workdir`, continuing what an earlier start has left."""
    directory = hub.local(source)
    source = source if isinstance(source, Remote) else directory
    published = open_published(source)
    if directory.resolve() == workdir.resolve():
        raise UserError(f"--workdir={workdir} is the published directory itself. Give another one.")
    origin, checkpoints = describe(source, dtype), workdir / "checkpoints"
    config = published_config(published, directory.resolve())
    if is_there(checkpoints, origin):
        return check_others(release.files(config), workdir)
    pieces = Source(published, abstract_weights(config))
    arrays = arrays_to_write(pieces.abstract, to)
    assert published.tensors is not None  # else `Source` has raised
    plan = planned(checkpoints, arrays, published.tensors, to)
    print(f"{source}: family {config.family}, {plan}", flush=True)
    with StreamedStep(checkpoints, STEP, arrays, origin, watch=Progress) as step:
        report_earlier_start(step, workdir)
        copy_files(release.files(config), workdir)
        config = release.moved(config, workdir)
        if config.data.tokenizer == "none":
            print("warning: no tokenizer.json beside the weights: they will take ids and no text.", file=sys.stderr)
        config.precision = config.precision if dtype == "keep" else dtype
        took_s = write(pieces, step, arrays)
        if describe(source, dtype) != origin:
            raise UserError(
                f"{source}: files were replaced or changed while they were converted. Delete {step.path} and "
                f"{step.path.name}.journal beside it, and start again with files at rest."
            )
        step.commit({"config": to_json(config), "converted": origin})
    print(f"{step.path}: done in {duration(took_s)}, peak memory {binary(peak_memory_bytes() or 0)}")


def arrays_to_write(abstract: dict, dtype: str | None) -> dict[str, tuple]:
    """Name -> (shape, dtype) of what is written: `dtype` for weights, or their own for None."""

    def kind(name: str, leaf: jax.ShapeDtypeStruct) -> np.dtype:
        return np.dtype(dtype if dtype and name.startswith("params/") else leaf.dtype)

    leaves = tree.flatten(abstract, leaf_types=object)
    return {name: (leaf.shape, kind(name, leaf)) for name, leaf in leaves.items()}


def planned(checkpoints: Path, arrays: dict[str, tuple], tensors: Tensors, dtype: str | None) -> str:
    """Returns what a conversion takes, as text. Raises UserError if the disk has too little space."""
    n_bytes = sum(math.prod(shape) * kind.itemsize for shape, kind in arrays.values())
    check_space(checkpoints, n_bytes)
    bound = memory_bound(tensors, dtype) + PROGRAM_BYTES + 2 * PENDING_BYTES
    return f"{n_bytes / 1e9:,.2f} GB to write, memory at most {binary(bound)}"


def report_earlier_start(step: StreamedStep, workdir: Path) -> None:
    """Reports what an earlier start has written of a step, and what of it is damaged."""
    if step.n_damaged:
        print(f"{step.n_damaged} pieces of an earlier start are damaged: they are written again", file=sys.stderr)
    if step.resumed:
        share = step.n_bytes_done / step.n_bytes
        print(f"resuming an earlier start: {share:.0%} of {workdir} is written already", flush=True)


def write(pieces: Source, step: StreamedStep, arrays: dict[str, tuple]) -> float:
    """Writes all pieces that a step does not have yet; returns the seconds that it took."""

    def is_done(path: tuple[str, ...], index: tuple[int, ...]) -> bool:
        return step.is_done("/".join(path), index)

    with Progress("convert", step.n_bytes, step.n_bytes_done) as progress:
        for piece in pieces.pieces(skip=is_done):
            name = "/".join(piece.path)
            array = piece.array.astype(arrays[name][1], copy=False)
            step.write(name, piece.index, array)
            progress.advance(array.nbytes)
            del piece, array
        step.flush()
    return progress.seconds


def describe(source: Place, dtype: str) -> str:
    """A line that is the same for the same conversion: where from, as what, and a hash of names, sizes and times."""
    parts: list[Any] = [dtype, deepseek_jax.__version__]
    if isinstance(source, Remote):
        store, kinds = open_store(source), (".json", ".safetensors")
        with answered():
            names = [name for name in store.names() if name.endswith(kinds) and "/" not in name]
            parts += [[name, store.generation(name).hex()] for name in names]
        return f"{source} as {dtype} ({_digest(parts)})"
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            status = file.stat()
            parts.append([file.name, status.st_size, status.st_mtime_ns])
    return f"{source.resolve()} as {dtype} ({_digest(parts)})"


def _digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def is_there(checkpoints: Path, origin: str) -> bool:
    """Whether this very conversion is finished, and intact to the last byte.

    Raises UserError where it is damaged, or where another checkpoint stands in its place.
    """
    steps = manifest.committed_steps(checkpoints)
    if not steps:
        return False
    path = manifest.step_dir(checkpoints, STEP)
    if steps == [STEP]:
        try:
            manifest.verify(path, STEP, only=(manifest.META,))
            if json.loads((path / manifest.META).read_bytes()).get("converted") == origin:
                files = manifest.read_manifest(path, STEP)["files"]
                with Progress("check", sum(file["size"] for file in files.values())) as progress:
                    manifest.verify(path, STEP, report=progress.advance)
                return True
        except manifest.CheckpointDamaged as damage:
            raise UserError(f"{path} is damaged: {damage}. Delete it and start the same command again.") from None
    raise UserError(f"{checkpoints} holds checkpoints of something else, steps {steps}. Give another --workdir.")


def check_others(files: dict[str, Path | bytes], workdir: Path) -> None:
    """Reports that a finished conversion is intact.

    Missing small files beside it are copied again; those that differ from the source's are reported by name.
    """
    missing = {name: content for name, content in files.items() if not (workdir / name).is_file()}
    copy_files(missing, workdir)
    contents = {name: file.read_bytes() if isinstance(file, Path) else file for name, file in files.items()}
    differing = [name for name, content in contents.items() if (workdir / name).read_bytes() != content]
    if differing:
        print(f"warning: other than in the source: {', '.join(differing)} in {workdir}", file=sys.stderr)
    copied = f"{', '.join(missing)} copied again" if missing else "nothing to do"
    print(f"{workdir} holds this conversion already, and its weights are intact: {copied}.")


def check_space(checkpoints: Path, n_bytes: int) -> None:
    """Raises UserError unless the disk has space for what is not there yet."""
    there = sum(file.stat().st_size for file in step_dir(checkpoints, STEP).rglob("*") if file.is_file())
    parent = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(parent).free, max(n_bytes - there, 0) + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{checkpoints}: {needed / 1e9:,.1f} GB to write, {free / 1e9:,.1f} GB free on that disk. "
            "Free some space, or give another --workdir."
        )


def memory_bound(tensors: Tensors, dtype: str | None) -> int:
    """Bytes that the largest tensor takes as it is converted: read, and once more if it is cast."""

    def needs(name: str) -> int:
        info = tensors.info(name)
        count = math.prod(info.shape)
        return max(2 * count, info.nbytes) + (np.dtype(dtype).itemsize * count if dtype else 0)

    return max(map(needs, tensors.names()))
