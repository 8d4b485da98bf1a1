"""Processes meet after a program is compiled and before it first runs; a late one is waited for, a lost one raises."""

import threading
import time

import jax
import pytest

from deepseek_jax import compat
from deepseek_jax.parallel import meeting


class Store:
    """A barrier for two; the other one comes when it is let in."""

    def __init__(self):
        self.events: list[str] = []
        self.other = threading.Event()
        self.error: Exception | None = None

    def meet(self, name: str, seconds: float) -> None:
        self.events.append(f"waits at {name}")
        assert self.other.wait(20)
        if self.error:
            raise self.error
        self.events.append("met")


@pytest.fixture
def store(monkeypatch) -> Store:
    found = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(compat, "process_store", lambda: found)
    meeting.meet.cache_clear()
    return found


def test_a_program_compiles_then_meets_then_runs(store):
    """The other process comes only when this one waits; later calls neither compile nor meet."""
    events = store.events

    class Program:
        def trace(self, x):
            raise AssertionError

        def lower(self, x):
            events.append(f"lowered {x}")
            return self

        def compile(self):
            events.append("compiled")
            store.other.set()

        def __call__(self, x):
            events.append(f"ran {x}")
            return x + 1

    run = meeting.begun_together(Program())
    assert [run(1), run(2)] == [2, 3]
    assert [event.rstrip("0123456789") for event in events] == [
        *("lowered ", "compiled", "waits at deepseek_jax/meeting/program ", "met", "ran ", "ran ")
    ]


def test_who_is_late_is_waited_for_once(store):
    begin_s = time.monotonic()
    threading.Timer(0.05, store.other.set).start()
    for _ in range(3):
        meeting.meet("a")
    assert store.events == ["waits at deepseek_jax/meeting/a", "met"]
    assert time.monotonic() - begin_s >= 0.05  # a lower bound holds on any machine


def test_who_is_lost_raises(store):
    store.error = RuntimeError("another task died")
    store.other.set()
    with pytest.raises(RuntimeError, match="died"):
        meeting.meet("a")


def test_a_run_of_one_process_keeps_the_function_itself():
    program = jax.jit(lambda x: x)
    assert meeting.begun_together(program) is program
    assert meeting.meet("alone") is None
