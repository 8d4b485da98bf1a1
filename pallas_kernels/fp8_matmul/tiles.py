"""Which tiles the Hopper kernel uses for which shape.

Measured on one H200 (2026-11-28, TFLOP/s, m 4,096), all cells of a row in one process in alternation with torch's
block-scaled matmul (cuBLASLt). They are for comparing tiles; how the kernel compares with torch is in BENCHMARKS.md:

    n, k              WIDE   TALL   torch
     2112,  7168       808   1173     908     TALL fits where WIDE leaves processors idle in its last wave.
    24576,  1536      1019   1064     940
    32768,   512       906    873     623
     7168, 16384      1151   1109    1136
     4096,  7168      1150   1026    1125
     7168,  2048      1067   1016     957

Weight gradients (scales per 1 x 128 on both sides, float32), m, n, k of 4096, 7168, 4096: GRADIENT 844, FLOAT32 688;
7168, 2048, 4096: 746 and 653.

Tried and slower on that chip: turns at the tensor cores by named barriers (1 to 10 %), 64 x 192 outputs per warpgroup
in one wgmma of n192 (between WIDE and TALL), x in registers instead of shared memory (4 to 10 %), four blocks of the
loop unrolled (spills). Clusters gain 1 to 7 %. Under steady load the chip runs at its limit of 700 W and 1.45 to
1.6 GHz, and medians of one variant differ by 5 % from run to run: smaller differences decide nothing.
Registers of the loading warpgroup are chosen so that ptxas spills nothing, or 4 bytes
(`tests/pallas_kernels/compile_for_hopper.py`).
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernel divides its work; for the names see `gpu.py`."""

    rows: int  # of the output, per warpgroup: a multiple of 64
    columns: int  # likewise: a divisor or a multiple of 128
    warpgroups: int = 2  # that compute, one below the other
    cluster: str = ""  # along which two CTAs lie that share what they load; "" for CTAs on their own
    stages: int = 4  # blocks of K in shared memory
    store_columns: int = 64  # of a staging buffer for the output, with 64 rows
    store_slots: int = 1  # staging buffers per warpgroup
    minor: int = 1  # the output axis along which consecutive tiles lie: 0 rows, 1 columns
    raster: int = 8  # how many tiles of that axis are walked before the other axis advances
    splits: int = 1  # parts of the contraction, each summed by a CTA of a cluster
    producer_registers: int = 40

    def __post_init__(self) -> None:
        if self.rows % 64 or (BLOCK % self.columns and self.columns % BLOCK) or self.columns % self.store_columns:
            raise ValueError(
                f"{self.rows} x {self.columns} outputs per warpgroup, stored {self.store_columns} columns at a time: "
                f"expected a multiple of 64 by a divisor or a multiple of {BLOCK}, and a divisor of that."
            )
        # Each copy fills a block of its own in shared memory, which has to start at a multiple of 128 bytes.
        if (4 * self.cta[0]) % 128 or (4 * self.cta[1]) % 128:
            raise ValueError(f"CTA tile {self.cta}: the scales of a step are no multiple of 128 bytes.")
        if self.splits > 1 and self.cluster:
            raise ValueError(f"splits={self.splits}, cluster={self.cluster!r}: a cluster can do one of the two.")

    @property
    def cta(self) -> tuple[int, int]:
        """Rows and columns of the output per CTA."""
        return self.rows * self.warpgroups, self.columns

    @property
    def cluster_shape(self) -> tuple[int, int]:
        """CTAs of a cluster along rows and columns."""
        return {"": (1, 1), "rows": (2, 1), "columns": (1, 2)}[self.cluster]


WIDE = Tiles(rows=64, columns=256, cluster="rows", stages=3, store_columns=256, producer_registers=88)
TALL = Tiles(
    rows=64, columns=128, warpgroups=3, cluster="rows", store_columns=128, minor=0, raster=4, producer_registers=32
)
SQUARE = Tiles(rows=64, columns=128, cluster="rows", stages=5, store_slots=2)
FLOAT32 = Tiles(rows=64, columns=128, cluster="rows", stages=4, store_slots=2)
GRADIENT = Tiles(rows=128, columns=128, cluster="columns", stages=3, producer_registers=24)
FEW_ROWS = Tiles(rows=64, columns=64, warpgroups=1, stages=9)
SOME_ROWS = Tiles(rows=64, columns=64, stages=6)

# Outputs per second of a CTA relative to WIDE, idle processors left out.
SPEED = {WIDE: 1.0, TALL: 1.005, SQUARE: 0.85}
MOST_SPLITS = {FEW_ROWS: 4, SOME_ROWS: 2}  # with which the sums of the other parts fit into shared memory
CLUSTER_ROOM = 16  # processors that a cluster may be placed in, at least; a chip has several such groups


def choose(m: int, n: int, k: int, w_block: tuple[int, int], out_dtype: DTypeLike, n_processors: int = 132) -> Tiles:
    """Returns the tiles for x [m, k] and w [n, k] on a chip of `n_processors`."""
    if m <= 128:
        return _split(FEW_ROWS if m <= 64 else SOME_ROWS, m, n, k, n_processors)
    if w_block == (1, BLOCK):
        return GRADIENT
    if jnp.dtype(out_dtype).itemsize > 2:  # more space for the output
        return FLOAT32
    return min(SPEED, key=lambda tiles: _waves(tiles, m, n, n_processors) * _area(tiles) / SPEED[tiles])


def _split(tiles: Tiles, m: int, n: int, k: int, n_processors: int) -> Tiles:
    """Splits the contraction while all clusters can run at once, but leaves each CTA at least four blocks of it."""
    groups, count, blocks = n_processors // CLUSTER_ROOM, _count(tiles, m, n), -(-k // BLOCK)
    fitting = [
        parts
        for parts in range(2, MOST_SPLITS[tiles] + 1)
        if groups * (CLUSTER_ROOM // parts) >= count and blocks // parts >= 4
    ]
    return dataclasses.replace(tiles, splits=max(fitting, default=1))


def _waves(tiles: Tiles, m: int, n: int, n_processors: int) -> int:
    return -(-_count(tiles, m, n) // n_processors)


def _count(tiles: Tiles, m: int, n: int) -> int:
    """CTA tiles that cover the output, whole clusters counted."""
    rows, columns = (size * ctas for size, ctas in zip(tiles.cta, tiles.cluster_shape, strict=True))
    return -(-m // rows) * -(-n // columns) * tiles.cluster_shape[0] * tiles.cluster_shape[1]


def _area(tiles: Tiles) -> int:
    return tiles.cta[0] * tiles.cta[1]
