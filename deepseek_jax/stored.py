"""Models on the disk, a run's checkpoints or a directory of published weights: config, weights, export."""

import contextlib
import json
import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

from deepseek_jax import release
from deepseek_jax.abstract_model import abstract_weights, check_memory
from deepseek_jax.configs import base
from deepseek_jax.convert import formats, hf, hub
from deepseek_jax.convert.names import flatten
from deepseek_jax.convert.place import place
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Tree
from deepseek_jax.saved_config import from_json
from deepseek_jax.train import manifest
from deepseek_jax.train.checkpoint import Checkpointer

WEIGHTS = ("params", "router_bias")  # what a checkpoint holds of a model


def load_checkpoint(path: str | os.PathLike) -> tuple[ConfigDict, Tree, str]:
    """The config of a run, the weights of its newest intact checkpoint on the first device, and where they are from."""
    with Checkpointer(checkpoint_directory(path), read_only=True) as checkpoints:
        config = saved_config(checkpoints)
        saved = {name: array for name, array in checkpoints.shapes()[1].items() if name.split("/")[0] in WEIGHTS}
        check_memory(config.name, saved)
        wanted = abstract_weights(config)
        step, state, meta = checkpoints.restore(wanted, keys=WEIGHTS, dtypes_as_saved=True)
    return config_in(meta, checkpoints.directory), state, f"step {step} of {os.fspath(path)}"


def _open_published(path: str | os.PathLike) -> tuple[ConfigDict, hf.Source]:
    """The config of published weights and where to read them from; of the files only headers are read."""
    directory = hub.local(path)
    published = hf.open_published(directory)
    config = published_config(published, directory.resolve())
    return config, hf.Source(published, abstract_weights(config))


def load_published(path: str | os.PathLike) -> tuple[ConfigDict, Tree, str]:
    """The config of published weights, the weights on the first device, and where they are from."""
    config, source = _open_published(path)
    check_memory(config.name, source.abstract)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = place(source, jax.tree.map(lambda x: x.update(sharding=here), source.abstract))
    return config, state, os.fspath(path)


def read_weights(path: str | os.PathLike, target: Tree) -> tuple[ConfigDict, Tree]:
    """The weights in a directory that `load` opens, in the shardings and dtypes of a training state.

    Args:
        path: as for `load`.
        target: {"params", "router_bias"} of `jax.ShapeDtypeStruct` with shardings.

    Returns:
        (the config of the source, the weights).

    Raises:
        UserError: as `load`, and for weights that are not those of `target`'s model.
    """
    if is_published(path):
        config, source = _open_published(path)
        check_shapes(path, source.abstract, target)
        return config, place(source, target)
    with Checkpointer(checkpoint_directory(path), read_only=True) as checkpoints:
        config = saved_config(checkpoints)
        _, stored, _ = checkpoints.restore(target, keys=WEIGHTS, dtypes_as_saved=True)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    wide = jax.jit(
        lambda tree: jax.tree.map(lambda x, like: x.astype(like.dtype), tree, target), out_shardings=shardings
    )
    return config, wide(stored)


def config_of(path: str | os.PathLike) -> ConfigDict:
    """The config of what `load` would open; of the weights only names and shapes are read."""
    if hub.is_id(path):
        directory = hub.local(path, weights=False)
        return published_config(hf.announced(directory), directory)
    if is_published(path):
        directory = Path(path).expanduser()
        return published_config(hf.open_published(directory), directory.resolve())
    return _config_on_disk(checkpoint_directory(path))


def tokenizer_of(path: str | os.PathLike) -> str:
    """The tokenizer of what `load` would open, as `config.data.tokenizer` names it; "none" if there is none."""
    if is_published(path):
        return release.kept_tokenizer(hub.local(path, weights=False)) or "none"
    return config_of(path).data.tokenizer


def is_published(path: str | os.PathLike) -> bool:
    """Whether this is a directory of published weights rather than of a run."""
    path = Path(path).expanduser()
    return hub.is_id(path) or ((path / hf.CONFIG).is_file() and not (path / "checkpoints").is_dir())


def published_config(published: hf.Published, directory: Path) -> ConfigDict:
    """The config of a published model: its numbers over the defaults of a run, the tokenizer that it brings or none."""
    config = base.get_config()
    config.name, config.family = _name(directory), published.family
    config.model = ConfigDict(published.numbers)
    config.precision = "fp32" if published.is_wide else "bf16"
    config.data.seq_len = published.facts.n_positions
    config.data.tokenizer = release.kept_tokenizer(directory) or "none"
    config.release = ConfigDict(release.of_published(published, directory))
    return config.lock()


def _name(directory: Path) -> str:
    """The name of a published model, also in the hub's cache: models--OWNER--NAME/snapshots/COMMIT."""
    is_cached = directory.parent.name == "snapshots"
    return directory.parent.parent.name.split("--")[-1] if is_cached else directory.name


def export(config: ConfigDict, directory: str | os.PathLike, abstract: Tree, get: hf.Get, dtype: str, **options):
    """`hf.write` for the model of a config: `abstract`, `get` and `options` as there, the rest from its release."""
    marks = release.marks(config, open_tokenizer(config.data.tokenizer))
    hf.write(
        *(directory, config.family, config.model.to_dict(), abstract, get, dtype),
        n_positions=release.n_positions(config),
        bos_id=marks.bos_id,
        eos_ids=marks.eos_ids,
        pad_id=marks.pad_id,
        generation=release.generation_config_to_write(config, marks),
        files=release.files(config),
        **options,
    )


def checkpoint_directory(path: str | os.PathLike) -> Path:
    """Where the checkpoints are, given a run's workdir or that directory itself. Raises UserError if nowhere."""
    path = Path(path).expanduser()
    formats.check_path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory. Give the workdir of a run, as made by deepseek-jax train, or a directory of "
            "published weights, or the id of a model on the Hugging Face hub, like deepseek-ai/DeepSeek-V2-Lite."
        )
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if next(path.glob("*.safetensors"), None):
        raise UserError(f"{path}: safetensors files, but no {hf.CONFIG} beside them. Download that as well.")
    return path


def _config_on_disk(directory: Path) -> ConfigDict:
    """`saved_config` from the files alone, in a process that may not yet ask jax for its devices."""
    for step in reversed(manifest.committed_steps(directory)):
        path = manifest.step_dir(directory, step)
        with contextlib.suppress(manifest.CheckpointDamaged):
            manifest.verify(path, step, only=(manifest.CONFIG,))
            if (path / manifest.CONFIG).is_file():
                return config_in({"config": json.loads((path / manifest.CONFIG).read_bytes())}, directory.absolute())
    with Checkpointer(directory, read_only=True) as checkpoints:  # says what is wrong
        return saved_config(checkpoints)


def saved_config(checkpoints: Checkpointer) -> ConfigDict:
    """The config kept beside the newest checkpoint. Raises UserError if there is none."""
    step, meta = checkpoints.read_meta()
    if "config" not in meta:
        raise UserError(f"step {step} of {checkpoints.directory} holds no config: deepseek-jax train did not save it.")
    return config_in(meta, checkpoints.directory)


def config_in(meta: dict, directory: Path) -> ConfigDict:
    """The config that the meta of a checkpoint in `directory` holds; see `release.moved` for a run that has moved."""
    return release.moved(from_json(meta["config"]), directory.parent)


def check_shapes(path: str | os.PathLike, stored: Tree, wanted: Tree) -> None:
    """Raises UserError unless two trees have the same shapes under the same names."""
    there, here = flatten(stored), flatten(wanted)
    differing = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if differing:
        found, needed = (list(shapes[differing[0]]) if differing[0] in shapes else "absent" for shapes in (there, here))
        raise UserError(
            f"{path}: {'/'.join(differing[0])} is {found} there, {needed} in this run "
            f"({len(differing)} weights differ). "
            f"Leave --config out, or give config.family and config.model what deepseek-jax inspect --config={path} "
            "shows."
        )
