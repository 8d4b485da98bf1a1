"""Turn the newest checkpoint of a run into a Hugging Face directory that transformers and others load.

    deepseek-jax export --workdir=runs/v2_lite --to=out
    deepseek-jax export --workdir=runs/v3 --to=out --dtype=fp8        # blocks of 128 x 128, as V3 is published
    deepseek-jax export --workdir=runs/v3 --to=s3://bucket/v3         # or gs://: in small shards, sent one by one
    deepseek-jax export --workdir=runs/v3 --to=out --ema              # the moving average (config.ema.decay)
    deepseek-jax export --workdir=runs/mine --to=out --adapters       # low-rank adapters alone, in PEFT's format

--dtype=bf16 and fp32 are for all weights, keep for those of the checkpoint.  fp8 stores the matrices of all blocks but
routers in 8 bits with float32 scales (V3), fp8_ue8m0 with float32 scales that are powers of two (V3.1), fp8_e8m0 with
the same scales in 8 bits, fp4 (V4) like that, with routed experts in 4 bits; the rest is bf16. Adapters
(config.lora.rank) are merged into the weights; with --adapters they are written alone, in float32. The checkpoint is
compared with its hashes first; then one tensor at a time goes from disk to disk.

DeepSeekMoE 16B has no class in transformers: others open it with the release's configuration_deepseek.py and
modeling_deepseek.py only, which are copied from the directory that the weights came from where they stand there.
"""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_jax.bounds import one_of
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._progress import Progress
from deepseek_jax.storage import Place, Remote, answered, open_store, place
from deepseek_jax.units import binary, duration

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from deepseek_jax.convert.hf import Get
    from deepseek_jax.layers.lora import Lora

DTYPES = ("bf16", "fp32", "fp8", "fp8_ue8m0", "fp8_e8m0", "fp4", "keep")
FLAGS = {
    "to": (place, _options.REQUIRED, "directory to write, empty or not there yet; gs:// and s3:// as well"),
    "ema": (bool, False, "the moving average of the weights in place of the weights"),
    "adapters": (bool, False, "the run's low-rank adapters alone, as PEFT writes them"),
    "dtype": (str, "bf16", f"of the weights: {', '.join(DTYPES)}", one_of(*DTYPES)),
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False, in_bucket=True)
    if options.workdir is None:
        raise UserError("--workdir is missing. Give the directory of a run, like --workdir=runs/tiny_v3.")
    export(options.workdir, options.to, options.dtype, is_average=options.ema, adapters_alone=options.adapters)
    return 0


def export(
    workdir: Place, target: Place, dtype: str, *, is_average: bool = False, adapters_alone: bool = False
) -> None:
    """Writes the newest intact checkpoint of `workdir`, or the moving average that it keeps, to the directory `target`.

    Raises UserError for a checkpoint without an average, or without the adapters that alone are to be written.
    """
    check_empty(target)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # another process may be using the accelerator
    import jax
    from flax.traverse_util import unflatten_dict

    from deepseek_jax import weights
    from deepseek_jax.compat import peak_memory_bytes
    from deepseek_jax.convert import peft
    from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
    from deepseek_jax.train.checkpoint.streamed import StepReader
    from deepseek_jax.train.loop import EMA

    directory = weights.checkpoint_directory(workdir)
    step = newest_intact(directory)
    with Checkpointer(directory, read_only=True) as checkpoints:
        meta = checkpoints.read_meta(step)[1]
    if "config" not in meta:
        raise UserError(f"step {step} of {directory} holds no config: deepseek-jax did not save it.")
    config, reader = weights.config_in(meta, open_store(directory).place), StepReader(directory, step)
    stored = {"params": EMA if is_average else "params", "router_bias": "router_bias"}  # entry -> where it stands
    if is_average and not any(name.startswith(f"{EMA}/") for name in reader.arrays):
        raise UserError(
            f"--ema: step {step} of {directory} keeps no moving average of the weights. Train with "
            "--config.ema.decay=0.999 (or another decay), or leave --ema out."
        )
    saved = {
        f"{entry}{name.removeprefix(place)}": jax.ShapeDtypeStruct(*described)
        for entry, place in stored.items()
        for name, described in reader.arrays.items()
        if name.startswith(f"{place}/")
    }
    abstract = {"params": {}, "router_bias": {}} | unflatten_dict(saved, sep="/")

    def get(path: tuple[str, ...], index: tuple[int, ...]) -> "np.ndarray":
        return reader("/".join((stored[path[0]], *path[1:])), index)

    adapters = weights.lora_of(config)
    if adapters_alone:
        write_adapters(config, adapters, target, get)
        return
    pieces = peft.merging(get, adapters) if adapters else get
    with Progress("export", published_bytes(abstract)) as progress:
        weights.export(config, target, abstract, pieces, dtype, report=progress.advance)
    size = f"{sum(file.stat().st_size for file in target.iterdir()) / 1e9:,.2f} GB " if isinstance(target, Path) else ""
    peak, took = binary(peak_memory_bytes() or 0), duration(progress.seconds)
    print(f"{target}: step {step} of {workdir} as {dtype}, {size}in {took}, memory {peak}")


def check_empty(target: Place) -> None:
    """Raises UserError where something stands already, but for what a killed export has left."""
    from deepseek_jax.convert.fetched import UNFINISHED, is_exported

    if isinstance(target, Remote):
        with answered():
            found = open_store(target).names()
        if UNFINISHED in found:
            found = [name for name in found if name != UNFINISHED and not is_exported(name)]
        return check_none(found, target)
    if target.exists() and not target.is_dir():
        raise UserError(f"--to={target}: a file. Give a directory that is empty or not there yet.")
    found = sorted(name for name in os.listdir(target) if not name.endswith(".partial")) if target.exists() else []
    check_none(found, target)


def check_none(found: list[str], target: Place) -> None:
    """Raises UserError if there are names of files."""
    if found:
        more, what = ", …" if len(found) > 3 else "", "place" if isinstance(target, Remote) else "directory"
        raise UserError(f"--to={target}: not empty ({', '.join(found[:3])}{more}). Give another {what}.")


def write_adapters(config: "ConfigDict", adapters: "Lora | None", target: Place, get: "Get") -> None:
    """Writes adapters alone. Raises UserError for a run without any."""
    from deepseek_jax.abstract_model import abstract_weights
    from deepseek_jax.convert import peft

    if adapters is None:
        raise UserError("--adapters: this run has none (config.lora.rank=0). Leave --adapters out.")
    if isinstance(target, Remote):
        raise UserError(f"--to={target}: adapters are written to a folder. Give one, and copy its two files.")

    def layer(path: tuple[str, ...], number: int) -> "np.ndarray":
        return get(("params", *path), (number,))

    peft.write(target, config.run.init_from, abstract_weights(config), adapters, layer)
    print(f"{target}: adapters of rank {adapters.rank} for {config.run.init_from}")


def newest_intact(directory: Place) -> int:
    """The newest checkpoint that equals its hashes; falls back from a damaged one to the one before, with a warning."""
    from deepseek_jax.train.checkpoint import manifest

    steps, refused = manifest.committed_steps(directory), ""
    if not steps:
        raise UserError(f"no checkpoint in {directory}. Train first, or convert a published model.")
    for step in reversed(steps):
        path = manifest.step_dir(directory, step)
        try:
            files = manifest.read_manifest(path, step)["files"]
            with Progress("check", sum(file["size"] for file in files.values())) as progress:
                manifest.verify(path, step, report=progress.advance)
        except manifest.CheckpointDamaged as damage:
            refused = f"step {step} is damaged: {damage}"
            print(f"warning: {refused}", file=sys.stderr)
            continue
        return step
    raise UserError(f"no intact checkpoint in {directory}: {refused}.")


def published_bytes(abstract: dict) -> int:
    """Bytes that are read to write all published tensors, copies counted each time."""
    from deepseek_jax.convert import names

    sizes = {}
    for tensor in names.tensors(abstract):
        leaf: Any = abstract
        for key in tensor.places[0][0]:
            leaf = leaf[key]
        sizes[tensor.name] = math.prod(tensor.shape) * leaf.dtype.itemsize
    return sum(sizes.values()) + sum(sizes.get(original, 0) for original in names.copies(abstract).values())
