"""What V4's attention keeps of earlier tokens: a window of keys, the last tokens of open blocks, and entries.

    window    keys of the last w tokens; position p lies in row p mod w
    raw       of each compressor a_p and z_p of the last tokens that open blocks need, span of them, in row p mod span
    entries   of each compressor one entry per block; block i lies in row i, and is read once it is complete

Each sequence is at a position of its own. New tokens follow one another, any number of them; those that are padding,
at the end, are not kept. A block's entry is computed again with every chunk that reaches it, and nobody sees it before
its last token is there. All sizes are known when the program is compiled, and none depends on positions. Keys and
entries lie as `layers.entry_codes` stores them, raw numbers in float32.

In the engine entries lie in pages, window and raw in one row per running sequence. Entries are written to the pages
first and then read from where they lie, those that an indexer chooses alone. What a row holds is no longer there when
another sequence begins with the same tokens, so these share no pages.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers.base import InStack, is_in_stack
from deepseek_jax.layers.cache import all_layers, as_was, put_in_pages
from deepseek_jax.layers.compressor import Blocks, Compressor, Raw
from deepseek_jax.layers.entry_codes import Codes
from deepseek_jax.layers.tokens import Tokens


class Entries(NamedTuple):
    """What is computed of each token: its key, and what each compressor makes of it."""

    kv_BSQ: jax.Array
    raw: tuple[Raw, ...]


class Kept(NamedTuple):
    """Memory of a layer; axis B first."""

    window_BSQ: jax.Array
    raw: tuple[Raw, ...]
    entries_BIQ: tuple[jax.Array, ...]

    def with_rows(self, n_rows: int) -> "Kept":
        """The shapes of these pages, one sequence each, with so many rows for window and raw; axis L may come first."""
        axis = self.window_BSQ.ndim - 3

        def rows(a: Any) -> Any:
            return jax.ShapeDtypeStruct((*a.shape[:axis], n_rows, *a.shape[axis + 1 :]), a.dtype)

        return self._replace(window_BSQ=rows(self.window_BSQ), raw=jax.tree.map(rows, self.raw))


@dataclass(frozen=True)
class CompressedLayout:
    """A `layers.cache.Layout` of an attention with these compressors, whose weights it reads."""

    window: int  # w
    keys: Codes  # how keys are stored
    compressors: tuple[Compressor, ...]
    codes: tuple[Codes, ...]  # how the entries of each are

    def empty(self, entries: Entries, n_positions: int) -> Kept:
        """See `layers.cache.Layout`."""
        n_batch, _, width = entries.kv_BSQ.shape
        raw = tuple(
            jax.tree.map(lambda x, c=c: jnp.zeros((n_batch, c.span, x.shape[-1]), x.dtype), one)
            for c, one in zip(self.compressors, entries.raw, strict=True)
        )
        made = tuple(
            codes.pack(jnp.zeros((n_batch, max(n_positions // c.ratio, 1), c.width)))
            for c, codes in zip(self.compressors, self.codes, strict=True)
        )
        return Kept(self.keys.pack(jnp.zeros((n_batch, self.window, width))), raw, made)

    def write(self, cached: Kept, entries: Entries, tokens: Tokens) -> Kept:
        """See `layers.cache.Layout`."""
        rows_B1, kept = jnp.arange(len(tokens.positions_BT))[:, None], self.with_last(cached, entries, tokens)
        closed = zip(cached.entries_BIQ, self._closed(cached, entries, tokens), strict=True)
        made = (old.at[rows_B1, number_BI].set(new, mode="drop") for old, (number_BI, new) in closed)
        return kept._replace(entries_BIQ=tuple(made))

    def with_last(self, cached: Kept, entries: Entries, tokens: Tokens) -> Kept:
        """The memory with the last of these tokens in window and raw; entries as they were."""
        end_B = tokens.positions_BT[:, 0] + n_real(tokens)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return _put(old, new, tokens.positions_BT, end_B)

        window_BSQ = put(cached.window_BSQ, self.keys.pack(entries.kv_BSQ))
        return cached._replace(window_BSQ=window_BSQ, raw=jax.tree.map(put, cached.raw, entries.raw))

    def _closed(self, cached: Kept, entries: Entries, tokens: Tokens) -> list[tuple[jax.Array, jax.Array]]:
        """Of each compressor (the blocks that these tokens reach number_BI, their entries as they are stored)."""
        given = zip(self.compressors, self.codes, cached.raw, entries.raw, strict=True)
        return [_close(*each, tokens.positions_BT) for each in given]

    def before(self, cached: Kept, first_B: jax.Array) -> jax.Array:
        """Keys kv_BSQ of the w tokens before these positions, in order."""
        row_BS = (first_B[:, None] - self.window + jnp.arange(self.window)) % self.window
        return self.keys.unpack(jnp.take_along_axis(cached.window_BSQ, row_BS[..., None], axis=1))

    def seen(self, cached: Kept, tokens: Tokens) -> jax.Array:
        """seen_BTS: rows of the window that single tokens, already written, look at."""
        return jnp.arange(self.window) <= tokens.positions_BT[..., None]

    def rows(self, pool: Kept, slot_B: jax.Array) -> Kept:
        """Window and raw of sequences whose entries lie in pages."""

        def own(array: jax.Array | InStack) -> jax.Array:
            of_all, own_B = all_layers(array, slot_B)
            return of_all[own_B]

        window_BSQ, raw = jax.tree.map(own, (pool.window_BSQ, pool.raw), is_leaf=is_in_stack)
        return Kept(window_BSQ, raw, ())

    def write_pages(
        self, pool: Kept, before: Kept, entries: Entries, tokens: Tokens, table_BN: jax.Array, slot_B: jax.Array
    ) -> tuple[Kept, Kept]:
        """Writes tokens after those of the rows `before`: (the pool, the rows now); entries of padding go to page 0."""
        end_B, after = tokens.positions_BT[:, 0] + n_real(tokens), self.with_last(before, entries, tokens)

        def rows(array: jax.Array | InStack, new: jax.Array) -> Any:
            of_all, own_B = all_layers(array, slot_B)
            return as_was(array, of_all.at[own_B].set(new))

        def put(m: int, array: jax.Array | InStack, number_BI: jax.Array, stored_BIQ: jax.Array) -> Any:
            of_all, _ = all_layers(array, table_BN)
            page_BI = jnp.take_along_axis(table_BN, number_BI // of_all.shape[1], axis=1, mode="clip")
            is_text_BI = (m * number_BI < end_B[:, None]) & (end_B > tokens.positions_BT[:, 0])[:, None]
            _, own_BI = all_layers(array, jnp.where(is_text_BI, page_BI, 0))
            return as_was(
                array, put_in_pages(of_all, stored_BIQ, own_BI, number_BI % of_all.shape[1], of_all is not array)
            )

        closed = zip(self.compressors, pool.entries_BIQ, self._closed(before, entries, tokens), strict=True)
        window = rows(pool.window_BSQ, after.window_BSQ)
        raw = jax.tree.map(rows, pool.raw, after.raw, is_leaf=is_in_stack)
        made = tuple(put(compressor.ratio, array, *new) for compressor, array, new in closed)
        return Kept(window, raw, made), after

    def packed(self, entries: Entries) -> Entries:
        """See `layers.cache.Layout`; here the entries themselves."""
        return entries

    def unpacked(self, cached: Kept) -> Kept:
        """See `layers.cache.Layout`."""
        return cached


def n_real(tokens: Tokens) -> int | jax.Array:
    """How many tokens of each sequence are text."""
    if tokens.real_BT is None:
        return tokens.positions_BT.shape[1]
    return jnp.sum(tokens.real_BT, axis=1, dtype=jnp.int32)


def _put(memory: jax.Array, new: jax.Array, positions_BT: jax.Array, end_B: jax.Array) -> jax.Array:
    """Returns a ring with the last of the new tokens before `end_B` in it."""
    n_rows = memory.shape[1]
    is_kept_BT = (positions_BT < end_B[:, None]) & (positions_BT >= end_B[:, None] - n_rows)
    row_BT = jnp.where(is_kept_BT, positions_BT % n_rows, n_rows)  # those in no row are dropped
    return memory.at[jnp.arange(len(memory))[:, None], row_BT].set(new, mode="drop")


def _close(
    compressor: Compressor, codes: Codes, old: Raw, new: Raw, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(number_BI of all blocks that the new tokens reach, their entries as `codes` store them)."""
    m, span, n_tokens = compressor.ratio, compressor.span, positions_BT.shape[1]
    first_B, number_BI = positions_BT[:, :1], _reached(m, positions_BT)
    position_BIJ = m * (number_BI[..., None] + 1) - span + jnp.arange(span)
    is_new_BIJ = position_BIJ >= first_B[..., None]
    row_BIJ = jnp.where(is_new_BIJ, position_BIJ - first_B[..., None] + span, position_BIJ % span)
    blocks = Blocks(jnp.minimum(row_BIJ, span + n_tokens - 1), position_BIJ >= 0, m * number_BI)
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), old, new)
    return number_BI, codes.pack(compressor.entries(both, blocks))


def _reached(m: int, positions_BT: jax.Array) -> jax.Array:
    """Numbers of the blocks that tokens reach, number_BI, as many as it can be at any position."""
    return positions_BT[:, :1] // m + jnp.arange((positions_BT.shape[1] + m - 2) // m + 1)
