"""Pipeline schedules as tables: complete, without deadlock, and with the bubbles and activations that are published."""

import dataclasses

import pytest

from deepseek_jax.parallel.schedule import SCHEDULES, Part, Schedule, bounded, make_schedule
from deepseek_jax.parallel.simulate import Times, bubble, coupled_seconds, in_flight, simulate, ticks, validate

UNITS = Times(forward=1, backward=2, weights=1, both=3)
V3 = Times(forward=49, backward=75 + 32, weights=32, both=143.8)  # milliseconds, from the published phases of V3's step
BUBBLE = {  # in units, for PP stages
    "gpipe": lambda n: 3 * (n - 1),  # (PP - 1)(F + B)
    "1f1b": lambda n: 3 * (n - 1),  # (PP - 1)(F + B)
    "1f1b_paired": lambda n: 3 * (n - 1),  # (PP - 1)(F + B)
    "zb1p": lambda n: n - 1,  # (PP - 1)(F + B - 2W)
    "dualpipe": lambda n: 2 * (n // 2 - 1),  # (PP/2 - 1)(F&B + B - 3W)
    "dualpipev": lambda n: 2 * (n // 2 - 1),
}


def over(name: str, n_stages: int, micro_batches: int) -> Schedule:
    return SCHEDULES[name](n_stages // 2 if name == "dualpipev" else n_stages, micro_batches)


@pytest.mark.parametrize("n_stages", [4, 8, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_are_the_published_formulas(name, n_stages):
    for micro_batches in (2 * n_stages, 2 * n_stages + 2, 4 * n_stages):
        schedule = over(name, n_stages, micro_batches)
        validate(schedule)
        assert bubble(simulate(schedule, UNITS.seconds)) == BUBBLE[name](n_stages)


@pytest.mark.parametrize("n_stages", [4, 8, 16])
def test_activations_in_flight_are_those_of_the_report(n_stages):
    kept = {name: in_flight(over(name, n_stages, 3 * n_stages)) for name in SCHEDULES}
    assert kept["gpipe"] == [3 * n_stages] * n_stages
    assert kept["1f1b"] == list(range(n_stages, 0, -1))
    assert kept["1f1b_paired"] == list(range(2 * n_stages, 0, -2))
    assert kept["zb1p"] == [n_stages] * n_stages
    assert kept["dualpipe"] == [n_stages + 1] * n_stages
    assert kept["dualpipev"] == [n_stages + 1] * (n_stages // 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_that_wait_for_neighbours_are_never_faster(name):
    schedule = over(name, 8, 24)
    free = max(span.end for span in simulate(schedule, V3.seconds))
    assert coupled_seconds(ticks(schedule), V3.seconds) >= free * (1 - 1e-12)


def test_v3_in_lockstep_by_hand():
    """With V3's own times those lose little by an exchange after every tick whose ranks all run F&B."""
    seconds = {}
    for name in SCHEDULES:
        schedule = over(name, 16, 120)
        free = max(span.end for span in simulate(schedule, V3.seconds))
        seconds[name] = round(free / 1e3, 1), round(coupled_seconds(ticks(schedule), V3.seconds) / 1e3, 1)
    assert seconds == {
        "gpipe": (21.1, 21.1),
        "1f1b": (21.1, 28.0),
        "1f1b_paired": (19.6, 19.6),
        "zb1p": (20.1, 25.0),
        "dualpipe": (18.5, 19.4),
        "dualpipev": (35.8, 36.7),  # half the devices
    }


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p"])
def test_fewer_micro_batches_than_ranks_are_scheduled_as_well(name):
    for micro_batches in range(1, 5):
        validate(SCHEDULES[name](4, micro_batches))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("put_off", [0, 1, 3])
def test_a_rank_puts_off_at_most_as_many_w_as_it_may(name, put_off):
    schedule = bounded(over(name, 8, 24), put_off)
    validate(schedule)
    for order in schedule.orders:
        waiting = most = 0
        for op in order:
            waiting += sum({"F": 0, "B": 1, "W": -1}[part.kind] for part in op)
            most = max(most, waiting)
        assert waiting == 0 and most <= put_off
    assert bounded(schedule, 8) == bounded(schedule, -1) == schedule


def test_what_putting_off_w_gains_v3_by_hand():
    """Nothing where ranks exchange after every tick; 0.7 of 19.2 s where they do not, most of it by the first few W."""
    made = [bounded(over("dualpipe", 16, 120), n) for n in (-1, 2, 1, 0)]
    free = [max(span.end for span in simulate(schedule, V3.seconds)) for schedule in made]
    coupled = [coupled_seconds(ticks(schedule), V3.seconds) for schedule in made]
    assert [round(1e-3 * s, 2) for s in free] == [18.50, 18.75, 18.88, 19.17]
    assert [round(1e-3 * s, 2) for s in coupled] == [19.41, 19.67, 19.79, 19.31]


@pytest.mark.parametrize("put_off", [0, 2])
@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_two_micro_batches_per_rank_wait_as_long_as_more(name, put_off):
    """The planner simulates no more (`plan.step_time.bubble_seconds`)."""
    waits = [bubble(simulate(make_schedule(name, 8, 8 * n, put_off), V3.seconds)) for n in (2, 5)]
    assert waits[0] == pytest.approx(waits[1])


def test_dualpipe_runs_the_main_phase_in_pairs():
    schedule = over("dualpipe", 4, 8)
    pairs = [op for order in schedule.orders for op in order if len(op) == 3]
    assert pairs and all(f.chunk != b.chunk and b[1:] == w[1:] for f, b, w in pairs)


def test_a_tick_table_holds_each_op_once():
    schedule = over("dualpipev", 8, 16)
    rows = ticks(schedule)
    columns = [tuple(op for op in column if op) for column in zip(*rows, strict=True)]
    assert tuple(columns) == schedule.orders


def broken(change) -> Schedule:
    schedule = over("1f1b", 4, 6)
    orders = [list(order) for order in schedule.orders]
    change(orders)
    return dataclasses.replace(schedule, orders=tuple(map(tuple, orders)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda orders: orders[1].pop(), "rank 1: Part.kind='B', chunk=0, micro_batch=5. is missing"),
        (lambda orders: orders[2].append(orders[2][0]), "rank 2: .* is repeated or belongs to no lane"),
        (lambda orders: orders[0].append((Part("F", 1, 0),)), "rank 0: .*chunk=1.* belongs to no lane"),
        (lambda orders: orders[3].reverse(), "the schedule waits for itself"),
    ],
)
def test_planted_mistakes_are_found(change, words):
    with pytest.raises(ValueError, match=words):
        validate(broken(change))
