"""Low-rank adapters (LoRA): matrices stay frozen, and a product of two thin ones is learnt beside each.

    W' = W + alpha / r  B A          A [r, in],  B [out, r],  B = 0 at first, so that W' = W      (LoRA, section 4.1)

A and B belong to a matrix as it is published, [out, in], so that they are those of PEFT's files. A published matrix may
hold two of our weights, which then share A: latent attention's kv_a_proj_with_mqa and kv_b_proj.

W' is made where a layer runs, for that layer alone (`add`): every way to run, every kernel and every mesh computes with
plain weights. It costs in x out x r products per layer and micro-batch, fewer than two thin products with the
activations of more than in out / (in + out) tokens; and in the backward pass the gradient of W', of one layer at a
time. Recompute blocks (`run.remat`), or the backward pass keeps the W' of all layers.

Source: Hu et al. 2021, arXiv 2106.09685; initial values as in PEFT.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.nn.initializers import zeros
from jax.typing import DTypeLike

from deepseek_jax.layers.base import Tree, param

ADAPTERS = "adapters"  # attribute of a block that has some, and so a part of the paths of their weights
Path = tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A published matrix that has an adapter."""

    name: str  # of the attribute that holds the adapter: "self_attn_q_proj"
    shape: tuple[int, int]  # (out, in)
    weights: tuple[Path, ...]  # of our weights in it, below their block: ("attention", "q_DHQ")
    # theirs, ours, sizes: axes of the matrix and of our weights, as einops spells them, and the sizes it must know
    theirs: str
    ours: str
    sizes: tuple[tuple[str, int], ...]
    cut: tuple[int, int] | None  # (axis, position) at which ours is split in two; None for a single weight

    def sides(self, rank: int) -> dict[str, tuple[int, int]]:
        """Returns the shapes of A^T, "down", and B^T, "up", for one layer."""
        n_out, n_in = self.shape
        return {"down": (n_in, rank), "up": (rank, n_out)}

    def parts(self, matrix: Any) -> list:
        """Returns what a published matrix holds of each of our weights."""
        whole = rearrange(matrix, f"{self.theirs} -> {self.ours}", **dict(self.sizes))
        if self.cut is None:
            return [whole]
        axis, place = self.cut
        before = (slice(None),) * axis
        return [whole[(*before, slice(place))], whole[(*before, slice(place, None))]]

    def update(self, down: Any, up: Any, scale: float) -> list:
        """Returns scale B A as parts of our weights, from A^T [in, r] and B^T [r, out]."""
        return self.parts(scale * jnp.matmul(up.T, down.T, precision="highest"))


@dataclass(frozen=True)
class Lora:
    """The adapters of a model."""

    rank: int  # r
    alpha: float
    blocks: tuple[tuple[Path, tuple[Target, ...]], ...]  # path of each kind of block, ("moe_blocks",), and its targets

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """The two thin matrices of a target, for all layers of a stack: A^T [L, in, r] and B^T [L, r, out]."""

    def __init__(self, target: Target, rank: int, n_layers: int, *, rngs: nnx.Rngs):
        sides, axes, bound = target.sides(rank), ("layers", None, None), target.shape[1] ** -0.5

        def uniform(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.down = param(rngs, (n_layers, *sides["down"]), axes, uniform, role="adapter")
        self.up = param(rngs, (n_layers, *sides["up"]), axes, zeros, role="adapter")


class Adapters(nnx.Module):
    """The adapters of a block."""

    def __init__(self, lora: Lora, path: Path, n_layers: int, *, rngs: nnx.Rngs):
        self.lora, self.path = lora, path
        for target in self.targets:
            setattr(self, target.name, Adapter(target, lora.rank, n_layers, rngs=rngs))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Those of the block."""
        return dict(self.lora.blocks)[self.path]


def attach(model: nnx.Module, lora: Lora, *, rngs: nnx.Rngs) -> nnx.Module:
    """Gives the blocks of a model adapters; its `run` must have `adapt=add`. Returns the model."""
    for path, targets in lora.blocks:
        block = _at(model, path)
        n_layers = _at(block, targets[0].weights[0])[...].shape[0]
        setattr(block, ADAPTERS, Adapters(lora, path, n_layers, rngs=rngs))
    return model


def add(layer: nnx.Module) -> None:
    """Adds to the weights of a layer, in place, what its adapters have learnt: `Execution.adapt`."""
    blocks = [block for _, block in nnx.iter_graph(layer) if isinstance(getattr(block, ADAPTERS, None), Adapters)]
    for block in blocks:
        adapters = getattr(block, ADAPTERS)
        for target in adapters.targets:
            adapter = getattr(adapters, target.name)
            update = target.update(adapter.down[...], adapter.up[...], adapters.lora.scale)
            for path, part in zip(target.weights, update, strict=True):
                weight = _at(block, path)
                weight.set_value(summed(weight[...], part))


def summed(weight: Any, part: Any) -> Any:
    """Returns a weight with its part of an update, in the weight's dtype."""
    return (weight.astype(jnp.float32) + part).astype(weight.dtype)


def merged(params: Tree, lora: Lora) -> Tree:
    """Returns the weights of a model with adapters as those of a model without, with what the adapters have learnt."""
    flat = flatten_dict(params, keep_empty_nodes=True)
    for block, targets in lora.blocks:
        for target in targets:
            down, up = (flat.pop((*block, ADAPTERS, target.name, side)) for side in ("down", "up"))
            paths = [(*block, *path) for path in target.weights]
            flat |= zip(paths, _merged(target, lora.scale, [flat[path] for path in paths], down, up), strict=True)
    return unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _merged(target: Target, scale: float, weights: list[jax.Array], down: jax.Array, up: jax.Array) -> list[jax.Array]:
    """Returns the weights of a target, of all layers, with what its adapter has learnt."""
    update = jax.vmap(lambda down, up: target.update(down, up, scale))(down, up)
    return [summed(weight, part) for weight, part in zip(weights, update, strict=True)]


def abstract_adapters(shapes: Tree, lora: Lora) -> dict[Path, jax.ShapeDtypeStruct]:
    """Returns path below params -> shape of the adapters of a model whose "params" have these shapes."""
    flat, found = flatten_dict(shapes), {}
    for block, targets in lora.blocks:
        n_layers = flat[*block, *targets[0].weights[0]].shape[0]
        for target in targets:
            for side, shape in target.sides(lora.rank).items():
                found[*block, ADAPTERS, target.name, side] = jax.ShapeDtypeStruct((n_layers, *shape), jnp.float32)
    return found


def beside(params: Tree, adapters: dict[Path, Any]) -> Tree:
    """Returns the weights of a model together with its adapters, given by their paths."""
    return unflatten_dict({**flatten_dict(params, keep_empty_nodes=True), **adapters})


def is_adapter(path: Path) -> bool:
    """Returns whether a weight is an adapter's, by its path: what is trained (`train.trainable`)."""
    return ADAPTERS in path


def _at(module: Any, path: Path) -> Any:
    """Returns what is at a path below a module."""
    for key in path:
        module = module[int(key)] if key.isdigit() else getattr(module, key)
    return module
