"""Valid published directories of every kind, as names and contents of their files."""

import functools
import os
import tempfile
from pathlib import Path

import numpy as np

from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.convert import hf
from deepseek_jax.convert.safetensors import DTYPES, FINITE_CODES, write_directory
from deepseek_jax.weights import published_config

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = "config.json"
Files = dict[str, "bytes | str"]  # content, or one of ODD
ODD = ("directory", "pipe", "dead link", "loop", "device", "unreadable", "sparse")


def read_files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_files(directory: Path, files: Files) -> None:
    """Creates a directory; some links lead outside of it."""
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
        del arrays[f"w.{name}"]  # they always come with scales
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
        published, source = open_model(GOLDEN / name)
        pieces = {(piece.path, piece.index): piece.array for piece in source.pieces()}
        with tempfile.TemporaryDirectory() as directory:
            hf.write(
                *(directory, published.family, published.numbers, source.abstract),
                *(lambda path, index, pieces=pieces: pieces[path, index], dtype),
                max_shard_bytes=10**9 if name == "llm" else 20_000,
            )
            found.append(read_files(Path(directory)))
    return tuple(found)


def open_model(directory: Path) -> tuple[hf.Published, hf.Source]:
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


def take_apart(raw: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def put_together(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
