"""What one layer, or a repeated group of them, keeps for the backward pass, in bytes per sequence.

There are two ways to know it. For our own policies (none, dots, block) the layer is differentiated on shapes alone
(`jax.make_jaxpr` of its `jax.vjp`), and what the backward pass keeps is counted to the byte. For V3's published
recomputation there is a rule, from sections 3.2.3 and 3.3.3 of the report:

| kept per token | bytes |
| --- | --- |
| inputs of the block's norms | 2 D each |
| projections of the residual stream inside attention (latents; q, k, v if there are none) | 2 per number |
| attention's output, in E5M6, and its log-sum | 1.5 H U + 4 H |
| inputs of the feed-forwards, in FP8 (one per chosen expert) | D |
| outputs of gate and up, in FP8 (likewise) | 2 F |

Norms, up-projections and SwiGLU's output are recomputed. V3: 159 kB per token and layer.
"""

import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import Mesh

from deepseek_jax.layers.base import Execution, bind, dtype_read, logical_axes, roles, run_stack, split
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.alltoall import make_exchange
from deepseek_jax.parallel.sharding import EXPERTS, Placement, placements, unsharder
from deepseek_jax.plan.layout import Layout
from deepseek_jax.plan.network import NORM_WIDTH, Network, Sizes, abstract_model
from deepseek_jax.plan.recipes import V3_POLICY, Recipe

E5M6, FP8, BF16, FLOAT32 = 1.5, 1.0, 2.0, 4.0


class ActivationBytes(NamedTuple):
    """Bytes that one layer needs, per sequence and once (what it makes of its weights, if that is kept)."""

    # per_sequence, per_layer: kept from the forward to the backward pass
    per_sequence: float
    per_layer: float
    # work_per_sequence, work_per_layer: needed in addition while the backward pass runs
    work_per_sequence: float = 0.0
    work_per_layer: float = 0.0


def kept(
    family: ModuleType, sizes: Sizes, network: Network, layout: Layout, recipe: Recipe, rules: Mapping[str, str]
) -> dict[str, ActivationBytes]:
    """Returns what a layer of each stack keeps on one device."""
    return CachedActivations(family, sizes, network)(recipe, layout, rules)


class CachedActivations:
    """`kept` for many jobs of one network. Each derivative is computed once: a stack depends on few choices of a job.

    Policy "block" needs no derivative: it keeps the input alone (and a few hundred bytes of rotary frequencies).
    """

    def __init__(self, family: ModuleType, sizes: Sizes, network: Network):
        self.family, self.sizes, self.network = family, sizes, network
        self.known: dict[tuple, tuple[int, int]] = {}

    def __call__(self, recipe: Recipe, layout: Layout, rules: Mapping[str, str]) -> dict[str, ActivationBytes]:
        """Returns what a layer of each stack keeps on one device.

        The backward pass recomputes what policy "none" would have kept; the gradients are assumed to be as large.
        """
        if recipe.remat == V3_POLICY:
            return {name: _published(self.network, name, layout.seq_len) for name in self.network.stacks}
        found = {}
        for name in self.network.stacks:
            each, once = self._bytes(name, recipe, layout, rules)
            all_each, all_once = self._bytes(name, replace(recipe, remat="none"), layout, rules)
            found[name] = ActivationBytes(each, once, 2 * all_each - each, all_once - once)
        return found

    def _bytes(self, stack: str, recipe: Recipe, layout: Layout, rules: Mapping[str, str]) -> tuple[int, int]:
        """Returns the bytes that the backward pass of one layer of a stack needs: (per sequence, once).

        Of the mesh, only the number of a device's experts changes it, not the number of shards of a gathered weight.
        """
        if recipe.remat == "block":
            return int(layout.seq_len * self.network.d_model * recipe.activations), 0
        mesh = layout.mesh
        used = {logical for weight in self.network.of(stack) for logical in weight.axes}
        split_over = sorted((name, at) for name, at in rules.items() if name in used and mesh.shape.get(at, 1) > 1)
        n_shares = mesh.shape[rules[EXPERTS]] if rules.get(EXPERTS) and EXPERTS in used else 1
        key = (stack, recipe.remat, recipe.activations, layout.seq_len, n_shares, *split_over)
        if key not in self.known:
            dtype = jnp.float32 if recipe.activations == FLOAT32 else jnp.bfloat16
            read = functools.partial(dtype_read, weights=dtype, compute=dtype)
            exchange, unshard = make_exchange(rules, mesh), unsharder(rules, mesh, read)
            run = Execution(compute=dtype, remat=recipe.remat, exchange=exchange, unshard=unshard)
            blocks = getattr(abstract_model(self.family, self.sizes, run), stack)
            shapes = ((n, layout.seq_len, self.network.d_model) for n in (1, 2))
            one, two = (residual_bytes(blocks, run, shape, rules, mesh) for shape in shapes)
            self.known[key] = (two - one, 2 * one - two)
        return self.known[key]


def residual_bytes(
    blocks: nnx.Module, run: Execution, shape_BTD: tuple[int, int, int], rules: Mapping[str, str], mesh: Mesh
) -> int:
    """Returns the bytes that the backward pass of one layer of a stack needs besides its weights, on one device."""
    definition, params, router_bias = split(blocks)
    axes, _ = logical_axes(blocks)
    places = placements(axes, params, rules, mesh)

    def read(x: jax.ShapeDtypeStruct, place: Placement, role: str) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if place.is_sharded else dtype_read(role, run.compute, run.compute)
        return local_part(one_layer(x), tuple(place.spec), mesh).update(dtype=dtype)

    params = jax.tree.map(read, params, places, roles(blocks))
    router_bias = jax.tree.map(one_layer, router_bias)

    def residuals(params: dict, router_bias: dict, x_BTD: jax.Array, positions_BT: jax.Array) -> object:
        tokens = Tokens(positions_BT, positions_BT)  # any ids will do

        def run_layer(params: dict, x_BTD: jax.Array) -> object:
            return run_stack(bind(definition, params, router_bias), x_BTD, run, lambda block, x, _: block(x, tokens))

        return jax.vjp(run_layer, params, x_BTD)[1]

    x_BTD = jax.ShapeDtypeStruct(shape_BTD, run.compute)
    positions_BT = jax.ShapeDtypeStruct(shape_BTD[:2], jnp.int32)
    trace = jax.make_jaxpr(residuals, axis_env=list(mesh.shape.items()))
    with _no_collection():
        program = trace(params, router_bias, x_BTD, positions_BT).jaxpr
    given = set(program.invars)
    made: dict[Var, Any] = {var: var.aval for var in program.outvars if isinstance(var, Var) and var not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in made.values())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disables the garbage collector, which takes a third of the time of a trace and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def v3_bytes(network: Network, stack: str) -> float:
    """Returns the bytes per token that a layer of `stack` keeps under V3's published recomputation."""
    total = 0.0
    for weight in network.of(stack):
        n_in, n_out = weight.widths if weight.is_matrix else (0, 0)
        if weight.role == "gain" and weight.axes[-1] == NORM_WIDTH:
            total += BF16 * weight.shape[-1]
        elif weight.role == "attention_out":
            total += E5M6 * n_in + FLOAT32 * weight.shape[1]
        elif weight.role == "attention_in" and not weight.reads_latent:
            total += BF16 * n_out
        elif weight.role == "gate":
            total += network.copies(weight) * FP8 * (n_in + n_out)
        elif weight.role == "up":
            total += network.copies(weight) * FP8 * n_out
    return total


def _published(network: Network, stack: str, seq_len: int) -> ActivationBytes:
    """Returns V3's rule; while a layer's backward pass runs, the outputs of its matmuls exist in bfloat16."""
    return ActivationBytes(seq_len * v3_bytes(network, stack), 0, seq_len * BF16 * matmul_outputs(network, stack), 0)


def matmul_outputs(network: Network, stack: str) -> int:
    """Returns how many numbers per token the matmuls of one layer of `stack` produce."""
    return sum(network.copies(w) * w.widths[1] for w in network.of(stack) if w.is_matrix)


def one_layer(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape of one layer of a stacked array."""
    return jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)


def local_part(array: jax.ShapeDtypeStruct, spec: tuple, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the shape of one device's part of an array laid out as `spec`."""
    axes = (*spec, *[None] * (len(array.shape) - len(spec)))
    shape = tuple(n // (mesh.shape[axis] if axis else 1) for n, axis in zip(array.shape, axes, strict=True))
    return jax.ShapeDtypeStruct(shape, array.dtype)
