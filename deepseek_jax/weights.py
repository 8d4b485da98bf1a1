"""Weights on the disk, those of a run or published ones, opened in the same way; and their export.

weights = open_weights("runs/tiny_v3")     # or a directory with config.json and safetensors files, or a hub id
weights.config, weights.tokenizer          # without reading a weight
weights.load()                             # onto the first device
weights.read(target)                       # into the shardings of a training state
"""

import contextlib
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from deepseek_jax import release
from deepseek_jax.abstract_model import abstract_weights, check_memory
from deepseek_jax.configs import base
from deepseek_jax.convert import fetched, formats, fp8_weights, hf, hub, peft
from deepseek_jax.convert.names import flatten
from deepseek_jax.convert.place import place as place_weights
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.data.tokenizer_files import is_path
from deepseek_jax.errors import UserError
from deepseek_jax.layers import lora
from deepseek_jax.layers.base import Tree
from deepseek_jax.layers.lora import Lora
from deepseek_jax.parallel.mesh import REPLICATED, shardings
from deepseek_jax.saved_config import completed, from_json
from deepseek_jax.storage import Place, Remote, place
from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

WEIGHTS = ("params", "router_bias")  # what a checkpoint holds of a model
# How weights are held. "wide": as they are stored, but 8-bit ones become bfloat16. "stored": 8-bit ones stay in FP8,
# codes and the scales of their blocks (`precision.fp8_weight`). "fp8": the same, and those that releases store in FP8
# are quantised by V3's rule where they are stored in more bits.
FORMATS = ("wide", "stored", "fp8")


@dataclass(frozen=True)
class Loaded:
    """A model's weights on the first device."""

    config: ConfigDict  # the config that they belong to
    state: Tree  # {"params", "router_bias"}
    source: str  # where they are from, for people


def open_weights(path: str | os.PathLike | Remote) -> "RunWeights | PublishedWeights":
    """The weights of a run or of a published model (`path` as for `language_model.load`); reads nothing yet."""
    where = place(path)
    origin = where if isinstance(where, Remote) else path  # an id of the hub, or a path as it was given
    return PublishedWeights(origin) if is_published(origin) else RunWeights(origin)


class RunWeights:
    """The weights of a run's newest intact checkpoint. Raises UserError where there is none, when asked for."""

    def __init__(self, path: str | os.PathLike | Remote):
        self.path = path

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The config of the run; of the weights only names and shapes are read."""
        return _config_on_disk(checkpoint_directory(self.path))

    @property
    def tokenizer(self) -> str:
        """The tokenizer, as `config.data.tokenizer` names it."""
        return self.config.data.tokenizer

    def load(self, weights: str = "wide") -> Loaded:
        """The weights on the first device, in the dtypes in which they are stored; see `FORMATS` for "fp8"."""
        with Checkpointer(checkpoint_directory(self.path), read_only=True) as checkpoints:
            config = saved_config(checkpoints)
            saved = {name: array for name, array in checkpoints.shapes()[1].items() if name.split("/")[0] in WEIGHTS}
            check_memory(config.name, saved)
            expected = stored_weights(config)
            step, state, meta = checkpoints.restore(expected, keys=WEIGHTS, dtypes_as_saved=True)
        config = config_in(meta, checkpoints.directory)
        state = without_adapters(config, state)
        return Loaded(config, _in_format(state, weights), f"step {step} of {self.path}")

    def read(self, target: Tree) -> Tree:
        """The weights in the shardings and dtypes of `target`, the {"params", "router_bias"} of a training state.

        Raises UserError if they are not those of its model.
        """
        with Checkpointer(checkpoint_directory(self.path), read_only=True) as checkpoints:
            expected = with_adapters(self.config, target)
            _, stored, _ = checkpoints.restore(expected, keys=WEIGHTS, dtypes_as_saved=True)
        stored = without_adapters(self.config, stored)
        places = jax.tree.map(lambda x: x.sharding, target)
        cast = jax.jit(
            lambda tree: jax.tree.map(lambda x, like: x.astype(like.dtype), tree, target), out_shardings=places
        )
        return cast(stored)


class PublishedWeights:
    """The weights of a Hugging Face directory, here, in a bucket or on the hub; only headers are read at first."""

    def __init__(self, path: str | os.PathLike | Remote):
        self.path = path

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The model's numbers over the defaults of a run; of a model on the hub no weights are downloaded for it."""
        if hub.is_id(self.path):
            directory = hub.local(self.path, weights=False)
            return published_config(hf.announced(directory), directory)
        return published_config(hf.open_published(self.path), hub.local(self.path).resolve())

    @property
    def tokenizer(self) -> str:
        """The tokenizer that comes with the weights, as `config.data.tokenizer` names it; "none" if there is none."""
        return release.kept_tokenizer(hub.local(self.path, weights=False)) or "none"

    def load(self, weights: str = "wide") -> Loaded:
        """The weights on the first device, in one of `FORMATS`."""
        config, source = self._open(in_fp8=weights != "wide")
        check_memory(config.name, source.abstract)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        state = place_weights(source, jax.tree.map(lambda x: x.update(sharding=here), source.abstract))
        state = fp8_weights.joined(state, source.coded)
        return Loaded(config, _in_format(state, weights), str(self.path))

    def read(self, target: Tree) -> Tree:
        """The weights in the shardings and dtypes of a training state; as `RunWeights.read`."""
        _, source = self._open()
        check_shapes(self.path, source.abstract, target)
        return place_weights(source, target)

    def _open(self, in_fp8: bool = False) -> tuple[ConfigDict, hf.Source]:
        directory = hub.local(self.path)
        published = hf.open_published(self.path if isinstance(self.path, Remote) else directory)
        config = published_config(published, directory.resolve())
        return config, hf.Source(published, abstract_weights(config), in_fp8=in_fp8)


def lora_of(config: ConfigDict) -> Lora | None:
    """The low-rank adapters of a run (`config.lora`); None without any."""
    return peft.lora(abstract_weights(config), **_settings(config)) if config.lora.rank else None


def _settings(config: ConfigDict) -> dict[str, Any]:
    return {"rank": config.lora.rank, "alpha": config.lora.alpha, "chosen": config.lora.targets}


def stored_weights(config: ConfigDict) -> Tree:
    """{"params", "router_bias"} of a config's checkpoint, shapes in place of arrays: those of its adapters too."""
    return with_adapters(config, abstract_weights(config))


def with_adapters(config: ConfigDict, weights: Tree) -> Tree:
    """`weights` and the shapes of a config's adapters, whole on every device if those of the weights have shardings."""
    found = lora_of(config)
    if found is None:
        return weights
    adapters: dict = lora.abstract_adapters(weights["params"], found)
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(weights) if x.sharding is not None), None)
    if mesh is not None:
        adapters = {path: x.update(sharding=shardings(mesh, REPLICATED)) for path, x in adapters.items()}
    return weights | {"params": lora.beside(weights["params"], adapters)}


def without_adapters(config: ConfigDict, weights: Tree) -> Tree:
    """The weights of a model, with what its adapters have learnt."""
    found = lora_of(config)
    if found is None:
        return weights
    return weights | {"params": lora.merged(weights["params"], found)}


def with_peft(config: ConfigDict, weights: Tree, directory: str | os.PathLike) -> Tree:
    """The weights of a config's model, with what the adapters in a directory of PEFT's have learnt."""
    shapes, said = abstract_weights(config), peft.settings(directory)
    found = peft.lora(shapes, said["rank"], said["alpha"], said["targets"])
    params = lora.beside(weights["params"], peft.read(directory, shapes, found))
    return weights | {"params": lora.merged(params, found)}


def _in_format(state: Tree, weights: str) -> Tree:
    """The state with the weights that releases store in FP8 quantised, where `weights` is "fp8"."""
    return fp8_weights.quantized(state) if weights == "fp8" else state


def is_published(path: str | os.PathLike | Remote) -> bool:
    """Whether this is a directory of published weights, or a place in a bucket, rather than of a run."""
    path = place(path)
    if isinstance(path, Remote):
        return fetched.is_published(path)
    path = path.expanduser()
    return hub.is_id(path) or ((path / hf.CONFIG).is_file() and not (path / "checkpoints").is_dir())


def published_config(published: hf.Published, directory: Path) -> ConfigDict:
    """The config of a published model: its numbers over the defaults of a run, the tokenizer that it brings or none."""
    config = base.get_config()
    config.name, config.family = _name(directory), published.family
    config.model = ConfigDict(published.numbers)
    config.precision = "fp32" if published.is_wide else "bf16"
    config.data.seq_len = published.facts.n_positions
    config.data.tokenizer = release.kept_tokenizer(directory) or "none"
    config.data.chat_template = release.chat_template(published, directory)
    config.release = ConfigDict(release.of_published(published, directory))
    return config.lock()


def _name(directory: Path) -> str:
    """The name of a published model, also in the hub's cache: models--OWNER--NAME/snapshots/COMMIT."""
    is_cached = directory.parent.name == "snapshots"
    return directory.parent.parent.name.split("--")[-1] if is_cached else directory.name


def export(
    config: ConfigDict, directory: str | os.PathLike | Remote, abstract: Tree, get: hf.Get, dtype: str, **options: Any
) -> None:
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
    if line := release.remark(config):
        print(line, file=sys.stderr)


def checkpoint_directory(path: str | os.PathLike | Remote) -> Any:
    """Where the checkpoints are, given a run's workdir or that directory itself. Raises UserError if nowhere."""
    path = place(path)
    if isinstance(path, Remote):
        return path if path.name == "checkpoints" else path / "checkpoints"
    path = path.expanduser()
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


def _config_on_disk(directory: Place) -> ConfigDict:
    """`saved_config` from the files alone, in a process that may not yet ask jax for its devices."""
    for step in reversed(manifest.committed_steps(directory)):
        path = manifest.step_dir(directory, step)
        with contextlib.suppress(manifest.CheckpointDamaged):
            manifest.verify(path, step, only=(manifest.CONFIG,))
            if "config" in (meta := manifest.read_config(path)):
                return config_in(meta, directory.absolute() if isinstance(directory, Path) else directory)
    with Checkpointer(directory, read_only=True) as checkpoints:  # says what is wrong
        return saved_config(checkpoints)


def saved_config(checkpoints: Checkpointer) -> ConfigDict:
    """The config kept beside the newest checkpoint. Raises UserError if there is none."""
    step, meta = checkpoints.read_meta()
    if "config" not in meta:
        raise UserError(f"step {step} of {checkpoints.directory} holds no config: deepseek-jax train did not save it.")
    return config_in(meta, checkpoints.directory)


def config_in(meta: dict, directory: Place) -> ConfigDict:
    """The config that the meta of a checkpoint in `directory` holds; see `release.moved` for a run that has moved."""
    config = completed(from_json(meta["config"]))
    if isinstance(directory, Path):
        return release.moved(config, directory.parent)
    has_files = config.release.folder or is_path(config.data.tokenizer)
    return release.moved(config, fetched.beside(directory.parent)) if has_files else config


def check_shapes(path: str | os.PathLike | Remote, stored: Tree, expected: Tree) -> None:
    """Raises UserError unless two trees have the same shapes under the same names."""
    there, here = flatten(stored), flatten(expected)
    differing = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if differing:
        found, needed = (list(shapes[differing[0]]) if differing[0] in shapes else "absent" for shapes in (there, here))
        raise UserError(
            f"{path}: {'/'.join(differing[0])} is {found} there, {needed} in this run ({len(differing)} weights"
            f" differ). Leave --config out, or give config.family and config.model what deepseek-jax inspect "
            f"--config={path} shows."
        )
