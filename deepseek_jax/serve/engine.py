"""Continuous batching: requests come and go while steps run over one pool of pages per device.

    engine.submit(prompt, Sampling(…)) -> request        any time
    engine.step() -> outputs                             plans a step, starts it, and returns what an earlier one drew

A step of the scheduler becomes one program for the rows that compute one token each, and one for each longer part of a
prompt; small programs draw from what they give (`programs`). Sizes are padded to powers of two, so that few programs
are compiled; `compile` does it beforehand. What devices hold of requests is in `calls`; there too stays the token that
a row drew last, where the next step reads it, so the host looks at tokens one step late and the device does not wait.
With `n_steps` K, a step in which no prompt is computed and nobody waits draws K tokens per row before the host looks;
stop ids are recognised on the device. What a row draws depends on its logits, its key and the position alone: not on
its neighbours, on the division of its prompt, on K, or on whether it was preempted.

On several devices (`replicas`) each request belongs to one of them, the one with the fewest when it comes. Each device
has a scheduler and pages of its own; all run the same programs at the same time, since their tokens share the experts.
"""

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from deepseek_jax.bounds import whole
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind
from deepseek_jax.parallel.replicas import Replicas
from deepseek_jax.serve import batches
from deepseek_jax.serve.batches import LEAST_PAGES, LEAST_TOKENS, Plans, bucket, buckets
from deepseek_jax.serve.calls import Calls, CallSizes
from deepseek_jax.serve.disk import DiskPages
from deepseek_jax.serve.memory import Sizes, page_size_for, shapes_of
from deepseek_jax.serve.outputs import Drawn, Logprob, Output, Recited, all_drawn, all_recited, logprobs_at
from deepseek_jax.serve.pages import PagePool, root
from deepseek_jax.serve.programs import Weights, checked_like, programs_for
from deepseek_jax.serve.ranks import Rank, Row
from deepseek_jax.serve.sampling import Sampling
from deepseek_jax.serve.scheduler import Part, Request, Scheduler
from deepseek_jax.serve.speculation import ENDED, PER_STEP


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
        n_steps: most tokens per row that one step draws, with drafts twice as many: more take less time per token, and
            make a stream less even.
        n_prompts: prompts of which one program computes a part at most, without drafts and on one device: more are
            faster, and need more programs.
        n_drafts: 1 lets multi-token prediction draft a second token for each (`speculation`); the text is the same.
        least_pages: pages of a row that programs read at least, a power of two: fewer are faster for short rows and
            need more programs.
        matmul_precision: as for `jax.default_matmul_precision`.
        replicas: devices, each of which has `n_rows` rows and `n_pages` pages; None: one device. The weights lie there.
        compiler_options: as for `jax.jit`.
        ends_early: whether a program of several steps ends with its last row (`programs.Programs`).
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
        page_size: int | None = None,
        n_ahead: int = 1,
        n_steps: int = 1,
        n_prompts: int = 1,
        n_drafts: int = 0,
        least_pages: int = LEAST_PAGES,
        matmul_precision: str | None = None,
        replicas: Replicas | None = None,
        compiler_options: dict[str, str | bool] | None = None,
        ends_early: bool = True,
    ):
        whole(1, 2**16).check("n_steps", n_steps)
        whole(1, 2**16).check("n_prompts", n_prompts)
        whole(1, 2**16).check("least_pages", least_pages)
        if least_pages & (least_pages - 1):
            raise UserError(f"least_pages={least_pages}: expected a power of two. Choose {bucket(least_pages, 1)}.")
        # drafts and log-probabilities of prompts are made one by one; devices may differ in who needs them
        self._n_prompts = 1 if n_drafts or replicas else min(n_prompts, n_rows)
        self.n_positions, self.n_rows, self.chunk = n_positions, n_rows, chunk
        self.n_ahead, self.n_steps, self.n_drafts = n_ahead, n_steps, n_drafts
        self.least_pages, self._ends_early = least_pages, ends_early
        self.n_drafted = self.n_accepted = 0  # drafts that were verified, and those that were right
        model: Any = bind(definition, *weights)
        page_size = page_size_for(model, page_size)
        # what attentions keep of running requests alone: no other request finds it, nor the disk
        self._has_rows = any(attention.has_rows for attention in model.attentions)
        self.page_size, n_pages = page_size, n_pages or 1 + n_rows * -(-n_positions // page_size)
        self.replicas, n_ranks = replicas, replicas.n if replicas else 1  # programs may be another engine's too
        self.ranks = [Rank(PagePool(n_pages, page_size, n_drafts), n_rows, chunk) for _ in range(n_ranks)]
        sizes = Sizes(n_pages, page_size, n_rows, n_drafts > 0)
        how = matmul_precision, replicas, compiler_options, ends_early
        self.programs = programs_for(definition, weights, sizes, *how)
        self.vocab_size, self._has_routes = model.embedding.table_VD.shape[0], model.run.routes
        _check_drafts(n_drafts, model)
        self.calls = Calls(
            *(model, weights, self.programs.empty(model)),
            page_size=page_size,
            n_rows=n_rows,
            n_drafts=n_drafts,
            n_steps=n_steps,
            replicas=replicas,
        )
        self._flight: deque[list[Drawn | Recited]] = deque()
        self._disk: DiskPages | None = None
        self._pads_to_largest = False  # whether all programs are those of the largest sizes

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Adds a request; raises UserError if it could never run, or for a value out of range."""
        sampling.check(self.vocab_size)
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            ids = f"ids from {min(prompt)} to {max(prompt)}"
            raise UserError(f"a prompt with {ids}: expected 0 to {self.vocab_size - 1}.")
        n_positions = min(len(prompt) + sampling.max_new_tokens, self.n_positions)
        rank = min(range(len(self.ranks)), key=lambda rank: self.ranks[rank].n_open)
        options = Row(sampling, rank, prompt_logprobs=[None] * len(prompt) if sampling.prompt_logprobs else [])
        request = Request(
            prompt,
            n_positions,
            root(b"", sampling.salt),
            options,
            is_stepwise=sampling.constraint is not None,
            most_draws=1 if sampling.constraint else None,
            reads_cache=self.finds_prompts and not sampling.prompt_logprobs,
        )
        self.ranks[rank].scheduler.add(request)
        if self._disk and request.reads_cache:
            self.calls.memory = self._disk.load(self.ranks[rank].pages, self.calls.memory, request.root, request.tokens)
        return request

    def keep_on_disk(self, folder: Path, most_bytes: int) -> DiskPages:
        """Keeps pages of the cache in a directory, and finds those of earlier engines with these weights there."""
        if len(self.ranks) > 1:
            raise UserError("pages are kept on the disk by an engine on one device. Leave out the mesh, or the disk.")
        if self._has_rows:
            raise UserError(
                "pages on the disk: this model's attention keeps a window that is in no page. Leave it out."
            )
        model: Any = bind(self.programs.definition, *self.weights)

        def shapes(n_pages: int) -> Any:
            return shapes_of(model, self.programs.sizes._replace(n_pages=n_pages))

        self._disk = DiskPages(folder, most_bytes, self.weights, shapes)
        return self._disk

    def cancel(self, request: Request) -> None:
        """Ends a request without further output."""
        self._scheduler(request).end(request)

    @property
    def weights(self) -> Weights:
        """The model's parameters and router biases."""
        return self.calls.weights

    @property
    def finds_prompts(self) -> bool:
        """Whether a prompt that begins as an earlier one is found in the cache: not where windows are in no page."""
        return not self._has_rows

    @property
    def most_positions(self) -> int:
        """Tokens of the longest sequence that the model can have and the cache can hold."""
        return min(self.n_positions, min(rank.pages.n_pages - 1 for rank in self.ranks) * self.page_size)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._flight or any(rank.n_open for rank in self.ranks))

    def step(self, n_steps: int | None = None) -> list[Output]:
        """Starts the next step, and returns what was drawn in the one that is `n_ahead` before it.

        It draws up to `n_steps` tokens per row, by default and at most as many as the engine's `n_steps`; with drafts
        up to twice as many.
        """
        most = min(self.n_steps, n_steps or self.n_steps)
        if self.n_drafts and not self._ends_early and self._all_end_within(PER_STEP * most):
            most = 1  # a program of several steps would mostly run on after that
        plans = [rank.scheduler.plan(most) for rank in self.ranks]
        if any(plans):
            self._flight.append(self._start(plans))
        outputs: list[Output] = []
        while len(self._flight) > self.n_ahead or (self._flight and not any(plans)):
            outputs += self._seen(self._flight.popleft())
        return outputs

    def replace_weights(self, weights: Weights) -> None:
        """Changes the weights, for others of the same form; later prompts find nothing of the old ones in the cache."""
        self.calls.use(checked_like(weights, self.weights))
        for rank in self.ranks:
            rank.pages.forget(request.table for request in rank.scheduler.running)
        if self._disk:
            self._disk.use(weights)

    def compile(self, stopped: threading.Event | None = None) -> int:
        """Compiles all programs that requests can need, in parallel; returns their number.

        Not those of several tokens per step that report log-probabilities, or draw with filters, penalties or biases:
        they are compiled when first asked for. With `stopped` this may run in another thread than requests do, after
        `compile_largest`, and ends early once it is set.
        """
        if stopped is None:
            self.calls.allow(self.n_rows, None)
        self.programs.compile(self.calls.needed(self._sizes), stopped)
        if stopped is None or not stopped.is_set():
            self._pads_to_largest = False
        return len(self.programs)

    def compile_largest(self) -> int:
        """Compiles the largest programs alone, in which requests run until `compile` has made the others.

        Returns their number.
        """
        self.calls.allow(self.n_rows, None)
        self.programs.compile(self.calls.needed(self._sizes.largest))
        self._pads_to_largest = True
        return len(self.programs)

    @property
    def _sizes(self) -> CallSizes:
        widths = buckets(self.least_pages, -(-self.n_positions // self.page_size))
        lengths = buckets(LEAST_TOKENS, min(self.chunk, self.n_positions))
        return CallSizes(lengths, widths, buckets(1, self.n_rows), buckets(1, self._n_prompts))

    def _start(self, plans: Plans) -> list[Drawn | Recited]:
        """Starts the programs of a step; returns where what they give will be."""
        for rank, plan in zip(self.ranks, plans, strict=True):
            rank.assign_slots([part.request for part in plan])
        self._constrain([part.request.options for plan in plans for part in plan if part.n_draws])
        found: list[Drawn | Recited] = []
        short = [[part for part in plan if not self._is_long(part)] for plan in plans]
        long = [[part for part in plan if self._is_long(part)] for plan in plans]
        groups = [batches.together(parts, self._n_prompts, batches.recites) for parts in long]
        for parts in itertools.zip_longest(*groups, fillvalue=[]):
            found += self._start_long(parts)
        if any(short) and self.n_drafts:
            found += self._start_speculation(short)
        elif self._suits_steps(short):
            found += self._start_steps(short)
        elif any(short):
            n_rows, width = self._n_rows(short), self._width(short)
            logits_BV, self.calls.memory = self.programs.run(self.calls.decode(short, n_rows, width))
            found += self._start_drawing(short, logits_BV, width)
        return found

    def _all_end_within(self, n_draws: int) -> bool:
        """Whether no running request has so many tokens left to be drawn."""
        return all(request.n_left < n_draws for rank in self.ranks for request in rank.scheduler.running)

    def _suits_steps(self, plans: Plans) -> bool:
        """Whether rows of one token each run by the program of several steps, if only for one of them.

        For one step it is the faster way where `compile` has made it, which it has for most ways of drawing, and where
        the program ends with the step.
        """
        n_draws = [part.n_draws for plan in plans for part in plan]
        if not n_draws or max(n_draws) > 1:
            return bool(n_draws)
        is_plain = batches.kind_of(plans) != "shaped" and batches.n_top_of(plans) < 0
        return self._ends_early and self.n_steps > 1 and min(n_draws) == 1 and is_plain

    def _start_long(self, plans: Plans) -> list[Drawn | Recited]:
        """Parts of prompts, those of a device together, and log-probabilities if they are to be reported."""
        parts, width = [part for plan in plans for part in plan], self._width(plans)
        length = self._length(parts)
        n_rows = batches.rows_of(plans)
        is_later = any(part.start for part in parts)
        call = self.calls.extend(plans, n_rows, length, width) if is_later else self.calls.begin(plans, n_rows, length)
        h_BTD, logits_BV, self.calls.memory = self.programs.run(call)
        found: list[Drawn | Recited] = []
        if any(batches.recites(part) for part in parts):
            scores_BT = self.programs.run(self.calls.recite(plans, length, batches.n_top_of(plans), h_BTD))
            found += all_recited(plans, scores_BT)
        if any(part.n_draws for part in parts):
            found += self._start_drawing(plans, logits_BV, width)
        if self.n_drafts:
            self.calls.draft_R, self.calls.memory = self.programs.run(self.calls.foresee(plans, length, width, h_BTD))
            for part in parts:
                part.request.has_draft = part.n_draws > 0
        return found

    def _start_drawing(self, plans: Plans, logits_BV: jax.Array, width: int) -> list[Drawn]:
        """Draws one token per row."""
        n_rows, n_top = len(logits_BV) // len(plans), batches.n_top_of(plans)
        call = self.calls.draw(plans, n_rows, batches.kind_of(plans), width, logits_BV)
        id_BT, self.calls.last_R = self.programs.run(call)
        scores_BT = self.programs.run(self.calls.score(n_rows, n_top, logits_BV, id_BT)) if n_top >= 0 else None
        return all_drawn(plans, n_rows, id_BT, scores_BT)

    def _start_steps(self, plans: Plans) -> list[Drawn]:
        """Several steps of rows that all draw."""
        n_rows, kind, n_top = self._n_rows(plans), batches.kind_of(plans), batches.n_top_of(plans)
        call = self.calls.steps(plans, n_rows, self._width(plans), kind, n_top)
        id_BT, scores_BT, self.calls.memory, self.calls.last_R = self.programs.run(call)
        return all_drawn(plans, n_rows, id_BT, scores_BT)

    def _start_speculation(self, plans: Plans) -> list[Drawn]:
        """One step or `n_steps`, each of which draws up to two tokens per row."""
        n_rows, kind, n_top = self._n_rows(plans), batches.kind_of(plans), batches.n_top_of(plans)
        n_steps = self.n_steps if any(part.n_draws > PER_STEP for plan in plans for part in plan) else 1
        # A row's last step computes a draft that it cannot keep, and latent decode by kernels counts its slot.
        width = self._width(plans, self.n_drafts)
        call = self.calls.speculate(plans, n_rows, width, kind, n_top, n_steps)
        id_BT, scores_BT, self.calls.memory, *by_row = self.programs.run(call)
        self.calls.last_R, self.calls.draft_R, self.calls.position_R = by_row
        return all_drawn(plans, n_rows, id_BT, scores_BT)

    def _is_long(self, part: Part) -> bool:
        """Whether a part is computed by itself: several tokens, or one that needs more than a token to be drawn."""
        if part.n_tokens > 1 or batches.recites(part):
            return True
        return self.n_drafts > 0 and not part.request.has_draft

    def _width(self, plans: Plans, look_ahead: int = 0) -> int:
        if self._pads_to_largest:
            return self._sizes.widths[-1]
        return batches.width_of(plans, self.page_size, self.least_pages, look_ahead)

    def _n_rows(self, plans: Plans) -> int:
        return self._sizes.rows[-1] if self._pads_to_largest else batches.rows_of(plans)

    def _length(self, parts: Sequence[Part]) -> int:
        longest = max(part.n_tokens for part in parts)
        return self._sizes.lengths[-1] if self._pads_to_largest else bucket(longest, LEAST_TOKENS)

    def _scheduler(self, request: Request) -> Scheduler:
        return self.ranks[request.options.rank].scheduler

    def _constrain(self, rows: list[Row]) -> None:
        """Puts what each of these rows may draw in its place on the device."""
        for row in rows:
            allowed_W = row.sampling.constraint.allowed() if row.sampling.constraint else None
            row.is_constrained = allowed_W is not None
            if allowed_W is not None:
                self.calls.allow(row.rank * (self.n_rows + 1) + row.slot, allowed_W)

    def _seen(self, step: list[Drawn | Recited]) -> list[Output]:
        """What a step gave, once it has run."""
        outputs = []
        for found in step:
            if found.request.has_ended:
                continue
            if isinstance(found, Drawn):
                outputs.append(self._output(found))
            else:
                known = found.request.options.prompt_logprobs
                n_top, places = found.request.options.sampling.logprobs, np.arange(found.n)
                scores = logprobs_at(found.scores_BT, found.row, places, n_top)
                known[found.start + 1 : found.start + 1 + found.n] = scores
        return outputs

    def _output(self, found: Drawn) -> Output:
        request, sampling = found.request, found.request.options.sampling
        id_T = np.asarray(found.id_BT)[found.row]
        places = np.flatnonzero(id_T != ENDED)[: found.n]
        ids = id_T[places].tolist()
        ids = ids[: next((place for place, token in enumerate(ids, 1) if token in sampling.stop_ids), len(ids))]
        self._count_drafts(id_T, min(found.n, request.n_positions - len(request.tokens)))
        is_first = len(request.tokens) == len(request.prompt)
        self._scheduler(request).record(request, ids, found.n)
        for token in ids if sampling.constraint else ():
            sampling.constraint.push(token)
        is_full = len(request.tokens) == request.n_positions
        ending = "stop" if ids[-1] in sampling.stop_ids else "length" if is_full else ""
        routes = self._routes_of(request) if ending and self._has_routes else None
        if ending and self._disk:
            self._disk.save(self.ranks[request.options.rank].pages, self.calls.memory, request.table)
        if ending:
            self._scheduler(request).end(request)
        logprobs: list[Logprob] = []
        if sampling.logprobs is not None and found.scores_BT is not None:
            logprobs = logprobs_at(found.scores_BT, found.row, places[: len(ids)], sampling.logprobs)
        return Output(request, ids, ending, logprobs, request.options.prompt_logprobs if is_first else (), routes)

    def _routes_of(self, request: Request) -> np.ndarray:
        """Of all tokens of a request but the last, which no block has read; steps in flight do not change them."""
        part = Part(request, 0, len(request.tokens) - 1, 0)
        plans = [[part] if rank == request.options.rank else [] for rank in range(len(self.ranks))]
        routes_BSLK = self.programs.run(self.calls.routes(plans, self._width(plans)))
        return np.asarray(routes_BSLK)[request.options.rank, : part.n_tokens]

    def _count_drafts(self, id_T: np.ndarray, n_left: int) -> None:
        """Counts the drafts of a row, of which each step verified one unless a single token was left to be drawn."""
        if not self.n_drafts or len(id_T) == 1:
            return
        is_drawn_T = (id_T != ENDED).reshape(-1, PER_STEP)
        n_before_T = np.cumsum(is_drawn_T.sum(axis=1)) - is_drawn_T.sum(axis=1)
        self.n_drafted += int((is_drawn_T[:, 0] & (n_left - n_before_T > 1)).sum())
        self.n_accepted += int(is_drawn_T[:, 1].sum())


def _check_drafts(n_drafts: int, model: Any) -> None:
    """Raises UserError if the model cannot make so many drafts."""
    whole(0, 1).check("n_drafts", n_drafts)
    if n_drafts and not getattr(model, "mtp", None):
        raise UserError("n_drafts=1: the model has no multi-token prediction, which makes drafts. Set n_drafts to 0.")
