"""Networks with shapes in place of arrays; of a config's, what it holds and whether that fits."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

import jax
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.compat import memory_bytes
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.base import Execution, Tree, shapes_alone, split
from deepseek_jax.models import family
from deepseek_jax.precision.policy import policy
from deepseek_jax.tree import size

Module = TypeVar("Module", bound=nnx.Module)
AHEAD = "mtp"  # top-level entry of the multi-token-prediction modules, which published counts leave out


def abstract(build: Callable[[nnx.Rngs], Module]) -> Module:
    """The module that `build` makes, with shapes in place of arrays."""
    with shapes_alone():
        return nnx.eval_shape(lambda: build(nnx.Rngs(0)))


def abstract_weights(config: ConfigDict) -> Tree:
    """{"params", "router_bias"} of a config's model, shapes in place of arrays."""
    maker = family(config.family)
    params, router_bias = _weights_of(maker, maker.Config.from_config(config.model))
    return jax.tree.map(
        lambda shape: shape, {"params": params, "router_bias": router_bias}
    )  # dicts of the caller's own


@functools.lru_cache(8)
def _weights_of(maker: ModuleType, sizes: Hashable) -> tuple[Tree, Tree]:
    """(params, router biases) of a family's model, which loading a model asks for several times."""
    return split(abstract(lambda rngs: maker.Model(sizes, rngs=rngs)))[1:]


def abstract_module(config: ConfigDict, kernels: Kernels | None = None, unroll: int = 1) -> nnx.Module:
    """The network of a config with shapes in place of arrays; arguments as for `module`."""
    return abstract(lambda rngs: module(config, rngs.params(), kernels, unroll))


def count_parameters(params: Tree) -> tuple[int, int]:
    """(of the main model, of its multi-token-prediction modules), embedding and head counted once, with the former."""
    sizes = {name: size(part) for name, part in params.items()}
    ahead = sizes.pop(AHEAD, 0)
    return sum(sizes.values()), ahead


def module(config: ConfigDict, key: jax.Array, kernels: Kernels | None = None, unroll: int = 1) -> nnx.Module:
    """The network of a config with fresh weights, computed by these kernels; None: by those of the config.

    For `unroll` see `layers.base.Execution`.
    """
    maker = family(config.family)
    precision, kernels = policy(config.precision, config.fp8), kernels or Kernels(**config.kernels)
    matmul = precision.matmul(kernels)
    run = Execution(compute=precision.compute, matmul=matmul, kernels=kernels, unroll=unroll)
    return maker.Model(maker.Config.from_config(config.model), run, rngs=nnx.Rngs(key))


def run_as(config: ConfigDict, run: Execution) -> nnx.Module:
    """The network of a config, run so, with shapes in place of arrays. Raises UserError if its layers cannot."""
    maker = family(config.family)
    return abstract(lambda rngs: maker.Model(maker.Config.from_config(config.model), run, rngs=rngs))


def with_routes(config: ConfigDict, run: Execution) -> Execution:
    """`run` whose blocks report routes. Raises UserError if they cannot (`why_no_routes`)."""
    if why := why_no_routes(config):
        raise UserError(f"routes=True: {why}. Leave routes=False.")
    return replace(run, routes=True)


def why_no_routes(config: ConfigDict) -> str:
    """Why the blocks of a config's model cannot all report routes; "" if they can."""
    if "expert_width" not in config.model:
        return f"the model of {config.name} has no routed experts"
    model: Any = abstract_module(config)
    groups = [name for name, blocks in model.groups.items() if len(blocks) > 1]
    if groups:
        return (
            f"different blocks of {config.name} run as one ({', '.join(groups)}), which keeps no routes in generation"
        )
    return ""


def check_memory(name: str, weights: Tree) -> None:
    """Raises UserError for weights that do not fit; allocating them anyway may get the process killed silently."""
    needed, there = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(weights)), memory_bytes()
    if there and needed > there:
        raise UserError(
            f"the weights of {name} take {needed / 2**30:,.0f} GiB, this device has {there / 2**30:,.0f}. "
            "For shapes alone there is deepseek-jax inspect; to convert without loading, deepseek-jax convert."
        )
