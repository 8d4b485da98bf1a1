"""Continuous batching on one device: requests come and go while steps run over one pool of pages.

    engine.submit(prompt, Sampling(…)) -> request        any time
    engine.step() -> outputs                             plans a step, starts it, and returns what an earlier one drew

A step of the scheduler becomes one program for the rows that compute one token each, and one for each longer part of a
prompt. Sizes are padded to powers of two, so that few programs are compiled; `compile` does it beforehand. The token
that a row drew last stays on the device (`last_R`), where the next step reads it, so the host looks at tokens one step
late and the device does not wait. What a row draws depends on its logits, its key and the position alone: not on its
neighbours, on the division of its prompt, or on whether it was preempted.
"""

import functools
import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.seeds import random_key
from deepseek_jax.serve.pages import NULL, PAGE_SIZE, PagePool, root
from deepseek_jax.serve.sampler import permitted, sample
from deepseek_jax.serve.scheduler import Part, Request, Scheduler

LEAST_TOKENS, LEAST_PAGES = 16, 4  # of a program: smaller ones would save little
ALL = 0xFFFFFFFF  # a word of `allowed_RW` that allows its 32 tokens
Weights = tuple[Tree, Tree]  # parameters and router biases


class Constraint(Protocol):
    """Which tokens a request may draw next, as the tokens before them decide; its state is of one request alone.

    The engine waits for a token before it plans the next one, which costs such a request one step of latency.
    """

    def allowed(self) -> np.ndarray | None:
        """Returns uint32 words: bit v % 32 of word v // 32 allows token v, at least one does. None allows all."""

    def push(self, token: int) -> None:
        """Takes the next token."""


@dataclass(frozen=True)
class Sampling:
    """How a request draws, and when it ends."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draws from the fewest likeliest tokens whose probabilities add up to it
    seed: int = 0
    stop_ids: Sequence[int] = ()  # ids that end it; they are part of the output
    salt: bytes = b""  # requests with other salts share no pages
    constraint: Constraint | None = None  # None draws from the whole vocabulary


class Output(NamedTuple):
    """New tokens of a request. `ending` is "" while it runs, "stop" after a stop id, "length" at its last position."""

    request: Request
    ids: list[int]
    ending: str


@dataclass(eq=False)
class _Row:
    """The caller's part of a request: how it draws, and its place in `last_R`, -1 for none."""

    sampling: Sampling
    key: np.ndarray  # raw data of the random key
    slot: int = -1
    is_constrained: bool = False  # whether its place in `allowed_RW` counts for its next token


class Engine:
    """Runs requests to a model.

    Args:
        definition: of the model (`layers.base.split`).
        weights: its parameters and router biases.
        n_positions: largest number of tokens of a sequence.
        n_pages: pages of the pool, one of which is padding; by default enough for `n_rows` sequences of any length.
        n_rows: requests that run at the same time.
        chunk: tokens of a prompt that one step computes at most.
        n_ahead: steps that may run on the device before the host has seen the tokens of the first.
        matmul_precision: as for `jax.default_matmul_precision`.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        weights: Weights,
        n_positions: int,
        *,
        n_pages: int | None = None,
        n_rows: int = 16,
        chunk: int = 256,
        page_size: int = PAGE_SIZE,
        n_ahead: int = 1,
        matmul_precision: str | None = None,
    ):
        self.definition, self.weights, self.matmul_precision = definition, weights, matmul_precision
        self.n_positions, self.n_ahead = n_positions, n_ahead
        n_pages = n_pages or 1 + n_rows * -(-n_positions // page_size)
        self.pages = PagePool(n_pages, page_size)
        self.scheduler = Scheduler(self.pages, n_rows, budget=n_rows + chunk, chunk=chunk)
        model: Any = bind(definition, *weights)
        self._pool = model.pool(n_pages, page_size)
        self._last_R = jnp.zeros(n_rows + 1, jnp.int32)  # the last place is that of padding
        n_words = -(-model.head.weight_DV.shape[1] // 32)
        self._allowed_RW = jnp.full((n_rows + 1, n_words), ALL, jnp.uint32)  # the last place allows every token
        self._slots = list(range(n_rows))
        self._with_slot: list[_Row] = []
        self._flight: deque[list[tuple[Request, jax.Array, int]]] = deque()
        self._programs: dict[tuple, jax.stages.Compiled] = {}  # by kind and shapes of the arguments

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Adds a request; raises UserError if it could never run."""
        key = np.asarray(jax.random.key_data(random_key(sampling.seed)))
        n_positions = min(len(prompt) + sampling.max_new_tokens, self.n_positions)
        row, is_stepwise = _Row(sampling, key), sampling.constraint is not None
        request = Request(prompt, n_positions, root(b"", sampling.salt), row, is_stepwise)
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request without further output."""
        self.scheduler.end(request)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.scheduler.running or self.scheduler.waiting or self._flight)

    def step(self) -> list[Output]:
        """Starts the next step, and returns what was drawn in the one that is `n_ahead` before it."""
        parts = self.scheduler.plan()
        if parts:
            self._flight.append(self._start(parts))
        outputs: list[Output] = []
        while len(self._flight) > self.n_ahead or (self._flight and not parts):
            outputs += self._seen(self._flight.popleft())
        return outputs

    def replace_weights(self, weights: Weights) -> None:
        """Changes the weights; what the cache holds of the old ones is not found by later prompts."""
        self.weights = weights
        self.pages.forget()

    def compile(self) -> int:
        """Compiles all programs that requests can need, in parallel; returns their number."""
        no_slot = len(self._last_R) - 1
        widths = _sizes(LEAST_PAGES, -(-self.n_positions // self.pages.page_size))
        lengths = _sizes(LEAST_TOKENS, min(self.scheduler.chunk, self.n_positions))
        needed: list[tuple[bool, dict[str, np.ndarray]]] = []
        for width, draws in itertools.product(widths, (False, True)):
            for n_rows in _sizes(1, self.scheduler.n_rows):
                rows = _rows([], n_rows, width, no_slot, draws)
                needed.append((False, rows | {"ids_B": np.zeros(n_rows, np.int32)}))
            for length in lengths:
                ids = {"ids_BT": np.zeros((1, length), np.int32), "n_B": np.ones(1, np.int32)}
                needed.append((True, _rows([], 1, width, no_slot, draws) | ids))
        self._allow(no_slot, np.full(self._allowed_RW.shape[1], ALL, np.uint32))
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda one: self._compiled(*one), needed))
        return len(self._programs)

    def _start(self, parts: list[Part]) -> list[tuple[Request, jax.Array, int]]:
        """Starts the programs of a step; returns where each drawn token will be."""
        self._assign_slots([part.request for part in parts])
        no_slot, places = len(self._last_R) - 1, []
        self._constrain([part.request.options for part in parts if part.n_draws])
        for part in parts:
            if part.n_tokens > 1:
                drawn_1 = self._run(True, _long(part, self.pages.page_size, no_slot))
                places += [(part.request, drawn_1, 0)] if part.n_draws else []
        singles = [part for part in parts if part.n_tokens == 1]
        if singles:
            drawn_B = self._run(False, _short(singles, self.pages.page_size, no_slot))
            places += [(part.request, drawn_B, row) for row, part in enumerate(singles) if part.n_draws]
        return places

    def _run(self, is_long: bool, arguments: dict[str, np.ndarray]) -> jax.Array:
        program = self._compiled(is_long, arguments)
        drawn_B, self._pool, self._last_R = program(
            self.weights, self._pool, self._last_R, self._allowed_RW, **arguments
        )
        return drawn_B

    def _constrain(self, rows: list[_Row]) -> None:
        """Puts what each of these rows may draw in its place on the device."""
        for row in rows:
            allowed_W = row.sampling.constraint.allowed() if row.sampling.constraint else None
            row.is_constrained = allowed_W is not None
            if allowed_W is not None:
                words_W = np.zeros(self._allowed_RW.shape[1], np.uint32)
                words_W[: len(allowed_W)] = allowed_W
                self._allow(row.slot, words_W)

    def _allow(self, slot: int, words_W: np.ndarray) -> None:
        self._allowed_RW = _with_row(self._allowed_RW, words_W, np.int32(slot))

    def _compiled(self, is_long: bool, arguments: dict[str, np.ndarray]) -> jax.stages.Compiled:
        key = (is_long, *((name, array.shape) for name, array in sorted(arguments.items())))
        if key not in self._programs:
            program = self._extend_program if is_long else self._decode_program
            jitted = jax.jit(program, donate_argnames=("pool", "last_R"))
            state = (self.weights, self._pool, self._last_R, self._allowed_RW)
            self._programs[key] = jitted.lower(*state, **arguments).compile()
        return self._programs[key]

    def _seen(self, places: list[tuple[Request, jax.Array, int]]) -> list[Output]:
        outputs = []
        for request, drawn_B, row in places:
            if request.has_ended:
                continue
            token = int(np.asarray(drawn_B)[row])
            self.scheduler.record(request, [token])
            if request.options.sampling.constraint:
                request.options.sampling.constraint.push(token)
            ending = "stop" if token in request.options.sampling.stop_ids else ""
            if not ending and len(request.tokens) == request.n_positions:
                ending = "length"
            if ending:
                self.scheduler.end(request)
            outputs.append(Output(request, [token], ending))
        return outputs

    def _assign_slots(self, requests: list[Request]) -> None:
        """Gives each of these a place in `last_R`, of which those that no longer run have none."""
        running = {request.options for request in self.scheduler.running}
        for row in [row for row in self._with_slot if row not in running]:
            self._slots.append(row.slot)
            row.slot = -1
            self._with_slot.remove(row)
        for row in (request.options for request in requests):
            if row.slot < 0:
                row.slot = self._slots.pop()
                self._with_slot.append(row)

    def _extend_program(
        self,
        weights: Weights,
        pool: Tree,
        last_R: jax.Array,
        allowed_RW: jax.Array,
        ids_BT: jax.Array,
        n_B: jax.Array,
        **rows: jax.Array,
    ) -> tuple[jax.Array, Tree, jax.Array]:
        """One part of a prompt (B = 1) of `n_B` tokens; the token after it is drawn, and matters if it is the last."""
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self.definition, *weights)
            real_BT = jnp.arange(ids_BT.shape[1]) < n_B[:, None]
            h_BTD, pool = model.extend_in_pages(ids_BT, rows["start_B"][0], pool, rows["table_BN"], real_BT)
            logits_BV = model.head(jnp.take_along_axis(h_BTD, (n_B - 1)[:, None, None], axis=1))[:, 0]
        return _drawn(logits_BV, rows["start_B"] + n_B, pool, last_R, allowed_RW, rows)

    def _decode_program(
        self,
        weights: Weights,
        pool: Tree,
        last_R: jax.Array,
        allowed_RW: jax.Array,
        ids_B: jax.Array,
        **rows: jax.Array,
    ) -> tuple[jax.Array, Tree, jax.Array]:
        """One token per row: that of `ids_B`, or where it is negative the one that the row drew last."""
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self.definition, *weights)
            ids_B = jnp.where(ids_B < 0, last_R[rows["slot_B"]], ids_B)
            real_B = rows["slot_B"] < len(last_R) - 1
            logits_BTV, pool = model.decode_in_pages(
                *(ids_B[:, None], rows["start_B"][:, None], pool, rows["table_BN"], real_B[:, None])
            )
        return _drawn(logits_BTV[:, 0], rows["start_B"] + 1, pool, last_R, allowed_RW, rows)


def _drawn(
    logits_BV: jax.Array,
    positions_B: jax.Array,
    pool: Tree,
    last_R: jax.Array,
    allowed_RW: jax.Array,
    rows: dict[str, jax.Array],
) -> tuple[jax.Array, Tree, jax.Array]:
    """Draws the tokens for `positions_B`; returns them, the pool, and the last tokens of all slots."""
    if "key_BK" in rows:
        logits_BV = permitted(logits_BV, allowed_RW[rows["mask_B"]])
        key_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows["key_BK"]), positions_B)
        drawn_B = sample(logits_BV, key_B, rows["temperature_B"], rows["top_p_B"])
    else:
        drawn_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return drawn_B, pool, last_R.at[rows["slot_B"]].set(drawn_B)


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(allowed_RW: jax.Array, words_W: jax.Array, slot: jax.Array) -> jax.Array:
    return allowed_RW.at[slot].set(words_W)


def _long(part: Part, page_size: int, no_slot: int) -> dict[str, np.ndarray]:
    """The arguments of one part of a prompt."""
    request, start, n_tokens, _ = part
    ids_BT = np.zeros((1, bucket(n_tokens, LEAST_TOKENS)), np.int32)
    ids_BT[0, :n_tokens] = request.tokens[start : start + n_tokens]
    rows = _rows([part], 1, _width([part], page_size), no_slot, _draw([part]))
    return rows | {"ids_BT": ids_BT, "n_B": np.array([n_tokens], np.int32)}


def _short(parts: list[Part], page_size: int, no_slot: int) -> dict[str, np.ndarray]:
    """The arguments of parts of one token each."""
    ids_B = np.full(bucket(len(parts), 1), -1, np.int32)
    for row, part in enumerate(parts):
        if part.start < len(part.request.tokens):
            ids_B[row] = part.request.tokens[part.start]
    return _rows(parts, len(ids_B), _width(parts, page_size), no_slot, _draw(parts)) | {"ids_B": ids_B}


def _rows(parts: list[Part], n_rows: int, width: int, no_slot: int, draws: bool) -> dict[str, np.ndarray]:
    """What both programs need of their rows, padded to `n_rows` and to `width` pages.

    Where none `draws`, there is nothing to draw with: the program takes the likeliest tokens and makes no noise.
    """
    rows = {
        "table_BN": np.full((n_rows, width), NULL, np.int32),
        "start_B": np.zeros(n_rows, np.int32),
        "slot_B": np.full(n_rows, no_slot, np.int32),
    }
    if draws:
        key = jax.eval_shape(lambda: jax.random.key_data(random_key(0)))
        rows |= {
            "key_BK": np.zeros((n_rows, *key.shape), key.dtype),
            "temperature_B": np.zeros(n_rows, np.float32),
            "top_p_B": np.ones(n_rows, np.float32),
            "mask_B": np.full(n_rows, no_slot, np.int32),
        }
    for row, (request, start, _, _) in enumerate(parts):
        pages, options = request.table.pages[:width], request.options
        rows["table_BN"][row, : len(pages)] = pages
        values = {"start_B": start, "slot_B": options.slot, "key_BK": options.key}
        values |= {"temperature_B": options.sampling.temperature, "top_p_B": options.sampling.top_p}
        values["mask_B"] = options.slot if options.is_constrained else no_slot
        for name in values.keys() & rows.keys():
            rows[name][row] = values[name]
    return rows


def _draw(parts: list[Part]) -> bool:
    """Whether any of these rows draws at random, or not from the whole vocabulary."""
    rows = [part.request.options for part in parts]
    return any(row.sampling.temperature > 0 or row.is_constrained for row in rows)


def _width(parts: list[Part], page_size: int) -> int:
    """Pages that the longest of these rows has, padded."""
    return bucket(max(-(-(part.start + part.n_tokens) // page_size) for part in parts), LEAST_PAGES)


def bucket(n: int, least: int) -> int:
    """Returns `n` rounded up to a power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def _sizes(least: int, most: int) -> list[int]:
    """All that `bucket` can give for numbers up to `most`."""
    return [least << i for i in range((bucket(most, least) // least).bit_length())]
