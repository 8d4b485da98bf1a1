"""Headers and indices of safetensors files, read without trust.

A file is accepted only if nothing is in doubt: every byte of data belongs to exactly one tensor, shape times item size
equals the number of bytes, index and shards name the same tensors, and shards are in the directory itself (a symlink
may lead elsewhere: that is how download caches are built). Everything else raises UserError, using less than 200 MB of
memory however hostile the file is. That is why headers may have at most 24 MB, where the format's own libraries allow
100 MB.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.convert.safetensors.files import OpenFile, OpenObject
from deepseek_jax.convert.safetensors.format import DTYPES, INDEX, Info, few, shown
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place as Where

MAX_JSON_BYTES = 24_000_000  # of text: enough for an index of 250,000 tensors
MAX_JSON_VALUES = 250_000  # lists, objects and their items: this bounds the memory of the parsed text
MAX_SHARDS = 10_000
MAX_RANK = 32
NOT_SAFETENSORS = "The file is damaged or not a safetensors file."


class Place(NamedTuple):
    """Where a tensor is stored."""

    shard: str  # name of the file
    offset: int  # bytes from the start of the file
    info: Info  # dtype and shape


def read_json(path: str | os.PathLike) -> dict:
    """Returns the JSON object in a file. Raises UserError for anything else, for repeated keys and for huge files."""
    path = Path(path)
    with OpenFile(path) as file:
        _check_json_size(path, file.size)
        return _parse_object(path, file.read(0, file.size))


def by_shard(path: Path) -> dict[str, set[str]]:
    """Returns the names that an index file expects in each shard."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map {{tensor: file}} in it. Download or export again.")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in shards:
            _check_shard_name(path, name, shard, len(shards))
            shards[shard] = set()
        shards[shard].add(name)
    return shards


def _check_shard_name(path: Path, name: str, shard: object, seen: int) -> None:
    if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,200}", shard):
        raise UserError(
            f"{path}: places {shown(name)} in {shown(shard)}: expected the plain name of a file in the same directory."
        )
    if seen == MAX_SHARDS:
        raise UserError(f"{path}: names more than {MAX_SHARDS} files. The file may be damaged.")


def check_names(directory: Where, shard: str, expected: set[str], found: Iterable[str]) -> None:
    """Raises UserError unless a shard holds exactly the tensors that the index names for it."""
    if missing := sorted(expected - set(found)):
        raise UserError(f"{directory / shard}: does not hold {few(missing)}, which {INDEX} places there.")
    if unexpected := sorted(set(found) - expected):
        raise UserError(f"{directory / shard}: holds {few(unexpected)}, which {INDEX} does not place there.")


def read_header(file: OpenFile | OpenObject, shard: str) -> dict[str, Place]:
    """Returns where the tensors of a file are, in the order of the data. Raises UserError."""
    path, length = file.path, _header_length(file)
    raw = file.read(8, length)
    if not raw.startswith(b"{"):
        raise UserError(f"{path}: the header does not start with a brace. {NOT_SAFETENSORS}")
    header = _parse_object(path, raw)
    del raw
    _check_metadata(path, header.pop("__metadata__", {}))
    ordered = sorted((*_tensor(path, name, entry), name) for name, entry in header.items())
    end, places = 0, {}
    for begin, stop, info, name in ordered:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes before it unused"
            raise UserError(f"{path}: {shown(name)} {what}. {NOT_SAFETENSORS}")
        end, places[name] = stop, Place(shard, 8 + length + begin, info)
    if differs := file.compared(8 + length + end):
        what = "truncated" if differs < 0 else "longer than its header says"
        raise UserError(f"{path}: {what}: {_size(file)}, expected {8 + length + end}. Download it again.")
    return places


def _size(file: OpenFile | OpenObject) -> str:
    """Returns how large a file is, for a message; that of an object is not known."""
    return f"{file.size} bytes" if isinstance(file, OpenFile) else "other bytes"


def _header_length(file: OpenFile | OpenObject) -> int:
    if file.compared(8) < 0:
        raise UserError(f"{file.path}: {_size(file)}, too few for a header. {NOT_SAFETENSORS}")
    length = int.from_bytes(file.read(0, 8), "little")
    if file.compared(8 + length) < 0:
        raise UserError(f"{file.path}: a header of {length} bytes in a file of {_size(file)}. {NOT_SAFETENSORS}")
    _check_json_size(file.path, length)
    return length


def _tensor(path: Where, name: str, entry: object) -> tuple[int, int, Info]:
    """Returns begin, end, dtype and shape of one tensor in a header, checked on its own."""
    if not name.isprintable() or not 0 < len(name) <= 1000:
        raise _invalid(path, name, "invalid name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(path, name, "expected dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _invalid(path, name, f"dtype {shown(dtype)} is unknown: expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape, MAX_RANK):
        raise _invalid(path, name, f"shape {shown(shape)}: expected a list of up to {MAX_RANK} sizes")
    if not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise _invalid(path, name, f"data_offsets {shown(offsets)}: expected two positions")
    itemsize, nbytes = DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if math.prod(shape) * itemsize != nbytes:
        takes = math.prod(shape) * itemsize
        raise _invalid(path, name, f"{nbytes} bytes for {dtype} of shape {shown(shape)}, which takes {takes}")
    if not nbytes and math.prod(size or 1 for size in shape) * itemsize >= 2**63:
        raise _invalid(path, name, f"shape {shown(shape)} exceeds any memory")
    return *offsets, Info(dtype, tuple(shape))


def _invalid(path: Where, name: str, what: str) -> UserError:
    return UserError(f"{path}: {shown(name)}: {what}. The file is damaged, or newer than this version can read.")


def _are_sizes(values: object, most: int) -> bool:
    """Returns whether this is a list of at most `most` integers from 0 to 2^63 - 1; True and False do not count."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_metadata(path: Where, metadata: object) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and _is_unicode(text) for text in texts):
        raise UserError(f"{path}: __metadata__: expected a map from text to text. The file is damaged.")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _check_json_size(path: Where, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read. The file may be damaged.")


def _parse_object(path: Where, raw: bytearray) -> dict:
    """Returns a JSON object. Text that would take long or much memory is rejected before it is parsed."""
    ascii_only = raw.isascii()
    if not ascii_only:
        _check_json_size(path, 4 * len(raw))  # a character may take four bytes in memory
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_JSON_VALUES:
        raise UserError(f"{path}: JSON of more than {MAX_JSON_VALUES} values. The file may be damaged.")
    try:
        value = json.loads(raw.decode("ascii" if ascii_only else "utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply. The file may be damaged.") from None
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON ({str(error)[:100]}). The file may be damaged.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {shown(value)}, expected a JSON object.")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return result
