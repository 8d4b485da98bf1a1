"""Where the time of a step goes: `deepseek-jax bench train --profile=DIR`, `bench generate --profile=DIR`.

JAX's profiler writes a trace of a few steps to DIR; each operation in it is one of the compiled program, which names
the scope of the model that it came from (`jax.named_scope`). Printed are the device's time per scope and per kind of
operation, the operations that take the longest, and the time in which the device did nothing.
"""

import collections
import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError

# Scopes that layers and the step open, by the part of a step that they are; where they nest, the innermost counts.
PARTS = {
    "embedding": "embedding",
    "projections": "projections of attention",
    "attention": "attention itself",
    "router": "router",
    "experts": "routed experts",
    "feed_forward": "dense feed-forwards and shared experts",
    "loss": "head and loss",
    "gather_weights": "weights gathered and cast",
    "gradient_norm": "norm of the gradients",
    "optimizer": "optimizer",
}
REST = "residual stream and what has no scope"
# Kinds of operations, by what their names or targets contain; the first that fits counts.
KINDS = {
    "matrix products": ("gemm", "cublas", "dot", "ynn", "convolution"),
    "own kernels": ("mosaic",),
    "attention kernels": ("fmha", "cudnn"),
    "copies": ("copy", "concatenate", "dynamic-update-slice", "dynamic_update_slice", "memcpy", "slice"),
    "casts": ("convert",),
    "sums": ("reduce",),
}
LONGEST = 25  # operations listed one by one


class Event(NamedTuple):
    """An operation that a device ran; times in microseconds."""

    line: tuple
    name: str
    begin: float
    taken: float


def report(directory: str, ours: Any, n_steps: int) -> None:
    """Traces `n_steps` steps of the side of ours into `directory` and prints where their time goes."""
    trace(directory, lambda: ours.run(n_steps))
    events = device_events(newest_trace(Path(directory)))
    print("\n".join(table(events, ours.program(), n_steps)))


def trace(directory: str, function: Callable[[], object]) -> None:
    """Runs `function` under JAX's profiler, without its trace of Python."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
        function()


def newest_trace(directory: Path) -> dict:
    """Returns the newest trace in a directory. Raises `UserError` if there is none."""
    found = sorted(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--profile={directory}: JAX's profiler wrote no *.trace.json.gz. Give an empty directory.")
    return json.loads(gzip.decompress(found[-1].read_bytes()))


def device_events(trace: dict) -> list[Event]:
    """Returns the operations of compiled programs in a trace, in the order of their beginnings, each once.

    On a GPU these are the kernels and copies of its streams; the profiler's summaries beside them are left out.
    """
    processes = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e.get("name") == "process_name"}
    lines = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e.get("name") == "thread_name"}
    has_gpu = any("/device:GPU" in name for name in processes.values())
    found = set()
    for e in trace["traceEvents"]:
        if "hlo_op" not in e.get("args", {}) or e.get("ph") != "X":
            continue
        line = (e["pid"], e["tid"])
        if not has_gpu or ("/device:GPU" in processes[line[0]] and "Stream" in lines.get(line, "")):
            found.add(Event(line, e["args"]["hlo_op"], float(e["ts"]), float(e["dur"])))
    return sorted(found, key=lambda event: (event.begin, -event.taken))


def own_times(events: Iterable[Event]) -> dict[str, float]:
    """Returns the microseconds of each operation, without those of operations inside it (the body of a loop)."""
    times: collections.defaultdict[str, float] = collections.defaultdict(float)
    running: dict[tuple, list[Event]] = collections.defaultdict(list)
    for event in events:
        stack = running[event.line]
        while stack and stack[-1].begin + stack[-1].taken <= event.begin:
            stack.pop()
        if stack:
            times[stack[-1].name] -= min(event.taken, stack[-1].begin + stack[-1].taken - event.begin)
        times[event.name] += event.taken
        stack.append(event)
    return dict(times)


def busy(events: Iterable[Event]) -> float:
    """Returns the microseconds in which some operation ran."""
    total, end = 0.0, 0.0
    for event in events:
        total += max(event.begin + event.taken - max(event.begin, end), 0.0)
        end = max(end, event.begin + event.taken)
    return total


class Operation(NamedTuple):
    """What a compiled program says of one of its operations: the scope that it comes from, and what it calls."""

    scope: str
    target: str


def operations(program: str) -> dict[str, Operation]:
    """Returns the operations of a compiled program by name, from its text.

    What a fusion does not say itself is taken from the operations fused in it: from the first that has a part or calls
    a library or a kernel.
    """
    own: dict[str, Operation] = {}
    inside: dict[str, list[str]] = {}
    called: dict[str, str] = {}
    body: list[str] = []
    for line in program.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = inside.setdefault(opening[1], [])
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            name = instruction[1]
            body.append(name)
            own[name] = Operation(_quoted("op_name", line), _quoted("custom_call_target", line))
            if calls := re.search(r"\b(?:calls|called_computations=\{)=?%?([\w.\-]+)", line):
                called[name] = calls[1]
    return own | {name: _completed(own, name, inside.get(calls, [])) for name, calls in called.items()}


def _quoted(key: str, line: str) -> str:
    found = re.search(f'{key}="([^"]*)"', line)
    return found[1] if found else ""


def _completed(own: dict[str, Operation], name: str, fused: list[str]) -> Operation:
    """Returns an operation with what the operations fused in it say, where it says nothing itself."""
    scope, target = own[name]
    if part(scope) == REST:
        scope = next((own[other].scope for other in fused if part(own[other].scope) != REST), scope)
    return Operation(scope, target or next((own[other].target for other in fused if own[other].target), ""))


def part(scope: str) -> str:
    """Returns the part of a step that a scope path such as "jit(run)/transpose(jvp(experts))/mul" belongs to."""
    words = re.findall(r"\w+", scope)
    return next((PARTS[word] for word in reversed(words) if word in PARTS), REST)


def kind(name: str, target: str) -> str:
    """Returns the kind of an operation, from its name and the target of its call."""
    text = f"{name} {target}".lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in text for mark in marks)), "other fusions")


def table(events: list[Event], program: str, n_steps: int) -> list[str]:
    """Returns the lines to print: shares of the device's time by part, by kind and by operation."""
    if not events:
        return ["profile: the trace holds no operation of a compiled program"]
    known, times = operations(program), own_times(events)
    of = {name: known.get(name, Operation("", "")) for name in times}
    total, span = sum(times.values()), max(e.begin + e.taken for e in events) - events[0].begin
    idle = span - busy(events)
    lines = [
        f"profile of {n_steps} steps: {total / n_steps / 1e3:.2f} ms of operations per step; from the first to the "
        f"last {span / n_steps / 1e3:.2f} ms, of which the device idled {idle / n_steps / 1e3:.2f} ms"
    ]
    by_part = _summed(times, lambda name: part(of[name].scope))
    by_kind = _summed(times, lambda name: kind(name, of[name].target))
    for title, sums in (("part of the step", by_part), ("kind of operation", by_kind)):
        lines += [f"  {title:<42} {'ms':>8}  share", *(_row(*item, total, n_steps) for item in sums)]
    lines.append(f"  {'longest operations':<42} {'ms':>8}  share")
    for name, taken in sorted(times.items(), key=lambda item: -item[1])[:LONGEST]:
        lines.append(f"{_row(name, taken, total, n_steps)}  {' '.join(of[name])}")
    return lines


def _summed(times: dict[str, float], of: Callable[[str], str]) -> list[tuple[str, float]]:
    """Returns the times of operations summed by what `of` says of their names, the largest first."""
    sums: collections.defaultdict[str, float] = collections.defaultdict(float)
    for name, taken in times.items():
        sums[of(name)] += taken
    return sorted(sums.items(), key=lambda item: -item[1])


def _row(name: str, taken: float, total: float, n_steps: int) -> str:
    return f"  {name:<42} {taken / n_steps / 1e3:8.3f} {taken / total:6.1%}"
