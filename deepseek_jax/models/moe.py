"""DeepSeekMoE 16B: DeepSeek LLM's attention, with a feed-forward of many small experts.

    x = Emb(t)
    dense layer:  x <- x + MHA(norm x);  x <- x + SwiGLU(norm x)          (the first of 28)
    MoE layers:   x <- x + MHA(norm x);  x <- x + Experts(norm x)         (the other 27)
    h = norm x;   logits = h W^O

Two shared experts, 6 of 64 routed ones; softmax scores, weights not renormalised, balance by a loss.
Paper: DeepSeekMoE, arXiv 2401.06066, sections 3 and 5.
"""

from dataclasses import dataclass

from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, Given
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.decoder import Decoder, Stack
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.router import sequence_balance, softmax_topk
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.models import checks


@dataclass(frozen=True)
class Config:
    """Sizes of a DeepSeekMoE (the 16B model's in brackets)."""

    vocab_size: int  # V (102,400)
    d_model: int  # D, width of the residual stream (2048)
    n_layers: int  # dense and MoE (28)
    n_dense_layers: int  # leading layers with a dense feed-forward (1); all of them if there are not more
    dense_width: int  # hidden width of those (10,944)
    attention: GQAConfig  # multi-head attention (16 heads of 128)
    experts: ExpertsConfig  # the MoE layers' feed-forward (64 routed of width 1408, 6 a token, 2 shared)
    norm_eps: float  # of every RMSNorm (1e-6)
    init_std: float  # standard deviation of the initial weights (0.006)

    @classmethod
    def from_config(cls, m: ConfigDict) -> "Config":
        """Reads the `model` part of a run's config. Raises UserError for sizes that make no model."""
        checks.check_keys(m, KEYS)
        checks.check_heads(m)
        if m.top_k > m.n_experts:
            raise UserError(f"config.model.top_k={m.top_k} of n_experts={m.n_experts}: choose a smaller top_k.")
        return checks.take(cls, m)


# Keys of `config.model`, each a field of `Config` or of one of its parts.
KEYS: tuple[str, ...] = ("vocab_size", "d_model", "n_layers", "n_dense_layers", "dense_width")
KEYS += ("n_heads", "n_kv_heads", "head_width", "rope_base", "norm_eps", "init_std")
KEYS += ("n_experts", "n_shared_experts", "expert_width", "top_k", "route_scale")


class Model(Decoder):
    """The network."""

    def __init__(self, c: Config, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        e = c.experts
        route = Given(softmax_topk, top_k=e.top_k, n_groups=1, top_groups=1, scale=e.route_scale)

        def attention(rngs: nnx.Rngs) -> GQA:
            return GQA(c.attention, c.d_model, run, rngs=rngs)

        def experts(rngs: nnx.Rngs) -> Experts:
            return Experts(e, c.d_model, route, sequence_balance, run, biased=False, rngs=rngs)

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
    """Operations of one token's queries with the keys and values of another, in one layer: 2 H (Q + U), U = Q."""
    return 4 * c.attention.n_heads * c.attention.head_width
