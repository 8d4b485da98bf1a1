"""One Transformer block, whatever its attention, its feed-forward and its residual connection are.

    x <- x + Attention(norm x);   x <- x + FeedForward(norm x)

It runs in four phases, which a pipeline may call apart: attend; dispatch, which sends tokens to the devices of their
experts; compute; combine, which brings the results back.

What the block is made of is given to it. Each part reports what a training step needs to know, in one form
(`Statistics`): the tokens that chose each expert, and auxiliary losses by name. A new loss is written where it is
computed, and weighted in the config; nothing between the two knows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.divided_attention import divided_attention
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.tokens import Tokens, at
from deepseek_jax.parallel.alltoall import Sent, added
from deepseek_jax.parallel.context import Context
from deepseek_jax.precision.matmul import Matmul, Operand

Entries = Any  # what an attention keeps of its tokens: a NamedTuple of arrays, axes B and S first
Losses = dict[str, jax.Array]  # auxiliary losses, each summed over the sequences; float32 scalars
Build = Callable[[nnx.Rngs], nnx.Module]

# What a block does with its attention, which is all that training, prefill and decode differ in:
# attend(attention, x_BTD, tokens, what was kept before or None) -> (u_BTD, what is kept now, auxiliary losses).
Attend = Callable[[nnx.Module, jax.Array, Tokens, Any], tuple[jax.Array, Any, Losses]]


class Statistics(NamedTuple):
    """What a block, or a part of one, reports to the training step."""

    # tokens that chose each expert, float32; None where nothing is routed; of several blocks, a tree of them
    load_E: jax.Array | dict | None
    losses: Losses  # auxiliary losses, without their weights
    sent: Sent | None = None  # of the exchange with experts on other devices; None where there is none
    routes_BTK: jax.Array | None = None  # the experts of each token, int16; None where nobody asks (`Execution.routes`)


class Attention(nnx.Module):
    """What the attentions have in common; each one adds the rest.

    entries(x_BTD, tokens)                      what the cache keeps of these tokens
    over_itself(x_BTD, tokens, entries)         (u_BTD, auxiliary losses), attending causally to themselves; with
                                                `q_offset`, to that many tokens before them as well
    expand(weights, entries)                    keys and values of entries; reads no weights but those it is given
    scale                                       factor of the scores
    entry_width, expanded_width                 numbers per token of entries, and of keys and values of all heads
    most_keys                                   keys that one attends to at most; None: all before it
    gathers_chosen                              whether queries of divided sequences gather the entries of these, and
                                                meet them as they would in a cache
    gathered                                    numbers per token that divided sequences gather: (in the dtype of the
                                                activations, in float32); None: the entries
    tokens_per_key, window                      tokens that a key stands for, and tokens that one attends to besides
    flops_per_index                             operations per pair of tokens by which they are chosen
    rests                                       whether its indexer does not run (`Execution.index_rests`)
    flops_per_slot                              of a new token and one that it attends to in a cache, in the scores and
                                                the sums; None: as many as without a cache
    cache                                       where the entries go: a `layers.cache.Layout`
    over_cache(x_BTD, tokens, cached, seen_BTS) u_BTD, attending to the slots that are seen
    extend(x_BTD, tokens, cached, start)        (u_BTD, what is kept now, auxiliary losses), of tokens after those that
                                                are cached: a chunk of prompts from `start` on, or without a `start`
                                                the next token(s) of each sequence
    has_rows                                    whether a part of its memory is kept per running sequence and not in
                                                pages; then extend_in_pages(x_BTD, tokens, pool, table_BN, slot_B) is
                                                its `extend` over a pool of pages, and of rows for running sequences
    page_multiple                               tokens of which a page holds a multiple
    """

    most_keys: int | None = None
    gathers_chosen: bool = False
    gathered: Any = None
    tokens_per_key: int = 1
    window: int = 0
    flops_per_index: int = 0
    rests: bool = False
    flops_per_slot: Any = None
    has_rows: bool = False
    page_multiple: Any = 1
    extend_in_pages: Any
    matmul: Matmul
    kernels: Kernels
    context: Context
    scale: Any
    entry_width: Any
    expanded_width: Any
    expand: Any
    cache: Any
    entries: Any
    over_itself: Any
    over_cache: Any

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array | None = None, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        """u_BTD: causal attention over whole sequences, at positions 0..T-1 by default."""
        tokens = Tokens.of(x_BTD[..., 0], positions_BT, segments_BT)
        x = self.operand(x_BTD)
        return self.over_itself(x, tokens, self.entries(x, tokens))[0]

    def over_pages(self, x_BTD: jax.Array, tokens: Tokens, pool: Any, table_BN: jax.Array) -> jax.Array:
        """`over_cache` where `Full` memory lies in pages of one pool; the pages of each sequence are put side by side.

        An attention that can read pages where they lie has its own.
        """
        own = jax.tree.map(lambda a: a[table_BN].reshape(len(table_BN), -1, *a.shape[2:]), pool)
        return self.over_cache(x_BTD, tokens, self.cache.unpacked(own), self.cache.seen(own, tokens))

    def extend(
        self, x_BTD: jax.Array, tokens: Tokens, cached: Any, start: int | jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """The tokens are written to memory, which must be `Full`, and look at what is there."""
        cached = self.cache.write(cached, self.entries(x_BTD, tokens), tokens)
        if start is None:
            seen_BTS = self.cache.seen(cached, tokens)
            return self.over_cache(x_BTD, tokens, self.cache.unpacked(cached), seen_BTS), cached, {}
        u_BTD, losses = self.over_itself(x_BTD, tokens, self.cache.unpacked(cached), start)
        return u_BTD, cached, losses

    def attended(
        self, q_BTHQ: jax.Array, entries: Entries, weights: tuple, tokens: Tokens, q_offset: int | jax.Array
    ) -> jax.Array:
        """o_BTHU: queries that attend causally to the keys and values of `entries`; see `over_itself`, `expand`."""
        if self.context.n == 1:
            options = {"scale": self.scale, "segments_BT": tokens.segments_BT, "q_offset": q_offset}
            return self.kernels["attention"](q_BTHQ, *self.expand(weights, entries), **options)
        how = {"expand": self.expand, "context": self.context, "name": self.kernels.chosen["attention"]}
        return divided_attention(q_BTHQ, entries, weights, tokens.segments_BT, **how, scale=self.scale)

    def operand(self, x_BTD: jax.Array) -> Operand:
        """The normed stream x_BTD, as the other methods take it."""
        return self.matmul.operand(x_BTD)


def over_themselves(
    attention: Any, x_BTD: jax.Array, tokens: Tokens, cached: None = None
) -> tuple[jax.Array, None, Losses]:
    """The attention of training: the tokens look at themselves, and nothing is kept."""
    u_BTD, losses = attention.over_itself(x_BTD, tokens, attention.entries(x_BTD, tokens))
    return u_BTD, None, losses


@dataclass(frozen=True)
class Add:
    """The residual connection x <- x + f(x), without weights.

    Others have this form: `read` gives the branch its input, and `write` adds the branch's output to the stream.
    Between the two, `carry` holds what `write` needs of what `read` has computed.
    """

    def read(self, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        """Returns (the branch's input, carry)."""
        return x_BTD, None

    def write(self, x_BTD: jax.Array, u_BTD: jax.Array, carry: Any) -> jax.Array:
        """Returns the stream after the branch has given `u_BTD`."""
        return x_BTD + u_BTD


class Block(nnx.Module):
    """x <- x + Attention(norm x);  x <- x + FeedForward(norm x).

    Args:
        attention: makes the `Attention`.
        feed_forward: makes the feed-forward, which may route: dispatch(x_BTD, tokens), then compute(what that gave),
            then combine(what that gave) -> (y_BTD, Statistics).
        name: of the feed-forward among the block's weights: "mlp", "experts".
        residual: makes a residual connection, like `Add`; there are two.
    """

    def __init__(
        self,
        attention: Build,
        feed_forward: Build,
        name: str,
        d_model: int,
        eps: float,
        *,
        residual: Callable[[nnx.Rngs], Any] = lambda rngs: Add(),
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.attention: Any = attention(rngs)
        self.attention_residual = residual(rngs)
        setattr(self, f"{name}_norm", RMSNorm(d_model, eps, axis="embed", rngs=rngs))
        setattr(self, name, feed_forward(rngs))
        setattr(self, f"{name}_residual", residual(rngs))
        self.name = name

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        attend: Attend = over_themselves,
        cached: Any = None,
        place_B: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Any, Statistics]]:
        """Runs the four phases in order, with what the attention kept of earlier tokens in `cached`.

        With `place_B`, the phases after the attention run for the token at that place of each sequence alone (T = 1).
        Returns (x_BTD, (what `attend` kept, what attention and feed-forward report)).
        """
        x_BTD, kept, losses = self.attend(x_BTD, tokens, attend, cached)
        if place_B is not None:
            x_BTD, tokens = at((x_BTD, tokens), place_B)
        x_BTD, found = self.combine(x_BTD, self.compute(self.dispatch(x_BTD, tokens)))
        return x_BTD, (kept, found._replace(losses=_sums(losses, found.losses)))

    @jax.named_scope("projections")
    def attend(
        self, x_BTD: jax.Array, tokens: Tokens, attend: Attend = over_themselves, cached: Any = None
    ) -> tuple[jax.Array, Any, Losses]:
        """The first phase: (x_BTD after the attention, what was kept, auxiliary losses)."""
        u_BTD, carry = self.attention_residual.read(x_BTD)
        u_BTD, kept, losses = attend(self.attention, self.attention.operand(self.attention_norm(u_BTD)), tokens, cached)
        return self.attention_residual.write(x_BTD, u_BTD, carry), kept, losses

    def dispatch(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[Any, Any]:
        """The second phase: (what goes to the experts, the residual connection's carry)."""
        u_BTD, carry = self._part("residual").read(x_BTD)
        return self._part().dispatch(self._part("norm")(u_BTD), tokens), carry

    def compute(self, sent: tuple[Any, Any]) -> tuple[Any, Any]:
        """The third phase: the feed-forward, of what has arrived."""
        arrived, carry = sent
        return self._part().compute(arrived), carry

    def combine(self, x_BTD: jax.Array, computed: tuple[Any, Any]) -> tuple[jax.Array, Statistics]:
        """The fourth phase: (x_BTD after the feed-forward, what that reports)."""
        y, carry = computed
        y_BTD, found = self._part().combine(y)
        return self._part("residual").write(x_BTD, y_BTD, carry), found

    def _part(self, end: str = "") -> Any:
        """The feed-forward, its norm or its residual connection."""
        return getattr(self, f"{self.name}_{end}" if end else self.name)


class Group(nnx.Module):
    """Different blocks, one after the other, as one block: what a stack of alternating layers repeats."""

    def __init__(self, builds: Sequence[Build], rngs: nnx.Rngs):
        self.blocks = nnx.List(build(rngs) for build in builds)

    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, attend: Attend = over_themselves, cached: tuple | None = None
    ) -> tuple[jax.Array, tuple[tuple, Statistics]]:
        """Runs the blocks; as `Block`, with a tuple of what each keeps. Losses of one name are summed."""
        kept: list = []
        loads: dict = {}
        losses: Losses = {}
        sent: list[Sent] = []
        routes, given = [], tokens.experts_BTK  # those of each block, on an axis before B
        for number, block in enumerate(self.blocks):
            own = tokens if given is None else tokens._replace(experts_BTK=given[number])
            x_BTD, (mine, found) = block(x_BTD, own, attend, cached and cached[number])
            kept.append(mine)
            losses = _sums(losses, found.losses)
            if found.load_E is not None:
                loads[str(number)] = found.load_E
            sent += [found.sent] if found.sent else []
            routes += [] if found.routes_BTK is None else [found.routes_BTK]
        reported = jnp.stack(routes) if len(routes) == len(self.blocks) else None
        statistics = Statistics({"blocks": loads} if loads else None, losses, added(sent) if sent else None, reported)
        return x_BTD, (tuple(kept), statistics)


def _sums(some: Losses, others: Losses) -> Losses:
    """Both, those of one name summed."""
    return some | {name: some[name] + loss if name in some else loss for name, loss in others.items()}
