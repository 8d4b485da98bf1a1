"""A pipeline schedule as the table that a run reads: per tick and rank the op, its micro-batches and its buffer slots.

All ranks run one program. In every tick a rank runs one op, then all ranks exchange results with their neighbours:
what it makes in tick t can be read from tick t + 1 on. Buffers are pools of slots that both chunks of a rank share; a
slot is free again as soon as its last reader has run. Ranks write in every tick: what nobody reads goes to a slot that
is free, and only where there may be none to one more slot after the last. A pool that nothing is read from has none.

| pool | written | read by |
| --- | --- | --- |
| x | when the stage before has sent it | F |
| dy | when the stage after has sent it | B |
| early | by F | B |
| late | by F | W |
| stash | by B, where W runs in a later op | W |
| d_out | after F of a lane's last stage (`parallel.pipeline.Ends`) | B |

Pure Python and numpy; no devices.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepseek_jax.parallel.schedule import Part, Place, Schedule
from deepseek_jax.parallel.simulate import ticks

POOLS = ("x", "dy", "early", "late", "stash", "d_out")
WRITTEN = ("early", "late", "stash")  # by an op, on the rank itself
ENDS = ("F_first", "F_last", "B_first", "B_last")  # parts of a lane's first and last stage
SOURCES = {"left": -1, "right": 1, "self": 0}  # where what arrives comes from: the rank at this distance
Branch = tuple[tuple[str, int, int], ...]  # what an op runs: (kind of part, chunk, kind of stage) of each part


@dataclass(frozen=True)
class TickTable:
    """The table of a schedule; arrays are int32, ticks by ranks."""

    branches: tuple[Branch, ...]  # what there is to run; the first one is nothing
    branch: np.ndarray  # index of what a rank runs
    micro_batch: dict[str, np.ndarray]  # by kind of part, index among all micro-batches of all lanes
    # chunk, lane: by kind of part
    chunk: dict[str, np.ndarray]
    lane: dict[str, np.ndarray]
    read: dict[str, np.ndarray]  # by pool that has slots, the slot that the op reads
    write: dict[str, np.ndarray]  # by pool of `WRITTEN` that has slots, the slot that the op fills
    # by pool ("x", "dy") and source, the slot for what arrives from there after the tick
    arrive: dict[str, dict[str, np.ndarray]]
    slots: dict[str, int]  # by pool, how many are read
    sizes: dict[str, int]  # by pool, how many there are: as many, or one more for what nobody reads
    # by entry of `ENDS`, index of its micro-batch among those of all lanes, ticks by lanes; -1 where it does not run
    ends: dict[str, np.ndarray]
    at_first: dict[str, np.ndarray]  # "F", "B": whether a rank runs this part of a lane's first stage, ticks by ranks
    settle: np.ndarray  # slot of "d_out" for what follows from a lane's F_last, ticks by lanes by ranks


Key = tuple[int, int, int]  # rank, chunk, micro-batch
Life = tuple[int, int]  # written after this tick, read in that one


def make_table(schedule: Schedule, stage_kind: Callable[[Place], int]) -> TickTable:
    """Returns the table of a schedule whose stages run different programs: `stage_kind(place)` numbers them."""
    rows = ticks(schedule)
    when = {
        (part.kind, rank, part.chunk, part.micro_batch): tick
        for tick, row in enumerate(rows)
        for rank, op in enumerate(row)
        for part in op or ()
    }
    before, after = schedule.neighbours()
    slots, counts, spare = {}, {}, {}
    for pool, lives in _lives(when, before, after).items():
        slots[pool], counts[pool] = _assign(lives)
        spare[pool] = _spare(lives, slots[pool], counts[pool], (len(rows), len(schedule.orders)))
    branches: dict[Branch, int] = {(): 0}
    table = _Writer(len(rows), schedule, slots, counts, spare)
    lane_of = {place: number for number, lane in enumerate(schedule.lanes) for place in lane}
    for tick, row in enumerate(rows):
        for rank, op in enumerate(row):
            if op:
                branch = tuple((part.kind, part.chunk, stage_kind((rank, part.chunk))) for part in op)
                table.branch[tick, rank] = branches.setdefault(branch, len(branches))
                for part in op:
                    table.part(tick, rank, part, lane_of[rank, part.chunk])
                    table.sent(tick, rank, part, after if part.kind == "F" else before)
                    table.at_an_end(tick, rank, part)
    return table.finished(tuple(branches))


def _lives(when: dict, before: dict, after: dict) -> dict[str, dict[Key, Life]]:
    """Returns, by pool, when the slot of each place and micro-batch is written and read."""
    lives: dict[str, dict[Key, Life]] = {pool: {} for pool in POOLS}
    for (kind, rank, chunk, m), tick in when.items():
        key, place = (rank, chunk, m), (rank, chunk)
        back, late = when["B", rank, chunk, m], when["W", rank, chunk, m]
        if kind == "F":
            lives["early"][key], lives["late"][key] = (tick, back), (tick, late)
            if place in before:
                lives["x"][key] = when["F", *before[place], m], tick
            if place not in after:
                lives["d_out"][key] = tick, back
        elif kind == "B":
            if place in after:
                lives["dy"][key] = when["B", *after[place], m], tick
            if late > tick:
                lives["stash"][key] = tick, late
    return lives


def _assign(lives: dict[Key, Life]) -> tuple[dict[Key, int], int]:
    """Returns a slot for each, and how many slots the fullest rank needs: the first that is free when it is written."""
    slots: dict[Key, int] = {}
    n_slots = 0
    in_order = sorted(lives.items(), key=lambda item: (item[0][0], item[1]))
    for _, of_rank in itertools.groupby(in_order, key=lambda item: item[0][0]):
        free_from: list[int] = []
        for key, (written, read) in of_rank:
            slot = next((i for i, end in enumerate(free_from) if end <= written), len(free_from))
            free_from[slot : slot + 1] = [read]
            slots[key] = slot
        n_slots = max(n_slots, len(free_from))
    return slots, n_slots


def _spare(lives: dict[Key, Life], slots: dict[Key, int], n_slots: int, shape: tuple[int, int]) -> np.ndarray:
    """Returns the first slot in which nothing waits to be read, ticks by ranks; one after the last if there is none."""
    is_held = np.zeros((*shape, n_slots + 1), bool)
    for key, (written, read) in lives.items():
        is_held[written:read, key[0], slots[key]] = True
    return is_held.argmin(axis=-1).astype(np.int32)


class _Writer:
    """Fills the arrays of a table."""

    def __init__(
        self,
        n_ticks: int,
        schedule: Schedule,
        slots: dict[str, dict[Key, int]],
        counts: dict[str, int],
        spare: dict[str, np.ndarray],
    ):
        n_ranks, n_lanes = len(schedule.orders), len(schedule.lanes)

        def filled(value: int = 0) -> np.ndarray:
            return np.full((n_ticks, n_ranks), value, np.int32)

        self.schedule, self.slots, self.counts, self.branch = schedule, slots, counts, filled()
        self.micro_batch, self.chunk, self.lane = ({kind: filled() for kind in "FBW"} for _ in range(3))
        self.read = {pool: filled() for pool in POOLS}
        self.write = {pool: spare[pool].copy() for pool in WRITTEN}
        self.ends = {name: np.full((n_ticks, n_lanes), -1, np.int32) for name in ENDS}
        self.at_first = {kind: filled().astype(bool) for kind in "FB"}
        self.settle = np.full((n_ticks, n_lanes, n_ranks), counts["d_out"], np.int32)
        self.arrive = {pool: {source: filled(counts[pool]) for source in SOURCES} for pool in ("x", "dy")}

    def part(self, tick: int, rank: int, part: Part, lane: int) -> None:
        """Notes what a part in a lane reads and writes."""
        kind, chunk, m = part
        self.micro_batch[kind][tick, rank] = lane * self.schedule.micro_batches + m
        self.chunk[kind][tick, rank], self.lane[kind][tick, rank] = chunk, lane
        reads, writes = {
            "F": (("x",), ("early", "late")),
            "B": (("dy", "d_out", "early", "late"), ("stash",)),
            "W": (("late", "stash"), ()),
        }[kind]
        for pools, array in ((reads, self.read), (writes, self.write)):
            for pool in pools:
                if (rank, chunk, m) in self.slots[pool]:
                    array[pool][tick, rank] = self.slots[pool][rank, chunk, m]

    def sent(self, tick: int, rank: int, part: Part, towards: dict[Place, Place]) -> None:
        """Notes where the result of a part arrives."""
        kind, chunk, m = part
        if kind == "W" or (rank, chunk) not in towards:
            return
        there, its_chunk = towards[rank, chunk]
        pool, source = {"F": "x", "B": "dy"}[kind], {there + d: name for name, d in SOURCES.items()}[rank]
        self.arrive[pool][source][tick, there] = self.slots[pool][there, its_chunk, m]

    def at_an_end(self, tick: int, rank: int, part: Part) -> None:
        """Notes a part of a lane's first or last stage."""
        kind, chunk, m = part
        for number, lane in enumerate(self.schedule.lanes):
            for end, place in (("first", lane[0]), ("last", lane[-1])):
                if place == (rank, chunk) and kind != "W":
                    self.ends[f"{kind}_{end}"][tick, number] = number * self.schedule.micro_batches + m
                    self.at_first[kind][tick, rank] |= end == "first"
                    if (kind, end) == ("F", "last"):
                        self.settle[tick, number, rank] = self.slots["d_out"][rank, chunk, m]

    def finished(self, branches: tuple[Branch, ...]) -> TickTable:
        """Returns the table."""
        sizes = {pool: n + 1 for pool, n in self.counts.items()}
        sizes |= {pool: int(array.max()) + 1 if self.counts[pool] else 0 for pool, array in self.write.items()}
        read, write = ({pool: a for pool, a in arrays.items() if sizes[pool]} for arrays in (self.read, self.write))
        return TickTable(
            branches=branches,
            branch=self.branch,
            micro_batch=self.micro_batch,
            chunk=self.chunk,
            lane=self.lane,
            read=read,
            write=write,
            arrive=self.arrive,
            slots=self.counts,
            sizes=sizes,
            ends=self.ends,
            at_first=self.at_first,
            settle=self.settle,
        )
