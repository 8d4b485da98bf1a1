"""Pipeline schedules as data: what each rank along the pipeline does, in which order.

A part is one piece of work on one stage and one micro-batch:

    F   forward pass
    B   backward pass for the inputs, for which the stage before waits
    W   backward pass for the weights, for which only the optimizer waits

An op is what a rank runs in one tick: (F), (B), (W), a whole backward pass (B, W), or the forward pass of one
micro-batch and the backward pass of another (F, B, W), each of whose exchanges of tokens can hide behind the other's
matmuls ("F&B" in the report).

A lane is the path of a micro-batch through the pipeline: the (rank, chunk) of each stage in order. A rank holds one
stage per chunk: chunk 0, and with DualPipe and DualPipeV also chunk 1, the one nearer to the head. DualPipe has two
lanes in opposite directions, DualPipeV one that turns at the last rank. `parallel.simulate` says how long a schedule
takes. Pure Python without devices.

Sources: V3 report, section 3.2.1 and figure 5; the DualPipe repository; GPipe: arXiv 1811.06965; 1F1B: arXiv
1806.03377; zero bubble: arXiv 2401.10241.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple


class Part(NamedTuple):
    """Work on one stage and micro-batch: `kind` is "F", "B" or "W"; micro-batches are counted per lane."""

    kind: str
    chunk: int
    micro_batch: int


Op = tuple[Part, ...]
Place = tuple[int, int]  # rank, chunk


@dataclass(frozen=True)
class Schedule:
    """What every rank does."""

    orders: tuple[tuple[Op, ...], ...]  # the ops of each rank, in order
    lanes: tuple[tuple[Place, ...], ...]  # the places that a micro-batch passes, in the order of the stages
    micro_batches: int  # of each lane

    def neighbours(self) -> tuple[dict[Place, Place], dict[Place, Place]]:
        """Returns the place before and the place after each place; the ends of a lane have none."""
        pairs = [pair for lane in self.lanes for pair in itertools.pairwise(lane)]
        return {after: before for before, after in pairs}, dict(pairs)


def _forward(chunk: int, m: int) -> Op:
    return (Part("F", chunk, m),)


def _backward(chunk: int, m: int) -> Op:
    return Part("B", chunk, m), Part("W", chunk, m)


def _one_way(n_ranks: int) -> tuple[tuple[Place, ...], ...]:
    return (tuple((rank, 0) for rank in range(n_ranks)),)


def gpipe(n_ranks: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes."""
    order = [_forward(0, m) for m in range(micro_batches)] + [_backward(0, m) for m in range(micro_batches)]
    return Schedule((tuple(order),) * n_ranks, _one_way(n_ranks), micro_batches)


def one_f_one_b(n_ranks: int, micro_batches: int) -> Schedule:
    """1F1B: as many forward passes as there are ranks behind, then one backward pass per forward pass."""

    def order(rank: int) -> tuple[Op, ...]:
        ahead = min(n_ranks - rank - 1, micro_batches)
        steady = ((_forward(0, ahead + m), _backward(0, m)) for m in range(micro_batches - ahead))
        ends = [_forward(0, m) for m in range(ahead)], [_backward(0, micro_batches - ahead + m) for m in range(ahead)]
        return (*ends[0], *itertools.chain.from_iterable(steady), *ends[1])

    return Schedule(tuple(map(order, range(n_ranks))), _one_way(n_ranks), micro_batches)


def paired_one_f_one_b(n_ranks: int, micro_batches: int) -> Schedule:
    """1F1B whose steady state is one op, the forward pass of a micro-batch and the backward pass of an earlier one.

    Where ranks exchange results after every tick, 1F1B waits: while one runs F, its neighbours run B. Here all run both
    in the same tick, and one's exchange of tokens can hide behind the other's matmuls; the bubble is that of 1F1B. Each
    rank keeps twice as many micro-batches as in 1F1B.
    """

    def order(rank: int) -> tuple[Op, ...]:
        ahead = min(2 * (n_ranks - rank) - 1, micro_batches)
        pairs = (_forward(0, ahead + m) + _backward(0, m) for m in range(micro_batches - ahead))
        ends = [_forward(0, m) for m in range(ahead)], [_backward(0, micro_batches - ahead + m) for m in range(ahead)]
        return (*ends[0], *pairs, *ends[1])

    return Schedule(tuple(map(order, range(n_ranks))), _one_way(n_ranks), micro_batches)


def zero_bubble(n_ranks: int, micro_batches: int) -> Schedule:
    """ZB1P (ZB-H1): as 1F1B and in its memory, with W put where a rank would wait.

    In each unit of time a rank runs B if its gradient has arrived, except that F goes first while fewer micro-batches
    are on their way than in 1F1B; it runs W where neither can run.
    """
    orders: list[list[Op]] = [[] for _ in range(n_ranks)]
    counts = [dict.fromkeys("FBW", 0) for _ in range(n_ranks)]
    ready: dict[tuple[str, int, int], int] = {}  # kind, rank, micro-batch -> the time after it

    def arrived(kind: str, rank: int, time: int) -> bool:
        m = counts[rank][kind]
        ends = {"F": rank == 0, "B": rank == n_ranks - 1}[kind]
        needs = ("F", rank, m) if kind == "B" and ends else (kind, rank + (1 if kind == "B" else -1), m)
        return (kind == "F" and ends) or ready.get(needs, time + 1) <= time

    def choice(rank: int, time: int) -> str | None:
        n = counts[rank]
        room = n["F"] - n["W"] < n_ranks and n["F"] - n["B"] < n_ranks - rank
        forward = n["F"] < micro_batches and room and arrived("F", rank, time)
        if n["B"] < n["F"] and not forward and arrived("B", rank, time):
            return "B"
        return "F" if forward else "W" if n["W"] < n["B"] else None

    for time in itertools.takewhile(lambda _: any(n["W"] < micro_batches for n in counts), itertools.count()):
        for rank, kind in [(rank, choice(rank, time)) for rank in range(n_ranks)]:
            if kind:
                m = counts[rank][kind]
                counts[rank][kind] += 1
                orders[rank].append((Part(kind, 0, m),))
                ready[kind, rank, m] = time + 1
    return Schedule(tuple(map(tuple, orders)), _one_way(n_ranks), micro_batches)


class _Rank:
    """Writes down the order of one rank of DualPipe: counts micro-batches, and keeps the W that are put off."""

    def __init__(self) -> None:
        self.order: list[Op] = []
        self.n = {kind: [0, 0] for kind in "FB"}
        self.put_off: list[Part] = []

    def _next(self, kind: str, chunk: int) -> Part:
        self.n[kind][chunk] += 1
        return Part(kind, chunk, self.n[kind][chunk] - 1)

    def forward(self, chunk: int) -> None:
        self.order.append((self._next("F", chunk),))

    def backward(self, chunk: int, *, put_off: bool = False) -> None:
        b = self._next("B", chunk)
        w = b._replace(kind="W")
        self.order.append((b,) if put_off else (b, w))
        if put_off:
            self.put_off.append(w)

    def weights(self) -> None:
        self.order.append((self.put_off.pop(0),))

    def both(self, chunk: int) -> None:
        """F of one chunk and B of the other, as one op."""
        f, b = self._next("F", chunk), self._next("B", 1 - chunk)
        self.order.append((f, b, b._replace(kind="W")))


def _eight_steps(after: int, depth: int, n_main: int) -> tuple[Op, ...]:
    """The eight steps of DualPipe on one rank.

    Args:
        after: ranks between this one and the middle (in a V: the turn).
        depth: ranks between the end of the pipeline and this one.
        n_main: repetitions of step 4.
    """
    rank = _Rank()
    for _ in range(2 * after):  # 1: fill the pipeline
        rank.forward(0)
    for _ in range(depth + 1):  # 2: both chunks forward
        rank.forward(0)
        rank.forward(1)
    for _ in range(after):  # 3: the first backward passes; W in the gap, since nothing else can run
        rank.backward(1, put_off=True)
        rank.weights()
        rank.forward(1)
    for i in range(n_main):  # 4: main phase
        if i == 0 and after == 0:  # in the middle both passes belong to one micro-batch: they cannot overlap yet
            rank.forward(0)
            rank.backward(1)
        else:
            rank.both(0)
        rank.both(1)
    for _ in range(after):  # 5: no forward passes of chunk 0 are left
        rank.backward(1)
        rank.both(1)
    for i in range(2 * (depth + 1)):  # 6: backward passes; in the second half W is put off
        rank.backward(1 - i % 2, put_off=i > depth)
    for _ in range(after):  # 7: W fills the gaps
        rank.weights()
        rank.backward(0, put_off=True)
    for _ in range(depth + 1):  # 8: what was put off
        rank.weights()
    return tuple(rank.order)


def dualpipe(n_ranks: int, micro_batches: int) -> Schedule:
    """DualPipe: two copies of the model, through which micro-batches pass in opposite directions.

    Needs an even number of ranks, and an even number of micro-batches of at least twice as many.
    """
    half, per_lane = n_ranks // 2, micro_batches // 2

    def order(rank: int) -> tuple[Op, ...]:
        depth = min(rank, n_ranks - 1 - rank)
        return _eight_steps(half - 1 - depth, depth, per_lane - n_ranks + depth + 1)

    there = tuple((rank, int(rank >= half)) for rank in range(n_ranks))
    back = tuple((rank, int(rank < half)) for rank in reversed(range(n_ranks)))
    return Schedule(tuple(map(order, range(n_ranks))), (there, back), per_lane)


def dualpipe_v(n_ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV: one copy of the model; stages lie on the ranks in a V. Needs 2 micro-batches per rank."""

    def order(rank: int) -> tuple[Op, ...]:
        return _eight_steps(n_ranks - 1 - rank, rank, micro_batches - 2 * n_ranks + rank + 1)

    lane = (*((rank, 0) for rank in range(n_ranks)), *((rank, 1) for rank in reversed(range(n_ranks))))
    return Schedule(tuple(map(order, range(n_ranks))), (lane,), micro_batches)


def bounded(schedule: Schedule, put_off: int) -> Schedule:
    """The schedule with at most so many W put off on a rank: where it would be more, W runs with its B; -1: any number.

    What a W that is put off reads takes as much memory as a micro-batch in flight. What it loses: ranks wait longer.
    """

    def order(ops: tuple[Op, ...]) -> tuple[Op, ...]:
        made: list[Op] = []
        waiting: set[Part] = set()
        for op in ops:
            late = {part._replace(kind="W") for part in op if part.kind == "B"} - {*op}
            if op[0].kind == "W":
                made += [op] if op[0] in waiting else []
                waiting -= {*op}
            elif len(waiting) + len(late) > put_off:
                made.append((*op, *late))
            else:
                made.append(op)
                waiting |= late
        return tuple(made)

    return schedule if put_off < 0 else replace(schedule, orders=tuple(map(order, schedule.orders)))


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "1f1b_paired": paired_one_f_one_b,
    "zb1p": zero_bubble,
    "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}


def make_schedule(name: str, n_ranks: int, micro_batches: int, put_off: int = -1) -> Schedule:
    """A schedule of `SCHEDULES` by name; `put_off` is for `bounded`."""
    return bounded(SCHEDULES[name](n_ranks, micro_batches), put_off)
