"""What generation keeps of earlier tokens, and how it lies in memory: the business of the attention that reads it.

An attention says what it keeps of each token (`entries`: a NamedTuple of arrays with axes B and S first) and, by a
layout, where that goes. Nothing else knows an axis of a cache. `Full` keeps every token; a ring buffer for a window
of tokens, one entry for several tokens, or pages of memory are layouts of the same three methods.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

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


@dataclass(frozen=True)
class Full:
    """Every token is kept: slot s holds the token at position s.

    What is written of padding at the end of a prompt lies behind it, unseen, until it is overwritten.
    """

    def empty(self, entries: Entries, n_positions: int) -> Entries:
        """See `Layout`."""
        return jax.tree.map(lambda x: jnp.zeros((x.shape[0], n_positions, *x.shape[2:]), x.dtype), entries)

    def write(self, cached: Entries, entries: Entries, tokens: Tokens) -> Entries:
        """See `Layout`."""
        rows = jnp.arange(tokens.positions_BT.shape[0])[:, None]
        return jax.tree.map(lambda old, new: old.at[rows, tokens.positions_BT].set(new), cached, entries)

    def seen(self, cached: Entries, tokens: Tokens) -> jax.Array:
        """See `Layout`."""
        n_slots = jax.tree.leaves(cached)[0].shape[1]
        return jnp.arange(n_slots) <= tokens.positions_BT[..., None]


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

    They are written to memory first, which must be `Full`. The attention takes its expanded form, as in `first_pass`.
    """

    def attend(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
        cached = attention.cache.write(cached, attention.entries(x_BTD, tokens), tokens)
        u_BTD, losses = attention.over_itself(x_BTD, tokens, cached, start)
        return u_BTD, cached, losses

    return attend


def next_tokens(attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: Cached) -> tuple[jax.Array, Cached, Losses]:
    """Decode: the tokens are written to memory and look at what they see of it."""
    cached = attention.cache.write(cached, attention.entries(x_BTD, tokens), tokens)
    return attention.over_cache(x_BTD, tokens, cached, attention.cache.seen(cached, tokens)), cached, {}
