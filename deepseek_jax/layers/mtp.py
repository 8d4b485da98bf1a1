"""Multi-token prediction: module k predicts token i+k+1 at position i, keeping the causal chain.

    h'^k_i = M_k [norm(Emb(t_i+k)); norm(h^k-1_i)]    (eq. 21)
    h^k    = norm(TRM_k(h'^k))                         (eq. 22; the norm is part of the report's OutHead)
    p^k_i+k+1 = OutHead(h^k_i)                         (eq. 23)

The report prints the hidden state first; the released weights take the embedding first, as here.
h^0 is the main model's output after its final norm, and h^k after the module's own, ready for the head. The report
leaves open whether a depth k >= 2 reads h^k-1 before or after that norm; one depth is released.
Embedding and head are the main model's, passed in by the caller.
Paper: V3 section 2.2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from deepseek_jax.layers.base import as_layer, param
from deepseek_jax.layers.block import Attend, Build, Statistics
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.context import WHOLE, Context
from deepseek_jax.precision.matmul import PLAIN, Matmul


class MTP(nnx.Module):
    """One depth of multi-token prediction around a Transformer block.

    | ours | report | released name |
    | --- | --- | --- |
    | embedding_norm, hidden_norm | RMSNorm | enorm, hnorm |
    | join_YD | M_k | eh_proj |
    | block | TRM_k | the other names of the layer |
    | final_norm | in OutHead | shared_head.norm |

    `block` makes TRM_k from rngs, a `Block`; `eps` is that of the norms.
    """

    def __init__(
        self,
        block: Callable[[nnx.Rngs], nnx.Module],
        d_model: int,
        eps: float,
        std: float,
        matmul: Matmul = PLAIN,
        *,
        rngs: nnx.Rngs,
    ):
        self.embedding_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.hidden_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.join_YD = param(rngs, (2 * d_model, d_model), (None, "embed"), normal(std), role="join")
        self.block = block(rngs)
        self.final_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.matmul = matmul

    def __call__(self, h_BTD: jax.Array, embedded_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Statistics]:
        """Runs one depth: from h^{k-1} to h^k.

        `embedded_BTD` are the embeddings of `tokens`, which are k places ahead: Emb(t_{i+k}). Returns (h^k_BTD, ready
        for the shared head; what the block reports).
        """
        x_BTD, (_, statistics) = self.block(self._joined(h_BTD, embedded_BTD), tokens)  # eq. 22
        return self.final_norm(x_BTD), statistics  # eq. 23, but for the head

    def generating(
        self,
        h_BTD: jax.Array,
        embedded_BTD: jax.Array,
        tokens: Tokens,
        attend: Attend,
        cached: Any = None,
        place_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The same with what its attention kept of earlier tokens: (h^k_BTD, what it keeps now).

        With `place_B`, h^k of the token at that place of each sequence alone (T = 1); the attention keeps all.
        """
        block: Any = as_layer(self.block, self.matmul)
        x_BTD, (kept, _) = block(self._joined(h_BTD, embedded_BTD), tokens, attend, cached, place_B)
        return self.final_norm(x_BTD), kept

    def _joined(self, h_BTD: jax.Array, embedded_BTD: jax.Array) -> jax.Array:
        joined_BTY = jnp.concatenate([self.embedding_norm(embedded_BTD), self.hidden_norm(h_BTD)], axis=-1)
        return self.matmul.einsum("BTY,YD->BTD", joined_BTY, self.join_YD[...])  # eq. 21


class StreamMTP(nnx.Module):
    """One depth of multi-token prediction over the streams of hyper-connections (V4).

        X'_j = W_e norm(Emb(t_i+1)) + W_h norm(X_j);   X'' = TRM(X');   h = norm(one stream of X'')

    X are the main model's streams after its last block, before they become one.

    | ours | released name |
    | --- | --- |
    | embedding_norm, hidden_norm | enorm, hnorm |
    | embedding_YD, hidden_YD | e_proj, h_proj |
    | block | the other names of the layer |
    | streams_head, final_norm | hc_head_fn, hc_head_base, hc_head_scale; norm |

    `block` makes TRM from rngs, `streams_head` what makes one stream of several. Source: V4's released code, MTPBlock.
    """

    def __init__(
        self,
        block: Build,
        streams_head: Build,
        d_model: int,
        eps: float,
        std: float,
        matmul: Matmul = PLAIN,
        *,
        rngs: nnx.Rngs,
    ):
        self.embedding_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.hidden_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.embedding_YD = param(rngs, (d_model, d_model), (None, "embed"), normal(std), role="join")
        self.hidden_YD = param(rngs, (d_model, d_model), (None, "embed"), normal(std), role="join")
        self.block = block(rngs)
        self.streams_head: Any = streams_head(rngs)
        self.final_norm = RMSNorm(d_model, eps, axis="embed", rngs=rngs)
        self.matmul = matmul

    def __call__(
        self, x_BTOD: jax.Array, embedded_BTD: jax.Array, tokens: Tokens
    ) -> tuple[tuple[jax.Array, jax.Array], Statistics]:
        """Runs one depth; as `MTP`, from and to streams.

        Returns ((x_BTOD, for the next depth; h_BTD, ready for the shared head), what the block reports).
        """
        x_BTOD, (_, statistics) = self.block(self._joined(x_BTOD, embedded_BTD), tokens)
        return (x_BTOD, self.final_norm(self.streams_head(x_BTOD))), statistics

    def generating(
        self,
        x_BTOD: jax.Array,
        embedded_BTD: jax.Array,
        tokens: Tokens,
        attend: Attend,
        cached: Any = None,
        place_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The same with what its attention kept of earlier tokens: (h_BTD, what it keeps now); `place_B` as there."""
        block: Any = as_layer(self.block, self.matmul)
        x_BTOD, (kept, _) = block(self._joined(x_BTOD, embedded_BTD), tokens, attend, cached, place_B)
        return self.final_norm(self.streams_head(x_BTOD)), kept

    def _joined(self, x_BTOD: jax.Array, embedded_BTD: jax.Array) -> jax.Array:
        embedded_BTY, hidden_BTOY = self.embedding_norm(embedded_BTD), self.hidden_norm(x_BTOD)
        embedded_BTD = self.matmul.einsum("BTY,YD->BTD", embedded_BTY, self.embedding_YD[...])
        return self.matmul.einsum("BTOY,YD->BTOD", hidden_BTOY, self.hidden_YD[...]) + embedded_BTD[:, :, None]


def ahead(targets_BT: jax.Array, n: int, context: Context = WHOLE) -> list[jax.Array]:
    """The targets, and those that lie 1, …, n - 1 places ahead of them; -1 where there is none in the document."""
    found = [targets_BT]
    while len(found) < n:
        found.append(jnp.where(found[-1] < 0, -1, shift_left(found[-1], fill=-1, context=context)))
    return found


def shift_left(tokens_BT: jax.Array, fill: int, context: Context = WHOLE) -> jax.Array:
    """The next token at each position, `fill` at the last one; `context` may hold it on another device."""
    next_BS = jnp.pad(context.whole(tokens_BT)[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
    return context.own(next_BS)
