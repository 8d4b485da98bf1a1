"""Which tiles the Hopper kernel uses for which shape.

Measured on one H100 (2026-11-25, TFLOP/s) while the kernel was written, with fewer registers for the loading warpgroup
than now, the best raster of each, and not all cells in one run. They are for comparing tiles with one another; how the
kernel compares with torch is in BENCHMARKS.md:

    m, n, k               WIDE   TALL   torch
    4096,  2112,  7168     855   1112     967     TALL fits where WIDE leaves processors idle in its last wave.
    4096, 24576,  1536    1086   1077     952     WIDE reads the fewest bytes per product.
    4096, 32768,   512     938    912     649     Its three stages with room for a whole output tile beat four stages
    4096,  7168, 16384    1167   1062    1196     with a quarter of it.
    4096,  4096,  7168    1175   1019    1173
    4096,  7168,  2048    1085   1055    1029

Under steady load the chip runs at its limit of 700 W and 1.4 to 1.5 GHz, and medians of one variant differ by 8 % from
run to run: smaller differences decide nothing. Registers of the loading warpgroup are chosen so that ptxas spills
nothing (`tests/pallas_kernels/compile_for_hopper.py`).
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
    stack: str = "rows"  # along which the warpgroups of a CTA lie side by side
    warpgroups: int = 2  # that compute
    cluster: str = ""  # along which two CTAs lie that share what they load; "" for CTAs on their own
    stages: int = 4  # blocks of K in shared memory
    store_columns: int = 64  # of a staging buffer for the output, with 64 rows
    store_slots: int = 1  # staging buffers per warpgroup
    minor: int = 1  # the output axis along which consecutive tiles lie: 0 rows, 1 columns
    raster: int = 8  # how many tiles of that axis are walked before the other axis advances
    splits: int = 1  # parts of the contraction, each summed by CTAs of its own
    alternate: bool = True  # the warpgroups take turns at the tensor cores
    producer_registers: int = 56

    def __post_init__(self) -> None:
        if self.rows % 64 or (BLOCK % self.columns and self.columns % BLOCK):
            raise ValueError(
                f"{self.rows} x {self.columns} outputs per warpgroup: expected a multiple of 64 by a divisor or a "
                f"multiple of {BLOCK}."
            )
        # Each copy fills a block of its own in shared memory, which has to start at a multiple of 128 bytes.
        if (4 * self.cta[0]) % 128 or (4 * self.cta[1]) % 128:
            raise ValueError(f"CTA tile {self.cta}: the scales of a step are no multiple of 128 bytes.")

    @property
    def cta(self) -> tuple[int, int]:
        """Rows and columns of the output per CTA."""
        stacked = {"rows": (self.warpgroups, 1), "columns": (1, self.warpgroups)}[self.stack]
        return self.rows * stacked[0], self.columns * stacked[1]

    @property
    def cluster_shape(self) -> tuple[int, int]:
        """CTAs of a cluster along rows and columns."""
        return {"": (1, 1), "rows": (2, 1), "columns": (1, 2)}[self.cluster]


WIDE = Tiles(rows=64, columns=256, cluster="rows", stages=3, store_columns=256, producer_registers=88)
TALL = Tiles(
    rows=64, columns=128, warpgroups=3, cluster="rows", store_columns=128, minor=0, raster=4, producer_registers=32
)
SQUARE = Tiles(rows=64, columns=128, cluster="rows", stages=5, store_slots=2, producer_registers=40)
FLOAT32 = Tiles(rows=64, columns=128, cluster="rows", stages=4, store_slots=2, producer_registers=40)
FEW_ROWS = Tiles(rows=64, columns=64, stack="columns", stages=7, alternate=False, producer_registers=40)
SOME_ROWS = Tiles(rows=64, columns=64, cluster="columns", stages=7, alternate=False, producer_registers=40)

# Outputs per second of a CTA relative to WIDE, idle processors left out.
SPEED = {WIDE: 1.0, TALL: 0.97, SQUARE: 0.85}


def choose(m: int, n: int, k: int, w_block: tuple[int, int], out_dtype: DTypeLike, n_processors: int = 132) -> Tiles:
    """Returns the tiles for x [m, k] and w [n, k] on a chip of `n_processors`."""
    if m <= 128:
        return _split(FEW_ROWS if m <= 64 else SOME_ROWS, m, n, k, n_processors)
    if w_block == (1, BLOCK) or jnp.dtype(out_dtype).itemsize > 2:  # more registers, more room for the output
        return dataclasses.replace(FLOAT32, minor=0 if n >= m else 1)
    best = min(SPEED, key=lambda tiles: _waves(tiles, m, n, n_processors) * _area(tiles) / SPEED[tiles])
    if best is not WIDE:
        return best
    if k > 8192:
        return dataclasses.replace(WIDE, store_columns=64, store_slots=4, raster=16)
    return dataclasses.replace(WIDE, raster=4 if k <= 2048 else 8)


def _split(tiles: Tiles, m: int, n: int, k: int, n_processors: int) -> Tiles:
    """Splits the contraction until every processor has work, but leaves each at least four blocks of it."""
    parts = n_processors // _count(tiles, m, n)
    return dataclasses.replace(tiles, splits=max(1, min(parts, -(-k // BLOCK) // 4)))


def _waves(tiles: Tiles, m: int, n: int, n_processors: int) -> int:
    return -(-_count(tiles, m, n) // n_processors)


def _count(tiles: Tiles, m: int, n: int) -> int:
    """CTA tiles that cover the output, whole clusters counted."""
    rows, columns = (size * ctas for size, ctas in zip(tiles.cta, tiles.cluster_shape, strict=True))
    return -(-m // rows) * -(-n // columns) * tiles.cluster_shape[0] * tiles.cluster_shape[1]


def _area(tiles: Tiles) -> int:
    return tiles.cta[0] * tiles.cta[1]
