"""Multi-head latent attention: keys and values of all heads are made from one small latent per token.

    c^KV_t = norm(W^DKV h_t)           the latent that is cached                        (eq. 1)
    k^C_t,i = W^UK c^KV_t              keys without position                            (eq. 2)
    k^R_t = RoPE(W^KR h_t)             one rotary key for all heads, cached as well     (eq. 3)
    k_t,i = [k^C_t,i; k^R_t]                                                            (eq. 4)
    v_t,i = W^UV c^KV_t                                                                 (eq. 5)
    c^Q_t = norm(W^DQ h_t)             query latent                                     (eq. 6)
    q^C_t,i = W^UQ c^Q_t,   q^R_t,i = RoPE(W^QR c^Q_t),   q_t,i = [q^C_t,i; q^R_t,i]    (eqs. 7-9)
    o_t,i = sum_j softmax_j(scale * q_t,i . k_j,i) v_j,i                                (eq. 10)
    u_t = W^O o_t                                                                       (eq. 11)

Two forms of the same function.  *Expanded* builds k and v of every head: fewest operations when many queries meet many
keys (training, prefill).  *Absorbed* moves W^UK into the query and W^UV behind the softmax, so that all heads read the
cached latent itself (decode): q~ = q^C W^UK,  score = q~ . c^KV + q^R . k^R,  o = (P c^KV) W^UV.

Replaces multi-head attention's cache of 2 H U numbers per token by C + P (V3: 576 instead of 32,768).
The latent norms are in the released code; the report does not print them. Paper: V3 section 2.1.1; V2 section 2.1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, param
from deepseek_jax.layers.block import Attention, Losses
from deepseek_jax.layers.cache import Full
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.rope import Yarn, frequencies, rotary_scale, rotate, softmax_scale
from deepseek_jax.layers.tokens import Tokens
from pallas_kernels.mla_decode.fp8_cache import BLOCK, decode, encode

LATENT_EPS = 1e-6  # of the latent norms; in the released code whatever the other norms have
IN, OUT = "attention_in", "attention_out"  # roles of the weights


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention (V3's in brackets)."""

    n_heads: int  # H, heads (128)
    q_rank: int  # R, width of the query latent (1536); 0 for queries straight from the stream (V2-Lite, Moonlight)
    kv_rank: int  # C, width of the cached key-value latent (512)
    nope_width: int  # N, part of a query or key head without position (128)
    rope_width: int  # P, rotary part (64)
    value_width: int  # U, width of a value head (128)
    rope_base: float = 10_000.0  # base of the rotary frequencies (10,000)
    yarn: Yarn | None = None  # context extension, or None (pre-training)
    init_std: float = 0.006  # standard deviation of the initial weights (0.006)

    @property
    def query_width(self) -> int:
        """Q = N + P."""
        return self.nope_width + self.rope_width


class Latents(NamedTuple):
    """All that is cached of a token: the key-value latent and the rotary key."""

    c_BSC: jax.Array
    k_rope_BSP: jax.Array


class Packed(NamedTuple):
    """A token's entry in FP8: its bytes."""

    entry_BSY: jax.Array


@dataclass(frozen=True)
class Fp8Latents(Full):
    """`Full` in FP8: latents in E4M3 with a scale per 128 numbers, rotary keys of 16 bits; read in `dtype`.

    V3's entry takes 656 bytes instead of 1,152 (`pallas_kernels.mla_decode`), the format published for V3.2's cache.
    """

    rope_width: int
    dtype: DTypeLike

    def packed(self, entries: Latents) -> Packed:
        """See `layers.cache.Layout`."""
        return Packed(encode(*entries))

    def unpacked(self, cached: Packed) -> Latents:
        """See `layers.cache.Layout`."""
        return Latents(*(part.astype(self.dtype) for part in decode(cached.entry_BSY, self.rope_width)))


class MLA(Attention):
    """Multi-head latent attention; of `run` its `matmul`, `kernels`, `context`, `cache` and `compute` are used.

    | ours | report | released name |
    | --- | --- | --- |
    | kv_down_DC, k_rope_DP | W^DKV, W^KR | kv_a_proj_with_mqa |
    | kv_norm | | kv_a_layernorm |
    | k_up_CHN, v_up_CHU | W^UK, W^UV | kv_b_proj |
    | q_down_DR | W^DQ | q_a_proj |
    | q_norm | | q_a_layernorm |
    | q_up_RHQ | W^UQ and W^QR | q_b_proj |
    | q_DHQ | in place of the three, without a query latent | q_proj |
    | out_HUD | W^O | o_proj |

    Raises UserError for a cache in FP8 of latents that are no multiple of 128 wide.
    """

    def __init__(self, c: MLAConfig, d_model: int, run: Execution = SINGLE_DEVICE, *, rngs: nnx.Rngs):
        if run.cache == "fp8" and c.kv_rank % BLOCK:
            raise UserError(
                f"cache='fp8' for latents of {c.kv_rank} numbers (config.model.kv_rank): expected a multiple of "
                f"{BLOCK}. Leave cache='full'."
            )
        init, heads = normal(c.init_std), c.n_heads
        if c.q_rank:
            self.q_down_DR = param(rngs, (d_model, c.q_rank), ("embed", "q_latent"), init, role=IN)
            self.q_norm = RMSNorm(c.q_rank, LATENT_EPS, rngs=rngs)
            self.q_up_RHQ = param(rngs, (c.q_rank, heads, c.query_width), ("q_latent", "heads", None), init, role=IN)
        else:
            self.q_DHQ = param(rngs, (d_model, heads, c.query_width), ("embed", "heads", None), init, role=IN)
        self.kv_down_DC = param(rngs, (d_model, c.kv_rank), ("embed", "kv_latent"), init, role=IN)
        self.kv_norm = RMSNorm(c.kv_rank, LATENT_EPS, rngs=rngs)
        self.k_rope_DP = param(rngs, (d_model, c.rope_width), ("embed", None), init, role=IN)
        self.k_up_CHN = param(rngs, (c.kv_rank, heads, c.nope_width), ("kv_latent", "heads", None), init, role=IN)
        self.v_up_CHU = param(rngs, (c.kv_rank, heads, c.value_width), ("kv_latent", "heads", None), init, role=IN)
        self.out_HUD = param(rngs, (heads, c.value_width, d_model), ("heads", None, "embed"), init, role=OUT)
        self.config, self.cache = c, Fp8Latents(c.rope_width, run.compute) if run.cache == "fp8" else Full()
        self.matmul, self.kernels, self.context = run.matmul, run.kernels, run.context

    def entries(self, x_BTD: jax.Array, tokens: Tokens) -> Latents:
        """What the cache keeps of these tokens."""
        c_BTC = self.kv_norm(self.matmul.einsum("BTD,DC->BTC", x_BTD, self.kv_down_DC[...]))  # eq. 1
        k_rope_BTP = self.matmul.einsum("BTD,DP->BTP", x_BTD, self.k_rope_DP[...])
        return Latents(c_BTC, self._rotate(k_rope_BTP, tokens.positions_BT))  # eq. 3

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The heads' queries: (q_nope_BTHN, rotated q_rope_BTHP)."""
        c = self.config
        if c.q_rank:
            q_latent_BTR = self.query_latent(x_BTD)
            q_BTHQ = self.matmul.einsum("BTR,RHQ->BTHQ", q_latent_BTR, self.q_up_RHQ[...])  # eq. 7
        else:
            q_BTHQ = self.matmul.einsum("BTD,DHQ->BTHQ", x_BTD, self.q_DHQ[...])
        return q_BTHQ[..., : c.nope_width], self._rotate(q_BTHQ[..., c.nope_width :], positions_BT)  # eq. 8

    def query_latent(self, x_BTD: jax.Array) -> jax.Array:
        """The normed latent c^Q of the queries, q_latent_BTR, where there is one."""
        return self.q_norm(self.matmul.einsum("BTD,DR->BTR", x_BTD, self.q_down_DR[...]))  # eq. 6

    def over_itself(
        self, x_BTD: jax.Array, tokens: Tokens, entries: Latents, q_offset: int | jax.Array = 0
    ) -> tuple[jax.Array, Losses]:
        """The expanded form: (u_BTD of tokens that attend causally to themselves; no auxiliary losses).

        `entries` may hold more tokens than these, from position 0 on; `q_offset` of them come before these.
        """
        q_BTHQ = jnp.concatenate(self.queries(x_BTD, tokens.positions_BT), axis=-1)  # eq. 9
        weights = self.k_up_CHN[...], self.v_up_CHU[...]
        o_BTHU = self.attended(q_BTHQ, entries, weights, tokens, q_offset)  # eq. 10
        return self.matmul.einsum("BTHU,HUD->BTD", o_BTHU, self.out_HUD[...]), {}  # eq. 11

    def expand(self, weights: tuple[jax.Array, jax.Array], entries: Latents) -> tuple[jax.Array, jax.Array]:
        """Keys and values (k_BSHQ, v_BSHU) of entries, from the weights k_up_CHN and v_up_CHU."""
        (k_up_CHN, v_up_CHU), (c_BSC, k_rope_BSP) = weights, entries
        c_BSC = self.matmul.operand(c_BSC)
        k_nope_BSHN = self.matmul.einsum("BSC,CHN->BSHN", c_BSC, k_up_CHN)  # eq. 2
        v_BSHU = self.matmul.einsum("BSC,CHU->BSHU", c_BSC, v_up_CHU)  # eq. 5
        k_rope_BSHP = jnp.broadcast_to(k_rope_BSP[:, :, None], (*k_nope_BSHN.shape[:-1], self.config.rope_width))
        return jnp.concatenate([k_nope_BSHN, k_rope_BSHP], axis=-1), v_BSHU  # eq. 4

    def over_cache(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        cache: Latents | Packed,
        seen_BTS: jax.Array,
        table_BN: jax.Array | None = None,
    ) -> jax.Array:
        """The absorbed form: u_BTD of tokens that attend to the cache's slots in `seen_BTS`, which hold their own.

        With `table_BN` the cache is a pool of pages, and the slots are those of each sequence's pages in their order.
        """
        q_nope_BTHN, q_rope_BTHP = self.queries(x_BTD, tokens.positions_BT)
        q_latent_BTHC = self.matmul.einsum("BTHN,CHN->BTHC", q_nope_BTHN, self.k_up_CHN[...])
        options = {"scale": self.scale, "table_BN": table_BN}
        o_latent_BTHC = self.kernels["latent_decode"](q_latent_BTHC, q_rope_BTHP, tuple(cache), seen_BTS, **options)
        o_BTHU = self.matmul.einsum("BTHC,CHU->BTHU", o_latent_BTHC, self.v_up_CHU[...])
        return self.matmul.einsum("BTHU,HUD->BTD", o_BTHU, self.out_HUD[...])

    def over_pages(self, x_BTD: jax.Array, tokens: Tokens, pool: Latents | Packed, table_BN: jax.Array) -> jax.Array:
        """`over_cache` where the cache is one pool of pages, which `kernels.latent_decode` reads where they lie."""
        seen_BTS = jnp.arange(table_BN.shape[1] * pool[0].shape[1]) <= tokens.positions_BT[..., None]
        return self.over_cache(x_BTD, tokens, pool, seen_BTS, table_BN)

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return softmax_scale(self.config.query_width, self.config.yarn)

    @property
    def entry_width(self) -> int:
        """C + P."""
        return self.config.kv_rank + self.config.rope_width

    @property
    def flops_per_slot(self) -> int:
        """2 H (2 C + P), absorbed."""
        return 2 * self.config.n_heads * (2 * self.config.kv_rank + self.config.rope_width)

    @property
    def expanded_width(self) -> int:
        """H (Q + U)."""
        return self.config.n_heads * (self.config.query_width + self.config.value_width)

    def _rotate(self, x: jax.Array, positions_BT: jax.Array) -> jax.Array:
        c = self.config
        return rotate(x, positions_BT, frequencies(c.rope_width, c.rope_base, c.yarn), rotary_scale(c.yarn))
