"""Exact top k of long rows on GPUs in Pallas Triton: a threshold found bit by bit, then its rows in order.

Numbers are compared as integers that have their order. A program keeps a row in registers, sets one bit of the
threshold after the other, from the highest, and keeps it if at least k numbers are not less: after 32 counts the
threshold is the k-th largest number. Then it reads the row again, block after block, and writes the positions of the
numbers above the threshold and of the first of those that equal it.

Rows that are longer than registers hold are cut into parts, the best k of each of them are found by programs of their
own, and the best k of these k per part by a second call: their positions ascend, so that the lowest still wins. A few
long rows, as in decode steps, are those of `gpu_split`.

What bounds it: a count takes two operations per number, 32,768 x 32 x 2 of the 128 per cycle of a processor, 16,400
cycles or 10 us per row; 4 bytes per number from memory are 0.5 us of the whole chip.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.topk import gpu_split
from pallas_kernels.topk.reference import NONE
from pallas_kernels.topk.threshold import LOWEST, ordered

MOST = 32768  # numbers of a row that a program has in registers
BLOCK = 4096  # numbers that are put in order at a time
FEW = 32  # rows, up to which the parts of a row are counted by programs side by side (`gpu_split`; measured: 1 to 16),
LONG = 16384  # of so many numbers: on an H200 8,192 took 37 us in parts and 32 in one program, 32,768 took 41 and 66
MANY = 132  # rows, from which on one of up to 32,768 numbers is faster in two parts


def top_k(scores_RS: jax.Array, k: int, *, most: int | None = None, interpret: bool = False) -> jax.Array:
    """Returns positions [R, k] int32, ascending; see `pallas_kernels.topk`. `most` numbers are a part of a row.

    Raises ValueError for longer rows than registers hold, of which the best k of two parts are too many as well.
    """
    r, s = scores_RS.shape
    if most is None and r <= FEW and s >= LONG:
        return gpu_split.top_k(scores_RS, k, interpret=interpret)
    most = max(most or (MOST // 2 if r >= MANY and s <= MOST else MOST), _power(k))
    most = most if s <= most else max(most, _power(2 * k))  # the best of two parts make one
    if min(most, s) > MOST:
        raise ValueError(
            f"the best {k:,} of {s:,} numbers: a program holds {MOST:,}. Of longer rows, k is at most {MOST // 2:,}."
        )
    if s <= most:
        return _call(scores_RS, None, k, interpret)[0]
    n_parts = -(-s // most)
    padded = jnp.pad(scores_RS, ((0, 0), (0, n_parts * most - s)), constant_values=-jnp.inf) if s % most else scores_RS
    at, best = _call(padded.reshape(r * n_parts, most), None, k, interpret)
    first = (jnp.arange(n_parts, dtype=jnp.int32) * most)[:, None]
    at = at.reshape(r, n_parts, k)
    at = jnp.where(at == NONE, NONE, at + first).reshape(r, n_parts * k)
    return top_k_of(best.reshape(r, n_parts * k), at, k, most=most, interpret=interpret)


def top_k_of(scores_RS: jax.Array, at_RS: jax.Array, k: int, *, most: int, interpret: bool) -> jax.Array:
    """The same of numbers whose positions, which ascend, are `at_RS`."""
    s = scores_RS.shape[1]
    if s <= most:
        return _call(scores_RS, at_RS, k, interpret)[0]
    size = most // k * k  # whole parts, at least two
    parts = []
    for i in range(0, s, size):
        found, best = _call(scores_RS[:, i : i + size], at_RS[:, i : i + size], k, interpret)
        parts.append((best, found))
    best, found = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return top_k_of(best, found, k, most=most, interpret=interpret)


def _power(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def _call(scores_RS: jax.Array, at_RS: jax.Array | None, k: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Positions and scores of the best k of rows that a program can hold, [R, k] each."""
    r, s = scores_RS.shape
    width = max(_power(s), 128)
    block = min(BLOCK, width)
    options: dict[str, Any] = {"interpret": True}
    if not interpret:
        n_warps = min(max(width // 2048, 4), 16)
        options = {"compiler_params": plt.CompilerParams(num_warps=n_warps, num_stages=1)}
    more = () if at_RS is None else (at_RS,)
    row = pl.BlockSpec((None, s), lambda i: (i, 0))
    n = k + interpret  # interpreted, a masked store writes what was there before: to a place of no use
    result = pl.BlockSpec((None, n), lambda i: (i, 0))
    call = pl.pallas_call(
        functools.partial(_kernel, k, s, width, block),
        out_shape=[jax.ShapeDtypeStruct((r, n), jnp.int32), jax.ShapeDtypeStruct((r, n), jnp.float32)],
        grid=(r,),
        in_specs=[row] * (1 + len(more)),
        out_specs=[result, result],
        name="top_k",
        **options,
    )
    found = call(scores_RS, *more)
    return tuple(x[:, :k] for x in found) if n > k else tuple(found)


def _kernel(k: int, s: int, width: int, block: int, *refs: Any) -> None:
    scores, *more, out, best = refs
    at_ref = more[0] if more else None
    lanes = jnp.arange(width)
    x = plt.load(scores.at[pl.ds(0, width)], mask=lanes < s, other=-jnp.inf) if width != s else scores[...]
    keys = ordered(x)
    floor = ordered(jnp.full((), -jnp.inf, jnp.float32))

    def decide(i: jax.Array, threshold: jax.Array) -> jax.Array:
        """Bits are those of unsigned numbers: the highest is turned."""
        trial = threshold | lax.shift_left(jnp.int32(1), jnp.int32(31) - i)
        count = jnp.sum((keys >= (trial ^ LOWEST)).astype(jnp.int32))
        return jnp.where(count >= k, trial, threshold)

    threshold = lax.fori_loop(0, 32, decide, jnp.int32(0)) ^ LOWEST
    threshold = jnp.maximum(threshold, floor)
    n_ties = k - jnp.sum((keys > threshold).astype(jnp.int32))
    # numbers that are -inf are never chosen
    n_ties = jnp.where(threshold == floor, 0, n_ties)

    def write(j: jax.Array, state: tuple) -> tuple:
        n_before, n_equal = state
        lanes = j * block + jnp.arange(block)
        x = plt.load(scores.at[pl.ds(j * block, block)], mask=lanes < s, other=-jnp.inf)
        key = ordered(x)
        equal = (key == threshold).astype(jnp.int32)
        rank = n_equal + jnp.cumsum(equal)
        chosen = ((key > threshold) | ((equal > 0) & (rank <= n_ties))).astype(jnp.int32)
        place = jnp.where(chosen > 0, n_before + jnp.cumsum(chosen) - 1, out.shape[0] - 1)
        at = lanes if at_ref is None else plt.load(at_ref.at[pl.ds(j * block, block)], mask=lanes < s, other=NONE)
        plt.store(out.at[place], at.astype(jnp.int32), mask=chosen > 0)
        plt.store(best.at[place], x, mask=chosen > 0)
        return n_before + jnp.sum(chosen), n_equal + jnp.sum(equal)

    n_chosen, _ = lax.fori_loop(0, -(-s // block), write, (jnp.int32(0), jnp.int32(0)))

    def fill(j: jax.Array, _: None) -> None:
        places = j * 128 + jnp.arange(128)
        beyond = (places >= n_chosen) & (places < k)
        places = jnp.where(beyond, places, out.shape[0] - 1)
        plt.store(out.at[places], jnp.full((128,), NONE, jnp.int32), mask=beyond)
        plt.store(best.at[places], jnp.full((128,), -jnp.inf, jnp.float32), mask=beyond)

    lax.fori_loop(lax.div(n_chosen, 128), -(-k // 128), fill, None)
