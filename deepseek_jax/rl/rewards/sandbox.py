"""Programs that a model wrote, run where they can do no harm: a process of its own, without the system's calls.

    memory, processor time, size of files    limits of the process (setrlimit)
    files, network, processes, signals       the kernel refuses every call but a short list (seccomp), once the
                                             interpreter has started; modules are loaded before
    time on the clock, length of the output  this process kills the other

A program reads its input from standard input and writes to standard output. It never sees what is expected of it. Linux
on x86-64 and arm64 only: elsewhere `check` raises an error, and nothing is run.
"""

import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from deepseek_jax.errors import UserError

FINISHED, DIED, TOO_LONG, TOO_MUCH, NOT_STARTED = "finished", "died", "too long", "too much output", "not started"
READY = b"\x06"  # written by the process when the kernel refuses calls, before the program begins
INSIDE = Path(__file__).with_name("confined.py")
CHUNK_BYTES = 1 << 16


class Limits(NamedTuple):
    """What a program may use."""

    seconds: float = 5.0  # on the clock, the start of the interpreter included
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20


class Ran(NamedTuple):
    """How a program ended."""

    ending: str  # FINISHED with exit code 0; DIED by an exception, an exit code or a signal; …
    output: str


def run(program: str, given: str = "", limits: Limits = Limits()) -> Ran:  # noqa: B008 - immutable
    """Returns how a Python program ended and what it wrote; `given` is its standard input."""
    arguments = [str(limits.memory_bytes), str(int(limits.seconds) + 1), str(os.getpid())]
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(INSIDE), *arguments]
    text = program.encode(errors="replace")
    with tempfile.TemporaryFile() as file:
        file.write(len(text).to_bytes(8, "little") + text + given.encode(errors="replace"))
        file.seek(0)
        deadline = time.monotonic() + limits.seconds
        try:
            process = subprocess.Popen(
                command,
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError:  # no memory, no processes left: not the program's fault
            return Ran(NOT_STARTED, "")
        try:
            assert process.stdout is not None
            output, ending = read(process.stdout, deadline, limits.output_bytes)
        finally:
            end(process)
    if not output.startswith(READY):
        return Ran(NOT_STARTED, "")
    if ending == FINISHED and process.returncode:
        ending = DIED
    return Ran(ending, output[len(READY) :].decode(errors="replace"))


def read(stream: IO[bytes], deadline: float, most_bytes: int) -> tuple[bytes, str]:
    """Returns what is written to `stream`, and FINISHED, or why reading ended before its end."""
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return bytes(output), TOO_LONG
            part = os.read(stream.fileno(), CHUNK_BYTES)
            if not part:
                return bytes(output), FINISHED
            output += part
            if len(output) > most_bytes:
                return bytes(output), TOO_MUCH


def end(process: subprocess.Popen) -> None:
    """Ends a process, which closed its output or took too long; one that has just finished keeps its exit code."""
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def check() -> None:
    """Raises UserError if programs cannot be confined here."""
    where = f"{platform.system()} on {platform.machine()}"
    if run("print(6 * 7)").output.strip() != "42":
        raise UserError(
            f"problems of kind code run programs that a model wrote, which is safe on Linux only, on x86-64 and arm64, "
            f"where seccomp is allowed. This is {where}, and a trial failed. Use other problems, or another machine."
        )
