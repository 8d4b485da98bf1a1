"""The decode kernel for Hopper, as planned: sizes, shared memory and barriers of a CTA, and its work."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

ROWS = 64  # of a CTA
PAGE = 64  # tokens
CHUNK = 64  # columns that TMA can swizzle, of 16 bits
AT_START = 128  # registers of a thread: a quarter of the processor's, over 128 threads of a warpgroup
VALUES, SCORE = 2, 2  # warpgroups 0 and 1 sum values, 2 computes scores, 3 loads


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is divided.

    Attributes:
        cluster: CTAs that load pages together; divides the number of row tiles.
        copies: parts of each half of a latent's columns, loaded and released one by one: pages of each that fit into
            shared memory, in the order of loading.
        rope_copies: the same of rotary keys.
        in_registers: of these parts, how many have their queries in registers.
        ahead: pages that are brought into the L2 cache before there is space for them.
        early: parts of a page that are multiplied beside the exponentials of the page before; the others, after them.
        score_registers: per thread of the warpgroup of the scores.
        value_registers: per thread of the two that sum values; the one that loads has what is left.
    """

    cluster: int = 2
    copies: tuple[int, ...] = (3, 2)
    rope_copies: int = 2
    in_registers: int = 1
    ahead: int = 1
    early: int = 2
    score_registers: int = 168
    value_registers: int = 160

    @property
    def loader_registers(self) -> int:
        """Per thread of the warpgroup that loads."""
        return 4 * AT_START - VALUES * self.value_registers - self.score_registers


IN_FP8 = Tuning(cluster=1, copies=(2, 2), in_registers=0, early=0, score_registers=112)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    b: int
    rows: int
    width: int  # C
    rope: int  # P
    dtype: DTypeLike
    h: int
    t: int
    n_splits: int
    scale: float
    tuning: Tuning
    on_chip: bool  # interpreted otherwise: no store to an accumulator
    in_fp8: bool  # the cache

    @property
    def n_views(self) -> int:
        """Arrays that are the cache."""
        return 3 if self.in_fp8 else 2

    @property
    def group(self) -> int:
        """Columns of a part of a latent."""
        return self.width // (VALUES * len(self.tuning.copies))

    @property
    def parts(self) -> list[tuple[int, int, int | None]]:
        """(ring, lane, first column of the latent or None) of a page's parts in the order of loading."""
        n_groups = len(self.tuning.copies)
        groups = [[(g, w, (w * n_groups + g) * self.group) for w in range(VALUES)] for g in range(n_groups)]
        return [*groups[0], (n_groups, 0, None), *(part for group in groups[1:] for part in group)]

    @property
    def n_held(self) -> int:
        """Chunks of a row of queries that are in registers, not in shared memory: those of the first parts."""
        return VALUES * self.tuning.in_registers * self.group // CHUNK if self.on_chip else 0

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order of `Refs`."""
        layout = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
        chunks = (self.width + self.rope) // CHUNK - self.n_held
        found = [
            plgpu.SMEM((chunks, ROWS, CHUNK), self.dtype, transforms=layout),
            plgpu.SMEM((ROWS, PAGE), self.dtype, transforms=layout),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=chunks),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=VALUES),
        ]
        for n, columns in (
            *((VALUES * n, self.group) for n in self.tuning.copies),
            (self.tuning.rope_copies, self.rope),
        ):
            found += [
                plgpu.SMEM((n, PAGE, columns), self.dtype, transforms=layout),
                plgpu.Barrier(num_barriers=n),
                plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=1, num_barriers=n),
            ]
        return found


@dataclasses.dataclass(frozen=True)
class Ring:
    """Pages in shared memory of a part of their columns; the newest takes the place of the oldest."""

    data: Any
    loaded: Any  # barriers, one per place
    free: Any  # from all CTAs of the cluster
    lanes: int  # parts beside each other

    @property
    def copies(self) -> int:
        """Pages."""
        return self.data.shape[0] // self.lanes

    def place(self, i: jax.Array, lane: int | jax.Array) -> jax.Array:
        """Where the i-th page lies."""
        return lax.rem(i, self.copies) * self.lanes + lane


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    q_c: Any
    q_rope: Any
    cache: tuple
    table: Any
    items: Any
    o: Any
    lse: Any
    q_chunks: Any
    weights: Any  # P_j
    factors: Any  # of the earlier sums, pages in turn
    q_loaded: Any
    factor_ready: Any  # pages in turn: a factor may be there before the one before it was waited for
    weights_ready: Any
    weights_free: Any
    rings: tuple[Ring, ...]  # of latents, then of rotary keys


@dataclasses.dataclass(frozen=True)
class Item:
    """A CTA's work: rows of a sequence, and the pages that they look at."""

    row: jax.Array  # first one
    batch: jax.Array
    begin: jax.Array  # page
    end: jax.Array  # page after the last
    length: jax.Array  # tokens of the sequence
    target: jax.Array  # which of the results

    @property
    def n_pages(self) -> jax.Array:
        """To visit."""
        return self.end - self.begin
