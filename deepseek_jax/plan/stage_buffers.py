"""What a run's pipeline keeps on a device from one op to another, from the programs that it runs.

A run divides the derivative of a stage into F, B and W (`parallel.split_backward`). What passes between them lies in
pools of slots that all kinds of stages share (`parallel.pipeline`): of each shape and dtype, a slot has as many arrays
as the stage that needs most of it. What the head keeps is not counted.

| pool | arrays of a slot |
| --- | --- |
| x, dy | the residual stream |
| early, late | what B and W read of F, as config.run.remat says |
| stash | what W reads of B where W is put off: gradients of outputs, and inputs of matmuls that B has recomputed |

The numbers of slots are those of the schedule's table. Here one layer and two layers of
each stack are divided, on shapes alone; a stage of n layers has what one has and n - 1 times the difference.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from deepseek_jax.layers.base import Execution, bind, run_stack
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.schedule import make_schedule
from deepseek_jax.parallel.split_backward import Saveable, split
from deepseek_jax.parallel.tick_table import make_table
from deepseek_jax.plan.read_layers import layers_read, no_collection

POOLS = ("early", "late", "stash")
Arrays = Counter  # (shape, dtype) -> how many of them
Growth = Mapping[str, tuple[Arrays, Arrays]]  # by pool: the arrays of one layer, and of each further one


@functools.cache
def slots(schedule: str, n_ranks: int, micro_batches: int, put_off: int = -1) -> dict[str, int]:
    """Returns the slots of each pool of a schedule, those that nobody reads included."""
    return make_table(make_schedule(schedule, n_ranks, micro_batches, put_off), lambda place: 0).sizes


def slot_bytes(pool: str, stages: Sequence[Sequence[tuple[str, float]]], grown: Mapping[str, Growth]) -> float:
    """Returns the bytes of a slot of a pool; of each stage the repeats of each stack are given."""
    slot = functools.reduce(lambda a, b: a | b, (_of_stage(pool, repeats, grown) for repeats in stages))
    return float(sum(n * math.prod(shape) * dtype.itemsize for (shape, dtype), n in slot.items()))


def _of_stage(pool: str, repeats: Sequence[tuple[str, float]], grown: Mapping[str, Growth]) -> Arrays:
    """Returns the arrays of a pool's slot that a stage with these layers needs."""
    arrays: Arrays = Counter()
    for place, (name, n) in enumerate(repeats):
        one, more = grown[name][pool]
        for kind in one | more:
            arrays[kind] += math.ceil(n * more[kind]) + (one[kind] - more[kind] if place == 0 else 0)
    return arrays


def growth(
    blocks: nnx.Module,
    run: Execution,
    shape_BTD: tuple[int, ...],
    rules: Mapping[str, str],
    mesh: Mesh,
    saveable: Saveable,
) -> Growth:
    """Returns the arrays that one layer of a stack adds to each pool, and each further layer of it."""
    one, two = (divided(blocks, n, run, shape_BTD, rules, mesh, saveable) for n in (1, 2))
    more = {pool: {kind: two[pool][kind] - one[pool][kind] for kind in one[pool] | two[pool]} for pool in POOLS}
    return {pool: (one[pool], Counter(more[pool])) for pool in POOLS}


def divided(
    blocks: nnx.Module,
    n: int,
    run: Execution,
    shape_BTD: tuple[int, ...],
    rules: Mapping[str, str],
    mesh: Mesh,
    saveable: Saveable,
) -> dict[str, Arrays]:
    """Returns, by pool, the arrays that a stage of n layers of a stack keeps."""
    definition, params, biases = layers_read(blocks, n, run, rules, mesh)

    def stage(params: dict, x_BTD: jax.Array, rest: tuple) -> tuple:
        positions_BT, biases = rest
        tokens = Tokens(positions_BT, positions_BT)  # any ids will do
        model = bind(definition, params, biases)
        x_BTD, (_, found) = run_stack(model, x_BTD, run, lambda block, x, _: block(x, tokens))
        return x_BTD, sum(map(jnp.sum, jax.tree.leaves(found.losses)), jnp.float32(0)), None

    shapes: dict[str, Any] = {}

    def divide(params: dict, x_BTD: jax.Array, rest: tuple) -> int:
        shapes.update(split(stage, params, x_BTD, rest, saveable).shapes)
        return 0

    x_BTD = jax.ShapeDtypeStruct(shape_BTD, run.compute)
    positions_BT = jax.ShapeDtypeStruct(shape_BTD[:2], jnp.int32)
    with no_collection():
        jax.make_jaxpr(divide, axis_env=list(mesh.shape.items()))(params, x_BTD, (positions_BT, biases))
    return {pool: Counter((a.shape, a.dtype) for a in shapes[pool]) for pool in POOLS}
