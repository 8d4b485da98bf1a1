"""DeepSeek-V4's attention: one key that is the value, a window of tokens, and compressed entries of all before them.

    c^Q_t = norm(W^DQ h_t)                                  latent of the queries
    q_t,i = RoPE(unit(W^UQ c^Q_t))                          unit: over the root mean square of each head, without a gain
    k_t = RoPE(norm(W^KV h_t))                              one for all heads, both key and value
    o_t,i = softmax with a sink over the keys of t-w+1..t and over entries       (`layers.compressed_attention`)
    u_t = W^O [W^G_g RoPE^-1(o_t,i of group g)]_g           RoPE^-1 at the position of t: what is read depends on
                                                            distances only, though values are rotated

Three kinds of layers share this. *Sliding* layers have the window alone. *CSA* (compressed sparse attention, m = 4)
adds the entries of a compressor with overlapping blocks that an indexer chooses; its keys come from a compressor of
their own. *HCA* (heavily compressed attention, m = 128) adds all entries of a compressor. RoPE rotates the last P
numbers in neighbouring pairs; sliding layers have a base of their own, the others a larger one and YaRN, and no logit
has a temperature.

The indexer's losses are those of `layers.sparse_mla`, over entries in place of tokens; no report says how V4's learnt.
Sequences that are divided over devices gather keys and what compressors read of all tokens, as sparse attention does.
Paper: DeepSeek-V4, arXiv 2606.19348, section 2.3; the rest: released code, class Attention.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, Execution, param
from deepseek_jax.layers.block import Attention, Losses
from deepseek_jax.layers.cache import all_layers
from deepseek_jax.layers.compressed_attention import Far, Near, Part, learning, over_memory, over_sequences
from deepseek_jax.layers.compressed_cache import CompressedLayout, Entries, Kept
from deepseek_jax.layers.compressor import Compressor
from deepseek_jax.layers.entry_codes import Codes, Exact, Fp4, Fp8, TrainedFp4
from deepseek_jax.layers.indexed_attention import losses_of
from deepseek_jax.layers.indexer import Index, Indexer, IndexerConfig, Stream
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.rope import Yarn, frequencies, rotate
from deepseek_jax.layers.tokens import Tokens

IN = "attention_in"  # role of weights


@dataclass(frozen=True)
class CompressedConfig:
    """Sizes of V4's attention (Flash's in brackets)."""

    n_heads: int  # H, heads (64)
    head_width: int  # Q, width of a query head and of the key (512)
    rope_width: int  # P, rotary part, the last of these (64)
    q_rank: int  # R, width of the query latent (1024)
    out_groups: int  # G, groups of heads on the way back to the stream (8)
    out_rank: int  # numbers that each group's heads are narrowed to (1024)
    window: int  # w, tokens that one sees as they are, itself among them (128)
    norm_eps: float = 1e-6  # of all norms of the attention
    rope_base: float = 10_000.0  # base of the rotary frequencies of layers without a compressor (10,000)
    compress_rope_base: float = 160_000.0  # of layers with one (160,000)
    yarn: Yarn | None = None  # context extension of layers with a compressor, or None; temperatures are not read
    init_std: float = 0.006  # standard deviation of the initial weights


@dataclass(frozen=True)
class Turn:
    """Positions: rotates neighbouring pairs of the last `width` numbers."""

    width: int
    base: float
    yarn: Yarn | None

    def __call__(self, x: jax.Array, positions_BT: jax.Array, *, back: bool = False) -> jax.Array:
        """Returns vectors with positions in them; `back` takes them out."""
        theta = frequencies(self.width, self.base, self.yarn)
        turned = rotate(x[..., -self.width :], positions_BT, -theta if back else theta)
        return jnp.concatenate([x[..., : -self.width], turned], axis=-1)


class CompressedAttention(Attention):
    """V4's attention.

    Of `run` its `matmul`, `context`, `cache`, `compute`, `index_rests` and `kernels.indexed_choice` are used.

    A cache in "fp8" is the published one: 584 bytes per key and entry, 68 per key of the indexer. Whole sequences then
    read the same rounded numbers. With `matmul.index_in_fp4` they do so of the indexer alone.

    | ours | paper | released name |
    | --- | --- | --- |
    | q_down_DR, q_norm, q_up_RHQ | W^DQ, W^UQ | wq_a, q_norm, wq_b |
    | kv_DQ, kv_norm | W^KV | wkv, kv_norm |
    | sink_H | z' | attn_sink |
    | out_down_YGR, out_up_GRD | | wo_a, wo_b |

    Args:
        c: sizes.
        ratio: m, tokens of an entry; 0 for a layer with the window alone.
        index: sizes of an indexer, which makes the layer CSA; None: all entries are read (HCA).
        is_dense: whether all entries are read while the indexer learns (the warm-up).
        share: of this layer in `index_recall`: one over the number of layers with an indexer.

    Raises UserError for keys of an indexer in FP4 that are not as wide as a power of two, and for an implementation of
    `kernels.indexed_choice` that does not read such keys.
    """

    has_rows = True

    def __init__(
        self,
        c: CompressedConfig,
        d_model: int,
        run: Execution = SINGLE_DEVICE,
        *,
        ratio: int = 0,
        index: IndexerConfig | None = None,
        is_dense: bool = False,
        share: float = 1.0,
        rngs: nnx.Rngs,
    ):
        in_fp4 = "cache='fp8'" if run.cache == "fp8" else "config.precision=fp4" if run.matmul.index_in_fp4 else ""
        if in_fp4 and index and index.index_width & (index.index_width - 1):
            raise UserError(
                f"{in_fp4} for an indexer's keys of {index.index_width} numbers (config.model.index_width): expected a "
                "power of two, for the Hadamard matrix that turns them. Leave it out."
            )
        if index and run.kernels.chosen["indexed_choice"] == "mosaic_gpu":
            raise UserError(
                "config.kernels.indexed_choice='mosaic_gpu' with compressed entries: its kernel reads other keys. "
                "Set it to triton or xla."
            )
        init, heads, width = normal(c.init_std), c.n_heads, c.head_width
        self.q_down_DR = param(rngs, (d_model, c.q_rank), ("embed", "q_latent"), init, role=IN)
        self.q_norm = RMSNorm(c.q_rank, c.norm_eps, rngs=rngs)
        self.q_up_RHQ = param(rngs, (c.q_rank, heads, width), ("q_latent", "heads", None), init, role=IN)
        self.kv_DQ = param(rngs, (d_model, width), ("embed", None), init, role=IN)
        self.kv_norm = RMSNorm(width, c.norm_eps, rngs=rngs)
        self.sink_H = param(rngs, (heads,), (None,), zeros, role="bias")
        groups, rank = c.out_groups, c.out_rank
        narrow = (heads // groups * width, groups, rank)
        self.out_down_YGR = param(rngs, narrow, (None, "heads", None), init, role="grouped_out")
        self.out_up_GRD = param(rngs, (groups, rank, d_model), ("heads", None, "embed"), init, role="attention_out")
        base, yarn = (c.compress_rope_base, c.yarn) if ratio else (c.rope_base, None)
        self.turn, self.has_index = Turn(c.rope_width, base, yarn), index is not None
        make = functools.partial(
            Compressor, ratio=ratio, d_model=d_model, eps=c.norm_eps, std=c.init_std, rotate=self.turn
        )
        if ratio:
            self.compressor = make(width, overlaps=self.has_index, rngs=rngs)
        if index is not None:

            def key(rngs: nnx.Rngs) -> Compressor:
                return make(index.index_width, overlaps=True, rngs=rngs)

            rounds = keys if isinstance(keys := _index_codes(index, run), Fp4 | TrainedFp4) else None
            self.indexer = Indexer(index, d_model, key, self.turn, run, rounds=rounds, rngs=rngs)
        self.config, self.ratio, self.top_k = c, ratio, index.index_top_k if index else 0
        self.is_dense, self.share, self.codes = is_dense, share, _codes_of(c, index, run)
        self.matmul, self.kernels, self.context = run.matmul, run.kernels, run.context
        self.rests = self.has_index and is_dense and run.index_rests

    @property
    def compressors(self) -> tuple[Compressor, ...]:
        """None, the layer's, or that and the indexer's."""
        if not self.ratio:
            return ()
        return (self.compressor, self.indexer.key) if self.has_index else (self.compressor,)

    @property
    def cache(self) -> CompressedLayout:
        """See `Attention`."""
        compressors = self.compressors
        return CompressedLayout(self.config.window, self.codes[0], compressors, self.codes[: len(compressors)])

    def operand(self, x_BTD: jax.Array) -> Stream:
        """See `Attention`."""
        return Stream(x_BTD, self.matmul.operand(x_BTD))

    def entries(self, x: Stream, tokens: Tokens) -> Entries:
        """What is computed of these tokens, before anything of it is compressed."""
        kv_BTQ = self.kv_norm(self.matmul.einsum("BTD,DQ->BTQ", x.operand, self.kv_DQ[...]))
        kv_BTQ = _rounded(self.turn(kv_BTQ, tokens.positions_BT), self.codes[0])
        streams = x.x_BTD, jax.lax.stop_gradient(x.x_BTD)  # an indexer's gradients end at what it reads
        raw = (c.raw(x_BTD, tokens.positions_BT) for c, x_BTD in zip(self.compressors, streams, strict=False))
        return Entries(kv_BTQ, tuple(raw))

    def queries(self, x: Stream, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the heads' queries q_BTHQ, their latent q_latent_BTR)."""
        q_latent_BTR = self.q_norm(self.matmul.einsum("BTD,DR->BTR", x.operand, self.q_down_DR[...]))
        q_BTHQ = self.matmul.einsum("BTR,RHQ->BTHQ", q_latent_BTR, self.q_up_RHQ[...])
        wide = q_BTHQ.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.norm_eps)
        return self.turn(wide.astype(q_BTHQ.dtype), positions_BT), q_latent_BTR

    def over_itself(self, x: Stream, tokens: Tokens, entries: Entries) -> tuple[jax.Array, Losses]:
        """(u_BTD of tokens that attend causally to themselves, auxiliary losses: those of an indexer)."""
        n_tokens, n_parts = x.x_BTD.shape[1], 1 if self.context.n == 1 else 2
        place_BT = jnp.broadcast_to(self.context.places(n_tokens), tokens.positions_BT.shape)
        read = entries._replace(raw=entries.raw[:1]) if self.rests else entries
        entries = jax.tree.map(self.context.whole, read)
        positions_BS, segments_BS = jax.tree.map(self.context.whole, (tokens.positions_BT, tokens.segments_BT))
        q_BTHQ, q_latent_BTR = self.queries(x, tokens.positions_BT)
        far, keys_BIQ = self._closed(entries, positions_BS, segments_BS)
        index = None if keys_BIQ is None else self._index(q_latent_BTR, x, tokens, keys_BIQ)
        size = n_tokens // n_parts
        outputs = []
        for start in range(0, n_tokens, size):  # tokens of a device that follow one another

            def own(a: Any, start: int = start) -> Any:
                return jax.tree.map(lambda x: x[:, start : start + size], a)

            near = self._near(entries.kv_BSQ, segments_BS, place_BT[0, start], size)
            mine = index and Index(own(index.q_BTHQ), own(index.weight_BTH), index.k_BSQ)
            outputs.append(self._attend(own(q_BTHQ), near, far, mine, own(place_BT), own(tokens.segments_BT)))
        o_BTHQ = outputs[0] if n_parts == 1 else jnp.concatenate(outputs, axis=1)
        losses: Losses = {}
        if far is not None and index is not None:
            options: dict[str, Any] = {"top_k": self.top_k, "is_dense": self.is_dense, "scale": self.scale}
            found = learning(q_BTHQ, far, index, place_BT, tokens.segments_BT, **options)
            has_choice = far.e_BIQ.shape[1] > self.top_k
            losses = losses_of(found, tokens, self.context, share=self.share, has_choice=has_choice)
        return self._out(o_BTHQ, tokens.positions_BT), losses

    def extend(  # type: ignore[override]
        self, x: Stream, tokens: Tokens, cached: Kept, start: int | jax.Array | None = None
    ) -> tuple[jax.Array, Kept, Losses]:
        """See `Attention.extend`; each sequence is at its own position, and `start` is not read."""
        entries = self.entries(x, tokens)
        kept = self.cache.write(cached, entries, tokens)
        return self._over_kept(x, tokens, entries, cached, kept), kept, {}

    def extend_in_pages(
        self, x: Stream, tokens: Tokens, pool: Kept, table_BN: jax.Array, slot_B: jax.Array
    ) -> tuple[jax.Array, Kept, Losses]:
        """See `Attention`; a single token reads of the pages what it attends to, and all keys of the indexer."""
        layout, entries = self.cache, self.entries(x, tokens)
        before = layout.rows(pool, slot_B)
        pool, after = layout.write_pages(pool, before, entries, tokens, table_BN, slot_B)
        kept = after._replace(entries_BIQ=pool.entries_BIQ)
        return self._over_kept(x, tokens, entries, before, kept, table_BN), pool, {}

    def _over_kept(
        self, x: Stream, tokens: Tokens, entries: Entries, before: Kept, kept: Kept, table_BN: jax.Array | None = None
    ) -> jax.Array:
        """u_BTD of new tokens, over what was kept before them and is kept now; with a table entries lie in pages."""
        layout, positions_BT = self.cache, tokens.positions_BT
        q_BTHQ, q_latent_BTR = self.queries(x, positions_BT)
        fars = [
            self._far(*each, len(positions_BT), table_BN) for each in zip(kept.entries_BIQ, self.codes, strict=False)
        ]
        far = fars[0] if fars else None
        index = self._index(q_latent_BTR, x, tokens, fars[1].unpacked().e_BIQ) if self.has_index else None
        if positions_BT.shape[1] == 1:
            near = Part(layout.keys.unpack(kept.window_BSQ), layout.seen(kept, tokens))
            sizes: dict[str, Any] = {"top_k": self.top_k, "scale": self.scale}
            sizes["choose"] = self.kernels["indexed_choice"]
            chosen = None if self.is_dense else index
            o_BTHQ = over_memory(q_BTHQ, near, far, chosen, positions_BT, self.sink_H[...], **sizes)
        else:
            before_BSQ = layout.before(before, positions_BT[:, 0])
            near_keys = Near(jnp.concatenate([before_BSQ, entries.kv_BSQ], axis=1))
            o_BTHQ = self._attend(q_BTHQ, near_keys, far, index, positions_BT, None)
        return self._out(o_BTHQ, positions_BT)

    def _far(self, stored: Any, codes: Codes, n_batch: int, table_BN: jax.Array | None) -> Far:
        """Entries that are kept, block after block from the first one on."""
        if table_BN is not None:
            stored, table_BN = all_layers(stored, table_BN)
        n_blocks = stored.shape[1] * (1 if table_BN is None else table_BN.shape[1])
        last_I = self.ratio * jnp.arange(1, n_blocks + 1) - 1
        place_BI = jnp.broadcast_to(last_I, (n_batch, n_blocks))
        return Far(stored, place_BI, codes=codes, table_BN=table_BN)

    @property
    def page_multiple(self) -> int:
        """m: a block lies in one page."""
        return max(self.ratio, 1)

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.config.head_width**-0.5

    @property
    def entry_width(self) -> int:
        """Numbers per token of all entries, rounded up; the window, of constant size, is not counted."""
        return -(-sum(compressor.width for compressor in self.compressors) // max(self.ratio, 1))

    @property
    def expanded_width(self) -> int:
        """Q: the one key is the value of all heads."""
        return self.config.head_width

    @property
    def gathered(self) -> tuple[int, int]:
        """Each token's key, and what its compressors make of it."""
        raw = (c.bias_JQ.shape[-1] for c in self.compressors[: 1 if self.rests else None])
        return self.config.head_width, sum(2 * width for width in raw)

    @property
    def most_keys(self) -> int | None:  # type: ignore[override]
        """Of entries: top_k with an indexer, 0 without a compressor; None where all are read."""
        return None if self.ratio and (self.is_dense or not self.has_index) else self.top_k

    @property
    def tokens_per_key(self) -> int:  # type: ignore[override]
        """m; 1 without a compressor."""
        return max(self.ratio, 1)

    @property
    def window(self) -> int:  # type: ignore[override]
        """w."""
        return self.config.window

    @property
    def flops_per_index(self) -> int:  # type: ignore[override]
        """2 J Q per entry, of the indexer's heads and their width; 0 while it rests."""
        runs = self.has_index and not self.rests
        return 2 * self.indexer.config.index_heads * self.indexer.config.index_width if runs else 0

    def _closed(
        self, entries: Entries, positions_BS: jax.Array, segments_BS: jax.Array | None
    ) -> tuple[Far | None, jax.Array | None]:
        """The entries of whole sequences, and the indexer's keys, if `entries` has any."""
        if not self.ratio or positions_BS.shape[1] < self.ratio:
            return None, None
        blocks, place_BI, segments_BI = self.compressor.closed(positions_BS, segments_BS)
        parts = zip(self.compressors, entries.raw, self.codes, strict=False)
        made = [_rounded(compressor.entries(raw, blocks), codes) for compressor, raw, codes in parts]
        return Far(made[0], place_BI, segments_BI), made[1] if len(made) > 1 else None

    def _near(self, kv_BSQ: jax.Array, segments_BS: jax.Array | None, first: jax.Array, size: int) -> Near:
        """Keys of the window before place `first` of whole sequences, and of `size` tokens from there on."""
        window = self.config.window

        def cut(x_BS: jax.Array) -> jax.Array:
            padded = jnp.pad(x_BS, ((0, 0), (window, 0), *[(0, 0)] * (x_BS.ndim - 2)))
            if padded.shape[1] == window + size:
                return padded
            return jax.lax.dynamic_slice_in_dim(padded, first, window + size, axis=1)

        return jax.tree.map(cut, Near(kv_BSQ, segments_BS))

    def _index(self, q_latent_BTR: jax.Array, x: Stream, tokens: Tokens, keys_BIQ: jax.Array) -> Index:
        return self.indexer(q_latent_BTR, x.x_BTD, tokens.positions_BT, keys_BIQ)

    def _attend(
        self,
        q_BTHQ: jax.Array,
        near: Near,
        far: Far | None,
        index: Index | None,
        place_BT: jax.Array,
        segments_BT: jax.Array | None,
    ) -> jax.Array:
        sizes: dict[str, Any] = {"window": self.config.window, "top_k": self.top_k, "scale": self.scale}
        index = None if self.is_dense else index
        return over_sequences(q_BTHQ, near, far, index, place_BT, segments_BT, self.sink_H[...], **sizes)

    @jax.named_scope("projections")
    def _out(self, o_BTHQ: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """u_BTD: what the heads have read, back in the stream."""
        o_BTHQ = self.turn(o_BTHQ, positions_BT, back=True)
        o_BTGY = o_BTHQ.reshape(*o_BTHQ.shape[:2], self.config.out_groups, -1)
        latent_BTGR = jnp.einsum("BTGY,YGR->BTGR", o_BTGY, self.out_down_YGR[...].astype(o_BTGY.dtype))
        return self.matmul.einsum("BTGR,GRD->BTD", latent_BTGR, self.out_up_GRD[...])


def _rounded(x: jax.Array, codes: Codes) -> jax.Array:
    """What a cache gives back of vectors."""
    return codes.unpack(codes.pack(x))


def _codes_of(c: CompressedConfig, index: IndexerConfig | None, run: Execution) -> tuple[Codes, ...]:
    """How keys and entries are stored, and an indexer's keys."""
    entries = Exact(run.compute) if run.cache == "full" else Fp8(c.head_width, c.rope_width, run.compute)
    return (entries, _index_codes(index, run)) if index else (entries,)


def _index_codes(index: IndexerConfig, run: Execution) -> Codes:
    if run.cache != "full":
        return Fp4(index.index_width, run.compute)
    return TrainedFp4(run.compute) if run.matmul.index_in_fp4 else Exact(run.compute)
