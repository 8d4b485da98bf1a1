"""Optimizers: from gradients to new weights, one file per method.

    optimizer = adamw(...)(model, places)                                # for the weights of this model
    state = optimizer.init(params)
    params, state = optimizer.update(gradients, state, params, rate)

The training step cuts gradients, weights and state over the devices (ZeRO-1) and calls `update` with the parts of one
device. Stacked axes are cut first (`parallel.sharding`), so that matrices stay whole where they can; a method that
works on whole matrices has the others put together by `parallel.zero.by_matrix`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx

from deepseek_jax.layers.base import Tree
from deepseek_jax.train.optimizers.adamw import adamw
from deepseek_jax.train.optimizers.muon import muon
from deepseek_jax.train.optimizers.schedule import Schedule

__all__ = ["OF_MUON", "Optimizer", "OptimizerFor", "Schedule", "adamw", "by_name", "muon"]

OF_MUON = ("momentum", "rms")  # arguments of `muon` that `adamw` does not have


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


# A method for one model: it may read how each weight was declared, and its `parallel.sharding.Placement`.
OptimizerFor = Callable[[nnx.Module, Tree], Optimizer]


def by_name(method: str, **numbers: Any) -> OptimizerFor:
    """The method of this name, "adamw" or "muon", from `muon`'s arguments."""
    if method == "muon":
        return muon(**numbers)
    return adamw(**{name: number for name, number in numbers.items() if name not in OF_MUON})
