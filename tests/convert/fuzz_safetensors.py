"""Malformed published directories by the thousand: each must give one clear line, quickly and in little memory.

    python tests/convert/fuzz_safetensors.py --cases=10000 --seed=0      about one minute
    python tests/convert/fuzz_safetensors.py --only=whole:4711 --seed=0  one case again, with what was said

A case is a valid directory with one to three things broken: bytes of headers flipped, files cut off, shapes, dtypes and
offsets that lie, hostile JSON, shards that are missing, swapped, pipes or links, path tricks in the index, scales that
make no sense, settings in config.json that nobody meant.  Three targets share the cases:

    files    open_directory and every tensor in it, 8-bit ones multiplied with their scales
    config   read_json and from_hf
    whole    all that load does with a directory, but for putting the weights on a device

What must come of it: a UserError of one line or two that names the directory, file, tensor or key; or, where what was
broken did not matter or makes another valid directory, exactly what the published library reads from the same files
(files), a config that says what its keys say (config), the weights unchanged (whole).  Never another exception, a
warning, more than a second, or more than 200 MB above what the process had before.
"""

import argparse
import collections
import copy
import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np
import safetensors as library

from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.convert import hf, hf_config
from deepseek_jax.convert.safetensors import DTYPES, FINITE_CODES, INDEX, SINGLE, open_directory
from deepseek_jax.convert.safetensors_writer import write_directory
from deepseek_jax.errors import UserError
from deepseek_jax.stored import published_config

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG = "config.json"
LIMIT_SECONDS, LIMIT_MB = 1.0, 200
TRIES = 3  # of a case that took too long: the machine may have been busy
TARGETS = {"files": 70, "config": 15, "whole": 15}  # share of the cases, in per cent

Files = dict[str, "bytes | str"]  # content, or one of ODD
ODD = ("directory", "pipe", "dead link", "loop", "device", "unreadable", "sparse")


# -- what is valid ---------------------------------------------------------------------------------------------------


def read_files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_files(directory: Path, files: Files) -> None:
    """Makes a directory; links lead outside of it as well."""
    directory.mkdir()
    for name, content in files.items():
        path = directory / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "directory":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "unreadable":
            path.touch(0)
        elif content == "sparse":
            with open(path, "wb") as file:
                file.write((99_000_000).to_bytes(8, "little") + b'{"')
                file.truncate(1 << 34)
        else:
            path.symlink_to({"dead link": "nowhere", "loop": name, "device": "/dev/zero"}[content])


@functools.cache
def valid_directories() -> tuple[Files, ...]:
    """Small directories of every kind: one file or several, all dtypes, 8-bit weights with each kind of scale."""
    rng = np.random.default_rng(0)
    arrays = {f"w.{name}": rng.integers(0, 2, (2, 3)).astype(dtype) for name, dtype in DTYPES.items()}
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float16)}
    for name in FINITE_CODES:
        del arrays[f"w.{name}"]  # which stand alone nowhere
    for i, (shape, scales) in enumerate({(130, 3): "F32", (2, 5, 129): "F8_E8M0", (2, 2): "BF16"}.items()):
        codes = rng.integers(0, 0x7B, shape, np.uint8)
        name = "F8_E5M2" if i == 2 else "F8_E4M3"
        blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        arrays[f"q.{i}"] = codes.view(DTYPES[name])
        arrays[f"q.{i}_scale_inv"] = (2.0 ** rng.integers(-9, 3, blocks)).astype(DTYPES[scales])
    entries = [(name, array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()]
    few = [entry for entry in entries if entry[0] in ("w.F32", "w.BF16", "w.I8", "q.0", "q.0_scale_inv")]
    found = []
    for chosen, shard in ((entries, 10**9), (entries, 500), (few, 10**9), (few, 300)):
        with tempfile.TemporaryDirectory() as directory:
            write_directory(directory, chosen, shard)
            found.append(read_files(Path(directory)))
    return tuple(found)


@functools.cache
def valid_configs() -> tuple[Files, ...]:
    return tuple({CONFIG: path.read_bytes()} for path in sorted(GOLDEN.glob("*/config.json")))


@functools.cache
def valid_models() -> tuple[Files, ...]:
    """Tiny published models: one file, shards, shards in 8 bits."""
    found = []
    for name, dtype in (("llm", "bf16"), ("v2_lite", "fp32"), ("v3_mtp", "fp8"), ("v3_mtp", "fp8_e8m0")):
        published, source = _open_model(GOLDEN / name)
        pieces = {(piece.path, piece.index): piece.array for piece in source.pieces()}
        with tempfile.TemporaryDirectory() as directory:
            hf.write(
                *(directory, published.family, published.numbers, source.abstract),
                *(lambda path, index, pieces=pieces: pieces[path, index], dtype),
                max_shard_bytes=10**9 if name == "llm" else 20_000,
            )
            found.append(read_files(Path(directory)))
    return tuple(found)


def _open_model(directory: Path) -> tuple[hf.Published, hf.Source]:
    """What `load` does before it reads."""

    def ignore(message: str) -> None:
        pass

    published = hf.open_published(directory, ignore)
    config = published_config(published, directory)
    return published, hf.Source(published, _abstract(config), ignore)


_shapes: dict[str, dict] = {}


def _abstract(config) -> dict:
    key = config.family + config.model.to_json()
    if key not in _shapes:
        if len(_shapes) > 20:
            _shapes.clear()
        _shapes[key] = abstract_weights(config)
    return _shapes[key]


# -- what is broken --------------------------------------------------------------------------------------------------

PATHS = (
    *("../{}", "/{}", "./{}", "a/../{}", "{}/", "{}\0", "{}\n", "file:///{}", "..\\{}", "~/{}", "{} ", "sub/{}"),
    *(
        "",
        ".",
        "..",
        "/",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        INDEX,
        SINGLE,
        CONFIG,
        "\ud800",
        "ü",
        "a" * 5000,
    ),
)
TEXTS = (
    *("", "x", "\0", "a\nb", "\ud800", "\U0001f600", "a" * 300, "__metadata__", "w.F32", "q.0", "q.0_scale_inv", "NaN"),
    *(*DTYPES, "F4", "f32", "F32 ", "BF-16", "F8_E4M3FNUZ", "C64", "model.norm.weight", "llama", "yarn", "noaux_tc"),
)
NUMBERS = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "3",
        "4",
        "7",
        "8",
        "12",
        "128",
        "1e0",
        "2.0",
        "1e400",
        "-0",
        "1E9",
        "0.5",
        "NaN",
        "Infinity",
    ),
    *("65536", "4294967296", "2147483647", "9223372036854775807", "9223372036854775808", "18446744073709551615"),
    *("9" * 40, "9" * 4000, "9" * 5000, "01", "+1", "0x10", "1_000", "-", "1e", "1.", "true", "null"),
)
VALUES = (*("[]", "{}", "[[]]", '[""]', '{"a": 1}', "null", "true", "false", '"1"', "[0, 0]", "[1, 2, 3]", "[1]"),)
NESTED = tuple(
    open_ * n + "1" + close * n for n in (40, 400, 900, 3000, 100_000) for open_, close in ("[]", ('{"":', "}"))
)
BROKEN_ALREADY = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|\[|\{')


def mangle_json(text: bytes, rng: random.Random) -> bytes:
    """JSON with one value, key, bracket or stretch of bytes exchanged for something else."""
    tokens = list(TOKEN.finditer(text)) or [re.match(b"", text)]
    token = rng.choice(tokens)
    at, end = token.span()
    strings = [match for match in tokens if match.group().startswith(b'"')]
    numbers = [match for match in tokens if match.group()[:1].isdigit()]
    kind = rng.randrange(17)
    if kind < 4 and numbers:
        (at, end), new = rng.choice(numbers).span(), rng.choice(NUMBERS).encode()
    elif kind < 7 and strings:
        at, end = (match := rng.choice(strings)).span()
        old = match.group()[1:-1].decode("utf-8", "replace")
        new = json.dumps(rng.choice((*TEXTS, *PATHS)).replace("{}", old)).encode()
    elif kind == 7:
        new = rng.choice((*VALUES, *NUMBERS, *NESTED[:4])).encode()
    elif kind == 8:  # a key twice
        pairs = [match for match in strings if text[match.end() : match.end() + 1] == b":"]
        key = rng.choice(pairs or tokens)
        at = end = key.start()
        new = key.group() + b":" + rng.choice((b"1", b"{}", b"null", b'"x"')) + b","
    elif kind == 9:
        new = rng.choice(NESTED).encode()
    elif kind == 10:  # bytes turned
        turned = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            turned[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        return bytes(turned)
    elif kind == 11:  # bytes lost, added or doubled
        at = rng.randrange(len(text))
        end = min(len(text), at + rng.choice((0, 1, 2, 10)))
        new = rng.choice((b"", rng.randbytes(rng.randint(1, 4)), text[at:end] * 2, b",", b'"', b"\\", b"\xff", b"}"))
    elif kind == 12:
        return text[: rng.randrange(len(text))]
    elif kind == 13:
        return rng.choice(
            (b"\xef\xbb\xbf" + text, b" " + text, text + b"x", text + b"\0", text + text, b"", b"null", b"[]")
        )
    elif kind == 14:
        return text.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "utf-7")))
    elif kind == 15 and len(tokens) > 1:  # two exchanged
        first, second = sorted(rng.sample(tokens, 2), key=lambda match: match.start())
        between = text[first.end() : second.start()]
        return text[: first.start()] + second.group() + between + first.group() + text[second.end() :]
    else:
        new = b""
    return text[:at] + new + text[end:]


def enormous_json(rng: random.Random) -> bytes:
    """Text that is small on disk, and large or slow for who trusts it; up to what is read at all, and beyond."""
    n = rng.choice((1_000_000, 5_000_000, 23_900_000, 24_000_001))
    unit = rng.choice((b"[],", b"{},", b'{"a":1},', b"1e9,", b"12345678901,", b'"abcdefgh",', b"[[1],[2]],"))
    return rng.choice(
        (
            b'{"a":[' + unit * (n // len(unit)) + b"1]}",
            b'{"a":[' + unit * (249_000 // (1 + unit.count(b"[") + unit.count(b"{"))) + b"1]}",
            b"{" + b",".join(b'"%07d":1' % i for i in range(min(n // 12, 249_000))) + b"}",
            b'{"weight_map":{'
            + b",".join(b'"%d":"%d.safetensors"' % (i, i) for i in range(min(n // 30, 300_000)))
            + b"}}",
            b'{"' + b"a" * (n - 30) + b'":1}',
            b'{"' + b"a" * (n - 30) + b'\\ud83d\\ude00":1}',
            b'{"' + b"a" * (n // 4 - 30) + "\U0001f600".encode() + b'":1}',
            b'{"a":' + b"[" * min(n, 240_000),
            b'{"a":' * min(n // 5, 240_000),
            b'{"a":' + b"1" * n + b"}",
            b"{" + b" " * n + b"}",
            b'{"a":"' + b"\\u00e9" * (n // 6 - 10) + b'"}',
        )
    )


def enormous_header(rng: random.Random) -> bytes:
    """As many lawful tensors as a header may have, and some more; only the last one is not there."""
    n = rng.choice((10_000, 31_000, 100_000))
    entry = b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b"".join(entry % i + b"," for i in range(n)) + entry.replace(b"0]", b"1]") % n + b"}"


def take_apart(raw: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def put_together(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def break_header(files: Files, rng: random.Random) -> None:
    """JSON of a header, as text."""
    if name := _some_weights(files, rng):
        header, data = take_apart(files[name])
        files[name] = put_together(mangle_json(header or b"{}", rng), data)


def break_tensor(files: Files, rng: random.Random) -> None:
    """A header that stays JSON and lies about a tensor."""
    name = _some_weights(files, rng)
    header, data = take_apart(files[name]) if name else (b"", b"")
    header = json.loads(header)
    tensors = [key for key in header if key != "__metadata__"]
    entry, other = header[rng.choice(tensors)], rng.choice(tensors)
    shape, offsets = entry["shape"], entry["data_offsets"]
    kind = rng.randrange(14)
    if kind == 0:
        entry["dtype"] = rng.choice(list(DTYPES))
    elif kind == 1:
        entry["dtype"] = rng.choice((*TEXTS, None, 1, [], {}))
    elif kind == 2:
        rng.shuffle(shape)
    elif kind == 3:
        shape[:] = rng.choice(
            ([], [1] * 40, [2**32] * 2, [2**62, 4, 0], [2**63], [-1, -6], [6], [2, 3], [1.0], [True, 6])
        )
    elif kind == 4 and shape:
        shape[rng.randrange(len(shape))] += rng.choice((-1, 1, 2**31, -(2**40)))
    elif kind == 5 and isinstance(header[other], dict):
        entry["data_offsets"] = header[other].get("data_offsets")
    elif kind == 6:
        offsets[rng.randrange(2)] += rng.choice((-1, 1, 8, -8, 2**31, 2**63))
    elif kind == 7:
        offsets.reverse()
    elif kind == 8:
        move = rng.choice((-8, -1, 1, 8))
        entry["data_offsets"] = [offset + move for offset in offsets]
    elif kind == 9:
        del header[other]
    elif kind == 10:
        header[rng.choice(TEXTS)] = copy.deepcopy(entry)
    elif kind == 11:
        header[rng.choice(TEXTS)] = header.pop(other)
    elif kind == 12:
        entry.pop(rng.choice(list(entry)))
    else:
        header["__metadata__"] = rng.choice(
            (None, [], {"a": 1}, {"a": None}, "x", {"format": "\ud800"}, {"a": "b" * 9000})
        )
    files[name] = put_together(json.dumps(header).encode(), data)


def break_data(files: Files, rng: random.Random) -> None:
    """Values of scales and of 8-bit weights, a few bytes of them."""
    if (name := _some_weights(files, rng)) and (data := take_apart(files[name])[1]):
        at = len(files[name]) - len(data) + rng.randrange(len(data))
        new = rng.choice((b"\xff", b"\x7f", b"\x80\x7f", b"\xff" * 4, b"\0\0\x80\x7f", b"\0", rng.randbytes(2)))
        files[name] = (files[name][:at] + new + files[name][at + len(new) :])[: len(files[name])]


def break_length(files: Files, rng: random.Random) -> None:
    """The eight bytes in front."""
    if name := _some_weights(files, rng):
        length = int.from_bytes(files[name][:8], "little")
        near = [length + i for i in (-8, -1, 1, 8)] + [len(files[name]) - 8, len(files[name])]
        far = [0, 1, 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)]
        files[name] = (max(0, rng.choice(near + far)) % 2**64).to_bytes(8, "little") + files[name][8:]


def break_file(files: Files, rng: random.Random) -> None:
    """Whole files: cut off, longer, missing, exchanged, or none at all."""
    name = rng.choice(list(files)) if files else SINGLE
    content = files.get(name)
    kind = rng.randrange(9)
    if kind < 3 and isinstance(content, bytes) and content:
        files[name] = content[: rng.choice((0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content))))]
    elif kind == 3 and isinstance(content, bytes):
        files[name] = content + rng.choice((b"\0", b"x" * 100, content))
    elif kind == 4:
        files.pop(name, None)
    elif kind == 5:
        files[name] = rng.choice(ODD)
    elif kind == 6:
        other = rng.choice(list(files) or [SINGLE])
        files[name], files[other] = files.get(other, b""), files.get(name, b"")
    elif kind == 7:
        files[rng.choice((SINGLE, INDEX, CONFIG))] = rng.choice(list(files.values()) or [b""])
    elif rng.random() < 0.1:
        files.clear()
    else:
        files[name] = rng.randbytes(rng.choice((0, 7, 8, 100)))


def break_index(files: Files, rng: random.Random) -> None:
    """The index: as text, or as a map that lies."""
    if not isinstance(files.get(INDEX), bytes):
        return break_header(files, rng)
    index = json.loads(files[INDEX])
    where, name = index["weight_map"], rng.choice(list(index["weight_map"]))
    kind = rng.randrange(7)
    if kind < 2:
        files[INDEX] = mangle_json(files[INDEX], rng)
        return
    if kind == 2:
        where[name] = rng.choice(list(where.values()))
    elif kind == 3:
        del where[name]
    elif kind == 4:
        where[rng.choice(TEXTS)] = where[name]
    elif kind == 5:
        where[name] = rng.choice(PATHS).replace("{}", str(where[name]))
    else:
        trick = rng.choice(PATHS)
        index["weight_map"] = {key: trick.replace("{}", str(shard)) for key, shard in where.items()}
    files[INDEX] = json.dumps(index).encode()


def break_hugely(files: Files, rng: random.Random) -> None:
    """Headers and indices as large as they may be, and larger."""
    name = rng.choice([name for name in files if name.endswith((".json", ".safetensors"))] or [SINGLE])
    if name.endswith(".json"):
        files[name] = enormous_json(rng)
    else:
        files[name] = put_together((enormous_header if rng.random() < 0.2 else enormous_json)(rng), b"")


def break_config(files: Files, rng: random.Random) -> None:
    """Settings: as text, or a key with another value, another key's value, or none."""
    config = json.loads(files[CONFIG])
    part = rng.choice([config] * 4 + [value for value in config.values() if isinstance(value, dict) and value])
    key = rng.choice(list(part))
    kind = rng.randrange(8)
    if kind < 2:
        files[CONFIG] = mangle_json(files[CONFIG], rng)
        return
    if kind == 2:
        del part[key]
    elif kind == 3:
        part[key] = part[rng.choice(list(part))]
    elif kind == 4:
        part[key] = rng.choice((None, True, False, [], {}, "", "x", -1, 0, 1, 1.5, 2**40, 1e30, [1], {"type": "yarn"}))
    elif kind == 5 and type(part[key]) in (int, float):
        part[key] = type(part[key])(part[key] * rng.choice((2, 3, 1000, -1, 0, 10**6)))
    elif kind == 6:
        part[rng.choice(("rope_scaling", "rope_parameters", "quantization_config", "layer_types", "head_dim"))] = (
            rng.choice(
                (
                    {"type": "yarn", "factor": 4},
                    {"rope_type": "linear", "factor": 2.0},
                    {"rope_type": "dynamic", "factor": 2.0},
                    {"rope_theta": 5.0, "rope_type": "default"},
                    {"quant_method": "gptq"},
                    {"quant_method": "fp8", "weight_block_size": [64, 64]},
                    ["sliding_attention"],
                    7,
                )
            )
        )
    else:
        part[key] = str(part[key])
    files[CONFIG] = json.dumps(config).encode()


def _some_weights(files: Files, rng: random.Random) -> str | None:
    names = [name for name, content in files.items() if name.endswith(".safetensors") and isinstance(content, bytes)]
    return rng.choice(names) if names else None


BREAKERS = {
    "files": {break_header: 30, break_tensor: 30, break_index: 15, break_file: 12, break_length: 6, break_data: 6},
    "config": {break_config: 1},
    "whole": {break_header: 25, break_tensor: 30, break_index: 12, break_file: 10, break_length: 4, break_config: 20},
}
HUGE_SHARE = 0.01
VALID = {"files": valid_directories, "config": valid_configs, "whole": valid_models}


def make_case(target: str, seed: int, number: int) -> tuple[Files, Files]:
    """(valid, broken): the same for the same numbers, whatever else is run."""
    rng = random.Random(f"{target} {seed} {number}")
    valid = rng.choice(VALID[target]())
    broken = dict(valid)
    if rng.random() < HUGE_SHARE:
        break_hugely(broken, rng)
    else:
        breakers = BREAKERS[target]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            try:
                rng.choices(list(breakers), list(breakers.values()))[0](broken, rng)
            except BROKEN_ALREADY:
                break_file(broken, rng)
    return valid, broken


# -- what must come of it --------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A case whose outcome breaks the law."""


def try_files(directory: Path) -> dict[str, tuple]:
    """Name -> dtype, shape and bytes, as stored and dequantised, of everything."""
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
        header = header.replace(b"-0", b" 0")  # which is 0 to Python and no integer to the library
        for name, tensor in library.deserialize(put_together(header, data)):
            if SINGLE not in files and where.get(name) != shard:
                raise ValueError(f"{name!r} is not where the index says")
            found[name] = tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])
    if SINGLE not in files and where.keys() != found.keys():
        raise ValueError("the index names other tensors")
    return found


def try_config(directory: Path) -> tuple:
    hf_json = hf.safetensors.read_json(directory / CONFIG)
    return *hf_config.from_hf(hf_json), hf_config.facts(hf_json)


# Nothing that is computed here hangs on these.
IDLE_KEYS = {
    *("architectures", "attention_dropout", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "torch_dtype"),
    *("transformers_version", "use_cache", "dtype", "auto_map", "max_window_layers", "sliding_window", "_name_or_path"),
    *("pad_token_id", "activation_scheme", "qk_head_dim", "output_router_logits"),
}
GROUPS = ("n_group", "topk_group")


def check_config(directory: Path, found: tuple, valid: Files, broken: Files) -> str:
    """Written out and read again it is the same; and no key has been read past."""
    family, numbers, facts = found
    marks = {key: getattr(facts, key) for key in ("n_positions", "bos_id", "eos_ids", "pad_id")}
    written = json.loads(json.dumps(hf_config.to_hf(family, numbers, **marks)))
    if hf_config.from_hf(written) != (family, numbers) or hf_config.facts(written)[:3] != facts[:3]:
        raise Wrong("written out and read again it is another config")
    before, after = json.loads(valid[CONFIG]), json.loads(broken[CONFIG])
    changed = _changes(before, after)
    for key in ("head_dim",) * ("kv_lora_rank" in before) + GROUPS * (before.get("topk_method") == "greedy"):
        changed.pop(key, None)  # latent attention has no such width, a choice without groups no such numbers
    hf_before = (*hf_config.from_hf(before), hf_config.facts(before))
    if found != hf_before:
        return "valid, other content"
    if changed:
        raise Wrong(f"the same config in spite of {str(changed)[:300]}")
    return "unharmed"


def _changes(before: dict, after: dict, where: str = "") -> dict[str, tuple]:
    """Keys whose value is another, but for those on which nothing hangs and those left out, which have defaults."""
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
        for piece in _open_model(directory)[1].pieces()
    }


_pieces: dict[int, dict] = {}


def check_whole(directory: Path, found: dict, valid: Files, broken: Files) -> str:
    """The weights are those of the valid directory; a tensor of the same size in other words is beyond any check."""
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
        check_files(directory, try_files(directory), valid, broken)  # it is what the files say
        return "valid, other content"
    raise Wrong(f"other weights from the same files (same names: {same_names})")


TRY = {"files": try_files, "config": try_config, "whole": try_whole}
CHECK = {"files": check_files, "config": check_config, "whole": check_whole}


def check_message(text: str, directory: Path, files: Files) -> None:
    if not 1 <= len(text.splitlines()) <= 2 or len(text) > 1000 or not text.replace("\n", "").isprintable():
        raise Wrong(f"no clear line: {text[:300]!r}")
    if str(directory) not in text and CONFIG not in text:
        raise Wrong(f"names nothing: {text[:300]!r}")


# -- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    kind: str  # "refused", "unharmed", "valid, other content", "wrong"
    text: str
    seconds: float
    megabytes: float


def resident(which: str) -> float:
    """VmRSS, what the process holds now, or VmHWM, the most it held since `forget_peak`; in MB (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(which))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def run_case(target: str, seed: int, number: int, scratch: Path, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
    """Makes a case, lets the target at it and judges what came of it."""
    valid, broken = make_case(target, seed, number)
    directory = scratch / f"{target}-{number}"
    write_files(directory, broken)
    try:
        for left in reversed(range(TRIES)):
            outcome, found = _attempt(target, directory)
            if outcome.seconds <= limit_seconds or outcome.kind == "wrong":
                break
            if not left:
                raise Wrong(f"took {outcome.seconds:.2f} s")
        if outcome.megabytes > LIMIT_MB:
            raise Wrong(f"took {outcome.megabytes:.0f} MB")
        if outcome.kind == "refused":
            check_message(outcome.text, directory, broken)
        elif outcome.kind != "wrong":
            outcome.kind = CHECK[target](directory, found, valid, broken)
    except Wrong as wrong:
        outcome.kind, outcome.text = "wrong", str(wrong)
    finally:
        shutil.rmtree(directory)
    return outcome


def _attempt(target: str, directory: Path) -> tuple[Outcome, object]:
    found, text = None, ""
    forget_peak()
    before, begin = resident("VmRSS"), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, kind = TRY[target](directory), "read"
    except UserError as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kind, text = "wrong", "".join(traceback.format_exception(error)[-8:])
    seconds = time.perf_counter() - begin
    return Outcome(kind, text, seconds, max(0.0, resident("VmHWM") - before)), found


def run(seed: int, numbers: dict[str, range], scratch: Path, limit_seconds: float = LIMIT_SECONDS, report=None) -> dict:
    """Runs cases; returns outcomes by target."""
    outcomes = {target: [] for target in numbers}
    for target, chosen in numbers.items():
        for valid in VALID[target]():  # what is compiled and imported once does not count
            directory = scratch / "valid"
            write_files(directory, valid)
            TRY[target](directory)
            shutil.rmtree(directory)
        for number in chosen:
            outcomes[target].append(run_case(target, seed, number, scratch, limit_seconds))
            if report:
                report(target, number, outcomes[target][-1])
    return outcomes


def shares(cases: int) -> dict[str, range]:
    """How many cases each target gets."""
    return {target: range(round(cases * share / 100)) for target, share in TARGETS.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="in all, shared by the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="TARGET:NUMBER, one case, and what was said")
    options = parser.parse_args(argv)
    numbers = shares(options.cases)
    if options.only:
        target, _, number = options.only.partition(":")
        numbers = {target: range(int(number), int(number) + 1)}
    n_wrong = 0

    def report(target: str, number: int, outcome: Outcome) -> None:
        nonlocal n_wrong
        n_wrong += outcome.kind == "wrong"
        if options.only or (outcome.kind == "wrong" and n_wrong <= 20):
            print(f"{target}:{number}: {outcome.kind}: {outcome.text}", flush=True)

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run(options.seed, numbers, Path(scratch), report=report)
    for target, found in outcomes.items():
        kinds = collections.Counter(outcome.kind for outcome in found)
        slowest = max(range(len(found)), key=lambda i: found[i].seconds)
        largest = max(range(len(found)), key=lambda i: found[i].megabytes)
        print(
            f"{target:6} {len(found):6} cases: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}; "
            f"slowest {found[slowest].seconds:.3f} s (case {numbers[target][slowest]}), "
            f"most memory {found[largest].megabytes:.0f} MB (case {numbers[target][largest]})"
        )
    print(f"seed {options.seed}, {time.perf_counter() - begin:.0f} s, {n_wrong} wrong")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
