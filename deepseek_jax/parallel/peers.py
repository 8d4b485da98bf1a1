"""What the processes of a run know of one another outside of collectives: who is alive, and why one has left.

A step's state is spread over all processes, so without one of them the others can neither continue nor save. A
collective that waits for a process which is gone may wait for ever, and JAX's own remedy ends the program from native
code and says nothing about the run. Hence two threads beside the training:

    talker   every BEAT_S: publishes a beat of this process and what it is doing, reads the beat of the next one (a
             ring) and the reason, if any, for which a process has left; through the store of JAX's coordination
             service, kept by process 0
    judge    every second: no news for `heartbeat_s`, or a reason to leave -> says so, ends the process with code LOST

Nothing of a checkpoint is lost in this way: a save under way counts only with its COMMIT marker.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax

from deepseek_jax import compat, streams
from deepseek_jax.errors import LocalError, UserError

BEAT_S, JUDGE_S = 2.0, 1.0
ANNOUNCE_S = 2.0  # at most, for a word to those who may be gone
LOST_S = 30.0  # without a beat a process counts as lost, unless a run says otherwise
GRACE_S = 6.0  # for errors that all processes meet: each reports its own before it hears of the others'
# Exit code of a process that has lost another one, or makes no progress: start all of them again (EX_TEMPFAIL).
LOST = 75
BEATS, FAILED, GOODBYE = "deepseek_jax/beat/", "deepseek_jax/failed", "goodbye"
AT_ONCE = "at once: "  # begins a reason that concerns all processes, which need not wait for an error of their own


class Stop(Protocol):
    """What is known of requests to stop: `train.stop.StopRequest`."""

    is_running: bool

    @property
    def exit_code(self) -> int:
        """What a shell shows for a program that the signal has ended."""


class Peers:
    """A context around a run; with one process it does nothing.

    `advice` returns the sentences about the newest checkpoint and what to do, in any thread; `leave` ends the process
    at once with an exit code. Without a beat for `heartbeat_s` a process counts as lost.

    Attributes:
        record: called with the reason before the process leaves with code LOST; may fail or hang.
        doing: returns a word that the beats of this process carry, for `others`.
    """

    def __init__(
        self, advice: Callable[[], str], leave: Callable[[int], None] = os._exit, heartbeat_s: float | None = None
    ):
        self._advise, self._leave = advice, leave
        self.record: Callable[[str], None] = lambda reason: None
        self.doing: Callable[[], str] = lambda: ""
        self._lost_s = LOST_S if heartbeat_s is None else heartbeat_s
        self._beat_s = min(BEAT_S, self._lost_s / 5)
        self.index, self.count = jax.process_index(), jax.process_count()
        self._store: Any = compat.process_store() if self.count > 1 else None
        self._over = threading.Event()
        self._leaving, self._publishing = threading.Lock(), threading.Lock()
        self._heard_s = self._answered_s = time.monotonic()
        self._beat, self._parted = "", False
        self._failed: tuple[float, str] | None = None  # when and why a process left

    def __enter__(self) -> Self:
        if self._store is not None:
            for work in (self._talk, self._judge):
                threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._store is None:
            return
        if error is not None:
            reason = "stopped by a signal" if isinstance(error, KeyboardInterrupt) else first_line(error)
            self._shortly(lambda: self._store.set(FAILED, f"process {self.index}: {reason}"))
        self._over.set()
        self._shortly(lambda: self._publish(GOODBYE))

    def advice(self) -> str:
        """Returns the advice, or "" where the checkpoints cannot be looked at: their disk may be gone as well."""
        found: list[str] = []
        self._shortly(lambda: found.append(self._advise()))
        return "".join(found)

    def others(self) -> set[str]:
        """Returns what the processes are doing, by their last beats; nothing where process 0 does not answer."""
        found: list[str] = []
        if self._store is not None:
            self._shortly(lambda: found.extend(self._store.under(BEATS)))
        return {beat.partition(" ")[2] for beat in found} - {""}

    def guard(self, stop: Stop) -> "Guard":
        """A context around what all processes do together; see `Guard`."""
        return Guard(self, stop)

    def leave(self, code: int, reason: str) -> None:
        """Says why, lets the others know, and ends this process; only the first call does anything."""
        if not self._leaving.acquire(blocking=False):
            return time.sleep(GRACE_S + 4 * BEAT_S)
        streams.note(f"deepseek-jax: process {self.index}: {reason}")
        is_lost = code == LOST  # the others add advice of their own
        announced = AT_ONCE + reason.partition(". ")[0] if is_lost else reason
        self._shortly(lambda: self._store.set(FAILED, announced))
        if is_lost:
            self._shortly(lambda: self.record(reason))
        if self.index == 0 and self._store is not None:  # it keeps the store in which the others read the reason
            time.sleep(JUDGE_S / 2 + self._beat_s if is_lost else GRACE_S + 2 * self._beat_s)
        self._shortly(streams.settle)  # a pipe that nobody reads may hold it for ever
        self._leave(code)

    def lost(self, what: str) -> None:
        """Leaves because another process is gone."""
        self.leave(LOST, f"{what} Its part of the state is gone, so this step cannot be saved. {self.advice()}")

    def _talk(self) -> None:
        following = (self.index + 1) % self.count
        beat = 0
        while not self._over.wait(self._beat_s if beat else 0):
            beat += 1
            try:
                self._publish(f"{beat} {self.doing()}")
                seen, failed = self._store.get(_key(following)), self._store.get(FAILED)
            except Exception:  # the coordinator does not answer: the judge counts the seconds
                continue
            now = time.monotonic()
            self._answered_s = now
            self._parted = seen == GOODBYE
            if seen != self._beat:
                self._beat, self._heard_s = seen, now
            if failed and self._failed is None:
                self._failed = (now, failed)

    def _publish(self, text: str) -> None:
        """Stores a beat or the goodbye for the others; no beat that was under way may overwrite the goodbye."""
        with self._publishing:
            if text == GOODBYE or not self._over.is_set():
                self._store.set(_key(self.index), text)

    def _judge(self) -> None:
        following = (self.index + 1) % self.count
        last_s = time.monotonic()
        while not self._over.wait(JUDGE_S):
            now = time.monotonic()
            held_up_s, last_s = now - last_s - JUDGE_S, now
            if held_up_s > JUDGE_S:  # this process itself did not run, and could not hear of the others
                self._heard_s, self._answered_s = self._heard_s + held_up_s, self._answered_s + held_up_s
            if self._failed is not None and now - self._failed[0] > self._grace_s:
                self.lost(f"another process of this run has left ({self._failed[1].removeprefix(AT_ONCE)}).")
            elif now - self._answered_s > self._lost_s:
                self.lost(f"process 0, which all others rely on, has not answered for {self._lost_s:.0f} s.")
            elif now - self._heard_s > self._lost_s and not self._parted:
                self.lost(f"process {following} of this run has not been heard of for {self._lost_s:.0f} s.")

    @property
    def _grace_s(self) -> float:
        """How long this process waits for an error of its own once it has read why another one has left."""
        return 0 if self._failed is not None and self._failed[1].startswith(AT_ONCE) else GRACE_S

    def _shortly(self, call: Callable[[], None]) -> None:
        """Makes a call that may fail or hang, because whom it asks may be gone."""

        def run() -> None:
            with contextlib.suppress(Exception):
                call()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(ANNOUNCE_S)


class Guard:
    """A context that lets no error of this process alone leave it, for the way out would wait for the others.

    An error that all processes meet (a UserError while the loop is running, such as steps that are not finite) passes;
    before the loop nothing is to be saved, so any error ends the process here.
    """

    def __init__(self, peers: Peers, stop: Stop):
        self.peers, self.stop = peers, stop

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        all_meet = self.stop.is_running and isinstance(error, UserError) and not isinstance(error, LocalError)
        if error is None or self.peers.count == 1 or all_meet:
            return
        if isinstance(error, UserError):
            self.peers.leave(error.exit_code, f"error: {error}")
        elif isinstance(error, KeyboardInterrupt):
            code = 130 if self.stop.is_running else self.stop.exit_code
            self.peers.leave(code, f"stopped by a signal without saving. {self.peers.advice()}")
        elif is_transfer_failure(error):
            self.peers.lost(
                f"a transfer between processes failed; another one has probably ended ({first_line(error)})."
            )
        else:
            streams.note("".join(traceback.format_exception(error)))
            self.peers.leave(1, f"{first_line(error)}. {self.peers.advice()}")


def is_transfer_failure(error: BaseException) -> bool:
    """Says whether an error of JAX's runtime is about other processes, and not about this one's memory or programs."""
    text = str(error).lower()
    if not isinstance(error, jax.errors.JaxRuntimeError) or text.startswith(("resource_exhausted", "invalid_argument")):
        return False
    words = "gloo nccl connection peer coordination unavailable aborted deadline socket task"
    return any(word in text for word in words.split())


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200].rstrip(": .")


def _key(index: int) -> str:
    return f"{BEATS}{index}"
