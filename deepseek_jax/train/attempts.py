"""A step in buffers that were large enough last time, and again in larger ones if they are not this time.

In a pipeline the buffers in which tokens travel to their experts have a size that the program is compiled for
(`parallel.alltoall.HEADROOM`). An attempt whose buffers were too small in any layer returns the state as it was, and a
report that says so; the same batch is then given to a program with larger ones, whose result is the step's. So nothing
is dropped, and no size changes a result. A program is compiled when it is first needed.

Each step waits for its report: the next one must not begin on a state that has yet to be made.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

CALM = 100  # steps in a row for which the next smaller buffers would have been enough: then they are used


class Attempts:
    """A compiled `step(state, batch) -> (state, report)` for any load.

    Args:
        program: makes the compiled step for a level of buffers (`Exchange.level`), the last of which is always large
            enough; its report has `sent` (`alltoall.Sent`).

    Attributes:
        level: of the buffers that the next step begins with.
        repeated: attempts so far whose buffers were too small.
    """

    def __init__(self, program: Callable[[int], Any]):
        self._programs = functools.cache(program)
        self.level, self.repeated, self._calm = 0, 0, 0

    @property
    def program(self) -> Any:
        """The compiled step that the next one begins with."""
        return self._programs(self.level)

    def __call__(self, state: dict, batch: Any) -> tuple[dict, Any]:
        """Makes a step; the state given is donated."""
        while True:
            state, report = self.program(state, batch)
            enough = int(np.argmin(np.append(np.asarray(report.sent.too_small) > 0, False)))
            if enough <= self.level:
                self._remember(enough)
                return state, report
            self.repeated, self.level, self._calm = self.repeated + 1, enough, 0

    def trace(self, *arguments: Any) -> Any:
        """The traced `program` for these arguments, as of `jax.jit`."""
        return self.program.trace(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """The lowered `program` for these arguments, as of `jax.jit`."""
        return self.trace(*arguments).lower()

    def _remember(self, enough: int) -> None:
        """Goes down to the next smaller buffers once they have long been enough."""
        self._calm = self._calm + 1 if enough < self.level else 0
        if self._calm == CALM:
            self.level, self._calm = self.level - 1, 0
