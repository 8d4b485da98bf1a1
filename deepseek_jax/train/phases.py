"""What a run is doing, since when, and how long it has done what: for the watchdog, the ledger of its time and its log.

    with phases.of(EVALUATE): ...     # nests: the time of an inner phase does not count for the outer one
    phases.progress()                 # the devices have finished a step

One thread writes, any may read. Compilations of the main thread count as such wherever they occur.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from deepseek_jax import compat

NAMES = ("start", "restore", "compile", "step", "input", "wait", "evaluate", "save", "profile")
START, RESTORE, COMPILE, STEP, INPUT, WAIT, EVALUATE, SAVE, PROFILE = NAMES
STEPPING = (STEP, INPUT, WAIT)  # what steps are made of: the host's own work, its input, its devices
RECENT = 31  # steps whose median is the usual time of one


class Phases:
    """The phases of a run, beginning with START.

    Attributes:
        steps: that the devices have finished.
        saves_s: when SAVE was last entered and when it was left, -inf: never.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._compilation = clock, compat.compilation()
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._names = [START]
        self._since_s = self._marked_s = clock()
        self._compiled_s = self._compilation.seconds
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._stepped_s, self.steps = 0.0, 0
        self.saves_s = -math.inf, -math.inf

    @property
    def name(self) -> str:
        """The phase that the run is in."""
        return COMPILE if self._compilation.began_s is not None else self._names[-1]

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What happens within it is of the phase `name`."""
        self._settle()
        self._names.append(name)
        entered_s = self._since_s
        if name == SAVE:
            self.saves_s = entered_s, self.saves_s[1]
        try:
            yield
        finally:
            self._settle()
            self._names.pop()
            if name == SAVE:
                self.saves_s = entered_s, self._since_s

    def progress(self) -> None:
        """Notes that the devices have finished another step."""
        self._settle()
        stepped_s = sum(self._seconds[name] for name in STEPPING)
        if self.steps:  # the first one compiles
            self._recent.append(stepped_s - self._stepped_s)
        self._stepped_s = stepped_s
        self.steps += 1

    def seconds(self) -> dict[str, float]:
        """Returns how long the run has been in each phase."""
        found, open_s = dict(self._seconds), self._clock() - self._since_s
        compiled_s = min(max(self._compilation.seconds - self._compiled_s, 0.0), open_s)
        found[COMPILE] += compiled_s
        found[self._names[-1]] += open_s - compiled_s
        return found

    def idle_s(self) -> float:
        """Returns how long ago a phase or a compilation began or ended, or a step was finished."""
        known, marked_s = self._compilation, self._marked_s
        if known.seconds != self._compiled_s:  # one has ended within the phase
            marked_s = max(marked_s, known.ended_s)
        return self._clock() - max(marked_s, known.began_s or 0.0)

    def usual_step_s(self) -> float:
        """Returns the median time of the last steps, 0.0 before there are any."""
        recent = list(self._recent)
        return statistics.median(recent) if recent else 0.0

    def excuse(self) -> None:
        """Counts the time until now as no idleness: the process itself was stopped, or a long phase continues."""
        self._marked_s = self._clock()

    def _settle(self) -> None:
        """Gives the time until now to the phase that the run is in."""
        self._compilation.began_s = None  # of one that failed
        self._seconds = self.seconds()
        self._since_s = self._marked_s = self._clock()
        self._compiled_s = self._compilation.seconds
