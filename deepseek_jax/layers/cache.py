"""What generation keeps of earlier tokens, and how it lies in memory: the business of the attention that reads it.

An attention says what it keeps of each token (`entries`: a NamedTuple of arrays with axes B and S first) and, by a
layout, where that goes. Nothing else knows an axis of a cache. `Full` keeps every token; a ring buffer for a window
of tokens, one entry for several tokens, or pages of memory are layouts of the same three methods.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.layers.base import InStack, is_in_stack
from deepseek_jax.layers.block import Attend, Entries, Losses
from deepseek_jax.layers.tokens import Tokens

Cached = Any  # what a layout makes of entries: any tree of arrays


class Layout(Protocol):
    """How the entries of one attention lie in memory."""

    def empty(self, entries: Entries, n_positions: int) -> Cached:
        """Returns memory for sequences of up to `n_positions` tokens, with entries like these."""

    def write(self, cached: Cached, entries: Entries, tokens: Tokens) -> Cached:
        """Returns the memory with these tokens in it.

        Tokens that are not real (`tokens.real_BT`) need not be kept; no later token may see them.
        """

    def seen(self, cached: Cached, tokens: Tokens) -> jax.Array:
        """Returns seen_BTS: which slots of the memory each of these tokens, already written, looks at."""

    def packed(self, entries: Entries) -> Cached:
        """Returns entries as they are stored."""

    def unpacked(self, cached: Cached) -> Entries:
        """Returns what is stored as entries."""


@dataclass(frozen=True)
class Full:
    """Every token is kept: slot s holds the token at position s.

    What is written of padding at the end of a prompt lies behind it, unseen, until it is overwritten.
    """

    def empty(self, entries: Entries, n_positions: int) -> Entries:
        """See `Layout`."""
        stored = self.packed(entries)
        return jax.tree.map(lambda x: jnp.zeros((x.shape[0], n_positions, *x.shape[2:]), x.dtype), stored)

    def write(self, cached: Entries, entries: Entries, tokens: Tokens) -> Entries:
        """See `Layout`."""
        rows = jnp.arange(tokens.positions_BT.shape[0])[:, None]
        packed = self.packed(entries)
        return jax.tree.map(lambda old, new: _put(old, new, rows, tokens.positions_BT), cached, packed)

    def seen(self, cached: Entries, tokens: Tokens) -> jax.Array:
        """See `Layout`."""
        n_slots = jax.tree.leaves(cached)[0].shape[1]
        return jnp.arange(n_slots) <= tokens.positions_BT[..., None]

    def packed(self, entries: Entries) -> Cached:
        """See `Layout`; here the entries themselves."""
        return entries

    def unpacked(self, cached: Cached) -> Entries:
        """See `Layout`."""
        return cached


def first_pass(n_positions: int) -> Attend:
    """Prefill: the tokens look at themselves, and are written to memory for `n_positions` tokens."""

    def attend(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: None) -> tuple[jax.Array, Cached, Losses]:
        entries = attention.entries(x_BTD, tokens)
        cached = attention.cache.write(attention.cache.empty(entries, n_positions), entries, tokens)
        u_BTD, losses = attention.over_itself(x_BTD, tokens, entries)
        return u_BTD, cached, losses

    return attend


def next_chunk(start: int | jax.Array) -> Attend:
    """Prefill in parts: tokens of the positions from `start` on look at those before them, and at themselves.

    An attention over `Full` memory takes its expanded form, as in `first_pass`.
    """

    def attend(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
        return attention.extend(x_BTD, tokens, cached, start)

    return attend


def next_chunk_in_pages(start: int | jax.Array, table_BN: jax.Array, slot_B: jax.Array | None = None) -> Attend:
    """`next_chunk` where the memory of all sequences is one pool of pages.

    The pool is what `Full` makes for as many sequences as it has pages, each as long as a page; its arrays may be
    `base.InStack`. `table_BN` are the pages of each sequence in the order of its tokens, padded with 0, the page that
    belongs to nobody. An attention that `has_rows` keeps a part of its memory not in pages but in rows, of which each
    running sequence has one: `slot_B`.
    """

    def attend(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
        if attention.has_rows:
            return attention.extend_in_pages(x_BTD, tokens, cached, table_BN, slot_B)
        cached = write_pages(cached, attention.cache.packed(attention.entries(x_BTD, tokens)), tokens, table_BN)
        entries = attention.cache.unpacked(read_pages(*_one_pool(cached, table_BN)))
        u_BTD, losses = attention.over_itself(x_BTD, tokens, entries, start)
        return u_BTD, cached, losses

    return attend


def first_chunk_in_pages(table_BN: jax.Array, slot_B: jax.Array | None = None) -> Attend:
    """`next_chunk_in_pages` from position 0 on: the tokens look at themselves, and no page is read."""

    def attend(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
        if attention.has_rows:
            return attention.extend_in_pages(x_BTD, tokens, cached, table_BN, slot_B)
        packed = attention.cache.packed(attention.entries(x_BTD, tokens))
        cached = write_pages(cached, packed, tokens, table_BN)
        u_BTD, losses = attention.over_itself(x_BTD, tokens, attention.cache.unpacked(packed))
        return u_BTD, cached, losses

    return attend


def next_tokens_in_pages(table_BN: jax.Array, slot_B: jax.Array | None = None) -> Attend:
    """`next_tokens` over pages; see `next_chunk_in_pages`."""

    def attend(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
        if attention.has_rows:
            return attention.extend_in_pages(x_BTD, tokens, cached, table_BN, slot_B)
        cached = write_pages(cached, attention.cache.packed(attention.entries(x_BTD, tokens)), tokens, table_BN)
        return attention.over_pages(x_BTD, tokens, *_one_pool(cached, table_BN)), cached, {}

    return attend


def in_rows(pool: Any, n_rows: int) -> Any:
    """Returns the shapes of pages, with `n_rows` rows for what attentions keep per running sequence."""

    def rows(kept: Any) -> Any:
        return kept.with_rows(n_rows) if hasattr(kept, "with_rows") else kept

    return jax.tree.map(rows, pool, is_leaf=lambda kept: hasattr(kept, "with_rows"))


def write_pages(pool: Entries, entries: Entries, tokens: Tokens, table_BN: jax.Array) -> Entries:
    """Returns the pool with the entries of these tokens; those that are not real go to page 0."""
    arrays, table_BN = _one_pool(pool, table_BN)
    size = jax.tree.leaves(arrays)[0].shape[1]
    page_BT = jnp.take_along_axis(table_BN, tokens.positions_BT // size, axis=1, mode="clip")
    if tokens.real_BT is not None:
        page_BT = jnp.where(tokens.real_BT, page_BT, 0)
    slot_BT, in_loop = tokens.positions_BT % size, arrays is not pool
    arrays = jax.tree.map(lambda old, new: put_in_pages(old, new, page_BT, slot_BT, in_loop), arrays, entries)
    return jax.tree.map(as_was, pool, arrays, is_leaf=is_in_stack)


def _one_pool(pool: Entries, table_BN: jax.Array) -> tuple[Entries, jax.Array]:
    """The pages of all layers side by side, and which of them a layer's are; of one layer, the arguments themselves."""
    first = jax.tree.leaves(pool, is_leaf=is_in_stack)[0]
    if not is_in_stack(first):
        return pool, table_BN
    return jax.tree.map(lambda a: all_layers(a, table_BN)[0], pool, is_leaf=is_in_stack), all_layers(first, table_BN)[1]


def all_layers(array: jax.Array | InStack, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pages or rows of all layers side by side, and which of them a layer's `rows` are."""
    if not isinstance(array, InStack):
        return array, rows
    return array.stack.reshape(-1, *array.stack.shape[2:]), rows + array.number * array.stack.shape[1]


def as_was(old: jax.Array | InStack, pages: jax.Array) -> jax.Array | InStack:
    """Pages in the form in which they came."""
    return old._replace(stack=pages.reshape(old.stack.shape)) if isinstance(old, InStack) else pages


def put_in_pages(
    pages: jax.Array, new_BT: jax.Array, page_BT: jax.Array, slot_BT: jax.Array, in_loop: bool
) -> jax.Array:
    """Returns pages with new entries in their slots; `in_loop`: they are those of all layers."""
    put = _put_one_of_two if page_BT.size == 1 and in_loop else _put
    return put(pages, new_BT, page_BT, slot_BT)


def _put(memory: jax.Array, new_BT: jax.Array, row_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
    """Returns memory with new entries in its slots; those behind its end, the padding of prompts, are dropped.

    A single token is never padding. Without that check XLA on a GPU writes it in one kernel instead of two.
    """
    if slot_BT.size == 1:
        start: list[jax.Array | int] = [row_BT.reshape(()), slot_BT.reshape(()), *[0] * (memory.ndim - 2)]
        return lax.dynamic_update_slice(memory, new_BT, start)
    return memory.at[row_BT, slot_BT].set(new_BT)


def _put_one_of_two(pages: jax.Array, new_BT: jax.Array, page_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
    """Returns pages with the entry of a single token, and with one of zeros in page 0.

    XLA on a CPU would write an entry alone also where it is read, and copy all pages in each layer for that.
    """
    new_BT, page_BT, slot_BT = (jnp.concatenate([one, jnp.zeros_like(one)]) for one in (new_BT, page_BT, slot_BT))
    return _put(pages, new_BT, page_BT, slot_BT)


def read_pages(pool: Entries, table_BN: jax.Array) -> Entries:
    """Returns the entries of each sequence as `Full` keeps them, with axes B and S first."""
    return jax.tree.map(lambda a: a[table_BN].reshape(len(table_BN), -1, *a.shape[2:]), pool)


def next_tokens(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
    """Decode: the tokens are written to memory and look at what they see of it."""
    return attention.extend(x_BTD, tokens, cached)
