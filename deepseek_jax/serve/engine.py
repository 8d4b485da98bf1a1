"""Continuous batching on one device: requests come and go while steps run over one pool of pages.

    engine.submit(prompt, Sampling(…)) -> request        any time
    engine.step() -> outputs                             plans a step, starts it, and returns what an earlier one drew

A step of the scheduler becomes one program for the rows that compute one token each, and one for each longer part of a
prompt; small programs draw from what they give (`programs`). Sizes are padded to powers of two, so that few programs
are compiled; `compile` does it beforehand. The token that a row drew last stays on the device (`last_R`), where the
next step reads it, so the host looks at tokens one step late and the device does not wait. With `n_steps` K, a step in
which no prompt is computed and nobody waits draws K tokens per row before the host looks; stop ids are recognised on
the device. What a row draws depends on its logits, its key and the position alone: not on its neighbours, on the
division of its prompt, on K, or on whether it was preempted.
"""

import functools
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.bounds import whole
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind
from deepseek_jax.serve import sampling as drawing
from deepseek_jax.serve.memory import Memory
from deepseek_jax.serve.pages import NULL, PAGE_SIZE, PagePool, root
from deepseek_jax.serve.programs import Call, Programs, Rows, Weights
from deepseek_jax.serve.sampler import Scores
from deepseek_jax.serve.sampling import MOST_TOP, Kind, Sampling
from deepseek_jax.serve.scheduler import Part, Request, Scheduler
from deepseek_jax.serve.speculation import ENDED, PER_STEP

LEAST_TOKENS, LEAST_PAGES = 16, 4  # of a program: smaller ones would save little
DRAWN = -1  # in place of the token that a row drew last
ALL = 0xFFFFFFFF  # a word of `allowed_RW` that allows its 32 tokens


class Logprob(NamedTuple):
    """The log-probability of a token under the model's own distribution, and the likeliest tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]]  # descending


class Output(NamedTuple):
    """New tokens of a request. `ending` is "" while it runs, "stop" after a stop id, "length" at its last position."""

    request: Request
    ids: list[int]
    ending: str
    logprobs: Sequence[Logprob] = ()  # of `ids`, if the request asked for them
    # of the prompt, None for its first token; with the first output, if the request asked for them
    prompt_logprobs: Sequence[Logprob | None] = ()


@dataclass(eq=False)
class _Row:
    """The caller's part of a request: how it draws, and its place in `last_R`, -1 for none."""

    sampling: Sampling
    slot: int = -1
    has_draft: bool = False  # whether there is a draft of its next token
    is_constrained: bool = False  # whether its place in `allowed_RW` counts for its next token
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)


class _Drawn(NamedTuple):
    """What a step draws for a request: a row of arrays that may not be computed yet, with `n` tokens at most."""

    request: Request
    row: int
    n: int
    id_BT: jax.Array
    scores_BT: Scores | None


class _Recited(NamedTuple):
    """Log-probabilities of a part of a prompt: of the `n` tokens after position `start`."""

    request: Request
    start: int
    n: int
    scores_BT: Scores


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
        n_steps: most tokens per row that one step draws: more take less time per token, and make a stream less even.
        n_drafts: 1 lets multi-token prediction draft a second token for each (`speculation`); the text is the same.
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
        n_steps: int = 1,
        n_drafts: int = 0,
        matmul_precision: str | None = None,
    ):
        whole(1, 2**16).check("n_steps", n_steps)
        self.weights, self.n_positions = weights, n_positions
        self.n_ahead, self.n_steps, self.n_drafts = n_ahead, n_steps, n_drafts
        self.n_drafted = self.n_accepted = 0  # drafts that were verified, and those that were right
        n_pages = n_pages or 1 + n_rows * -(-n_positions // page_size)
        self.pages = PagePool(n_pages, page_size, look_ahead=n_drafts)
        self.scheduler = Scheduler(self.pages, n_rows, budget=n_rows + chunk, chunk=chunk)
        self.programs = Programs(definition, matmul_precision)
        model: Any = bind(definition, *weights)
        self.vocab_size, self._d_model = model.embedding.table_VD.shape
        self._dtype = model.run.compute
        _check_drafts(n_drafts, model)
        self._memory = Memory.of(model, n_pages, page_size, n_drafts > 0)
        self._last_R = jnp.zeros(n_rows + 1, jnp.int32)  # the last place is that of padding
        self._draft_R = jnp.zeros_like(self._last_R)  # of the token after the last one
        n_words = -(-self.vocab_size // 32)
        self._allowed_RW = jnp.full((n_rows + 1, n_words), ALL, jnp.uint32)  # the last place allows every token
        self._slots = list(range(n_rows))
        self._with_slot: list[_Row] = []
        self._flight: deque[list[_Drawn | _Recited]] = deque()

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Adds a request; raises UserError if it could never run, or for a value out of range."""
        sampling.check(self.vocab_size)
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            ids = f"ids from {min(prompt)} to {max(prompt)}"
            raise UserError(f"a prompt with {ids}: expected 0 to {self.vocab_size - 1}.")
        n_positions = min(len(prompt) + sampling.max_new_tokens, self.n_positions)
        options = _Row(sampling, prompt_logprobs=[None] * len(prompt) if sampling.prompt_logprobs else [])
        request = Request(
            prompt,
            n_positions,
            root(b"", sampling.salt),
            options,
            is_stepwise=sampling.constraint is not None or self.n_drafts > 0,
            most_draws=1 if sampling.constraint else None,
            reads_cache=not sampling.prompt_logprobs,
        )
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
        parts = self.scheduler.plan(self.n_steps, 1 + self.n_drafts)
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
        widths = _sizes(LEAST_PAGES, -(-self.n_positions // self.pages.page_size))
        lengths = _sizes(LEAST_TOKENS, min(self.scheduler.chunk, self.n_positions))
        rows = _sizes(1, self.scheduler.n_rows)
        needed = [self._extend([], length, width) for length, width in itertools.product(lengths, widths)]
        needed += self._needed_by_rows(rows, widths)
        if self.n_drafts:
            needed += [self._foresee([], length, width) for length, width in itertools.product(lengths, widths)]
        for n_top in (0, MOST_TOP):
            needed += [self._score(n_rows, n_top) for n_rows in rows]
            needed += [self._recite([], length, n_top) for length in lengths]
        self._allow(len(self._last_R) - 1, np.full(self._allowed_RW.shape[1], ALL, np.uint32))
        self.programs.compile(needed)
        return len(self.programs)

    def _needed_by_rows(self, rows: list[int], widths: list[int]) -> list[Call]:
        """The programs of rows that compute one token each, and those that draw."""
        needed: list[Call] = []
        kinds: tuple[Kind, ...] = ("greedy", "random", "shaped")
        if not self.n_drafts:
            needed += [self._decode([], n_rows, width) for n_rows, width in itertools.product(rows, widths)]
        for n_rows, kind in itertools.product([1] if self.n_drafts else rows, kinds):
            needed += [self._draw([], n_rows, kind, width) for width in (widths if kind == "shaped" else widths[:1])]
        for n_rows, kind, width in itertools.product(rows, kinds, widths):
            if self.n_drafts:
                needed += [self._speculate([], n_rows, width, kind, -1, n) for n in sorted({1, self.n_steps})]
            elif self.n_steps > 1 and kind != "shaped":
                needed.append(self._steps([], n_rows, width, kind, -1))
        return needed

    def _start(self, parts: list[Part]) -> list[_Drawn | _Recited]:
        """Starts the programs of a step; returns where what they give will be."""
        self._assign_slots([part.request for part in parts])
        self._constrain([part.request.options for part in parts if part.n_draws])
        found: list[_Drawn | _Recited] = []
        short = [part for part in parts if not self._is_long(part)]
        for part in [part for part in parts if self._is_long(part)]:
            found += self._start_long(part)
        if short and self.n_drafts:
            found += self._start_speculation(short)
        elif any(part.n_draws > 1 for part in short):
            found += self._start_steps(short)
        elif short:
            n_rows, width = bucket(len(short), 1), self._width(short)
            logits_BV, self._memory = self.programs.run(self._decode(short, n_rows, width))
            found += self._start_drawing(short, logits_BV, width)
        return found

    def _start_long(self, part: Part) -> list[_Drawn | _Recited]:
        """One part of a prompt, and its log-probabilities if they are to be reported."""
        length, width, n_top = bucket(part.n_tokens, LEAST_TOKENS), self._width([part]), _sampling(part).n_top
        h_BTD, logits_BV, self._memory = self.programs.run(self._extend([part], length, width))
        found: list[_Drawn | _Recited] = []
        n_recited = min(part.n_tokens, len(part.request.prompt) - 1 - part.start)
        if _sampling(part).prompt_logprobs and n_recited > 0:
            scores_BT = self.programs.run(self._recite([part], length, n_top, h_BTD))
            found.append(_Recited(part.request, part.start, n_recited, scores_BT))
        if part.n_draws:
            found += self._start_drawing([part], logits_BV, width)
        if self.n_drafts:
            self._draft_R, self._memory = self.programs.run(self._foresee([part], length, width, h_BTD))
            part.request.options.has_draft = part.n_draws > 0
        return found

    def _start_drawing(self, parts: list[Part], logits_BV: jax.Array, width: int) -> list[_Drawn]:
        """Draws one token per row."""
        kind = _kind(parts)
        n_rows, n_top = len(logits_BV), max(_sampling(part).n_top for part in parts)
        id_BT, self._last_R = self.programs.run(self._draw(parts, n_rows, kind, width, logits_BV))
        scores_BT = self.programs.run(self._score(n_rows, n_top, logits_BV, id_BT)) if n_top >= 0 else None
        return _all_drawn(parts, id_BT, scores_BT)

    def _start_steps(self, parts: list[Part]) -> list[_Drawn]:
        """Several steps of rows that all draw."""
        kind = _kind(parts)
        n_rows, n_top = bucket(len(parts), 1), max(_sampling(part).n_top for part in parts)
        call = self._steps(parts, n_rows, self._width(parts), kind, n_top)
        id_BT, scores_BT, self._memory, self._last_R = self.programs.run(call)
        return _all_drawn(parts, id_BT, scores_BT)

    def _start_speculation(self, parts: list[Part]) -> list[_Drawn]:
        """One step or `n_steps`, each of which draws up to two tokens per row."""
        kind = _kind(parts)
        n_rows, n_top = bucket(len(parts), 1), max(_sampling(part).n_top for part in parts)
        n_steps = self.n_steps if any(part.n_draws > PER_STEP for part in parts) else 1
        call = self._speculate(parts, n_rows, self._width(parts), kind, n_top, n_steps)
        id_BT, scores_BT, self._memory, self._last_R, self._draft_R = self.programs.run(call)
        return _all_drawn(parts, id_BT, scores_BT)

    def _extend(self, parts: list[Part], length: int, width: int) -> Call:
        ids_BT, n_B = np.zeros((1, length), np.int32), np.ones(1, np.int32)
        for row, (request, start, n_tokens, _) in enumerate(parts):
            ids_BT[row, :n_tokens], n_B[row] = request.tokens[start : start + n_tokens], n_tokens
        rows = {"ids_BT": ids_BT, "n_B": n_B} | _places(parts, 1, width)
        return Call("extend", {"weights": self.weights, "memory": self._memory}, rows)

    def _decode(self, parts: list[Part], n_rows: int, width: int) -> Call:
        ids_B = np.full(n_rows, DRAWN, np.int32)
        for row, (request, start, _, _) in enumerate(parts):
            if start < len(request.tokens):
                ids_B[row] = request.tokens[start]
        rows = {"ids_B": ids_B} | _places(parts, n_rows, width) | self._slots_of(parts, n_rows)
        return Call("decode", {"weights": self.weights, "memory": self._memory, "last_R": self._last_R}, rows)

    def _draw(self, parts: list[Part], n_rows: int, kind: Kind, width: int, logits_BV: jax.Array | None = None) -> Call:
        position_B = _numbers([part.start + part.n_tokens for part in parts], n_rows)
        rows = {"position_B": position_B} | self._slots_of(parts, n_rows) | self._how(parts, n_rows, kind)
        state: dict[str, Any] = {"logits_BV": self._logits(n_rows, logits_BV), "last_R": self._last_R}
        if kind == "shaped":
            state |= {"ids_PS": self._memory.ids_PS, "allowed_RW": self._allowed_RW}
            rows |= {"table_BN": _places(parts, n_rows, width)["table_BN"]}
        return Call("draw", state, rows)

    def _steps(self, parts: list[Part], n_rows: int, width: int, kind: Kind, n_top: int) -> Call:
        _, state, rows, _ = self._decode(parts, n_rows, width)
        rows |= {"n_draws_B": _numbers([part.n_draws for part in parts], n_rows)} | self._how(parts, n_rows, kind)
        rows |= {"stop_BJ": drawing.stops([_sampling(part) for part in parts], n_rows)}
        state |= {"allowed_RW": self._allowed_RW} if kind == "shaped" else {}
        return Call("steps", state, rows, {"n_steps": self.n_steps, "n_top": self._n_top(n_top)})

    def _speculate(self, parts: list[Part], n_rows: int, width: int, kind: Kind, n_top: int, n_steps: int) -> Call:
        _, state, rows, static = self._steps(parts, n_rows, width, kind, n_top)
        rows = {name: array for name, array in rows.items() if name != "ids_B"}
        return Call("speculate", state | {"draft_R": self._draft_R}, rows, {**static, "n_steps": n_steps})

    def _foresee(self, parts: list[Part], length: int, width: int, h_BTD: jax.Array | None = None) -> Call:
        _, state, rows, _ = self._extend(parts, length, width)
        next_BT = np.zeros_like(rows.pop("ids_BT"))
        for row, (request, start, n_tokens, _) in enumerate(parts):
            ids = request.tokens[start + 1 : start + 1 + n_tokens]
            next_BT[row, :n_tokens] = [*ids, *[DRAWN] * (n_tokens - len(ids))]
        state |= {"last_R": self._last_R, "draft_R": self._draft_R, "h_BTD": self._hidden(length, h_BTD)}
        return Call("foresee", state, rows | {"next_BT": next_BT} | self._slots_of(parts, 1))

    def _score(
        self, n_rows: int, n_top: int, logits_BV: jax.Array | None = None, id_BT: jax.Array | None = None
    ) -> Call:
        abstract = jax.ShapeDtypeStruct((n_rows, 1), jnp.int32)
        rows = {"id_BT": abstract if id_BT is None else id_BT}
        return Call("score", {"logits_BV": self._logits(n_rows, logits_BV)}, rows, {"n_top": self._n_top(n_top)})

    def _recite(self, parts: list[Part], length: int, n_top: int, h_BTD: jax.Array | None = None) -> Call:
        next_BT = np.zeros((1, length), np.int32)
        for row, (request, start, _, _) in enumerate(parts):
            ids = request.prompt[start + 1 : start + 1 + length]
            next_BT[row, : len(ids)] = ids
        state = {"weights": self.weights, "h_BTD": self._hidden(length, h_BTD)}
        return Call("recite", state, {"next_BT": next_BT}, {"n_top": self._n_top(n_top)})

    def _logits(self, n_rows: int, logits_BV: jax.Array | None) -> Any:
        return jax.ShapeDtypeStruct((n_rows, self.vocab_size), jnp.float32) if logits_BV is None else logits_BV

    def _hidden(self, length: int, h_BTD: jax.Array | None) -> Any:
        return jax.ShapeDtypeStruct((1, length, self._d_model), self._dtype) if h_BTD is None else h_BTD

    def _n_top(self, n_top: int) -> int:
        return min(n_top, self.vocab_size)

    def _is_long(self, part: Part) -> bool:
        """Whether a part is computed by itself: several tokens, or one that needs more than a token to be drawn."""
        request, following = part.request, part.start + 1
        if part.n_tokens > 1 or (_sampling(part).prompt_logprobs and following < len(request.prompt)):
            return True
        return self.n_drafts > 0 and not (request.options.has_draft and following == len(request.tokens))

    def _width(self, parts: list[Part]) -> int:
        """Pages that the longest of these rows has, padded."""
        return bucket(max(-(-part.n_positions // self.pages.page_size) for part in parts), LEAST_PAGES)

    def _slots_of(self, parts: list[Part], n_rows: int) -> Rows:
        """The places of rows in `last_R`; that of padding is the last one."""
        return {"slot_B": _numbers([part.request.options.slot for part in parts], n_rows, len(self._last_R) - 1)}

    def _how(self, parts: list[Part], n_rows: int, kind: Kind) -> Rows:
        """How rows draw; if some are shaped also where their prompts end, and their places in `allowed_RW`."""
        found = drawing.arguments([_sampling(part) for part in parts], n_rows, kind)
        if kind != "shaped":
            return found
        n_prompts, everything = [len(part.request.prompt) for part in parts], len(self._last_R) - 1
        options = [part.request.options for part in parts]
        masks = [row.slot if row.is_constrained else everything for row in options]
        return found | {"n_prompt_B": _numbers(n_prompts, n_rows), "mask_B": _numbers(masks, n_rows, everything)}

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

    def _seen(self, step: list[_Drawn | _Recited]) -> list[Output]:
        """What a step gave, once it has run."""
        outputs = []
        for found in step:
            if found.request.has_ended:
                continue
            if isinstance(found, _Drawn):
                outputs.append(self._output(found))
            else:
                known = found.request.options.prompt_logprobs
                n_top, places = found.request.options.sampling.logprobs, np.arange(found.n)
                known[found.start + 1 : found.start + 1 + found.n] = _logprobs(found.scores_BT, 0, places, n_top)
        return outputs

    def _output(self, found: _Drawn) -> Output:
        request, sampling = found.request, found.request.options.sampling
        id_T = np.asarray(found.id_BT)[found.row]
        places = np.flatnonzero(id_T != ENDED)[: found.n]
        ids = id_T[places].tolist()
        ids = ids[: next((place for place, token in enumerate(ids, 1) if token in sampling.stop_ids), len(ids))]
        self._count_drafts(id_T, found.n)
        is_first = len(request.tokens) == len(request.prompt)
        self.scheduler.record(request, ids, found.n)
        for token in ids if sampling.constraint else ():
            sampling.constraint.push(token)
        is_full = len(request.tokens) == request.n_positions
        ending = "stop" if ids[-1] in sampling.stop_ids else "length" if is_full else ""
        if ending:
            self.scheduler.end(request)
        logprobs: list[Logprob] = []
        if sampling.logprobs is not None and found.scores_BT is not None:
            logprobs = _logprobs(found.scores_BT, found.row, places[: len(ids)], sampling.logprobs)
        return Output(request, ids, ending, logprobs, request.options.prompt_logprobs if is_first else ())

    def _count_drafts(self, id_T: np.ndarray, n_planned: int) -> None:
        """Counts the drafts of a row, of which each step verified one unless a single token was left to be drawn."""
        if len(id_T) == 1:
            return
        is_drawn_T = (id_T != ENDED).reshape(-1, PER_STEP)
        n_before_T = np.cumsum(is_drawn_T.sum(axis=1)) - is_drawn_T.sum(axis=1)
        self.n_drafted += int((is_drawn_T[:, 0] & (n_planned - n_before_T > 1)).sum()) if self.n_drafts else 0
        self.n_accepted += int(is_drawn_T[:, 1].sum()) if self.n_drafts else 0

    def _assign_slots(self, requests: list[Request]) -> None:
        """Gives each of these a place in `last_R`, of which those that no longer run have none."""
        running = {request.options for request in self.scheduler.running}
        for row in [row for row in self._with_slot if row not in running]:
            self._slots.append(row.slot)
            row.slot, row.has_draft = -1, False
            self._with_slot.remove(row)
        for row in (request.options for request in requests):
            if row.slot < 0:
                row.slot = self._slots.pop()
                self._with_slot.append(row)


def _sampling(part: Part) -> Sampling:
    return part.request.options.sampling


def _all_drawn(parts: list[Part], id_BT: jax.Array, scores_BT: Scores | None) -> list[_Drawn]:
    return [_Drawn(part.request, row, part.n_draws, id_BT, scores_BT) for row, part in enumerate(parts) if part.n_draws]


def _check_drafts(n_drafts: int, model: Any) -> None:
    """Raises UserError if the model cannot make so many drafts."""
    whole(0, 1).check("n_drafts", n_drafts)
    if n_drafts and not getattr(model, "mtp", None):
        raise UserError("n_drafts=1: the model has no multi-token prediction, which makes drafts. Set n_drafts to 0.")


def _places(parts: list[Part], n_rows: int, width: int) -> Rows:
    """Where rows begin and their pages, padded to `n_rows` and to `width` pages."""
    table_BN = np.full((n_rows, width), NULL, np.int32)
    for row, part in enumerate(parts):
        pages = part.request.table.pages[:width]
        table_BN[row, : len(pages)] = pages
    return {"table_BN": table_BN, "start_B": _numbers([part.start for part in parts], n_rows)}


def _kind(parts: list[Part]) -> Kind:
    """What the drawing of these rows needs."""
    if any(part.request.options.is_constrained for part in parts):
        return "shaped"
    return drawing.kind([_sampling(part) for part in parts])


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(allowed_RW: jax.Array, words_W: jax.Array, slot: jax.Array) -> jax.Array:
    return allowed_RW.at[slot].set(words_W)


def _numbers(values: Sequence[int], n_rows: int, padding: int = 0) -> np.ndarray:
    """One number per row."""
    return np.array([*values, *[padding] * (n_rows - len(values))], np.int32)


def _logprobs(scores_BT: Scores, row: int, places: np.ndarray, n_top: int) -> list[Logprob]:
    """Of a row's tokens at some places, with the `n_top` likeliest."""
    logprob_T, top_TK, ids_TK = (np.asarray(array)[row, places].tolist() for array in scores_BT)
    tops = [list(zip(*both, strict=True))[:n_top] for both in zip(ids_TK, top_TK, strict=True)]
    return [Logprob(*one) for one in zip(logprob_T, tops, strict=True)]


def bucket(n: int, least: int) -> int:
    """Returns `n` rounded up to a power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def _sizes(least: int, most: int) -> list[int]:
    """All that `bucket` can give for numbers up to `most`."""
    return [least << i for i in range((bucket(most, least) // least).bit_length())]
