"""What one layer keeps for the backward pass, in bytes a sequence.

Two ways to know it.  For our own policies (none, dots, block) the layer is differentiated on shapes alone
(`jax.make_jaxpr` of its `jax.vjp`): what the backward pass holds on to is then counted to the byte.  For V3's published
recomputation there is a rule, from the report's sections 3.2.3 and 3.3.3:

| kept of a token | bytes |
| --- | --- |
| inputs of the block's norms | 2 D each |
| what is projected from the residual stream inside attention (latents; q, k, v where there are none) | 2 a number |
| attention's output, in E5M6, and its log-sum | 1.5 H U + 4 H |
| inputs of the feed-forwards, in FP8 (of the routed experts one a chosen expert) | D |
| outputs of gate and up, in FP8, likewise | 2 F |

Norms, up-projections and SwiGLU's output are made again.  V3: 159 kB a token and layer.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import AbstractMesh

from deepseek_jax.layers.base import Execution, bind, logical_axes, run_stack, split
from deepseek_jax.layers.decoder import whole_sequences
from deepseek_jax.parallel.sharding import expert_axis, placements, unsharder
from deepseek_jax.plan.layout import Layout
from deepseek_jax.plan.network import NORM_WIDTH, Network, abstract_model
from deepseek_jax.plan.recipes import V3_POLICY, Recipe

E5M6, FP8, BF16, FLOAT32 = 1.5, 1.0, 2.0, 4.0


class Kept(NamedTuple):
    """Bytes that one layer needs, of each sequence and once (its weights in the compute dtype, where those are kept).

    Attributes:
        per_sequence, per_layer: from its forward to its backward pass.
        work_per_sequence, work_per_layer: besides, while its backward pass runs.
    """

    per_sequence: float
    per_layer: float
    work_per_sequence: float = 0.0
    work_per_layer: float = 0.0


def kept(
    family: ModuleType, sizes: object, network: Network, layout: Layout, recipe: Recipe, rules: Mapping[str, str]
) -> dict[str, Kept]:
    """What a layer of each stack keeps on one device."""
    if recipe.remat == V3_POLICY:
        return {name: _published(network, name, layout.seq_len) for name in network.stacks}
    mesh = AbstractMesh((layout.data, layout.expert), ("data", "expert"))
    dtype = jnp.float32 if recipe.activations == FLOAT32 else jnp.bfloat16
    axis, unshard = expert_axis(rules, mesh), unsharder(rules, mesh)
    run = Execution(compute=dtype, remat=recipe.remat, expert_axis=axis, unshard=unshard)
    model = abstract_model(family, sizes, run)
    return {name: traced(model, name, run, layout.seq_len, rules, mesh) for name in network.stacks}


def traced(
    model: nnx.Module, stack: str, run: Execution, seq_len: int, rules: Mapping[str, str], mesh: AbstractMesh
) -> Kept:
    """What a layer of our own code keeps, from its derivative on shapes: one sequence and two tell the two numbers.

    Its backward pass makes again what policy "none" would have kept, and gradients that are taken to be as large.
    """

    def two_numbers(run: Execution) -> tuple[int, int]:
        one, two = (residual_bytes(model, stack, run, (n, seq_len), rules, mesh) for n in (1, 2))
        return two - one, 2 * one - two

    mine = two_numbers(run)
    everything = mine if run.remat == "none" else two_numbers(replace(run, remat="none"))
    return Kept(*mine, 2 * everything[0] - mine[0], everything[1] - mine[1])


def residual_bytes(
    model: nnx.Module,
    stack: str,
    run: Execution,
    shape_BT: tuple[int, int],
    rules: Mapping[str, str],
    mesh: AbstractMesh,
) -> int:
    """Bytes that the backward pass of one layer of `stack` needs besides its weights, on one device of `mesh`."""
    blocks = getattr(model, stack)
    definition, params, router_bias = split(blocks)
    axes, _ = logical_axes(blocks)
    places = placements(axes, params, rules, mesh)
    params = jax.tree.map(lambda x, place: local_part(one_layer(x), place.spec, mesh), params, places)
    router_bias = jax.tree.map(one_layer, router_bias)

    def residuals(params: dict, router_bias: dict, x_BTD: jax.Array, positions_BT: jax.Array) -> object:
        attend = whole_sequences(positions_BT, None)

        def run_layer(params: dict, x_BTD: jax.Array) -> object:
            return run_stack(bind(definition, params, router_bias), x_BTD, run, lambda block, x, _: block(x, attend))

        return jax.vjp(run_layer, params, x_BTD)[1]

    x_BTD = jax.ShapeDtypeStruct((*shape_BT, model.config.d_model), run.compute)
    positions_BT = jax.ShapeDtypeStruct(shape_BT, jnp.int32)
    trace = jax.make_jaxpr(residuals, axis_env=list(mesh.shape.items()))
    program = trace(params, router_bias, x_BTD, positions_BT).jaxpr
    made = {var: var.aval for var in program.outvars if isinstance(var, Var) and var not in program.invars}
    return sum(aval.size * aval.dtype.itemsize for aval in made.values())


def v3_bytes(network: Network, stack: str) -> float:
    """Bytes of a token that a layer of `stack` keeps under V3's published recomputation."""
    total = 0.0
    for weight in network.of(stack):
        n_in, n_out = weight.widths if weight.is_matrix else (0, 0)
        last = weight.name.rpartition(".")[2]
        if last == "gain" and weight.axes[-1] == NORM_WIDTH:
            total += BF16 * weight.shape[-1]
        elif ".attention." in weight.name and weight.is_matrix and weight.axes[-1] == NORM_WIDTH:
            total += E5M6 * n_in + FLOAT32 * weight.shape[1]
        elif ".attention." in weight.name and weight.is_matrix and not weight.reads_latent:
            total += BF16 * n_out
        elif last.startswith("gate_"):
            total += network.copies(weight) * FP8 * (n_in + n_out)
        elif last.startswith("up_"):
            total += network.copies(weight) * FP8 * n_out
    return total


def _published(network: Network, stack: str, seq_len: int) -> Kept:
    """V3's rule; while a layer's backward pass runs, the outputs of its matmuls are there in bfloat16."""
    return Kept(seq_len * v3_bytes(network, stack), 0.0, seq_len * BF16 * matmul_outputs(network, stack), 0.0)


def matmul_outputs(network: Network, stack: str) -> int:
    """Numbers that the matmuls of one layer of `stack` make of a token."""
    return sum(network.copies(w) * w.widths[1] for w in network.of(stack) if w.is_matrix)


def one_layer(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer of a stacked array."""
    return jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)


def local_part(array: jax.ShapeDtypeStruct, spec: tuple, mesh: AbstractMesh) -> jax.ShapeDtypeStruct:
    """One device's part of an array laid out as `spec`."""
    axes = (*spec, *[None] * (len(array.shape) - len(spec)))
    shape = tuple(n // (mesh.shape[axis] if axis else 1) for n, axis in zip(array.shape, axes, strict=True))
    return jax.ShapeDtypeStruct(shape, array.dtype)
