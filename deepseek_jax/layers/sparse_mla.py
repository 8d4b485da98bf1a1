"""Multi-head latent attention to the positions that a lightning indexer chooses: DeepSeek sparse attention.

    S_t = top_k of I_t                                            (`layers.indexer`)
    u_t = MLA of h_t over the latents of S_t alone                (eq. 2)

Whole sequences take the expanded form with a mask (`layers.indexed_attention`); over a cache the latents of S_t are
gathered and meet the absorbed queries, so that a token costs top_k latents, and of all others the indexer's key. Where
no more than top_k positions are there, this is `layers.mla` to the last bit.

Where sequences are divided over devices (`config.mesh.context`), each device has its own queries and gathers what a
cache would hold of all tokens of a sequence, once per layer: that memory grows with T, not with T / n. Keys and values
of heads are not made of it: queries meet the latents of S_t in the absorbed form, whose products with W^UK and W^UV are
one per head and stay in bfloat16 when others run in FP8. `kernels.attention` computes the warm-up, and sequences of up
to top_k tokens, alone.

Two losses are reported. `index_kl` is what the indexer learns by: KL(p_t || softmax(I_t)), mean over the tokens of a
sequence. `index_recall`, not to be minimised, is the share of the dense attention's weights that S_t holds, mean over
the tokens that have a choice and over the layers; it is not reported where sequences have no more than top_k tokens.
Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1; the cache in FP8: DeepSeek's FlashMLA and DeepGEMM.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution
from deepseek_jax.layers.block import Losses
from deepseek_jax.layers.cache import Full
from deepseek_jax.layers.indexed_attention import Places, gathered_attention, losses_of
from deepseek_jax.layers.indexed_kernels import check_choice
from deepseek_jax.layers.indexer import Index, Indexer, IndexerConfig, IndexKeys, Stream
from deepseek_jax.layers.mla import MLA, Fp8Latents, Latents, MLAConfig
from deepseek_jax.layers.rope import frequencies, rotary_scale, rotate_halves
from deepseek_jax.layers.tokens import Tokens
from pallas_kernels.mla_decode import fp8_cache


class IndexedLatents(NamedTuple):
    """All that is cached of a token: what latent attention keeps, and the indexer's key."""

    c_BSC: jax.Array
    k_rope_BSP: jax.Array
    k_index_BSQ: jax.Array


class IndexedPacked(NamedTuple):
    """The same in FP8: bytes (V3.2: 656 and 132)."""

    entry_BSY: jax.Array
    k_index_BSY: jax.Array


@dataclass(frozen=True)
class IndexedFp8(Full):
    """`Fp8Latents` with the indexer's keys beside them, 128 codes of E4M3 and a float32 scale, a power of two."""

    latents: Fp8Latents

    def packed(self, entries: IndexedLatents) -> IndexedPacked:
        """See `layers.cache.Layout`."""
        latents = self.latents.packed(Latents(*entries[:2]))
        return IndexedPacked(latents.entry_BSY, fp8_cache.encode_key(entries.k_index_BSQ))

    def unpacked(self, cached: IndexedPacked) -> IndexedLatents:
        """See `layers.cache.Layout`."""
        latents = fp8_cache.decode(cached.entry_BSY, self.latents.rope_width)
        keys = fp8_cache.decode_key(cached.k_index_BSY)
        return IndexedLatents(*(part.astype(self.latents.dtype) for part in (*latents, keys)))


class SparseMLA(MLA):
    """Latent attention with an indexer.

    Args:
        c, index: sizes.
        is_dense: whether tokens attend to all positions, and the indexer learns from that (the warm-up): it is scored
            by what it would choose.
        share: of this layer in `index_recall`: one over the number of layers.
        run: as for `MLA`.

    Raises UserError for an implementation of `kernels.indexed_choice` that would not take these keys as they are.
    """

    def __init__(
        self,
        c: MLAConfig,
        index: IndexerConfig,
        d_model: int,
        run: Execution = SINGLE_DEVICE,
        *,
        is_dense: bool = False,
        share: float = 1.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(c, d_model, run, rngs=rngs)
        width = index.index_width
        if run.cache == "fp8" and (width % fp8_cache.BLOCK or width & (width - 1)):
            raise UserError(
                f"cache='fp8' for an indexer's keys of {width} numbers (config.model.index_width): expected a multiple "
                f"of {fp8_cache.BLOCK}, and a power of two for the Hadamard matrix that turns them. Leave cache='full'."
            )
        check_choice(run, index.index_width)

        def key(rngs: nnx.Rngs) -> IndexKeys:
            return IndexKeys(index, d_model, run, rngs=rngs)

        self.indexer = Indexer(index, d_model, key, FirstHalves(c), run, rngs=rngs)
        self.top_k, self.is_dense, self.share = index.index_top_k, is_dense, share
        if run.cache == "fp8":
            self.cache = IndexedFp8(Fp8Latents(c.rope_width, run.compute))

    def operand(self, x_BTD: jax.Array) -> Stream:
        """See `Attention`."""
        return Stream(x_BTD, self.matmul.operand(x_BTD))

    def entries(self, x: Stream, tokens: Tokens) -> IndexedLatents:  # type: ignore[override]  # more than its parent's
        """What the cache keeps of these tokens."""
        latents = super().entries(x.operand, tokens)
        return IndexedLatents(*latents, self.indexer.keys(x.operand, tokens.positions_BT))

    def queries(self, x: Stream, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:  # type: ignore[override]
        """See `MLA`."""
        return super().queries(x.operand, positions_BT)

    def over_itself(  # type: ignore[override]
        self, x: Stream, tokens: Tokens, entries: IndexedLatents, q_offset: int | jax.Array = 0
    ) -> tuple[jax.Array, Losses]:
        """See `MLA.over_itself`; losses are reported where the entries are those of the tokens alone."""
        n_tokens, latents = x.x_BTD.shape[1], Latents(*entries[:2])
        all_entries = jax.tree.map(self.context.whole, entries)
        q_parts, weights = self.queries(x, tokens.positions_BT), (self.k_up_CHN[...], self.v_up_CHU[...])
        index, places = self._index(x, tokens, all_entries.k_index_BSQ), self._places(tokens, q_offset)
        if self.context.n > 1:
            q_BTHQ = jnp.concatenate([self._absorbed(q_parts[0]), q_parts[1]], axis=-1)
            k_BSZQ = jnp.concatenate(all_entries[:2], axis=-1)[:, :, None]
        else:
            q_BTHQ = jnp.concatenate(q_parts, axis=-1)
            k_BSZQ, v_BSHU = self.expand(weights, Latents(*all_entries[:2]))
        options: dict[str, Any] = {"top_k": self.top_k, "scale": self.scale}
        if self.is_dense or all_entries.c_BSC.shape[1] <= self.top_k:
            o_BTHU = self.attended(jnp.concatenate(q_parts, axis=-1), latents, weights, tokens, q_offset)
        elif self.context.n > 1:
            entries_of_all = all_entries.c_BSC, all_entries.k_rope_BSP
            o_BTHU = self._moved_back(gathered_attention(q_BTHQ, *entries_of_all, index, places, **options))
        else:
            o_BTHU = self.kernels["indexed_attention"](q_BTHQ, k_BSZQ, v_BSHU, index, places, **options)
        losses = {}
        if entries.c_BSC.shape[1] == n_tokens:
            losses = self._losses(q_BTHQ, k_BSZQ, index, places, tokens)
        return self.matmul.einsum("BTHU,HUD->BTD", o_BTHU, self.out_HUD[...]), losses

    def over_cache(  # type: ignore[override]
        self,
        x: Stream,
        tokens: Tokens,
        cache: IndexedLatents | IndexedPacked,
        seen_BTS: jax.Array,
        table_BN: jax.Array | None = None,
    ) -> jax.Array:
        """See `MLA.over_cache`. Of more than top_k slots the indexer's keys are read, and of the latents those of S_t.

        Keys that lie in pages are gathered first.
        """
        *latents, keys = cache
        if self.is_dense or seen_BTS.shape[-1] <= self.top_k:
            return super().over_cache(x, tokens, tuple(latents), seen_BTS, table_BN)  # type: ignore[arg-type]
        if table_BN is not None:
            keys = keys[table_BN].reshape(len(table_BN), -1, keys.shape[-1])
        if keys.dtype == jnp.uint8:
            keys = fp8_cache.decode_key(keys).astype(x.x_BTD.dtype)
        index = self._index(x, tokens, keys)
        slot_BTK, is_chosen_BTK = self.kernels["indexed_choice"](index, seen_BTS, self.top_k)
        row_BTK = _rows(slot_BTK, latents[0].shape[1], table_BN)
        flat = tuple(array.reshape(-1, array.shape[-1]) for array in latents)
        q_nope_BTHN, q_rope_BTHP = self.queries(x, tokens.positions_BT)
        q_latent_BTHC = self._absorbed(q_nope_BTHN)
        attend = self.kernels["indexed_decode"]
        o_latent_BTHC = attend(q_latent_BTHC, q_rope_BTHP, flat, row_BTK, is_chosen_BTK, scale=self.scale)
        o_BTHU = self._moved_back(o_latent_BTHC)
        return self.matmul.einsum("BTHU,HUD->BTD", o_BTHU, self.out_HUD[...])

    @property
    def entry_width(self) -> int:
        """C + P, and the width of the indexer's key."""
        return super().entry_width + self.indexer.config.index_width

    @property
    def most_keys(self) -> int | None:  # type: ignore[override]
        """top_k, but in the warm-up."""
        return None if self.is_dense else self.top_k

    @property
    def gathers_chosen(self) -> bool:  # type: ignore[override]
        """But in the warm-up."""
        return not self.is_dense

    @property
    def flops_per_index(self) -> int:  # type: ignore[override]
        """2 J Q, of the indexer's heads and their width."""
        return 2 * self.indexer.config.index_heads * self.indexer.config.index_width

    def _absorbed(self, q_nope_BTHN: jax.Array) -> jax.Array:
        """Queries moved into the latent space, q_latent_BTHC."""
        return self.matmul.einsum("BTHN,CHN->BTHC", q_nope_BTHN, self.k_up_CHN[...])

    def _moved_back(self, o_latent_BTHC: jax.Array) -> jax.Array:
        """Sums of latents as sums of values, o_BTHU."""
        return self.matmul.einsum("BTHC,CHU->BTHU", o_latent_BTHC, self.v_up_CHU[...])

    def _index(self, x: Stream, tokens: Tokens, k_BSQ: jax.Array) -> Index:
        return self.indexer(self.query_latent(x.operand), x.x_BTD, tokens.positions_BT, k_BSQ)

    def _places(self, tokens: Tokens, q_offset: int | jax.Array) -> Places:
        """Where these tokens stand among all keys."""
        n_batch, n_tokens = tokens.positions_BT.shape
        place_BT = jnp.broadcast_to(q_offset + self.context.places(n_tokens), (n_batch, n_tokens))
        if tokens.segments_BT is None:
            return Places(place_BT)
        return Places(place_BT, tokens.segments_BT, self.context.whole(tokens.segments_BT))

    def _losses(self, q_BTHQ: jax.Array, k_BSZQ: jax.Array, index: Index, places: Places, tokens: Tokens) -> Losses:
        """What the indexer learns by, and its recall; each summed over the sequences."""
        options: dict[str, Any] = {"top_k": self.top_k, "is_dense": self.is_dense, "scale": self.scale}
        found = self.kernels["indexed_learning"](q_BTHQ, k_BSZQ, index, places, **options)
        has_choice = k_BSZQ.shape[1] > self.top_k
        return losses_of(found, tokens, self.context, share=self.share, has_choice=has_choice)


@dataclass(frozen=True)
class FirstHalves:
    """Positions of the indexer: the first P numbers are rotated in pairs (i, i + P/2), with the attention's angles.

    The first code of V3.2-Exp paired neighbours here as the attention does, and was corrected.
    """

    c: MLAConfig

    def __call__(self, x: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns queries or keys with positions."""
        c, width = self.c, self.c.rope_width
        theta = frequencies(width, c.rope_base, c.yarn)
        turned = rotate_halves(x[..., :width], positions_BT, theta, rotary_scale(c.yarn))
        return jnp.concatenate([turned, x[..., width:]], axis=-1)


def _rows(slot_BTK: jax.Array, n_slots: int, table_BN: jax.Array | None) -> jax.Array:
    """Where slots lie in memory whose sequences, or pages, of `n_slots` each lie one behind the other."""
    if table_BN is None:
        return slot_BTK + n_slots * jnp.arange(len(slot_BTK))[:, None, None]
    page_BTK = jax.vmap(lambda pages, slots: pages[slots // n_slots])(table_BN, slot_BTK)
    return page_BTK * n_slots + slot_BTK % n_slots
