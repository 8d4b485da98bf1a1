"""Runs a pipeline schedule: one program on all ranks, which scans over the ticks of the schedule's table.

    in each tick:  an op, chosen by a switch        forward, backward for the input, backward for the weights
                   its results go to their slots    outside the switch: a buffer that a branch changes would be copied
                   neighbours exchange y and dx     outside the switch: all ranks meet in the same collectives

An op of DualPipe's main phase, a forward and a backward pass, is one branch. The two share no data, so the compiler may
overlap one's exchange of tokens with the other's matmuls. A stage's own collectives (over `expert`, and with FSDP over
`data`) may stand in a branch, since all devices along these axes run the same op; `parallel.lint` finds any over the
pipeline's axis.

Paper: V3 section 3.2.1. The schedules: `parallel.schedule`; the split of a stage: `parallel.split_backward`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


def run_pipeline(
    table: TickTable, stages: Sequence[Split], weights: Sequence[Tree], fixed: Sequence[Tree], rest: Tree, x: Tree
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

    Returns:
        (gradients of the weights, reports), of each chunk, summed over the micro-batches in float32.
    """
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rest)
    shapes = _shapes(stages, weights[0], (fixed[0], one), x)
    nothing = jax.tree.map(_zeros, shapes)
    pools = Pools(*(_pool(getattr(shapes, pool), table.slots[pool] + 1) for pool in POOLS))
    sums = jax.tree.map(lambda a: _zero_sums(a, len(weights)), (shapes.gradient, shapes.report))
    branches = [_branch(branch, stages, weights, fixed, rest, nothing) for branch in table.branches]
    rank = jax.lax.axis_index(PIPE)

    def tick(carry: tuple, row: dict) -> tuple[tuple, None]:
        pools, (gradients, reports) = carry
        mine = jax.tree.map(lambda column: column[rank], row)
        made = jax.lax.switch(mine["branch"], branches, pools, mine)
        gradients = _add(gradients, made.gradient, mine["chunk"]["W"])
        reports = _add(reports, made.report, mine["chunk"]["F"])
        kept = {pool: _put(getattr(pools, pool), getattr(made, pool), slot) for pool, slot in mine["write"].items()}
        for pool, arrivals in mine["arrive"].items():
            kept[pool] = _arrived(getattr(pools, pool), getattr(made, pool), arrivals, table.arrive[pool])
        return (pools._replace(**kept), (gradients, reports)), None

    (_, (gradients, reports)), _ = jax.lax.scan(tick, (pools, sums), _rows(table))
    of_chunks = [jax.tree.map(lambda a, c=c: a[c], (gradients, reports)) for c in range(len(weights))]
    return [gradient for gradient, _ in of_chunks], [report for _, report in of_chunks]


def _rows(table: TickTable) -> dict:
    """Returns the table as arrays to scan over."""
    names = ("branch", "micro_batch", "chunk", "read", "write", "arrive")
    return jax.tree.map(jnp.asarray, {name: getattr(table, name) for name in names})


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
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _put(pool: Tree, values: Tree, slot: jax.Array) -> Tree:
    return jax.tree.map(lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, slot, 0), pool, values)


def _add(sums: Tree, values: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda a, v: a.at[index].add(v.astype(a.dtype)), sums, values)


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
    branch: Branch, stages: Sequence[Split], weights: Sequence[Tree], fixed: Sequence[Tree], rest: Tree, nothing: Made
) -> Callable[[Pools, dict], Made]:
    """Returns the program of an op: it reads buffers, and returns what it makes."""

    def held(pool: str, arrays: Arrays) -> Arrays:
        filled = list(getattr(nothing, pool))
        for place, array in zip(_places(filled, arrays), arrays, strict=True):
            filled[place] = array
        return filled

    def run(pools: Pools, row: dict) -> Made:
        made, own_stash = nothing, None
        for kind, chunk, number in branch:
            stage, mine = stages[number], weights[chunk]
            of_batch = fixed[chunk], _at(rest, row["micro_batch"][kind])

            def read(pool: str, like: dict[str, Arrays] = stage.shapes) -> Arrays:
                places = _places(getattr(nothing, pool), like[pool])
                return [_at(getattr(pools, pool)[place], row["read"][pool]) for place in places]

            if kind == "F":
                y, report, early, late = stage.forward(mine, _at(pools.x, row["read"]["x"]), of_batch)
                made = made._replace(x=y, report=report, early=held("early", early), late=held("late", late))
            elif kind == "B":
                dy = _at(pools.dy, row["read"]["dy"])
                dx, own_stash = stage.backward(mine, of_batch, dy, read("early"), read("late"))
                made = made._replace(dy=dx, stash=held("stash", own_stash))
            else:
                stash = read("stash") if own_stash is None else own_stash
                made = made._replace(gradient=stage.weights(mine, of_batch, read("late"), stash))
        return made

    return run
