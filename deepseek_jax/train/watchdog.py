"""Ends a run that is alive but makes no progress, or that a signal has asked to stop and that never begins its save.

A process whose neighbour is stuck waits in a collective for ever, while it sends heartbeats (`parallel.peers` finds
processes that are gone). The watchdog is a thread that compares how long the run has been idle (`phases`) with

    max(step_s, 10 x the median step)   between steps and while it waits for its input
    long_s                              until two steps are done; while it restores, compiles, evaluates, saves; and
                                        between steps while another process does so, for then this one waits
    stop_s                              after a signal, until the save begins: counted from the signal, or from
                                        the end of a save that it came into; from there on as above

Past a limit it writes the stacks of all threads to the workdir, and the process ends with code LOST (75), so that
whatever supervises the run starts all processes again. Where native code holds the interpreter itself, no thread of
Python runs: then `faulthandler`, which needs none, writes the stacks and ends the process with code 1.

A process that was stopped and continues (Ctrl-Z, a suspended machine) is not blamed for that time, up to the five
minutes of `faulthandler`, which cannot tell a stopped process from a stuck interpreter. Text that is tokenised shows
its own progress, and may take as long as it likes.
"""

import contextlib
import faulthandler
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from deepseek_jax import streams
from deepseek_jax.parallel.peers import LOST, Peers
from deepseek_jax.train.phases import SAVE, STEPPING, Phases
from deepseek_jax.units import duration

TICK_S = 1.0
PAUSE_S = 5.0  # between two ticks: then the process itself was stopped
MANY_STEPS = 10  # in whose time one must be done
LOOK_S = 10.0  # between two looks at what the other processes are doing
INTERPRETER_S = 300.0  # without a tick: the interpreter itself is stuck
HOSTS = "hosts"  # folder of a workdir: what each process says of itself


class Stop(Protocol):
    """What is known of requests to stop: `train.stop.StopRequest`."""

    def heard(self) -> tuple[int, float] | None:
        """The first signal and when it came."""


@dataclass(frozen=True)
class Limits:
    """Seconds, as the module says; 0: unlimited. `alone`: they hold for a run of one process as well."""

    alone: bool
    step_s: float
    long_s: float
    stop_s: float


class Watchdog:
    """A context around a run; does nothing for a run of one process, unless `limits.alone`.

    Args:
        limits: how long what may take.
        phases: what the run is doing.
        stop: the signals that came.
        peers: by which the process leaves.
        workdir: receives hosts/process_K.stacks.
        upload: takes what is there to where it is kept; it may fail or hang.
    """

    def __init__(
        self,
        limits: Limits,
        phases: Phases,
        stop: Stop,
        peers: Peers,
        workdir: Path,
        upload: Callable[[], None] = lambda: None,
    ):
        self.limits, self.phases, self.stop, self.peers, self.upload = limits, phases, stop, peers, upload
        self.path = workdir / HOSTS / f"process_{peers.index}.stacks"
        self.is_on = peers.count > 1 or limits.alone
        self._over = threading.Event()
        self._look_s, self._is_held_up = -math.inf, False

    def __enter__(self) -> Self:
        if self.is_on:
            self.peers.record = self.write_stacks
            self.peers.doing = lambda: self.phases.name
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_on:
            self._over.set()
            self._thread.join()

    def reason(self) -> str:
        """Returns why the run must end, "" while it need not."""
        heard, name = self.stop.heard(), self.phases.name
        if heard and self.limits.stop_s and name != SAVE:
            number, since_s = heard
            entered_s, left_s = self.phases.saves_s
            # The save that was under way when the signal came is not yet that of the end, and held it up.
            if entered_s < since_s and time.monotonic() - max(since_s, left_s) > self.limits.stop_s:
                which = signal.Signals(number).name
                return f"{which} came {time.monotonic() - since_s:.0f} s ago, and the run has not come to its save."
        idle_s, limit_s = self.phases.idle_s(), self.limit_s(name)
        if not limit_s or idle_s <= limit_s:
            return ""
        if name in STEPPING and not 0 < self.limits.long_s < idle_s and self.is_held_up():
            return ""
        usual_s = self.phases.usual_step_s()
        usually = f" (a step usually takes {usual_s:.2f} s)" if name in STEPPING and usual_s else ""
        return f"no progress for {duration(idle_s)} in the phase {name!r} on {socket.gethostname()}{usually}."

    def limit_s(self, name: str) -> float:
        """Returns how long a phase may be idle; 0.0: for ever."""
        if name in STEPPING and self.phases.steps > 1:
            return max(self.limits.step_s, MANY_STEPS * self.phases.usual_step_s()) if self.limits.step_s else 0.0
        return self.limits.long_s

    def is_held_up(self) -> bool:
        """Whether another process is in a phase that may take long, when this was last looked at."""
        if time.monotonic() - self._look_s > LOOK_S:
            self._look_s, self._is_held_up = time.monotonic(), bool(self.peers.others() - {*STEPPING})
        return self._is_held_up

    def write_stacks(self, reason: str) -> None:
        """Appends the stacks of all threads to the workdir's file of this process, or else to standard error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()} {os.getpid()}: {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(2, all_threads=True)
        else:
            streams.note(f"deepseek-jax: process {self.peers.index}: the stacks of its threads are in {self.path}")
            self.upload()

    def _watch(self) -> None:
        last_s = time.monotonic()
        while not self._over.wait(TICK_S):
            now_s = time.monotonic()
            if now_s - last_s > PAUSE_S:
                self.phases.excuse()
            last_s = now_s
            faulthandler.dump_traceback_later(INTERPRETER_S, exit=True, file=2)
            if reason := self.reason():
                self.peers.leave(LOST, f"{reason} {self.peers.advice()}")
        with contextlib.suppress(RuntimeError):
            faulthandler.cancel_dump_traceback_later()
