"""Optimizers: from gradients to new weights, one file per method.

    optimizer = adamw(...)(model)                                        # for the weights of this model
    state = optimizer.init(params)
    params, state = optimizer.update(gradients, state, params, rate)

The training step cuts gradients, weights and state over the devices (ZeRO-1) and calls `update` with the parts of one
device. Stacked axes are cut first (`parallel.sharding`), so that matrices stay whole where they can.
"""

from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from deepseek_jax.layers.base import Tree
from deepseek_jax.train.optimizers.adamw import adamw
from deepseek_jax.train.optimizers.schedule import Schedule

__all__ = ["Optimizer", "OptimizerFor", "Schedule", "adamw"]


class Optimizer(Protocol):
    """A method that updates weights.

    Its state is a dict of trees: each array is a scalar (a counter), or has the path and the shape of a weight.
    """

    def init(self, params: Tree) -> dict[str, Tree]:
        """The state before the first step."""

    def update(self, gradients: Tree, state: dict[str, Tree], params: Tree, rate: jax.Array) -> tuple[Tree, dict]:
        """One step.

        Args:
            gradients: already clipped, float32; like `params`.
            state: as `init` or the last `update` returned it.
            params: float32 weights, or one device's parts of them.
            rate: learning rate of this step, a float32 scalar.

        Returns (new params, new state).
        """


OptimizerFor = Callable[[nnx.Module], Optimizer]  # a method for one model: it may read how each weight was declared
