"""The programs of the engine: what the device computes, compiled for few shapes.

    extend   one part of a prompt (B = 1)                                   -> hidden states, logits after it
    decode   one token per row                                              -> logits
    draw     logits                                                         -> tokens
    score    logits and tokens                                              -> log-probabilities
    recite   hidden states of a part of a prompt, and the tokens after them -> log-probabilities
    steps    decode, draw and score, as often as `n_steps`                  -> tokens and log-probabilities
    routes   pages of rows                                                  -> the experts that their tokens chose

With drafts (`speculation`):

    foresee  hidden states of a part of a prompt, and the tokens after them -> a draft
    speculate  `steps` that draw up to two tokens each                      -> tokens, log-probabilities, drafts

What requests ask for concerns the small programs alone, so their number is added to that of the large ones: they are
not multiplied. `memory` is donated and updated in place; so is `last_R`, the token that each running request drew last.
The tokens themselves lie in pages as the cache does, so what a row has already is known wherever its cache is.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.layers.cache import next_chunk_in_pages, next_tokens_in_pages
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.replicas import ROWS, Replicas
from deepseek_jax.serve import speculation
from deepseek_jax.serve.memory import Memory, read, routes_of
from deepseek_jax.serve.sampler import Scores, draw, scores
from deepseek_jax.serve.speculation import ENDED, Row

Weights = tuple[Tree, Tree]  # parameters and router biases
Rows = dict[str, Any]  # arrays, or their shapes
DONATED = {"extend": ("memory",), "decode": ("memory",), "draw": ("last_R",), "steps": ("memory", "last_R")}
OUTPUTS: dict[str, tuple[type, ...]] = {  # of each program: arrays with rows first, and memory
    "extend": (jax.Array, jax.Array, Memory),
    "decode": (jax.Array, Memory),
    "draw": (jax.Array, jax.Array),
    "score": (Scores,),
    "recite": (Scores,),
    "steps": (jax.Array, Scores, Memory, jax.Array),
    "routes": (jax.Array,),
    "foresee": (jax.Array, Memory),
    "speculate": (jax.Array, Scores, Memory, jax.Array, jax.Array),
}
DONATED |= {"foresee": ("memory", "draft_R"), "speculate": ("memory", "last_R", "draft_R")}


class Call(NamedTuple):
    """A program and its arguments, or the shapes of these.

    Its own shapes are those of `rows`; `state` has the same ones whenever these are the same.
    """

    name: str
    state: dict[str, Any]
    rows: Rows
    static: Mapping[str, int] = MappingProxyType({})


class Programs:
    """The programs for one model and one size of memory.

    `matmul_precision` is as for `jax.default_matmul_precision`; with `replicas` each device runs them with rows and
    memory of its own; `compiler_options` as for `jax.jit`.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        matmul_precision: str | None = None,
        replicas: Replicas | None = None,
        compiler_options: dict[str, str | bool] | None = None,
    ):
        self.definition, self.matmul_precision, self.replicas = definition, matmul_precision, replicas
        self._compiler_options = compiler_options
        self._own = replicas.definition if replicas else definition  # as a device runs it
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
            function: Callable = functools.partial(getattr(self, name), **static)
            given = {**state, **rows}
            if self.replicas:
                memory = jax.tree.map(self.replicas.spec, state.get("memory"))
                outputs = tuple(memory if kind is Memory else ROWS for kind in OUTPUTS[name])
                function = self.replicas.on_each(function, given, outputs if len(outputs) > 1 else ROWS)
                given = self.replicas.abstract(given)
            jitted = jax.jit(function, donate_argnames=DONATED.get(name, ()))
            self._compiled[key] = jitted.lower(**given).compile(self._compiler_options)
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
        place_T = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
        tokens = Tokens(ids_BT, start_B[:, None] + place_T, real_BT=place_T < n_B[:, None])
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self._own, *weights)
            h_BTD, memory = read(model, tokens, next_chunk_in_pages(start_B[0], table_BN), memory, table_BN)
            logits_BV = model.head(jnp.take_along_axis(h_BTD, (n_B - 1)[:, None, None], axis=1))[:, 0]
        return h_BTD, logits_BV, memory

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
        id_B = draw(logits_BV, position_B, how)
        return id_B[:, None], last_R.at[slot_B].set(id_B)

    def score(self, logits_BV: jax.Array, id_BT: jax.Array, n_top: int) -> Scores:
        """`sampler.scores` of what was drawn; arrays with axes B and T = 1 first."""
        return jax.vmap(functools.partial(scores, n_top=n_top))(logits_BV[:, None], id_BT)

    def recite(self, weights: Weights, h_BTD: jax.Array, next_BT: jax.Array, n_top: int) -> Scores:
        """`score` for the tokens after those of a prompt; arrays with axes B and T first."""
        with jax.default_matmul_precision(self.matmul_precision):
            logits_BTV = bind(self._own, *weights).head(h_BTD)  # type: ignore[attr-defined]
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
            new_B = draw(logits_BV, start_B + number + 1, how | pages)
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
            model: Any = bind(self._own, *weights)
            h_BTD, memory = read(model, tokens, next_tokens_in_pages(table_BN), memory, table_BN)
            return model.head(h_BTD)[:, 0], memory

    def routes(self, weights: Weights, memory: Memory, table_BN: jax.Array) -> jax.Array:
        """`memory.routes_of` these pages."""
        return routes_of(bind(self._own, *weights), memory, table_BN)

    def foresee(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        draft_R: jax.Array,
        h_BTD: jax.Array,
        next_BT: jax.Array,
        n_B: jax.Array,
        start_B: jax.Array,
        slot_B: jax.Array,
        table_BN: jax.Array,
    ) -> tuple[jax.Array, Memory]:
        """`speculation.foresee`, where -1 in `next_BT` stands for the token drawn last: (draft_R, memory)."""
        next_BT = jnp.where(next_BT < 0, last_R[slot_B][:, None], next_BT)
        with jax.default_matmul_precision(self.matmul_precision):
            model = bind(self._own, *weights)
            draft_B, memory = speculation.foresee(model, memory, h_BTD, next_BT, n_B, start_B, table_BN)
        return draft_R.at[slot_B].set(draft_B), memory

    def speculate(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        draft_R: jax.Array,
        start_B: jax.Array,
        slot_B: jax.Array,
        table_BN: jax.Array,
        n_draws_B: jax.Array,
        stop_BJ: jax.Array,
        n_steps: int,
        n_top: int,
        **how: jax.Array,
    ) -> tuple[jax.Array, Scores | None, Memory, jax.Array, jax.Array]:
        """`speculation.step`, `n_steps` times: as `steps`, with T = 2 `n_steps`, and draft_R at the end."""
        row = Row(last_R[slot_B], draft_R[slot_B], start_B, n_draws_B, slot_B < len(last_R) - 1)

        def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
            with jax.default_matmul_precision(self.matmul_precision):
                model, (memory, row) = bind(self._own, *weights), carry
                memory, row, id_BT, found = speculation.step(model, memory, row, table_BN, stop_BJ, how, n_top)
            return (memory, row), (id_BT, found)

        (memory, row), found = jax.lax.scan(step, (memory, row), None, length=n_steps)
        id_BT, scores_BT = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(len(slot_B), -1, *a.shape[3:]), found)
        return id_BT, scores_BT, memory, last_R.at[slot_B].set(row.last_B), draft_R.at[slot_B].set(row.draft_B)
