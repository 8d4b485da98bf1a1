"""Which tiles the Hopper kernels use.

Measured on one H200 (2026-11-29, TFLOP/s), in turns in one process, FP8 forward:

    groups x rows, n, k            THREE   SQUARE   WIDE
     4 x 8192, 4096, 7168           1203     1051    992
     4 x 8192, 7168, 2048           1167      986    891
    32 x 256, 4096, 7168             749      874   1004     192 rows do not divide 256
    32 x 256, 7168, 2048             802      827    922

The chip runs at its limit of 700 W and about 1.5 GHz; medians of one variant differ by 5 to 8 % from run to run. In
bfloat16 WIDE was the fastest or as fast as the others. With three warpgroups the tensor cores are busy while one
warpgroup promotes and another waits. One loading warp instead of four and scales read a step ahead made WIDE and SQUARE
5 to 19 % faster. Registers of the loading warpgroup are chosen so that ptxas spills nothing
(`tests/pallas_kernels/compile_for_hopper.py`).
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import tile_table

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
    chunk_columns: int = BLOCK  # of one FP8 product, with 64 rows
    in_flight: int = 1  # FP8 products of a warpgroup at the tensor cores: one is promoted, the next is there already
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
# For a few rows per group, where the weights are all that takes time: 160 KB of a CTA's weights are under way.
FEW = Tiles(rows=64, columns=128, stack="columns", stages=5, producer_registers=40)
# Where even those CTAs are fewer than the processors, as with the experts of one token: half as wide, so twice as many.
NARROW = Tiles(rows=64, columns=128, warpgroups=1, stages=8, producer_registers=40)
MOST_PROCESSORS = 132  # of a Hopper chip
FEW_ROWS = 32  # per group, up to which `FEW` is taken; derived, not measured
THREE = Tiles(rows=64, columns=128, warpgroups=3, cluster="columns", store_columns=128, producer_registers=32)
SQUARE = Tiles(rows=64, columns=128, cluster="rows", stages=5, store_columns=128, minor=0, producer_registers=40)
SQUARE_FLOAT32 = dataclasses.replace(SQUARE, stages=4, store_columns=64, store_slots=2)

GRADIENT = Tiles(
    rows=128, columns=128, cluster="columns", stages=3, chunk_columns=64, in_flight=2, producer_registers=24
)

# By operation, the tiles that `bench kernels --tune` measures.
FP8 = "grouped_fp8_matmul"
VARIANTS = {FP8: {"WIDE": WIDE, "THREE": THREE, "SQUARE": SQUARE}}


def choose(dtype: DTypeLike, out_dtype: DTypeLike, groups: int, rows: int, n: int, k: int) -> Tiles:
    """Returns the tiles for x [rows, k] of `dtype` and w [groups, n, k]."""
    wide = jnp.dtype(out_dtype).itemsize > 2
    if jnp.dtype(dtype).itemsize > 1:
        if rows <= FEW_ROWS * groups and not wide:
            return NARROW if min(groups, rows) * -(-n // FEW.cta[1]) < MOST_PROCESSORS else FEW
        return WIDE_FLOAT32 if wide else WIDE
    return SQUARE_FLOAT32 if wide else fastest(tile_table.current(), (groups, rows // groups, n, k))


def fastest(table: tile_table.Table, shape: tile_table.Shape) -> Tiles:
    """Returns the FP8 tiles that took the least time by `table` for the shape most like `shape`.

    A shape is (groups, rows per group, n, k); alike are shapes whose groups have the same number of rows, then those
    with the same n and k, each by the ratio of the two.
    """
    measured = {known: times for known, times in table.microseconds[FP8].items() if VARIANTS[FP8].keys() & times}

    def unlikeness(known: tile_table.Shape) -> tuple[float, float]:
        _, rows, n, k = (abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(known, shape, strict=True))
        return rows, n + k

    times = measured[min(measured, key=unlikeness)]
    return VARIANTS[FP8][min(VARIANTS[FP8].keys() & times, key=lambda name: times[name])]


def choose_for_weights(dtype: DTypeLike, out_dtype: DTypeLike) -> Tiles:
    """Returns the tiles for a weight gradient from operands of `dtype`."""
    wide = jnp.dtype(out_dtype).itemsize > 2
    if jnp.dtype(dtype).itemsize > 1:
        return WIDE_FLOAT32 if wide else WIDE
    return GRADIENT
