"""A decoder-only Transformer, whatever its blocks are: embedding, stacks of blocks, final norm, head.

    x = Emb(t);   x <- block(x) for every block;   h = norm x;   logits = h W^O

and its three ways of running, which differ in nothing but what a block does with its attention:

    hidden    whole sequences, nothing kept                              (training)
    prefill   whole prompts; what the cache needs of each token is kept  (the first pass of generation)
    decode    the next token(s) of each sequence, over the cache

A family's `Model` derives from `Decoder` and says which blocks are stacked.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.layers.attention import default_positions
from deepseek_jax.layers.base import Execution, run_stack, stack
from deepseek_jax.layers.embed import Embedding, Head
from deepseek_jax.layers.experts import Experts
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.router import Balance, Routing, expert_load
from deepseek_jax.layers.swiglu import SwiGLU

Entries = Any  # what an attention caches of its tokens: a NamedTuple of arrays, axes B and S first
Cache = dict[str, Entries]  # by stack; arrays [L, B, S, ...]: slot s holds the token at position s
Build = Callable[[nnx.Rngs], nnx.Module]

# What a block does with its attention: training, prefill and decode differ in nothing else.
Attend = Callable[[nnx.Module, jax.Array], tuple[jax.Array, Entries | None]]


class Statistics(NamedTuple):
    """What a MoE layer tells the training step.

    Attributes:
        load_E: tokens that chose each expert, float32.
        balance: sums over the sequences of their balance losses, float32 scalars.
    """

    load_E: jax.Array
    balance: Balance


class Ahead(NamedTuple):
    """One depth of multi-token prediction: its hidden states, what they should predict, and its block's statistics."""

    h_BTD: jax.Array
    targets_BT: jax.Array
    statistics: Statistics


class DenseBlock(nnx.Module):
    """x <- x + Attention(norm x);  x <- x + SwiGLU(norm x).

    Args:
        attention: makes the attention.
        d_model: width of the residual stream.
        width: hidden width of the feed-forward.
        eps: of the norms.
        std: standard deviation of the feed-forward's initial weights.
    """

    def __init__(self, attention: Build, d_model: int, width: int, eps: float, std: float, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.attention = attention(rngs)
        self.mlp_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.mlp = SwiGLU(d_model, width, std, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, attend: Attend, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Entries | None, None]]:
        """Returns x_BTD and (what `attend` kept, None); padding is a token like any other here."""
        u_BTD, kept = attend(self.attention, self.attention_norm(x_BTD))
        x_BTD = x_BTD + u_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), (kept, None)


class MoEBlock(nnx.Module):
    """x <- x + Attention(norm x);  x <- x + Experts(norm x).

    Args:
        attention: makes the attention.
        experts: makes the mixture of experts.
        balance: the balance losses of each sequence, from a layer's routing.
        d_model: width of the residual stream.
        eps: of the norms.
    """

    def __init__(
        self,
        attention: Build,
        experts: Callable[[nnx.Rngs], Experts],
        balance: Callable[[Routing], Balance],
        d_model: int,
        eps: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.attention = attention(rngs)
        self.experts_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.experts = experts(rngs)
        self.balance = balance

    def __call__(
        self, x_BTD: jax.Array, attend: Attend, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Entries | None, Statistics]]:
        """Returns x_BTD and (what `attend` kept, the routing's statistics, which leave padding out)."""
        u_BTD, kept = attend(self.attention, self.attention_norm(x_BTD))
        x_BTD = x_BTD + u_BTD
        y_BTD, routing = self.experts(self.experts_norm(x_BTD), real_BT)
        load_E = expert_load(routing.experts_BTK, routing.scores_BTE.shape[-1])
        return x_BTD + y_BTD, (kept, Statistics(load_E, jax.tree.map(jnp.sum, self.balance(routing))))


class Decoder(nnx.Module):
    """What the families' models have in common.

    A block is called as `block(x_BTD, attend, real_BT) -> (x_BTD, (kept, statistics or None))`.  An attention offers

        entries(x_BTD, positions_BT)                            what the cache keeps of these tokens
        over_itself(x_BTD, positions_BT, entries, segments_BT)  u_BTD, attending causally to the tokens themselves
        over_cache(x_BTD, positions_BT, cache, seen_BTS)        u_BTD, attending to the slots that are seen

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
        h_BTD, _ = self.hidden(ids_BT, positions_BT, segments_BT)
        return self.head(h_BTD)

    def hidden(
        self, ids_BT: jax.Array, positions_BT=None, segments_BT=None, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Statistics]]:
        """The model up to its final norm.

        Args:
            ids_BT: token ids.
            positions_BT: 0..T-1 by default.
            segments_BT: documents that must not see one another; None lets every token see all before it.
            real_BT: which tokens are text and not padding, bool; padding visits no expert. None: all are text.

        Returns:
            (h_BTD, statistics of each stack of MoE blocks, with a leading axis L).
        """
        if positions_BT is None:
            positions_BT = default_positions(ids_BT)
        x_BTD, _, statistics = self._blocks(ids_BT, whole_sequences(positions_BT, segments_BT), real_BT=real_BT)
        return self.final_norm(x_BTD), statistics

    def ahead(self, h_BTD: jax.Array, targets_BT: jax.Array, positions_BT=None, segments_BT=None) -> list[Ahead]:
        """Multi-token prediction, one entry a depth; none unless a family has it."""
        return []

    def loads(self, statistics: dict[str, Statistics], depths: list[Ahead]) -> dict:
        """Tokens per expert of every router; where routers have biases, a prefix of the tree of those."""
        loads = {name: found.load_E for name, found in statistics.items()}
        return loads | ({"mtp": {str(k): depth.statistics.load_E for k, depth in enumerate(depths)}} if depths else {})

    def prefill(self, ids_BT: jax.Array, n_slots: int) -> tuple[jax.Array, Cache]:
        """Reads prompts.

        Args:
            ids_BT: prompts from position 0, padded at the end (what is cached of the padding is overwritten later).
            n_slots: S, size of the cache to make.

        Returns:
            (h_BTD after the final norm: give the head those whose logits are wanted, the cache).
        """
        positions_BT = default_positions(ids_BT)

        def attend(attention: nnx.Module, x_BTD: jax.Array) -> tuple[jax.Array, Entries]:
            entries = attention.entries(x_BTD, positions_BT)
            spare = n_slots - ids_BT.shape[1]
            cached = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2)), entries)
            return attention.over_itself(x_BTD, positions_BT, entries), cached

        x_BTD, cache, _ = self._blocks(ids_BT, attend)
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

        def attend(attention: nnx.Module, x_BTD: jax.Array, cached: Entries) -> tuple[jax.Array, Entries]:
            new = attention.entries(x_BTD, positions_BT)
            cached = jax.tree.map(lambda old, n: old.at[rows, positions_BT].set(n), cached, new)
            return attention.over_cache(x_BTD, positions_BT, cached, seen_BTS), cached

        x_BTD, cache, _ = self._blocks(ids_BT, attend, cache)
        return self.head(self.final_norm(x_BTD)), cache

    def _blocks(self, ids_BT: jax.Array, attend: Callable, cache: Cache | None = None, real_BT=None):
        """(x_BTD, what was kept, statistics) after all blocks; with a cache, `attend` gets each layer's slice of it."""

        def call(block: nnx.Module, x_BTD: jax.Array, cached: Entries | None):
            return block(x_BTD, attend if cached is None else functools.partial(attend, cached=cached), real_BT)

        x_BTD = self.embedding(ids_BT, self.run.compute)
        kept, statistics = {}, {}
        for name in self.stacks:
            cached = cache[name] if cache else None
            x_BTD, (kept[name], found) = run_stack(getattr(self, name), x_BTD, self.run, call, cached)
            if found is not None:
                statistics[name] = found
        return x_BTD, kept, statistics


def whole_sequences(positions_BT: jax.Array, segments_BT: jax.Array | None) -> Attend:
    """The attention of training: each token looks at its own sequence, and nothing is kept."""

    def attend(attention: nnx.Module, x_BTD: jax.Array) -> tuple[jax.Array, None]:
        return attention.over_itself(x_BTD, positions_BT, attention.entries(x_BTD, positions_BT), segments_BT), None

    return attend
