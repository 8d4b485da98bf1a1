"""What surrounds a run: in which order it is entered, and what code it ends with."""

import contextlib
import signal
from types import SimpleNamespace

import jax
import pytest

from deepseek_jax import compat
from deepseek_jax.launch._training import execute
from deepseek_jax.parallel import peers as peers_module
from deepseek_jax.run_config import load
from deepseek_jax.train import loop as loop_module
from deepseek_jax.train import mirror as mirror_module
from deepseek_jax.train import watchdog as watchdog_module
from deepseek_jax.train.loop import StopPoll
from deepseek_jax.train.stop import StopRequest


@pytest.fixture
def entered(monkeypatch) -> list[str]:
    """The contexts around a run in the order in which they were entered; none of them does anything."""
    found: list[str] = []

    def context(name: str):
        @contextlib.contextmanager
        def enter(*_: object, **__: object):
            found.append(name)
            yield SimpleNamespace()

        return enter

    for name in ("keep_freed_memory", "start_processes", "start_compilation_cache"):
        monkeypatch.setattr(compat, name, lambda *_: None)
    monkeypatch.setattr(peers_module, "Peers", context("peers"))
    monkeypatch.setattr(mirror_module, "mirrored", context("mirror"))
    monkeypatch.setattr(watchdog_module, "Watchdog", context("watchdog"))
    return found


def test_a_process_beats_before_it_fetches_what_an_earlier_start_wrote(tmp_path, entered):
    assert execute(load("tiny_v3"), tmp_path, sample=False, again="", run=lambda *_: True) == 0
    assert entered == ["peers", "mirror", "watchdog"]


@pytest.mark.parametrize(
    ("own", "ends_early", "expected"),
    [
        (None, False, 0),
        (None, True, peers_module.LOST),  # another process's signal
        (signal.SIGTERM, True, 0),
        (signal.SIGINT, True, 130),
    ],
)
def test_a_run_that_another_process_has_stopped_is_not_done(tmp_path, entered, own, ends_early, expected):
    def run(config, workdir, stop, again, peers, phases) -> bool:
        stop.signal, stop.ends_early = own, ends_early
        return True

    assert execute(load("tiny_v3"), tmp_path, sample=False, again="", run=run) == expected


@pytest.mark.parametrize(("step", "expected"), [(4, True), (5, False)])
def test_a_run_stopped_at_its_last_step_is_done(monkeypatch, step, expected):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop_module, "largest", lambda *figures: (1.0, 0.1))
    stop = StopRequest()
    assert StopPoll(stop, 3, 5).should_stop(step) and stop.ends_early == expected
