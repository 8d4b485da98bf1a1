"""What each process of a run spends a step on before it waits for the others, and which of them hold the others up.

In lock-step the whole steps of all processes take equally long. What differs is what a process does by itself:

    input_s   it waits for its part of the batch: slow disk, slow corpus
    host_s    its host prepares the next step: a busy or throttled CPU
    chip_s    a short program without collectives on each of its devices, the slowest: a throttled or failing chip

At each step that is logged, all processes exchange these (one small all-gather) and process 0 names those that are
above `factor` times the median `IN_ROW` times in a row. On CPUs the program is left out, for they share their cores
with everything else. Each process also appends its own to hosts/process_K.jsonl of the workdir, with the memory
in use. A run of one process does none of this.
"""

import functools
import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.mesh import joined
from deepseek_jax.train.phases import INPUT, STEP, WAIT, Phases
from deepseek_jax.train.watchdog import HOSTS

COLUMNS = {"input_s": "waits for its input", "host_s": "prepares a step on its CPU", "chip_s": "runs a test program"}
IN_ROW = 3  # comparisons in which a process must be slow to be named: one may be chance
LEAST_SHARE = 0.02  # of a step that a process must take longer than the median, to be named
LEAST_CHIP_S = 2e-4  # likewise for the test program, which does not belong to a step


class Row(NamedTuple):
    """Seconds per step of one process since it was last asked; `chip_s` of one run of the test program."""

    input_s: float
    host_s: float
    chip_s: float
    step_s: float
    memory_gib: float


class Hosts:
    """The processes of a run, compared at each step that is logged.

    Args:
        workdir: receives hosts/process_K.jsonl.
        phases: what this process has spent its time on.
        factor: times the median, above which a process is named; 0.0 compares nothing.
        say: prints a line; of process 0.
    """

    def __init__(self, workdir: Path, phases: Phases, factor: float, say: Callable[[str], None]):
        self._index = jax.process_index()
        self.path = workdir / HOSTS / f"process_{self._index}.jsonl"
        self.phases, self.factor, self.say = phases, factor, say
        self.is_on = jax.process_count() > 1 and factor > 0
        self._before = dict(phases.seconds()), phases.steps
        self._in_row: dict[tuple[int, str], int] = {}  # (process, column): comparisons in a row in which it was slow

    def compare(self, step: int) -> None:
        """Compares the processes after a step for which all of them have waited; all call it together."""
        if not self.is_on or self.phases.steps == self._before[1]:
            return
        row = self._row()
        self._write(step, row)
        rows = joined(np.asarray([row], np.float64))
        slow = {(index, column): of for index, column, *of in stragglers(rows, self.factor)}
        self._in_row = {which: self._in_row.get(which, 0) + 1 for which in slow}
        for (index, column), (seconds, median) in slow.items():
            if self._in_row[index, column] == IN_ROW:
                self.say(
                    f"step {step}: process {index} {COLUMNS[column]} for {seconds * 1e3:.1f} ms, the median is "
                    f"{median * 1e3:.1f} ms. Its host is in {HOSTS}/process_{index}.jsonl"
                )
        self._before = dict(self.phases.seconds()), self.phases.steps  # what the comparison took is nobody's

    def _row(self) -> Row:
        before, n_before = self._before
        now, n_steps = self.phases.seconds(), self.phases.steps - n_before
        input_s, host_s, wait_s = ((now[name] - before[name]) / n_steps for name in (INPUT, STEP, WAIT))
        from deepseek_jax.train.metrics import memory_gib

        return Row(input_s, host_s, chip_seconds(), input_s + host_s + wait_s, memory_gib() or 0.0)

    def _write(self, step: int, row: Row) -> None:
        record = {"step": step, "time": time.time(), "host": socket.gethostname(), **row._asdict()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError:  # a full disk stops no run
            pass


def stragglers(rows: np.ndarray | Sequence[Row], factor: float) -> list[tuple[int, str, float, float]]:
    """Returns (process, column, its seconds, the median's) of processes that take `factor` times the median or more.

    `rows` are those of all processes in order, [processes, fields of `Row`].
    """
    table = np.asarray(rows, np.float64)
    step_s = np.median(table[:, Row._fields.index("step_s")])
    found = []
    for column in COLUMNS:
        seconds = table[:, Row._fields.index(column)]
        median = float(np.median(seconds))
        least = LEAST_CHIP_S if column == "chip_s" else LEAST_SHARE * step_s
        slow = np.flatnonzero((seconds >= factor * median) & (seconds - median > least))
        found += [(int(index), column, float(seconds[index]), median) for index in slow]
    return found


def chip_seconds() -> float:
    """Returns how long the slowest of this process's devices takes for the test program; 0.0 on CPUs."""
    took = []
    for device in jax.local_devices():
        if device.platform == "cpu":
            continue
        program, matrix = _test_program(device)
        begin_s = time.monotonic()
        program(matrix).block_until_ready()
        took.append(time.monotonic() - begin_s)
    return max(took, default=0.0)


@functools.cache
def _test_program(device: jax.Device) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """A chain of matmuls and its operand on a device, compiled and run once; about 2 ms on a data-centre chip."""
    n = 128 if device.platform == "cpu" else 4096
    matrix_NN = jax.device_put(np.full((n, n), 1 / n, jnp.bfloat16), device)

    def chain(matrix_NN: jax.Array) -> jax.Array:
        found_NN = matrix_NN
        for _ in range(8):
            found_NN = found_NN @ matrix_NN
        return found_NN

    program = jax.jit(chain)
    program(matrix_NN).block_until_ready()
    return program, matrix_NN
