"""Grammars compiled aside: a small schema may take for ever, and nothing can interrupt it.

So it happens in threads that nobody waits for longer than `MOST_S`, and in few of them.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from deepseek_jax.errors import UserError

MOST_S, MOST_AT_ONCE = 10.0, 2


class Compiling:
    """Calls `compile(grammar)` in threads of its own, `MOST_AT_ONCE` at the same time."""

    def __init__(self, compile: Callable[[str], Any]):
        self._compile, self._free = compile, asyncio.Semaphore(MOST_AT_ONCE)

    async def __call__(self, grammar: str) -> Any:
        """Returns what `compile` does, or raises what it raises. Raises UserError after `MOST_S`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(MOST_S):
                await self._free.acquire()
                found = loop.create_future()
                threading.Thread(target=self._run, args=(grammar, loop, found), name="grammar", daemon=True).start()
                return await found
        except TimeoutError:
            raise UserError(f"the schema was not compiled within {MOST_S:g} s: expected a simpler one.") from None

    def _run(self, grammar: str, loop: asyncio.AbstractEventLoop, found: asyncio.Future) -> None:
        value, error = None, None
        try:
            value = self._compile(grammar)
        except Exception as failure:
            error = failure
        except BaseException as failure:  # a panic of the compiler
            error = UserError(f"the schema cannot be followed: {type(failure).__name__}")
        loop.call_soon_threadsafe(self._settle, found, value, error)

    def _settle(self, found: asyncio.Future, value: Any, error: Exception | None) -> None:
        self._free.release()
        if found.done():  # it took too long, or its client has gone
            return
        if error:
            found.set_exception(error)
        else:
            found.set_result(value)
