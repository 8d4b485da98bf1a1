"""Plans are carried out by a scripted model over a written-out memory, and must give each request its own text.

The model's next token is a function of all tokens before it, which it reads from pages: a page that was lost, shared
with a writer or not yet computed gives another text.
"""

import random
from collections import deque

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.serve.pages import PagePool, root
from deepseek_jax.serve.scheduler import Part, Request, Scheduler

ROOT = root(b"weights")
STOP = 0


def next_token(tokens):
    return random.Random(repr(tokens)).randrange(6)


def continued(prompt, n_positions):
    tokens = list(prompt)
    while len(tokens) < n_positions and (len(tokens) == len(prompt) or tokens[-1] != STOP):
        tokens.append(next_token(tokens))
    return tokens


class Device:
    """Memory in pages, and for each request the last tokens that it drew, which the host may not have seen.

    With two tokens `per_step`, half of the drafts are right.
    """

    def __init__(self, page_size, per_step):
        self.page_size, self.per_step, self.memory, self.drawn = page_size, per_step, {}, {}

    def step(self, parts):
        """Returns what each part draws; all parts write, then all of them read."""
        results = []
        for request, start, n_tokens, n_draws, n_unsure in parts:
            tokens = [*request.tokens, *self.drawn.get(request, [])]
            if n_unsure:
                assert start - n_unsure <= len(tokens) - 1 <= start and n_tokens == 1
                start = len(tokens) - 1
            else:
                assert len(tokens) == request.n_tokens - n_draws
            known = tokens[start : start + n_tokens]
            new = []
            for place in range(self._n_drawn(request, tokens, n_draws) if n_draws else 1):
                for position, token in enumerate(known, start):
                    self.memory[request.table.pages[position // self.page_size], position % self.page_size] = token
                start += len(known)
                if place < n_draws:
                    new.append(next_token([self._read(request, position) for position in range(start)]))
                    known = new[-1:]
            results.append(new)
            self.drawn.setdefault(request, []).extend(new)
        return list(zip([part.request for part in parts], results, strict=True))

    def _n_drawn(self, request, tokens, n_draws):
        """How many tokens a part draws before its row's end, with its own steps alone."""
        n_steps, left = -(-n_draws // self.per_step), min(n_draws, request.n_positions - len(tokens))
        right = random.Random(repr(tokens)).choices(range(self.per_step), k=n_steps)
        return min(n_steps + sum(right), left)

    def seen(self, request, drawn):
        del self.drawn[request][: len(drawn)]

    def _read(self, request, position):
        return self.memory[request.table.pages[position // self.page_size], position % self.page_size]


def serve(scheduler, arrivals, n_ahead=0, n_steps=1, cancelled=()):
    """Runs all requests, which arrive at (step, request); returns the number of steps and of tokens computed."""
    device, flight, arrivals = Device(scheduler.pool.page_size, scheduler.per_step), deque(), deque(arrivals)
    n_run = n_computed = 0
    requests = [request for _, request in arrivals]
    while arrivals or scheduler.running or scheduler.waiting or flight:
        while arrivals and arrivals[0][0] <= n_run:
            scheduler.add(arrivals.popleft()[1])
        for request in [request for request in scheduler.running if request in cancelled and request.n_tokens > 12]:
            scheduler.end(request)
        parts = scheduler.plan(n_steps)
        check(scheduler, parts, n_steps)
        scheduler.pool.check(request.table for request in requests)
        n_computed += sum(part.n_tokens for part in parts)
        flight.append((parts, device.step(parts)))
        for part in parts:
            part.request.has_draft = part.n_draws > 0
        n_run += 1
        while len(flight) > n_ahead or (flight and not parts):
            for part, (request, drawn) in zip(*flight.popleft(), strict=True):
                device.seen(request, drawn)
                stops = [place for place, token in enumerate(drawn) if token == STOP]
                scheduler.record(request, drawn, part.n_draws)
                if stops and not request.has_ended:
                    del request.tokens[len(request.tokens) - len(drawn) + stops[0] + 1 :]
                if stops or len(request.tokens) == request.n_positions:
                    scheduler.end(request)
        assert n_run < 20_000, "the scheduler makes no progress"
    assert scheduler.pool.n_free == scheduler.pool.n_pages - 1
    return n_run, n_computed


def check(scheduler, parts, n_steps):
    assert sum(part.n_tokens for part in parts) <= scheduler.budget
    assert len({part.request for part in parts}) == len(parts) <= scheduler.n_rows
    assert len(scheduler.running) <= scheduler.n_rows
    for part in parts:
        request = part.request
        assert 0 < part.n_tokens <= scheduler.chunk
        assert part.n_draws <= n_steps * scheduler.per_step
        assert part.n_positions <= len(request.table.pages) * scheduler.pool.page_size
        assert request.n_tokens - part.n_draws - part.n_unsure < request.n_positions
        assert request.n_tokens - request.n_unsure <= request.n_positions
        assert request.n_unsure == 0 or scheduler.per_step > 1


def some_requests(draw, n, shared=()):
    for _ in range(n):
        own = [draw.randrange(6) for _ in range(draw.randrange(1, 20))]
        prompt = [*shared[: draw.randrange(len(shared) + 1)], *own]
        yield Request(prompt, len(prompt) + draw.randrange(1, 30), ROOT)


@pytest.mark.parametrize("n_ahead", [0, 1, 2])
@pytest.mark.parametrize("n_steps", [1, 8])
@pytest.mark.parametrize("n_pages", [14, 200])
@pytest.mark.parametrize("per_step", [1, 2])
def test_every_request_gets_its_own_text(n_ahead, n_steps, n_pages, per_step):
    n_preempted = n_cached = 0
    for seed in range(12):
        draw = random.Random(seed)
        pool = PagePool(n_pages, page_size=4 + seed % 2)
        n_rows = 1 + seed % 6
        scheduler = Scheduler(pool, n_rows, budget=8 + 3 * seed, chunk=1 + 2 * seed, per_step=per_step)
        shared = [draw.randrange(6) for _ in range(12)]
        requests = [request for request in some_requests(draw, 25, shared) if request.n_positions <= (n_pages - 1) * 4]
        arrivals = sorted((draw.randrange(40), number) for number in range(len(requests)))
        serve(scheduler, [(time, requests[number]) for time, number in arrivals], n_ahead, n_steps)
        for request in requests:
            assert request.tokens == continued(request.prompt, request.n_positions)
        n_preempted += sum(request.n_preempted for request in requests)
        n_cached += sum(request.n_cached for request in requests)
    assert n_cached > 100
    assert (n_preempted > 0) == (n_pages == 14)


def test_requests_that_are_cancelled_leave_nothing_and_disturb_nobody():
    draw = random.Random(1)
    requests = list(some_requests(draw, 40))
    scheduler = Scheduler(PagePool(16, page_size=4), n_rows=4, budget=20, chunk=8)
    cancelled = set(requests[::3])
    serve(scheduler, [(0, request) for request in requests], 1, 1, cancelled)
    for request in set(requests) - cancelled:
        assert request.tokens == continued(request.prompt, request.n_positions)


def test_running_requests_come_before_waiting_ones_and_prompts_in_chunks():
    scheduler = Scheduler(PagePool(100, page_size=4), n_rows=4, budget=10, chunk=6)
    first, second, third = (Request([number] * 15, 40, ROOT) for number in (1, 2, 3))
    for request in (first, second, third):
        scheduler.add(request)
    assert scheduler.plan() == [Part(first, 0, 6, 0)]  # the second would get the 4 tokens that are for rows
    assert scheduler.plan() == [Part(first, 6, 6, 0)]
    assert scheduler.plan() == [Part(first, 12, 3, 1), Part(second, 0, 6, 0)]
    assert scheduler.plan() == [Part(first, 15, 1, 1), Part(second, 6, 6, 0)]
    assert scheduler.plan() == [Part(first, 16, 1, 1), Part(second, 12, 3, 1), Part(third, 0, 6, 0)]


def test_the_last_to_arrive_gives_up_its_pages_and_none_is_admitted_in_that_step():
    scheduler = Scheduler(PagePool(7, page_size=2), n_rows=2, budget=12, chunk=8)
    first, second = Request([1] * 4, 12, ROOT), Request([2] * 8, 12, ROOT)
    for request in (first, second):
        scheduler.add(request)
    assert [part.request for part in scheduler.plan()] == [first, second]  # all six pages
    for request in (first, second):
        scheduler.record(request, [4])
        request.has_draft = True
    scheduler.pool.forget()
    scheduler.chunk = 2  # the second's beginning would fit at once
    assert scheduler.plan() == [Part(first, 4, 1, 1)]
    assert list(scheduler.waiting) == [second] and second.n_preempted == 1
    assert first.has_draft and not second.has_draft
    scheduler.record(first, [4])
    assert second in [part.request for part in scheduler.plan()]


def test_several_draws_per_step_wait_until_nobody_waits_and_no_prompt_is_computed():
    scheduler = Scheduler(PagePool(50, page_size=2), n_rows=1, budget=8, chunk=4)
    first, second = (Request([number] * 4, 20, ROOT) for number in (1, 2))
    scheduler.add(first)
    assert scheduler.plan(4) == [Part(first, 0, 4, 1)]
    scheduler.add(second)
    assert scheduler.plan(4) == [Part(first, 4, 1, 1)]
    scheduler.end(second)
    assert scheduler.plan(4) == [Part(first, 5, 1, 4)]
    assert first.n_computed == 9 and first.n_tokens == 10


def test_steps_of_one_or_two_tokens_are_planned_while_any_may_be_left():
    """From where the request stands at most; pages hold no more than it can have."""
    scheduler = Scheduler(PagePool(50, page_size=1), n_rows=1, budget=8, chunk=4, per_step=2)
    request = Request([1, 2], 12, ROOT)
    scheduler.add(request)
    assert scheduler.plan(2) == [Part(request, 0, 2, 1)]
    assert scheduler.plan(2) == [Part(request, 2, 1, 1)]  # without a draft
    request.has_draft = True
    assert scheduler.plan(2) == [Part(request, 3, 1, 4)]
    assert scheduler.plan(2) == [Part(request, 7, 1, 4, n_unsure=2)]
    assert scheduler.plan(2) == [Part(request, 11, 1, 4, n_unsure=4)] and len(request.table.pages) == 11
    assert request.n_left == 2
    scheduler.record(request, [5])
    scheduler.record(request, [5])
    scheduler.record(request, [5, 5, 5], 4)
    assert request.n_left == 1 and request.tokens == [1, 2, 5, 5, 5, 5, 5]
    assert scheduler.plan(2) == [Part(request, 14, 1, 1, n_unsure=4)] and len(request.table.pages) == 11
    assert scheduler.plan(2) == []


def test_equal_prompts_that_come_together_are_computed_once():
    """The others wait for the pages of the first, and compute what is left of theirs."""
    scheduler = Scheduler(PagePool(20, page_size=2), n_rows=4, budget=12, chunk=4)
    shared = [1, 2, 3, 4, 5, 6, 7]
    requests = [Request([*shared, number], 12, ROOT) for number in (8, 9, 10)]
    requests.append(Request([9, 9, 9, 9], 6, ROOT))  # comes last, and so waits as well
    for request in requests:
        scheduler.add(request)
    assert scheduler.plan() == [Part(requests[0], 0, 4, 0)]
    assert scheduler.plan() == [Part(requests[0], 4, 4, 1)]
    single = Part(requests[0], 8, 1, 1)
    shares = [Part(request, 6, 2, 1) for request in requests[1:3]]
    assert scheduler.plan() == [single, *shares, Part(requests[3], 0, 4, 1)]
    assert [request.n_cached for request in requests] == [0, 6, 6, 0]


def test_what_ended_in_the_meantime_is_dropped():
    scheduler = Scheduler(PagePool(9, page_size=2), n_rows=3, budget=20, chunk=20)
    request = Request([1, 2], 9, ROOT)
    scheduler.add(request)
    scheduler.plan()
    scheduler.plan()
    scheduler.record(request, [STOP])
    scheduler.end(request)
    scheduler.record(request, [5])
    assert request.tokens == [1, 2, STOP] and not scheduler.plan()
    scheduler.end(request)  # a second time: nothing


def test_no_step_is_planned_beyond_the_last_position():
    scheduler = Scheduler(PagePool(9, page_size=2), n_rows=3, budget=20, chunk=20)
    request = Request([1, 2], 4, ROOT)
    scheduler.add(request)
    assert scheduler.plan() == [Part(request, 0, 2, 1)]
    assert scheduler.plan(8) == [Part(request, 2, 1, 1)]
    assert scheduler.plan() == []


@pytest.mark.parametrize(
    ("prompt", "n_positions", "message"),
    [([], 4, "a prompt of 0 tokens"), ([1, 2], 2, "fewer than positions"), ([1], 17, "the cache holds 16 tokens")],
)
def test_requests_that_can_never_run_are_refused(prompt, n_positions, message):
    scheduler = Scheduler(PagePool(9, page_size=2), n_rows=3, budget=20, chunk=20)
    with pytest.raises(UserError, match=message):
        scheduler.add(Request(prompt, n_positions, ROOT))


@pytest.mark.parametrize("sizes", [(0, 4, 4), (5, 4, 4), (1, 1, 0)])
def test_impossible_schedulers_are_refused(sizes):
    with pytest.raises(UserError, match="expected at least one"):
        Scheduler(PagePool(9), *sizes)
