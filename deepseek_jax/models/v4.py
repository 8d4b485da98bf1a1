"""DeepSeek-V4, Flash and Pro: compressed attention, several streams, experts chosen by token id or by score.

    X = [Emb(t)] * 4                                            streams (`layers.hyper`)
    layers:  X <- mix(X, Attention(norm read X));  X <- mix(X, Experts(norm read X))          (43 in Flash, 61 in Pro)
    h = norm head X;  logits = h W^O
    MTP:     X' = W_e norm Emb(t_+1) + W_h norm X;  X'' = a layer of X', its attention with the window alone;
             h^1 = norm head' X''

Layers differ in two things. Attention, by the tokens that one of its entries stands for: none (a window alone), 4 (CSA,
entries chosen by an indexer) or 128 (HCA, all entries). Routing: in the first layers a table names the experts of each
token id, in the others the largest sqrt-softplus scores with a balancing bias do. Layers whose kinds repeat run as one
loop over the group: (HCA, CSA) 20 times in Flash.
Paper: DeepSeek-V4, arXiv 2606.19348, section 2; sizes: section 4.2.1 and the released config.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, Given, remat
from deepseek_jax.layers.block import Attend, Block, Build
from deepseek_jax.layers.compressed import CompressedAttention, CompressedConfig
from deepseek_jax.layers.decoder import Decoder, Depth, stacks_of
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.hyper import HyperConfig, HyperConnection, HyperHead, widened
from deepseek_jax.layers.indexer import IndexerConfig
from deepseek_jax.layers.mtp import StreamMTP, ahead
from deepseek_jax.layers.router import HashRouter, no_balance, sequence_balance, softplus_topk
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import checks


@dataclass(frozen=True)
class Config:
    """Sizes of a V4 (Flash's in brackets)."""

    vocab_size: int  # V (129,280)
    d_model: int  # D, width of each stream (4096)
    n_layers: int  # of the main model (43)
    # tokens that an entry of a layer's attention stands for, 0 for a window alone: of each layer and then of each depth
    # of multi-token prediction, at the end any others ((0, 0, 4, 128, 4, …, 4, 0))
    compress_ratios: tuple[int, ...]
    index_ratio: int  # which of these ratios means an indexer and blocks that overlap (4)
    n_hash_layers: int  # leading layers whose experts a table names (3)
    attention: CompressedConfig
    indexer: IndexerConfig  # of the layers with `index_ratio`
    index_dense: bool  # whether tokens attend to all entries while the indexer learns (in its warm-up alone)
    hyper: HyperConfig  # the streams
    experts: ExpertsConfig  # every layer's feed-forward
    swiglu_limit: float  # bounds what its SwiGLUs multiply (10); 0: nothing does
    mtp_depth: int  # multi-token-prediction modules (1)
    norm_eps: float  # of every RMSNorm (1e-6)
    init_std: float  # standard deviation of the initial weights

    @classmethod
    def from_config(cls, m: ConfigDict) -> "Config":
        """Reads the `model` part of a run's config. Raises UserError for sizes that make no model."""
        checks.check_keys(m, KEYS)
        checks.check_even(m, "rope_width")
        if m.top_k > m.n_experts:
            raise UserError(f"config.model.top_k={m.top_k} of n_experts={m.n_experts}: choose a smaller top_k.")
        if m.n_heads % m.out_groups:
            raise UserError(f"config.model: out_groups={m.out_groups} does not divide n_heads={m.n_heads}.")
        for key in ("head_width", "index_width"):
            if m[key] < m.rope_width:
                raise UserError(f"config.model.{key}={m[key]} is less than rope_width={m.rope_width}: choose as many.")
        if len(m.compress_ratios) < m.n_layers + m.mtp_depth:
            raise UserError(
                f"config.model.compress_ratios has {len(m.compress_ratios)} numbers: expected one for each of "
                f"{m.n_layers} layers and {m.mtp_depth} depths of multi-token prediction."
            )
        c = checks.take(cls, m)
        return replace(c, compress_ratios=tuple(c.compress_ratios))

    @property
    def kinds(self) -> list["Kind"]:
        """The kind of each layer of the main model, and then of each depth of multi-token prediction."""
        n = self.n_layers + self.mtp_depth
        return [Kind(ratio, layer < self.n_hash_layers) for layer, ratio in enumerate(self.compress_ratios[:n])]


KEYS = tuple(key for key in checks.keys(Config) if key not in ("n_groups", "top_groups"))  # it has no groups


class Kind(NamedTuple):
    """What layers differ in."""

    ratio: int  # tokens that an entry of its attention stands for; 0: it has a window alone
    is_hashed: bool  # whether a table names the experts


class Model(Decoder):
    """The network."""

    def __init__(self, c: Config, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        def streams_head(rngs: nnx.Rngs) -> HyperHead:
            return HyperHead(c.hyper, c.d_model, rngs=rngs)

        def build(kind: Kind) -> Build:
            return _block(c, run, kind)

        main, further = c.kinds[: c.n_layers], c.kinds[c.n_layers :]
        stacks = stacks_of(main, build)
        super().__init__(c.vocab_size, c.d_model, c.norm_eps, c.init_std, run, stacks, rngs=rngs)
        self.streams_head = streams_head(rngs)
        self.mtp = nnx.List(
            StreamMTP(build(kind), streams_head, c.d_model, c.norm_eps, c.init_std, run.matmul, rngs=rngs)
            for kind in further
        )
        self.config = c

    def begin(self, x_BTD: jax.Array) -> jax.Array:
        """The streams x_BTOD before the first block: all the embedding."""
        return widened(x_BTD, self.config.hyper.n_streams)

    def finish(self, x_BTOD: jax.Array) -> jax.Array:
        """h_BTD: the streams as one, normed for the head."""
        return self.final_norm(self.streams_head(x_BTOD))

    def ahead_of(self, x_BTOD: jax.Array, h_BTD: jax.Array) -> jax.Array:
        """Multi-token prediction reads the streams."""
        return x_BTOD

    def of_ahead(self, x_BTOD: jax.Array) -> jax.Array:
        """h_BTD of these."""
        return self.finish(x_BTOD)

    @property
    def ahead_shape(self) -> tuple[int, ...]:
        """Of the streams of a token."""
        return self.config.hyper.n_streams, self.config.d_model

    def mtp_depths(
        self, x_BTOD: jax.Array, targets_BT: jax.Array, tokens: Tokens, x_KBTD: Sequence[jax.Array] | None = None
    ) -> list[Depth]:
        """Multi-token prediction from the main model's streams, one entry per depth; see `models.v3`."""
        depths, ids = [], ahead(targets_BT, len(self.mtp) + 1, self.run.context)
        for k, module in enumerate(self.mtp):
            depth = remat(module, self.run.remat)
            tokens = tokens._replace(ids_BT=ids[k], real_BT=ids[k] >= 0)
            x_BTD = self.embed(tokens) if x_KBTD is None else x_KBTD[k]
            (x_BTOD, h_BTD), statistics = depth(x_BTOD, x_BTD, tokens)
            depths.append(Depth(h_BTD, ids[k + 1], statistics))
        return depths

    def ahead(
        self,
        x_BTOD: jax.Array,
        tokens: Tokens,
        attend: Attend,
        cached: Any = None,
        place_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The first depth of multi-token prediction in generation, from the streams; see `models.v3`."""
        return self.mtp[0].generating(x_BTOD, self.embed(tokens), tokens, attend, cached, place_B)

    def ids_ahead(self, targets_BT: jax.Array) -> list[jax.Array]:
        """The ids that each depth of multi-token prediction reads."""
        return ahead(targets_BT, len(self.mtp), self.run.context)[: len(self.mtp)]


def _block(c: Config, run: Execution, kind: Kind) -> Build:
    """Makes the blocks of a kind."""
    e = c.experts
    route = Given(softplus_topk, top_k=e.top_k, scale=e.route_scale)
    n_indexed = sum(kind.ratio == c.index_ratio for kind in c.kinds)
    index = c.indexer if kind.ratio == c.index_ratio else None

    def attention(rngs: nnx.Rngs) -> CompressedAttention:
        how: dict[str, Any] = {"index": index, "is_dense": c.index_dense, "share": 1 / max(n_indexed, 1)}
        return CompressedAttention(c.attention, c.d_model, run, ratio=kind.ratio, **how, rngs=rngs)

    def by_table(rngs: nnx.Rngs) -> HashRouter:
        return HashRouter(c.vocab_size, c.d_model, e.n_experts, e.top_k, c.init_std, route, rngs=rngs)

    def experts(rngs: nnx.Rngs) -> Experts:
        if kind.is_hashed:
            return Experts(e, c.d_model, route, no_balance, run, router=by_table, limit=c.swiglu_limit, rngs=rngs)
        return Experts(e, c.d_model, route, sequence_balance, run, limit=c.swiglu_limit, rngs=rngs)

    def residual(rngs: nnx.Rngs) -> HyperConnection:
        return HyperConnection(c.hyper, c.d_model, run, rngs=rngs)

    def block(rngs: nnx.Rngs) -> Block:
        return Block(attention, experts, "experts", c.d_model, c.norm_eps, residual=residual, rngs=rngs)

    return block


def flops_per_pair(c: Config) -> int:
    """Operations of one token's queries with the keys and values of another, in one layer: 2 H (Q + U), U = Q."""
    return 4 * c.attention.n_heads * c.attention.head_width
