"""plan --compile: compiles the step that train would run, in a process of its own, and watches that process."""

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.targets import environment
from deepseek_jax.plan.compiled import CompiledStep, from_json
from deepseek_jax.plan.job import Job
from deepseek_jax.saved_config import to_json
from deepseek_jax.units import binary, duration

CHILD = "deepseek_jax.launch._compiled_step"
LINE_EVERY_S = 30.0
POLL_S = 0.5
GIB = 2**30
TAIL = 3  # lines of a failed process's complaints that are shown
WORDS = {
    "devices": "making the devices",
    "shapes": "making the model as shapes",
    "trace": "tracing the step",
    "lint": "looking for collectives that would hang",
    "lower": "writing it as StableHLO",
    "compile": "compiling it with XLA",
    "read": "reading the compiled program",
}


def check(options: SimpleNamespace, n_devices: int) -> None:
    """Raises UserError if there is no such target, or less memory is free than compiling may take."""
    environment(options.target, n_devices)
    if free_bytes() < options.memory * GIB:
        raise UserError(
            f"plan --compile --memory={options.memory:g}: this machine has {binary(free_bytes())} of memory free. "
            "Give a smaller --memory, which is where compiling stops, or end other programs."
        )


def compiled_step(config: ConfigDict, job: Job, options: SimpleNamespace) -> CompiledStep:
    """Compiles the step of a job. Raises UserError if it cannot be compiled, or not within the given memory."""
    question = {"config": to_json(config_of(config, job, options.schedule)), "target": options.target}
    variables = environment(options.target, job.layout.devices)
    with tempfile.TemporaryFile("w+") as complaints, _started(question, variables, complaints) as child:
        try:
            found = _Watch(child, options.memory * GIB).answer()
        finally:
            child.kill()
        if found is None:
            complaints.seek(0)
            last = " ".join(line.strip() for line in complaints.read().splitlines()[-TAIL:])
            raise UserError(_why(child.wait(), last))
    if "error" in found:
        raise UserError(found["error"])
    return from_json(found["result"])


def config_of(config: ConfigDict, job: Job, schedule: str) -> ConfigDict:
    """The config of a run that is divided as a job is: what was not given in it came from the published run."""
    config, at = config.copy_and_resolve_references(), job.layout
    config.unlock()
    config.mesh.update(pipe=at.pipe, data=at.data, expert=at.expert)
    config.pipeline.update(schedule=schedule, micro_batches=at.micro_batches)
    return config.lock()


def _started(question: dict, variables: dict[str, str], complaints: IO) -> subprocess.Popen:
    """Starts the process that compiles, and gives it the question."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", CHILD],  # -P: the installed package, not a checkout in the working directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        text=True,
        env=os.environ | variables,
    )
    assert child.stdin is not None
    with child.stdin as pipe:
        json.dump(question, pipe)
    return child


def _why(code: int, last: str) -> str:
    """Why a process left without an answer."""
    if code == -9:
        return (
            "plan --compile: the process that compiles was killed, most likely because the machine's memory ran out. "
            "Compile for fewer devices along config.mesh.pipe, a smaller model, or on a machine with more memory."
        )
    return f"plan --compile: the process that compiles ended with code {code}: {last}"


class _Watch:
    """Waits for a process, prints its phases on standard error, and ends it when it takes too much memory."""

    def __init__(self, child: subprocess.Popen, limit: float):
        self.child, self.limit, self.phase = child, limit, ""
        self.begin = self.of_phase = self.told = time.monotonic()
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def answer(self) -> dict | None:
        """The last line of the process, an object; None if it left without one."""
        while True:
            self._check_memory()
            try:
                line = self.lines.get(timeout=POLL_S)
            except queue.Empty:
                self._still()
                continue
            if line is None:
                return None
            found = json.loads(line)
            if "phase" not in found:
                self._done()
                return found
            self._done()
            self.phase, self.of_phase = found["phase"], time.monotonic()

    def _check_memory(self) -> None:
        if held_bytes(self.child.pid) > self.limit:
            self.child.kill()
            raise UserError(
                f"plan --compile: {WORDS.get(self.phase, 'starting')} took more than --memory={self.limit / GIB:g} GiB "
                f"after {duration(time.monotonic() - self.begin)}. Give a larger --memory, or fewer layers per stage."
            )

    def _done(self) -> None:
        now = time.monotonic()
        if self.phase:
            self._tell(f"{now - self.of_phase:.1f} s")
        self.told = now

    def _still(self) -> None:
        now = time.monotonic()
        if self.phase and now - self.told >= LINE_EVERY_S:
            self.told = now
            self._tell(f"{duration(now - self.of_phase)} so far, {binary(held_bytes(self.child.pid))}")

    def _tell(self, text: str) -> None:
        print(f"compile: {WORDS[self.phase]}: {text}", file=sys.stderr, flush=True)


def held_bytes(pid: int) -> int:
    """The memory that a process holds (resident set size); 0 where it is unknown."""
    status = Path(f"/proc/{pid}/status")
    try:
        line = status.read_text().partition("VmRSS:")[2]
    except OSError:
        return 0
    return 1024 * int(line.split()[0]) if line else 0


def free_bytes() -> float:
    """The memory that the machine has free; infinite where it is unknown."""
    try:
        line = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
    except OSError:
        return math.inf
    return 1024 * int(line.split()[0]) if line else math.inf
