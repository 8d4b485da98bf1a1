"""DeepSeek-V3.2 and V3.2-Exp: V3 whose attention reads the positions that a lightning indexer chooses.

    x = Emb(t)
    dense layers:  x <- x + SparseMLA(norm x);  x <- x + SwiGLU(norm x)          (the first 3 of 61)
    MoE layers:    x <- x + SparseMLA(norm x);  x <- x + Experts(norm x)         (the other 58)
    h = norm x;    logits = h W^O
    MTP depth k:   as V3's, its attention sparse too

It was trained from V3.1 in two stages, both with the indexer's KL divergence to the attention as its only loss: a dense
warm-up of the indexer alone, all else frozen; then all weights, with sparse attention (configs v32_warmup, v32_sparse).
Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2; the rest: `models.v3`.
"""

from dataclasses import dataclass

from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution
from deepseek_jax.layers.indexer import IndexerConfig
from deepseek_jax.layers.sparse_mla import SparseMLA
from deepseek_jax.models import checks, v3


@dataclass(frozen=True)
class Config(v3.Config):
    """Sizes of a V3.2: those of V3, and the indexer's."""

    indexer: IndexerConfig  # chooses the positions that a token attends to
    index_dense: bool  # whether tokens attend to all positions while the indexer learns (in the warm-up alone)

    @classmethod
    def from_config(cls, m: ConfigDict) -> "Config":
        """Reads the `model` part of a run's config. Raises UserError for sizes that make no model."""
        checks.check_keys(m, KEYS)
        checks.check_groups(m)
        checks.check_even(m, "rope_width")
        if not m.q_rank:
            raise UserError("config.model.q_rank=0: an indexer reads the latent of the queries. Give its width.")
        if m.index_width < m.rope_width:
            raise UserError(
                f"config.model.index_width={m.index_width} is less than rope_width={m.rope_width}, the numbers of "
                "the indexer's heads that are rotated. Choose as many or more."
            )
        return checks.take(cls, m)


KEYS = checks.keys(Config)


class Model(v3.Model):
    """The network."""

    def __init__(self, c: Config, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        def attention(rngs: nnx.Rngs) -> SparseMLA:
            share = 1 / (c.n_layers + c.mtp_depth)
            return SparseMLA(c.mla, c.indexer, c.d_model, run, is_dense=c.index_dense, share=share, rngs=rngs)

        super().__init__(c, run, attention, rngs=rngs)


flops_per_pair = v3.flops_per_pair
