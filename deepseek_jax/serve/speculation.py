"""Speculative decoding with multi-token prediction: two tokens per step where its draft was right, and the same text.

    x_p       the last token of a row, drawn and not yet in the cache;  d   a draft of the token after it
    forward   of x_p and d at the positions p and p + 1: logits for the tokens at p + 1 and p + 2
    t, u      what the row draws from these logits; t is right whatever d is, u if d = t
    draft     multi-token prediction reads the hidden states at p (and p + 1) with the tokens t (and u) after them

A token is drawn as it would be without drafts, from its own logits with the noise of its own position: so the text is
the same, at any temperature. A draft is drawn with the noise of its position too (but for the first one after a prompt,
the likeliest token), so that it is right more often than a draw that knows nothing of the other. On a Hopper GPU drafts
are made with the head in FP8 (`head_in_codes`): of a step that reads the head twice, half as many bytes the second
time. Where a row stands after a step only the device knows; the next one begins there, whether the host has looked or
not. What the caches hold of a wrong draft is overwritten by the next step, before anything sees it. That is so in rings
as well (V4): what a draft overwrites there is what the token in its place no longer sees, and more than one draft would
take more.
Paper: V3 section 2.2, "MTP in Inference"; Leviathan et al., arXiv 2211.17192, accept with a probability instead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers.base import Turned
from deepseek_jax.layers.cache import next_chunk_in_pages, next_tokens_in_pages
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.precision import fp8_weight_kernels
from deepseek_jax.precision.fp8_weight import BLOCK, Fp8Weight, Layout, encoded
from deepseek_jax.serve.memory import Memory, read
from deepseek_jax.serve.sampler import Scores, draw, scores

ENDED = -1  # in place of tokens after the end of a row, and of those that a wrong draft did not give
PER_STEP = 2  # tokens that a step draws at most


class Row(NamedTuple):
    """The rows of a batch between two steps."""

    last_B: jax.Array  # x_p
    draft_B: jax.Array  # d
    position_B: jax.Array  # p
    left_B: jax.Array  # tokens that may still be drawn
    is_running_B: jax.Array


def foresee(
    model: Any,
    memory: Memory,
    h_BTD: jax.Array,
    next_BT: jax.Array,
    n_B: jax.Array,
    start_B: jax.Array,
    table_BN: jax.Array,
    slot_B: jax.Array,
    coded_head: Fp8Weight | None = None,
) -> tuple[jax.Array, Memory]:
    """Multi-token prediction for a part of a prompt (B = 1), from what `memory.read` gave; see `Programs.extend`.

    `next_BT` are the tokens after its tokens. Returns (a draft of the token after the last of these, memory).
    """
    position_BT = start_B[:, None] + jnp.arange(h_BTD.shape[1], dtype=jnp.int32)
    tokens = Tokens(next_BT, position_BT, real_BT=jnp.arange(h_BTD.shape[1]) < n_B[:, None])
    attend = next_chunk_in_pages(start_B[0], table_BN, slot_B)
    h_B1D, ahead = model.ahead(h_BTD, tokens, attend, memory.ahead, n_B - 1)
    memory = memory._replace(ahead=ahead)
    return _draft(model, h_B1D, start_B + n_B + 1, memory, table_BN, {}, coded_head), memory


def step(
    model: Any,
    memory: Memory,
    row: Row,
    table_BN: jax.Array,
    slot_B: jax.Array,
    stop_BJ: jax.Array,
    how: dict[str, jax.Array],
    n_top: int,
    coded_head: Fp8Weight | None = None,
) -> tuple[Memory, Row, jax.Array, Scores | None]:
    """One step of all rows: (memory, rows, id_BT with T = 2, `ENDED` where there is none, scores; axes B, T first).

    `coded_head`, if there is one, makes the drafts in place of the model's head, and nothing else.
    """
    attend, after_B = next_tokens_in_pages(table_BN, slot_B), row.position_B + 1
    position_BT = jnp.stack([row.position_B, after_B], axis=1)
    may_draw_two_B = row.is_running_B & (row.left_B > 1)
    real_BT = jnp.stack([row.is_running_B, may_draw_two_B], axis=1)
    tokens = Tokens(jnp.stack([row.last_B, row.draft_B], axis=1), position_BT, real_BT=real_BT)
    h_BTD, memory = read(model, tokens, attend, memory, table_BN)
    logits_BTV = model.head(model.of_ahead(h_BTD))

    how = how | _pages(memory, table_BN, how)
    id_BT = jnp.stack([draw(logits_BTV[:, n], after_B + n, how) for n in range(PER_STEP)], axis=1)
    is_stop_BT = jnp.any(id_BT[..., None] == stop_BJ[:, None], axis=-1)
    is_right_B = may_draw_two_B & (id_BT[:, 0] == row.draft_B) & ~is_stop_BT[:, 0]
    drawn_BT = jnp.stack([row.is_running_B, is_right_B], axis=1)

    ahead_tokens = Tokens(id_BT, position_BT, real_BT=drawn_BT)
    one_B = is_right_B.astype(jnp.int32)
    h_B1D, ahead = model.ahead(h_BTD, ahead_tokens, attend, memory.ahead, one_B)  # after its attention, of one token
    memory = memory._replace(ahead=ahead)
    last_B = jnp.take_along_axis(id_BT, one_B[:, None], axis=1)[:, 0]
    is_over_B = jnp.take_along_axis(is_stop_BT, one_B[:, None], axis=1)[:, 0]
    left_B = row.left_B - 1 - one_B
    following = Row(
        last_B,
        _draft(model, h_B1D, after_B + one_B + 1, memory, table_BN, how, coded_head),
        after_B + one_B,
        left_B,
        row.is_running_B & ~is_over_B & (left_B > 0),
    )
    following = Row(*(jnp.where(row.is_running_B, new, old) for new, old in zip(following, row, strict=True)))
    found = None if n_top < 0 else jax.vmap(lambda logits, ids: scores(logits, ids, n_top))(logits_BTV, id_BT)
    return memory, following, jnp.where(drawn_BT, id_BT, ENDED), found


def _draft(
    model: Any,
    h_B1D: jax.Array,
    position_B: jax.Array,
    memory: Memory,
    table_BN: jax.Array,
    how: dict[str, jax.Array],
    coded_head: Fp8Weight | None,
) -> jax.Array:
    """Drafts of the tokens at `position_B`, from what multi-token prediction makes of those before them."""
    if coded_head is None:
        logits_BTV = model.head(h_B1D)
    else:
        multiply = model.run.kernels["coded_matmul"]
        logits_BTV = fp8_weight_kernels.einsum(multiply, "BTD,DV->BTV", h_B1D, coded_head, jnp.float32)
    return draw(logits_BTV[:, 0], position_B, how | _pages(memory, table_BN, how))


def reads_codes(model: Any) -> bool:
    """Returns whether drafts are made by a head in FP8: where a kernel multiplies with it, on Hopper for bfloat16."""
    vocab_size, d_model = model.embedding.table_VD.shape
    is_whole = not d_model % BLOCK and not vocab_size % (BLOCK // 2)
    return is_whole and model.run.kernels.chosen["coded_matmul"] != "xla"


@jax.jit
def head_in_codes(weight_DV: jax.Array | Turned) -> Fp8Weight:
    """Returns a head in FP8, by V3's rule: half as many bytes, which lie in memory beside the head's own."""
    array = weight_DV[...]
    d, vocab_size = array.shape
    return encoded((array,), (Layout((vocab_size,), (d,), (1, 0)),))[0]


def _pages(memory: Memory, table_BN: jax.Array, how: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What `draw` needs besides to find the tokens that rows have, if it looks for them."""
    return {"ids_PS": memory.ids_PS, "table_BN": table_BN} if "n_prompt_B" in how else {}
