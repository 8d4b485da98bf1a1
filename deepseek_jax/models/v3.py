"""DeepSeek-V3, in the order of its report: MLA, DeepSeekMoE with loss-free balancing, multi-token prediction.

    x = Emb(t)
    dense layers:  x <- x + MLA(norm x);  x <- x + SwiGLU(norm x)          (the first 3 of 61)
    MoE layers:    x <- x + MLA(norm x);  x <- x + Experts(norm x)         (the other 58)
    h = norm x;    logits = h W^O
    MTP depth k:   h^k = TRM_k(M_k [norm Emb(t_+k); norm h^{k-1}])         (one depth in the release)

R1 and V3.1 are the same network with other weights.
Paper: DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2; sizes: section 4.2.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import AS_IT_IS, Execution, remat, run_stack, stack
from deepseek_jax.layers.embed import Embedding, Head
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.mla import MLA, Latents, MLAConfig, default_positions
from deepseek_jax.layers.mtp import MTP, shift_left
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.rope import Yarn
from deepseek_jax.layers.router import Routing, expert_load, sequence_balance_loss, sigmoid_biased_topk
from deepseek_jax.layers.swiglu import SwiGLU


@dataclass(frozen=True)
class Config:
    """Sizes of a V3 (the released model's in brackets).

    Attributes:
        vocab_size: V (129,280).
        d_model: D, width of the residual stream (7168).
        n_layers: of the main model, dense and MoE (61).
        n_dense_layers: leading layers with a dense feed-forward (3).
        dense_width: hidden width of those (18,432).
        mla: multi-head latent attention.
        experts: the MoE layers' feed-forward.
        mtp_depth: multi-token-prediction modules (1).
        norm_eps: of every RMSNorm (1e-6).
        init_std: standard deviation of the initial weights (0.006).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_dense_layers: int
    dense_width: int
    mla: MLAConfig
    experts: ExpertsConfig
    mtp_depth: int
    norm_eps: float
    init_std: float

    @classmethod
    def from_config(cls, m: ConfigDict) -> "Config":
        """Reads the `model` part of a run's config."""
        _check(m)
        yarn = Yarn(**m.yarn) if m.yarn else None
        return cls(
            vocab_size=m.vocab_size,
            d_model=m.d_model,
            n_layers=m.n_layers,
            n_dense_layers=m.n_dense_layers,
            dense_width=m.dense_width,
            mla=MLAConfig(
                n_heads=m.n_heads,
                q_rank=m.q_rank,
                kv_rank=m.kv_rank,
                nope_width=m.nope_width,
                rope_width=m.rope_width,
                value_width=m.value_width,
                rope_base=m.rope_base,
                yarn=yarn,
                norm_eps=m.norm_eps,
                init_std=m.init_std,
            ),
            experts=ExpertsConfig(
                n_experts=m.n_experts,
                n_shared=m.n_shared_experts,
                width=m.expert_width,
                top_k=m.top_k,
                n_groups=m.n_groups,
                top_groups=m.top_groups,
                route_scale=m.route_scale,
                init_std=m.init_std,
            ),
            mtp_depth=m.mtp_depth,
            norm_eps=m.norm_eps,
            init_std=m.init_std,
        )


# Keys of `config.model`: those that are 1 or more, and the rest.
SIZES = ("vocab_size", "d_model", "n_layers", "n_dense_layers", "dense_width")
SIZES += ("n_heads", "q_rank", "kv_rank", "nope_width", "rope_width", "value_width")
SIZES += ("n_experts", "n_shared_experts", "expert_width", "top_k", "n_groups", "top_groups")
OTHERS = ("mtp_depth", "rope_base", "yarn", "route_scale", "norm_eps", "init_std")


def _check(m: ConfigDict) -> None:
    """Raises UserError for keys that are missing and for sizes that make no V3."""
    if missing := [key for key in (*SIZES, *OTHERS) if key not in m]:
        raise UserError(
            f"config.model lacks {', '.join(missing)}. Start from a config that holds a whole model, like tiny_v3."
        )
    for key, least in (*((size, 1) for size in SIZES), ("mtp_depth", 0)):
        if not isinstance(m[key], int) or m[key] < least:
            raise UserError(f"config.model.{key}={m[key]!r}: wanted an integer, {least} or more.")
    known = Yarn.__dataclass_fields__
    if m.yarn and not {"factor", "original_length"} <= set(m.yarn) <= set(known):
        raise UserError(
            f"config.model.yarn has the keys {', '.join(m.yarn)}: wanted some of {', '.join(known)}, "
            "the first two always, or none at all."
        )
    if m.n_dense_layers >= m.n_layers:
        raise UserError(
            f"config.model.n_dense_layers={m.n_dense_layers} of n_layers={m.n_layers}: wanted one dense layer or more, "
            "and one MoE layer or more."
        )
    if m.n_experts % m.n_groups or m.top_groups > m.n_groups:
        raise UserError(
            f"config.model: {m.n_experts} experts in n_groups={m.n_groups}, top_groups={m.top_groups}. "
            "Choose groups that divide the experts, and top_groups from 1 to n_groups."
        )
    if m.top_k > m.n_experts // m.n_groups * m.top_groups:
        raise UserError(
            f"config.model.top_k={m.top_k}: {m.top_groups} groups hold {m.n_experts // m.n_groups * m.top_groups} "
            "experts. Choose a smaller top_k or more top_groups."
        )
    if m.rope_width % 2:
        raise UserError(f"config.model.rope_width={m.rope_width}: rotary pairs need an even width.")


class Statistics(NamedTuple):
    """What a MoE layer tells the training step.

    Attributes:
        load_E: tokens that chose each expert, float32.
        balance: sum over the sequences of their balance loss, float32 scalar.
    """

    load_E: jax.Array
    balance: jax.Array

    @classmethod
    def of(cls, routing: Routing) -> "Statistics":
        """The statistics of one layer's routing."""
        n_experts = routing.scores_BTE.shape[-1]
        return cls(expert_load(routing.experts_BTK, n_experts), jnp.sum(sequence_balance_loss(routing)))


# What a block does with its attention: training, prefill and decode differ in nothing else.
Attend = Callable[[MLA, jax.Array], tuple[jax.Array, Latents | None]]


class DenseBlock(nnx.Module):
    """x <- x + MLA(norm x);  x <- x + SwiGLU(norm x)."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps, axis="embed", rngs=rngs)
        self.attention = MLA(c.mla, c.d_model, rngs=rngs)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, axis="embed", rngs=rngs)
        self.mlp = SwiGLU(c.d_model, c.dense_width, c.init_std, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, attend: Attend) -> tuple[jax.Array, Latents | None]:
        """Returns x_BTD and what `attend` kept."""
        u_BTD, kept = attend(self.attention, self.attention_norm(x_BTD))
        x_BTD = x_BTD + u_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kept


class MoEBlock(nnx.Module):
    """x <- x + MLA(norm x);  x <- x + Experts(norm x)."""

    def __init__(self, c: Config, run: Execution, *, rngs: nnx.Rngs):
        e = c.experts
        route = functools.partial(
            sigmoid_biased_topk, top_k=e.top_k, n_groups=e.n_groups, top_groups=e.top_groups, scale=e.route_scale
        )
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps, axis="embed", rngs=rngs)
        self.attention = MLA(c.mla, c.d_model, rngs=rngs)
        self.experts_norm = RMSNorm(c.d_model, c.norm_eps, axis="embed", rngs=rngs)
        self.experts = Experts(e, c.d_model, route, expert_axis=run.expert_axis, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, attend: Attend) -> tuple[jax.Array, tuple[Latents | None, Statistics]]:
        """Returns x_BTD and (what `attend` kept, the routing's statistics)."""
        u_BTD, kept = attend(self.attention, self.attention_norm(x_BTD))
        x_BTD = x_BTD + u_BTD
        y_BTD, routing = self.experts(self.experts_norm(x_BTD))
        return x_BTD + y_BTD, (kept, Statistics.of(routing))


class Cache(NamedTuple):
    """Latents of every layer, stacked: c_LBSC and k_rope_LBSP; slot s holds the token at position s."""

    dense: Latents
    moe: Latents


class Ahead(NamedTuple):
    """One depth of multi-token prediction: its hidden states, what they should predict, and its block's statistics."""

    h_BTD: jax.Array
    targets_BT: jax.Array
    statistics: Statistics


class Model(nnx.Module):
    """The network.

    Args:
        c: sizes.
        run: how it runs (dtype, rematerialisation, expert axis); changes nothing of what it computes.
        rngs: initialisers' keys.
    """

    def __init__(self, c: Config, run: Execution = AS_IT_IS, *, rngs: nnx.Rngs):
        self.embedding = Embedding(c.vocab_size, c.d_model, c.init_std, rngs=rngs)
        self.dense_blocks = stack(lambda r: DenseBlock(c, rngs=r), c.n_dense_layers, rngs)
        self.moe_blocks = stack(lambda r: MoEBlock(c, run, rngs=r), c.n_layers - c.n_dense_layers, rngs)
        self.final_norm = RMSNorm(c.d_model, c.norm_eps, axis="embed", rngs=rngs)
        self.head = Head(c.d_model, c.vocab_size, c.init_std, rngs=rngs)
        self.mtp = nnx.List(
            MTP(lambda r: MoEBlock(c, run, rngs=r), c.d_model, c.norm_eps, c.init_std, rngs=rngs)
            for _ in range(c.mtp_depth)
        )
        self.config, self.run = c, run

    def __call__(self, ids_BT: jax.Array, positions_BT=None, segments_BT=None) -> jax.Array:
        """float32 logits_BTV of the next token at every position."""
        h_BTD, _ = self.hidden(ids_BT, positions_BT, segments_BT)
        return self.head(h_BTD)

    def hidden(self, ids_BT: jax.Array, positions_BT=None, segments_BT=None) -> tuple[jax.Array, Statistics]:
        """The main model up to its final norm.

        Args:
            ids_BT: token ids.
            positions_BT: 0..T-1 by default.
            segments_BT: documents that must not see one another; None lets every token see all before it.

        Returns:
            (h_BTD, statistics of the MoE layers with a leading axis L).
        """
        if positions_BT is None:
            positions_BT = default_positions(ids_BT)
        attend = _whole_sequences(positions_BT, segments_BT)
        x_BTD, _, (_, statistics) = self._blocks(self.embedding(ids_BT, self.run.compute), attend)
        return self.final_norm(x_BTD), statistics

    def ahead(self, h_BTD: jax.Array, targets_BT: jax.Array, positions_BT=None, segments_BT=None) -> list[Ahead]:
        """Multi-token prediction from the main model's `h_BTD`, one entry per depth.

        Args:
            h_BTD: from `hidden`.
            targets_BT: the next token at each position, -1 where there is none.
            positions_BT, segments_BT: as for `hidden`.
        """
        if positions_BT is None:
            positions_BT = default_positions(targets_BT)
        attend = _whole_sequences(positions_BT, segments_BT)
        depths = []
        for module in self.mtp:
            depth = remat(functools.partial(module, attend=attend), self.run.remat)
            h_BTD, (_, statistics) = depth(h_BTD, self.embedding(targets_BT, self.run.compute))
            targets_BT = jnp.where(targets_BT < 0, -1, shift_left(targets_BT, fill=-1))  # nothing past a document's end
            depths.append(Ahead(h_BTD, targets_BT, statistics))
        return depths

    def loads(self, statistics: Statistics, depths: list[Ahead]) -> dict:
        """Tokens per expert of every router, in a tree whose leaves match the subtrees of the router biases."""
        loads = {"moe_blocks": statistics.load_E}
        return loads | ({"mtp": {str(k): depth.statistics.load_E for k, depth in enumerate(depths)}} if depths else {})

    def prefill(self, ids_BT: jax.Array, n_slots: int) -> tuple[jax.Array, Cache]:
        """Reads prompts in the expanded form.

        Args:
            ids_BT: prompts from position 0, padded at the end (what is cached of the padding is overwritten later).
            n_slots: S, size of the cache to make.

        Returns:
            (logits_BTV, the cache).
        """
        positions_BT = default_positions(ids_BT)

        def attend(attention: MLA, x_BTD: jax.Array) -> tuple[jax.Array, Latents]:
            latents = attention.latents(x_BTD, positions_BT)
            spare = [(0, 0), (0, n_slots - ids_BT.shape[1]), (0, 0)]
            cached = Latents(*(jnp.pad(latent, spare) for latent in latents))
            return attention.expanded(x_BTD, positions_BT, latents), cached

        x_BTD, dense, (moe, _) = self._blocks(self.embedding(ids_BT, self.run.compute), attend)
        return self.head(self.final_norm(x_BTD)), Cache(dense, moe)

    def decode(self, ids_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads the next token(s) of each sequence in the absorbed form, over the latent cache.

        Args:
            ids_BT: the new tokens (T = 1 in plain decoding).
            positions_BT: their positions, smaller than the cache's number of slots.
            cache: what came before.

        Returns:
            (logits_BTV, the cache with the new tokens in it).
        """
        n_slots = cache.dense.c_BSC.shape[-2]
        seen_BTS = jnp.arange(n_slots) <= positions_BT[..., None]
        rows = jnp.arange(ids_BT.shape[0])[:, None]

        def attend(attention: MLA, x_BTD: jax.Array, cached: Latents) -> tuple[jax.Array, Latents]:
            new = attention.latents(x_BTD, positions_BT)
            cached = Latents(*(old.at[rows, positions_BT].set(n) for old, n in zip(cached, new, strict=True)))
            return attention.absorbed(x_BTD, positions_BT, cached, seen_BTS), cached

        x_BTD, dense, (moe, _) = self._blocks(self.embedding(ids_BT, self.run.compute), attend, cache)
        return self.head(self.final_norm(x_BTD)), Cache(dense, moe)

    def _blocks(self, x_BTD: jax.Array, attend: Callable, cache: Cache | None = None):
        """All blocks in order; with a cache, `attend` also gets each layer's slice of it."""

        def call(block: nnx.Module, x_BTD: jax.Array, cached: Latents | None):
            return block(x_BTD, attend if cached is None else functools.partial(attend, cached=cached))

        dense, moe = cache if cache else (None, None)
        x_BTD, kept_dense = run_stack(self.dense_blocks, x_BTD, self.run, call, dense)
        x_BTD, kept_moe = run_stack(self.moe_blocks, x_BTD, self.run, call, moe)
        return x_BTD, kept_dense, kept_moe


def _whole_sequences(positions_BT: jax.Array, segments_BT: jax.Array | None) -> Attend:
    """Attention of training: expanded, nothing kept."""
    return lambda attention, x_BTD: (attention(x_BTD, positions_BT, segments_BT), None)


def flops_per_token(c: Config, seq_len: int) -> float:
    """Operations to train on one token: forward and backward, causal attention, multi-token prediction included.

    Two per weight of every matrix that a token meets, and 2 (Q + U) per head and key it sees, half of `seq_len` on
    average; the backward pass costs twice the forward.
    """
    m, e, d = c.mla, c.experts, c.d_model
    attention = d * m.q_rank + m.q_rank * m.n_heads * m.query_width + d * (m.kv_rank + m.rope_width)
    attention += m.n_heads * (m.kv_rank * (m.nope_width + m.value_width) + m.value_width * d)
    attention += m.n_heads * (m.query_width + m.value_width) * seq_len / 2
    moe = attention + d * e.n_experts + 3 * d * e.width * (e.top_k + e.n_shared)
    dense = attention + 3 * d * c.dense_width
    head = d * c.vocab_size
    main = c.n_dense_layers * dense + (c.n_layers - c.n_dense_layers) * moe + head
    return 3 * 2 * (main + c.mtp_depth * (moe + 2 * d * d + head))
