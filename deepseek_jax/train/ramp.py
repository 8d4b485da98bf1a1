"""Which samples each step reads: the batch ramp, and the share of it of one process. No jax: reader processes load it.

    batch: grows from `size_start` to `size` in up to `LEVELS` jumps, then stays

A step's number alone says what it reads, so that a run is resumed by asking, and a run of any length costs no memory.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = 8


@dataclass(frozen=True)
class BatchRamp:
    """How many sequences each step reads; the step number alone says which.

    Every size is a multiple of the greatest common divisor of the first and the last: it is the same on any mesh, and
    divides over each mesh that the two divide over.
    """

    size_start: int  # sequences of step 0; 0, or more than `size`: as many as `size`
    size: int  # sequences of each step after the ramp
    # length of the ramp; the batch grows in up to `LEVELS` jumps, each of which compiles the step anew
    ramp_steps: int

    @property
    def start(self) -> int:
        """Sequences of step 0."""
        return min(self.size_start or self.size, self.size)

    def size_at(self, step: int) -> int:
        """Sequences of `step`."""
        if step >= self.ramp_steps:
            return self.size
        return self._of_level(step * LEVELS // self.ramp_steps)

    def _of_level(self, level: int) -> int:
        grown = self.start + (self.size - self.start) * level // LEVELS
        unit = math.gcd(self.start, self.size)
        return grown // unit * unit

    def first(self, step: int) -> int:
        """Sequences read before `step`."""
        ramp = min(step, self.ramp_steps)
        begins = [-(-level * self.ramp_steps // LEVELS) for level in range(LEVELS + 1)]  # steps at which a level begins
        lengths = [max(min(end, ramp) - begin, 0) for begin, end in itertools.pairwise(begins)]
        grown = sum(length * self._of_level(level) for level, length in enumerate(lengths))
        return grown + (step - ramp) * self.size


@dataclass(frozen=True)
class Shares(Sequence):
    """The (start, count) of one process's samples of each of some steps: a sequence that is worked out, not kept."""

    ramp: BatchRamp  # samples of each step over all processes
    steps: range  # their numbers
    # process, n_processes: this process of all
    process: int = 0
    n_processes: int = 1

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, at: Any) -> "tuple[int, int] | Shares":
        """The pair of a step, or the steps of a slice."""
        if isinstance(at, slice):
            return dataclasses.replace(self, steps=self.steps[at])
        step = self.steps[at]
        return share(self.ramp.first(step), self.ramp.size_at(step), self.process, self.n_processes)


def share(first: int, count: int, process: int, n_processes: int) -> tuple[int, int]:
    """The (start, count) of one process's samples of `count` that begin with `first`."""
    own = count // n_processes
    return first + own * process, own
