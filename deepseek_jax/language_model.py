"""A language model in one line: call it, generate with it, look inside.  No mesh, no ceremony.

    import deepseek_jax as dsj

    model = dsj.build("tiny_v3")            # fresh weights
    model = dsj.load("runs/tiny_v3")        # those of a run
    model = dsj.load("DeepSeek-V2-Lite")    # those of a Hugging Face directory
    logits = model([[1, 2, 3]])             # float32, (1, 3, V)
    model.complete("def main(")             # text
    model.module.moe_blocks                 # the network itself
    dsj.save_pretrained(model, "out")       # a Hugging Face directory

The weights are plain nested dicts, `model.params` and `model.router_bias`: replace a leaf, and the next call uses it.
"""

import functools
import importlib
import math
import os
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from deepseek_jax.compat import quick_compile
from deepseek_jax.convert import hf
from deepseek_jax.convert.names import flatten
from deepseek_jax.convert.place import place
from deepseek_jax.data.tokenizer import BUILT_IN, Tokenizer, open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution, Tree, bind, split
from deepseek_jax.models import family
from deepseek_jax.precision.policy import policy
from deepseek_jax.saved_config import from_json
from deepseek_jax.serve.generate import ENDED, Generator
from deepseek_jax.serve.sampler import row_keys
from deepseek_jax.train.checkpoint import Checkpointer

WEIGHTS = ("params", "router_bias")  # what a checkpoint holds of a model
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
AHEAD = "mtp"  # top-level entry of the multi-token-prediction modules, which published counts leave out


class LanguageModel:
    """A network with its weights, on one device.

    Args:
        config: the resolved config of a run.
        params: trained weights, a nested dict of arrays.
        router_bias: the routers' balancing biases, likewise.
        source: where the weights are from, for `repr`.

    Attributes:
        n_positions: tokens, prompt and new ones, that a generated sequence may have: the length of the training
            sequences.  Rotary positions know no bound, so it may be raised; what comes of it is another matter.
    """

    def __init__(self, config: ConfigDict, params: Tree, router_bias: Tree, source: str = ""):
        self.config, self.params, self.router_bias, self.source = config, params, router_bias, source
        self.n_positions: int = config.data.seq_len
        self._definition, _, _ = split(abstract_module(config))
        # GPUs and TPUs would otherwise round the operands of a matmul in float32
        matmul_precision = "highest" if config.precision == "fp32" else None
        self._generator = Generator(self._definition, config.model.vocab_size, matmul_precision)

        @jax.jit
        def forward(params: Tree, router_bias: Tree, ids_BT: jax.Array) -> jax.Array:
            with jax.default_matmul_precision(matmul_precision):
                return bind(self._definition, params, router_bias)(ids_BT)

        self._forward = forward

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `config.data.tokenizer`."""
        return open_tokenizer(self.config.data.tokenizer)

    @property
    def module(self) -> nnx.Module:
        """The network as a Flax module that holds the present weights.

        Blocks of one kind are stacked: their weights have a leading axis, one entry a layer.  To take out layer 2:

            definition, weights = nnx.split(model.module.moe_blocks)
            block = nnx.merge(definition, jax.tree.map(lambda w: w[2], weights))
            block.attention(x_BTD)
        """
        return bind(self._definition, self.params, self.router_bias)

    def __call__(self, ids: ArrayLike) -> jax.Array:
        """float32 logits of the next token at every position.

        Args:
            ids: token ids, a batch (B, T) or one sequence (T,); lists and numpy arrays are fine.  A new shape compiles.

        Returns:
            logits_BTV for a batch, (T, V) for one sequence.
        """
        try:
            ids = np.asarray(ids)
        except ValueError:
            raise UserError("sequences of different lengths: wanted ids of shape (B, T). Pad at the end.") from None
        if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"ids of shape {ids.shape} and dtype {ids.dtype}: wanted integers, (B, T) or (T,).")
        if ids.min() < 0 or ids.max() >= self.config.model.vocab_size:
            raise UserError(f"ids from {ids.min()} to {ids.max()}: wanted 0 to {self.config.model.vocab_size - 1}.")
        logits_BTV = self._forward(self.params, self.router_bias, np.atleast_2d(ids).astype(np.int32))
        return logits_BTV if ids.ndim == 2 else logits_BTV[0]

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> list[int] | list[list[int]]:
        """Goes on from one prompt or from a batch of prompts of any lengths.

        Args:
            ids: token ids of a prompt, or a list of those.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token each time.
            top_p: draws from the fewest likeliest tokens whose probabilities add up to it.
            seed: same seed, same tokens.
            stop_ids: ids that end a sequence; the tokenizer's end mark by default, () for none.

        Returns:
            The new ids, with the stop id at the end if there was one: a list, or a list of lists for a batch.

        Raises:
            UserError: prompt and new tokens exceed `n_positions`; an id out of range; an empty prompt.
        """
        is_batch = not isinstance(ids, str) and len(ids) > 0 and (isinstance(ids[0], str) or np.ndim(ids[0]) > 0)
        steps = self._steps(ids if is_batch else [ids], max_new_tokens, temperature, top_p, seed, stop_ids)
        rows = [[int(token) for token in row if token != ENDED] for row in np.stack(list(steps), axis=1)]
        return rows if is_batch else rows[0]

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """`generate` for one prompt, each id as soon as it is there."""
        steps = self._steps([ids], max_new_tokens, temperature, top_p, seed, stop_ids)
        return (int(new_B[0]) for new_B in steps)

    def complete(self, text: str, max_new_tokens: int = 64, **options) -> str:
        """The text that `generate` goes on with; `options` as there."""
        return self.tokenizer.decode(self.generate(self.prompt(text), max_new_tokens, **options))

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to go on from, after a begin mark if the tokenizer's settings ask for one."""
        begin = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        return [*begin, *self.tokenizer.encode(text).tolist()]

    def _steps(self, prompts, max_new_tokens, temperature, top_p, seed, stop_ids) -> Iterator[np.ndarray]:
        if any(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                "a prompt is text: wanted ids. Use model.complete(text), or model.tokenizer.encode(text) first."
            )
        if stop_ids is None:
            stop_ids = () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)
        return self._generator.stream(
            *(self.params, self.router_bias, prompts, row_keys(seed, len(prompts))),
            max_new_tokens=max_new_tokens,
            n_positions=self.n_positions,
            temperature=temperature,
            top_p=top_p,
            stop_ids=stop_ids,
        )

    def __repr__(self) -> str:
        m = self.config.model
        main, ahead = count_parameters(self.params)
        more = f" + {_millions(ahead)} for multi-token prediction" if ahead else ""
        return (
            f"LanguageModel({self.config.name}: family {self.config.family}, {m.n_layers} layers of width {m.d_model}, "
            f"vocabulary {m.vocab_size:,}, {_millions(main)} parameters{more}, {self.config.precision}; "
            f"{self.source or 'weights given'})"
        )


def build(config: str | ConfigDict, seed: int = 0) -> LanguageModel:
    """A model with fresh weights, those that a run of this config and seed begins with.

    Args:
        config: a name in `deepseek_jax.configs`, or a config.
        seed: of the initialisers.

    Raises:
        UserError: no such config, or a model larger than this machine's memory.
    """
    config = _named_config(config) if isinstance(config, str) else config
    _check_memory(config.name, abstract_weights(config))

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        return split(_module(config, key))[1:]

    # One program: run operation by operation, initialisers take many times longer.
    params, router_bias = quick_compile(init)(jax.random.key(seed))
    return LanguageModel(config, params, router_bias, source=f"fresh, seed {seed}")


def load(path: str | os.PathLike, precision: str | None = None) -> LanguageModel:
    """The model of a run, from its newest intact checkpoint, or of a Hugging Face directory of published weights.

    Weights keep the dtypes in which they are stored, but for 8-bit ones, which become bfloat16.

    Args:
        path: the workdir of a run, its directory of checkpoints, or a directory with config.json and safetensors files.
        precision: what to compute in, "fp32" or "bf16"; by default that of the run, or of most published weights.

    Raises:
        UserError: no such directory, no intact checkpoint in it, a published model of no known family, or weights that
            do not fit the memory.
    """
    if is_published(path):
        config, state = _load_published(path)
        source = os.fspath(path)
    else:
        config, state, source = _load_checkpoint(path)
    if precision:
        policy(precision)  # refuses an unknown one
        config.precision = precision
    return LanguageModel(config, state["params"], state["router_bias"], source)


def _load_checkpoint(path: str | os.PathLike) -> tuple[ConfigDict, Tree, str]:
    with Checkpointer(checkpoint_directory(path), read_only=True) as checkpoints:
        config = saved_config(checkpoints)
        saved = {name: array for name, array in checkpoints.shapes()[1].items() if name.split("/")[0] in WEIGHTS}
        _check_memory(config.name, saved)
        wanted = abstract_weights(config)
        step, state, meta = checkpoints.restore(wanted, keys=WEIGHTS, dtypes_as_saved=True)
    return config_in(meta, checkpoints.directory), state, f"step {step} of {os.fspath(path)}"


def _open_published(path: str | os.PathLike) -> tuple[ConfigDict, hf.Source]:
    """The config of published weights and where to read them from; of the files only headers are read."""
    directory = Path(path).expanduser()
    published = hf.open_published(directory)
    config = published_config(published, directory.resolve())
    return config, hf.Source(published, abstract_weights(config))


def _load_published(path: str | os.PathLike) -> tuple[ConfigDict, Tree]:
    config, source = _open_published(path)
    _check_memory(config.name, source.abstract)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return config, place(source, jax.tree.map(lambda x: x.update(sharding=here), source.abstract))


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
        _check_shapes(Path(path).expanduser(), source.abstract, target)
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
    if is_published(path):
        directory = Path(path).expanduser()
        return published_config(hf.open_published(directory), directory.resolve())
    with Checkpointer(checkpoint_directory(path), read_only=True) as checkpoints:
        return saved_config(checkpoints)


def is_published(path: str | os.PathLike) -> bool:
    """Whether this is a directory of published weights rather than of a run."""
    path = Path(path).expanduser()
    return (path / hf.CONFIG).is_file() and not (path / "checkpoints").is_dir()


def published_config(published: hf.Published, directory: Path) -> ConfigDict:
    """The config of a published model: its numbers over the defaults of a run, the tokenizer that it brings or none."""
    config = importlib.import_module("deepseek_jax.configs.base").get_config()
    config.name, config.family = directory.name, published.family
    config.model = ConfigDict(published.numbers)
    is_wide = published.tensors.info(hf.EMBEDDING).dtype == "F32"
    config.precision = "fp32" if is_wide else "bf16"
    config.data.seq_len = published.facts.n_positions
    config.data.tokenizer = kept_tokenizer(directory) or "none"
    return config.lock()


def save_pretrained(model: LanguageModel, directory: str | os.PathLike, dtype: str = "bf16") -> None:
    """Writes a model as a Hugging Face directory: config.json, safetensors files with an index, its tokenizer.

    Args:
        model: of any family but those that nobody publishes.
        directory: made if need be; must hold no weights yet.
        dtype: "bf16"; "fp8" or "fp8_ue8m0", E4M3 in blocks of 128 x 128 with float32 or power-of-two scales; "fp32"; or
            "keep" for the dtypes that the weights have.

    Raises:
        UserError: an unknown dtype, or a directory that holds weights already or cannot be written.
    """
    weights = {"params": model.params, "router_bias": model.router_bias}
    export(model.config, directory, weights, hf.from_tree(weights), dtype)


def export(config: ConfigDict, directory: str | os.PathLike, abstract: Tree, get: hf.Get, dtype: str, **options):
    """`hf.write` for the model of a config: `abstract`, `get` and `options` as there, the rest from its tokenizer."""
    tokenizer, folder = config.data.tokenizer, Path(config.data.tokenizer).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    files = [] if tokenizer in ("deepseek", *BUILT_IN) else [folder / name for name in TOKENIZER_FILES]
    marks = open_tokenizer(tokenizer)
    hf.write(
        *(directory, config.family, config.model.to_dict(), abstract, get, dtype),
        n_positions=config.data.seq_len,
        bos_id=marks.bos_id,
        eos_id=marks.eos_id,
        files=[file for file in files if file.is_file()],
        **options,
    )


def checkpoint_directory(path: str | os.PathLike) -> Path:
    """Where the checkpoints are, given a run's workdir or that directory itself. Raises UserError if nowhere."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory. Give the workdir of a run, as made by deepseek-jax train, or a directory of "
            "published weights (to be downloaded first)."
        )
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if next(path.glob("*.safetensors"), None):
        raise UserError(f"{path}: safetensors files, but no {hf.CONFIG} beside them. Download that as well.")
    return path


def saved_config(checkpoints: Checkpointer) -> ConfigDict:
    """The config kept beside the newest checkpoint. Raises UserError if there is none."""
    step, meta = checkpoints.read_meta()
    if "config" not in meta:
        raise UserError(f"step {step} of {checkpoints.directory} holds no config: deepseek-jax train did not save it.")
    return config_in(meta, checkpoints.directory)


def config_in(meta: dict, directory: Path) -> ConfigDict:
    """The config that the meta of a checkpoint in `directory` holds.

    Where its tokenizer is gone, as when a workdir has been moved, the one in the workdir is taken.
    """
    config = from_json(meta["config"])
    named = config.data.tokenizer
    if named not in ("deepseek", *BUILT_IN) and not Path(named).expanduser().exists():
        config.data.tokenizer = kept_tokenizer(directory.parent) or named
    return config


def kept_tokenizer(directory: Path) -> str:
    """The path of the tokenizer that is kept beside weights, "" if there is none."""
    path = os.path.abspath(directory / TOKENIZER_FILES[0])  # not where a link leads: its neighbours count as well
    return path if os.path.isfile(path) else ""


def abstract_weights(config: ConfigDict) -> Tree:
    """{"params", "router_bias"} of a config's model, shapes in place of arrays."""
    _, params, router_bias = split(abstract_module(config))
    return {"params": params, "router_bias": router_bias}


def abstract_module(config: ConfigDict) -> nnx.Module:
    """The network of a config with shapes in place of arrays."""
    return nnx.eval_shape(lambda: _module(config, jax.random.key(0)))


def count_parameters(params: Tree) -> tuple[int, int]:
    """(of the main model, of its multi-token-prediction modules), embedding and head counted once, with the former."""
    sizes = {name: sum(math.prod(w.shape) for w in jax.tree.leaves(part)) for name, part in params.items()}
    ahead = sizes.pop(AHEAD, 0)
    return sum(sizes.values()), ahead


def _module(config: ConfigDict, key: jax.Array) -> nnx.Module:
    module = family(config.family)
    run = Execution(compute=policy(config.precision).compute)
    return module.Model(module.Config.from_config(config.model), run, rngs=nnx.Rngs(key))


def _named_config(name: str) -> ConfigDict:
    """The config of `deepseek_jax.configs.NAME`; that room stands above this one, so it is found by name only."""
    folder = importlib.import_module("deepseek_jax.configs")
    names = sorted({module.name for module in pkgutil.iter_modules(folder.__path__)} - {"base"})
    if name not in names:
        raise UserError(f"build({name!r}): no such config. Give a ConfigDict or one of: {', '.join(names)}.")
    return importlib.import_module(f"deepseek_jax.configs.{name}").get_config().lock()


def _check_memory(name: str, weights: Tree) -> None:
    """Raises UserError for weights that cannot fit: asked for anyway, a host may kill the process without a word."""
    needed, there = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(weights)), _memory_bytes()
    if there and needed > there:
        raise UserError(
            f"the weights of {name} take {needed / 2**30:,.0f} GiB, this device has {there / 2**30:,.0f}. "
            "For shapes alone there is deepseek-jax inspect; to convert without loading, deepseek-jax convert."
        )


def _check_shapes(path: Path, stored: Tree, wanted: Tree) -> None:
    """Raises UserError unless two trees have the same shapes under the same names."""
    there, here = flatten(stored), flatten(wanted)
    differing = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if differing:
        found, needed = (list(shapes[differing[0]]) if differing[0] in shapes else "absent" for shapes in (there, here))
        raise UserError(
            f"{path}: {'/'.join(differing[0])} is {found} there, {needed} in this run "
            f"({len(differing)} weights differ). "
            f"Give config.family and config.model what deepseek-jax inspect --workdir={path} shows."
        )


def _memory_bytes() -> int | None:
    """Memory of the first device, of the machine where that is a CPU; None where it is not told."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        return math.prod(map(os.sysconf, names)) if known else None
    return (device.memory_stats() or {}).get("bytes_limit")


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count < 1e10 else f"{count / 1e6:,.0f}M"
