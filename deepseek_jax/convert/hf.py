"""A Hugging Face directory as our weights, piece by piece, and back.

    published = open_published("DeepSeek-V2-Lite")      config.json and headers, checked; no weight is read
    published.family, published.numbers                 values for `config.family` and `config.model`
    source = Source(published, shapes)                  shapes: {"params", "router_bias"} of that model
    source.abstract                                     the resulting tree: shapes, and dtypes as stored
    place.place(source, target)                         that tree on devices; target: `source.abstract` with shardings

Reading. A piece is one published tensor in our axes: a layer of a stack, an expert of a layer, or a whole weight.
Pieces come in a fixed order, and each tensor is read once and dropped before the next, so host memory holds one tensor
at a time whatever the size of the model. FP8 becomes bfloat16; everything else keeps its dtype. A head that is tied to
the embedding, and not stored, is read from the embedding and becomes a weight of its own, which exports then contain.

Writing. `write` asks for pieces, converts them to published tensors and streams those to disk, in bfloat16, in float32,
in FP8 with blocks of 128 x 128, or as they are.
"""

import functools
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.convert import formats, hf_config, names, safetensors
from deepseek_jax.convert.safetensors import Tensors
from deepseek_jax.errors import UserError
from deepseek_jax.precision.quantize import quantize_blocks

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TABLE = ("params", "embedding", "table_VD")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT_DTYPES = ("F32", "F16", "BF16")  # in addition to 8-bit floats with scales
SHOWN, LONGEST = 3, 150  # names in a message, and characters per name

Warn = Callable[[str], None]


def warn_on_stderr(message: str) -> None:
    """Prints a warning."""
    print(f"warning: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Published:
    """A directory of published weights, checked as far as possible without reading them.

    Attributes:
        family, numbers: see `hf_config.from_hf`.
        facts: see `hf_config.ConfigFacts`.
        tensors: the files; None if only config.json and the index were read.
        config: content of config.json.
        generation_eos_ids: end-of-sequence tokens in generation_config.json.
    """

    family: str
    numbers: dict[str, Any]
    facts: hf_config.ConfigFacts
    tensors: Tensors | None
    config: dict[str, Any]
    generation_eos_ids: tuple[int, ...]

    @property
    def is_wide(self) -> bool:
        """Whether the weights are in float32: that of the embedding if files were opened, else as in config.json."""
        if self.tensors is not None:
            return self.tensors.info(EMBEDDING).dtype == "F32"
        return "float32" in (self.config.get("torch_dtype"), self.config.get("dtype"))


def open_published(directory: str | PathLike, warn: Warn = warn_on_stderr) -> Published:
    """Returns a directory of published weights after reading config.json and the headers.

    Multi-token prediction that the config names and the files do not contain (transformers saves such files) is left
    out, with a warning.

    Raises:
        UserError: it is not such a directory, the model is of no known family, or files are damaged.
    """
    directory = Path(directory).expanduser()
    formats.check_path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. Give a directory with {CONFIG} and safetensors files.")
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: no {CONFIG}. Give a directory with {CONFIG} and safetensors files.")
    config = safetensors.read_json(directory / CONFIG)
    family, numbers = hf_config.from_hf(config)
    tensors = safetensors.open_directory(directory)
    first_ahead = f"model.layers.{numbers['n_layers']}."
    if numbers.get("mtp_depth") and not any(name.startswith(first_ahead) for name in tensors.names()):
        warn(f"{directory}: {CONFIG} names multi-token prediction, but the files do not contain it: it is left out.")
        numbers["mtp_depth"] = 0
    return Published(family, numbers, hf_config.facts(config), tensors, config, _generation_eos_ids(directory))


def announced(directory: Path) -> Published:
    """Returns what `open_published` does, from config.json and the index of the weights alone."""
    config = safetensors.read_json(directory / CONFIG)
    family, numbers = hf_config.from_hf(config)
    index = directory / safetensors.INDEX
    named = safetensors.read_json(index).get("weight_map") if index.is_file() else None
    first_ahead = f"model.layers.{numbers['n_layers']}."
    if numbers.get("mtp_depth") and isinstance(named, dict) and not any(name.startswith(first_ahead) for name in named):
        numbers["mtp_depth"] = 0
    return Published(family, numbers, hf_config.facts(config), None, config, _generation_eos_ids(directory))


def _generation_eos_ids(directory: Path) -> tuple[int, ...]:
    file = directory / GENERATION_CONFIG
    return hf_config.eos_ids(safetensors.read_json(file), str(file)) if file.is_file() else ()


def _left_out(tensors: Tensors, numbers: dict[str, Any]) -> tuple[str, ...]:
    """Returns prefixes of the layers of multi-token prediction that the files have and config.json does not name."""
    if "mtp_depth" not in numbers:
        return ()
    layers = map("model.layers.{}.".format, itertools.count(numbers["n_layers"] + numbers["mtp_depth"]))
    return tuple(itertools.takewhile(lambda at: f"{at}eh_proj.weight" in tensors, layers))


class Piece(NamedTuple):
    """A part of one of our weights.

    Attributes:
        path: path of the weight in the tree, such as ("params", "moe_blocks", "experts", "gate_XDF").
        index: () for the whole weight, else the layer, or layer and expert.
        array: values, perhaps a transposed view.
        n_bytes_read: bytes of the files up to and including this piece, whether read or skipped.
    """

    path: names.Path
    index: names.Index
    array: np.ndarray
    n_bytes_read: int


class Source:
    """The weights in a directory as pieces of our weights.

    Args:
        published: result of `open_published`.
        shapes: {"params": tree, "router_bias": tree} of the model with its numbers, as from `layers.base.split`.
        warn: called with a message about copies that differ from their original, about multi-token prediction that the
            files contain and the config does not name (it is left out), and about settings that others read
            differently.

    Attributes:
        abstract: a tree like `shapes` of `jax.ShapeDtypeStruct`, with the dtypes of the pieces.
        n_bytes: bytes of the tensors to read.

    Raises:
        UserError: tensors are missing, unexpected, or of a wrong shape or dtype; the first few are named.
    """

    def __init__(self, published: Published, shapes: dict, warn: Warn = warn_on_stderr):
        self._files, self._warn = published.tensors, warn
        self._copies = names.copies(shapes)
        is_tied = published.facts.is_tied and HEAD not in published.tensors  # a stored head is used as it is
        left_out = _left_out(published.tensors, published.numbers)
        self._tensors = self._checked(shapes, is_tied, left_out)
        dtypes: dict[names.Path, np.dtype] = {}
        for tensor, stored in self._tensors:
            for path, _ in tensor.places:
                dtype = self._dtype(stored)
                dtypes[path] = np.dtype(jnp.promote_types(dtypes.get(path, dtype), dtype))
        self._dtypes = dtypes
        self.n_bytes = sum(self._files.info(stored).nbytes for stored in {stored for _, stored in self._tensors})
        self.abstract = map_leaves(shapes, lambda path, x: jax.ShapeDtypeStruct(x.shape, dtypes[path]))
        where = f"{published.tensors.directory}: {CONFIG}"
        for at in left_out:
            warn(f"{where}: num_nextn_predict_layers={published.numbers['mtp_depth']}, so {at}* is left out.")
        for remark in hf_config.remarks(published.config):
            warn(f"{where}: {remark}")

    def pieces(self, skip: Callable[[names.Path, names.Index], bool] | None = None) -> Iterator[Piece]:
        """Yields all pieces in a fixed order; a tensor is not read if `skip(path, index)` holds for all its pieces."""
        n_bytes_read, compared = 0, set()
        for stored, tensors in self._by_stored().items():
            n_bytes_read += self._files.info(stored).nbytes
            needed = [place for tensor in tensors for place in tensor.places if not (skip and skip(*place))]
            if not needed:
                continue
            array = self._files.read_dequantized(stored)
            compared |= self._compare_copies(stored, array)
            for tensor in tensors:
                for (path, index), part in zip(tensor.places, tensor.to_ours(array), strict=True):
                    if (path, index) in needed:
                        yield Piece(path, index, part.astype(self._dtypes[path], copy=False), n_bytes_read)
                    del part
            del array
        for copy in self._copies.keys() - compared:
            if copy in self._files and not self._files.is_same(copy, self._original(copy)):
                self._warn_of(copy)

    def _by_stored(self) -> dict[str, list[names.Tensor]]:
        """Returns the tensors in their order; those read from the same stored one (a tied head) together."""
        found: dict[str, list[names.Tensor]] = {}
        for tensor, stored in self._tensors:
            found.setdefault(stored, []).append(tensor)
        return found

    def _checked(self, shapes: dict, is_tied: bool, left_out: tuple[str, ...]) -> list[tuple[names.Tensor, str]]:
        """Returns (tensor, name in the files) of all. Raises UserError unless the files hold exactly these tensors.

        Further tensors may be empty, or start with one of `left_out`.
        """
        found, missing, wrong = [], [], []
        expected = {copy for copy in self._copies if copy in self._files}
        for tensor in names.tensors(shapes):
            stored = EMBEDDING if is_tied and tensor.name == HEAD else tensor.name
            if stored not in self._files:
                missing.append(stored)
                if len(missing) > SHOWN:
                    break  # a hostile config may name a million layers
                continue
            found.append((tensor, stored))
            expected.add(stored)
            info = self._files.info(stored)
            if self._files.is_quantized(stored):
                expected.add(stored + safetensors.SCALE_SUFFIX)
            elif info.dtype not in WEIGHT_DTYPES:
                wrong.append(f"{stored} is {info.dtype}, expected {', '.join(WEIGHT_DTYPES)} or 8-bit floats")
            if info.shape != tensor.shape:
                wrong.append(f"{stored} has shape {list(info.shape)}, expected {list(tensor.shape)}")
        others = (
            name
            for name in self._files.names()
            if not (name in expected or name.startswith(left_out) or names.IGNORED.search(name))
            and 0 not in self._files.info(name).shape
        )
        unexpected = [] if len(missing) > SHOWN else list(others)  # the expected names are incomplete then
        if missing or wrong or unexpected:
            raise UserError(f"{self._files.directory}: {_difference(missing, unexpected, wrong)}")
        return found

    def _dtype(self, stored: str) -> np.dtype:
        if self._files.is_quantized(stored):
            return np.dtype(ml_dtypes.bfloat16)
        return safetensors.DTYPES[self._files.info(stored).dtype]

    def _compare_copies(self, stored: str, array: np.ndarray) -> set[str]:
        """Compares the copies of a tensor with it while it is in memory, and returns them; 8-bit ones are not compared.

        Embedding and head are shared here, so a copy that differs causes a warning.
        """
        if self._files.is_quantized(stored):
            return set()
        copies = {copy for copy in self._copies if copy in self._files and self._original(copy) == stored}
        for copy in sorted(copies):
            if not self._files.holds(copy, array):
                self._warn_of(copy)
        return copies

    def _original(self, copy: str) -> str:
        """Returns the stored name of a copy's original."""
        return self._copies[copy] if self._copies[copy] in self._files else EMBEDDING  # a tied head

    def _warn_of(self, copy: str) -> None:
        self._warn(f"{self._files.directory}: {copy} differs from {self._original(copy)}, which is used instead.")


def _difference(missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    """Returns what is wrong with the tensors of a directory."""
    parts = []
    for what, found in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
        if found:
            count = "" if found is missing else f"{len(found) - SHOWN} "  # the search for missing ones stopped early
            more = f" and {count}more" if len(found) > SHOWN else ""
            parts.append(f"{what}: {', '.join(name[:LONGEST] for name in found[:SHOWN])}{more}")
    return f"{'; '.join(parts)}. The files do not match the model in {CONFIG}."


def leaves(tree: dict, path: names.Path = ()) -> Iterator[tuple[names.Path, Any]]:
    """Yields the (path, leaf) pairs of a nested dict."""
    for key, sub in tree.items():
        yield from leaves(sub, (*path, key)) if isinstance(sub, dict) else [((*path, key), sub)]


def map_leaves(tree: dict, function: Callable[[names.Path, Any], Any], path: names.Path = ()) -> dict:
    """Returns a tree like `tree` with `function(path, leaf)` for each leaf."""
    return {
        key: map_leaves(sub, function, (*path, key)) if isinstance(sub, dict) else function((*path, key), sub)
        for key, sub in tree.items()
    }


# ----------------------------------------------------------------------------------------------------------- writing

TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SCALES = {"fp8": ("fp32", "F32"), "fp8_ue8m0": ("ue8m0", "F32"), "fp8_e8m0": ("ue8m0", "F8_E8M0")}  # kind, stored as
FORMATS = {"bf16": "BF16", "fp32": "F32", **dict.fromkeys(SCALES, "BF16"), "keep": None}  # of what is not FP8

Get = Callable[[names.Path, names.Index], np.ndarray]


def from_tree(tree: dict) -> Get:
    """Returns the `get` of `write` for {"params", "router_bias"} of arrays; one piece at a time comes to the host."""
    arrays = dict(leaves(tree))
    return lambda path, index: np.asarray(arrays[path][index] if index else arrays[path])


def write(
    directory: str | PathLike,
    family: str,
    numbers: dict[str, Any],
    abstract: dict,
    get: Get,
    dtype: str = "bf16",
    *,
    n_positions: int = 4096,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    generation: dict[str, Any] | None = None,
    files: Mapping[str, Path | bytes] = MappingProxyType({}),
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
    report: Callable[[int], None] | None = None,
    warn: Warn = warn_on_stderr,
) -> None:
    """Writes a model as a Hugging Face directory. Memory: a few times its largest tensor.

    Args:
        directory: created if needed; must not hold weights yet.
        family, numbers: `config.family` and `config.model`.
        abstract: {"params", "router_bias"} of anything with shape and dtype.
        get: `get(path, index)` returns a piece (see `Piece`); `from_tree` returns such a function.
        dtype: "bf16", "fp32", an 8-bit format (for the matrices of all blocks except routers, as published; the rest
            is bfloat16), or "keep" (unchanged). Router biases are always float32. 8-bit weights come in blocks of
            128 x 128: "fp8" with arbitrary scales (V3), "fp8_ue8m0" with powers of two stored in float32 (V3.1),
            "fp8_e8m0" with powers of two stored in 8 bits.
        n_positions: longest sequence that the model is meant for.
        bos_id, eos_ids, pad_id: tokens of begin, end and padding.
        generation: content of generation_config.json; by default these tokens.
        files: further files, such as tokenizer.json: name -> its path or its content.
        max_shard_bytes: limit for one file of weights.
        report: called with the number of bytes of each published tensor, for a progress bar.
        warn: called with a message about anything that keeps others from opening the directory.

    Raises:
        UserError: the dtype or family is unknown, or the directory holds weights or cannot be written.
    """
    if dtype not in FORMATS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(FORMATS)}.")
    directory = Path(directory).expanduser()
    dtypes = {path: leaf.dtype for path, leaf in leaves(abstract)}
    stored = dtypes[TABLE]
    config = hf_config.to_hf(
        *(family, numbers),
        dtype=TORCH_DTYPES[FORMATS[dtype] or safetensors.DTYPE_NAMES[np.dtype(stored)]],
        quantized=SCALES[dtype][0] if dtype in SCALES else None,
        n_positions=n_positions,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )
    marks = {"_from_model_config": True, "bos_token_id": bos_id, "eos_token_id": hf_config.one_or_list(eos_ids)}
    code = hf_config.code(family)
    if code and set(code) <= set(files):
        config["auto_map"] = hf_config.KINDS[config["model_type"]].auto_map
    elif code:
        warn(
            f"{directory}: transformers has no class for model_type={config['model_type']!r}: without "
            f"{' and '.join(code)} of the release, only deepseek_jax can open this directory. Put them into the "
            "directory that the weights come from, and they are copied."
        )
    safetensors.write_directory(directory, list(_entries(abstract, dtypes, get, dtype, report)), max_shard_bytes)
    copy_files(files, directory)
    for name, content in ((CONFIG, config), (GENERATION_CONFIG, marks if generation is None else generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_files(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Writes small files, given by path or by content; a file that is already in place is kept."""
    for name, content in files.items():
        target = directory / name
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif content.resolve() != target.resolve():
            shutil.copyfile(content, target)


def _entries(abstract: dict, dtypes: dict, get: Get, dtype: str, report: Callable | None) -> Iterator:
    """Yields the entries of `write_directory` in the order of the layers; copies follow their originals."""
    copied: dict[str, list[str]] = {}
    for copy, original in names.copies(abstract).items():
        copied.setdefault(original, []).append(copy)

    def published(tensor: names.Tensor) -> np.ndarray:
        array = tensor.to_theirs([get(path, index) for path, index in tensor.places])
        if report:
            report(array.nbytes)
        return array

    for tensor in names.tensors(abstract):
        kind = FORMATS[dtype]
        if names.FLOAT32.search(tensor.name):
            kind = "F32"
        elif kind is None:
            kinds = [dtypes[path] for path, _ in tensor.places]
            kind = safetensors.DTYPE_NAMES[np.dtype(functools.reduce(jnp.promote_types, kinds))]
        if dtype in SCALES and names.QUANTIZED.search(tensor.name):
            yield from _quantized(tensor, published, *SCALES[dtype])
            continue
        for name in (tensor.name, *copied.get(tensor.name, ())):
            make = functools.partial(_cast, published, tensor, safetensors.DTYPES[kind])
            yield safetensors.Entry(name, tensor.shape, kind, make)
    kind = FORMATS[dtype] or safetensors.DTYPE_NAMES[np.dtype(dtypes[TABLE])]
    for name, shape in names.empty_tensors(abstract).items():
        yield safetensors.Entry(name, shape, kind, functools.partial(np.zeros, shape, safetensors.DTYPES[kind]))


def _cast(published: Callable, tensor: names.Tensor, dtype: np.dtype) -> np.ndarray:
    return published(tensor).astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(matrix: jax.Array, scale: str) -> tuple[jax.Array, jax.Array]:
    return quantize_blocks(matrix, scale=scale)


def _quantized(tensor: names.Tensor, published: Callable, scale: str, kind: str) -> Iterator[safetensors.Entry]:
    """Yields the codes of a matrix and its scales of type `kind`, which are computed together."""
    made = {}

    def codes() -> np.ndarray:
        q, made["scales"] = map(np.asarray, _quantize(published(tensor), scale))
        return q

    def scales() -> np.ndarray:
        return made.pop("scales").astype(safetensors.DTYPES[kind])

    blocks = tuple(math.ceil(n / b) for n, b in zip(tensor.shape, safetensors.BLOCK, strict=True))
    yield safetensors.Entry(tensor.name, tensor.shape, "F8_E4M3", codes)
    yield safetensors.Entry(tensor.name + safetensors.SCALE_SUFFIX, blocks, kind, scales)
