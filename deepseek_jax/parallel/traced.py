"""What a traced step sends between devices, and what its outermost loop carries; nothing runs.

Bytes that a device sends for an operand of b bytes, with n devices along the axes:

| collective | bytes |
| --- | --- |
| all_to_all, reduce_scatter | b (n-1)/n |
| all_gather | b (n-1) |
| psum, pmax, pmin | 2 b (n-1)/n: scattered and gathered, as in a ring |
| ppermute | b; the ends of a pipeline send to one side only |

A scan multiplies what is inside by its turns. How often a branch runs does not stand in the program: the caller says so
for the switches in a pipeline's loop over ticks; of any other switch, the first branch is taken to run each time (of
the exchange with experts: the smallest buffers).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from deepseek_jax.compat import scan_inputs

AGREED = ("psum", "pmax", "pmin")
KINDS = (*AGREED, "all_gather", "all_to_all", "reduce_scatter", "ppermute")


class Sent(NamedTuple):
    """Collectives of one kind over the same axes."""

    kind: str  # one of `KINDS`
    axes: tuple[str, ...]
    in_program: int  # how many there are, each operand counted once
    per_step: float  # how often a device takes part in one per step
    n_bytes: float  # that it sends per step


class Switches(NamedTuple):
    """The switches of a loop over ticks."""

    n_ticks: int
    runs: Sequence[Sequence[int]]  # of each switch, in the order in which they run: how often each branch does


NO_SWITCHES = Switches(0, ())


def collectives(program: core.ClosedJaxpr, sizes: dict[str, int], switches: Switches = NO_SWITCHES) -> list[Sent]:
    """Returns the collectives of a traced step, by kind and axes, on one device.

    Args:
        program: `jax.make_jaxpr(step)(*arguments)`, or the jaxpr of `step.trace(*arguments)`.
        sizes: devices along each axis.
        switches: those of the pipeline rank that is asked about.

    Raises ValueError for a collective in a loop of unknown length.
    """
    found: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for equation, times in _equations(program.jaxpr, 1.0, _Choices(switches)):
        kind = next((kind for kind in KINDS if equation.primitive.name.startswith(kind)), None)
        axes = tuple(axis for axis in _axes(equation) if sizes[axis] > 1)
        if kind is None or not axes:
            continue
        n_devices = 1
        for axis in axes:
            n_devices *= sizes[axis]
        sums = found.setdefault((kind, axes), [0, 0.0, 0.0])
        for operand in equation.invars:
            for place, more in enumerate((1, times, times * _sent(kind, _bytes(operand.aval), n_devices))):
                sums[place] += more
    return [Sent(kind, axes, int(n), times, sent) for (kind, axes), (n, times, sent) in sorted(found.items())]


def carried(program: core.ClosedJaxpr, n_turns: int) -> int:
    """Returns the bytes that the outermost loop of so many turns carries from turn to turn; 0 without such a loop."""
    for equation, _ in _equations(program.jaxpr, 1.0, _Choices(NO_SWITCHES)):
        if equation.primitive.name == "scan" and equation.params["length"] == n_turns:
            n_constants, n_carry = scan_inputs(equation.params)
            return sum(_bytes(v.aval) for v in equation.invars[n_constants : n_constants + n_carry])
    return 0


def exchanges(equation: core.JaxprEqn) -> bool:
    """Whether devices exchange something in an equation, or in a program inside it."""
    is_collective = equation.primitive.name.startswith(KINDS) and bool(_axes(equation))
    return is_collective or any(exchanges(each) for inner in _inner(equation) for each in inner.eqns)


class _Choices:
    """How often the branches of a switch run: of those in the loop over ticks one after the other."""

    def __init__(self, switches: Switches):
        self.n_ticks, self.left = switches.n_ticks, list(switches.runs)

    def __call__(self, n_branches: int, times: float) -> Sequence[float]:
        if times == self.n_ticks and self.left and len(self.left[0]) == n_branches:
            return self.left.pop(0)
        return [times, *[0.0] * (n_branches - 1)]


def _equations(jaxpr: core.Jaxpr, times: float, choices: _Choices) -> Iterator[tuple[core.JaxprEqn, float]]:
    """Yields all equations, those of inner programs too, with how often each runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        name, inner = equation.primitive.name, list(_inner(equation))
        if name == "cond":
            for branch, runs in zip(inner, choices(len(inner), times), strict=True):
                yield from _equations(branch, runs, choices)
        elif name == "while":
            for body in inner:
                _check_silent(body)
        else:
            turns = equation.params["length"] if name == "scan" else 1
            for body in inner:
                yield from _equations(body, times * turns, choices)


def _check_silent(jaxpr: core.Jaxpr) -> None:
    if name := next((equation.primitive.name for equation in jaxpr.eqns if exchanges(equation)), ""):
        raise ValueError(f"{name} in a loop of unknown length: it cannot be counted.")


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _axes(equation: core.JaxprEqn) -> tuple[str, ...]:
    """Returns the mesh axes that an equation names; axes of arrays are numbers."""
    named = equation.params.get("axis_name", equation.params.get("axes", ()))
    named = (named,) if isinstance(named, str) else named
    return tuple(axis for axis in named if isinstance(axis, str)) if isinstance(named, tuple | list) else ()


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


def _sent(kind: str, n_bytes: int, n_devices: int) -> float:
    if kind in AGREED:
        return 2 * n_bytes * (n_devices - 1) / n_devices
    if kind == "all_gather":
        return float(n_bytes * (n_devices - 1))
    return float(n_bytes) if kind == "ppermute" else n_bytes * (n_devices - 1) / n_devices
