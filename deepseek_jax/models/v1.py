"""DeepSeek LLM, and what shares its dense blocks: Coder, Math, and the students distilled from R1.

    x = Emb(t)
    each layer:  x <- x + GQA(norm x);  x <- x + SwiGLU(norm x)
    h = norm x;  logits = h W^O

| models | differ by |
| --- | --- |
| DeepSeek LLM 7B, 67B; Math 7B | 67B: 8 key-value heads |
| DeepSeek-Coder 1.3B, 6.7B, 33B | angles of rotary positions divided by 4 |
| R1-Distill-Qwen | biases of queries, keys and values |
| R1-Distill-Llama | Llama 3.1's context extension |
| R1-0528-Qwen3 | norms of queries and keys; YaRN |
| DeepSeek-Prover-V2 7B | YaRN |

Papers: DeepSeek LLM, arXiv 2401.02954, section 2.2; DeepSeek-Coder, arXiv 2401.14196; DeepSeekMath, arXiv 2402.03300;
DeepSeek-R1, arXiv 2501.12948, section 2.4.
"""

from dataclasses import dataclass

from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.decoder import Decoder, Stack
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.models import checks


@dataclass(frozen=True)
class Config:
    """Sizes of a dense model (DeepSeek LLM 67B's in brackets)."""

    vocab_size: int  # V (102,400)
    d_model: int  # D, width of the residual stream (8192)
    n_layers: int  # blocks (95)
    dense_width: int  # hidden width of the feed-forwards (22,016)
    attention: GQAConfig  # grouped-query attention
    norm_eps: float  # of every RMSNorm (1e-6)
    init_std: float  # standard deviation of the initial weights (0.006)

    @classmethod
    def from_config(cls, m: ConfigDict) -> "Config":
        """Reads the `model` part of a run's config. Raises UserError for sizes that make no model."""
        checks.check_keys(m, KEYS)
        checks.check_heads(m)
        c = checks.take(cls, m)
        extensions = {f"rope_factor={m.rope_factor}": m.rope_factor != 1.0}
        extensions |= {"rope_llama3": c.attention.rope_llama3, "yarn": c.attention.yarn}
        given = [name for name, is_given in extensions.items() if is_given]
        if len(given) > 1:
            raise UserError(
                f"config.model.{' beside '.join(given)}: a model has one context extension. Set one of them."
            )
        return c


KEYS = checks.keys(Config)


class Model(Decoder):
    """The network."""

    def __init__(self, c: Config, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        def attention(rngs: nnx.Rngs) -> GQA:
            return GQA(c.attention, c.d_model, run, rngs=rngs)

        def mlp(rngs: nnx.Rngs) -> SwiGLU:
            return SwiGLU(c.d_model, c.dense_width, c.init_std, run.matmul, rngs=rngs)

        def block(rngs: nnx.Rngs) -> Block:
            return Block(attention, mlp, "mlp", c.d_model, c.norm_eps, rngs=rngs)

        stacks = (Stack("blocks", (block,), c.n_layers),)
        super().__init__(c.vocab_size, c.d_model, c.norm_eps, c.init_std, run, stacks, rngs=rngs)
        self.config = c


def flops_per_pair(c: Config) -> int:
    """Operations of one token's queries with the keys and values of another, in one layer: 2 H (Q + U), U = Q."""
    return 4 * c.attention.n_heads * c.attention.head_width
