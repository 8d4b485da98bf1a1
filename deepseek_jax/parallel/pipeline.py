"""Runs a pipeline schedule: one program on all ranks, which scans over the ticks of the schedule's table.

    in each tick:  what lanes begin with            all ranks together: the embedding (`Ends`)
                   an op, chosen by a switch        forward, backward for the input, backward for the weights
                   its results go to their slots    in the branch itself (`_in_place`); on CPUs, which would copy
                                                    the buffers, after the switch
                   neighbours exchange y and dx     outside the switch: all ranks meet in the same collectives
                   what lanes end in                all ranks together: the head and its loss, the embedding's gradient

An op of DualPipe's main phase, a forward and a backward pass, is one branch. The two share no data, so the compiler may
overlap one's exchange of tokens with the other's matmuls. Where nothing overlaps (on a CPU), three switches follow one
another instead, for F, for B and for W: the programs of a stage then stand in the program once, not in every op that
has them, and compiling takes less time. A stage's own collectives (over `expert`, and with FSDP over
`data`) may stand in a branch, since all devices along these axes run the same op; `parallel.lint` finds any over the
pipeline's axis.

Paper: V3 section 3.2.1. The schedules: `parallel.schedule`; the split of a stage: `parallel.split_backward`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.homes import Homes, Key
from deepseek_jax.parallel.mesh import PIPE
from deepseek_jax.parallel.split_backward import Arrays, Split, Tree
from deepseek_jax.parallel.tick_table import POOLS, SOURCES, WRITTEN, Branch, TickTable


class Ends(NamedTuple):
    """What all ranks compute together, each with its part of the weights, before the first stages and after the last.

    A lane begins with x of its first stage; its last stage is given something besides x, and what it puts out decides
    the loss. Each function is called in the same tick on all ranks, and may use collectives over the pipeline. `first`
    and `last` are what these stages read of their micro-batches, the `rest` of `run_pipeline`.
    """

    given: Callable[[Tree, Tree], tuple[Tree, Tree]]  # (first, last) -> (x, given)
    # (out, last) -> (report, d_out, gradient), (first, last, (dx, d_given)) -> gradient: of some entries of the ends'
    # weights each
    loss: Callable[[Tree, Tree], tuple[Tree, Tree, dict]]
    backward: Callable[[Tree, Tree, tuple[Tree, Tree]], dict]


class Made(NamedTuple):
    """What an op makes; zeros where it makes nothing."""

    x: Tree  # y of the forward pass, x of the stage after
    dy: Tree  # dx of the backward pass, dy of the stage before
    out: Tree
    d_given: Tree
    early: Arrays
    late: Arrays
    stash: Arrays
    report: Tree
    gradient: Any  # of each array of the weights; of a part alone, by their numbers


class Pools(NamedTuple):
    """The buffers of a rank, each with a leading axis of slots."""

    x: Tree
    dy: Tree
    early: Arrays
    late: Arrays
    stash: Arrays
    d_out: Tree


class Sums(NamedTuple):
    """What is summed over the micro-batches, in float32."""

    gradients: Arrays  # of each array of the weights
    reports: Tree  # with a leading axis of chunks
    ends: tuple[Tree, Tree]  # (gradient, report)


# fields of `Made`, by kind of part
MAKES = {"F": ("x", "out", "early", "late", "report"), "B": ("dy", "d_given", "stash"), "W": ("gradient",)}


class Switch(NamedTuple):
    """A choice that each rank makes in each tick."""

    kinds: str  # of the parts that its branches may have
    branches: tuple[Branch, ...]
    column: np.ndarray  # of the branch, int32, ticks by ranks


def run_pipeline(
    table: TickTable,
    stages: Sequence[Split],
    homes: Homes,
    weights: Arrays,
    fixed: Callable[[Key], Tree],
    rest: Tree,
    x: Tree,
    ends: Ends,
    overlap: bool = True,
) -> tuple[Arrays, Sequence[Tree], tuple[Tree, Tree]]:
    """Runs all micro-batches through all stages, forward and backward; inside `per_device` only.

    Args:
        table: the schedule.
        stages: the programs of each kind of stage, (weights, (x, given), rest) -> ((y, out), report, ...), all with
            weights, x, given, out and report alike.
        homes: where the weights of each stage lie, by its chunk and the number of its kind in `stages`.
        weights: the arrays in which those of this rank's stages lie.
        fixed: what each stage reads besides, without a gradient, by its chunk and kind; called where it is read.
        rest: what stages read of a micro-batch, with a leading axis of all micro-batches; a stage is given
            (fixed, rest of the micro-batch) as its `rest`.
        x: shapes of what flows from stage to stage.
        ends: what comes before the first stages and after the last.
        overlap: whether all parts of an op are one branch.

    Returns:
        Gradients like `weights`, the reports of each chunk, and (gradient, report) of the ends, summed in float32;
        the ends' report is the first rank's.
    """
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rest)
    once = {key: stages[key[1]].prepare(homes.tree(weights, key))[1] for key in homes.places}
    read = functools.partial(_read, homes, weights, once, fixed)
    shapes, of_ends = _shapes(stages, homes, read, one, x, ends)
    switches, n_chunks = switches_of(table, overlap), homes.kinds.shape[1]
    if len(switches) == 1 and not table.sizes["stash"]:
        shapes = shapes._replace(stash=[])  # it never leaves an op
    nothing = jax.tree.map(_zeros, shapes)
    start = _empty_pools(table, shapes), _no_sums(shapes, of_ends, n_chunks)
    programs = [[_program(b, stages, homes, read, rest, nothing) for b in it.branches] for it in switches]
    run = _in_place(switches[0].branches, programs[0], nothing) if overlap else _beside(switches, programs, nothing)
    rank = jax.lax.axis_index(PIPE)

    def tick(carry: tuple[Pools, Sums], row: dict) -> tuple[tuple[Pools, Sums], None]:
        pools, sums = carry
        mine = jax.tree.map(lambda column: column[rank], row["ranks"])
        mine["x"] = _given(ends, pools.x, mine, row, rest)
        made, kept, gradients = run(pools, sums.gradients, mine)
        for pool, arrivals in mine["arrive"].items():
            kept[pool] = _arrived(getattr(pools, pool), getattr(made, pool), arrivals, table.arrive[pool])
        kept["d_out"], of_ends = _after(ends, pools.d_out, sums.ends, made, mine, row, rest)
        reports = _add(sums.reports, made.report, mine["chunk"]["F"])
        return (pools._replace(**kept), Sums(gradients, reports, of_ends)), None

    (_, sums), _ = jax.lax.scan(tick, start, _rows(table, switches))
    return sums.gradients, [_nth(sums.reports, chunk) for chunk in range(n_chunks)], _of_ends(sums)


def _read(homes: Homes, weights: Arrays, once: Mapping[Key, Tree], fixed: Callable[[Key], Tree], key: Key) -> tuple:
    """Returns (weights of a stage and what follows from them, fixed), for the programs of `Split`.

    Called in each branch: what lies in pieces is whole only there.
    """
    return (homes.tree(weights, key), once[key]), fixed(key)


def _of_ends(sums: Sums) -> tuple[Tree, Tree]:
    gradient, report = _nth(sums.ends, 0)
    is_first = jax.lax.axis_index(PIPE) == 0
    return gradient, jax.tree.map(lambda a: jnp.where(is_first, a, 0), report)


def _empty_pools(table: TickTable, shapes: Made) -> Pools:
    like = shapes._asdict() | {"d_out": shapes.out}
    return Pools(*(_pool(like[pool], n) if (n := table.sizes[pool]) else [] for pool in POOLS))


def _no_sums(shapes: Made, of_ends: tuple[Tree, Tree], n_chunks: int) -> Sums:
    return Sums([_no_sum(a) for a in shapes.gradient], _zero_sums(shapes.report, n_chunks), _zero_sums(of_ends, 1))


def _nth(tree: Tree, n: int) -> Tree:
    return jax.tree.map(lambda a: a[n], tree)


def _given(ends: Ends, pool: Tree, mine: dict, row: dict, rest: Tree) -> tuple[Tree, Tree]:
    """Returns (x, given) of this rank's forward pass: x is from the pool, but for the first stage of a lane."""
    each = [_when(ends.given, *_ends_of(rest, lane["F_first"], lane["F_last"])) for lane in _lanes(row["ends"])]
    first, given = _at(jax.tree.map(lambda *a: jnp.stack(a), *each), mine["lane"]["F"])
    x = jax.tree.map(lambda a, b: jnp.where(mine["at_first"]["F"], a, b), first, _at(pool, mine["read"]["x"]))
    return x, given


def _after(
    ends: Ends, pool: Tree, sums: tuple[Tree, Tree], made: Made, mine: dict, row: dict, rest: Tree
) -> tuple[Tree, tuple[Tree, Tree]]:
    """Returns the pool of d_out, and the sums of (gradient, report) of the ends, after a tick's op."""
    lanes = _lanes(row["ends"])

    def of_lane(tree: Tree, kind: str, number: int) -> Tree:
        is_in = mine["lane"][kind] == number
        return tree if len(lanes) == 1 else jax.tree.map(lambda a: jnp.where(is_in, a, 0), tree)

    def head(sums: tuple[Tree, Tree], out: Tree, last: Tree) -> tuple[tuple[Tree, Tree], Tree]:
        report, d_out, gradient = ends.loss(_from_all(out), last)
        return (_added(sums[0], gradient), _add(sums[1], report, 0)), d_out

    def embedding(gradients: Tree, first: Tree, last: Tree, d_given: tuple[Tree, Tree]) -> Tree:
        return _added(gradients, ends.backward(first, last, _from_all(d_given)))

    for number, lane in enumerate(lanes):
        is_on, _, last = _ends_of(rest, lane["F_last"], lane["F_last"])
        out = of_lane(made.out, "F", number)
        no_d_out = jax.tree.map(jnp.zeros_like, out)
        sums, d_out = jax.lax.cond(is_on, head, lambda sums, *_, none=no_d_out: (sums, none), sums, out, last)
        pool = _put(pool, d_out, mine["settle"][number])
        is_on, first, last = _ends_of(rest, lane["B_first"], lane["B_last"])
        dx = jax.tree.map(lambda a: jnp.where(mine["at_first"]["B"], a, 0), made.dy)
        d_given = of_lane((dx, made.d_given), "B", number)
        gradients = jax.lax.cond(is_on, embedding, lambda sums, *_: sums, sums[0], first, last, d_given)
        sums = gradients, sums[1]
    return pool, sums


def _added(sums: dict, some: dict) -> dict:
    """The sums with `some` of their entries added, in place."""
    return sums | {name: _add(sums[name], values, 0) for name, values in some.items()}


def _from_all(tree: Tree) -> Tree:
    """What the one rank has that has any; zeros on all others."""
    return jax.lax.psum(tree, PIPE)


def _lanes(ends: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
    return [{name: a[lane] for name, a in ends.items()} for lane in range(len(ends["F_first"]))]


def _ends_of(rest: Tree, first: jax.Array, last: jax.Array) -> tuple[jax.Array, Tree, Tree]:
    """Returns (whether any of both runs, what the first stage reads, what the last stage reads)."""
    return jnp.maximum(first, last) >= 0, _at(rest, jnp.maximum(first, 0)), _at(rest, jnp.maximum(last, 0))


def _when(function: Callable, is_on: jax.Array, *arguments: Tree) -> Tree:
    """`function` of the arguments where it is asked for, on all ranks alike; otherwise zeros."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.lax.cond(is_on, function, lambda *_: jax.tree.map(_zeros, shapes), *arguments)


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
    """Returns how often a rank runs each branch of each switch in the loop over ticks, in the order of the switches.

    The first and the last are those of `Ends`, with two branches: not at all, and so.
    """
    ends, columns = table.ends, [(it.column[:, rank], len(it.branches)) for it in switches_of(table, overlap)]
    lanes = range(ends["F_first"].shape[1])
    enters, leaves = (np.maximum(ends[f"{kind}_first"], ends[f"{kind}_last"]) >= 0 for kind in "FB")
    first = [(enters[:, lane], 2) for lane in lanes]
    last = [(is_on[:, lane], 2) for lane in lanes for is_on in (ends["F_last"] >= 0, leaves)]
    return [np.bincount(column, minlength=n).tolist() for column, n in (*first, *columns, *last)]


def _rows(table: TickTable, switches: Sequence[Switch]) -> dict:
    """Returns the table as arrays to scan over, those with an entry per rank apart.

    `own_stash` is whether W runs in the op of its B.
    """
    kinds = [[kind for kind, _, _ in branch] for branch in table.branches]
    own_stash = np.array(["B" in names and "W" in names for names in kinds])[table.branch]
    names = ("micro_batch", "chunk", "lane", "read", "write", "arrive", "at_first")
    rows = {name: getattr(table, name) for name in names}
    rows |= {"branch": [switch.column for switch in switches], "own_stash": own_stash}
    rows |= {"settle": np.moveaxis(table.settle, 2, 1)}
    return jax.tree.map(jnp.asarray, {"ranks": rows, "ends": table.ends})


def _shapes(
    stages: Sequence[Split],
    homes: Homes,
    read: Callable[[Key], tuple],
    rest: Tree,
    x: Tree,
    ends: Ends,
) -> tuple[Made, tuple[Tree, Tree]]:
    """Returns the shapes of what an op makes, where lists hold what any kind of stage needs, and of the ends' sums."""
    key = next(iter(homes.places))
    stage, (_, given) = stages[key[1]], jax.eval_shape(ends.given, rest, rest)
    mine, fixed = jax.eval_shape(functools.partial(read, key))
    (_, out), report, *_ = jax.eval_shape(stage.forward, mine, (x, given), (fixed, rest))
    lists = {name: functools.reduce(_covering, [stage.shapes[name] for stage in stages]) for name in stage.shapes}
    of_loss, _, of_ends = jax.eval_shape(ends.loss, out, rest)
    of_ends |= jax.eval_shape(ends.backward, rest, rest, (x, given))
    return Made(x, x, out, given, **lists, report=report, gradient=list(homes.forms)), (of_ends, of_loss)


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


def _no_sum(a: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))


def _zero_sums(tree: Tree, n: int) -> Tree:
    return jax.tree.map(lambda a: jnp.stack([_no_sum(a)] * n), tree)


def _pool(shapes: Tree, n_slots: int) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros((n_slots, *a.shape), a.dtype), shapes)


def _at(tree: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda a: _one(a, index), tree)


def _one(pool: jax.Array, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(pool, index, keepdims=False, allow_negative_indices=False)


def _put(pool: Tree, values: Tree, slot: jax.Array | int) -> Tree:
    def put(a: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(a, v, slot, 0, allow_negative_indices=False)

    return jax.tree.map(put, pool, values)


def _add(sums: Tree, values: Tree, index: jax.Array | int) -> Tree:
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


# (pools, gradients, row) -> (made, pools that have changed, gradients)
Run = Callable[[Pools, Arrays, dict], tuple[Made, dict[str, Arrays], Arrays]]


def _in_place(branches: Sequence[Branch], programs: Sequence[Callable], nothing: Made) -> Run:
    """Returns what runs an op whose branch itself puts results into the buffers, only those that it has.

    XLA changes the buffers without a copy, as long as whatever a branch reads of them is read before: the barrier says
    so. (Its CPU compiler drops barriers, and copies.) Sums are read by nothing but what adds to them, and need none: so
    each product of W can be added as soon as it is made, in the pass that also converts it.
    """
    nothing = nothing._replace(early=[], late=[], stash=[], gradient=[])

    def of(branch: Branch, program: Callable) -> Callable:
        has_own_stash = {"B", "W"} <= {kind for kind, _, _ in branch}

        def run(pools: dict[str, Arrays], gradients: Arrays, others: Pools, row: dict) -> tuple:
            found = program(others._replace(**pools), row, {})
            made = found.pop("gradient", {})
            pools, found = jax.lax.optimization_barrier((pools, found))
            del found["read"]
            lists = {pool: found.pop(pool, []) for pool in WRITTEN}
            if has_own_stash:
                lists["stash"] = []
            kept = {pool: _put_some(arrays, lists[pool], row["write"].get(pool, 0)) for pool, arrays in pools.items()}
            sums = [_sum(a, made[place]) if place in made else a for place, a in enumerate(gradients)]
            return nothing._replace(**found), kept, sums

        return run

    runs = [of(*pair) for pair in zip(branches, programs, strict=True)]

    def tick(pools: Pools, gradients: Arrays, row: dict) -> tuple[Made, dict[str, Arrays], Arrays]:
        changing = {pool: getattr(pools, pool) for pool in WRITTEN}
        others = pools._replace(**{pool: [] for pool in WRITTEN})
        return jax.lax.switch(row["branch"][0], runs, changing, gradients, others, row)

    return tick


def _beside(switches: Sequence[Switch], programs: Sequence[Sequence[Callable]], nothing: Made) -> Run:
    """Returns what runs an op by one switch after the other, and puts what they have made into the buffers."""
    branches = [
        [_filled(program, switch.kinds, nothing) for program in each]
        for switch, each in zip(switches, programs, strict=True)
    ]

    def tick(pools: Pools, gradients: Arrays, row: dict) -> tuple[Made, dict[str, Arrays], Arrays]:
        parts: dict[str, Any] = {}
        for index, each in zip(row["branch"], branches, strict=True):
            parts |= jax.lax.switch(index, each, pools, row, parts)
        made = Made(**parts)
        kept = {pool: _put(getattr(pools, pool), getattr(made, pool), slot) for pool, slot in row["write"].items()}
        return made, kept, list(map(_sum, gradients, made.gradient))

    return tick


def _put_some(pool: Arrays, arrays: Arrays, slot: jax.Array | int) -> Arrays:
    """The pool with these arrays in a slot; its others, which hold what other kinds of stages keep, as they are."""
    changed = list(pool)
    shapes: Any = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in pool]
    places = _places(shapes, arrays)
    for place, array in zip(places, arrays, strict=True):
        changed[place] = _put(changed[place], array, slot)
    return changed


def _sum(a: jax.Array, v: jax.Array) -> jax.Array:
    return a + v.astype(a.dtype)


def _filled(program: Callable, kinds: str, nothing: Made) -> Callable[[Pools, dict, dict], dict]:
    """Returns a program that makes everything that parts of `kinds` make, zeros where it has nothing."""

    def run(pools: Pools, row: dict, before: dict) -> dict:
        made: dict[str, Any] = {name: getattr(nothing, name) for kind in kinds for name in MAKES[kind]}
        results = program(pools, row, before)
        del results["read"]
        for name, found in results.items():
            made[name] = _held(made[name], found) if name in WRITTEN else found
        if "W" in kinds and isinstance(made["gradient"], dict):
            made["gradient"] = [made["gradient"].get(place, a) for place, a in enumerate(nothing.gradient)]
        return made

    return run


def _held(empty: Arrays, arrays: Arrays) -> Arrays:
    filled = list(empty)
    for place, array in zip(_places(filled, arrays), arrays, strict=True):
        filled[place] = array
    return filled


def _program(
    branch: Branch,
    stages: Sequence[Split],
    homes: Homes,
    read: Callable[[Key], tuple],
    rest: Tree,
    nothing: Made,
) -> Callable[[Pools, dict, dict], dict]:
    """Returns the program of a branch: it reads buffers, and returns what its parts make.

    Its last argument is what the switches before it in the same tick have made. "read" in its result is what W reads.
    """

    def run(pools: Pools, row: dict, before: dict) -> dict:
        made: dict[str, Any] = {"read": ()}
        stash: Arrays | None = None
        for kind, chunk, number in branch:
            stage, (mine, fixed) = stages[number], read((chunk, number))
            of_batch = fixed, _at(rest, row["micro_batch"][kind])

            def saved(pool: str, like: dict[str, Arrays] = stage.shapes) -> Arrays:
                places = _places(getattr(nothing, pool), like[pool])
                return [_one(getattr(pools, pool)[place], row["read"][pool]) for place in places]

            if kind == "F":
                (y, out), report, early, late = stage.forward(mine, row["x"], of_batch)
                made |= {"x": y, "out": out, "report": report, "early": early, "late": late}
            elif kind == "B":
                dy = _at(pools.dy, row["read"]["dy"]), _at(pools.d_out, row["read"]["d_out"])
                (dx, d_given), stash = stage.backward(mine, of_batch, dy, saved("early"), saved("late"))
                made |= {"dy": dx, "d_given": d_given} | ({"stash": stash} if nothing.stash else {})
            else:
                if stash is None and "stash" in row["read"]:
                    stash = saved("stash")
                if "stash" in before:  # made by the switch before this one, if it ran this op's B
                    fresh = [before["stash"][place] for place in _places(nothing.stash, stage.shapes["stash"])]
                    both = zip(fresh, stash or fresh, strict=True)
                    stash = [jnp.where(row["own_stash"], a, b) for a, b in both]
                given = jax.tree.map(jax.lax.optimization_barrier, (saved("late"), stash or []))
                gradient = stage.weights(mine, of_batch, *given)
                made |= {"gradient": homes.placed((chunk, number), gradient), "read": given}
        return made

    return run
