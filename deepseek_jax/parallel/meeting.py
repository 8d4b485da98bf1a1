"""Processes wait for one another before the first use of a program whose collectives join them.

The first collective of some devices connects their processes, and does not wait long for those that are late: Gloo
(CPUs) gives up after 30 seconds. But one process may compile much longer than another, or tokenise, or read its part
of a checkpoint. So each program is compiled first, then all processes meet, and only then does it run:

    step = begun_together(jax.jit(...))      # a run of one process gets the function itself
    step(state, batch)                 # the first call compiles, meets and runs; later ones run

A meeting is a barrier of JAX's coordination service, which is up to any delay. A process that is gone is found by its
beats (`parallel.peers`), one that is stuck by its watchdog.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax import compat

MEETING_S = 86_400  # at most; whoever is stuck is found long before
LOOK_S = 0.2  # between two moments at which a signal is noticed
_numbers = itertools.count()


@functools.cache
def meet(name: str) -> None:
    """Returns when all processes of the run have called this with `name`; at once if it has been asked before.

    Raises JaxRuntimeError: another process is gone.
    """
    if jax.process_count() == 1:
        return
    store, errors = compat.process_store(), list[Exception]()

    def wait() -> None:
        try:
            store.meet(f"deepseek_jax/meeting/{name}", MEETING_S)
        except Exception as error:  # raised below, by whom it concerns
            errors.append(error)

    # Not in the caller's own thread, in which native code would keep Python's handlers of signals from running.
    waiting = threading.Thread(target=wait, name="meeting", daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(LOOK_S)
    if errors:
        raise errors[0]


def begun_together(program: Any) -> Any:
    """Returns a function of `jax.jit` that all processes call in the same order, to begin together at its first use."""
    return program if jax.process_count() == 1 else _Together(program)


class _Together:
    """A compiled function; its first call compiles it and meets the other processes."""

    def __init__(self, program: Any):
        self._program = program
        self.trace: Callable[..., Any] = program.trace
        self.lower: Callable[..., Any] = program.lower
        self._has_met = False

    def __call__(self, *arguments: Any) -> Any:
        if not self._has_met:
            self.lower(*arguments).compile()  # the call below finds it compiled
            meet(f"program {next(_numbers)}")
            self._has_met = True
        return self._program(*arguments)
