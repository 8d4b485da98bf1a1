"""The lightning indexer: which of the tokens before it a token attends to (DeepSeek sparse attention).

    q_t,j = RoPE(W^QI_j c^Q_t)                    a few narrow query heads, from the latent of the attention's queries
    k_s = RoPE(LayerNorm(W^KI h_s))               one key, which the cache keeps beside the latent
    w_t,j = W^W_j h_t / sqrt(J Q)                 weights of the J heads; Q is their width
    I_t,s = sum_j w_t,j ReLU(q_t,j . k_s)                                                                       (eq. 1)
    S_t = the positions s <= t of the top_k largest I_t,s                                                       (eq. 2)
    L^I = sum_t KL(p_t || softmax(I_t))           what it learns by: p_t is the attention, summed over heads and
                                                  normalised, over all positions (eq. 3) or those of S_t (eq. 4)

Of equal scores the lowest positions are chosen; the report and the released code leave this open. No gradient flows
into what the indexer reads, and none of the language model's loss into it: choosing has no derivative.

In this file H and Q are the heads and the width of the indexer. The scores of all its heads, [B, H, T, S], exist for a
block of queries at a time (`layers.indexed_attention`). `Indexer` is given how keys are made and how positions enter,
so that it can choose among entries of several tokens as well.
Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1; sizes and the norm of the keys: the released code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn.initializers import normal

from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, param
from deepseek_jax.layers.norm import LayerNorm
from deepseek_jax.precision.matmul import Operand
from deepseek_jax.precision.quantize import dequantize_blocks, quantize_blocks

KEY_EPS = 1e-6  # of the keys' LayerNorm
Rotate = Callable[[jax.Array, jax.Array], jax.Array]  # (queries or keys, positions_BT) -> the same with positions in it


@dataclass(frozen=True)
class IndexerConfig:
    """Sizes of a lightning indexer (V3.2's in brackets)."""

    index_heads: int  # query heads (64)
    index_width: int  # width of a head and of the key (128)
    index_top_k: int  # positions that a token attends to (2048)
    q_rank: int  # R, width of the latent that the queries are made from (1536)
    init_std: float = 0.006  # standard deviation of the initial weights (0.006)


class Index(NamedTuple):
    """What scores are made of: queries with the weights of their heads, and keys."""

    q_BTHQ: jax.Array
    weight_BTH: jax.Array  # float32, with the factors of the scores
    k_BSQ: jax.Array


class Stream(NamedTuple):
    """The normed stream as it is, which the weights of the indexer's heads read, and ready for products."""

    x_BTD: jax.Array
    operand: Operand


class IndexKeys(nnx.Module):
    """One key per token: LayerNorm(W^KI h)."""

    def __init__(self, c: IndexerConfig, d_model: int, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        init = normal(c.init_std)
        self.down_DQ = param(rngs, (d_model, c.index_width), ("embed", None), init, role="attention_in")
        self.norm = LayerNorm(c.index_width, KEY_EPS, rngs=rngs)
        self.matmul = run.matmul

    def __call__(self, x_BTD: Operand) -> jax.Array:
        """k_BTQ without positions."""
        return self.norm(self.matmul.einsum("BTD,DQ->BTQ", x_BTD, self.down_DQ[...]))


class Indexer(nnx.Module):
    """Queries, weights and keys of the scores; nothing that it is given gets a gradient.

    | ours | report | released name |
    | --- | --- | --- |
    | q_up_RHQ | W^QI | indexer.wq_b |
    | key.down_DQ, key.norm | W^KI | indexer.wk, indexer.k_norm |
    | weight_DH | W^W | indexer.weights_proj |

    Args:
        key: makes the module that gives keys, such as `IndexKeys`.
        rotate: puts positions into queries and keys.
        run: its `matmul` is used; with a `cache` in FP8 queries and keys are turned by a Hadamard matrix and rounded
            to E4M3 with one scale each, a power of two, as in the released code.
        rounds: what is done to queries in place of that.
    """

    def __init__(
        self,
        c: IndexerConfig,
        d_model: int,
        key: Callable[[nnx.Rngs], nnx.Module],
        rotate: Rotate,
        run: Execution = SINGLE_DEVICE,
        *,
        rounds: Callable[[jax.Array], jax.Array] | None = None,
        rngs: nnx.Rngs,
    ):
        init, shape = normal(c.init_std), (c.q_rank, c.index_heads, c.index_width)
        self.q_up_RHQ = param(rngs, shape, ("q_latent", "heads", None), init, role="attention_in")
        self.weight_DH = param(rngs, (d_model, c.index_heads), ("embed", None), init, role="index")
        self.key: Any = key(rngs)
        self.config, self.rotate, self.matmul, self.is_fp8 = c, rotate, run.matmul, run.cache == "fp8"
        self.rounds = rounds or (in_e4m3 if self.is_fp8 else None)

    def keys(self, x_BTD: Operand, positions_BT: jax.Array) -> jax.Array:
        """k_BTQ, which the cache keeps."""
        k_BTQ = self.rotate(self.key(jax.tree.map(lax.stop_gradient, x_BTD)), positions_BT)
        return hadamard(k_BTQ) if self.is_fp8 else k_BTQ

    @jax.named_scope("indexer")
    def __call__(self, q_latent_BTR: jax.Array, x_BTD: jax.Array, positions_BT: jax.Array, k_BSQ: jax.Array) -> Index:
        """The index of tokens with latents c^Q and normed stream h over these keys."""
        c, x_BTD = self.config, lax.stop_gradient(x_BTD).astype(jnp.float32)
        q_BTHQ = self.matmul.einsum("BTR,RHQ->BTHQ", lax.stop_gradient(q_latent_BTR), self.q_up_RHQ[...])
        q_BTHQ = self.rotate(q_BTHQ, positions_BT)
        if self.rounds:
            q_BTHQ = self.rounds(q_BTHQ)
        weight_BTH = jnp.einsum("BTD,DH->BTH", x_BTD, self.weight_DH[...], precision=lax.Precision.HIGHEST)
        return Index(q_BTHQ, weight_BTH * (c.index_heads * c.index_width) ** -0.5, k_BSQ)


def scores(index: Index) -> jax.Array:
    """I_BTS of eq. 1, float32; those of all heads exist in between."""
    pairs_BHTS = jnp.einsum("BTHQ,BSQ->BHTS", index.q_BTHQ, index.k_BSQ, preferred_element_type=jnp.float32)
    exact = lax.Precision.HIGHEST  # of float32: by default GPUs and TPUs would round both
    return jnp.einsum("BHTS,BTH->BTS", jax.nn.relu(pairs_BHTS), index.weight_BTH, precision=exact)  # V3.2 eq. 1


def among_top(scores_BTS: jax.Array, seen_BTS: jax.Array, top_k: int) -> jax.Array:
    """Which positions are in S_t, bool [B, T, S]: the `top_k` best of those seen, all of them if there are fewer."""
    if scores_BTS.shape[-1] <= top_k:
        return seen_BTS
    ranked_BTS = _ranked(scores_BTS, seen_BTS)
    # the last of them is the least; of a slice XLA for CPUs would make a sort of all scores, four times as slow
    least_BT1 = jnp.min(lax.top_k(ranked_BTS, top_k)[0], axis=-1, keepdims=True)
    above_BTS, equal_BTS = ranked_BTS > least_BT1, ranked_BTS == least_BT1
    room_BT = top_k - jnp.sum(above_BTS, axis=-1, dtype=jnp.int32)
    first_BTS = jnp.cumsum(equal_BTS, axis=-1, dtype=jnp.int32) <= room_BT[..., None]
    return seen_BTS & (above_BTS | equal_BTS & first_BTS)  # V3.2 eq. 2


def top_slots(scores_BTS: jax.Array, seen_BTS: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """S_t as numbers: (slot_BTK int32, the best first; is_chosen_BTK, False where fewer than `top_k` are seen)."""
    best_BTK, slot_BTK = lax.top_k(_ranked(scores_BTS, seen_BTS), min(top_k, scores_BTS.shape[-1]))
    return slot_BTK, best_BTK > -jnp.inf


def choice(index: Index, seen_BTS: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """S_t of these queries and keys: (slot_BTK int32; is_chosen_BTK, whose first are True).

    An operation of `kernels.TABLE`, whose functions give the slots in orders of their own.
    """
    return top_slots(scores(index), seen_BTS, top_k)


def _ranked(scores_BTS: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Scores as they are compared: one zero, and nothing below what is not seen."""
    scores_BTS = lax.stop_gradient(scores_BTS)
    return jnp.where(seen_BTS, jnp.where(scores_BTS == 0, 0.0, scores_BTS), -jnp.inf)


def divergence(p_BTS: jax.Array, scores_BTS: jax.Array, attended_BTS: jax.Array) -> jax.Array:
    """KL(p_t || softmax(I_t)) over the positions attended to, nats [B, T] (eqs. 3, 4); only I gets a gradient."""
    p_BTS, masked_BTS = lax.stop_gradient(p_BTS), jnp.where(attended_BTS, scores_BTS, -1e30)
    log_q_BTS = jax.nn.log_softmax(masked_BTS, axis=-1)
    log_p_BTS = jnp.log(jnp.where(p_BTS > 0, p_BTS, 1.0))
    return jnp.sum(jnp.where(p_BTS > 0, p_BTS * (log_p_BTS - log_q_BTS), 0.0), axis=-1)


def in_e4m3(q: jax.Array) -> jax.Array:
    """Queries turned by a Hadamard matrix, and rounded to E4M3 with one scale each, a power of two."""
    return dequantize_blocks(*quantize_blocks(hadamard(q), (1, 128), "ue8m0"), q.dtype, (1, 128))


def hadamard(x: jax.Array) -> jax.Array:
    """x times the Hadamard matrix of the width of its last axis, a power of two, over the root of that width.

    Dot products stay; the numbers of a vector become alike in size, so that one scale does for all of them.
    """
    width, y = x.shape[-1], x.astype(jnp.float32)
    step = 1
    while step < width:
        pairs = y.reshape(*x.shape[:-1], -1, 2, step)
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        y, step = jnp.stack([one + other, one - other], axis=-2).reshape(x.shape), 2 * step
    return (y * width**-0.5).astype(x.dtype)
