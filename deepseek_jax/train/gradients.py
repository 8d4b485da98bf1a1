"""Gradients of a step's loss: how a device works through its share of the batch.

    gradients(params, state, batch) -> (gradient of each of params, loss, losses), sums over this device's share

One micro-batch after the other, as here, is one way; `Trainer` takes others as its `gradients`. In a pipeline
`train.pipelined` takes their place. Runs on every device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.base import Tree
from deepseek_jax.train.loss import Losses, Totals, step_totals, together

# loss(params, state, part, over) of the trained weights, the train state and a part of the batch: see `Objective`.
Loss = Callable[[Tree, Tree, Batch, Totals], tuple[jax.Array, Losses]]
Gradients = Callable[[Tree, Tree, Batch], tuple[Tree, jax.Array, Losses]]


def divided(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...] of every array, those without elements too."""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def accumulated(loss: Loss, micro_batches: int) -> Gradients:
    """Gradients summed in float32 over `micro_batches` equal parts of a device's share; of one part, as they come."""
    derivative = jax.value_and_grad(loss, has_aux=True)

    def gradients(params: Tree, state: Tree, batch: Batch) -> tuple[Tree, jax.Array, Losses]:
        over = step_totals(batch)

        def of(part: Batch) -> tuple:
            (value, losses), gradient = derivative(params, state, part, over)
            return gradient, value, losses

        if micro_batches == 1:
            return of(batch)
        parts = divided(batch, micro_batches)
        shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)

        def add(sums: tuple, part: Batch) -> tuple:
            *more, losses = of(part)
            return (*jax.tree.map(jnp.add, sums[:2], tuple(more)), together(sums[2], losses)), None

        return jax.lax.scan(add, zeros, parts)[0]

    return gradients
