"""The programs of the engine: what the device computes, compiled for few shapes.

    begin    first parts of prompts                                         -> hidden states, logits after them
    extend   parts of prompts from one position on                          -> the same
    decode   one token per row                                              -> logits
    draw     logits                                                         -> tokens
    score    logits and tokens                                              -> log-probabilities
    recite   hidden states of a part of a prompt, and the tokens after them -> log-probabilities
    steps    decode, draw and score, up to `n_steps` times                  -> tokens and log-probabilities
    routes   pages of rows                                                  -> the experts that their tokens chose

With drafts (`speculation`):

    foresee    hidden states of a part of a prompt, and the tokens after them -> a draft
    speculate  `steps` that draw up to two tokens each                        -> the same, drafts, positions

What requests ask for concerns the small programs alone, so their number is added to that of the large ones: they are
not multiplied. `memory` is donated and updated in place; so is `last_R`, the token that each running request drew last,
and with drafts `draft_R` and `position_R`.
The tokens themselves lie in pages as the cache does, so what a row has already is known wherever its cache is.

Engines of the same model and sizes share their programs (`programs_for`).
"""

import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.layers.block import Attend
from deepseek_jax.layers.cache import first_chunk_in_pages, next_chunk_in_pages, next_tokens_in_pages
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.replicas import ROWS, Replicas
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.serve import speculation
from deepseek_jax.serve.memory import Memory, Sizes, read, routes_of, shapes_of, zeros
from deepseek_jax.serve.sampler import Scores, draw, no_scores, scores
from deepseek_jax.serve.speculation import ENDED, PER_STEP, Row

Weights = tuple[Tree, Tree]  # parameters and router biases
Rows = dict[str, Any]  # arrays, or their shapes; and `Current`
DONATED: dict[str, tuple[str, ...]] = {  # of each program: arguments whose memory its results take
    "begin": ("memory",),
    "extend": ("memory",),
    "decode": ("memory",),
    "draw": ("last_R",),
    "steps": ("memory", "last_R"),
    "foresee": ("memory", "draft_R"),
    "speculate": ("memory", "last_R", "draft_R", "position_R"),
}
OUTPUTS: dict[str, tuple[type, ...]] = {  # of each program: arrays with rows first, and memory
    "begin": (jax.Array, jax.Array, Memory),
    "extend": (jax.Array, jax.Array, Memory),
    "decode": (jax.Array, Memory),
    "draw": (jax.Array, jax.Array),
    "score": (Scores,),
    "recite": (Scores,),
    "steps": (jax.Array, Scores, Memory, jax.Array),
    "routes": (jax.Array,),
    "foresee": (jax.Array, Memory),
    "speculate": (jax.Array, Scores, Memory, jax.Array, jax.Array, jax.Array),
}


class Current(NamedTuple):
    """The tokens that rows compute next, one each."""

    ids_B: Any  # negative: the one that the row drew last
    start_B: Any  # their positions; negative, with drafts alone: where the row stands
    slot_B: Any  # the rows' places in `last_R`, whose last place is that of padding
    table_BN: Any  # the rows' pages

    def id_B(self, last_R: jax.Array) -> jax.Array:
        """The tokens themselves."""
        return jnp.where(self.ids_B < 0, last_R[self.slot_B], self.ids_B)

    def real_B(self, last_R: jax.Array) -> jax.Array:
        """Which rows are not padding."""
        return self.slot_B < len(last_R) - 1


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
    memory of its own; `compiler_options` as for `jax.jit`; `ends_early`: whether `steps` and `speculate` stop with
    their last row.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        sizes: Sizes,
        matmul_precision: str | None = None,
        replicas: Replicas | None = None,
        compiler_options: dict[str, str | bool] | None = None,
        ends_early: bool = True,
    ):
        self.definition, self.sizes, self.matmul_precision = definition, sizes, matmul_precision
        self.replicas, self._compiler_options, self._ends_early = replicas, compiler_options, ends_early
        self._own = replicas.definition if replicas else definition  # as a device runs it
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self._shapes: tuple[Memory, Memory] | None = None

    def __len__(self) -> int:
        return len(self._compiled)

    def empty(self, model: Any) -> Memory:
        """Memory of these sizes, all zeros."""
        if self._shapes is None:
            one = shapes_of(model, self.sizes)
            n = self.replicas.n if self.replicas else 1
            of_all = self.sizes._replace(n_pages=self.sizes.n_pages * n, n_rows=(self.sizes.n_rows + 1) * n - 1)
            self._shapes = one, shapes_of(model, of_all) if self.replicas else one
        return zeros(*self._shapes, self.replicas)

    def run(self, call: Call) -> Any:
        """Runs a program."""
        return self._program(call)(**call.state, **call.rows)

    def compile(self, calls: list[Call], stopped: threading.Event | None = None) -> None:
        """Compiles programs in parallel; on half of the cores, and until it is set, with `stopped`."""

        def make(call: Call) -> None:
            if stopped is None or not stopped.is_set():
                self._program(call)

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2) if stopped else None) as threads:
            list(threads.map(make, calls))

    def _program(self, call: Call) -> jax.stages.Compiled:
        name, state, rows, static = call
        key = (name, *sorted(static.items()), *sorted(rows), *(leaf.shape for leaf in jax.tree.leaves(rows)))
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

    def begin(
        self,
        weights: Weights,
        memory: Memory,
        ids_BT: jax.Array,
        n_B: jax.Array,
        table_BN: jax.Array,
        slot_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Memory]:
        """`extend` from position 0 on, which reads no page."""
        attend = first_chunk_in_pages(table_BN, slot_B)
        return self._read(weights, memory, ids_BT, n_B, jnp.zeros_like(n_B), table_BN, attend)

    def extend(
        self,
        weights: Weights,
        memory: Memory,
        ids_BT: jax.Array,
        n_B: jax.Array,
        start_B: jax.Array,
        table_BN: jax.Array,
        slot_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Memory]:
        """The first `n_B` tokens of `ids_BT` from position `start_B` on: (h_BTD, logits_BV after the last, memory)."""
        attend = next_chunk_in_pages(start_B[0], table_BN, slot_B)
        return self._read(weights, memory, ids_BT, n_B, start_B, table_BN, attend)

    def _read(
        self,
        weights: Weights,
        memory: Memory,
        ids_BT: jax.Array,
        n_B: jax.Array,
        start_B: jax.Array,
        table_BN: jax.Array,
        attend: Attend,
    ) -> tuple[jax.Array, jax.Array, Memory]:
        place_T = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
        tokens = Tokens(ids_BT, start_B[:, None] + place_T, real_BT=place_T < n_B[:, None])
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self._own, *weights)
            h_BTD, memory = read(model, tokens, attend, memory, table_BN)
            last_B1D = h_BTD[jnp.arange(len(n_B)), n_B - 1][:, None]
            logits_BV = model.head(self._finished(model, last_B1D))[:, 0]
        return h_BTD, logits_BV, memory

    def _finished(self, model: Any, h_BTD: jax.Array) -> jax.Array:
        """What the head reads, of what `memory.read` gave."""
        return model.of_ahead(h_BTD) if self.sizes.has_drafts else h_BTD

    def decode(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        current: Current,
    ) -> tuple[jax.Array, Memory]:
        """One token per row: (logits_BV, memory)."""
        id_B, real_B = current.id_B(last_R), current.real_B(last_R)
        return self._next(weights, memory, id_B, current.start_B, real_B, current)

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
            model: Any = bind(self._own, *weights)
            logits_BTV = model.head(self._finished(model, h_BTD))
        return jax.vmap(functools.partial(scores, n_top=n_top))(logits_BTV, next_BT)

    def steps(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        current: Current,
        n_draws_B: jax.Array,
        stop_BJ: jax.Array,
        n_steps: int,
        n_top: int,
        **how: jax.Array,
    ) -> tuple[jax.Array, Scores | None, Memory, jax.Array]:
        """`decode` and `draw`, up to `n_draws_B` times (`n_steps` at most) and to a row's first stop id.

        Without `ends_early` these are `n_steps` steps, of which those after the last row's end compute padding: the
        compiler then knows their number, and the host of a GPU need not read a condition in each of them.

        Returns (id_BT with T = `n_steps`, `ENDED` after a row's end; scores with axes B and T first, None for
        `n_top` = -1; memory; last_R).
        """
        _, start_B, slot_B, table_BN = current

        def step(carry: tuple) -> tuple:
            number, _, memory, id_B, is_running_B, found = carry
            logits_BV, memory = self._next(weights, memory, id_B, start_B + number, is_running_B, current)
            pages = {"ids_PS": memory.ids_PS, "table_BN": table_BN} if "n_prompt_B" in how else {}
            new_B = draw(logits_BV, start_B + number + 1, how | pages)
            new = jnp.where(is_running_B, new_B, ENDED), None if n_top < 0 else scores(logits_BV, new_B, n_top)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=1)
            found, number = jax.tree.map(put, found, new), number + 1
            id_B = jnp.where(is_running_B, new_B, id_B)
            is_running_B &= (number < n_draws_B) & ~jnp.any(new_B[:, None] == stop_BJ, axis=1)
            return number, is_anyone(is_running_B), memory, id_B, is_running_B, found

        none_BT = jnp.full((len(slot_B), n_steps), ENDED, jnp.int32)
        found = none_BT, None if n_top < 0 else no_scores((len(slot_B), n_steps), n_top)
        is_running_B = current.real_B(last_R) & (n_draws_B > 0)
        id_B, is_anyone = current.id_B(last_R), self._is_anyone
        carry = jnp.int32(0), is_anyone(is_running_B), memory, id_B, is_running_B, found
        _, _, memory, id_B, _, (id_BT, scores_BT) = self._repeated(step, carry, n_steps)
        return id_BT, scores_BT, memory, last_R.at[slot_B].set(id_B)

    def _repeated(self, step: Callable[[tuple], tuple], carry: tuple, n_steps: int) -> tuple:
        """Repeats a step until it has run `n_steps` times, as counted in place 0, or place 1 says that no row runs.

        Without `ends_early` it runs so many times.
        """
        if self._ends_early:
            return jax.lax.while_loop(lambda carry: carry[1] & (carry[0] < n_steps), step, carry)
        return jax.lax.fori_loop(0, n_steps, lambda _, carry: step(carry), carry)

    def _is_anyone(self, flag_B: jax.Array) -> jax.Array:
        """Whether a row has this flag, of those of all devices, which take their steps together."""
        if not self._ends_early:  # nobody asks
            return jnp.bool_(True)
        return self.replicas.anywhere(flag_B) if self.replicas else jnp.any(flag_B)

    def _next(
        self,
        weights: Weights,
        memory: Memory,
        id_B: jax.Array,
        position_B: jax.Array,
        real_B: jax.Array,
        current: Current,
    ) -> tuple[jax.Array, Memory]:
        """The next token of rows, whose pages and slots are those of `current`."""
        table_BN, tokens = current.table_BN, Tokens(id_B[:, None], position_B[:, None], real_BT=real_B[:, None])
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self._own, *weights)
            h_BTD, memory = read(model, tokens, next_tokens_in_pages(table_BN, current.slot_B), memory, table_BN)
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
        coded_head: Fp8Weight | None = None,
    ) -> tuple[jax.Array, Memory]:
        """`speculation.foresee`, where -1 in `next_BT` stands for the token drawn last: (draft_R, memory)."""
        next_BT = jnp.where(next_BT < 0, last_R[slot_B][:, None], next_BT)
        with jax.default_matmul_precision(self.matmul_precision):
            model = bind(self._own, *weights)
            rows = n_B, start_B, table_BN, slot_B
            draft_B, memory = speculation.foresee(model, memory, h_BTD, next_BT, *rows, coded_head)
        return draft_R.at[slot_B].set(draft_B), memory

    def speculate(
        self,
        weights: Weights,
        memory: Memory,
        last_R: jax.Array,
        draft_R: jax.Array,
        position_R: jax.Array,
        current: Current,
        n_draws_B: jax.Array,
        stop_BJ: jax.Array,
        end_B: jax.Array,
        n_steps: int,
        n_top: int,
        coded_head: Fp8Weight | None = None,
        **how: jax.Array,
    ) -> tuple[jax.Array, Scores | None, Memory, jax.Array, jax.Array, jax.Array]:
        """`speculation.step`, up to `n_steps` times: as `steps`, with T = 2 `n_steps`; then draft_R and position_R.

        Rows end where they have `end_B` tokens, also if only the device knows where they begin. One that a stop id has
        ended draws nothing more in programs that were planned before the host has seen it.
        """
        _, start_B, slot_B, table_BN = current
        start_B = jnp.where(start_B < 0, position_R[slot_B], start_B)
        left_B = jnp.minimum(n_draws_B, end_B - 1 - start_B)
        row = Row(last_R[slot_B], draft_R[slot_B], start_B, left_B, current.real_B(last_R) & (left_B > 0))

        def step(carry: tuple) -> tuple:
            number, _, memory, row, found = carry
            with jax.default_matmul_precision(self.matmul_precision):
                model, rows = bind(self._own, *weights), (row, table_BN, slot_B, stop_BJ)
                memory, row, *new = speculation.step(model, memory, *rows, how, n_top, coded_head)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=PER_STEP * number, axis=1)
            found = jax.tree.map(put, found, tuple(new))
            return number + 1, self._is_anyone(row.is_running_B), memory, row, found

        shape = len(slot_B), PER_STEP * n_steps
        found = jnp.full(shape, ENDED, jnp.int32), None if n_top < 0 else no_scores(shape, n_top)
        carry = jnp.int32(0), self._is_anyone(row.is_running_B), memory, row, found
        _, _, memory, row, (id_BT, scores_BT) = self._repeated(step, carry, n_steps)
        has_stopped_B = ~row.is_running_B & (row.left_B > 0)
        row = row._replace(position_B=jnp.where(has_stopped_B, end_B, row.position_B))
        places = (last_R, row.last_B), (draft_R, row.draft_B), (position_R, row.position_B)
        return id_BT, scores_BT, memory, *(array_R.at[slot_B].set(new_B) for array_R, new_B in places)


_KNOWN: WeakValueDictionary[tuple, Programs] = WeakValueDictionary()
_LOOKING = threading.Lock()  # held while `_KNOWN` is read and added to


def form(weights: Weights) -> tuple:
    """Returns what programs are compiled for: the structure of weights, their shapes, dtypes and places."""
    leaves, tree = jax.tree.flatten(weights)
    return tree, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)


def checked_like(weights: Weights, others: Weights) -> Weights:
    """Returns `weights`; raises UserError if the programs for `others` do not take them."""
    if form(weights) != form(others):
        raise UserError(
            "weights of other names, shapes, dtypes or devices than the engine has: expected the same ones with other "
            "numbers. Make a new engine."
        )
    return weights


def programs_for(
    definition: nnx.GraphDef,
    weights: Weights,
    sizes: Sizes,
    matmul_precision: str | None = None,
    replicas: Replicas | None = None,
    compiler_options: dict[str, str | bool] | None = None,
    ends_early: bool = True,
) -> Programs:
    """Returns the `Programs` for weights like these: the ones that another engine has, if there is one."""
    where = (replicas.mesh, replicas.definition) if replicas else ()
    options = tuple(sorted((compiler_options or {}).items()))
    key = definition, form(weights), sizes, matmul_precision, where, options, ends_early
    with _LOOKING:
        if (known := _KNOWN.get(key)) is None:
            made = Programs(definition, sizes, matmul_precision, replicas, compiler_options, ends_early)
            known = _KNOWN[key] = made
    return known
