"""Tables of ticks: what is read was written before and not overwritten since, in as few slots as it takes."""

import numpy as np
import pytest

from deepseek_jax.parallel.schedule import SCHEDULES, make_schedule
from deepseek_jax.parallel.simulate import in_flight
from deepseek_jax.parallel.tick_table import SOURCES, WRITTEN, TickTable, make_table

RANKS, MICRO = 4, 12


def table_of(name: str, put_off: int = -1) -> TickTable:
    return make_table(make_schedule(name, RANKS, MICRO, put_off), lambda place: 0)


def run(table: TickTable) -> dict[tuple, list]:
    """Runs the table on names instead of arrays: what each part of each op finds in the slots that it reads."""
    n_ticks, n_ranks = table.branch.shape
    pools = {pool: [[None] * n for _ in range(n_ranks)] for pool, n in table.sizes.items()}
    found: dict[tuple, list] = {}
    for tick in range(n_ticks):
        made = [{} for _ in range(n_ranks)]
        for rank in range(n_ranks):
            for kind, chunk, _ in table.branches[table.branch[tick, rank]]:
                m = int(table.micro_batch[kind][tick, rank])
                reads = {"F": ["x"], "B": ["dy", "early", "late", "d_out"], "W": ["late", "stash"]}[kind]
                there = [pool for pool in reads if table.sizes[pool]]
                found[kind, rank, chunk, m] = [pools[pool][rank][table.read[pool][tick, rank]] for pool in there]
                makes = {"F": ["x", "early", "late"], "B": ["dy", "stash"], "W": []}[kind]
                made[rank] |= {pool: (pool, rank, chunk, m) for pool in makes}
        for pool, slots in table.write.items():
            for rank in range(n_ranks):
                pools[pool][rank][slots[tick, rank]] = made[rank].get(pool)
        for lane, m in enumerate(table.ends["F_last"][tick]):
            for rank in range(n_ranks):
                pools["d_out"][rank][table.settle[tick, lane, rank]] = ("d_out", int(m))
        for pool, sources in table.arrive.items():
            for source, slots in sources.items():
                for rank in range(n_ranks):
                    sender = rank + SOURCES[source]
                    if slots[tick, rank] < table.slots[pool]:
                        pools[pool][rank][slots[tick, rank]] = made[sender][pool]
    return found


def later_w(schedule) -> set[tuple]:
    """The W that do not run in the op of their B."""
    ops = [(rank, op) for rank, order in enumerate(schedule.orders) for op in order]
    alone = [(rank, op[0]) for rank, op in ops if len(op) == 1 and op[0].kind == "W"]
    return {("W", (rank, part.chunk), part.micro_batch) for rank, part in alone}


@pytest.mark.parametrize("put_off", [-1, 0, 1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_part_reads_what_was_made_for_it(name, put_off):
    schedule = make_schedule(name, RANKS, MICRO, put_off)
    before, after = schedule.neighbours()
    found = run(table_of(name, put_off))
    assert len(found) == 3 * sum(map(len, schedule.lanes)) * schedule.micro_batches
    for (kind, rank, chunk, m), values in found.items():
        place, own = (rank, chunk), (rank, chunk, m)
        if kind == "F" and place in before:
            assert values == [("x", *before[place], m)]
        if kind == "B":
            assert values[1:3] == [("early", *own), ("late", *own)]
            assert values[0] == ("dy", *after[place], m) if place in after else values[3] == ("d_out", m)
        if kind == "W":
            assert values[0] == ("late", *own)
            assert values[1:] == [("stash", *own)] or (kind, place, m) not in later_w(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_micro_batch_enters_and_leaves_once_there_and_back(name):
    schedule, table = SCHEDULES[name](RANKS, MICRO), table_of(name)
    for column in table.ends.values():
        for lane in range(len(schedule.lanes)):
            ran = column[:, lane][column[:, lane] >= 0]
            assert sorted(ran) == list(range(lane * schedule.micro_batches, (lane + 1) * schedule.micro_batches))
    for kind, at_first in table.at_first.items():
        assert at_first.sum(axis=1).tolist() == (table.ends[f"{kind}_first"] >= 0).sum(axis=1).tolist()


@pytest.mark.parametrize("name", SCHEDULES)
def test_slots_are_no_more_than_micro_batches_in_flight(name):
    table = table_of(name)
    kept = max(in_flight(SCHEDULES[name](RANKS, MICRO)))
    assert table.slots["early"] <= table.slots["late"] <= kept
    assert table.slots["stash"] == 0 or name in ("zb1p", "dualpipe", "dualpipev")


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_pools_whose_slots_may_all_be_taken_have_one_more(name):
    """DualPipe and its kin fill every slot for W at once in ticks in which a rank writes none."""
    for put_off in (-1, 0, 1):
        table = table_of(name, put_off)
        for pool in WRITTEN:
            assert table.sizes[pool] <= table.slots[pool] + bool(table.slots[pool])
            assert (pool in table.write) == (pool in table.read) == (table.slots[pool] > 0)
        assert table.slots["stash"] <= put_off or put_off < 0


def test_the_main_phase_of_dualpipe_is_one_branch_in_each_direction():
    table = table_of("dualpipe")
    both = [branch for branch in table.branches if len(branch) == 3]
    assert sorted(both) == [(("F", 0, 0), ("B", 1, 0), ("W", 1, 0)), (("F", 1, 0), ("B", 0, 0), ("W", 0, 0))]
    assert np.isin(table.branch, [table.branches.index(branch) for branch in both]).mean() > 0.3
