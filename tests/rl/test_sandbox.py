"""Programs of a model: they compute, and nothing else; each ends within its limit."""

import os
import platform
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import Response, Rewards, sandbox
from deepseek_jax.rl.rewards.confined import ALLOWED
from deepseek_jax.rl.rewards.sandbox import DIED, FINISHED, NOT_STARTED, TOO_LONG, TOO_MUCH, Limits
from deepseek_jax.rl.rewards.verifiers import code, programs

sys.path.insert(0, str(Path(__file__).parent))
import hostile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
SECONDS = 1.0
TESTS = [{"input": "2 3\n", "output": "5\n"}, {"input": "40 2\n", "output": "42"}]


SAID = ("a * b", "a + b, a + b", "f' {a + b}'", "f'{a + b}.'", "float(a + b)", "f'0{a + b}'", "a, b", "'5\\n42'")


def answer(program):
    return f"This adds them:\n```python\n{program}\n```\nIt works."


def test_a_program_that_passes_all_tests_is_right():
    right = "import math\na, b = map(int, input().split())\nprint(math.fsum([a, b]).__int__())"
    assert code(TESTS, answer(right)) == 1.0
    assert code(TESTS, f"{answer('print(0)')}\n{answer(right)}") == 1.0, "the last program counts"
    assert code([], answer(right)) is None, "a problem without tests cannot be judged"


def test_the_time_of_a_program_is_given():
    slow = answer("import time\nuntil = time.monotonic() + 0.6\nwhile time.monotonic() < until:\n    pass\nprint(5)")
    assert code(TESTS[:1], slow, seconds=0.3) != 1.0 and code(TESTS[:1], slow, seconds=60.0) == 1.0


def test_programs_are_found_among_very_many_marks():
    """In quadratic time the second would take longer than a test may."""
    assert programs("```py\na\n```python\n``` \nb\n```\n```python3\n```\n```python\nc") == ["a\n```python\n", ""]
    assert programs("```python\n" * 100_000) == []


def test_what_only_looks_like_a_program_that_passes_is_not():
    programs = [
        "print(5)",
        "",
        "print(5)\nprint(42)",
        "1 / 0",
        "print(",
        "import numpy",
        "input()\nprint(5, end=' 42')",
    ]
    programs += ["raise SystemExit(0)", "print(5)\nraise SystemExit(1)", "import sys\nsys.exit()"]
    programs += ["print(input())", "print(2 + 3)", "print(a + b)", "print 5", "return 5", "def solve():\n    return 5"]
    programs += ["class Same(str):\n    def __eq__(self, other):\n        return True\nprint(Same())", "print(True)"]
    programs += ["import sys\nsys.stderr.write('5')", "print('correct')", "import os\nprint(os.environ)", "assert True"]
    programs += [f"a, b = map(int, input().split())\nprint({said})" for said in SAID]
    assert len(programs) >= 30 and [code(TESTS, answer(program)) for program in programs] == [0.0] * len(programs)
    for content in ("", "5", "```\nprint(5)\n```", "```python\nprint(5)", "print(5)"):
        assert code(TESTS, content) == 0.0


# Calls that reach beyond the process, by their numbers on (x86-64, arm64).
REACHING = {
    "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281), "openat": (257, 56),
    "openat2": (437, 437), "socket": (41, 198), "connect": (42, 203), "sendto": (44, 206), "kill": (62, 129),
    "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "shmget": (29, 194), "memfd_create": (319, 279),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "prctl": (157, 167),
    "prlimit64": (302, 261), "ioctl": (16, 29), "io_uring_setup": (425, 425), "mount": (165, 40), "unshare": (272, 97),
    "bpf": (321, 280),
}  # fmt: skip


def test_the_kernel_refuses_every_call_that_is_not_allowed():
    """None that reaches beyond the process is allowed; of the others each number is tried, those of x32 as well."""
    for machine, numbers in zip(("x86_64", "aarch64"), zip(*REACHING.values(), strict=True), strict=True):
        assert not ALLOWED[machine] & set(numbers)
    allowed = ALLOWED[platform.machine()] | {335, 336}  # uretprobe, uprobe: the kernel's own, they end the program
    numbers = [n for start in (0, 0x40000000) for n in range(start, start + 600) if n not in allowed]
    program = (
        "import ctypes\n"
        "syscall = ctypes.CDLL(None, use_errno=True).syscall\n"
        f"made = [n for n in {numbers} if syscall(n, -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != 1]\n"
        "print(made)"
    )
    assert sandbox.run(program) == (FINISHED, "[]\n")


def ended(kind, ran):
    """Whether a program of a kind ended as it should."""
    endings = {"endless": (TOO_LONG, DIED), "output": (TOO_MUCH,), "memory": (DIED, TOO_LONG)}
    return ran.ending in endings.get(kind, (DIED,))


def check_all(programs, n_threads):
    """Runs programs side by side; returns those that did not end as they should."""

    def one(pair):
        kind, program = pair
        for seconds in (SECONDS, 10 * SECONDS, 60 * SECONDS):  # a busy machine may give it too little time
            begin = time.monotonic()
            ran = sandbox.run(program, "", Limits(seconds, 256 << 20, 100_000))
            late = time.monotonic() - begin > seconds + 100  # far beyond, for the same reason
            if ended(kind, ran) or ran.ending not in (NOT_STARTED, TOO_LONG):
                break
        wrote = len(ran.output) > 100_000 + sandbox.CHUNK_BYTES
        bad = not ended(kind, ran) or "ESCAPED" in ran.output or late or wrote
        return (program, ran.ending, ran.output[:50]) if bad else None

    with ThreadPoolExecutor(n_threads) as pool:
        return [found for found in pool.map(one, programs) if found]


def confined_processes():
    """Returns the ids of processes that run in the sandbox."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                "confined.py" in (entry / "cmdline").read_text()
                and f"\0{os.getpid()}\0" in (entry / "cmdline").read_text()
            ):
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.fixture
def world(tmp_path):
    """What hostile programs may not touch: a file, and somebody who listens; checked in the end."""
    canary = tmp_path / "canary"
    canary.write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield str(canary), server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()
    assert canary.read_text() == "here" and [*tmp_path.iterdir()] == [canary]
    assert canary.stat().st_mode & 0o400
    assert confined_processes() == []


def test_harm_is_refused(world):
    chosen = [pair for pair in hostile.programs(*world, 78) if pair[0] not in ("endless", "memory")]
    assert check_all(chosen[::4], 2) == []


def test_a_program_ends_within_its_limits(world):
    chosen = [pair for pair in hostile.programs(*world, 78) if pair[0] in ("endless", "memory")]
    assert check_all(chosen[1::9], 2) == []


@pytest.mark.slow
def test_hostile_programs_of_every_kind(world):
    """One of each pattern; DEEPSEEK_JAX_FAULTS=10 runs ten."""
    programs = hostile.programs(*world, 78 * int(os.environ.get("DEEPSEEK_JAX_FAULTS", "1")))
    assert len(set(programs)) > len(programs) / 2 and {kind for kind, _ in programs} == {
        *("fork", "files", "network", "others", "memory", "endless", "output")
    }
    assert check_all(programs, 4) == []


def test_a_program_does_not_see_this_process(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    ran = sandbox.run("import os, sys\nprint(dict(os.environ), sys.path, 'deepseek_jax' in sys.modules)")
    assert ran.ending == FINISHED and "x'" not in ran.output.replace("lib", "") and ran.output.endswith("False\n")


def test_a_sandbox_that_does_not_start_is_nobodys_fault(monkeypatch, tmp_path):
    broken = tmp_path / "confined.py"
    broken.write_text("raise SystemExit('no seccomp here')")
    monkeypatch.setattr(sandbox, "INSIDE", broken)
    assert sandbox.run("print(1)").ending == NOT_STARTED
    assert code(TESTS, answer("print(5)")) is None
    problem, response = Problem((), TESTS, "code"), Response({"content": answer("print(5)")}, 5, 10, True)
    with Rewards({"accuracy": 1.0}) as rewards, pytest.raises(UserError, match="safe on Linux only"):
        rewards.score([problem], [response])
