"""A decoder-only Transformer, whatever its blocks are: embedding, stacks of blocks, final norm, head.

    x = Emb(t);   x <- block(x) for every block;   h = norm x;   logits = h W^O

and its three ways of running, which differ in nothing but what a block does with its attention:

    hidden    whole sequences, nothing kept                              (training)
    prefill   whole prompts; what the cache needs of each token is kept  (the first pass of generation)
    decode    the next token(s) of each sequence, over the cache

A family's `Model` derives from `Decoder` and says which blocks are stacked.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.layers.base import Execution, run_stack, stack
from deepseek_jax.layers.block import Attend, Block, Build, Entries, Losses, Statistics, over_themselves
from deepseek_jax.layers.embed import Embedding, Head
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.tokens import Tokens

Cache = dict[str, Entries]  # by stack; arrays [L, B, S, ...]: slot s holds the token at position s


class Depth(NamedTuple):
    """One depth of multi-token prediction: its hidden states, what they should predict, and its block's statistics."""

    h_BTD: jax.Array
    targets_BT: jax.Array
    statistics: Statistics


class Decoder(nnx.Module):
    """What the families' models have in common.

    A block is called as `layers.block.Block` is.  An attention offers

        entries(x_BTD, tokens)                      what the cache keeps of these tokens
        over_itself(x_BTD, tokens, entries)         (u_BTD, auxiliary losses), attending causally to themselves
        over_cache(x_BTD, tokens, cache, seen_BTS)  u_BTD, attending to the slots that are seen

    Args:
        vocab_size: V.
        d_model: D, width of the residual stream.
        eps: of the final norm.
        std: standard deviation of the initial embedding and head.
        run: how the model runs.
        stacks: name of an attribute -> (what makes one block, how many are stacked there), in the order of running; a
            stack of no blocks is left out.
        rngs: initialisers' keys.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        eps: float,
        std: float,
        run: Execution,
        stacks: dict[str, tuple[Build, int]],
        *,
        rngs: nnx.Rngs,
    ):
        self.embedding = Embedding(vocab_size, d_model, std, rngs=rngs)
        stacks = {name: (block, n_layers) for name, (block, n_layers) in stacks.items() if n_layers}
        for name, (block, n_layers) in stacks.items():
            setattr(self, name, stack(block, n_layers, rngs))
        self.final_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.head = Head(d_model, vocab_size, std, rngs=rngs)
        self.stacks, self.run = tuple(stacks), run

    def __call__(self, ids_BT: jax.Array, positions_BT=None, segments_BT=None) -> jax.Array:
        """float32 logits_BTV of the next token at every position."""
        h_BTD, _ = self.hidden(Tokens.of(ids_BT, positions_BT, segments_BT))
        return self.head(h_BTD)

    def hidden(self, tokens: Tokens) -> tuple[jax.Array, dict[str, Statistics]]:
        """The model up to its final norm: (h_BTD, statistics of each stack, with a leading axis L)."""
        x_BTD, _, statistics = self._blocks(tokens, over_themselves)
        return self.final_norm(x_BTD), statistics

    def mtp_depths(self, h_BTD: jax.Array, targets_BT: jax.Array, tokens: Tokens) -> list[Depth]:
        """Multi-token prediction, one entry per depth; none unless a family has it."""
        return []

    def loads(self, statistics: dict[str, Statistics], depths: list[Depth]) -> dict:
        """Tokens per expert for every router: a prefix of the tree of router biases, where there are any."""
        loads = {name: found.load_E for name, found in statistics.items() if found.load_E is not None}
        return loads | ({"mtp": {str(k): depth.statistics.load_E for k, depth in enumerate(depths)}} if depths else {})

    def prefill(self, ids_BT: jax.Array, n_slots: int) -> tuple[jax.Array, Cache]:
        """Reads prompts.

        Args:
            ids_BT: prompts from position 0, padded at the end (what is cached of the padding is overwritten later).
            n_slots: S, size of the cache to make.

        Returns:
            (h_BTD after the final norm: give the head those whose logits are wanted, the cache).
        """

        def attend(attention: nnx.Module, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Entries, Losses]:
            entries = attention.entries(x_BTD, tokens)
            spare = n_slots - ids_BT.shape[1]
            cached = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2)), entries)
            u_BTD, losses = attention.over_itself(x_BTD, tokens, entries)
            return u_BTD, cached, losses

        x_BTD, cache, _ = self._blocks(Tokens.of(ids_BT), attend)
        return self.final_norm(x_BTD), cache

    def decode(self, ids_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads the next token(s) of each sequence over the cache.

        Args:
            ids_BT: the new tokens (T = 1 in plain decoding).
            positions_BT: their positions, smaller than the cache's number of slots.
            cache: what came before.

        Returns:
            (logits_BTV, the cache with the new tokens in it).
        """
        n_slots = jax.tree.leaves(cache)[0].shape[2]
        seen_BTS = jnp.arange(n_slots) <= positions_BT[..., None]
        rows = jnp.arange(ids_BT.shape[0])[:, None]

        def attend(
            attention: nnx.Module, x_BTD: jax.Array, tokens: Tokens, cached: Entries
        ) -> tuple[jax.Array, Entries, Losses]:
            new = attention.entries(x_BTD, tokens)
            cached = jax.tree.map(lambda old, n: old.at[rows, positions_BT].set(n), cached, new)
            return attention.over_cache(x_BTD, tokens, cached, seen_BTS), cached, {}

        x_BTD, cache, _ = self._blocks(Tokens.of(ids_BT, positions_BT), attend, cache)
        return self.head(self.final_norm(x_BTD)), cache

    def _blocks(
        self, tokens: Tokens, attend: Attend, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache, dict[str, Statistics]]:
        """(x_BTD, what was kept, statistics) after all blocks; with a cache, `attend` gets each layer's slice of it."""

        def call(block: Block, x_BTD: jax.Array, cached: Entries | None) -> tuple:
            return block(x_BTD, tokens, attend if cached is None else functools.partial(attend, cached=cached))

        x_BTD = self.embedding(tokens.ids_BT, self.run.compute)
        kept, statistics = {}, {}
        for name in self.stacks:
            cached = cache[name] if cache else None
            x_BTD, (kept[name], statistics[name]) = run_stack(getattr(self, name), x_BTD, self.run, call, cached)
        return x_BTD, kept, statistics
