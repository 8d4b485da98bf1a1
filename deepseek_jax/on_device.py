"""How a model generates on the device that is here: by which kernels, and from weights of which dtypes.

| device | layers | routed experts |
| --- | --- | --- |
| CPU, TPU | a loop over stacked layers, which compiles fast | XLA's loop over the experts' rows |
| GPU | no loop: XLA would copy each layer's weights out of the stack in every step | the same |
| Hopper | no loop | the kernel that reads chosen experts once; bfloat16 and widths that are multiples of 128 |
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.kernels import XLA, Kernels
from deepseek_jax.layers.base import Tree, dtype_read, roles, split
from deepseek_jax.precision.policy import policy


def definition(config: ConfigDict, in_a_loop: nnx.GraphDef) -> nnx.GraphDef:
    """Returns the network of a config as this device generates with it; `in_a_loop` is the one by `XLA` in a loop."""
    if jax.default_backend() != "gpu":
        return in_a_loop
    return split(abstract_module(config, kernels(config), unroll=0))[0]


def kernels(config: ConfigDict) -> Kernels:
    """Returns the kernels by which a GPU generates: those of XLA but for routed experts, where theirs can run."""
    from pallas_kernels.mosaic_gpu import is_hopper  # Mosaic GPU is not part of every JAX build

    sizes = config.model
    widths = (sizes.d_model, sizes.expert_width) if "expert_width" in sizes else ()
    takes_kernel = widths and not any(width % 128 for width in widths) and config.precision == "bf16"
    return Kernels(grouped_matmul="mosaic_gpu") if takes_kernel and is_hopper() else XLA


class Narrowed:
    """Weights as a step reads them: those stored wider than that are cast once, not in every step.

    Others are the same arrays. A leaf that was replaced since the last call is cast again.
    """

    def __init__(self, config: ConfigDict):
        self._config = config
        self._cast: dict[tuple, tuple[jax.Array, jax.Array]] = {}  # by path: what was stored, and what is read

    def __call__(self, params: Tree) -> Tree:
        """Returns the trained weights in the dtypes in which they are read."""
        if policy(self._config.precision).compute == jnp.float32:
            return params
        return jax.tree_util.tree_map_with_path(self._narrowed, params, self._dtypes)

    @functools.cached_property
    def _dtypes(self) -> Tree:
        chosen = policy(self._config.precision, self._config.fp8)
        of_role = roles(abstract_module(self._config, XLA))
        return jax.tree.map(lambda role: dtype_read(role, chosen.weights, chosen.compute), of_role)

    def _narrowed(self, path: tuple, stored: jax.Array, dtype: DTypeLike) -> jax.Array:
        if jnp.dtype(dtype).itemsize >= stored.dtype.itemsize:
            return stored
        if path not in self._cast or self._cast[path][0] is not stored:
            self._cast[path] = stored, stored.astype(dtype)
        return self._cast[path][1]
