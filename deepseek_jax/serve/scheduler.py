"""Which tokens the next step computes: continuous batching under one budget of tokens.

There is no phase of prompts and no phase of answers. Each request has tokens that exist (its prompt, and what was drawn
so far) and tokens that are computed (their entries are in the cache); a step computes some of the difference, and where
that reaches the last token, draws the next one.

    1. Requests that run come first, in the order of their arrival: one token each, or the next chunk of a prompt.
    2. What is left of the budget admits waiting ones, in the order of their arrival, with the pages that the cache
       already has of their beginning. None is admitted in a step that preempted.
       A part of a prompt that the budget would cut down to what it reserves for rows of one token waits for the next
       step, unless it is the first of this one: a part is as long as it can be, and prompts stay side by side.
    3. If the pool has no page for a request, the one that arrived last gives up its pages and waits again at the front.
       It is recomputed later, and draws the same tokens: a draw depends on the request's key and the position alone.

The scheduler runs one step or more ahead of the host: a token may be drawn on the device and not yet seen
(`n_pending`). Its number of tokens is known, so everything but the stop conditions can be planned without it. A step
that was planned for a request that has ended in the meantime is dropped (`record`). With speculation a step draws one
to `per_step` tokens, and only the device knows how many. Then plans count the most that there may be, for which there
must be pages, and the device begins where the request stands. Steps are planned as long as it may have positions left
if every draft in flight is wrong (`n_unsure` tokens fewer).

Pure Python. One step of 256 requests takes well below a millisecond.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.serve.pages import PagePool, Table


@dataclass(eq=False)
class Request:
    """A sequence to be continued.

    `n_positions` is its largest number of tokens, prompt included; `root` says with whom it may share pages
    (`pages.root`); `options` is the caller's own: how to sample, when to stop.
    """

    prompt: Sequence[int]
    n_positions: int
    root: bytes
    options: Any = None
    is_stepwise: bool = False  # no step of it is planned before the host has seen what the last one drew
    most_draws: int | None = None  # of one step; None: as many as the step has
    reads_cache: bool = True  # False: its whole prompt is computed
    has_draft: bool = False  # whether the device has a draft of its next token, without which a step draws one alone
    tokens: list[int] = field(init=False)  # the prompt, and those drawn and seen
    table: Table = field(init=False)
    n_computed: int = 0  # tokens whose entries are in the cache, or in a step that was planned
    n_pending: int = 0  # tokens drawn in planned steps and not yet seen, at most
    n_unsure: int = 0  # of these, the ones that wrong drafts would leave out
    n_cached: int = 0  # tokens of the prompt that the cache already had
    n_preempted: int = 0  # times that it gave up its pages
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.tokens, self.table = list(self.prompt), Table(self.root)

    @property
    def n_tokens(self) -> int:
        """Tokens that exist, seen or not; with `n_unsure` the most that may exist, were there positions for all."""
        return len(self.tokens) + self.n_pending

    @property
    def n_left(self) -> int:
        """Tokens that are still to be drawn after the planned steps, at most."""
        return self.n_positions - (self.n_tokens - self.n_unsure)


class Part(NamedTuple):
    """What a step does for one request: computes tokens `start` to `start + n_tokens - 1`, and draws `n_draws`.

    With several draws the step computes each drawn token but the last as well. With `n_unsure` the request may stand up
    to so many tokens before `start`.
    """

    request: Request
    start: int
    n_tokens: int
    n_draws: int
    n_unsure: int = 0

    @property
    def n_computed(self) -> int:
        """Tokens of the request that are computed after it, counted as `Request.n_tokens` are."""
        return self.start + self.n_tokens + max(0, self.n_draws - 1)

    @property
    def n_positions(self) -> int:
        """Tokens of the request that are in the cache after it, at most: never its last one."""
        return min(self.n_computed, self.request.n_positions - 1)


class Scheduler:
    """Plans steps of at most `n_rows` requests, `budget` tokens together and `chunk` per request.

    A step draws up to `per_step` tokens for a request that has a draft.
    """

    def __init__(self, pool: PagePool, n_rows: int, budget: int, chunk: int, per_step: int = 1):
        if not 0 < n_rows <= budget or chunk < 1:
            raise UserError(
                f"{n_rows} requests at a time, {budget} tokens per step, {chunk} of one prompt: expected at least one "
                "of each, and a token per step for every request."
            )
        self.pool, self.n_rows, self.budget, self.chunk, self.per_step = pool, n_rows, budget, chunk, per_step
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Appends a request to those that wait.

        Raises UserError if it has no tokens, no position for a new one, or could not fit even alone.
        """
        pool, n_prompt = self.pool, len(request.tokens)
        if not 0 < n_prompt < request.n_positions:
            raise UserError(
                f"a prompt of {n_prompt} tokens for {request.n_positions} positions: expected 1 token or more, and "
                "fewer than positions."
            )
        n_slots = (pool.n_pages - 1) * pool.page_size
        if request.n_positions > n_slots:
            raise UserError(
                f"a request of {request.n_positions} positions: the cache holds {n_slots} tokens. Ask for fewer new "
                "tokens, or give the cache more memory."
            )
        self.waiting.append(request)

    def plan(self, n_steps: int = 1) -> list[Part]:
        """Returns the parts of the next step.

        Where no prompt is computed and nobody waits, it stands for `n_steps` of them. They count as computed from here
        on; whoever plans must run the step, and give `record` what it drew.
        """
        parts: list[Part] = []
        has_preempted = self._continue(parts)
        if not has_preempted:
            self._admit(parts)
        is_quiet = not self.waiting and all(part.n_tokens == part.n_draws == 1 for part in parts)
        parts = [self._prolonged(part, self.per_step * (n_steps if is_quiet else 1)) for part in parts]
        for part in parts:
            request = part.request
            request.n_computed = part.n_computed
            request.n_pending += part.n_draws
            request.n_unsure += self._n_unsure(part.n_draws)
            self.pool.name(request.table, request.tokens, request.n_computed)
        return parts

    def record(self, request: Request, drawn: Sequence[int], n_planned: int | None = None) -> None:
        """Adds the tokens that a step drew for a request, in the order of the steps; ignored once it has ended.

        `n_planned` are the draws of the step's part; None: as many as these. What is missing was not computed.
        """
        if request.has_ended:
            return
        n_planned = len(drawn) if n_planned is None else n_planned
        request.n_pending -= n_planned
        request.n_unsure -= self._n_unsure(n_planned)
        # 0: it has given up its pages since
        request.n_computed = max(0, request.n_computed - (n_planned - len(drawn)))
        request.tokens.extend(drawn)

    def end(self, request: Request) -> None:
        """Ends a request, wherever it is; its pages are free for others."""
        if request.has_ended:
            return
        request.has_ended = True
        self.pool.close(request.table)
        (self.running if request in self.running else self.waiting).remove(request)

    def _continue(self, parts: list[Part]) -> bool:
        """Adds the parts of running requests; returns whether any had to give up its pages."""
        n_before, place = len(self.running), 0
        budget = self.budget
        while place < len(self.running) and budget:
            request = self.running[place]
            part = self._part(request, budget)
            if self._is_scrap(part, parts):
                part = part._replace(n_tokens=0)
            if part.n_tokens and not self._make_place(request, part):
                break
            if part.n_tokens:
                parts.append(part)
                budget -= part.n_tokens
            place += 1
        return len(self.running) < n_before

    def _admit(self, parts: list[Part]) -> None:
        budget = self.budget - sum(part.n_tokens for part in parts)
        while self.waiting and budget and len(self.running) < self.n_rows:
            request = self.waiting[0]
            if request.n_pending:  # preempted; what it drew last is still on the device
                return
            if request.reads_cache and self._is_on_its_way(request):
                return
            if request.reads_cache:
                request.table = self.pool.open(request.root, request.tokens)
            request.n_computed = len(request.table.pages) * self.pool.page_size
            part = self._part(request, budget)
            if self._is_scrap(part, parts):
                self._give_up(request)
                return
            if not self.pool.extend(request.table, part.start + part.n_tokens):
                self._give_up(request)
                return
            if not request.n_preempted:
                request.n_cached = request.n_computed
            self.running.append(self.waiting.popleft())
            parts.append(part)
            budget -= part.n_tokens

    def _is_on_its_way(self, request: Request) -> bool:
        """Whether the next page of a prompt that is being computed is one that this request could share."""
        for other in self.running:
            end = (other.n_computed // self.pool.page_size + 1) * self.pool.page_size
            is_computing = end <= len(other.prompt) and end < len(request.tokens) and other.root == request.root
            if is_computing and request.tokens[:end] == other.tokens[:end]:
                return True
        return False

    def _part(self, request: Request, budget: int) -> Part:
        """The next tokens of a request; none if its last one is already drawn, or has to be seen first."""
        if request.n_left <= 0 or (request.is_stepwise and request.n_pending):
            return Part(request, request.n_computed, 0, 0)
        missing = request.n_tokens - request.n_computed
        n_tokens = min(missing, self.chunk, budget)
        return Part(request, request.n_computed, n_tokens, int(n_tokens == missing), request.n_unsure)

    def _is_scrap(self, part: Part, parts: list[Part]) -> bool:
        """Whether the budget cuts a part down to less than a step has besides `chunk`, after another prompt's part."""
        whole = min(part.request.n_tokens - part.start, self.chunk)
        is_cut = part.n_tokens < whole and part.n_tokens <= self.budget - self.chunk
        return is_cut and any(other.n_tokens > 1 for other in parts)

    def _make_place(self, request: Request, part: Part) -> bool:
        """Gets pages for a part, from those that arrived last if need be; False if the request itself gave up."""
        while not self.pool.extend(request.table, min(part.start + part.n_tokens, request.n_positions - 1)):
            last = self.running.pop()
            self._give_up(last)
            last.n_preempted += 1
            self.waiting.appendleft(last)
            if last is request:
                return False
        return True

    def _give_up(self, request: Request) -> None:
        self.pool.close(request.table)
        request.table, request.n_computed, request.has_draft = Table(request.root), 0, False

    def _prolonged(self, part: Part, most: int) -> Part:
        """The part with as many draws as its positions and the pool allow, up to `most`; unchanged after a prompt."""
        request = part.request
        n_draws = min(most, request.most_draws or most, request.n_left)
        if part.n_tokens != 1 or not part.n_draws or n_draws == 1 or (self.per_step > 1 and not request.has_draft):
            return part
        longer = part._replace(n_draws=n_draws)
        return longer if self.pool.extend(request.table, longer.n_positions) else part

    def _n_unsure(self, n_draws: int) -> int:
        """Of so many draws of a part, those that there are only if all drafts are right."""
        return n_draws - -(-n_draws // self.per_step)
