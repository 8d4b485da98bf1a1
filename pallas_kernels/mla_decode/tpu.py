"""Decode over a paged latent cache for TPUs in Pallas Mosaic TPU.

A step of the grid reads `PAGES` pages of one sequence, for all its heads and queries: these are the rows of a matrix
that meets the pages' latents twice, as keys and as values. Maximum, sum and output of the rows stay in vector memory
from step to step (online softmax, as in `chunked.py`). Each page is an operand of its own, whose place the grid reads
from the table in scalar memory, so that the next step's pages, of the next sequence too, are on their way while these
are computed.

The list of steps is made on the device: `work.items` says which pages of which sequence are read together, and every
item has as many steps as its pages need. Parts of sequences (`n_splits`) are the outer axis of the grid, which is
divided between the two cores of chips that have two. Pages behind a sequence's end are not read; of its last page, what
lies behind the end is replaced by zeros.

Compiled ahead of time for v5p, v6e and TPU7x and interpreted on a CPU; not yet run on a TPU.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode import work
from pallas_kernels.mla_decode.work import PAGE

NAME = "mosaic_tpu"
PAGES = 8  # of a step
MOST_TOKENS = 4
MOST_ROWS = 512  # heads times tokens: what fits into vector memory
MOST_NUMBERS = 240 * 1024  # of table and list in scalar memory, of which chips have 1 MiB
LOG2_E = math.log2(math.e)
MASKED = -1e30  # a score whose exponential is 0 beside any other
INSTEAD = "Use implementation='chunked'."


def decode(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    n_splits: int = 1,
    pages: int = PAGES,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHC, lse_BTH); arguments as in `pallas_kernels.mla_decode`. Raises ValueError as `check` does.

    `pages`: of a step. `interpret` runs the kernel on a CPU.
    """
    check(q_c_BTHC, q_rope_BTHP, cache, table, n_splits, pages)
    b, t, h, width = q_c_BTHC.shape
    plan = Plan(b, t, h, table.shape[1], n_splits, pages, scale)
    items = work.items(lengths_B, n_splits, longest_first=False)
    q_c, q_rope = (x.reshape(b, t * h, x.shape[3]) for x in (q_c_BTHC, q_rope_BTHP))
    c_pool, rope_pool = cache
    o, lse = plan.call(q_c, q_rope, c_pool, rope_pool, table, items, interpret)
    if n_splits > 1:
        o, lse = work.combined(*(x.reshape(n_splits, b, *x.shape[1:]) for x in (o, lse)))
    return o.reshape(b, t, h, width).astype(q_c_BTHC.dtype), lse.reshape(b, t, h)


def check(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    n_splits: int = 1,
    pages: int = PAGES,
) -> None:
    """Raises ValueError for what the kernel does not take: other dtypes, odd widths, many rows, a large table."""
    b, t, h, width = q_c_BTHC.shape
    given = f"implementation={NAME!r}: "
    if len(cache) != 2 or q_c_BTHC.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"{given}queries {q_c_BTHC.dtype}, cache {[str(x.dtype) for x in cache]}; expected bfloat16 or float32 in "
            f"both. Cast them. {INSTEAD}"
        )
    if width % 128 or q_rope_BTHP.shape[3] % 64 or width > 512:
        raise ValueError(
            f"{given}latents of {width} numbers, rotary keys of {q_rope_BTHP.shape[3]}; expected multiples of 128 and "
            f"64, latents of up to 512. {INSTEAD}"
        )
    if t > MOST_TOKENS or t * h > MOST_ROWS:
        raise ValueError(
            f"{given}{t} tokens per sequence with {h} heads; expected up to {MOST_TOKENS} and {MOST_ROWS} of both "
            f"multiplied. {INSTEAD}"
        )
    numbers = table.size + n_splits * (2 * Plan(b, t, h, table.shape[1], n_splits, pages, 1.0).most_steps + 3 * b)
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"{given}a table of {b} x {table.shape[1]} pages makes {numbers} numbers in scalar memory, expected up to "
            f"{MOST_NUMBERS}. Decode fewer sequences at once. {INSTEAD}"
        )


@dataclass(frozen=True)
class Plan:
    """What is known of a call when it is traced."""

    b: int
    t: int
    h: int
    most: int  # pages of a sequence
    n_splits: int
    pages: int
    scale: float

    def steps(self, items: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the steps of each part: (item, first page), int32 [n_splits * most_steps], and how many there are.

        The parts of a batch have nearly the same number; one that has fewer repeats its last step, which adds nothing.
        """
        begin, end = (items[:, i].reshape(self.n_splits, self.b) for i in (1, 2))
        count = jnp.maximum(-(-(end - begin) // self.pages), 1)  # an empty item has results too
        through = jnp.cumsum(count, axis=1)
        step = jnp.arange(self.most_steps)
        row = jnp.minimum(jnp.sum(step[:, None] >= through[:, None], axis=2), self.b - 1)
        of_row = functools.partial(jnp.take_along_axis, indices=row, axis=1)
        page = of_row(begin) + (step - of_row(through) + of_row(count)) * self.pages
        item = row + self.b * jnp.arange(self.n_splits)[:, None]
        item_V, page_V = (x.astype(jnp.int32).reshape(-1) for x in (item, page))
        return item_V, page_V, jnp.max(through[:, -1])

    @property
    def most_steps(self) -> int:
        """Of a part."""
        pages = -(-self.most // self.n_splits)
        return self.b * -(-pages // self.pages)

    def call(
        self,
        q_c: jax.Array,
        q_rope: jax.Array,
        c_pool: jax.Array,
        rope_pool: jax.Array,
        table: jax.Array,
        items: jax.Array,
        interpret: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (o [items, rows, C] in float32, lse [items, rows])."""
        rows, width = q_c.shape[1:]
        table = jnp.clip(table, 0, len(c_pool) - 1)  # an empty sequence's first page is loaded, whatever the table says
        *steps, n_steps = self.steps(items)
        bounds = items[:, 1:4].reshape(-1)
        of_item = functools.partial(pl.BlockSpec, index_map=self._item)
        pools = [(pool, (None, PAGE, pool.shape[2])) for pool in (c_pool, rope_pool)]
        pages = [(pool, pl.BlockSpec(shape, self._page(i))) for pool, shape in pools for i in range(self.pages)]
        of_sequence = functools.partial(pl.BlockSpec, index_map=self._sequence)
        o, lse = pl.pallas_call(
            functools.partial(_kernel, self),
            out_shape=[
                jax.ShapeDtypeStruct((len(items), rows, width), jnp.float32),
                jax.ShapeDtypeStruct((len(items), 1, rows), jnp.float32),
            ],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=4,
                grid=(self.n_splits, n_steps),
                in_specs=[*(of_sequence((None, *x.shape[1:])) for x in (q_c, q_rope)), *(spec for _, spec in pages)],
                out_specs=[of_item((None, rows, width)), of_item((None, 1, rows))],
                scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (width, 1, 1)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
        )(*steps, bounds, table.reshape(-1), q_c, q_rope, *(pool for pool, _ in pages))
        return o, lse[:, 0]

    def _item(self, part: Any, step: Any, item_V: Any, *_: Any) -> tuple:
        return item_V[part * self.most_steps + step], 0, 0

    def _sequence(self, part: Any, step: Any, item_V: Any, *_: Any) -> tuple:
        return item_V[part * self.most_steps + step] - part * self.b, 0, 0

    def _page(self, i: int) -> Any:
        """Where page i of a step lies in the pool; the item's last page again behind its end."""

        def at(part: Any, step: Any, item_V: Any, page_V: Any, bounds: Any, table: Any) -> tuple:
            item, page = item_V[part * self.most_steps + step], page_V[part * self.most_steps + step]
            last = jnp.maximum(bounds[3 * item + 1] - 1, 0)
            return table[(item - part * self.b) * self.most + jnp.minimum(page + i, last)], 0, 0

        return at


def _kernel(plan: Plan, item_V: Any, page_V: Any, bounds: Any, table: Any, q_c: Any, q_rope: Any, *refs: Any) -> None:
    del table  # read for the places of pages
    pages, (o, lse, total, top, sums) = refs[: 2 * plan.pages], refs[2 * plan.pages :]
    step = pl.program_id(0) * plan.most_steps + pl.program_id(1)
    item, page = item_V[step], page_V[step]
    begin, end, length = (bounds[3 * item + i] for i in range(3))

    @pl.when(page == begin)
    def _() -> None:
        total[...], sums[...] = jnp.zeros_like(total), jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, MASKED)

    def add(masked: bool) -> None:
        c, rope = (jnp.concatenate([ref[...] for ref in pages[i : i + plan.pages]]) for i in (0, plan.pages))
        held = jnp.minimum(length, end * PAGE) - page * PAGE  # of this step's tokens, those of the item
        if masked:  # what lies behind a sequence may be anything, NaN too
            c, rope = (jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < held, x, 0) for x in (c, rope))
        scores = _product(q_c[...], c, 1) + _product(q_rope[...], rope, 1)
        scores *= plan.scale * LOG2_E
        if masked:
            key, row = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (1, 0))
            n_seen = length - page * PAGE - plan.t + 1 + lax.div(row, plan.h)
            scores = jnp.where((key < held) & (key < n_seen), scores, MASKED)
        new = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        weights, fade = jnp.exp2(scores - new), jnp.exp2(top[...] - new)
        sums[...] = fade * sums[...] + jnp.sum(weights, axis=1, keepdims=True)
        total[...] = fade * total[...] + _product(weights.astype(c.dtype), c, 0)
        top[...] = new

    after = page + plan.pages
    is_whole = after * PAGE <= jnp.minimum(end * PAGE, length - plan.t + 1)
    pl.when(is_whole)(functools.partial(add, False))
    pl.when(~is_whole & (page < jnp.maximum(end, begin + 1)))(functools.partial(add, True))

    @pl.when(after >= end)
    def _() -> None:
        sees = top[...] > MASKED / 2  # what a query that sees nothing has summed means nothing
        o[...] = jnp.where(sees, total[...] / sums[...], 0.0)
        lse[0] = jnp.where(sees, top[...] * math.log(2) + jnp.log(sums[...]), -jnp.inf)[:, 0]


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """x y^T, or x y if `axis` is 0, in float32; float32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
