"""Which pages are read together: a sequence's pages in one part or in several, and how parts are put together again.

A part by itself is attention to its tokens, o_s with lse_s = log sum_j exp(s_j). Together:

    m = max_s lse_s        l = sum_s exp(lse_s - m)        lse = m + log l        o = sum_s exp(lse_s - m) o_s / l
"""

import math

import jax
import jax.numpy as jnp

PAGE = 64  # tokens
# Times, in those of a page, estimated for an H200: what a part takes before its first page and after its last, what
# putting parts together takes at least, and what each part of 64 rows adds to it.
BEGIN_PART, COMBINE, COMBINE_PART = 3.0, 6.0, 0.1
FEW_ROWS = 16  # of `gpu_few`
LONG = 8  # pages of a part from which on it is worth its while to have the next page loaded beside


def are_few(n_tokens: int, n_heads: int) -> bool:
    """Returns whether pages of 16-bit numbers are for `gpu_few`: of 16 rows, heads times tokens.

    Two tokens of 16 heads are read as two sequences of the same pages, at once by other processors.
    """
    return n_tokens * n_heads == FEW_ROWS or (n_tokens, n_heads) == (2, FEW_ROWS)


def parts_of_few(n_sequences: int, most_pages: int, n_processors: int) -> tuple[int, int]:
    """Returns in how many parts `gpu_few` reads each sequence, and how many pages a CTA holds; measured on an H200.

    A part for each processor, of two pages at least where sequences have the most; then each costs more to put
    together than it saves. Long parts have a second page on its way while one is computed, others leave their
    processor space for a second CTA.
    """
    n_parts = max(1, min(n_processors // n_sequences, -(-most_pages // 2)))
    return n_parts, 2 if most_pages >= LONG * n_parts else 1


def n_pages(lengths_B: jax.Array) -> jax.Array:
    """Returns how many pages hold that many tokens."""
    return (lengths_B + PAGE - 1) // PAGE


def items(lengths_B: jax.Array, n_splits: int, longest_first: bool) -> jax.Array:
    """Returns the parts of all sequences, int32 [n_splits * B, 5].

    A row: sequence, first page, page after the last, the sequence's length, number of the part. Parts of a sequence
    differ by at most a page; there are empty ones if it has fewer pages than parts. Part s of sequence b has the number
    s * B + b. With `longest_first` they are sorted, so that processors that take one after the other end together.
    """
    b = lengths_B.shape[0]
    sequence = jnp.tile(jnp.arange(b), n_splits)
    part = jnp.repeat(jnp.arange(n_splits), b)
    length = lengths_B[sequence]
    begin, end = (n_pages(length) * s // n_splits for s in (part, part + 1))
    found = jnp.stack([sequence, begin, end, length, part * b + sequence], axis=1).astype(jnp.int32)
    return found[jnp.argsort(begin - end)] if longest_first else found


def n_splits(n_tiles: int, most_pages: int, n_processors: int) -> int:
    """Returns in how many parts to divide sequences of up to `most_pages`, so that all processors work.

    `n_tiles` is the number of tiles of 64 rows of all sequences; each processor computes a tile's part at a time.
    """

    def time(n: int) -> float:
        rounds = math.ceil(n_tiles * n / n_processors)
        together = COMBINE + COMBINE_PART * n_tiles * n if n > 1 else 0.0
        return rounds * (math.ceil(most_pages / n) + BEGIN_PART) + together

    return min(range(1, min(most_pages, n_processors) + 1), key=time)


def combined(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts parts together along the first axis: o [S, ..., C] and lse [S, ...] become [..., C] and [...].

    Part after part, so that XLA makes one kernel of all that has the width of o.
    """
    top = jnp.max(lse, axis=0)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = [jnp.exp(part - top) for part in lse]
    total = sum(weights)
    together = sum(weight[..., None] * part for weight, part in zip(weights, o, strict=True))
    some = jnp.where(total > 0, total, 1)
    return together / some[..., None], jnp.where(total > 0, top + jnp.log(some), -jnp.inf)
