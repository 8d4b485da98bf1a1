"""Our weights as a Hugging Face directory, streamed to disk one published tensor at a time."""

import functools
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert import fetched, hf_config, names, safetensors
from deepseek_jax.convert.hf.published import CONFIG, GENERATION_CONFIG, Warn, warn_on_stderr
from deepseek_jax.errors import UserError
from deepseek_jax.precision import fp4
from deepseek_jax.precision.fp4_weight import Fp4Weight
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.precision.quantize import quantize_blocks
from deepseek_jax.storage import ABSENT, Place, Remote, Store, answered, open_store, place
from deepseek_jax.tree import paths

TABLE = ("params", "embedding", "table_VD")
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Kind of scales, and what they are stored as.
SCALES = {"fp8": ("fp32", "F32"), "fp8_ue8m0": ("ue8m0", "F32"), "fp8_e8m0": ("ue8m0", "F8_E8M0")}
SCALES["fp4"] = SCALES["fp8_e8m0"]  # of what is not in FP4
FORMATS = {"bf16": "BF16", "fp32": "F32", **dict.fromkeys(SCALES, "BF16"), "keep": None}  # of what is not FP8

Get = Callable[[names.Path, names.Index], Any]  # an array of NumPy, or a weight in codes of such arrays


def from_tree(tree: dict) -> Get:
    """Returns the `get` of `write` for {"params", "router_bias"} of arrays; one piece at a time comes to the host.

    Those in FP8 or FP4 come as they are, of NumPy's arrays.
    """
    arrays = paths(tree)

    def get(path: names.Path, index: names.Index) -> np.ndarray:
        piece = jax.tree.map(lambda a: a[index], arrays[path]) if index else arrays[path]
        return jax.tree.map(np.asarray, piece)

    return get


def write(
    directory: str | PathLike | Remote,
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
    """Writes a model as a Hugging Face directory, here or in a bucket. Memory: a few times its largest tensor.

    Raises UserError if the dtype or family is unknown, or the directory holds weights or cannot be written. In a
    bucket an object stands beside the others until all are there (`fetched.UNFINISHED`).

    Args:
        directory: created if needed; must not hold weights yet.
        family, numbers: `config.family` and `config.model`.
        abstract: {"params", "router_bias"} of anything with shape and dtype.
        get: `get(path, index)` returns a piece (see `Piece`); `from_tree` returns such a function.
        dtype: "bf16", "fp32", an 8-bit format (for the matrices of all blocks except routers, as published; the rest
            is bfloat16), or "keep" (unchanged). Router biases are always float32. 8-bit weights come in blocks of
            128 x 128: "fp8" with arbitrary scales (V3), "fp8_ue8m0" with powers of two stored in float32 (V3.1),
            "fp8_e8m0" with powers of two stored in 8 bits; "fp4" is that with routed experts in FP4 (V4). Weights of V4
            that are held in codes with powers of two as scales keep them under "keep": stored in 8 bits, or in float32
            if none is in FP4, as the releases have them.
        n_positions, bos_id, eos_ids, pad_id: see `hf_config.to_hf`.
        generation: content of generation_config.json; by default these tokens.
        files: further files, such as tokenizer.json: name -> its path or its content.
        max_shard_bytes: limit for one file of weights.
        report: called with the number of bytes of each published tensor, for a progress bar.
        warn: called with a message about anything that keeps others from opening the directory.
    """
    _check_dtype(dtype, abstract)
    where = place(directory)
    where = where if isinstance(where, Remote) else where.expanduser()
    dtypes = {path: leaf.dtype for path, leaf in paths(abstract).items()}
    config = hf_config.to_hf(
        *(family, numbers),
        **_formats(dtype, abstract),
        n_positions=n_positions,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )
    marks = {"_from_model_config": True, "bos_token_id": bos_id, "eos_token_id": hf_config.one_or_list(eos_ids)}
    config |= _auto_map(family, config["model_type"], files, lambda message: warn(f"{where}: {message}"))
    described = {CONFIG: config, GENERATION_CONFIG: marks if generation is None else generation}
    files = {**files, **{name: (json.dumps(text, indent=2) + "\n").encode() for name, text in described.items()}}
    _store(where, list(_entries(abstract, dtypes, get, dtype, report)), max_shard_bytes, files)


def _check_dtype(dtype: str, abstract: dict) -> None:
    """Raises UserError for a dtype that is unknown, or not to be had of these weights."""
    if dtype not in FORMATS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(FORMATS)}.")
    if _held(dtype, abstract) and names.spelling(abstract) is not names.V4:
        raise UserError("dtype='keep' of weights that are held in FP8: give 'fp8', for the same codes, or 'bf16'.")
    if dtype == "fp4" and not any(names.IN_FP4.search(tensor.name) for tensor in names.tensors(abstract)):
        raise UserError("dtype='fp4' is for V4, whose routed experts are published in FP4. Give 'fp8' or 'bf16'.")


def _formats(dtype: str, abstract: dict) -> dict[str, Any]:
    """Returns what config.json says of the formats of the weights: arguments of `hf_config.to_hf`."""
    held = _held(dtype, abstract)
    is_quantized = names.spelling(abstract) is names.V4 and (dtype in SCALES or bool(held))
    in_fp4 = dtype == "fp4" or _has_fp4(held)
    return {
        "dtype": TORCH_DTYPES[FORMATS[dtype] or safetensors.DTYPE_NAMES[np.dtype(paths(abstract)[TABLE].dtype)]],
        "quantized": SCALES[dtype][0] if dtype in SCALES else "ue8m0" if held else None,
        "experts": "fp4" if in_fp4 else "fp8" if is_quantized else None,
    }


def _has_fp4(weights: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Fp4Weight) for leaf in weights)


def _held(dtype: str, abstract: dict) -> list[Fp8Weight]:
    """Returns the weights whose codes and scales are written as they are."""
    return [leaf for leaf in paths(abstract).values() if isinstance(leaf, Fp8Weight)] if dtype == "keep" else []


def _store(where: Place, entries: list, max_shard_bytes: int, files: Mapping[str, Path | bytes]) -> None:
    if isinstance(where, Remote):
        with answered():
            _send(open_store(where), entries, max_shard_bytes, files)
    else:
        safetensors.write_directory(where, entries, max_shard_bytes)
        copy_files(files, where)


def _send(store: Store, entries: list, max_shard_bytes: int, files: Mapping[str, Path | bytes]) -> None:
    """Writes all of it to a bucket; what an export that was killed has left there is deleted.

    Raises UserError if weights are there, or another export to this place has begun meanwhile; then the place counts as
    unfinished.
    """
    was_killed = store.generation(fetched.UNFINISHED) != ABSENT
    if not was_killed:
        safetensors.check_free(store)
    own = f"an export is under way, or was not finished: {uuid.uuid4().hex}\n".encode()
    store.write(fetched.UNFINISHED, own)
    for name in store.names() if was_killed else ():
        if fetched.is_exported(name):
            store.delete(name)
    assert isinstance(store.place, Remote)
    safetensors.write_directory(store.place, entries, max_shard_bytes)
    for name, content in files.items():
        store.write(name, content if isinstance(content, bytes) else content.read_bytes())
    if store.generation(fetched.UNFINISHED) == ABSENT:
        store.write(fetched.UNFINISHED, b"two exports were under way\n")
    if store.read(fetched.UNFINISHED) != own:
        raise UserError(f"{store}: another export to this place has begun meanwhile. Wait for it, then export again.")
    store.delete(fetched.UNFINISHED)


def _auto_map(family: str, model_type: str, files: Mapping[str, Path | bytes], warn: Warn) -> dict[str, Any]:
    """The entry of config.json that names the release's own classes, where transformers has none for the family."""
    code = hf_config.code(family)
    if code and set(code) <= set(files):
        return {"auto_map": hf_config.KINDS[model_type].auto_map}
    if code:
        warn(
            f"transformers has no class for model_type={model_type!r}: without {' and '.join(code)} of the release, "
            "only deepseek_jax can open this directory. Put them into the directory that the weights come from, and "
            "they are copied."
        )
    return {}


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
        parts = [get(path, index) for path, index in tensor.places]
        wide = [np.asarray(_widened(part)) if isinstance(part, Fp8Weight) else part for part in parts]
        array = tensor.to_theirs(wide)
        if report:
            report(array.nbytes)
        return array

    leaves = paths(abstract)
    for tensor in names.tensors(abstract):
        kind = FORMATS[dtype]
        if dtype == "keep" and isinstance(leaves[tensor.places[0][0]], Fp8Weight):
            kind = "F8_E8M0" if _has_fp4(leaves.values()) else "F32"
            yield from _as_held(tensor, leaves[tensor.places[0][0]], kind, get, report)
            continue
        if names.INTEGERS.search(tensor.name):
            kind = "I64"
        elif names.FLOAT32.search(tensor.name) and not (dtype == "keep" and names.OWN.match(tensor.name)):
            kind = "F32"
        elif kind is None:
            kinds = [dtypes[path] for path, _ in tensor.places]
            kind = safetensors.DTYPE_NAMES[np.dtype(functools.reduce(jnp.promote_types, kinds))]
        if dtype in SCALES and names.QUANTIZED.search(tensor.name):
            in_fp4 = dtype == "fp4" and bool(names.IN_FP4.search(tensor.name))
            yield from _in_fp4(tensor, published) if in_fp4 else _quantized(tensor, published, *SCALES[dtype])
            continue
        for name in (tensor.name, *copied.get(tensor.name, ())):
            make = functools.partial(_cast, published, tensor, safetensors.DTYPES[kind])
            yield safetensors.Entry(name, tensor.shape, kind, make)
    kind = FORMATS[dtype] or safetensors.DTYPE_NAMES[np.dtype(dtypes[TABLE])]
    for name, shape in names.empty_tensors(abstract).items():
        yield safetensors.Entry(name, shape, kind, functools.partial(np.zeros, shape, safetensors.DTYPES[kind]))


def _cast(published: Callable, tensor: names.Tensor, dtype: np.dtype) -> np.ndarray:
    return published(tensor).astype(dtype, copy=False)


_quantize = jax.jit(quantize_blocks, static_argnames="scale")
_quantize_fp4 = jax.jit(fp4.quantize)
_widened = jax.jit(lambda weight: weight.astype(jnp.float32))


def _quantized(tensor: names.Tensor, published: Callable, scale: str, kind: str) -> Iterator[safetensors.Entry]:
    """Yields the codes of a matrix and its scales of type `kind`, which are computed together."""
    made = {}

    def codes() -> np.ndarray:
        q, made["scales"] = map(np.asarray, _quantize(published(tensor), scale=scale))
        return q

    def scales() -> np.ndarray:
        return made.pop("scales").astype(safetensors.DTYPES[kind])

    blocks = safetensors.blocks_of(tensor.shape, safetensors.BLOCK)
    yield safetensors.Entry(tensor.name, tensor.shape, "F8_E4M3", codes)
    yield safetensors.Entry(names.scale_name(tensor.name), blocks, kind, scales)


def _in_fp4(tensor: names.Tensor, published: Callable) -> Iterator[safetensors.Entry]:
    """Yields the packed codes of a matrix in FP4 and its scales, which are computed together."""
    made = {}

    def codes() -> np.ndarray:
        packed, made["scales"] = map(np.asarray, _quantize_fp4(published(tensor)))
        return packed.view(np.int8)

    rows, columns = tensor.shape
    if columns % fp4.BLOCK:
        raise UserError(f"dtype='fp4': {tensor.name} has {columns} columns, and FP4 one scale per {fp4.BLOCK} of them.")
    yield safetensors.Entry(tensor.name, (rows, columns // 2), "I8", codes)
    scales = lambda: made.pop("scales")  # noqa: E731
    yield safetensors.Entry(names.scale_name(tensor.name), (rows, columns // fp4.BLOCK), "F8_E8M0", scales)


def _as_held(
    tensor: names.Tensor, leaf: Fp8Weight, scale_kind: str, get: Get, report: Callable | None
) -> Iterator[safetensors.Entry]:
    """Yields the codes and scales with which a matrix of V4 is held, like others of `leaf`; scales of this type.

    Raises UserError, when the codes are asked for, if E8M0 would not hold the scales exactly.
    """
    made: dict[str, np.ndarray] = {}
    is_fp4, e8m0 = isinstance(leaf, Fp4Weight), safetensors.DTYPES["F8_E8M0"]

    def codes() -> np.ndarray:
        ((path, index),) = tensor.places
        weight = get(path, index)
        made["scales"] = scales = weight.scale.view(e8m0) if is_fp4 else weight.scale.astype(e8m0)
        if not is_fp4 and not np.array_equal(scales.astype(np.float32), weight.scale):
            raise UserError(
                f"dtype='keep': {tensor.name} is held in FP8 with scales that are no powers of two, and V4's files "
                "hold only these. Give 'fp8' or 'bf16'."
            )
        if report:
            report(weight.nbytes)
        return weight.codes.view(np.int8) if is_fp4 else weight.codes

    def scales() -> np.ndarray:
        return made.pop("scales").astype(safetensors.DTYPES[scale_kind], copy=False)

    for name, part, kind, make in (
        (tensor.name, leaf.codes, "I8" if is_fp4 else "F8_E4M3", codes),
        (names.scale_name(tensor.name), leaf.scale, scale_kind, scales),
    ):
        yield safetensors.Entry(name, part.shape[-2:], kind, make)
