"""Start a command again whenever it dies, as long as its checkpoints advance.

    deepseek-jax supervise -- deepseek-jax train --config=tiny_v3 --workdir=runs/a
    deepseek-jax supervise --deaths=4 -- deepseek-jax rl --config=tiny_zero --workdir=runs/b
    srun deepseek-jax supervise -- deepseek-jax train --config=v3_671b --workdir=/shared/run     # on every process

The command resumes from its last checkpoint, as the verbs that train do. Progress is a newer committed step in the
workdir, on a disk or in a bucket: that of the command's own --workdir=DIR unless --workdir names another. One that does
not answer shows no progress. A start that dies waits before the next one: --wait seconds, twice as long after each
death without progress, five minutes at most. After --deaths deaths in a row without progress it gives up; three in the
first minute of a start are not counted among them.

Where a run has several processes, each is supervised. The first to end must not come back before the others have left,
for it would die again: keep --wait above config.watch.heartbeat_s and 5 s, after which all have heard of a loss.

Signals are passed on, unless they were ignored from the beginning (nohup). After SIGTERM, SIGINT or SIGHUP nothing is
started again, and the exit code is 128 + the signal's number, whatever the command has saved: a run that was asked to
stop is not done. Exit codes that end it at once, for another start would end likewise: 0; 2 (something to correct);
130 (Ctrl-C). Any other (1, 75, killed by a signal) counts as a death; the last one's code is that of supervise (128 +
the signal's number where a signal killed it).
"""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from deepseek_jax import streams
from deepseek_jax.bounds import number, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.storage import Place, place

LONGEST_WAIT_S = 300.0
EARLY_S, EARLY_DEATHS = 60.0, 3  # a start that ended so soon may have met what was left of another; so many in a row
FINAL = (0, 2, 130)  # exit codes after which another start would not help
PASSED_ON = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT")
    if hasattr(signal, name)
)
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
EXTRA = {
    "deaths": (int, 2, "deaths in a row without a newer checkpoint, after which it gives up", whole(1, 1000)),
    "wait": (
        float,
        45.0,
        "seconds before the next start; above those after which the other processes of a run hear of a loss",
        number(0, LONGEST_WAIT_S),
    ),
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:end], argv[end + 1 :]
    options = _options.parse(own, extra=EXTRA, config=False, in_bucket=True)
    if not command:
        raise UserError("no command to supervise. Write: deepseek-jax supervise -- deepseek-jax train --workdir=DIR")
    workdir = options.workdir or workdir_of(command)
    return Supervisor(command, workdir, options.deaths, options.wait).run()


def workdir_of(command: list[str]) -> Place:
    """Returns the workdir that a command line names. Raises UserError if it names none."""
    for index, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name == "--workdir" and (equals or index + 1 < len(command)):
            found = place(value if equals else command[index + 1])
            return found.expanduser() if isinstance(found, Path) else found
    raise UserError(
        "the command names no --workdir=DIR, whose checkpoints show its progress. Add it to the command, or write "
        "deepseek-jax supervise --workdir=DIR -- COMMAND."
    )


def newest_step(workdir: Place) -> int | None:
    """Returns the newest committed step of a run, -1 without any, None where its disk or bucket does not answer."""
    from deepseek_jax.train.checkpoint.manifest import committed_steps

    try:
        return max(committed_steps(workdir / "checkpoints"), default=-1)
    except OSError as error:
        streams.note(f"supervise: {error}")
        return None


class Supervisor:
    """Starts `command` until it ends well, must be corrected, gets a signal to stop or dies too often without progress.

    Args:
        command: the words of the command.
        workdir: of the run that it trains.
        deaths: in a row without a newer checkpoint, after which it gives up; some early ones are not counted.
        wait_s: before the next start; doubles with each such death.
        sleep: waits; returns early once a signal came.
    """

    def __init__(
        self,
        command: list[str],
        workdir: Place,
        deaths: int,
        wait_s: float,
        sleep: Callable[[float], None] | None = None,
    ):
        self.command, self.workdir, self.deaths, self.wait_s = command, workdir, deaths, wait_s
        self._sleep = sleep or self._wait
        self._child: subprocess.Popen | None = None
        self._signal: int | None = None

    def run(self) -> int:
        """Returns the exit code."""
        heard = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            return self._supervise()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _supervise(self) -> int:
        in_vain = early = 0
        newest = -1 if (found := newest_step(self.workdir)) is None else found
        while True:
            begin_s = time.monotonic()
            code = self._start()
            if self._signal is not None:
                return 128 + self._signal
            if code in FINAL:
                return code
            # A start that fell back to an older step than the newest, and committed others, has made progress as well.
            reached, began_with = newest_step(self.workdir), newest
            newest = newest if reached is None or reached < 0 else reached
            if newest != began_with:
                in_vain = early = 0
            elif early < EARLY_DEATHS and time.monotonic() - begin_s < EARLY_S:
                early += 1
            else:
                in_vain += 1
            at = "no checkpoint" if newest < 0 else f"checkpoint of step {newest}"
            if in_vain >= self.deaths:
                streams.note(f"supervise: code {code}, {at}: {in_vain} deaths without progress. Not started again.")
                return code
            wait_s = min(self.wait_s * 2 ** max(in_vain - 1, 0), LONGEST_WAIT_S)
            streams.note(f"supervise: code {code}, {at}. Starts again in {wait_s:.0f} s.")
            self._sleep(wait_s)
            if self._signal is not None:
                return 128 + self._signal

    def _start(self) -> int:
        """Runs the command once; returns its exit code as a shell shows it."""
        if self._signal is not None:
            return 128 + self._signal
        try:
            self._child = subprocess.Popen(self.command)
        except OSError as error:
            raise UserError(f"{self.command[0]}: cannot be started ({error.strerror}).") from error
        if self._signal is not None:  # it came while the process was made
            self._child.send_signal(self._signal)
        code = self._child.wait()
        self._child = None
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number in ENDING:
            self._signal = self._signal or number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _wait(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while self._signal is None and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.2))
