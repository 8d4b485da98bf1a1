"""Which tiles the kernel for Hopper uses."""

import dataclasses

BLOCK = 128  # of the contraction: numbers of a code's row with one scale
UNIT_COLUMNS = 64  # outputs of a warpgroup


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernel divides its work; for the names see `gpu.py`."""

    rows: int  # of x per job: a multiple of 8
    across: int = 2  # warpgroups side by side along the outputs
    along: int = 2  # that share a contraction
    stages: int = 8  # blocks of the contraction in shared memory: a multiple of `along`
    parts: int = 1  # of the contraction, that different processors sum

    def __post_init__(self) -> None:
        if self.rows % 8 or self.stages % self.along:
            raise ValueError(f"{self}: expected rows in multiples of 8, stages in multiples of along.")


def choose(groups: int, rows: int, n: int, k: int, n_processors: int) -> Tiles:
    """Returns the tiles for x [rows, k] in `groups` groups and w [n, k].

    Jobs have 128 outputs, or 64 where then fewer processors are idle at the end. Where twice as many of these fit on
    half of the processors, a job has a part of the contraction; the other half is left to what runs beside the product.
    Over 32 rows are divided if each job finds a processor: stages are then smaller, and more blocks on their way.
    """
    mean = -(-rows // groups)
    tile_rows = 8 if rows <= groups else next((size for size in (16, 32, 64) if mean <= size), 128)
    if tile_rows > 32 and max(min(groups, rows), -(-rows // 32)) * -(-n // UNIT_COLUMNS) <= n_processors:
        tile_rows = 32
    row_tiles = max(min(groups, rows), -(-rows // tile_rows))
    if tile_rows > 32 and row_tiles * -(-n // (2 * UNIT_COLUMNS)) >= n_processors:
        return Tiles(tile_rows, along=1, stages=4)
    wide, narrow = (row_tiles * -(-n // columns) for columns in (2 * UNIT_COLUMNS, UNIT_COLUMNS))
    fills = wide >= n_processors and _busy(wide, n_processors) > 0.95 * _busy(narrow, n_processors)
    if tile_rows > 64 or fills:
        return Tiles(tile_rows, along=2 if tile_rows <= 32 else 1, stages=8 if tile_rows <= 16 else 4)
    blocks = k // BLOCK
    parts = max(min(n_processors // 2 // narrow, blocks // 4), 1)
    stages = min(12 if tile_rows <= 16 else 8 if tile_rows <= 32 else 4, -(-blocks // parts // 4) * 4)
    return Tiles(tile_rows, across=1, along=4, stages=stages, parts=parts)


def choose_gated(groups: int, rows: int, n: int, k: int, n_processors: int) -> Tiles | None:
    """Returns the tiles for two matrices [n, k] at once; None where a tile's rows are too many for the sums of both."""
    tile_rows = choose(groups, rows, n, k, n_processors).rows
    return Tiles(tile_rows, across=1, along=4 if tile_rows <= 16 else 2) if tile_rows <= 32 else None


def _busy(jobs: int, n_processors: int) -> float:
    """The part of the processors' time in which they have a job."""
    return jobs / (-(-jobs // n_processors) * n_processors)
