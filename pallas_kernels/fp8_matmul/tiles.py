"""Which tiles the Hopper kernel uses for which shape: the fastest in the chip's table (`pallas_kernels.tile_table`).

A shape that is not in the table gets the tiles for which the table lets expect the least time: rounds of all processors
times the time of a round, which is that of the shapes in the table (the median, per output and block of K).

What the tiles are for, as measured on one H200 (m 4,096): WIDE loads the fewest bytes. With TALL a third warpgroup
keeps the tensor cores busy while one promotes and another waits; a pair of CTAs shares x, which is 1 to 6 % faster than
sharing w. SQUARE and GRADIENT have two products of a warpgroup in flight, so that it promotes one while the tensor
cores work on the other: a gain of 17 to 22 % for weight gradients, whose promotion takes two operations instead of one.

Tried and no faster on that chip: turns at the tensor cores by named barriers (1 to 10 % slower); 64 x 192 outputs per
warpgroup in two products of n96 in flight; two products of n64 in flight in WIDE (1 to 17 % slower) and four blocks at
once in SQUARE (18 to 37 %); x in registers instead of shared memory (4 to 10 %); narrower last tiles that share among
all processors what fills no whole round (0 to 5 %: at the limit of power the busy processors are the faster, the more
are idle); looking at the next block's barrier during a promotion, that of the next tile's first block included (up to
25 % slower where K is short); scales of w read a block ahead (0 to 8 % slower), or copied into shared memory with the
operands (with TALL 5 % faster to 3 % slower, 1 % faster on average); 64 x 192 outputs per warpgroup in one wgmma of
n192 (8 and 5 % faster than the best of the table with n, k 32768, 512 and 7168, 2048, in the others 3 to 12 % slower,
in one rotation); 64 x 160 in one of n160 (5 % faster to 20 % slower).
Clusters gain 1 to 7 %. Under steady load the chip runs at its limit of 700 W and 1.3 to 1.6 GHz, and medians of one
variant differ by 5 % from run to run, in processes of their own by 10 %: smaller differences decide nothing. In the
H200's table all tiles of a shape took turns in one process. Registers of the loading warpgroup are chosen so that
ptxas spills next to nothing (`tests/pallas_kernels/compile_for_hopper.py`).
"""

import dataclasses
import math
import statistics

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import tile_table

BLOCK = 128
FEW = 128  # rows: with no more of them the contraction may be split


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
    chunk_columns: int = BLOCK  # of one product, with 64 rows: 128 at most
    in_flight: int = 1  # products of a warpgroup at the tensor cores: while one is promoted, the next is there already
    together: int = 1  # blocks of K in one turn of the loop
    producer_registers: int = 40

    def __post_init__(self) -> None:
        if self.rows % 64 or (BLOCK % self.columns and self.columns % BLOCK):
            raise ValueError(
                f"{self.rows} x {self.columns} outputs per warpgroup: expected a multiple of 64 by a divisor or a "
                f"multiple of {BLOCK}."
            )
        if self.columns % self.store_columns:
            raise ValueError(f"store_columns={self.store_columns}: expected a divisor of {self.columns} columns.")
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

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of the output per cluster."""
        return self.cta[0] * self.cluster_shape[0], self.cta[1] * self.cluster_shape[1]

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """Returns how many tiles of a cluster cover m x n outputs, along rows and columns."""
        return -(-m // self.span[0]), -(-n // self.span[1])

    def rounds(self, m: int, n: int, n_processors: int) -> int:
        """Returns how many times the processors compute a tile each."""
        rows, columns = self.grid(m, n)
        return -(-rows * columns // (n_processors // max(self.cluster_shape)))


WIDE = Tiles(rows=64, columns=256, cluster="rows", stages=3, store_columns=256, producer_registers=88)
TALL = Tiles(
    rows=64, columns=128, warpgroups=3, cluster="columns", store_columns=128, minor=0, raster=4, producer_registers=32
)
SQUARE = Tiles(rows=64, columns=128, cluster="rows", stages=5, store_columns=128, in_flight=2, together=2)
FLOAT32 = Tiles(rows=64, columns=128, cluster="rows", stages=4, store_slots=2)
GRADIENT = Tiles(
    rows=128, columns=128, cluster="columns", stages=3, chunk_columns=64, in_flight=2, producer_registers=24
)
FEW_ROWS = Tiles(rows=64, columns=64, warpgroups=1, stages=9)
SOME_ROWS = Tiles(rows=64, columns=64, stages=6)

# By operation, the tiles that `bench kernels --tune` measures; those that walk down the rows first are named so.
FORWARD, WEIGHT_GRADIENT = "fp8_matmul", "fp8_matmul gradient"
VARIANTS = {
    FORWARD: {"WIDE": WIDE, "WIDE_DOWN": dataclasses.replace(WIDE, minor=0), "TALL": TALL, "SQUARE": SQUARE},
    WEIGHT_GRADIENT: {"GRADIENT": GRADIENT, "GRADIENT_DOWN": dataclasses.replace(GRADIENT, minor=0)},
}
MOST_SPLITS = {FEW_ROWS: 4, SOME_ROWS: 2}  # with which the sums of the other parts fit into shared memory
CLUSTER_ROOM = 16  # processors that a cluster may be placed in, at least; a chip has several such groups


def choose(m: int, n: int, k: int, w_block: tuple[int, int], out_dtype: DTypeLike, n_processors: int = 132) -> Tiles:
    """Returns the tiles for x [m, k] and w [n, k] on a chip of `n_processors`."""
    if m <= FEW:
        return _split(FEW_ROWS if m <= 64 else SOME_ROWS, m, n, k, n_processors)
    if w_block == (BLOCK, BLOCK) and jnp.dtype(out_dtype).itemsize > 2:  # more space for the output
        return FLOAT32
    operation = FORWARD if w_block == (BLOCK, BLOCK) else WEIGHT_GRADIENT
    return fastest(operation, m, n, k, tile_table.current(), n_processors)


def fastest(operation: str, m: int, n: int, k: int, table: tile_table.Table, n_processors: int) -> Tiles:
    """Returns the tiles of an operation that took the least time by `table`, or are expected to."""
    variants, measured = VARIANTS[operation], table.microseconds[operation]
    times = {name: us for name, us in measured.get((m, n, k), {}).items() if name in variants}
    if not times or n_processors != table.processors:
        times = {name: _expected(name, operation, (m, n, k), table, n_processors) for name in variants}
    return variants[min(times, key=lambda name: times[name])]


def _expected(name: str, operation: str, shape: tuple, table: tile_table.Table, n_processors: int) -> float:
    """Time by the work of a processor, of which the shapes in the table say how long it takes."""
    known = [(of, by_name[name]) for of, by_name in table.microseconds[operation].items() if name in by_name]
    rates = [us / _work(name, operation, of, table.processors) for of, us in known]
    return statistics.median(rates) * _work(name, operation, shape, n_processors) if rates else math.inf


def _work(name: str, operation: str, shape: tuple, n_processors: int) -> float:
    """Outputs that a processor computes, times the contraction."""
    m, n, k = shape
    tiles = VARIANTS[operation][name]
    return tiles.rounds(m, n, n_processors) * tiles.cta[0] * tiles.cta[1] * k


def _split(tiles: Tiles, m: int, n: int, k: int, n_processors: int) -> Tiles:
    """Splits the contraction while all clusters can run at once, but leaves each CTA at least four blocks of it."""
    rows, columns = tiles.grid(m, n)
    groups, blocks = n_processors // CLUSTER_ROOM, -(-k // BLOCK)
    fitting = [
        parts
        for parts in range(2, MOST_SPLITS[tiles] + 1)
        if groups * (CLUSTER_ROOM // parts) >= rows * columns and blocks // parts >= 4
    ]
    return dataclasses.replace(tiles, splits=max(fitting, default=1))
