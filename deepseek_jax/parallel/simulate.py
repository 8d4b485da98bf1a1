"""How long a pipeline schedule takes, how long its ranks wait and how much they keep; pure Python without devices.

A free-running rank starts an op as soon as its inputs are there. Where the pipeline is one program that exchanges
results after every tick, a rank also waits for its neighbours' ops of the tick before: `coupled_seconds`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepseek_jax.parallel.schedule import Op, Part, Schedule


@dataclass(frozen=True)
class Times:
    """Seconds per stage and micro-batch."""

    forward: float  # F
    backward: float  # B and W together
    weights: float  # W
    both: float  # F, B and W as one op

    def seconds(self, op: Op) -> float:
        """Returns the time of an op; raises KeyError for an op that no schedule has."""
        return {
            "F": self.forward,
            "B": self.backward - self.weights,
            "W": self.weights,
            "BW": self.backward,
            "FBW": self.both,
        }["".join(part.kind for part in op)]


class Span(NamedTuple):
    """An op on a rank, from `begin` to `end` in seconds."""

    rank: int
    op: Op
    begin: float
    end: float


Done = dict[tuple[str, int, int, int], float]  # kind, rank, chunk, micro-batch -> when it was done


def _needs(schedule: Schedule) -> Callable[[Part, int], tuple[str, int, int, int] | None]:
    """Returns `needs(part, rank)`: the part elsewhere, or earlier on the rank, whose result the part takes."""
    before, after = schedule.neighbours()

    def needs(part: Part, rank: int) -> tuple[str, int, int, int] | None:
        kind, chunk, m = part
        source = {"F": before, "B": after}.get(kind, {}).get((rank, chunk))
        if source:
            return (kind, *source, m)
        return {"F": None, "B": ("F", rank, chunk, m), "W": ("B", rank, chunk, m)}[kind]

    return needs


def _begin(op: Op, rank: int, done: Done, needs: Callable) -> float | None:
    """Returns when the results that an op takes are there; None if one of them is not made yet."""
    own = {(part.kind, rank, part.chunk, part.micro_batch) for part in op}
    sources = [source for part in op if (source := needs(part, rank)) and source not in own]
    return max((done[source] for source in sources), default=0.0) if all(s in done for s in sources) else None


def simulate(schedule: Schedule, seconds: Callable[[Op], float]) -> list[Span]:
    """Returns when each rank runs each op if it starts as soon as it can; results travel in no time.

    Raises:
        ValueError: no rank can continue: the schedule waits for itself.
    """
    needs = _needs(schedule)
    done: Done = {}
    clock, left = [0.0] * len(schedule.orders), [list(reversed(order)) for order in schedule.orders]

    def run(rank: int) -> Iterator[Span]:
        while left[rank] and (ready := _begin(left[rank][-1], rank, done, needs)) is not None:
            op, begin = left[rank].pop(), max(clock[rank], ready)
            clock[rank] = begin + seconds(op)
            done.update({(part.kind, rank, part.chunk, part.micro_batch): clock[rank] for part in op})
            yield Span(rank, op, begin, clock[rank])

    spans: list[Span] = []
    while any(left):
        new = [span for rank in range(len(clock)) for span in run(rank)]
        if not new:
            raise ValueError(f"the schedule waits for itself: ops left per rank {[len(ops) for ops in left]}")
        spans += new
    return spans


def bubble(spans: list[Span]) -> float:
    """Returns the seconds that the busiest rank waits until the step is over."""
    busy: dict[int, float] = {}
    for span in spans:
        busy[span.rank] = busy.get(span.rank, 0.0) + span.end - span.begin
    return max(span.end for span in spans) - max(busy.values())


def ticks(schedule: Schedule) -> list[tuple[Op | None, ...]]:
    """Returns the op of each rank in each tick, where ranks exchange results after every tick; None: it waits.

    Raises:
        ValueError: the schedule waits for itself.
    """
    at = {(int(span.begin), span.rank): span.op for span in simulate(schedule, lambda _: 1.0)}
    ranks = range(len(schedule.orders))
    return [tuple(at.get((tick, rank)) for rank in ranks) for tick in range(1 + max(tick for tick, _ in at))]


def coupled_seconds(rows: list[tuple[Op | None, ...]], seconds: Callable[[Op], float]) -> float:
    """Returns the time of a step whose ranks wait for their neighbours after every tick, as a scan over ticks does."""
    clock = [0.0] * len(rows[0])
    for row in rows:
        around = [max(clock[max(rank - 1, 0) : rank + 2]) for rank in range(len(clock))]
        clock = [begin + (seconds(op) if op else 0.0) for begin, op in zip(around, row, strict=True)]
    return max(clock)


def in_flight(schedule: Schedule) -> list[int]:
    """Returns the largest number of micro-batches per rank whose activations it keeps: from F until after W."""

    def most(order: tuple[Op, ...]) -> int:
        kinds = [part.kind for op in order for part in op]
        return max(itertools.accumulate({"F": 1, "B": 0, "W": -1}[kind] for kind in kinds))

    return [most(order) for order in schedule.orders]


def validate(schedule: Schedule) -> None:
    """Checks that every place of a lane runs F, B and W of each micro-batch once, and never waits for itself.

    Raises:
        ValueError: names the first part that is missing, unexpected or repeated, or the ops that are left over.
    """
    expected = {
        (rank, Part(kind, chunk, m))
        for lane in schedule.lanes
        for rank, chunk in lane
        for kind in "FBW"
        for m in range(schedule.micro_batches)
    }
    parts = [(rank, part) for rank, order in enumerate(schedule.orders) for op in order for part in op]
    for rank, part in parts:
        if (rank, part) not in expected:
            raise ValueError(f"rank {rank}: {part} is repeated or belongs to no lane")
        expected.remove((rank, part))
    if expected:
        raise ValueError("rank {}: {} is missing".format(*min(expected)))
    simulate(schedule, lambda _: 1.0)
