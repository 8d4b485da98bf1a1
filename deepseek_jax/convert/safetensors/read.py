"""The tensors of a directory of safetensors files: headers are checked at once, data is read when asked for."""

import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from deepseek_jax.convert.safetensors import fp4
from deepseek_jax.convert.safetensors.dequantize import (
    BLOCK,
    FINITE_CODES,
    aligned,
    check_scale_info,
    check_scales,
    dequantize,
)
from deepseek_jax.convert.safetensors.files import OpenFile, OpenObject, State, open_file
from deepseek_jax.convert.safetensors.format import DTYPES, INDEX, SCALE_SUFFIX, SINGLE, Info, few, shown
from deepseek_jax.convert.safetensors.header import Place, by_shard, check_names, read_header
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place as Where
from deepseek_jax.storage import Remote, answered, open_store

COMPARED_BYTES = 1 << 24  # read of each tensor at a time in a comparison
OPEN_FILES = 32


def open_directory(directory: str | os.PathLike, weights: Remote | None = None) -> "Tensors":
    """Returns the tensors of a directory after checking all headers; reads no data. Raises UserError.

    `weights` is where the files of weights are, if that is a place in a bucket; the index is in `directory` even so.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise UserError(f"{directory}: {what}. Give the directory that holds {SINGLE} or {INDEX}.")
    try:
        with answered():
            found = sorted(os.listdir(directory) if weights is None else open_store(weights).names())
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror}).") from None
    if SINGLE in found and INDEX in found:
        where = weights or directory
        raise UserError(f"{where}: has both {SINGLE} and {INDEX}, which may differ. Delete one of the two.")
    if SINGLE in found:
        return Tensors(weights or directory, {SINGLE: None})
    if INDEX in found:
        return Tensors(weights or directory, by_shard(directory / INDEX))
    shards = [name for name in found if name.endswith((".safetensors", ".partial"))]
    hint = f" It holds {few(shards)}: an unfinished download or export?" if shards else ""
    if pickled := [name for name in found if re.fullmatch(r"pytorch_model.*\.bin", name)]:
        hint = f" It holds {few(pickled)}: let transformers load it and save_pretrained it, which writes safetensors."
    raise UserError(f"{weights or directory}: no {SINGLE} and no {INDEX}.{hint}")


class Tensors:
    """The tensors of a directory. Several threads may read at the same time."""

    def __init__(self, directory: Where, shards: Mapping[str, set[str] | None]):
        self.directory = directory
        self._places: dict[str, Place] = {}
        self._states: dict[str, State] = {}  # of the files whose headers were read
        self._files: dict[str, OpenFile | OpenObject] = {}
        self._lock = threading.Lock()
        missing = [] if isinstance(directory, Remote) else [s for s in shards if not os.path.lexists(directory / s)]
        if missing:
            raise UserError(
                f"{directory / missing[0]}: missing ({len(missing)} of {len(shards)} files named in {INDEX} are). "
                "Download or export again."
            )
        for shard, names in shards.items():
            with open_file(directory / shard) as file:
                places, self._states[shard] = read_header(file, shard), file.state
            if names is not None:
                check_names(directory, shard, names, places.keys())
            self._places |= places

    def names(self) -> list[str]:
        """Returns all names, scales included, file by file in the order of the data."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def info(self, name: str) -> Info:
        """Returns the dtype and shape of a tensor as stored."""
        return self._place(name).info

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as stored, in fresh aligned memory. Raises UserError if the file has changed."""
        place = self._place(name)
        buffer = aligned(place.info.nbytes)
        self._file(place.shard).read_into(buffer.data, place.offset)
        if place.info.dtype == "BOOL" and buffer.size and buffer.max() > 1:
            raise UserError(f"{self._where(name)}: a BOOL holds a byte other than 0 and 1. The file is damaged.")
        return buffer.view(DTYPES[place.info.dtype]).reshape(place.info.shape)

    def is_same(self, name: str, other: str) -> bool:
        """Returns whether two tensors agree in dtype, shape and every byte; holds one block of each at a time."""
        place = self._place(other)
        return self.info(name) == place.info and self._agrees(name, lambda start, n: self._bytes(place, start, n))

    def holds(self, name: str, array: np.ndarray) -> bool:
        """Returns whether a tensor is stored with the dtype, the shape and every byte of an array."""
        info = self.info(name)
        if (DTYPES[info.dtype], info.shape) != (array.dtype, array.shape):
            return False
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return self._agrees(name, lambda start, n: data[start : start + n])

    def is_quantized(self, name: str) -> bool:
        """Returns whether a tensor holds floats of 8 or 4 bits, which `read_dequantized` multiplies by their scales."""
        return self.info(name).dtype in FINITE_CODES or self.is_fp4(name)

    def is_fp4(self, name: str) -> bool:
        """Returns whether a tensor holds packed 4-bit floats: bytes that have scales."""
        return self.info(name).dtype == fp4.PACKED and self.scale_name(name) in self

    def scale_name(self, name: str) -> str:
        """Returns the name of a tensor's scales, in the spelling that the files have."""
        own = f"{name.removesuffix('weight')}scale"
        return own if name.endswith(".weight") and own in self else name + SCALE_SUFFIX

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; two packed numbers count as two."""
        shape = self.info(name).shape
        return fp4.shape_of(shape) if shape and self.is_fp4(name) else shape

    def read_dequantized(self, name: str, dtype: DTypeLike | None = None, block: tuple[int, int] = BLOCK) -> np.ndarray:
        """Returns a weight in FP8 or FP4 times its scales in `dtype` (bfloat16), any other tensor as stored.

        Raises UserError for scales that are missing, of a wrong shape, not finite, negative or too large for `dtype`,
        and for codes that are NaN or infinite.
        """
        if not self.is_quantized(name):
            return self.read(name)
        place, kind = self._place(name), np.dtype(dtype or ml_dtypes.bfloat16)
        if self.is_fp4(name):
            return fp4.dequantize(*self.read_codes(name), kind)
        scales, file, columns = self._scales(name, kind, block), self._file(place.shard), place.info.shape[-1]

        def read_rows(row: int, codes: np.ndarray) -> None:
            file.read_into(codes.reshape(-1).data, place.offset + row * columns)

        return dequantize(read_rows, place.info, scales, kind, block, self._where(name))

    def read_codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns an E4M3 weight as it is stored, and its scales in float32. Raises UserError as `read_dequantized`.

        Of a weight in FP4 the packed codes, uint8 [..., rows, columns / 2], and the scales in E8M0.
        """
        if self.is_fp4(name):
            scale_name = self.scale_name(name)
            fp4.check_scale_info(self.info(name), self.info(scale_name), self._where(scale_name))
            codes, scales = self.read(name).view(np.uint8), self.read(scale_name)
            fp4.check_scales(scales, self._where(scale_name))
            return codes, scales
        scales, codes = self._scales(name, np.dtype(np.float32), BLOCK), self.read(name)
        if codes.size and (codes.view(np.uint8) & 0x7F).max() >= FINITE_CODES["F8_E4M3"]:
            raise UserError(f"{self._where(name)}: a weight is NaN. The file is damaged.")
        return codes, scales

    def _scales(self, name: str, dtype: np.dtype, block: tuple[int, int]) -> np.ndarray:
        """Returns the scales of an 8-bit weight in float32, checked."""
        scale_name, codes = self.scale_name(name), self.info(name)
        if scale_name not in self:
            raise UserError(f"{self._where(name)}: 8-bit weights, but their scales {shown(scale_name)} are missing.")
        check_scale_info(codes, self.info(scale_name), block, name, self._where(scale_name))
        scales = self.read(scale_name).astype(np.float32)
        check_scales(scales, codes, dtype, self._where(scale_name))
        return scales

    def _agrees(self, name: str, other: Callable[[int, int], np.ndarray]) -> bool:
        """Returns whether a tensor's bytes equal those of `other(start, n_bytes)`, block by block."""
        place = self._place(name)
        starts = range(0, place.info.nbytes, COMPARED_BYTES)
        blocks = ((start, min(COMPARED_BYTES, place.info.nbytes - start)) for start in starts)
        return all(np.array_equal(self._bytes(place, *block), other(*block)) for block in blocks)

    def _bytes(self, place: Place, start: int, n_bytes: int) -> np.ndarray:
        block = np.empty(n_bytes, np.uint8)
        self._file(place.shard).read_into(block.data, place.offset + start)
        return block

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise UserError(f"{self.directory}: no tensor {shown(name)}.")
        return self._places[name]

    def _where(self, name: str) -> str:
        return f"{self.directory / self._place(name).shard}: {shown(name)}"

    def _file(self, shard: str) -> OpenFile | OpenObject:
        with self._lock:
            if shard not in self._files:
                while len(self._files) >= OPEN_FILES:
                    del self._files[next(iter(self._files))]  # closed when its last reader drops it
                self._files[shard] = open_file(self.directory / shard, self._states[shard])
            return self._files[shard]
