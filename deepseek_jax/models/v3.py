"""DeepSeek-V3, in the order of its report: MLA, DeepSeekMoE with loss-free balancing, multi-token prediction.

    x = Emb(t)
    dense layers:  x <- x + MLA(norm x);  x <- x + SwiGLU(norm x)          (the first 3 of 61)
    MoE layers:    x <- x + MLA(norm x);  x <- x + Experts(norm x)         (the other 58)
    h = norm x;    logits = h W^O
    MTP depth k:   h^k = TRM_k(M_k [norm Emb(t_+k); norm h^{k-1}])         (one depth in the release)

R1 and V3.1 are the same network with other weights; Moonlight and Kimi K2 with other sizes as well.
Paper: DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2; sizes: section 4.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, Given, remat
from deepseek_jax.layers.block import Attend, Block, Build
from deepseek_jax.layers.decoder import Decoder, Depth, Stack
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.mla import MLA, MLAConfig
from deepseek_jax.layers.mtp import MTP, ahead
from deepseek_jax.layers.router import sequence_balance, sigmoid_biased_topk
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import checks


@dataclass(frozen=True)
class Config:
    """Sizes of a V3 (the released model's in brackets)."""

    vocab_size: int  # V (129,280)
    d_model: int  # D, width of the residual stream (7168)
    n_layers: int  # of the main model, dense and MoE (61)
    n_dense_layers: int  # leading layers with a dense feed-forward (3); all of them if there are not more
    dense_width: int  # hidden width of those (18,432)
    mla: MLAConfig  # multi-head latent attention
    experts: ExpertsConfig  # the MoE layers' feed-forward
    mtp_depth: int  # multi-token-prediction modules (1)
    norm_eps: float  # of every RMSNorm but the latents' (1e-6)
    init_std: float  # standard deviation of the initial weights (0.006)

    @classmethod
    def from_config(cls, m: ConfigDict) -> "Config":
        """Reads the `model` part of a run's config. Raises UserError for sizes that make no model."""
        checks.check_keys(m, KEYS)
        checks.check_groups(m)
        checks.check_even(m, "rope_width")
        return checks.take(cls, m)


KEYS = checks.keys(Config)


class Model(Decoder):
    """The network; `attend_by` makes an attention in place of MLA."""

    def __init__(self, c: Config, run: Execution = SINGLE_DEVICE, attend_by: Build | None = None, *, rngs: nnx.Rngs):
        e = c.experts
        route = Given(
            sigmoid_biased_topk, top_k=e.top_k, n_groups=e.n_groups, top_groups=e.top_groups, scale=e.route_scale
        )

        def attention(rngs: nnx.Rngs) -> nnx.Module:
            return attend_by(rngs) if attend_by else MLA(c.mla, c.d_model, run, rngs=rngs)

        def experts(rngs: nnx.Rngs) -> Experts:
            return Experts(e, c.d_model, route, sequence_balance, run, biased=True, rngs=rngs)

        def mlp(rngs: nnx.Rngs) -> SwiGLU:
            return SwiGLU(c.d_model, c.dense_width, c.init_std, run.matmul, rngs=rngs)

        def dense_block(rngs: nnx.Rngs) -> Block:
            return Block(attention, mlp, "mlp", c.d_model, c.norm_eps, rngs=rngs)

        def moe_block(rngs: nnx.Rngs) -> Block:
            return Block(attention, experts, "experts", c.d_model, c.norm_eps, rngs=rngs)

        n_dense = min(c.n_dense_layers, c.n_layers)
        dense = Stack("dense_blocks", (dense_block,), n_dense)
        stacks = (dense, Stack("moe_blocks", (moe_block,), c.n_layers - n_dense))
        super().__init__(c.vocab_size, c.d_model, c.norm_eps, c.init_std, run, stacks, rngs=rngs)
        depths = (MTP(moe_block, c.d_model, c.norm_eps, c.init_std, run.matmul, rngs=rngs) for _ in range(c.mtp_depth))
        self.mtp = nnx.List(depths)
        self.config = c

    def mtp_depths(
        self, h_BTD: jax.Array, targets_BT: jax.Array, tokens: Tokens, x_KBTD: Sequence[jax.Array] | None = None
    ) -> list[Depth]:
        """Multi-token prediction from the main model's `h_BTD`, one entry per depth.

        `targets_BT` is the next token at each position, -1 where there is none. Each depth reads all of them; which
        are to be learnt is decided by the loss.
        """
        depths, ids = [], ahead(targets_BT, len(self.mtp) + 1, self.run.context)  # nothing past a document's end
        for k, module in enumerate(self.mtp):
            depth = remat(module, self.run.remat)
            tokens = tokens._replace(ids_BT=ids[k], real_BT=ids[k] >= 0)
            x_BTD = self.embed(tokens) if x_KBTD is None else x_KBTD[k]
            h_BTD, statistics = depth(h_BTD, x_BTD, tokens)
            depths.append(Depth(h_BTD, ids[k + 1], statistics))
        return depths

    def ahead(
        self,
        h_BTD: jax.Array,
        tokens: Tokens,
        attend: Attend,
        cached: Any = None,
        place_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The first depth of multi-token prediction in generation, with a cache of its own.

        `tokens` are those after the ones of `h_BTD`, at the positions of these. Returns (h^1_BTD, ready for the head:
        of the tokens after `tokens`, or with `place_B` of the one at that place of each sequence alone; what its
        attention keeps).
        """
        return self.mtp[0].generating(h_BTD, self.embed(tokens), tokens, attend, cached, place_B)

    def ids_ahead(self, targets_BT: jax.Array) -> list[jax.Array]:
        """The ids that each depth of multi-token prediction reads."""
        return ahead(targets_BT, len(self.mtp), self.run.context)[: len(self.mtp)]


def flops_per_pair(c: Config) -> int:
    """Operations of one token's queries with the keys and values of another, in one layer: 2 H (Q + U)."""
    return 2 * c.mla.n_heads * (c.mla.query_width + c.mla.value_width)
