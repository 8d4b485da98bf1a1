"""Runs a pipeline schedule: one program on all ranks, which scans over the ticks of the schedule's table.

    in each tick:  an op, chosen by a switch        forward, backward for the input, backward for the weights
                   its results go to their slots    outside the switch: a buffer that a branch changes would be copied
                   neighbours exchange y and dx     outside the switch: all ranks meet in the same collectives

An op of DualPipe's main phase, a forward and a backward pass, is one branch. The two share no data, so the compiler may
overlap one's exchange of tokens with the other's matmuls. Where nothing overlaps (on a CPU), three switches follow one
another instead, for F, for B and for W: the programs of a stage then stand in the program once, not in every op that
has them, and compiling takes less time. A stage's own collectives (over `expert`, and with FSDP over
`data`) may stand in a branch, since all devices along these axes run the same op; `parallel.lint` finds any over the
pipeline's axis.

Paper: V3 section 3.2.1. The schedules: `parallel.schedule`; the split of a stage: `parallel.split_backward`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.mesh import PIPE
from deepseek_jax.parallel.split_backward import Arrays, Split, Tree
from deepseek_jax.parallel.tick_table import POOLS, SOURCES, Branch, TickTable


class Made(NamedTuple):
    """What an op makes; zeros where it makes nothing."""

    x: Tree  # y of the forward pass, x of the stage after
    dy: Tree  # dx of the backward pass, dy of the stage before
    early: Arrays
    late: Arrays
    stash: Arrays
    report: Tree
    gradient: Tree


class Pools(NamedTuple):
    """The buffers of a rank, each with a leading axis of slots."""

    x: Tree
    dy: Tree
    early: Arrays
    late: Arrays
    stash: Arrays


MAKES = {"F": ("x", "early", "late", "report"), "B": ("dy", "stash"), "W": ("gradient",)}  # of `Made`, by kind of part


class Switch(NamedTuple):
    """A choice that each rank makes in each tick."""

    kinds: str  # of the parts that its branches may have
    branches: tuple[Branch, ...]
    column: np.ndarray  # of the branch, int32, ticks by ranks


def run_pipeline(
    table: TickTable,
    stages: Sequence[Split],
    weights: Sequence[Tree],
    fixed: Sequence[Tree],
    rest: Tree,
    x: Tree,
    overlap: bool = True,
) -> tuple[Sequence[Tree], Sequence[Tree]]:
    """Runs all micro-batches through all stages, forward and backward; inside `per_device` only.

    Args:
        table: the schedule.
        stages: the programs of each kind of stage, all with weights, x, report alike.
        weights: of this rank's stage of each chunk.
        fixed: what the stage of each chunk reads besides, without a gradient.
        rest: what stages read of a micro-batch, with a leading axis of all micro-batches; a stage is given
            (fixed, rest of the micro-batch) as its `rest`.
        x: shapes of what flows from stage to stage.
        overlap: whether all parts of an op are one branch.

    Returns:
        (gradients of the weights, reports), of each chunk, summed over the micro-batches in float32.
    """
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rest)
    shapes = _shapes(stages, weights[0], (fixed[0], one), x)
    nothing = jax.tree.map(_zeros, shapes)
    pools = Pools(*(_pool(getattr(shapes, pool), table.slots[pool] + 1) for pool in POOLS))
    sums = jax.tree.map(lambda a: _zero_sums(a, len(weights)), (shapes.gradient, shapes.report))
    switches = switches_of(table, overlap)
    programs = [
        [_branch(branch, switch.kinds, stages, weights, fixed, rest, nothing) for branch in switch.branches]
        for switch in switches
    ]
    rank = jax.lax.axis_index(PIPE)

    def tick(carry: tuple, row: dict) -> tuple[tuple, None]:
        pools, (gradients, reports) = carry
        mine = jax.tree.map(lambda column: column[rank], row)
        parts: dict[str, Any] = {}
        for index, branches in zip(mine["branch"], programs, strict=True):
            parts |= jax.lax.switch(index, branches, pools, mine, parts)
        made = Made(**parts)
        gradients = _add(gradients, made.gradient, mine["chunk"]["W"])
        reports = _add(reports, made.report, mine["chunk"]["F"])
        kept = {pool: _put(getattr(pools, pool), getattr(made, pool), slot) for pool, slot in mine["write"].items()}
        for pool, arrivals in mine["arrive"].items():
            kept[pool] = _arrived(getattr(pools, pool), getattr(made, pool), arrivals, table.arrive[pool])
        return (pools._replace(**kept), (gradients, reports)), None

    (_, (gradients, reports)), _ = jax.lax.scan(tick, (pools, sums), _rows(table, switches))
    of_chunks = [jax.tree.map(lambda a, c=c: a[c], (gradients, reports)) for c in range(len(weights))]
    return [gradient for gradient, _ in of_chunks], [report for _, report in of_chunks]


def switches_of(table: TickTable, overlap: bool) -> list[Switch]:
    """Returns the switches of a tick, in the order in which they run: several where ops have programs in common."""
    parts = [part for branch in table.branches for part in branch]
    if overlap or len(set(parts)) == len(parts):
        return [Switch("FBW", table.branches, table.branch)]

    def of(kind: str) -> Switch:
        own = [tuple(part for part in branch if part[0] == kind) for branch in table.branches]
        branches = tuple(dict.fromkeys(((), *own)))
        return Switch(kind, branches, np.array([branches.index(parts) for parts in own], np.int32)[table.branch])

    return [of(kind) for kind in "FBW"]


def branch_runs(table: TickTable, overlap: bool, rank: int) -> list[list[int]]:
    """Returns how often a rank runs each branch of each switch in the loop over ticks, in the order of the switches."""
    switches = switches_of(table, overlap)
    return [np.bincount(it.column[:, rank], minlength=len(it.branches)).tolist() for it in switches]


def _rows(table: TickTable, switches: Sequence[Switch]) -> dict:
    """Returns the table as arrays to scan over; `own_stash` is whether W runs in the op of its B."""
    kinds = [[kind for kind, _, _ in branch] for branch in table.branches]
    own_stash = np.array(["B" in names and "W" in names for names in kinds])[table.branch]
    rows = {name: getattr(table, name) for name in ("micro_batch", "chunk", "read", "write", "arrive")}
    rows |= {"branch": [switch.column for switch in switches], "own_stash": own_stash}
    return jax.tree.map(jnp.asarray, rows)


def _shapes(stages: Sequence[Split], weights: Tree, rest: Tree, x: Tree) -> Made:
    """Returns the shapes of what an op makes, where lists hold what any kind of stage needs."""
    of_first = stages[0].shapes
    report = jax.eval_shape(stages[0].forward, weights, x, rest)[1]
    gradient = jax.eval_shape(stages[0].weights, weights, rest, of_first["late"], of_first["stash"])
    lists = {name: functools.reduce(_covering, [stage.shapes[name] for stage in stages]) for name in of_first}
    return Made(x, x, **lists, report=report, gradient=gradient)


def _kind(array: jax.Array) -> tuple:
    return array.shape, array.dtype


def _covering(some: Arrays, others: Arrays) -> Arrays:
    """Returns `some` and as many more as it takes to hold the `others` by shape and dtype."""
    left = [_kind(array) for array in some]
    more = []
    for array in others:
        if _kind(array) in left:
            left.remove(_kind(array))
        else:
            more.append(array)
    return [*some, *more]


def _places(shapes: Arrays, arrays: Arrays) -> list[int]:
    """Returns where in `shapes` each of `arrays` is held: the first place of its shape and dtype that is left."""
    left = list(enumerate(map(_kind, shapes)))
    places = []
    for array in arrays:
        place = next(entry for entry in left if entry[1] == _kind(array))
        left.remove(place)
        places.append(place[0])
    return places


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _zero_sums(shape: jax.ShapeDtypeStruct, n_chunks: int) -> jax.Array:
    return jnp.zeros((n_chunks, *shape.shape), jnp.promote_types(shape.dtype, jnp.float32))


def _pool(shapes: Tree, n_slots: int) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros((n_slots, *a.shape), a.dtype), shapes)


def _at(tree: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda a: _one(a, index), tree)


def _one(pool: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(pool, index, keepdims=False, allow_negative_indices=False)


def _put(pool: Tree, values: Tree, slot: jax.Array) -> Tree:
    def put(a: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(a, v, slot, 0, allow_negative_indices=False)

    return jax.tree.map(put, pool, values)


def _add(sums: Tree, values: Tree, index: jax.Array) -> Tree:
    return _put(sums, jax.tree.map(lambda a, v: _one(a, index) + v.astype(a.dtype), sums, values), index)


def _arrived(pool: Tree, sent: Tree, slots: dict[str, jax.Array], plan: dict[str, np.ndarray]) -> Tree:
    """Returns the pool after all ranks have sent what they made to both neighbours, as far as the schedule needs it."""
    n_ranks = jax.lax.axis_size(PIPE)
    unread = jax.tree.leaves(pool)[0].shape[0] - 1
    for source, distance in SOURCES.items():
        if (plan[source] == unread).all():
            continue
        pairs = [(rank, rank - distance) for rank in range(n_ranks) if 0 <= rank - distance < n_ranks]
        values = jax.tree.map(lambda a, pairs=pairs: jax.lax.ppermute(a, PIPE, pairs), sent) if distance else sent
        pool = _put(pool, values, slots[source])
    return pool


def _branch(
    branch: Branch,
    kinds: str,
    stages: Sequence[Split],
    weights: Sequence[Tree],
    fixed: Sequence[Tree],
    rest: Tree,
    nothing: Made,
) -> Callable[[Pools, dict, dict], dict]:
    """Returns the program of a branch: it reads buffers, and returns what parts of `kinds` make.

    Its last argument is what the switches before it in the same tick have made.
    """

    def held(pool: str, arrays: Arrays) -> Arrays:
        filled = list(getattr(nothing, pool))
        for place, array in zip(_places(filled, arrays), arrays, strict=True):
            filled[place] = array
        return filled

    def run(pools: Pools, row: dict, before: dict) -> dict:
        made: dict[str, Any] = {name: getattr(nothing, name) for kind in kinds for name in MAKES[kind]}
        stash = None
        for kind, chunk, number in branch:
            stage, mine = stages[number], weights[chunk]
            of_batch = fixed[chunk], _at(rest, row["micro_batch"][kind])

            def read(pool: str, like: dict[str, Arrays] = stage.shapes) -> Arrays:
                places = _places(getattr(nothing, pool), like[pool])
                return [_one(getattr(pools, pool)[place], row["read"][pool]) for place in places]

            if kind == "F":
                y, report, early, late = stage.forward(mine, _at(pools.x, row["read"]["x"]), of_batch)
                made |= {"x": y, "report": report, "early": held("early", early), "late": held("late", late)}
            elif kind == "B":
                dy = _at(pools.dy, row["read"]["dy"])
                dx, stash = stage.backward(mine, of_batch, dy, read("early"), read("late"))
                made |= {"dy": dx, "stash": held("stash", stash)}
            else:
                if stash is None:
                    stash = read("stash")
                if "stash" in before:  # made by the switch before this one, if it ran this op's B
                    fresh = (before["stash"][place] for place in _places(nothing.stash, stage.shapes["stash"]))
                    stash = [jnp.where(row["own_stash"], a, b) for a, b in zip(fresh, stash, strict=True)]
                made |= {"gradient": stage.weights(mine, of_batch, read("late"), stash)}
        return made

    return run
