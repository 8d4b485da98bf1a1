"""The inside of the sandbox: run as a script by `sandbox`, in an interpreter without site packages.

    confined.py MEMORY_BYTES SECONDS PARENT      on standard input: 8 bytes of length, the program, its own input

Limits first, then the modules that programs may use, then a filter that the kernel applies to every later call: those
of `ALLOWED` are made, all others fail with EPERM. No filter can be removed again, by anyone.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import sys

# Modules that programs may import: none can be loaded once files cannot be opened.
MODULES = """
abc array ast base64 binascii bisect calendar cmath codecs collections collections.abc contextlib copy dataclasses
datetime decimal difflib enum fractions functools graphlib hashlib heapq inspect io itertools json keyword locale math
numbers operator pprint queue random re reprlib statistics string struct sys textwrap threading time timeit tokenize
traceback types typing unicodedata uuid weakref zlib encodings.ascii encodings.latin_1 encodings.utf_8 encodings.idna
""".split()

# Calls that touch nothing outside the process but the three streams it was given, by their numbers on each machine.
ALLOWED = {
    "x86_64": {
        *(0, 1, 3, 5, 8),  # read, write, close, fstat, lseek
        *(9, 10, 11, 12, 25, 28),  # mmap, mprotect, munmap, brk, mremap, madvise
        *(13, 14, 15, 131),  # rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack: of its own signals
        *(24, 35, 96, 201, 202, 219, 228, 229, 230),  # sched_yield, nanosleep, clocks, futex, restart_syscall
        *(39, 60, 98, 186, 231, 318, 334),  # getpid, exit, getrusage, gettid, exit_group, getrandom, rseq
    },
    "aarch64": {
        *(63, 64, 57, 80, 62),
        *(222, 226, 215, 214, 216, 233),
        *(134, 135, 139, 132),
        *(124, 101, 169, 98, 128, 113, 114, 115),
        *(172, 93, 165, 178, 94, 278, 293),
    },
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# seccomp's filters are programs of Berkeley's packet filter: load a word, jump if equal, return.
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_AT, ARCH_AT = 0, 4  # offsets in what the filter sees of a call
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))


def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """Returns the filter: calls of another machine's kind end the process, those not allowed are refused."""
    program = [(LOAD, 0, 0, ARCH_AT), (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL)]
    program.append((LOAD, 0, 0, NUMBER_AT))
    for number in sorted(ALLOWED[machine]):
        program += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, REFUSE)]


def limit(memory_bytes: int, seconds: int) -> None:
    """Sets what the process may use."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def prctl(*arguments: object) -> None:
    """Calls prctl; ends the process if the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(*arguments):
        sys.exit(f"prctl{arguments}: {os.strerror(ctypes.get_errno())}")


def confine() -> None:
    """Sets the filter."""
    found = instructions(platform.machine())
    array = (Instruction * len(found))(*(Instruction(*one) for one in found))
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Filter(len(found), array)), 0, 0)


def read_program() -> str:
    """Returns the program; what follows it stays in standard input."""
    length = int.from_bytes(os.read(0, 8), "little")
    parts = []
    while length:
        parts.append(os.read(0, length))
        length -= len(parts[-1])
    return b"".join(parts).decode(errors="replace")


def main() -> None:
    """Confines this process and runs the program."""
    memory_bytes, seconds, parent = map(int, sys.argv[1:])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(1)
    for module in MODULES:
        __import__(module)
    program = read_program()
    limit(memory_bytes, seconds)
    confine()
    os.write(1, b"\x06")
    exec(compile(program, "<answer>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


if __name__ == "__main__":
    main()
