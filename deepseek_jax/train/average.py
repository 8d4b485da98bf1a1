"""The exponential moving average of the weights (EMA), in the memory of the hosts.

    a <- a + (1 - decay) * (w - a)    after each step that changed the weights

It shows early how good a model would be after its learning rate has decayed. Each process keeps the parts of the
float32 weights that its devices keep, and updates them in a thread while the next step runs: the devices hold a copy
of their parts until it has reached the host, and compute nothing.
Paper: V3 section 3.2.3 (Exponential Moving Average in CPU).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.layers.base import Tree

Part = tuple[slice, ...]  # where a device's part lies in the whole array


class MovingAverage:
    """The average of a run's weights.

    Args:
        decay: of a step, between 0 and 1.
        params: the weights that it begins with, as a state holds them (float32, on their devices).
    """

    def __init__(self, decay: float, params: Tree):
        self.decay = np.float32(decay)
        self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._pending: Future | None = None
        self._parts = [{index: np.array(part) for index, part in _parts(x)} for x in jax.tree.leaves(params)]

    def add(self, params: Tree, finite: jax.Array) -> None:
        """Takes the weights after a step, which may be donated afterwards; waits only for the update before this one.

        `finite` is 0 where the step was skipped: the average stays as it is.
        """
        copy = self._copy(params)
        self.wait()
        self._pending = self._thread.submit(self._update, jax.tree.leaves(copy), finite)

    def wait(self) -> None:
        """Waits until the average includes all that was added; raises what went wrong meanwhile."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def params(self) -> Tree:
        """The average on the devices, laid out like the weights."""
        self.wait()
        leaves, structure = jax.tree.flatten(self._abstract)

        def whole(like: Any, parts: dict) -> jax.Array:
            def part(index: Part | None) -> np.ndarray:
                assert index is not None
                return parts[_key(index, like.shape)].copy()  # the array may keep what it is given

            return jax.make_array_from_callback(like.shape, like.sharding, part)

        return jax.tree.unflatten(structure, [whole(*pair) for pair in zip(leaves, self._parts, strict=True)])

    def _update(self, leaves: list[jax.Array], finite: jax.Array) -> None:
        if not finite:
            return
        for parts, array in zip(self._parts, leaves, strict=True):
            for index, part in _parts(array):
                parts[index] += (1 - self.decay) * (np.asarray(part) - parts[index])


def _key(index: Part, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(cut.indices(n) for cut, n in zip(index, shape, strict=True))


def _parts(array: jax.Array) -> list[tuple[tuple, jax.Array]]:
    """Returns where each part lies that this process's devices keep of an array, and the part; each part once."""
    return list({_key(shard.index, array.shape): shard.data for shard in array.addressable_shards}.items())
