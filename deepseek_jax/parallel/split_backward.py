"""A stage of a pipeline as three programs: the forward pass F, and the backward pass as B and W.

    F   x -> y, report, early, late           forward pass
    B   dy, early, late -> dx, stash          backward pass for the input, for which the stage before waits
    W   late, stash -> gradient of weights    backward pass for the weights, for which only the optimizer waits

The derivative of the whole stage is traced once, and the equations of its jaxpr are divided: F are those that y and the
report need; B those that dx needs and F has not computed or not saved; W the rest. `early` is what B alone reads of F,
`late` what W reads of it, `stash` what W reads of B; `rest` is what the stage reads besides weights and x.
Gradients that take no matmul, like those of a norm's gain, B makes: they are far smaller than what they are made of.

If everything may be saved, no matmul, kernel, sort or reduction is computed twice. What is made in one pass over other
numbers (`POINTWISE`) is made again where it is read, if those take fewer bytes to save or are saved anyway: a compiler
makes it on the way, while a saved array is written and read once more. What follows from `rest` and constants alone is
computed wherever it is read, and so are copies in another form (wider numbers, another shape). What follows from the
weights alone, like several of them side by side or their codes, is made once for all micro-batches (`prepare`), unless
devices exchange something for it. What is not saveable is recomputed, by B if B needs it. `jax.checkpoint` inside a
stage would hide its equations, and a loop over layers is one equation; so a stage has neither, and runs its layers one
after the other.
Paper: zero bubble, arXiv 2401.10241; V3 section 3.2.1.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from deepseek_jax.parallel.traced import exchanges

Tree = Any
Arrays = list[jax.Array]
Saveable = Callable[[core.JaxprEqn], bool]
INLINED = ("jit", "pjit", "closed_call", "core_call")  # calls whose equations are divided like all others
FORMS = ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze")  # the same numbers once more
POINTWISE = {*FORMS, "expand_dims", "copy", "name", "add", "add_any", "sub", "mul", "div", "neg", "max", "min", "clamp"}
POINTWISE |= {"exp", "log", "log1p", "logistic", "tanh", "sqrt", "rsqrt", "integer_pow", "pow", "square", "abs", "sign"}
POINTWISE |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select_n", "stop_gradient"}


def everything(equation: core.JaxprEqn) -> bool:
    """Whether results of an equation may be saved: always."""
    return True


def matmuls(equation: core.JaxprEqn) -> bool:
    """Whether results of an equation may be saved: those of matmuls, loops and kernels, not of cheap operations.

    A Mosaic GPU kernel is a custom_vmap_call when it is traced.
    """
    return equation.primitive.name in ("dot_general", "while", "scan", "pallas_call", "custom_vmap_call", "all_to_all")


def nothing(equation: core.JaxprEqn) -> bool:
    """Whether results of an equation may be saved: never; B runs the forward pass again, from the stage's input."""
    return False


SAVEABLE: dict[str, Saveable] = {"none": everything, "dots": matmuls, "block": nothing}  # by config.run.remat


@dataclass(frozen=True)
class Split:
    """The three programs of a stage; `early`, `late` and `stash` are lists of arrays.

    The weights that they take are those that `prepare` returns.
    """

    prepare: Callable[[Tree], Tree]  # weights -> (weights, what follows from them alone)
    # (weights, x, rest) -> (y, report, early, late)
    forward: Callable[[Tree, Tree, Tree], tuple[Tree, Tree, Arrays, Arrays]]
    # (weights, rest, dy, early, late) -> (dx, stash)
    backward: Callable[[Tree, Tree, Tree, Arrays, Arrays], tuple[Tree, Arrays]]
    weights: Callable[[Tree, Tree, Arrays, Arrays], Tree]  # (weights, rest, late, stash) -> gradient of the weights
    shapes: dict[str, Arrays]  # by name, of "early", "late" and "stash": `jax.ShapeDtypeStruct`s
    is_read: list[bool]  # of each leaf of the weights, whether the stage reads it, or makes a gradient of it


def split(stage: Callable, weights: Tree, x: Tree, rest: Tree, saveable: Saveable = everything) -> Split:
    """Divides the derivative of a stage.

    Args:
        stage: `stage(weights, x, rest) -> (y, loss, report)`: y goes to the next stage; `loss` is a scalar, what the
            stage adds to the loss that is differentiated; `report` is handed on.
        weights, x, rest: arrays or `jax.ShapeDtypeStruct`s; `x` and y are alike, `rest` needs no gradient.
        saveable: which results of F may be saved.
    """

    def derivative(weights: Tree, x: Tree, rest: Tree, dy: Tree) -> tuple:
        results: Any = jax.vjp(lambda w, x: _with_aux(stage(w, x, rest)), weights, x, has_aux=True)
        (y, loss), pull, report = results
        d_weights, dx = pull((dy, jnp.ones_like(loss)))
        return (y, report), dx, d_weights

    y, _, _ = jax.eval_shape(stage, weights, x, rest)
    traced, shapes = jax.make_jaxpr(derivative, return_shape=True)(weights, x, rest, y)
    traced = jax.make_jaxpr(lambda *arrays: _inlined(traced.jaxpr, traced.consts, arrays))(*traced.in_avals)
    return _Divided(traced, [weights, x, rest, y], shapes, saveable).programs()


def _with_aux(results: tuple) -> tuple:
    y, loss, report = results
    return (y, loss), report


def _inlined(jaxpr: core.Jaxpr, constants: Iterable, arrays: Iterable) -> list:
    """Evaluates a program with the equations of inner calls in its own place."""
    values = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, arrays, strict=True))
    for equation in jaxpr.eqns:
        given = [_read(values, v) for v in equation.invars]
        if equation.primitive.name in INLINED:
            inner: core.ClosedJaxpr = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
            results = _inlined(inner.jaxpr, inner.consts, given)
        else:
            results = _bind(equation, given)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [_read(values, v) for v in jaxpr.outvars]


def _read(values: dict, variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else values[variable]


def _bind(equation: core.JaxprEqn, given: list) -> list:
    found = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
    return list(found) if equation.primitive.multiple_results else [found]


class _Divided:
    """The equations of a derivative, divided into F, B and W."""

    def __init__(self, traced: core.ClosedJaxpr, arguments: list[Tree], shapes: tuple, saveable: Saveable):
        jaxpr = traced.jaxpr
        self.constants = dict(zip(jaxpr.constvars, traced.consts, strict=True))
        sizes = [len(jax.tree.leaves(tree)) for tree in (*shapes, *arguments)]
        self.structures = [jax.tree.structure(tree) for tree in shapes]
        (self.y, self.dx, self.d_weights), (self.w, self.x, self.rest, self.dy) = (
            _cut(variables, sizes) for variables, sizes in ((jaxpr.outvars, sizes[:3]), (jaxpr.invars, sizes[3:]))
        )
        self.maker = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
        self.once = self._made_once(jaxpr)
        self.free = self._follows_from({*self.constants, *self.w, *self.rest}, jaxpr.eqns)
        forward = self._needed(self.y, set())
        kept = {v for e in forward if saveable(e) for v in e.outvars} | set(self.x)
        read = _reads(self._needed([*self.dx, *self.d_weights], kept), [*self.dx, *self.d_weights])
        kept = self._cheaper([v for v in self._order(forward, self.x) if v in kept & read])
        backward = self._needed([*self.dx, *self._light(self.d_weights, kept)], kept)
        made = {v for e in backward for v in e.outvars} | set(self.dy)
        late = self._needed(self.d_weights, kept | made)
        read_late = {self._source(v, kept | made) for v in _reads(late, self.d_weights)}
        read_back = {self._source(v, kept) for v in _reads(backward, self.dx)}
        saved = [v for v in self._order(forward, self.x) if v in kept]
        self.late = [v for v in saved if v in read_late]
        self.early = [v for v in saved if v in read_back and v not in read_late]
        self.stash = [v for v in self._order(backward, self.dy) if v in read_late and v not in self.late]

    def _light(self, targets: list, kept: set) -> list:
        """Returns the targets that take no matmul once B has run."""
        made = {v for e in self._needed(self.dx, kept) for v in e.outvars} | set(self.dy)
        return [v for v in targets if not any(map(matmuls, self._needed([v], kept | made)))]

    def _made_once(self, jaxpr: core.Jaxpr) -> list:
        """Returns what to make of the weights alone, once: what takes work, and what else reads in that form."""
        alone = [equation for equation in jaxpr.eqns if not exchanges(equation)]
        of_weights = self._follows_from({*self.constants, *self.w}, alone) - self._follows_from(
            {*self.constants}, alone
        )
        worked: set = set()
        for equation in alone:
            is_form = equation.primitive.name in FORMS and not worked & _reads([equation], [])
            worked |= set() if is_form else of_weights & set(equation.outvars)
        others = [equation for equation in jaxpr.eqns if not set(equation.outvars) <= of_weights]
        read = _reads(others, jaxpr.outvars)
        found = (self._form_of(v, worked) for v in self._order(jaxpr.eqns, []) if v in worked & read)
        return list(dict.fromkeys(found))

    def _form_of(self, variable: Any, known: set) -> Any:
        """Returns which of `known` a variable is a copy of, in another form; itself if there is none."""
        while (equation := self.maker[variable]).primitive.name in FORMS and known & _reads([equation], []):
            (variable,) = known & _reads([equation], [])
        return variable

    def _cheaper(self, kept: list) -> set:
        """Returns what to keep instead of what is made in one pass over fewer bytes, or over what is kept anyway."""
        found = set(kept)
        for variable in sorted(kept, key=_n_bytes, reverse=True):
            others = found - {variable}
            made_of = self._made_of(variable, others)
            if sum(map(_n_bytes, made_of - others)) < _n_bytes(variable):
                found = others | made_of
        return found

    def _made_of(self, variable: Any, kept: set) -> set:
        """Returns what one pass makes a variable of: results that are kept, or that take more than a pass to make."""
        found, left = set(), [variable]
        while left:
            v = left.pop()
            if v in kept or v not in self.maker or self.maker[v].primitive.name not in POINTWISE:
                found.add(v)
            else:
                left += _reads([self.maker[v]], []) - self.free
        return found

    def _source(self, variable: Any, given: set) -> Any:
        """Returns what to keep for a variable: what it is a copy of in another form, where that takes no more bytes."""
        while variable in self.maker and self.maker[variable].primitive.name in FORMS:
            sources = {v for v in self.maker[variable].invars if not isinstance(v, core.Literal)} - self.free
            if len(sources) != 1 or not sources <= given or _n_bytes(*sources) > _n_bytes(variable):
                break
            (variable,) = sources
        return variable

    def _follows_from(self, known: set, equations: list) -> set:
        """Returns `known`, and all that equations compute of nothing else."""
        for equation in equations:
            if all(isinstance(v, core.Literal) or v in known for v in equation.invars) and not equation.effects:
                known |= set(equation.outvars)
        return known

    def _needed(self, targets: list, given: set) -> list:
        """Returns the equations that compute `targets` of `given`, free ones left out, in order."""
        known, found, left = given | self.free, {}, [v for v in targets if not isinstance(v, core.Literal)]
        while left:
            variable = left.pop()
            if variable in known or variable not in self.maker or id(self.maker[variable]) in found:
                continue
            equation = self.maker[variable]
            found[id(equation)] = equation
            left += [v for v in equation.invars if not isinstance(v, core.Literal)]
        order = {id(equation): i for i, equation in enumerate(self.maker.values())}
        return sorted(found.values(), key=lambda equation: order[id(equation)])

    def _is_read(self) -> list[bool]:
        """Returns, of each weight, whether anything follows from it, or its gradient is one that may not be zero."""
        followed, left = set(), [v for v in (*self.y, *self.dx, *self.d_weights) if not isinstance(v, core.Literal)]
        while left:
            variable = left.pop()
            if variable not in followed:
                followed.add(variable)
                left += _reads([self.maker[variable]], []) if variable in self.maker else []
        return [w in followed or not self._is_zero(d) for w, d in zip(self.w, self.d_weights, strict=True)]

    def _is_zero(self, variable: Any) -> bool:
        """Whether a variable is nothing but a zero in some shape."""
        while not isinstance(variable, core.Literal):
            equation = self.maker.get(variable)
            if equation is None or equation.primitive.name not in FORMS:
                return False
            variable = equation.invars[0]
        return not np.any(variable.val)

    def _order(self, equations: list, first: list) -> list:
        return list(dict.fromkeys([*first, *itertools.chain.from_iterable(e.outvars for e in equations)]))

    def _run(self, targets: list, given: dict) -> list:
        """Returns the values of `targets`, from `given` and what is free."""
        values = self.constants | given

        def value(variable: Any) -> Any:
            if isinstance(variable, core.Literal):
                return variable.val
            if variable not in values:
                equation = self.maker[variable]
                values.update(zip(equation.outvars, _bind(equation, [value(v) for v in equation.invars]), strict=True))
            return values[variable]

        for equation in self._needed(targets, set(given)):
            value(equation.outvars[0])
        return [value(v) for v in targets]

    def programs(self) -> Split:
        """Returns the three programs."""
        of_y, of_dx, of_weights = self.structures

        def named(*pairs: tuple) -> dict:
            return {
                v: array for variables, tree in pairs for v, array in zip(variables, jax.tree.leaves(tree), strict=True)
            }

        def prepare(weights: Tree) -> Tree:
            return weights, self._run(self.once, named((self.w, weights)))

        def forward(weights: Tree, x: Tree, rest: Tree) -> tuple:
            given = named(([*self.w, *self.once], weights), (self.x, x), (self.rest, rest))
            found = self._run([*self.y, *self.early, *self.late], given)
            y, early, late = _cut(found, [len(self.y), len(self.early), len(self.late)])
            return *jax.tree.unflatten(of_y, y), early, late

        def backward(weights: Tree, rest: Tree, dy: Tree, early: Arrays, late: Arrays) -> tuple:
            saved = (self.early, early), (self.late, late)
            found = self._run(
                [*self.dx, *self.stash],
                named(([*self.w, *self.once], weights), (self.rest, rest), (self.dy, dy), *saved),
            )
            dx, stash = _cut(found, [len(self.dx), len(self.stash)])
            return jax.tree.unflatten(of_dx, dx), stash

        def gradient(weights: Tree, rest: Tree, late: Arrays, stash: Arrays) -> Tree:
            read = (self.late, late), (self.stash, stash)
            given = named(([*self.w, *self.once], weights), (self.rest, rest), *read)
            return jax.tree.unflatten(of_weights, self._run(self.d_weights, given))

        kept = {"early": self.early, "late": self.late, "stash": self.stash}
        shapes: dict[str, list] = {name: [_shape(v.aval) for v in variables] for name, variables in kept.items()}
        return Split(prepare, forward, backward, gradient, shapes, self._is_read())


def _cut(variables: list, sizes: list[int]) -> list[list]:
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(variables[a:b]) for a, b in itertools.pairwise(ends)]


def _reads(equations: list, results: list) -> set:
    """Returns what equations read, and the results themselves."""
    read = itertools.chain(results, *(equation.invars for equation in equations))
    return {v for v in read if not isinstance(v, core.Literal)}


def _n_bytes(variable: Any) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
