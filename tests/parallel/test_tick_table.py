"""Tables of ticks: what is read was written before and not overwritten since, in as few slots as it takes."""

import numpy as np
import pytest

from deepseek_jax.parallel.schedule import SCHEDULES
from deepseek_jax.parallel.simulate import in_flight
from deepseek_jax.parallel.tick_table import SOURCES, TickTable, make_table

RANKS, MICRO = 4, 12


def table_of(name: str) -> TickTable:
    return make_table(SCHEDULES[name](RANKS, MICRO), lambda place: 0)


def run(table: TickTable) -> dict[tuple, list]:
    """Runs the table on names instead of arrays: what each part of each op finds in the slots that it reads."""
    n_ticks, n_ranks = table.branch.shape
    pools = {pool: [[None] * (n + 1) for _ in range(n_ranks)] for pool, n in table.slots.items()}
    found: dict[tuple, list] = {}
    for tick in range(n_ticks):
        made = [{} for _ in range(n_ranks)]
        for rank in range(n_ranks):
            for kind, chunk, _ in table.branches[table.branch[tick, rank]]:
                m = int(table.micro_batch[kind][tick, rank])
                reads = {"F": ["x"], "B": ["dy", "early", "late", "d_out"], "W": ["late", "stash"]}[kind]
                found[kind, rank, chunk, m] = [pools[pool][rank][table.read[pool][tick, rank]] for pool in reads]
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_part_reads_what_was_made_for_it(name):
    schedule = SCHEDULES[name](RANKS, MICRO)
    before, after = schedule.neighbours()
    found = run(table_of(name))
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


def test_the_main_phase_of_dualpipe_is_one_branch_in_each_direction():
    table = table_of("dualpipe")
    both = [branch for branch in table.branches if len(branch) == 3]
    assert sorted(both) == [(("F", 0, 0), ("B", 1, 0), ("W", 1, 0)), (("F", 1, 0), ("B", 0, 0), ("W", 0, 0))]
    assert np.isin(table.branch, [table.branches.index(branch) for branch in both]).mean() > 0.3
