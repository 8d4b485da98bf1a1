"""A reader that dies is replaced without changing a batch; readers end with the process that started them."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax.data import reader_processes
from deepseek_jax.data.pipeline import open_split
from deepseek_jax.data.reader_processes import NAME, watched
from deepseek_jax.errors import LocalError

NOTICED_S = 30
COUNT = 6  # batches of `Stuck`


def kill_a_reader():
    victim = next(p for p in multiprocessing.active_children() if p.name.startswith(NAME))
    os.kill(victim.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_reader_changes_no_batch(settings):
    split = open_split("train", **{**settings, "workers": 2})
    ranges = [(2 * i, 2) for i in range(40)]
    found, started = split.batches(ranges), time.monotonic()
    batches = list(itertools.islice(found, 3))
    kill_a_reader()
    with pytest.warns(UserWarning, match=r"a reader process ended unexpectedly \(exit code -9"):
        batches += found
    assert time.monotonic() - started < 2 * NOTICED_S
    for (start, count), batch in zip(ranges, batches, strict=True):
        for here, there in zip(batch, split.rows(start, count), strict=True):
            np.testing.assert_array_equal(here, there)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith(NAME)]


class Stuck:
    """Batches of which one never arrives, as if its reader was killed while handing it over."""

    def __init__(self, start, stuck_at):
        self.place, self.stuck_at, self.closed = start, stuck_at, False

    def __next__(self):
        if self.place == self.stuck_at:
            time.sleep(3600)
        if self.place == COUNT:
            raise StopIteration
        self.place += 1
        return self.place - 1

    def close(self):
        self.closed = True


class Dead:
    """A process that was killed."""

    name, exitcode = NAME, -9


@pytest.fixture
def quick(monkeypatch):
    """Polls often, and finds a dead reader."""
    monkeypatch.setattr(reader_processes, "POLL_S", 0.02)
    monkeypatch.setattr(reader_processes, "GRACE_S", 0.1)
    monkeypatch.setattr(reader_processes, "_running", lambda: [Dead()])


def test_a_batch_that_never_comes_is_asked_for_again(quick):
    places = iter([3, None])
    opened = []

    def open_at(start):
        opened.append(Stuck(start, next(places)))
        return opened[-1]

    with pytest.warns(UserWarning, match="restarted"):
        assert list(watched(open_at, COUNT, 1)) == list(range(COUNT))
    assert [iterator.closed for iterator in opened] == [True, True]


def test_readers_that_always_die_end_the_run_in_words(quick):
    with pytest.warns(UserWarning), pytest.raises(LocalError, match="lower data.workers, or set it to 0"):
        list(watched(lambda start: Stuck(start, start), COUNT, 1))


def test_an_error_of_a_reader_is_the_readers_own():
    class Failing(Stuck):
        def __next__(self):
            raise KeyError("tokens")

    with pytest.raises(KeyError, match="tokens"):
        list(watched(lambda start: Failing(start, None), 1, 1))


class Reader:
    """A process that runs until it is killed."""

    name, exitcode = NAME, None

    def kill(self):
        self.exitcode = -9

    def join(self, timeout):
        pass


def test_iterators_do_not_take_each_others_readers(monkeypatch):
    """Two that run at the same time: when one is closed, or loses a reader, the other is not disturbed."""
    running: list[Reader] = []
    monkeypatch.setattr(reader_processes, "_running", lambda: list(running))

    class Endless(Stuck):
        readers: tuple = ()

        def __next__(self):
            if not self.readers:
                self.readers = (Reader(), Reader())
                running.extend(self.readers)
                time.sleep(0.1)  # a reader takes time to make its first batch
            return super().__next__()

    opened = []

    def open_at(start):
        opened.append(Endless(start, None))
        return opened[-1]

    one, two = (watched(open_at, COUNT, 2) for _ in range(2))
    assert [next(one), next(two), next(one)] == [0, 0, 1]
    one.close()
    assert [reader.exitcode for iterator in opened for reader in iterator.readers] == [-9, -9, None, None]
    assert list(two) == [1, 2, 3, 4, 5]


PARENT = """
import multiprocessing, sys, time
from deepseek_jax.data.pipeline import open_split

if __name__ == "__main__":
    split = open_split("train", **{settings!r})
    batches = split.batches([(i, 1) for i in range(1000)])
    next(batches)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_no_reader_outlives_its_parent(settings, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.replace("{settings!r}", repr({**settings, "workers": 2})))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    readers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(readers) >= 2
    assert all(map(is_running, readers))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + NOTICED_S
    while any(map(is_running, readers)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(is_running, readers))
