"""Which pairs of queries and keys are visible, as bits: a word of 32 says it of one row and 32 columns.

Bit i of word w of row r is about column 32 w + i. Words come before rows, [B, W, R], so that a warp reads those of its
rows side by side. Of queries and of keys there are two such arrays, each the other one's transpose.
"""

import jax
import jax.numpy as jnp

WORD = 32


def packed(seen_BRC: jax.Array) -> jax.Array:
    """Returns words_BWR int32 of `seen_BRC` bool; columns that fill up the last word are not seen."""
    b, r, c = seen_BRC.shape
    full = jnp.pad(seen_BRC, ((0, 0), (0, 0), (0, -c % WORD))).reshape(b, r, -1, WORD)
    return jnp.swapaxes(_words(full, 3), 1, 2)


def transposed(words_BWR: jax.Array, n_columns: int) -> jax.Array:
    """Returns the words of the columns, int32 [B, ceil(R / 32), n_columns], of those of the rows."""
    b, w, r = words_BWR.shape
    words = jnp.pad(words_BWR, ((0, 0), (0, 0), (0, -r % WORD))).reshape(b, w, 1, -1, WORD)
    seen = words >> jnp.arange(WORD, dtype=jnp.int32)[:, None, None] & 1
    found = _words(seen, 4)  # [B, W, 32 columns, words of rows]
    return jnp.moveaxis(found.reshape(b, w * WORD, -1)[:, :n_columns], 1, 2)


def unpacked(words_BWR: jax.Array, n_columns: int) -> jax.Array:
    """Returns seen_BRC bool, the inverse of `packed`."""
    seen = words_BWR[:, :, None] >> jnp.arange(WORD, dtype=jnp.int32)[:, None] & 1
    b, w, _, r = seen.shape
    return jnp.swapaxes(seen.reshape(b, w * WORD, r)[:, :n_columns] > 0, 1, 2)


def in_tiles(words_BWR: jax.Array, columns: int, rows: int) -> jax.Array:
    """Returns the words, filled up with zeros to whole blocks of `columns` and tiles of `rows`."""
    _, w, r = words_BWR.shape
    return jnp.pad(words_BWR, ((0, 0), (0, -w % (columns // WORD)), (0, -r % rows)))


def some(words_BWR: jax.Array, columns: int, rows: int) -> jax.Array:
    """Returns whether some pair is visible of each tile of `rows` and each block of `columns`: bool [B, .., ..]."""
    b, w, r = words_BWR.shape
    tiles = words_BWR.reshape(b, w * WORD // columns, columns // WORD, r // rows, rows)
    return jnp.swapaxes(jnp.any(tiles != 0, axis=(2, 4)), 1, 2)


def _words(seen: jax.Array, axis: int) -> jax.Array:
    """One word of 32 neighbours along an axis."""
    shape = [1] * seen.ndim
    shape[axis] = WORD
    places = jnp.arange(WORD, dtype=jnp.int32).reshape(shape)
    return jnp.sum(seen.astype(jnp.int32) << places, axis=axis, dtype=jnp.int32)
