"""Which tiles the Hopper kernels use."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work; for the names see `pipeline.py`."""

    rows: int  # of the output, per warpgroup: a multiple of 64
    columns: int  # likewise: a multiple of 128
    stack: str = "rows"  # along which the warpgroups of a CTA lie side by side
    warpgroups: int = 2  # that compute
    cluster: str = ""  # along which two CTAs lie that share what they load; "" for CTAs on their own
    stages: int = 4  # blocks of the contraction in shared memory
    store_columns: int = 64  # of a staging buffer for the output, with 64 rows
    store_slots: int = 1  # staging buffers per warpgroup
    minor: int = 1  # the output axis along which consecutive tiles lie: 0 rows, 1 columns
    raster: int = 8  # how many tiles of that axis are walked before the other axis advances
    alternate: bool = False  # the warpgroups take turns at the tensor cores
    ahead: bool = True  # wait for a block while the one before is multiplied
    producer_registers: int = 56

    def __post_init__(self) -> None:
        if self.rows % 64 or self.columns % BLOCK:
            raise ValueError(
                f"{self.rows} x {self.columns} outputs per warpgroup: expected multiples of 64 and of {BLOCK}."
            )

    @property
    def cta(self) -> tuple[int, int]:
        """Rows and columns of the output per CTA."""
        stacked = {"rows": (self.warpgroups, 1), "columns": (1, self.warpgroups)}[self.stack]
        return self.rows * stacked[0], self.columns * stacked[1]

    @property
    def cluster_shape(self) -> tuple[int, int]:
        """CTAs of a cluster along rows and columns."""
        return {"": (1, 1), "rows": (2, 1), "columns": (1, 2)}[self.cluster]

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of the output per cluster."""
        return self.cta[0] * self.cluster_shape[0], self.cta[1] * self.cluster_shape[1]


WIDE = Tiles(rows=64, columns=256, cluster="rows", stages=3, store_columns=256, producer_registers=88)
WIDE_FLOAT32 = dataclasses.replace(WIDE, store_columns=64)
TALL = Tiles(rows=128, columns=128, cluster="columns", stages=3, store_columns=128, store_slots=2)
SQUARE = Tiles(rows=64, columns=128, cluster="rows", stages=5, store_columns=128, producer_registers=40)
SQUARE_FLOAT32 = dataclasses.replace(SQUARE, stages=4, store_columns=64, store_slots=2)


def choose(dtype: DTypeLike, out_dtype: DTypeLike) -> Tiles:
    """Returns the tiles for operands of `dtype`."""
    wide = jnp.dtype(out_dtype).itemsize > 2
    if jnp.dtype(dtype).itemsize == 1:
        return SQUARE_FLOAT32 if wide else SQUARE
    return WIDE_FLOAT32 if wide else WIDE
