"""Phases add up to the time of a run; the watchdog ends what is idle past its limit, and nothing else."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from deepseek_jax.launch._progress import Progress
from deepseek_jax.parallel.peers import LOST
from deepseek_jax.train import watchdog as watchdog_module
from deepseek_jax.train.phases import COMPILE, EVALUATE, INPUT, SAVE, START, STEP, Phases
from deepseek_jax.train.stop import StopRequest
from deepseek_jax.train.watchdog import Limits, Watchdog


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Peers:
    """One of two processes; remembers why it has left."""

    index, count = 1, 2

    def __init__(self):
        self.left: list[tuple[int, str]] = []
        self.record = lambda reason: None
        self.over = threading.Event()
        self.words: set[str] = set()

    def others(self) -> set[str]:
        return self.words

    def advice(self) -> str:
        return "The newest checkpoint is of step 7."

    def leave(self, code: int, reason: str) -> None:
        self.left.append((code, reason))
        self.record(reason)
        self.over.set()


class Silence:
    """No signal has come."""

    def heard(self) -> None:
        return None


def limits(**given: float) -> Limits:
    return Limits(**{"alone": False, "step_s": 100, "long_s": 1000, "stop_s": 50} | given)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_seconds_of_nested_phases_add_up(clock):
    phases = Phases(clock)
    clock.now += 3
    with phases.of(STEP):
        clock.now += 5
        with phases.of(EVALUATE):
            clock.now += 7
        clock.now += 11
        with pytest.raises(KeyError), phases.of(SAVE):
            clock.now += 13
            raise KeyError
        clock.now += 17  # not settled yet
        found = {name: seconds for name, seconds in phases.seconds().items() if seconds}
        assert found == {START: 3, STEP: 33, EVALUATE: 7, SAVE: 13} and phases.name == STEP
        assert phases.idle_s() == 17
    assert sum(phases.seconds().values()) == 56 and phases.name == START


def test_a_compilation_counts_as_one_wherever_it_occurs(clock):
    import jax

    phases = Phases(clock)
    with phases.of(EVALUATE):
        clock.now += 1000
        jax.jit(lambda x: x * 3 + 1).lower(1.0).compile()
    found = phases.seconds()
    assert 0 < found[COMPILE] < 1000 and found[COMPILE] + found[EVALUATE] == pytest.approx(1000)


def test_a_compilation_that_has_ended_is_no_idleness():
    import jax

    phases = Phases()
    with phases.of(STEP):
        time.sleep(0.05)
        begin_s = time.monotonic()
        jax.jit(lambda x: x * 5 + 1).lower(1.0).compile()
        assert phases.name == STEP and phases.idle_s() < time.monotonic() - begin_s


def test_a_compilation_is_seen_without_the_cache():
    import jax

    phases, found = Phases(), []

    def hear(event: str, value: float, **_: object) -> None:
        found.append(phases.name)

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    jax.monitoring.register_scalar_listener(hear)
    try:
        jax.jit(lambda x: x * 7 + 1).lower(1.0).compile()
    finally:
        jax.monitoring.unregister_scalar_listener(hear)
        jax.config.update("jax_enable_compilation_cache", before)
    assert found[-1] == COMPILE and phases.name == START


def stepping(phases: Phases, clock: Clock, *times: float) -> None:
    for seconds in times:
        with phases.of(INPUT):
            clock.now += seconds / 4
        clock.now += seconds * 3 / 4
        phases.progress()


def test_the_usual_step_is_the_median_without_the_first_and_without_evaluations(clock):
    phases = Phases(clock)
    with phases.of(STEP):
        stepping(phases, clock, 100, 2, 2, 8)
        with phases.of(EVALUATE):
            clock.now += 500
        stepping(phases, clock, 4)
    assert phases.usual_step_s() == 3 and phases.steps == 5


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        (STEP, {}, 100),  # the least, for 10 x 2 s are less
        (STEP, {"step_s": 5}, 20),  # ten steps
        (INPUT, {}, 100),
        (STEP, {"step_s": 0}, 1e9),
        *((name, {}, 1000) for name in (START, EVALUATE, SAVE, COMPILE)),
        (EVALUATE, {"long_s": 0}, 1e9),
    ],
)
def test_each_phase_has_its_limit(clock, name, given, allowed):
    phases = Phases(clock)
    watchdog = Watchdog(limits(**given), phases, Silence(), Peers(), Path("run"))
    with phases.of(STEP):
        stepping(phases, clock, 2, 2, 2)
        with phases.of(name):
            clock.now += allowed - 1
            assert watchdog.reason() == ""
            clock.now += 2
            assert allowed == 1e9 or f"no progress for {watchdog_module.duration(allowed + 1)} in" in watchdog.reason()
        assert watchdog.reason() == ""


def test_the_first_steps_may_take_as_long_as_a_compilation(clock):
    phases = Phases(clock)
    watchdog = Watchdog(limits(), phases, Silence(), Peers(), Path("run"))
    with phases.of(STEP):
        stepping(phases, clock, 2)
        clock.now += 999
        assert watchdog.reason() == ""


@pytest.mark.parametrize(("name", "is_over"), [(STEP, True), (EVALUATE, True), (SAVE, False)])
def test_a_signal_has_a_deadline_until_the_save_begins(clock, name, is_over):
    class Stop:
        def heard(self) -> tuple[int, float]:
            return signal.SIGTERM, time.monotonic() - 51

    phases = Phases(clock)
    watchdog = Watchdog(limits(), phases, Stop(), Peers(), Path("run"))
    with phases.of(name):
        assert ("SIGTERM came 5" in watchdog.reason()) == is_over
    assert Watchdog(limits(stop_s=0), phases, Stop(), Peers(), Path("run")).reason() == ""


def test_the_deadline_of_a_signal_ends_with_the_beginning_of_the_save():
    """A save that was under way when the signal came only puts it off."""

    class Stop:
        since_s = 0.0

        def heard(self) -> tuple[int, float]:
            return signal.SIGTERM, self.since_s

    clock, stop = Clock(), Stop()
    clock.now = time.monotonic() - 90
    stop.since_s = clock.now + 10
    phases = Phases(clock)
    watchdog = Watchdog(limits(), phases, stop, Peers(), Path("run"))
    with phases.of(SAVE):
        clock.now += 50
        assert watchdog.reason() == ""
    clock.now += 40
    assert watchdog.reason() == ""  # 40 s after that save
    with phases.of(SAVE):
        clock.now += 1
    stop.since_s -= 60
    assert watchdog.reason() == ""  # whatever comes after the save may take as long as ever
    phases.saves_s = stop.since_s - 10, stop.since_s - 5
    assert "SIGTERM came 14" in watchdog.reason()


def test_a_stuck_run_ends_with_the_stacks_of_its_threads(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watchdog_module, "TICK_S", 0.02)
    peers, phases = Peers(), Phases()
    with Watchdog(limits(step_s=0.1), phases, Silence(), peers, tmp_path), phases.of(STEP):
        phases.progress()
        phases.progress()
        assert peers.over.wait(10)
    (code, reason), *_ = peers.left
    assert code == LOST and "in the phase 'step'" in reason and "checkpoint is of step 7" in reason
    stacks = (tmp_path / "hosts" / "process_1.stacks").read_text()
    assert "test_a_stuck_run_ends" in stacks and "no progress" in stacks
    assert "process_1.stacks" in capfd.readouterr().err


def test_stacks_go_to_standard_error_where_the_workdir_cannot_be_written(tmp_path, capfd):
    (tmp_path / "hosts").write_text("a file where a folder should be")
    Watchdog(limits(), Phases(), Silence(), Peers(), tmp_path).write_stacks("no progress")
    assert "test_stacks_go_to_standard_error" in capfd.readouterr().err


def test_time_in_which_the_process_was_stopped_is_excused(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(watchdog_module, "TICK_S", 0.02)
    monkeypatch.setattr(watchdog_module, "PAUSE_S", -1.0)  # as if there was one before each tick
    peers, phases = Peers(), Phases(clock)
    with Watchdog(limits(long_s=0.1), phases, Silence(), peers, tmp_path):
        for _ in range(10):
            clock.now += 0.09
            time.sleep(0.04)
    assert peers.left == []


def test_one_process_alone_is_not_watched_unless_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Peers, "count", 1)
    before = threading.active_count()
    with Watchdog(limits(), Phases(), Silence(), Peers(), tmp_path):
        assert threading.active_count() == before
    with Watchdog(limits(alone=True), Phases(), Silence(), Peers(), tmp_path):
        assert threading.active_count() == before + 1


def test_who_waits_for_another_ones_long_phase_may_wait_as_long(clock, monkeypatch):
    monkeypatch.setattr(watchdog_module, "LOOK_S", -1.0)
    phases, peers = Phases(clock), Peers()
    watchdog = Watchdog(limits(), phases, Silence(), peers, Path("run"))
    with phases.of(STEP):
        stepping(phases, clock, 2, 2, 2)
        clock.now += 900
        for words, is_over in (({"compile", "step"}, False), ({"profile"}, False), ({"wait", "step", "input"}, True)):
            peers.words = words
            assert bool(watchdog.reason()) == is_over
        peers.words = {"compile"}
        clock.now += 101  # beyond long_s
        assert watchdog.reason()


def test_text_that_is_being_tokenised_is_no_idleness(clock):
    phases = Phases(clock)
    progress = Progress("tokens", 100, heard=phases.excuse)
    clock.now += 5000
    progress.advance(1)
    assert phases.idle_s() == 0


def test_a_signal_is_heard_while_the_main_thread_cannot_run_its_handler():
    """The handler runs when this thread is back in Python; another one hears of the signal before."""
    heard = []
    with StopRequest() as stop:
        stop.begin()
        assert stop.heard() is None
        signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the calls below stay in this thread

        def ask() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not heard and time.monotonic() < deadline:
                heard.extend([stop.heard()] if stop.heard() else [])

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert heard[0][0] == signal.SIGTERM == stop.signal
    assert stop.heard() == heard[0]
