"""When clients that find the queue full hear of it, and when they are asked to come again.

Who is refused asks again. If all did after the same second, they would come together, and those who are served would
wait for what so many cost. So the more are refused, the later they hear of it and the longer they are asked to wait,
and no two the same time:

    ratio         R / (A + 1): requests refused per request taken, counts of the last `WINDOW_S`
    held          a random time up to 4 `ratio` s and `MOST_HELD_S`, in which the refusal is not written
    Retry-After   16 `ratio` s on average, at random between half and one and a half of it, from 1 to `MOST_RETRY_S`

Of N clients that obey, N / (18 ratio) ask again per second: refusals grow with the root of N, not with N. One that
obeys nothing is slowed by how long it is held. Where few are refused, they soon hear of it and may go elsewhere. No
more than `MOST_HELD` are held; others hear at once, so that neither memory nor descriptors run out. nginx delays what
is too much (`limit_req` with `burst`) and HAProxy what is to be rejected (`tarpit`) for the same reason.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable

WINDOW_S = 10.0  # in which a count falls to 1/e
MOST_HELD = 512  # refusals not written yet
MOST_HELD_S = 4.0
MOST_RETRY_S = 30  # openai-python follows up to 60


class Refusals:
    """The refusals of one server. Used in its event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random):
        self._clock, self._draw = clock, draw
        self._n_refused = self._n_taken = 0.0
        self._counted_s = clock()
        self._held = set[asyncio.Future[None]]()
        self._is_over = False

    @property
    def n_held(self) -> int:
        """Refusals that are not written yet."""
        return len(self._held)

    @property
    def ratio(self) -> float:
        """Requests refused per request taken, of the last seconds."""
        return self._n_refused / (self._n_taken + 1)

    def note_taken(self) -> None:
        """Counts a request that is not refused."""
        self._pass_time()
        self._n_taken += 1

    async def hold(self) -> int:
        """Counts a refusal and waits until it is to be written; returns the seconds after which to ask again."""
        self._pass_time()
        ratio = self.ratio
        self._n_refused += 1
        seconds = self._draw() * min(4 * ratio, MOST_HELD_S)
        if not self._is_over and self.n_held < MOST_HELD:
            await self._wait(seconds)
        return min(max(1, round(ratio * (8 + 16 * self._draw()))), MOST_RETRY_S)

    def end(self) -> None:
        """Ends all waits; later ones end at once."""
        self._is_over = True
        for one in self._held:
            _end(one)

    async def _wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        held: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _end, held)
        self._held.add(held)
        try:
            await held
        finally:
            self._held.discard(held)
            timer.cancel()

    def _pass_time(self) -> None:
        """Lets the counts fall; to 0 after a window in which nothing was counted, where their ratio would stay."""
        now = self._clock()
        is_over = now - self._counted_s > WINDOW_S
        kept = 0.0 if is_over else math.exp((self._counted_s - now) / WINDOW_S)
        self._counted_s, self._n_refused, self._n_taken = now, self._n_refused * kept, self._n_taken * kept


def _end(held: "asyncio.Future[None]") -> None:
    if not held.done():
        held.set_result(None)
