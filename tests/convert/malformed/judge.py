"""The law for a malformed directory: one clear error, or exactly what the files say."""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors as library

from deepseek_jax.convert import hf_config
from deepseek_jax.convert.safetensors import DTYPES, FINITE_CODES, INDEX, SINGLE, open_directory, read_json
from malformed.directories import CONFIG, Files, open_model, put_together, take_apart, write_files


class Wrong(Exception):
    """A case whose outcome breaks the law."""


def try_files(directory: Path) -> dict[str, tuple]:
    """Returns name -> dtype, shape and bytes, as stored and dequantised, of every tensor."""
    tensors = open_directory(directory)
    found = {}
    for name in tensors.names():
        dtype, shape = tensors.info(name)
        read = tensors.read_dequantized(name)
        found[name] = dtype, shape, tensors.read(name).tobytes(), read.tobytes()
    return found


def check_files(directory: Path, found: dict[str, tuple], valid: Files, broken: Files) -> str:
    """Compares with what the published library reads, multiplied by the definition."""
    try:
        said = _by_the_library(broken)
    except Exception as error:
        raise Wrong(f"read, though the library refuses: {error}") from error
    if found.keys() != said.keys():
        raise Wrong(f"other names than the library reads: {sorted(found.keys() ^ said.keys())[:4]}")
    for name, (dtype, shape, raw, dequantized) in found.items():
        if (dtype, shape, raw) != said[name]:
            raise Wrong(f"{name!r}: {dtype} {shape} read, the library reads {said[name][:2]}, or other bytes")
        expected = raw
        if dtype in FINITE_CODES:
            codes, scales = (_array(said[key]).astype(np.float32) for key in (name, f"{name}_scale_inv"))
            spread = scales.repeat(128, -2).repeat(128, -1)[..., : shape[-2], : shape[-1]]
            expected = (codes * spread).astype(ml_dtypes.bfloat16).tobytes()
            if not np.isfinite(codes * spread).all():
                raise Wrong(f"{name!r}: a weight that is not finite")
        if dequantized != expected:
            raise Wrong(f"{name!r}: not the product of codes and scales")
    return "unharmed" if said == _by_the_library(valid) else "valid, other content"


def _array(said: tuple) -> np.ndarray:
    dtype, shape, raw = said
    return np.frombuffer(raw, DTYPES[dtype]).reshape(shape)


def _by_the_library(files: Files) -> dict[str, tuple]:
    shards = [SINGLE]
    if SINGLE not in files:
        where = json.loads(files[INDEX])["weight_map"]
        shards = sorted(set(where.values()))
    found = {}
    for shard in shards:
        header, data = take_apart(files[shard])
        header = header.replace(b"-0", b" 0")  # 0 for Python, not an integer for the library
        for name, tensor in library.deserialize(put_together(header, data)):
            if SINGLE not in files and where.get(name) != shard:
                raise ValueError(f"{name!r} is not where the index says")
            found[name] = tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])
    if SINGLE not in files and where.keys() != found.keys():
        raise ValueError("the index names other tensors")
    return found


def try_config(directory: Path) -> tuple:
    hf_json = read_json(directory / CONFIG)
    return *hf_config.from_hf(hf_json), hf_config.facts(hf_json)


# Nothing that we compute depends on these.
IDLE_KEYS = {
    *("architectures", "attention_dropout", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "torch_dtype"),
    *("transformers_version", "use_cache", "dtype", "auto_map", "max_window_layers", "sliding_window", "_name_or_path"),
    *("pad_token_id", "activation_scheme", "qk_head_dim", "output_router_logits"),
}
GROUPS = ("n_group", "topk_group")


def check_config(directory: Path, found: tuple, valid: Files, broken: Files) -> str:
    """Written and read again it is the same, and no changed key was ignored."""
    family, numbers, facts = found
    marks = {key: getattr(facts, key) for key in ("n_positions", "bos_id", "eos_ids", "pad_id")}
    written = json.loads(json.dumps(hf_config.to_hf(family, numbers, **marks)))
    if hf_config.from_hf(written) != (family, numbers) or hf_config.facts(written)[:3] != facts[:3]:
        raise Wrong("written out and read again it is another config")
    before, after = json.loads(valid[CONFIG]), json.loads(broken[CONFIG])
    changed = _changes(before, after)
    for key in ("head_dim",) * ("kv_lora_rank" in before) + GROUPS * (before.get("topk_method") == "greedy"):
        changed.pop(key, None)  # unused by latent attention, and without groups
    hf_before = (*hf_config.from_hf(before), hf_config.facts(before))
    if found != hf_before:
        return "valid, other content"
    if changed:
        raise Wrong(f"the same config in spite of {str(changed)[:300]}")
    return "unharmed"


def _changes(before: dict, after: dict, where: str = "") -> dict[str, tuple]:
    """Returns keys with another value, except idle ones and missing ones, which have defaults."""
    found = {}
    for key in before:
        old, new = before[key], after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _changes(old, new, f"{where}{key}.")
        elif new is not None and new not in (old, [old]) and key not in IDLE_KEYS:
            found[where + key] = old, new
    return found


def try_whole(directory: Path) -> dict[tuple, tuple]:
    """What `load` does: every piece, by path and index."""
    return {
        (piece.path, piece.index): (str(piece.array.dtype), piece.array.shape, piece.array.tobytes())
        for piece in open_model(directory)[1].pieces()
    }


_pieces: dict[int, dict] = {}


def check_whole(directory: Path, found: dict, valid: Files, broken: Files) -> str:
    """The weights are those of the valid directory, or what the changed files say."""
    if id(valid) not in _pieces:
        with tempfile.TemporaryDirectory() as scratch:
            write_files(Path(scratch) / "valid", valid)
            _pieces[id(valid)] = try_whole(Path(scratch) / "valid")
    expected = _pieces[id(valid)]
    if found == expected:
        return "unharmed"
    weights = {name for name in valid if name.endswith(".safetensors")}
    same_names = _by_the_library(broken).keys() == _by_the_library(valid).keys()
    if any(valid[name] != broken.get(name) for name in weights):
        try_files(directory)
        check_files(directory, try_files(directory), valid, broken)  # they are what the files say
        return "valid, other content"
    raise Wrong(f"other weights from the same files (same names: {same_names})")


TRY = {"files": try_files, "config": try_config, "whole": try_whole}
CHECK = {"files": check_files, "config": check_config, "whole": check_whole}


def check_message(text: str, directory: Path, files: Files) -> None:
    if not 1 <= len(text.splitlines()) <= 2 or len(text) > 1000 or not text.replace("\n", "").isprintable():
        raise Wrong(f"not a clear line: {text[:300]!r}")
    if str(directory) not in text and CONFIG not in text:
        raise Wrong(f"names no place: {text[:300]!r}")
