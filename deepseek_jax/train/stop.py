"""A request to save and end, by signal: SIGTERM, SIGHUP (a terminal that closes) or Ctrl-C.

While the run is prepared there is nothing to save: a signal raises KeyboardInterrupt at once. While it trains:

    first signal     the step in flight ends, its state is saved, the run ends
    second Ctrl-C    KeyboardInterrupt: ends without the present step; a save under way is finished
    third Ctrl-C     ends at once, as SIGKILL would; older checkpoints are intact

Ctrl-C within half a second of the first counts as the same one: launchers pass on a signal that has arrived already.

Python runs a handler when the main thread is back from native code, which a collective with a lost process never is.
The number of a signal is therefore also written to a socket, at once, which any thread may ask (`heard`).
"""

import contextlib
import os
import signal
import socket
import time
from types import FrameType
from typing import Self

from deepseek_jax import streams

SAME_CTRL_C_S = 0.5
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """A context that receives these signals; SIGHUP stays ignored where `nohup` has asked for that.

    Attributes:
        signal: the first signal that came, or None.
        is_running: whether there is something to save.
        ends_early: whether a request, of this process or another, ends the run before its last step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_running = self.ends_early = False
        self._ctrl_c, self._last_s = 0, 0.0
        self._heard: tuple[int, float] | None = None
        self._ends: tuple[socket.socket, ...] = ()  # that is read from, that the numbers are written to

    def __enter__(self) -> Self:
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        kept = [number for number in SIGNALS if number != getattr(signal, "SIGHUP", None) or not _is_ignored(number)]
        self._before = {number: signal.signal(number, self._note) for number in kept}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        ends, self._ends = self._ends, ()
        for end in ends:
            end.close()

    def heard(self) -> tuple[int, float] | None:
        """Returns the first of these signals that came and when (time.monotonic) this first saw it; in any thread."""
        ends = self._ends
        with contextlib.suppress(OSError):  # nothing there, or closed meanwhile
            arrived = ends[0].recv(64) if ends else b""
            if self._heard is None and (known := [number for number in arrived if number in SIGNALS]):
                self._heard = known[0], time.monotonic()
        return self._heard

    def begin(self) -> None:
        """From here on signals wait for a step to end."""
        self.is_running = True

    @property
    def exit_code(self) -> int:
        """What a shell shows for a program that the signal has ended."""
        return 128 + (self.signal or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first, now = self.signal is None, time.monotonic()
        if is_first:
            self.signal = number
        if not self.is_running:
            raise KeyboardInterrupt
        if number == signal.SIGINT and (is_first or now - self._last_s > SAME_CTRL_C_S):
            self._ctrl_c, self._last_s = self._ctrl_c + 1, now
        if is_first:
            streams.note(f"\n{signal.Signals(number).name}: saves this step and ends (Ctrl-C: ends without saving it)")
        elif number == signal.SIGINT and self._last_s == now:
            self._insist()

    def _insist(self) -> None:
        if self._ctrl_c > 2:
            streams.note("ended at once; the checkpoints that were finished are intact")
            os._exit(self.exit_code)
        raise KeyboardInterrupt


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN
