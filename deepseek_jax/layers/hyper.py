"""Manifold-constrained hyper-connections (mHC): a residual connection of several streams, mixed by learnt matrices.

Of a token's O streams X_j (V4: 4; at first all are its embedding), before a branch F:

    m = W flat(X) / sqrt(mean(flat(X)^2) + eps)
    pre_j  = sigmoid(s_0 m_j + b_j) + eps                      what the branch reads of each stream
    post_k = 2 sigmoid(s_1 m_(O+k) + b_(O+k))                  what each stream gets of the branch
    C = Sinkhorn(s_2 m_(2O...) + b_(2O...))                    O x O, rows and columns sum to 1
    u = F(norm sum_j pre_j X_j);   X'_k = post_k u + sum_j C_jk X_j

C lies on the manifold of doubly stochastic matrices, so mixing neither amplifies the streams nor forgets them, over any
number of layers. After the last block they become one by weights made like `pre` (`HyperHead`).
Paper: mHC, arXiv 2512.24880; DeepSeek-V4, arXiv 2606.19348, section 2.2; the released code has the eps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import constant, normal, zeros

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, param
from pallas_kernels.sinkhorn import doubly_stochastic

FIRST_SCALE = 0.01  # of s: small, so that at first all tokens are mixed alike; the reports give no number


@dataclass(frozen=True)
class HyperConfig:
    """Sizes of hyper-connections (V4's in brackets)."""

    n_streams: int  # O (4)
    sinkhorn_steps: int  # times that rows and columns are normalised (20)
    hyper_eps: float  # added to what is a weight or divides (1e-6)
    norm_eps: float  # of the mean square of all streams (1e-6)
    init_std: float = 0.006  # standard deviation of the initial W


class Mixing(NamedTuple):
    """What becomes of the streams after a branch; float32, with the axes of tokens last."""

    post_OBT: jax.Array  # what each stream gets of the branch
    comb_OJBT: jax.Array  # how much of the first stream the second one takes


class HyperConnection(nnx.Module):
    """The residual connection of a branch (`layers.block.Add` has the interface); a stream has axes x_BTOD.

    Of `run` its `kernels.sinkhorn` is used.

    | ours | report | released name |
    | --- | --- | --- |
    | mix_ODY | W, columns pre, post, comb row by row | hc_attn_fn, hc_ffn_fn |
    | bias_Y | b | hc_attn_base, hc_ffn_base |
    | scale | s | hc_attn_scale, hc_ffn_scale |
    """

    def __init__(self, c: HyperConfig, d_model: int, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        n = c.n_streams
        self.mix_ODY = param(rngs, (n, d_model, (2 + n) * n), (None, "embed", None), normal(c.init_std), role="mixing")
        self.bias_Y = param(rngs, ((2 + n) * n,), (None,), zeros, role="bias")
        self.scale = param(rngs, (3,), (None,), constant(FIRST_SCALE), role="gain")
        self.c, self.kernels = c, run.kernels

    @jax.named_scope("streams")
    def read(self, x_BTOD: jax.Array) -> tuple[jax.Array, Mixing]:
        """Returns (the branch's input u_BTD, in the dtype of the streams; what becomes of these)."""
        n, eps = self.c.n_streams, self.c.hyper_eps
        m_YBT = _mixed(x_BTOD, self.mix_ODY[...], self.c.norm_eps)
        scale_Y = jnp.repeat(self.scale[...], jnp.array([n, n, n * n]), total_repeat_length=(2 + n) * n)
        m_YBT = m_YBT * scale_Y[:, None, None] + self.bias_Y[...][:, None, None]
        pre_OBT, post_OBT = jax.nn.sigmoid(m_YBT[:n]) + eps, 2 * jax.nn.sigmoid(m_YBT[n : 2 * n])
        logits_OJBT = m_YBT[2 * n :].reshape(n, n, *m_YBT.shape[1:])
        comb_OJBT = self.kernels["sinkhorn"](logits_OJBT, self.c.sinkhorn_steps, eps)
        return _sum(pre_OBT, x_BTOD), Mixing(post_OBT, comb_OJBT)

    @jax.named_scope("streams")
    def write(self, x_BTOD: jax.Array, u_BTD: jax.Array, carry: Mixing) -> jax.Array:
        """Returns the streams after the branch has given `u_BTD`, in their dtype; summed in float32."""
        u_BTD, parts = u_BTD.astype(jnp.float32), _parts(x_BTOD)
        streams = [
            post_BT[..., None] * u_BTD + _wide_sum(comb_OBT, parts)
            for post_BT, comb_OBT in zip(carry.post_OBT, jnp.swapaxes(carry.comb_OJBT, 0, 1), strict=True)
        ]
        return jnp.stack(streams, axis=2).astype(x_BTOD.dtype)


class HyperHead(nnx.Module):
    """One stream of several, after the last block: h = sum_j pre_j X_j.

    `mix_ODJ`, `bias_O` and `scale` are the released hc_head_fn, hc_head_base and hc_head_scale.
    """

    def __init__(self, c: HyperConfig, d_model: int, *, rngs: nnx.Rngs):
        n = c.n_streams
        self.mix_ODJ = param(rngs, (n, d_model, n), (None, "embed", None), normal(c.init_std), role="mixing")
        self.bias_O = param(rngs, (n,), (None,), zeros, role="bias")
        self.scale = param(rngs, (1,), (None,), constant(FIRST_SCALE), role="gain")
        self.c = c

    @jax.named_scope("streams")
    def __call__(self, x_BTOD: jax.Array) -> jax.Array:
        """Returns h_BTD in the dtype of the streams."""
        m_OBT = _mixed(x_BTOD, self.mix_ODJ[...], self.c.norm_eps)
        pre_OBT = jax.nn.sigmoid(m_OBT * self.scale[...] + self.bias_O[...][:, None, None]) + self.c.hyper_eps
        return _sum(pre_OBT, x_BTOD)


def widened(x_BTD: jax.Array, n_streams: int) -> jax.Array:
    """Returns x_BTOD: as many streams, all alike."""
    return jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], n_streams, x_BTD.shape[-1]))


def sinkhorn(logits_OJBT: jax.Array, n_steps: int, eps: float) -> jax.Array:
    """Returns comb_OJBT, positive matrices O x J whose rows and columns sum to about 1 (Sinkhorn and Knopp 1967).

    The first of `n_steps` times the rows are normalised by a softmax; the columns come last, and so are exact to eps.
    """
    return doubly_stochastic(logits_OJBT, n_steps, eps, implementation="reference")


def sinkhorn_by_triton(logits_OJBT: jax.Array, n_steps: int, eps: float) -> jax.Array:
    """As `sinkhorn`, in one kernel. Raises UserError on another device than an NVIDIA GPU."""
    try:
        return doubly_stochastic(logits_OJBT, n_steps, eps, implementation="triton")
    except ValueError as error:
        raise UserError(f"kernels.sinkhorn='triton': {error} In a run, config.kernels.sinkhorn=xla.") from error


def _mixed(x_BTOD: jax.Array, mix_ODY: jax.Array, eps: float) -> jax.Array:
    """m_YBT of normed streams; float32, the tokens' axes last: the many small operations that follow run along them."""
    x_BTOD = x_BTOD.astype(jnp.float32)
    factor_BT = jax.lax.rsqrt(jnp.mean(jnp.square(x_BTOD), axis=(-2, -1)) + eps)
    m_YBT = jnp.einsum("BTOD,ODY->YBT", x_BTOD, mix_ODY, precision=jax.lax.Precision.HIGHEST)
    return m_YBT * factor_BT


def _parts(x_BTOD: jax.Array) -> list[jax.Array]:
    """Each stream, float32; by `split`, whose gradient is one concatenation, not a sum of padded arrays."""
    return [x[:, :, 0].astype(jnp.float32) for x in jax.lax.split(x_BTOD, (1,) * x_BTOD.shape[2], axis=2)]


def _wide_sum(weight_OBT: jax.Array, parts: Sequence[jax.Array]) -> jax.Array:
    """sum_j w_j X_j, float32; term by term, for as a product of matrices 4 wide it would be slow."""
    terms = [w_BT[..., None] * x_BTD for w_BT, x_BTD in zip(weight_OBT, parts, strict=True)]
    return sum(terms[1:], terms[0])


def _sum(weight_OBT: jax.Array, x_BTOD: jax.Array) -> jax.Array:
    """sum_j w_j X_j, in the dtype of the streams."""
    return _wide_sum(weight_OBT, _parts(x_BTOD)).astype(x_BTOD.dtype)
