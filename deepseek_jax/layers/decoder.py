"""A decoder-only Transformer, independent of its block type: embedding, stacks of blocks, final norm, head.

    x = Emb(t);   x <- block(x) for every block;   h = norm x;   logits = h W^O

and its ways of running, which differ in nothing but what a block does with its attention:

    hidden    whole sequences, nothing kept                              (training)
    prefill   whole prompts; what the cache needs of each token is kept  (the first pass of generation)
    extend    the next part of prompts that are read in parts            (its form is prefill's, its cache decode's)
    decode    the next token(s) of each sequence, over the cache

A family's `Model` derives from `Decoder` and says which blocks are stacked.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.layers.base import Execution, run_cached, run_stack, stack
from deepseek_jax.layers.block import Attend, Attention, Build, Group, Statistics
from deepseek_jax.layers.cache import first_pass, in_rows, next_chunk, next_tokens
from deepseek_jax.layers.embed import Embedding, Head
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.tree import Path

Cache = dict[str, Any]  # by stack: what each attention's layout (`layers.cache`) made, as `base.run_cached` keeps it
Note = Callable[[Any, Statistics], Any]  # (what was noted of earlier tokens, a block's report) -> what is noted now
Routes = Mapping[str, jax.Array]  # stack -> the experts of its tokens, [B, T, L, K] of any integers
NO_ROUTES: Routes = MappingProxyType({})
Part = Mapping[str, slice]  # a part of the blocks, such as a pipeline stage: stack -> its layers, in order of running


class Stack(NamedTuple):
    """Layers that are alike and run as one loop."""

    name: str  # of the attribute that holds them, and so of their weights
    builds: tuple[Build, ...]  # make the blocks of one turn of the loop: one block, or several that alternate
    repeats: int  # turns


def stacks_of(kinds: Sequence[Hashable], build: Callable[[Any], Build], name: str = "blocks") -> tuple[Stack, ...]:
    """Layers of these kinds, in their order, as stacks that repeat groups of layers: a compiled program has each once.

    Of the layers that are left, a stack takes those that a repeated group covers most of; the shortest such group. A
    layer that begins no repetition is a stack of its own. `build` makes the blocks of a kind; stacks are called `name`
    and the number of their first layer.
    """
    found, first = [], 0
    while first < len(kinds):
        n, repeats = 1, 1
        for length in range(1, (len(kinds) - first) // 2 + 1):
            times, group = 1, kinds[first : first + length]
            while kinds[first + times * length : first + (times + 1) * length] == group:
                times += 1
            if times > 1 and times * length > n * repeats:
                n, repeats = length, times
        found.append(Stack(f"{name}_{first}", tuple(map(build, kinds[first : first + n])), repeats))
        first += n * repeats
    return tuple(found)


class Depth(NamedTuple):
    """One depth of multi-token prediction: its hidden states, what they should predict, and its block's statistics."""

    h_BTD: jax.Array
    targets_BT: jax.Array
    statistics: Statistics


class Decoder(nnx.Module):
    """What the families' models have in common; a block is called as `layers.block.Block` is.

    Args:
        vocab_size: V.
        eps: of the final norm.
        stacks: the blocks, in the order of running; a stack of no blocks is left out.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        eps: float,
        std: float,
        run: Execution,
        stacks: Sequence[Stack],
        *,
        rngs: nnx.Rngs,
    ):
        self.embedding = Embedding(vocab_size, d_model, std, rngs=rngs)
        stacks = [entry for entry in stacks if entry.repeats]
        for name, builds, repeats in stacks:
            build = builds[0] if len(builds) == 1 else functools.partial(Group, builds)
            setattr(self, name, stack(build, repeats, rngs))
        self.final_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.head = Head(d_model, vocab_size, std, rngs=rngs)
        self.stacks, self.run = tuple(name for name, _, _ in stacks), run

    def __call__(
        self, ids_BT: jax.Array, positions_BT: jax.Array | None = None, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        """float32 logits_BTV of the next token at every position."""
        h_BTD, _ = self.hidden(Tokens.of(ids_BT, positions_BT, segments_BT))
        return self.head(h_BTD)

    def embed(self, tokens: Tokens) -> jax.Array:
        """x_BTD before the first block, in the compute dtype."""
        return self.embedding(tokens.ids_BT, self.run.compute, self.run.vocabulary)

    def begin(self, x_BTD: jax.Array) -> jax.Array:
        """The stream that the first block reads, from the embeddings: these, unless a family has more than one."""
        return x_BTD

    def run_blocks(
        self, x_BTD: jax.Array, tokens: Tokens, part: Part | None = None, routes: Routes = NO_ROUTES
    ) -> tuple[jax.Array, dict[str, Statistics]]:
        """Runs the blocks, or a `part` of them; nothing is kept.

        With `routes`, of whole stacks, tokens visit these experts, whatever the routers of the stack would choose.
        Returns (x_BTD, statistics of each stack, with a leading axis L).
        """

        def call(block: nnx.Module, x_BTD: jax.Array, experts_BTK: jax.Array | None) -> tuple[jax.Array, Statistics]:
            x_BTD, (_, statistics) = block(x_BTD, tokens._replace(experts_BTK=experts_BTK))
            return x_BTD, statistics

        statistics = {}
        for name in self.stacks if part is None else part:
            layers, fetch = None if part is None else part[name], self.run.fetch and self.run.fetch(name)
            blocks, given = getattr(self, name), jnp.moveaxis(routes[name], 2, 0) if name in routes else None
            if given is not None and isinstance(blocks, Group):
                given = given.reshape(-1, len(blocks.blocks), *given.shape[1:])
            x_BTD, statistics[name] = run_stack(blocks, x_BTD, self.run, call, given, layers, fetch)
        return x_BTD, statistics

    def generating(
        self,
        tokens: Tokens,
        attend: Attend,
        cache: Cache | None = None,
        note: Note | None = None,
        in_stack: bool = False,
        for_drafts: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Embeds tokens and runs the blocks, each with what its attention kept of earlier tokens.

        With `note` what is kept of each block is a pair: its attention's, and what `note` makes of its second part
        (None at first) and of what the block reports. `in_stack` says that both take arrays as `base.InStack`, as those
        of pages do. Returns (h_BTD after the final norm, or what `ahead_of` makes of it `for_drafts`; what was kept).
        """

        def call(block: nnx.Module, x_BTD: jax.Array, cached: Any) -> tuple[jax.Array, Any]:
            own, noted = cached if note and cached is not None else (cached, None)
            x_BTD, (kept, statistics) = block(x_BTD, tokens, attend, own)
            return x_BTD, (kept, note(noted, statistics)) if note else kept

        x_BTD, kept = self.begin(self.embed(tokens)), {}
        for name in self.stacks:
            blocks, earlier = getattr(self, name), cache and cache[name]
            x_BTD, kept[name] = run_cached(blocks, x_BTD, self.run, call, earlier, in_stack=in_stack)
        h_BTD = self.finish(x_BTD)
        return self.ahead_of(x_BTD, h_BTD) if for_drafts else h_BTD, kept

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """h_BTD: what the last block gave, normed for the head."""
        return self.final_norm(x_BTD)

    def ahead_of(self, x_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
        """What multi-token prediction begins with, of what the last block gave and of that after `finish`: the latter.

        A family whose prediction reads the streams themselves returns `x_BTD`.
        """
        return h_BTD

    def of_ahead(self, x_BTD: jax.Array) -> jax.Array:
        """h_BTD, which the head reads, of what `ahead_of` gave."""
        return x_BTD

    @property
    def ahead_shape(self) -> tuple[int, ...]:
        """Of what `ahead_of` gives of a token."""
        return (self.embedding.table_VD.shape[1],)

    def hidden(self, tokens: Tokens, routes: Routes = NO_ROUTES) -> tuple[jax.Array, dict[str, Statistics]]:
        """The model up to its final norm: (h_BTD, statistics of each stack, with a leading axis L).

        `routes` is as in `run_blocks`.
        """
        x_BTD, statistics = self.run_blocks(self.begin(self.embed(tokens)), tokens, routes=routes)
        return self.finish(x_BTD), statistics

    def mtp_depths(
        self, h_BTD: jax.Array, targets_BT: jax.Array, tokens: Tokens, x_KBTD: Sequence[jax.Array] | None = None
    ) -> list[Depth]:
        """Multi-token prediction from `ahead_of`, one entry per depth; none unless a family has it.

        `x_KBTD` are the embeddings that each depth reads, where they are known: those of `ids_ahead`.
        """
        return []

    def ids_ahead(self, targets_BT: jax.Array) -> list[jax.Array]:
        """The ids that each depth of multi-token prediction reads."""
        return []

    def loads(self, statistics: dict[str, Statistics], depths: list[Depth]) -> dict:
        """Tokens per expert for every router: a prefix of the tree of router biases, where there are any."""
        loads = {name: found.load_E for name, found in statistics.items() if found.load_E is not None}
        return loads | ({"mtp": {str(k): depth.statistics.load_E for k, depth in enumerate(depths)}} if depths else {})

    def prefill(self, ids_BT: jax.Array, n_positions: int, real_BT: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Reads prompts.

        Args:
            ids_BT: prompts from position 0, padded at the end.
            n_positions: tokens that a sequence may have in the cache to be made.
            real_BT: False for the padding, bool; None: an attention's cache takes it for tokens that are overwritten.

        Returns (h_BTD after the final norm: give the head those whose logits are needed, the cache).
        """
        return self.generating(Tokens.of(ids_BT, real_BT=real_BT), first_pass(n_positions))

    def extend(
        self, ids_BT: jax.Array, start: int | jax.Array, cache: Cache, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads the next part of prompts whose parts before are in the cache, as `prefill` would read them whole.

        Args:
            ids_BT: tokens from position `start` on, padded at the end; `real_BT` is False for the padding.
            start: where they begin; an integer that may be known only when the program runs.
            cache: what came before, with memory for these.

        Returns (h_BTD after the final norm, the cache with these tokens in it).
        """
        positions_BT = jnp.broadcast_to(start + jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
        return self.generating(Tokens.of(ids_BT, positions_BT, real_BT=real_BT), next_chunk(start), cache)

    def decode(self, ids_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads the next token(s) of each sequence over the cache.

        Args:
            ids_BT: the new tokens (T = 1 in plain decoding).
            positions_BT: their positions, smaller than the cache's number of positions.
            cache: what came before.

        Returns (logits_BTV, the cache with the new tokens in it).
        """
        h_BTD, cache = self.generating(Tokens(ids_BT, positions_BT), next_tokens, cache)
        return self.head(h_BTD), cache

    def pool(self, n_pages: int, page_size: int, n_rows: int = 1) -> Cache:
        """Returns memory for `n_pages` pages of `page_size` tokens, all zeros (`layers.cache.next_chunk_in_pages`).

        What attentions keep per running sequence has `n_rows` rows.
        """
        ids_BT = jax.ShapeDtypeStruct((n_pages, 1), jnp.int32)
        _, cache = jax.eval_shape(lambda ids_BT: self.prefill(ids_BT, page_size), ids_BT)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), in_rows(cache, n_rows))

    @property
    def groups(self) -> dict[str, list[Path]]:
        """By stack, in the order of running: where the blocks of one of its repeats are in trees like that of `loads`.

        One repeat follows the other; each block there is a layer, whose arrays have the repeats first.
        """
        return {
            name: [(name, "blocks", str(number)) for number in range(len(one.blocks))]
            if isinstance(one := getattr(self, name), Group)
            else [(name,)]
            for name in self.stacks
        }

    @property
    def attentions(self) -> list[Any]:
        """The attention of each block, one per stack of alike blocks."""
        return [module for _, module in nnx.iter_graph(self) if isinstance(module, Attention)]
