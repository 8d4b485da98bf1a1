"""Finds collectives that would hang: those that not all devices of their axes reach.

A collective over an axis waits for every device along it. Inside a branch (`cond`, `switch`) or a loop (`while`) whose
predicate differs between those devices, some never arrive, and the program waits for ever. JAX does not refuse this,
with or without its check of varying axes. `check_collectives` follows which axes each value varies over:

    argument of shard_map          the axes of its PartitionSpec
    axis_index                     its axis
    psum, pmax, pmin, all_gather   what the operand varies over, without the axes of the collective
    any other collective           what the operand varies over, and the axes of the collective
    branches and loops             also what the predicate varies over
    all else                       what the operands vary over
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from deepseek_jax.compat import scan_inputs

Axes = frozenset[str]  # mesh axes
NONE: Axes = frozenset()
AGREES = ("psum", "pmax", "pmin", "all_gather")  # afterwards all devices of the axes hold the same
SILENT = ("axis_index", "pvary", "pcast", "pbroadcast")  # name an axis and send nothing


class Fork(NamedTuple):
    """A place where devices may go different ways: `where` for people, and the axes along which they do."""

    where: str
    axes: Axes


def check_collectives(program: core.ClosedJaxpr) -> None:
    """Checks every `shard_map` of a traced program, such as `jax.make_jaxpr(step)(*arguments)`.

    Raises:
        ValueError: names the collective, the axis, and the branch or loop that not all devices enter.
    """
    _outputs(program.jaxpr, [NONE] * len(program.jaxpr.invars), ())


def _outputs(jaxpr: core.Jaxpr, inputs: Sequence[Axes], forks: tuple[Fork, ...]) -> list[Axes]:
    """Returns what each output varies over, given that of the inputs; `forks` are those around."""
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, NONE)

    def of(variable: Any) -> Axes:
        return NONE if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        results = _equation(equation, [of(v) for v in equation.invars], forks)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _equation(equation: core.JaxprEqn, inputs: list[Axes], forks: tuple[Fork, ...]) -> list[Axes]:
    name = equation.primitive.name
    if name in FLOW:
        return FLOW[name](equation, inputs, forks)
    everything = NONE.union(*inputs)
    axes = _named_axes(equation)
    if axes and name not in SILENT:
        _check(equation, axes, forks)
        agreed = name.startswith(AGREES) and equation.params.get("axis_index_groups") is None
        return [everything - axes if agreed else everything | axes] * len(equation.outvars)
    inner = list(_inner(equation))
    if len(inner) == 1 and len(inner[0].invars) == len(inputs):  # jit, checkpoint, custom derivatives
        return _outputs(inner[0], inputs, forks)
    for jaxpr in inner:  # a kernel: its arguments are not those of the equation
        _outputs(jaxpr, [everything] * len(jaxpr.invars), forks)
    return [everything | axes] * len(equation.outvars)


def _named_axes(equation: core.JaxprEqn) -> Axes:
    """Returns the mesh axes that an equation names; axes of arrays are numbers."""
    named = equation.params.get("axis_name", equation.params.get("axes", ()))
    named = (named,) if isinstance(named, str) else named
    return frozenset(axis for axis in named if isinstance(axis, str)) if isinstance(named, tuple | list) else NONE


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _check(equation: core.JaxprEqn, axes: Axes, forks: tuple[Fork, ...]) -> None:
    for fork in forks:
        if shared := sorted(axes & fork.axes):
            raise ValueError(
                f"{equation.primitive.name} over {', '.join(map(repr, shared))} in {fork.where}, which differs along "
                f"{', '.join(map(repr, sorted(fork.axes)))}: devices that go another way never reach it, and the "
                "program hangs. Move it out, or make the predicate the same along the axis (jax.lax.pmax)."
            )


def _cond(equation: core.JaxprEqn, inputs: list[Axes], forks: tuple[Fork, ...]) -> list[Axes]:
    index, *operands = inputs
    branches = equation.params["branches"]
    results = [
        _outputs(branch.jaxpr, operands, (*forks, Fork(f"branch {i} of {len(branches)} of a switch", index)))
        for i, branch in enumerate(branches)
    ]
    return [index.union(*outputs) for outputs in zip(*results, strict=True)]


def _settled(body: Callable[[list[Axes]], list[Axes]], carry: list[Axes]) -> list[Axes]:
    """Returns what a loop's carry varies over after any number of turns."""
    while True:
        after = [old | new for old, new in zip(carry, body(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _while(equation: core.JaxprEqn, inputs: list[Axes], forks: tuple[Fork, ...]) -> list[Axes]:
    n_condition, n_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    for_condition, for_body = inputs[:n_condition], inputs[n_condition : n_condition + n_body]
    condition, body = equation.params["cond_jaxpr"].jaxpr, equation.params["body_jaxpr"].jaxpr

    def turn(carry: list[Axes]) -> list[Axes]:
        (again,) = _outputs(condition, [*for_condition, *carry], forks)
        inside = (*forks, Fork("a while loop, whose number of turns", again))
        _outputs(condition, [*for_condition, *carry], inside)
        return [again | axes for axes in _outputs(body, [*for_body, *carry], inside)]

    return _settled(turn, inputs[n_condition + n_body :])


def _scan(equation: core.JaxprEqn, inputs: list[Axes], forks: tuple[Fork, ...]) -> list[Axes]:
    n_constants, n_carry = scan_inputs(equation.params)
    constants, rows = inputs[:n_constants], inputs[n_constants + n_carry :]

    def turn(carry: list[Axes]) -> list[Axes]:
        return _outputs(equation.params["jaxpr"].jaxpr, [*constants, *carry, *rows], forks)

    carry = _settled(lambda carry: turn(carry)[:n_carry], inputs[n_constants : n_constants + n_carry])
    return [*carry, *turn(carry)[n_carry:]]


def _shard_map(equation: core.JaxprEqn, inputs: list[Axes], forks: tuple[Fork, ...]) -> list[Axes]:
    specs = [[axes if isinstance(axes, tuple) else (axes,) for axes in spec] for spec in equation.params["in_specs"]]
    own = [frozenset(filter(None, itertools.chain.from_iterable(spec))) for spec in specs]
    _outputs(equation.params["jaxpr"], [a | b for a, b in zip(own, inputs, strict=True)], forks)
    return [NONE] * len(equation.outvars)


FLOW = {"cond": _cond, "while": _while, "scan": _scan, "shard_map": _shard_map}
