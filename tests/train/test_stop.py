"""Signals as a request to save and end: what each does before training, while it runs, and when it comes again."""

import os
import signal
import subprocess
import sys

import pytest

from deepseek_jax.train import stop as stop_module
from deepseek_jax.train.stop import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number, capfd):
    before = [signal.getsignal(each) for each in stop_module.SIGNALS]
    with StopRequest() as stop:
        stop.begin()
        send(number)
        assert stop.signal == number
        send(signal.SIGTERM)  # a second one tears nothing
        assert stop.signal == number
    assert f"{signal.Signals(number).name}: saves this step and ends" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in stop_module.SIGNALS] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_before_training_a_signal_ends_at_once(number):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(number)
    assert (stop.signal, stop.exit_code) == (number, 128 + number)


def test_ctrl_c_again_breaks_off_unless_it_is_the_same_one(monkeypatch):
    with StopRequest() as stop:
        stop.begin()
        send(signal.SIGINT)
        send(signal.SIGINT)  # passed on by a launcher within the same moment
        monkeypatch.setattr(stop_module, "SAME_CTRL_C_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_ctrl_c_after_sigterm_breaks_off(monkeypatch):
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        stop.begin()
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_a_third_ctrl_c_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(stop_module, "SAME_CTRL_C_S", 0.0)
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopRequest() as stop:
        stop.begin()
        send(signal.SIGINT)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    assert codes == [130]


def test_nohup_keeps_its_word():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.begin()
            send(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


NOTED = """
import os, signal
from deepseek_jax import streams
from deepseek_jax.train.stop import StopRequest
streams.open_standard()
with StopRequest() as stop:
    stop.begin()
    os.kill(os.getpid(), signal.SIGINT)
os._exit(7 if stop.signal == signal.SIGINT else 1)
"""


@pytest.mark.parametrize("how", ["{} 2>&1 | true", "{} 2>&-", "{} 2>/dev/full", "{} <&- >&- 2>&-"])
def test_a_note_that_cannot_be_written_decides_nothing(how, tmp_path):
    """`2>&1 | tee` after Ctrl-C: the reader is gone before the note is written."""
    (tmp_path / "noted.py").write_text(NOTED)
    command = how.format(f"{sys.executable} {tmp_path / 'noted.py'}")
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"])
    assert done.returncode == 7
