"""Temporary folders: those of living processes stay, those of dead ones are removed, however they died."""

import os
import signal
import subprocess
import sys
import threading
import time

from deepseek_jax.data import scratch as scratch_module
from deepseek_jax.data.file_locks import try_lock
from deepseek_jax.data.scratch import fresh, scratch

BUILD = """
import sys, time
from pathlib import Path
from deepseek_jax.data.scratch import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(1000)
"""


def builder(place) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(place)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_killed_builder_leaves_nothing_once_the_next_one_has_come(tmp_path):
    place = tmp_path / "tokens-1"
    (tmp_path / "tokens-1.a-users").mkdir()  # not a temporary name
    process, left = builder(place)
    with scratch(place):
        assert os.path.isdir(left)  # its owner is alive
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.path.isdir(left)
    with scratch(place) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / "tokens-1.a-users"])
    assert list(tmp_path.iterdir()) == [tmp_path / "tokens-1.a-users"]


def test_a_folder_without_an_owner_goes_after_a_day(tmp_path, monkeypatch):
    place, left = tmp_path / "tokens-1", tmp_path / "tokens-1.abcdefgh"
    left.mkdir()
    with scratch(place):
        assert left.is_dir()
    day = time.time() - 1.1 * scratch_module.ABANDONED_S
    os.utime(left, (day, day))
    with scratch(place):
        assert not left.exists()


def test_a_new_folder_is_locked_though_another_process_looks_at_it(tmp_path, monkeypatch):
    """Which then holds its lock for a moment."""
    folder = tmp_path / "tokens-1.abcdefgh"
    folder.mkdir()
    with open(folder / ".owner", "wb") as looks, open(folder / ".owner", "rb") as later:
        assert try_lock(looks.fileno())
        monkeypatch.setattr(scratch_module.tempfile, "mkdtemp", lambda **of: str(folder))
        timer = threading.Timer(0.1, looks.close)
        timer.start()
        with fresh(tmp_path / "tokens-1"):
            timer.join()
            assert try_lock(later.fileno()) is False


def test_an_owner_on_another_host_is_given_a_day(tmp_path, monkeypatch):
    left = tmp_path / "tokens-1.abcdefgh"
    left.mkdir()
    (left / ".owner").write_text("elsewhere")
    with scratch(tmp_path / "tokens-1"):
        assert left.is_dir()
