"""Names and limits of the safetensors format, and how values from a file appear in messages."""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"  # of the scales of NAME; those of NAME.weight may be NAME.scale as well (V4)
IO_BYTES = 1 << 30  # one system call moves at most 2 GiB

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Info(NamedTuple):
    """What a header says about a tensor: its dtype (a key of `DTYPES`) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Returns the size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def shown(value: object) -> str:
    """Returns a value from a file on one short line, quoted and escaped if it is text."""
    if isinstance(value, list):
        inner = ["…" if isinstance(item, (list, dict)) else shown(item) for item in value[:8]]
        text = f"[{', '.join(inner)}{', …' if len(value) > 8 else ''}]"
    else:
        text = "{…}" if isinstance(value, dict) else repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 120 else text[:119] + "…"


def few(names: list[str]) -> str:
    """Returns the first three names and the number of the others."""
    text = ", ".join(map(shown, names[:3]))
    return text + (f" and {len(names) - 3} more" if len(names) > 3 else "")
