"""Exact top k of a few long rows on GPUs in Pallas Triton: the parts of a row are counted side by side.

One program per row would leave a GPU idle, and takes longer the longer the row. Here a row is cut into parts of 2,048
numbers with a program each. The threshold, the k-th largest number as an integer, is found four bits at a time: every
program counts the numbers of its part that reach each of the 15 next thresholds, and the next kernel adds up the
parts' counts. After eight rounds the threshold is known, one more counts what is above it and what equals it,
and the last writes: each program knows from the counts of those before it where its positions begin.

What bounds it: ten kernels that follow one another, about 2.5 us each, whatever the length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.topk.reference import NONE
from pallas_kernels.topk.threshold import LOWEST, ordered

PART = 2048  # numbers of a program
BITS = 4  # of the threshold per round
TRIALS = 1 << BITS


def top_k(scores_RS: jax.Array, k: int, *, part: int = PART, interpret: bool = False) -> jax.Array:
    """Returns positions [R, k] int32, ascending; see `pallas_kernels.topk`."""
    r, s = scores_RS.shape
    n = -(-s // part)
    padded = jnp.pad(scores_RS, ((0, 0), (0, n * part - s)), constant_values=-jnp.inf) if s % part else scores_RS
    call = functools.partial(_call, r, n, part, interpret)
    found: tuple = ()
    for shift in range(32 - BITS, -1, -BITS):
        shapes = (r, 1), (r, TRIALS, n)
        found = call(functools.partial(_count, k, shift, not found), "top_k_count", shapes, (padded, *found))
    found = call(functools.partial(_compare, k), "top_k_compare", ((r, 1), (r, n), (r, n)), (padded, *found))
    (positions,) = call(functools.partial(_write, k), "top_k_write", ((r, k + interpret),), (padded, *found))
    return positions[:, :k]


def _call(r: int, n: int, part: int, interpret: bool, body: Any, name: str, shapes: tuple, arrays: tuple) -> tuple:
    """A kernel with a program per row and part; it sees its part of the first array, and its row of the others."""

    def of_row(shape: tuple) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda i, _: (i, *[0] * (len(shape) - 1)))

    options: dict[str, Any] = {"interpret": True}
    if not interpret:
        options = {"compiler_params": plt.CompilerParams(num_warps=4, num_stages=1)}
    call = pl.pallas_call(
        functools.partial(body, n),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        grid=(r, n),
        in_specs=[pl.BlockSpec((None, part), lambda i, j: (i, j)), *(of_row(x.shape) for x in arrays[1:])],
        out_specs=[of_row(shape) for shape in shapes],
        name=name,
        **options,
    )
    return tuple(call(*arrays))


def _sums(ref: Any, n: int) -> jax.Array:
    """Sums over the parts, of counts [rows, parts]."""
    parts = jnp.arange(_power(n))
    mask = jnp.broadcast_to((parts < n)[None], (ref.shape[0], parts.size))
    return jnp.sum(plt.load(ref.at[:, pl.ds(0, parts.size)], mask=mask, other=0), axis=1)


def _threshold(k: int, shift: int, bits: Any, counts: Any, n: int) -> jax.Array:
    """The bits of the threshold so far, those of unsigned numbers: the highest is turned."""
    digit = jnp.sum((_sums(counts, n) >= k).astype(jnp.int32))
    return bits[0] | lax.shift_left(digit, jnp.int32(shift))


def _count(k: int, shift: int, is_first: bool, n: int, scores: Any, *refs: Any) -> None:
    """How many numbers of a part reach each of the next thresholds; two counts share an integer."""
    bits_out, counts_out = refs[-2:]
    bits = jnp.int32(0) if is_first else _threshold(k, shift + BITS, refs[0], refs[1], n)
    part, keys = pl.program_id(1), ordered(scores[...])

    def reached(trial: int) -> jax.Array:
        return (keys >= ((bits | lax.shift_left(jnp.int32(trial), jnp.int32(shift))) ^ LOWEST)).astype(jnp.int32)

    bits_out[0] = bits
    counts_out[0, part] = jnp.int32(0)  # the first trial is 1
    for trial in range(1, TRIALS, 2):
        both = reached(trial)
        if trial + 1 < TRIALS:
            both += lax.shift_left(reached(trial + 1), jnp.int32(16))
        both = jnp.sum(both)
        counts_out[trial, part] = both & 0xFFFF
        if trial + 1 < TRIALS:
            counts_out[trial + 1, part] = lax.shift_right_logical(both, jnp.int32(16))


def _compare(k: int, n: int, scores: Any, bits: Any, counts: Any, *out: Any) -> None:
    """How many numbers of a part are above the threshold, and how many equal it."""
    threshold_out, above_out, equal_out = out
    floor = ordered(jnp.full((), -jnp.inf, jnp.float32))
    threshold = jnp.maximum(_threshold(k, 0, bits, counts, n) ^ LOWEST, floor)
    part, keys = pl.program_id(1), ordered(scores[...])
    above, equal = (keys > threshold).astype(jnp.int32), (keys == threshold).astype(jnp.int32)
    both = jnp.sum(above + lax.shift_left(equal, jnp.int32(16)))
    threshold_out[0] = threshold
    above_out[part] = both & 0xFFFF
    # numbers that are -inf are never chosen
    equal_out[part] = jnp.where(threshold == floor, 0, lax.shift_right_logical(both, jnp.int32(16)))


def _write(k: int, n: int, scores: Any, threshold_ref: Any, above_ref: Any, equal_ref: Any, out: Any) -> None:
    """The positions of a part, behind those of the parts before it; of equal numbers the first."""
    threshold, part, size = threshold_ref[0], pl.program_id(1), scores.shape[0]
    parts = jnp.arange(_power(n))
    of_all = pl.ds(0, parts.size)
    above, equal = (plt.load(counts.at[of_all], mask=parts < n, other=0) for counts in (above_ref, equal_ref))
    n_ties = jnp.minimum(k - jnp.sum(above), jnp.sum(equal))
    ties_before = jnp.sum(jnp.where(parts < part, equal, 0))
    n_before = jnp.sum(jnp.where(parts < part, above, 0)) + jnp.minimum(ties_before, n_ties)
    keys = ordered(scores[...])
    ties = (keys == threshold).astype(jnp.int32)
    is_first = ties_before + jnp.cumsum(ties) <= n_ties
    chosen = ((keys > threshold) | ((ties > 0) & is_first)).astype(jnp.int32)
    place = jnp.where(chosen > 0, n_before + jnp.cumsum(chosen) - 1, out.shape[0] - 1)
    at = part * size + jnp.arange(size)
    plt.store(out.at[place], at.astype(jnp.int32), mask=chosen > 0)
    n_chosen = jnp.sum(above) + n_ties

    def fill(j: jax.Array, _: None) -> None:
        places = j * 128 + jnp.arange(128)
        beyond = (places >= n_chosen) & (places < k)
        plt.store(out.at[jnp.where(beyond, places, out.shape[0] - 1)], jnp.full((128,), NONE, jnp.int32), mask=beyond)

    n_blocks = -(-k // 128)
    lax.fori_loop(jnp.where(part == 0, lax.div(n_chosen, 128), n_blocks), n_blocks, fill, None)


def _power(n: int) -> int:
    return 1 << max(n - 1, 15).bit_length()
