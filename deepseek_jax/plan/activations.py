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

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import Mesh

from deepseek_jax.layers.base import Execution, bind, dtype_read, run_stack
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.alltoall import make_exchange
from deepseek_jax.parallel.context import Context
from deepseek_jax.parallel.sharding import EXPERTS, unsharder
from deepseek_jax.parallel.split_backward import SAVEABLE
from deepseek_jax.plan.layout import Layout
from deepseek_jax.plan.network import NORM_WIDTH, Network, Sizes, abstract_model
from deepseek_jax.plan.read_layers import layers_read, no_collection
from deepseek_jax.plan.recipes import V3_POLICY, Recipe
from deepseek_jax.plan.stage_buffers import Growth, growth

E5M6, FP8, BF16, FLOAT32 = 1.5, 1.0, 2.0, 4.0


class ActivationBytes(NamedTuple):
    """Bytes that one layer needs, per sequence and once (what it makes of its weights, if that is kept)."""

    # per_sequence, per_layer: kept from the forward to the backward pass
    per_sequence: float
    per_layer: float
    # work_per_sequence, work_per_layer: needed in addition while the backward pass runs
    work_per_sequence: float = 0.0
    work_per_layer: float = 0.0
    pools: Growth | None = None  # of a run's pipeline: the arrays that a layer adds to its buffers


def kept(
    family: ModuleType, sizes: Sizes, network: Network, layout: Layout, recipe: Recipe, rules: Mapping[str, str]
) -> dict[str, ActivationBytes]:
    """Returns what a layer of each stack keeps on one device."""
    return CachedActivations(family, sizes, network)(recipe, layout, rules)


class CachedActivations:
    """`kept` for many jobs. Each derivative of a network is computed once: a stack depends on few choices of a job.

    Policy "block" needs no derivative: it keeps the input alone (and a few hundred bytes of rotary frequencies).
    """

    def __init__(self, family: ModuleType, sizes: Sizes, network: Network):
        self.family, self.sizes, self.network = family, sizes, network
        self.known, self.grown = _found_before(family, sizes, network.index_rests)
        self.run = Execution(index_rests=network.index_rests)

    def __call__(self, recipe: Recipe, layout: Layout, rules: Mapping[str, str]) -> dict[str, ActivationBytes]:
        """Returns what a layer of each stack keeps on one device.

        The backward pass recomputes what policy "none" would have kept; the gradients are assumed to be as large.
        A run's pipeline makes what follows from weights alone once, before its ticks, under any policy.
        """
        if recipe.remat == V3_POLICY:
            return {name: _published(self.network, name, layout.part_len) for name in self.network.stacks}
        found = {}
        for name in self.network.stacks:
            each, once = self._bytes(name, recipe, layout, rules)
            all_each, all_once = self._bytes(name, replace(recipe, remat="none"), layout, rules)
            found[name] = ActivationBytes(each, once, 2 * all_each - each, all_once - once)
            if recipe.alike and layout.pipe > 1:
                pools = self._pools(name, recipe, layout, rules)
                found[name] = found[name]._replace(per_layer=all_once, work_per_layer=0.0, pools=pools)
        return found

    def _pools(self, stack: str, recipe: Recipe, layout: Layout, rules: Mapping[str, str]) -> Growth:
        """Returns the arrays that a layer of a stack adds to the buffers of a run's pipeline."""
        key = (stack, recipe.remat, recipe.activations, layout.part_len, layout.sequences, layout.mesh, *rules.items())
        if key not in self.grown:
            dtype = jnp.float32 if recipe.activations == FLOAT32 else jnp.bfloat16
            exchange = make_exchange(rules, layout.mesh)
            context = Context(layout.context)
            exchange = exchange and replace(exchange, level=0)
            run = replace(self.run, compute=dtype, unroll=0, exchange=exchange, context=context)
            blocks = getattr(abstract_model(self.family, self.sizes, run), stack)
            shape = (layout.sequences, layout.part_len, *self.network.stream_shape)
            self.grown[key] = growth(blocks, run, shape, rules, layout.mesh, SAVEABLE[recipe.remat])
        return self.grown[key]

    def _bytes(self, stack: str, recipe: Recipe, layout: Layout, rules: Mapping[str, str]) -> tuple[int, int]:
        """Returns the bytes that the backward pass of one layer of a stack needs: (per sequence, once).

        Of the mesh, only the number of a device's experts changes it, not the number of shards of a gathered weight.
        """
        if recipe.remat == "block":
            return int(layout.part_len * self.network.stream_width * recipe.activations), 0
        mesh = layout.mesh
        used = {logical for weight in self.network.of(stack) for logical in weight.axes}
        split_over = sorted((name, at) for name, at in rules.items() if name in used and mesh.shape.get(at, 1) > 1)
        n_shares = mesh.shape[rules[EXPERTS]] if rules.get(EXPERTS) and EXPERTS in used else 1
        key = (stack, recipe.remat, recipe.activations, layout.seq_len, layout.context, n_shares, *split_over)
        if key not in self.known:
            dtype = jnp.float32 if recipe.activations == FLOAT32 else jnp.bfloat16
            read = functools.partial(dtype_read, weights=dtype, compute=dtype)
            exchange, unshard = make_exchange(rules, mesh), unsharder(rules, mesh, read)
            context = Context(layout.context)
            how: dict[str, Any] = {"exchange": exchange, "unshard": unshard, "context": context}
            run = replace(self.run, compute=dtype, remat=recipe.remat, **how)
            blocks = getattr(abstract_model(self.family, self.sizes, run), stack)
            shapes = ((n, layout.part_len, *self.network.stream_shape) for n in (1, 2))
            one, two = (residual_bytes(blocks, run, shape, rules, mesh) for shape in shapes)
            self.known[key] = (two - one, 2 * one - two)
        return self.known[key]


@functools.lru_cache(64)
def _found_before(
    family: ModuleType, sizes: Sizes, index_rests: bool
) -> tuple[dict[tuple, tuple[int, int]], dict[tuple, Growth]]:
    """Returns what is known of a network's layers (`known`, `grown`), one pair of dicts however often it is planned."""
    return {}, {}


def residual_bytes(
    blocks: nnx.Module, run: Execution, shape_BTD: tuple[int, ...], rules: Mapping[str, str], mesh: Mesh
) -> int:
    """Returns the bytes that the backward pass of one layer of a stack needs besides its weights, on one device."""
    definition, params, router_bias = layers_read(blocks, 1, run, rules, mesh)

    def residuals(params: dict, router_bias: dict, x_BTD: jax.Array, positions_BT: jax.Array) -> object:
        tokens = Tokens(positions_BT, positions_BT)  # any ids will do

        def run_layer(params: dict, x_BTD: jax.Array) -> object:
            return run_stack(bind(definition, params, router_bias), x_BTD, run, lambda block, x, _: block(x, tokens))

        return jax.vjp(run_layer, params, x_BTD)[1]

    x_BTD = jax.ShapeDtypeStruct(shape_BTD, run.compute)
    positions_BT = jax.ShapeDtypeStruct(shape_BTD[:2], jnp.int32)
    trace = jax.make_jaxpr(residuals, axis_env=list(mesh.shape.items()))
    with no_collection():
        program = trace(params, router_bias, x_BTD, positions_BT).jaxpr
    given = set(program.invars)
    made: dict[Var, Any] = {var: var.aval for var in program.outvars if isinstance(var, Var) and var not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in made.values())


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
