"""Supervision: dead commands start again while their checkpoints advance, and codes and signals mean what they say."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deepseek_jax import storage
from deepseek_jax.errors import UserError
from deepseek_jax.launch import supervise
from deepseek_jax.launch.supervise import Supervisor, newest_step, workdir_of
from deepseek_jax.train.checkpoint import manifest
from tests import buckets

# Ends with the codes of a list, one per start, and commits as many steps as the number before each code says.
PROGRAM = """\
echo x >> "$0/starts"; n=$(wc -l < "$0/starts"); shift $(((n - 1) * 2))
for step in $(seq 1 "$1"); do
    folder=$0/checkpoints/$(printf step_%08d $((n * 10 + step))); mkdir -p "$folder"; touch "$folder/COMMIT"
done
[ "$2" -lt 0 ] && kill "$2" $$; exit "$2"
"""


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """Supervises a program with (steps committed, exit code) of each start; returns code, number of starts, waits.

    No death counts as early.
    """
    monkeypatch.setattr(supervise, "EARLY_S", 0.0)

    def run(*behaviour: tuple[int, int], deaths: int = 2) -> tuple[int, int, list[float]]:
        words = [str(number) for start in behaviour for number in start]
        waits: list[float] = []
        code = Supervisor(["bash", "-c", PROGRAM, str(tmp_path), *words], tmp_path, deaths, 15.0, waits.append).run()
        return code, len((tmp_path / "starts").read_text().splitlines()), waits

    return run


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ([(0, 0)], (0, 1, [])),
        ([(0, 2)], (2, 1, [])),  # something to correct
        ([(1, 130)], (130, 1, [])),
        ([(1, 75), (1, 75), (1, 75), (0, 0)], (0, 4, [15, 15, 15])),
        ([(0, 75), (0, 75)], (75, 2, [15])),  # two deaths without progress
        ([(0, 1), (1, 1), (0, 75), (0, -9)], (137, 4, [15, 15, 15])),  # a step in between begins the count anew
        ([(1, -9), (0, 0)], (0, 2, [15])),
    ],
)
def test_a_command_starts_again_while_it_makes_progress(starts, behaviour, expected):
    assert starts(*behaviour) == expected


def test_steps_in_a_bucket_count_and_one_that_is_silent_shows_none(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervise, "EARLY_S", 0.0)
    folder = buckets.on_disk(tmp_path, monkeypatch) / "gs/b/run"
    folder.mkdir(parents=True)
    command = ["bash", "-c", PROGRAM, str(folder), *"1 75 1 75 1 75 0 0".split()]
    assert supervise.main(["--workdir=gs://b/run", "--wait=0", "--", *command]) == 0
    assert workdir_of(["train", "--workdir=gs://b/run"]) == storage.Remote("gs://b/run")
    assert newest_step(storage.place("gs://b/run")) == 31

    def silent(*_):
        raise storage.StorageError("gs://b/run: the service cannot be reached.")

    monkeypatch.setattr(storage.Store, "names", silent)
    waits: list[float] = []
    assert Supervisor(["false"], storage.place("gs://b/run"), 3, 15.0, waits.append).run() == 1
    assert waits == [15, 30] and "cannot be reached" in capfd.readouterr().err


def test_waits_double_up_to_the_longest(starts):
    code, n_starts, waits = starts(*[(0, 75)] * 8, deaths=8)
    assert (code, n_starts, waits) == (75, 8, [15, 30, 60, 120, 240, 300, 300])


def test_early_deaths_are_few_that_do_not_count(starts, monkeypatch):
    """Three in a row since the last progress; the wait does not double for them."""
    monkeypatch.setattr(supervise, "EARLY_S", 60.0)
    assert starts(*[(0, 75)] * 3, (1, 75), *[(0, 75)] * 5) == (75, 9, [15] * 8)


def test_a_run_that_fell_back_and_committed_has_made_progress(tmp_path, monkeypatch):
    """It began with step 30, which could not be read, resumed from 10 and got to 20."""
    monkeypatch.setattr(supervise, "EARLY_S", 0.0)
    for step in (10, 30):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:08d}/COMMIT").touch()
    program = 'cd "$0/checkpoints"; echo x >> starts; [ -e step_00000020 ] && exit 75; '
    program += "rm -r step_00000030; mkdir step_00000020; touch step_00000020/COMMIT; exit 75"
    assert Supervisor(["bash", "-c", program, str(tmp_path)], tmp_path, 1, 0.0, lambda seconds: None).run() == 75
    assert (tmp_path / "checkpoints/starts").read_text() == "x\nx\n"


def test_a_disk_that_does_not_answer_ends_nothing(starts, tmp_path, monkeypatch, capfd):
    answers = iter([[3], OSError(5, "Input/output error"), [4]])

    def committed_steps(folder: Path) -> list[int]:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(manifest, "committed_steps", committed_steps)
    assert starts((0, 75), (0, 75), (0, 0)) == (0, 3, [15, 15])
    assert "Input/output error" in capfd.readouterr().err


def test_what_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = Supervisor(["bash", "-c", "kill -HUP $PPID; sleep 0.1; exit 2"], tmp_path, 1, 0.0).run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 2


def test_a_signal_reaches_the_command_and_nothing_starts_again(tmp_path):
    program = "trap 'echo saved; exit 0' TERM; touch ready; while :; do sleep 0.05; done"
    words = ["supervise", f"--workdir={tmp_path}", "--", "bash", "-c", program]
    command = [sys.executable, "-m", "deepseek_jax", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "saved\n"
        assert process.returncode == 128 + signal.SIGTERM  # the run is not done
    finally:
        process.kill()


def test_a_signal_between_two_starts_ends_it(tmp_path):
    supervisor = Supervisor(["false"], tmp_path, 5, 60.0)
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM)).start()
    begin = time.monotonic()
    assert supervisor.run() == 128 + signal.SIGTERM and time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no command to supervise"),
        (["--", "deepseek-jax", "train"], "names no --workdir=DIR"),
        (["--deaths=0", "--", "true"], "--deaths"),
        (["--workdir=x", "--", "no-such-program"], "no-such-program: cannot be started"),
    ],
)
def test_what_is_wrong_is_named(words, expected):
    with pytest.raises(UserError, match=expected):
        supervise.main(words)


def test_the_workdir_is_that_of_the_command():
    assert workdir_of(["train", "--workdir=runs/a"]) == workdir_of(["train", "--workdir", "runs/a"]) == Path("runs/a")
    assert newest_step(Path("no/such/run")) == -1
