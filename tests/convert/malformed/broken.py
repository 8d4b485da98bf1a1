"""Cases: a valid directory with one to three things broken."""

import copy
import json
import random

from deepseek_jax.convert.safetensors import DTYPES, INDEX, SINGLE
from malformed.broken_json import PATHS, TEXTS, enormous_header, enormous_json, mangle_json
from malformed.directories import (
    CONFIG,
    ODD,
    Files,
    put_together,
    take_apart,
    valid_configs,
    valid_directories,
    valid_models,
)

BROKEN_ALREADY = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def break_header(files: Files, rng: random.Random) -> None:
    """JSON of a header, as text."""
    if name := _some_weights(files, rng):
        header, data = take_apart(files[name])
        files[name] = put_together(mangle_json(header or b"{}", rng), data)


def break_tensor(files: Files, rng: random.Random) -> None:
    """A header that is still JSON, with a wrong entry for a tensor."""
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
    """The eight bytes at the start."""
    if name := _some_weights(files, rng):
        length = int.from_bytes(files[name][:8], "little")
        near = [length + i for i in (-8, -1, 1, 8)] + [len(files[name]) - 8, len(files[name])]
        far = [0, 1, 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)]
        files[name] = (max(0, rng.choice(near + far)) % 2**64).to_bytes(8, "little") + files[name][8:]


def break_file(files: Files, rng: random.Random) -> None:
    """Whole files: truncated, longer, missing, exchanged, or none at all."""
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
    """The index: as text, or as a wrong map."""
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
    """Headers and indices of the largest size allowed, and larger."""
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
    """Returns (valid, broken), a function of the arguments alone."""
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
