"""SwiGLU feed-forward: y = (silu(x W_gate) * (x W_up)) W_down, no biases. Paper: Shazeer 2020; all DeepSeek models.

V4 bounds what is multiplied (`clamped`). Paper: V4, arXiv 2606.19348, section 4.2.
"""

import jax
from flax import nnx
from jax.nn.initializers import normal

from deepseek_jax.layers.base import param
from deepseek_jax.layers.block import Statistics
from deepseek_jax.layers.grouped import is_one_expert, swiglu_in_codes
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.precision.matmul import PLAIN, Matmul, clamped


class SwiGLU(nnx.Module):
    """A dense feed-forward of hidden width F.

    `matmul` multiplies activations with its weights; `limit` is that of `clamped`.
    """

    def __init__(
        self, d_model: int, width: int, std: float, matmul: Matmul = PLAIN, *, limit: float = 0.0, rngs: nnx.Rngs
    ):
        self.gate_DF = param(rngs, (d_model, width), ("embed", "mlp"), normal(std), role="gate")
        self.up_DF = param(rngs, (d_model, width), ("embed", "mlp"), normal(std), role="up")
        self.down_FD = param(rngs, (width, d_model), ("mlp", "embed"), normal(std), role="down")
        self.matmul, self.limit = matmul, limit

    @jax.named_scope("feed_forward")
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns y_BTD."""
        weights = gate_DF, up_DF, down_FD = self.gate_DF[...], self.up_DF[...], self.down_FD[...]
        if is_one_expert(weights, self.matmul):
            x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
            return swiglu_in_codes(x_MD, weights, self.matmul, self.limit).reshape(x_BTD.shape)
        einsum, x = self.matmul.einsum, self.matmul.operand(x_BTD)
        gate_BTF = einsum("BTD,DF->BTF", x, gate_DF)
        up_BTF = einsum("BTD,DF->BTF", x, up_DF)
        hidden_BTF = self.matmul.swiglu(*clamped(gate_BTF, up_BTF, self.limit))
        return einsum("BTF,FD->BTD", hidden_BTF, down_FD)

    # As a block's feed-forward (`layers.block.Block`): nothing is routed, and nothing reported.

    def dispatch(self, x_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        """Returns x_BTD."""
        return x_BTD

    def compute(self, x_BTD: jax.Array) -> jax.Array:
        """Returns y_BTD."""
        return self(x_BTD)

    def combine(self, y_BTD: jax.Array) -> tuple[jax.Array, Statistics]:
        """Returns (y_BTD, empty statistics)."""
        return y_BTD, Statistics(None, {})
