"""Grouped-query attention: J query heads share one key-value head, H = Z J; multi-head attention is Z = H.

    q_t,i = RoPE(norm(W^Q_i x_t + b^Q_i)),   k_t,z = RoPE(norm(W^K_z x_t + b^K_z)),   v_t,z = W^V_z x_t + b^V_z
    o_t,i = sum_j softmax_j(q_t,i . k_j,z / sqrt(Q)) v_j,z     with z = i // J
    u_t = W^O o_t

Caches 2 Z Q numbers per token and layer instead of 2 H Q.  Rotary pairs are Llama's halves (i, i + Q/2).
Only the Qwen2 students of DeepSeek-R1 have the biases b, only the Qwen3 student has the norms, one gain for all heads.
Paper: Ainslie et al. 2023, arXiv 2305.13245; DeepSeek LLM, arXiv 2401.02954, section 2.2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from flax import nnx
from jax.nn.initializers import normal, zeros

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, param
from deepseek_jax.layers.block import Attention, Losses
from deepseek_jax.layers.cache import Full
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.rope import Llama3, Yarn, frequencies, llama3, rotary_scale, rotate_halves
from deepseek_jax.layers.tokens import Tokens


@dataclass(frozen=True)
class GQAConfig:
    """Sizes of grouped-query attention (DeepSeek-LLM 67B's in brackets)."""

    n_heads: int  # H, query heads (64)
    n_kv_heads: int  # Z, key-value heads (8); H for multi-head attention
    head_width: int  # Q, width of a head (128)
    attention_bias: bool = False  # whether queries, keys and values have one (no)
    qk_norm: bool = False  # whether each head's queries and keys are normed before they are rotated (no)
    norm_eps: float = 1e-6  # of those norms (1e-6)
    rope_base: float = 10_000.0  # base of the rotary frequencies (10,000)
    rope_factor: float = 1.0  # every angle is divided by it (1; DeepSeek-Coder: 4)
    rope_llama3: Llama3 | None = None  # Llama 3.1's context extension, or None
    yarn: Yarn | None = None  # YaRN's context extension, or None
    init_std: float = 0.006  # standard deviation of the initial weights (0.006)


class KeyValues(NamedTuple):
    """All that is cached of a token: rotated keys and values of the key-value heads."""

    k_BSZQ: jax.Array
    v_BSZU: jax.Array


class GQA(Attention):
    """Grouped-query attention; of `run` its `matmul`, `kernels` and `context` are used.

    Raises UserError for a cache in FP8.
    """

    def __init__(self, c: GQAConfig, d_model: int, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        if run.cache == "fp8":
            raise UserError("cache='fp8' for keys and values of heads: expected latent attention. Leave cache='full'.")
        init, width = normal(c.init_std), c.head_width
        self.q_DHQ = param(rngs, (d_model, c.n_heads, width), ("embed", "heads", None), init, role="attention_in")
        self.k_DZQ = param(rngs, (d_model, c.n_kv_heads, width), ("embed", "heads", None), init, role="attention_in")
        self.v_DZU = param(rngs, (d_model, c.n_kv_heads, width), ("embed", "heads", None), init, role="attention_in")
        self.out_HUD = param(rngs, (c.n_heads, width, d_model), ("heads", None, "embed"), init, role="attention_out")
        if c.attention_bias:
            self.q_bias_HQ = param(rngs, (c.n_heads, width), ("heads", None), zeros, role="bias")
            self.k_bias_ZQ = param(rngs, (c.n_kv_heads, width), ("heads", None), zeros, role="bias")
            self.v_bias_ZU = param(rngs, (c.n_kv_heads, width), ("heads", None), zeros, role="bias")
        if c.qk_norm:
            self.q_head_norm = RMSNorm(width, c.norm_eps, rngs=rngs)
            self.k_head_norm = RMSNorm(width, c.norm_eps, rngs=rngs)
        self.config, self.cache = c, Full()
        self.matmul, self.kernels, self.context = run.matmul, run.kernels, run.context

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The heads' rotated queries q_BTHQ."""
        q_BTHQ = self.matmul.einsum("BTD,DHQ->BTHQ", x_BTD, self.q_DHQ[...])
        if self.config.attention_bias:
            q_BTHQ = q_BTHQ + self.q_bias_HQ[...].astype(x_BTD.dtype)
        if self.config.qk_norm:
            q_BTHQ = self.q_head_norm(q_BTHQ)
        return self._rotate(q_BTHQ, positions_BT)

    def entries(self, x_BTD: jax.Array, tokens: Tokens) -> KeyValues:
        """What the cache keeps of these tokens."""
        k_BTZQ = self.matmul.einsum("BTD,DZQ->BTZQ", x_BTD, self.k_DZQ[...])
        v_BTZU = self.matmul.einsum("BTD,DZU->BTZU", x_BTD, self.v_DZU[...])
        if self.config.attention_bias:
            k_BTZQ = k_BTZQ + self.k_bias_ZQ[...].astype(x_BTD.dtype)
            v_BTZU = v_BTZU + self.v_bias_ZU[...].astype(x_BTD.dtype)
        if self.config.qk_norm:
            k_BTZQ = self.k_head_norm(k_BTZQ)
        return KeyValues(self._rotate(k_BTZQ, tokens.positions_BT), v_BTZU)

    def over_itself(
        self, x_BTD: jax.Array, tokens: Tokens, entries: KeyValues, q_offset: int | jax.Array = 0
    ) -> tuple[jax.Array, Losses]:
        """(u_BTD of tokens that attend causally to themselves, with the keys and values of `entries`; no losses).

        `entries` may hold more tokens than these, from position 0 on; `q_offset` of them come before these.
        """
        q_BTHQ = self.queries(x_BTD, tokens.positions_BT)
        o_BTHU = self.attended(q_BTHQ, entries, (), tokens, q_offset)
        return self.matmul.einsum("BTHU,HUD->BTD", o_BTHU, self.out_HUD[...]), {}

    def expand(self, weights: tuple, entries: KeyValues) -> tuple[jax.Array, jax.Array]:
        """Keys and values of entries, which are these."""
        return entries.k_BSZQ, entries.v_BSZU

    def over_cache(self, x_BTD: jax.Array, tokens: Tokens, cache: KeyValues, seen_BTS: jax.Array) -> jax.Array:
        """u_BTD of tokens that attend to the cache's slots in `seen_BTS`, which already hold their own."""
        q_BTHQ = self.queries(x_BTD, tokens.positions_BT)
        o_BTHU = self.kernels["grouped_decode"](q_BTHQ, *cache, seen_BTS, scale=self.scale)
        return self.matmul.einsum("BTHU,HUD->BTD", o_BTHU, self.out_HUD[...])

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.config.head_width**-0.5

    @property
    def entry_width(self) -> int:
        """2 Z Q."""
        return 2 * self.config.n_kv_heads * self.config.head_width

    @property
    def expanded_width(self) -> int:
        """2 Z Q: keys and values are kept as they are."""
        return self.entry_width

    def _rotate(self, x: jax.Array, positions_BT: jax.Array) -> jax.Array:
        c = self.config
        theta = frequencies(c.head_width, c.rope_base, c.yarn) / c.rope_factor
        theta = llama3(theta, c.rope_llama3) if c.rope_llama3 else theta
        return rotate_halves(x, positions_BT, theta, rotary_scale(c.yarn))
