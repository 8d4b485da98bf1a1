"""The compressor of DeepSeek-V4: one entry for the m tokens of a block, in place of m keys and values.

    a_t = W^KV h_t,   z_t = W^Z h_t + b_(t mod m)             for each token, float32
    e_i = RoPE(norm(sum_t softmax_t(z_t) * a_t), m i)         t in block i = {m i, ..., m i + m - 1}, each channel apart

With overlapping blocks W^KV and W^Z are twice as wide: the first half of a and z counts in the entry of the block
after, the second half in that of the token's own, whose softmax has 2 m tokens (m before the first token of all). The
entry has the position of the first token of its own block; only tokens from its last one on see it, so that nothing of
a token reaches an earlier one. Blocks are counted from the first token of each document; the last, incomplete one has
no entry.

`Raw` is what is known of each token. `closed` finds the blocks of whole sequences, documents packed side by side
included; `layers.compressed_cache` those that new tokens close.
Paper: DeepSeek-V4, arXiv 2606.19348, section 2.3, eqs. 9-12 and 20-23; released code, class Compressor.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros

from deepseek_jax.layers.attention import MASKED
from deepseek_jax.layers.base import param
from deepseek_jax.layers.norm import RMSNorm

NOWHERE = 2**30  # the place of an entry that is not there: behind every token
Rotate = Callable[[jax.Array, jax.Array], jax.Array]  # (vectors, positions_BT) -> the same with positions in them


class Raw(NamedTuple):
    """What a compressor makes of each token, float32, both halves side by side if blocks overlap."""

    a_BSQ: jax.Array
    z_BSQ: jax.Array  # with the bias of the token's place in its block


class Blocks(NamedTuple):
    """Blocks of tokens, each by the rows in which what is known of its tokens lies."""

    row_BIJ: jax.Array  # of the tokens; with overlapping blocks those of the block before come first; int32
    is_there_BIJ: jax.Array  # bool
    position_BI: jax.Array  # of the first token of the block itself, int32


class Compressor(nnx.Module):
    """Weights of a compressor.

    | ours | paper | released name |
    | --- | --- | --- |
    | kv_DQ, gate_DQ | W^KV, W^Z | compressor.wkv, compressor.wgate |
    | bias_JQ | B | compressor.ape |
    | norm | | compressor.norm |

    Args:
        width: of an entry.
        ratio: m, tokens of a block.
        overlaps: whether an entry also holds the tokens of the block before.
        rotate: puts positions into entries.
    """

    def __init__(
        self,
        width: int,
        ratio: int,
        d_model: int,
        eps: float,
        std: float,
        rotate: Rotate,
        *,
        overlaps: bool,
        rngs: nnx.Rngs,
    ):
        init, wide = normal(std), 2 * width if overlaps else width
        self.kv_DQ = param(rngs, (d_model, wide), ("embed", None), init, role="compressor")
        self.gate_DQ = param(rngs, (d_model, wide), ("embed", None), init, role="compressor")
        self.bias_JQ = param(rngs, (ratio, wide), (None, None), zeros, role="bias")
        self.norm = RMSNorm(width, eps, rngs=rngs)
        self.width, self.ratio, self.overlaps, self.rotate = width, ratio, overlaps, rotate

    @property
    def span(self) -> int:
        """Tokens that an entry is made of."""
        return 2 * self.ratio if self.overlaps else self.ratio

    def raw(self, x_BTD: jax.Array, positions_BT: jax.Array) -> Raw:
        """What is kept of each token until its entries are made."""
        wide = {"preferred_element_type": jnp.float32}
        a_BTQ = jnp.einsum("BTD,DQ->BTQ", x_BTD, self.kv_DQ[...].astype(x_BTD.dtype), **wide)
        z_BTQ = jnp.einsum("BTD,DQ->BTQ", x_BTD, self.gate_DQ[...].astype(x_BTD.dtype), **wide)
        return Raw(a_BTQ, z_BTQ + self.bias_JQ[...][positions_BT % self.ratio])

    @jax.named_scope("compressor")
    def entries(self, raw: Raw, blocks: Blocks) -> jax.Array:
        """Entries e_BIQ of these blocks, float32."""
        n_batch, n_blocks, _ = blocks.row_BIJ.shape
        rows_BI = blocks.row_BIJ.reshape(n_batch, -1, 1)

        def rows(x_BSQ: jax.Array) -> jax.Array:
            """[B, I, J, Q], each token's half that counts in this block."""
            x_BIJQ = jnp.take_along_axis(x_BSQ, rows_BI, axis=1).reshape(n_batch, n_blocks, self.span, -1)
            if not self.overlaps:
                return x_BIJQ
            before, own = x_BIJQ[:, :, : self.ratio, : self.width], x_BIJQ[:, :, self.ratio :, self.width :]
            return jnp.concatenate([before, own], axis=2)

        z_BIJQ = jnp.where(blocks.is_there_BIJ[..., None], rows(raw.z_BSQ), MASKED)
        e_BIQ = jnp.sum(jax.nn.softmax(z_BIJQ, axis=2) * rows(raw.a_BSQ), axis=2)
        return self.rotate(self.norm(e_BIQ), blocks.position_BI)

    def closed(
        self, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[Blocks, jax.Array, jax.Array | None]:
        """The complete blocks of whole sequences of T tokens, T // m of them at most.

        Returns (the blocks, place_BI of their last tokens in the sequences, the documents segments_BI that they are
        of). Without `segments_BT` each sequence is one document.
        """
        n_batch, n_tokens = positions_BT.shape
        n_blocks, m = n_tokens // self.ratio, self.ratio
        if segments_BT is None:
            place_BI = jnp.broadcast_to(m * jnp.arange(n_blocks) + m - 1, (n_batch, n_blocks))
        else:
            place_BT = jnp.where(positions_BT % m == m - 1, jnp.arange(n_tokens), NOWHERE)
            place_BI = jnp.sort(place_BT, axis=1)[:, :n_blocks]
        last_BI = jnp.minimum(place_BI, n_tokens - 1)
        row_BIJ = last_BI[..., None] + 1 - self.span + jnp.arange(self.span)
        is_there_BIJ, row_BIJ = row_BIJ >= 0, jnp.maximum(row_BIJ, 0)
        position_BI = jnp.take_along_axis(positions_BT, last_BI, axis=1) + 1 - m
        if segments_BT is None:
            return Blocks(row_BIJ, is_there_BIJ, position_BI), place_BI, None
        segments_BI = jnp.take_along_axis(segments_BT, last_BI, axis=1)
        own_BIJ = jnp.take_along_axis(segments_BT, row_BIJ.reshape(n_batch, -1), axis=1).reshape(row_BIJ.shape)
        return Blocks(row_BIJ, is_there_BIJ & (own_BIJ == segments_BI[..., None]), position_BI), place_BI, segments_BI
