"""One of several processes does the work; the others wait, see its progress, and take over if it dies."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from deepseek_jax.data import file_locks
from deepseek_jax.data import once as module
from deepseek_jax.data.once import once
from deepseek_jax.data.watch import unwatched
from deepseek_jax.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from deepseek_jax.data.once import once
from deepseek_jax.data.watch import unwatched

lock, result, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def work(counter):
    counter.advance(7)
    print("working", flush=True)
    time.sleep(seconds)
    result.write_text("by the other")

once(lock, "work", 10, result.exists, work, unwatched)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.01)


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which holds the lock, and returns once it does."""
    started = []

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), str(tmp_path / "result"), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "working\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class Seen:
    def __init__(self):
        self.labels, self.done = [], 0

    @contextmanager
    def __call__(self, label, total):
        self.labels.append(label)
        yield self

    def advance(self, n_bytes):
        self.done += n_bytes


def run(folder, watch=unwatched, text="by us"):
    once(folder / "lock", "work", 10, (folder / "result").exists, lambda _: (folder / "result").write_text(text), watch)
    return (folder / "result").read_text()


def test_a_process_waits_for_the_one_that_works_and_sees_how_far_it_is(tmp_path, holder):
    process, seen = holder(0.5), Seen()
    assert run(tmp_path, seen) == "by the other"
    assert seen.labels[0].startswith(f"work (waiting for process {process.pid} on ")
    assert len(seen.labels) == 1 and seen.done == 7
    assert process.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_worker_that_is_killed_is_replaced(tmp_path, holder):
    process, seen = holder(600), Seen()
    process.send_signal(signal.SIGKILL)
    assert run(tmp_path, seen) == "by us"
    assert not (tmp_path / "lock").exists()


def test_a_worker_that_stands_still_is_named(tmp_path, holder, monkeypatch):
    process = holder(600)
    monkeypatch.setattr(module, "STALL_S", 0.2)
    with pytest.raises(UserError, match=f"process {process.pid} on .* has made no progress"):
        run(tmp_path)
    assert (tmp_path / "lock").exists()  # it belongs to the other process


def test_work_that_fails_frees_the_lock(tmp_path):
    def fail(counter):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        once(tmp_path / "lock", "work", 10, lambda: False, fail, unwatched)
    assert not list(tmp_path.iterdir())
    assert run(tmp_path) == "by us"


def test_where_there_are_no_locks_each_does_the_work(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file_locks.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="no file locks, so each process tokenises for itself"):
        assert run(tmp_path) == "by us"


def test_any_number_at_once_do_it_once(tmp_path):
    """Threads with files of their own meet at the lock as processes do."""
    works, barrier, failed = [], threading.Barrier(5), []

    def work(counter):
        works.append(1)
        time.sleep(0.05)
        (tmp_path / "result").write_text("")

    def again_and_again():
        barrier.wait()
        try:
            for _ in range(20):  # the lock file comes and goes
                once(tmp_path / "lock", "work", 10, (tmp_path / "result").exists, work, unwatched)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=again_and_again) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert works == [1] and not failed
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
