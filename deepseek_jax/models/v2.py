"""DeepSeek-V2, V2-Lite and Coder-V2: latent attention, and experts balanced by three losses.

    x = Emb(t)
    dense layer:  x <- x + MLA(norm x);  x <- x + SwiGLU(norm x)          (the first of 60)
    MoE layers:   x <- x + MLA(norm x);  x <- x + Experts(norm x)         (the other 59)
    h = norm x;   logits = h W^O

A token's experts lie on at most 3 of 8 devices; softmax scores, weights not renormalised but scaled by 16.
V2-Lite makes its queries without a latent and has no groups. The training run also dropped tokens over a device's
capacity (section 2.2.4); here, as in the released code, none is dropped.
Paper: DeepSeek-V2, arXiv 2405.04434, section 2; V2-Lite: appendix B; Coder-V2, arXiv 2406.11931.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, Given
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.decoder import Decoder, Stack
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.mla import MLA, MLAConfig
from deepseek_jax.layers.router import grouped_balance, softmax_topk
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.models import checks


@dataclass(frozen=True)
class Config:
    """Sizes of a V2 (the 236B model's in brackets)."""

    vocab_size: int  # V (102,400)
    d_model: int  # D, width of the residual stream (5120)
    n_layers: int  # dense and MoE (60)
    n_dense_layers: int  # leading layers with a dense feed-forward (1); all of them if there are not more
    dense_width: int  # hidden width of those (12,288)
    mla: MLAConfig  # multi-head latent attention
    experts: ExpertsConfig  # the MoE layers' feed-forward (160 routed of width 1536, 6 a token, 2 shared)
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
    """The network."""

    def __init__(self, c: Config, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        e = c.experts
        groups: dict[str, Any] = {"n_groups": e.n_groups, "top_groups": e.top_groups}
        route = Given(softmax_topk, top_k=e.top_k, scale=e.route_scale, **groups)
        balance = Given(grouped_balance, **groups)

        def attention(rngs: nnx.Rngs) -> MLA:
            return MLA(c.mla, c.d_model, run, rngs=rngs)

        def experts(rngs: nnx.Rngs) -> Experts:
            return Experts(e, c.d_model, route, balance, run, biased=False, rngs=rngs)

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
        self.config = c


def flops_per_pair(c: Config) -> int:
    """Operations of one token's queries with the keys and values of another, in one layer: 2 H (Q + U)."""
    return 2 * c.mla.n_heads * (c.mla.query_width + c.mla.value_width)
