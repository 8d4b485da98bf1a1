"""The ledger of a run's time adds up over kills and starts; a slow process is named, and no other."""

import json

import jax
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.train import hosts as hosts_module
from deepseek_jax.train.hosts import Hosts, Row, stragglers
from deepseek_jax.train.ledger import DOWN, LOST, PRODUCTIVE, Ledger, account, read
from deepseek_jax.train.phases import COMPILE, INPUT, RESTORE, SAVE, STEP, WAIT, Phases
from deepseek_jax.train.profiles import Profiles


class Clock:
    """Seconds since 1970 that pass when a test says so."""

    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def started(tmp_path, clock: Clock, first: int) -> tuple[Phases, Ledger]:
    phases = Phases(clock)
    clock.now += 5
    with phases.of(RESTORE):
        clock.now += 3
    return phases, Ledger(tmp_path, phases, first, clock=clock)


def steps(phases: Phases, clock: Clock, n: int, seconds: float = 2.0) -> None:
    with phases.of(STEP):
        for _ in range(n):
            with phases.of(INPUT):
                clock.now += 0.25 * seconds
            with phases.of(WAIT):
                clock.now += 0.5 * seconds
            clock.now += 0.25 * seconds
            phases.progress()


def test_the_time_of_two_starts_adds_up(tmp_path, clock):
    """10 steps, a save, 5 more, a kill; 60 s later from the save again: 5 steps were lost."""
    begin = clock.now
    phases, ledger = started(tmp_path, clock, 0)
    steps(phases, clock, 10)
    with phases.of(SAVE):
        clock.now += 4
    ledger.note(10)
    steps(phases, clock, 5)
    ledger.note(15)
    clock.now += 60
    phases, ledger = started(tmp_path, clock, 10)
    with phases.of(COMPILE):
        clock.now += 7
    steps(phases, clock, 10)
    said: list[str] = []
    ledger.close(20, said.append)
    found = account(read(tmp_path))
    assert found.n_starts == 2 and found.total_s == pytest.approx(clock.now - begin)
    assert found.seconds[PRODUCTIVE] == pytest.approx(40) and found.seconds[LOST] == pytest.approx(10)
    assert found.seconds[DOWN] == pytest.approx(60) and found.seconds[COMPILE] == 7
    assert (found.seconds["start"], found.seconds[RESTORE], found.seconds[SAVE]) == (10, 6, 4)
    assert said == [str(found)] and said[0].startswith("time of this run: 0:02:17 in 2 starts: productive 29.2%")


def test_a_torn_line_and_an_empty_workdir_are_passed_over(tmp_path, clock):
    assert account(read(tmp_path)) is None
    phases, ledger = started(tmp_path, clock, 0)
    steps(phases, clock, 3)
    ledger.note(3)
    with ledger.path.open("a") as file:
        file.write('{"start": 17')
    assert account(read(tmp_path)).seconds[PRODUCTIVE] == pytest.approx(6)


def test_records_that_are_not_due_come_once_a_minute(tmp_path, clock):
    phases, ledger = started(tmp_path, clock, 0)
    for step in range(1, 101):
        steps(phases, clock, 1)
        ledger.note(step, due=False)
    assert [record["step"] for record in read(tmp_path)] == [1, 31, 61, 91]
    Ledger(tmp_path, phases, 0, enabled=False, clock=clock).note(101)
    assert len(read(tmp_path)) == 4


ROW = Row(input_s=0.01, host_s=0.05, chip_s=0.002, step_s=1.0, memory_gib=3.0)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"input_s": 0.2}, "input_s"),
        ({"host_s": 0.1}, "host_s"),
        ({"chip_s": 0.003}, "chip_s"),
        ({"input_s": 0.025}, None),  # twice the median, but 1.5 % of a step
        ({"host_s": 0.06}, None),  # 1.2 times the median
        ({"chip_s": 0.0021}, None),
        ({"step_s": 2.0, "memory_gib": 9.0}, None),
    ],
)
def test_a_slow_process_is_named_and_no_other(change, column):
    found = stragglers([ROW, ROW, ROW._replace(**change), ROW], 1.3)
    assert [(index, name) for index, name, *_ in found] == ([(2, column)] if column else [])


def test_processes_that_are_equally_slow_are_not_named():
    assert stragglers([ROW._replace(input_s=0.9)] * 4, 1.3) == []


def test_a_process_writes_what_it_does_and_the_first_names_the_slow_one(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts_module, "chip_seconds", lambda: 0.002)
    others = np.asarray([Row(9.0, 0.5, 0.002, 12.0, 1.0)])
    monkeypatch.setattr(hosts_module, "joined", lambda own: np.concatenate([own, others, own]))
    phases, said = Phases(clock), []
    hosts = Hosts(tmp_path, phases, 1.3, said.append)
    hosts.compare(0)  # before any step there is nothing to compare
    for step in (2, 4, 6, 8):  # named at the third time, and not again
        steps(phases, clock, 2)
        hosts.compare(step)
    assert len(said) == 1 and "step 6: process 1 waits for its input for 9000.0 ms, the median is 500.0 ms" in said[0]
    rows = [json.loads(line) for line in (tmp_path / "hosts" / "process_0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all((row["input_s"], row["host_s"], row["step_s"]) == (0.5, 0.5, 2.0) for row in rows)


def test_the_test_program_runs_on_a_device_and_cpus_are_left_out():
    program, matrix_NN = hosts_module._test_program(jax.devices()[1])
    np.testing.assert_allclose(np.asarray(program(matrix_NN), np.float32), 1 / 128)
    assert hosts_module.chip_seconds() == 0.0


def test_one_process_alone_compares_nothing(tmp_path):
    Hosts(tmp_path, Phases(), 1.3, print).compare(1)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("process", "calls"), [(0, ["start 3", "stop 5"]), (-1, ["start 3", "stop 5"]), (1, [])])
def test_a_range_of_steps_is_profiled(tmp_path, monkeypatch, process, calls):
    found, now = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append(f"start {now}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append(f"stop {now}"))
    with Profiles(tmp_path, port=0, first=3, steps=2, process=process) as profiles:
        for now in range(1, 7):
            profiles.before(now)
    assert found == calls


def test_a_profile_ends_with_the_run(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", found.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    with Profiles(tmp_path, port=0, first=1, steps=100, process=0) as profiles:
        profiles.before(1)
    assert found == [str(tmp_path / "profiles" / "process_0"), "stop"]


def test_the_port_of_the_last_process_must_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax.profiler, "start_server", lambda port: None)
    monkeypatch.setattr(jax.profiler, "stop_server", lambda: None)
    Profiles(tmp_path, port=65_532, first=1, steps=0, process=0)
    with pytest.raises(UserError, match="config.profile.port=65533: .* Set it to 65532 at most"):
        Profiles(tmp_path, port=65_533, first=1, steps=0, process=0)
