"""The programs of the engine: what the device computes, compiled for few shapes.

    extend   one part of a prompt (B = 1)                                   -> hidden states, logits after it
    decode   one token per row                                              -> logits
    draw     logits                                                         -> tokens
    score    logits and tokens                                              -> log-probabilities
    recite   hidden states of a part of a prompt, and the tokens after them -> log-probabilities
    steps    decode, draw and score, as often as `n_steps`                  -> tokens and log-probabilities

What requests ask for concerns the small programs alone, so their number is added to that of the large ones: they are
not multiplied. `memory` is donated and updated in place; so is `last_R`, the token that each running request drew last.
The tokens themselves lie in pages as the cache does, so what a row has already is known wherever its cache is.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.layers.cache import read_pages, write_pages
from deepseek_jax.layers.decoder import Cache
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.serve.sampler import Penalties, Scores, biased, penalised, permitted, sample, scores

Weights = tuple[Tree, Tree]  # parameters and router biases
Rows = dict[str, Any]  # arrays, or their shapes
DONATED = {"extend": ("memory",), "decode": ("memory",), "draw": ("last_R",), "steps": ("memory", "last_R")}
ENDED = -1  # in place of tokens after the end of a row


class Memory(NamedTuple):
    """Everything that lies in pages: the cache, and the tokens that it was computed from (pages, then their places)."""

    cache: Cache
    ids_PS: jax.Array


class Call(NamedTuple):
    """A program and its arguments, or the shapes of these.

    Its own shapes are those of `rows`; `state` has the same ones whenever these are the same.
    """

    name: str
    state: dict[str, Any]
    rows: Rows
    static: Mapping[str, int] = MappingProxyType({})


class Programs:
    """The programs for one model and one size of memory; `matmul_precision` as for `jax.default_matmul_precision`."""

    def __init__(self, definition: nnx.GraphDef, matmul_precision: str | None = None):
        self.definition, self.matmul_precision = definition, matmul_precision
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def run(self, call: Call) -> Any:
        """Runs a program."""
        return self._program(call)(**call.state, **call.rows)

    def compile(self, calls: list[Call]) -> None:
        """Compiles programs in parallel."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._program, calls))

    def _program(self, call: Call) -> jax.stages.Compiled:
        name, state, rows, static = call
        key = (name, *sorted(static.items()), *((row, rows[row].shape) for row in sorted(rows)))
        if key not in self._compiled:
            jitted = jax.jit(functools.partial(getattr(self, name), **static), donate_argnames=DONATED.get(name, ()))
            self._compiled[key] = jitted.lower(**state, **rows).compile()
        return self._compiled[key]

    def extend(
        self,
        weights: Weights,
        memory: Memory,
        ids_BT: jax.Array,
        n_B: jax.Array,
        start_B: jax.Array,
        table_BN: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Memory]:
        """The first `n_B` tokens of `ids_BT` from position `start_B` on: (h_BTD, logits_BV after the last, memory)."""
        real_BT = jnp.arange(ids_BT.shape[1]) < n_B[:, None]
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self.definition, *weights)
            h_BTD, cache = model.extend_in_pages(ids_BT, start_B[0], memory.cache, table_BN, real_BT)
            logits_BV = model.head(jnp.take_along_axis(h_BTD, (n_B - 1)[:, None, None], axis=1))[:, 0]
        positions_BT = start_B[:, None] + jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
        tokens = Tokens(ids_BT, positions_BT, real_BT=real_BT)
        return h_BTD, logits_BV, Memory(cache, write_pages(memory.ids_PS, ids_BT, tokens, table_BN))

    def decode(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        ids_B: jax.Array,
        start_B: jax.Array,
        slot_B: jax.Array,
        table_BN: jax.Array,
    ) -> tuple[jax.Array, Memory]:
        """One token per row, that of `ids_B` or where it is negative the one drawn last: (logits_BV, memory)."""
        ids_B = jnp.where(ids_B < 0, last_R[slot_B], ids_B)
        return self._next(weights, memory, ids_B, start_B, slot_B < len(last_R) - 1, table_BN)

    def draw(
        self, logits_BV: jax.Array, last_R: jax.Array, position_B: jax.Array, slot_B: jax.Array, **how: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens for `position_B`: (id_BT with T = 1, last_R)."""
        id_B = _drawn(logits_BV, position_B, how)
        return id_B[:, None], last_R.at[slot_B].set(id_B)

    def score(self, logits_BV: jax.Array, id_BT: jax.Array, n_top: int) -> Scores:
        """`sampler.scores` of what was drawn; arrays with axes B and T = 1 first."""
        return jax.vmap(functools.partial(scores, n_top=n_top))(logits_BV[:, None], id_BT)

    def recite(self, weights: Weights, h_BTD: jax.Array, next_BT: jax.Array, n_top: int) -> Scores:
        """`score` for the tokens after those of a prompt; arrays with axes B and T first."""
        with jax.default_matmul_precision(self.matmul_precision):
            logits_BTV = bind(self.definition, *weights).head(h_BTD)  # type: ignore[attr-defined]
        return jax.vmap(functools.partial(scores, n_top=n_top))(logits_BTV, next_BT)

    def steps(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        ids_B: jax.Array,
        start_B: jax.Array,
        slot_B: jax.Array,
        table_BN: jax.Array,
        n_draws_B: jax.Array,
        stop_BJ: jax.Array,
        n_steps: int,
        n_top: int,
        **how: jax.Array,
    ) -> tuple[jax.Array, Scores | None, Memory, jax.Array]:
        """`decode` and `draw`, up to `n_draws_B` times and to a row's first stop id.

        Returns (id_BT with T = `n_steps`, `ENDED` after a row's end; scores with axes B and T first, None for
        `n_top` = -1; memory; last_R).
        """
        id_B = jnp.where(ids_B < 0, last_R[slot_B], ids_B)
        is_running_B = slot_B < len(last_R) - 1

        def step(carry: tuple, number: jax.Array) -> tuple[tuple, tuple]:
            memory, id_B, is_running_B = carry
            is_running_B &= number < n_draws_B
            logits_BV, memory = self._next(weights, memory, id_B, start_B + number, is_running_B, table_BN)
            pages = {"ids_PS": memory.ids_PS, "table_BN": table_BN} if "n_prompt_B" in how else {}
            new_B = _drawn(logits_BV, start_B + number + 1, how | pages)
            found = None if n_top < 0 else scores(logits_BV, new_B, n_top)
            is_over_B = jnp.any(new_B[:, None] == stop_BJ, axis=1)
            shown_B = jnp.where(is_running_B, new_B, ENDED)
            carry = memory, jnp.where(is_running_B, new_B, id_B), is_running_B & ~is_over_B
            return carry, (shown_B, found)

        numbers = jnp.arange(n_steps, dtype=jnp.int32)
        (memory, id_B, _), found = jax.lax.scan(step, (memory, id_B, is_running_B), numbers)
        id_BT, scores_BT = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), found)
        return id_BT, scores_BT, memory, last_R.at[slot_B].set(id_B)

    def _next(
        self,
        weights: Weights,
        memory: Memory,
        id_B: jax.Array,
        position_B: jax.Array,
        real_B: jax.Array,
        table_BN: jax.Array,
    ) -> tuple[jax.Array, Memory]:
        tokens = Tokens(id_B[:, None], position_B[:, None], real_BT=real_B[:, None])
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self.definition, *weights)
            logits_BTV, cache = model.decode_in_pages(*tokens[:2], memory.cache, table_BN, tokens.real_BT)
        return logits_BTV[:, 0], Memory(cache, write_pages(memory.ids_PS, tokens.ids_BT, tokens, table_BN))


def _drawn(logits_BV: jax.Array, position_B: jax.Array, how: dict[str, jax.Array]) -> jax.Array:
    """The tokens for `position_B`; `how` is what `sampling.arguments` says, and for penalties the rows' pages."""
    if not how:
        return sample(logits_BV, position_B)
    if "n_prompt_B" in how:
        logits_BV = _shaped(logits_BV, position_B, **how)
    key_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(how["key_BK"]), position_B)
    numbers = [how.get(name) for name in ("temperature_B", "top_p_B", "top_k_B", "min_p_B")]
    return sample(logits_BV, key_B, *numbers)


def _shaped(
    logits_BV: jax.Array,
    position_B: jax.Array,
    *,
    ids_PS: jax.Array,
    table_BN: jax.Array,
    n_prompt_B: jax.Array,
    allowed_RW: jax.Array,
    mask_B: jax.Array,
    bias_ids_BJ: jax.Array,
    bias_BJ: jax.Array,
    presence_B: jax.Array,
    frequency_B: jax.Array,
    repetition_B: jax.Array,
    **_: jax.Array,
) -> jax.Array:
    """Logits after biases, penalties for the tokens before `position_B`, which lie in the rows' pages, and masks."""
    ids_BS = read_pages(ids_PS, table_BN)
    place_S = jnp.arange(ids_BS.shape[1])
    prompt_BS = place_S < n_prompt_B[:, None]
    drawn_BS = ~prompt_BS & (place_S < position_B[:, None])
    logits_BV = biased(logits_BV, bias_ids_BJ, bias_BJ)
    penalties = Penalties(presence_B, frequency_B, repetition_B)
    logits_BV = penalised(logits_BV, ids_BS, prompt_BS, drawn_BS, penalties)
    return permitted(logits_BV, allowed_RW[mask_B])
